// decode_sparse: out[r] = sum over the row's entries e of values[e] * weight[indices[e]]  + bias.
// Entries with a negative index (the padding of linear_topk) count nothing.
#pragma once

#include "saerec/views.h"

namespace saerec {

struct DecodeSparseParams {
  const int64_t* offsets = nullptr;  // (B + 1)
  IndexArray indices;
  Vector values;  // one per entry
  Matrix weight;  // (n, d)
  Vector bias;    // (d) or absent
  Matrix out;     // (B, d)
  int threads = 1;
};

void decode_sparse(const DecodeSparseParams& params);

}  // namespace saerec
