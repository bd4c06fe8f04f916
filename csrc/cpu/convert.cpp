#define SAEREC_TIER portable
#include "convert.h"

#include "simd.h"

namespace saerec {

float element_at(const Vector& vector, int64_t i) { return portable::value_at(vector, i); }

void store_element(DType dtype, void* data, int64_t i, float value) {
  portable::with_element(dtype, [&](auto element) {
    static_cast<typename decltype(element)::Storage*>(data)[i] = portable::narrow(element, value);
  });
}

std::vector<float> widened(const Vector& vector) {
  std::vector<float> values;
  if (vector.data == nullptr) return values;
  if (vector.dtype == DType::kFloat32 && vector.stride == 1) {
    const auto* data = static_cast<const float*>(vector.data);
    values.assign(data, data + vector.size);
    return values;
  }
  values.reserve(static_cast<std::size_t>(vector.size));
  for (int64_t i = 0; i < vector.size; ++i) values.push_back(element_at(vector, i));
  return values;
}

}  // namespace saerec
