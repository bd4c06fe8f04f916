// linear_topk: the k largest of  score[r][f] = <x[r] - shift, weight[f]> + bias[f]  per row r, never writing (B, n).
//
// Order: descending score, ties by smallest feature, NaN above everything. With `exclude`, the listed features of a
// row do not take part; a row with fewer than k candidates ends in (-inf, -1).
#pragma once

#include "saerec/views.h"

namespace saerec {

struct LinearTopKParams {
  Matrix x;       // (B, d)
  Matrix weight;  // (n, d)
  Vector bias;    // (n) or absent
  Vector shift;   // (d) or absent
  int64_t k = 0;
  const int64_t* exclude_offsets = nullptr;  // (B + 1) or absent
  const int64_t* exclude_ids = nullptr;
  int64_t exclude_count = 0;  // of ids
  bool relu = false;          // max(value, 0) after the selection
  void* values = nullptr;     // (B, k) contiguous, dtype of x
  void* indices = nullptr;    // (B, k) contiguous
  IndexType index_type = IndexType::kInt64;
  const void* packed = nullptr;  // of the encoder (saerec/packed.h), or absent
  int64_t packed_bytes = 0;
  int threads = 1;
};

void linear_topk(const LinearTopKParams& params);

}  // namespace saerec
