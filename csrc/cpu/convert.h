// Scalar conversions for the portable drivers.
#pragma once

#include <vector>

#include "saerec/views.h"

namespace saerec {

float element_at(const Vector& vector, int64_t i);
void store_element(DType dtype, void* data, int64_t i, float value);
// The vector as contiguous float32; empty where it is absent.
std::vector<float> widened(const Vector& vector);

}  // namespace saerec
