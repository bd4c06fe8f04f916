// One step of Adam in one pass over parameter, gradient and both moments, all float32 and contiguous.
//
// The arithmetic is that of torch's fused CPU kernel, operation by operation:
//   m = fma(1 - beta1, g - m, m);  v = fma((1 - beta2) * g, g, beta2 * v);  p = p - step_size * m / (sqrt(v) / c + eps)
// with step_size = lr / (1 - beta1^t) and c = sqrt(1 - beta2^t). A row whose gradient and moments are all zero is left
// as it is: its update is exactly zero.
#pragma once

#include <cstdint>

namespace saerec {

struct AdamParams {
  float* parameter = nullptr;
  const float* gradient = nullptr;
  float* exp_avg = nullptr;
  float* exp_avg_sq = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  double step = 1;  // t, from 1
  double learning_rate = 0;
  double beta1 = 0;
  double beta2 = 0;
  double epsilon = 0;
  // Rows of unit norm: the gradient's part along the row is taken out first, and the row is scaled to unit norm after.
  bool unit_rows = false;
  int threads = 1;
};

void adam_step(const AdamParams& params);

}  // namespace saerec
