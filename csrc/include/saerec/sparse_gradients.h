// The two gradients every sparse op needs; neither allocates anything of size entries x d.
//
// sparse_dot:             out[e]    = <rows[row(e)], weight[indices[e]]>
// sparse_weight_gradient: out[f]    = sum over entries e of feature f of coefficients[e] * (rows[row(e)] - shift)
//                         out_sum[f] = sum over entries e of feature f of coefficients[e]
// The second groups entries by feature with a counting sort, so sums run in row order whatever the number of threads.
#pragma once

#include "saerec/views.h"

namespace saerec {

struct SparseDotParams {
  const int64_t* offsets = nullptr;  // (B + 1)
  IndexArray indices;
  Matrix rows;          // (B, d), unit column stride
  Matrix weight;        // (n, d), unit column stride
  void* out = nullptr;  // (n_entries) in out_dtype
  DType out_dtype = DType::kFloat32;
  int threads = 1;
};

struct SparseWeightGradientParams {
  const int64_t* offsets = nullptr;  // (B + 1)
  IndexArray indices;
  Vector coefficients;      // one per entry
  Matrix rows;              // (B, d), unit column stride
  Vector shift;             // (d) or absent
  Matrix out;               // (n, d) contiguous; every row is written
  void* out_sum = nullptr;  // (n) in the dtype of out, or absent
  int threads = 1;
};

void sparse_dot(const SparseDotParams& params);
void sparse_weight_gradient(const SparseWeightGradientParams& params);

}  // namespace saerec
