// Everything of a training step that follows the encoder: reconstruction, loss and the gradients of all parameters.
//
// With r = a W_dec + b_dec - x, p = penalty and the loss  sum_rows |r|^2 * scale / 2  +  p * sum_entries a:
//   gradient of an entry   g = scale * <r, W_dec[f]> + p   where its activation a is not <= 0, else 0
//   grad W_dec[f]          = scale * sum of a * r          over the entries of f
//   grad W_enc[f], b_enc[f] = sum of g * (x - b_dec), sum of g
//   grad b_dec             = scale * sum_rows r - W_enc^T grad b_enc      (b_dec is also taken off before encoding)
#pragma once

#include "saerec/views.h"

namespace saerec {

struct SparseTrainingStepParams {
  Matrix x;                          // (B, d), unit column stride
  const int64_t* offsets = nullptr;  // (B + 1)
  IndexArray indices;                // in [0, n)
  Vector values;                     // activations, one per entry
  Matrix weight_enc;                 // (n, d), unit column stride
  Matrix weight_dec;                 // (n, d), unit column stride
  Vector bias_dec;                   // (d) or absent
  float scale = 1;
  float penalty = 0;
  // Outputs: contiguous, in the dtype of x, every element written.
  Matrix residual;                // (B, d)
  Matrix grad_weight_enc;         // (n, d)
  Matrix grad_weight_dec;         // (n, d)
  void* grad_bias_enc = nullptr;  // (n)
  void* grad_bias_dec = nullptr;  // (d)
  int64_t* counts = nullptr;      // (n): entries of a feature whose activation is not <= 0
  double* sums = nullptr;         // (2): sum of r^2, sum of activations
  int threads = 1;
};

void sparse_training_step(const SparseTrainingStepParams& params);

}  // namespace saerec
