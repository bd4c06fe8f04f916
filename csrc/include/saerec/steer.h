// steer: encode, edit and decode a batch of hidden states in one pass over its rows.
//
// delta:       out = x + sum_u (a'_u - a_u) weight_dec[u]   over the edited features u
// reconstruct: out = sum_f a'_f weight_dec[f] + shift
// with a = act(<x - shift, weight_enc> + bias). Rows outside row_mask, and in delta mode rows whose edits change
// nothing, are copied bit for bit. Delta mode does the least exact work: no encoding when every edit adds, one dot
// product per edited feature for threshold activations, the whole encoder only for top-k.
#pragma once

#include "saerec/views.h"

namespace saerec {

enum class EditOp : int { kSet = 0, kAdd = 1, kScale = 2, kClampMin = 3, kClampMax = 4 };

struct SteerParams {
  Matrix x;           // (B, d)
  Matrix weight_enc;  // (n, d)
  Vector bias;        // (n) or absent
  Vector shift;       // (d) or absent
  Matrix weight_dec;  // (n, d)
  int64_t k = 0;      // > 0: top-k; 0: thresholds
  Vector thresholds;  // (n), or size 1 for all features
  bool reconstruct = false;
  int64_t n_edits = 0;
  const int64_t* edit_features = nullptr;  // (n_edits), each in [0, n)
  const int64_t* edit_ops = nullptr;       // (n_edits), EditOp
  const float* edit_values = nullptr;      // (n_edits) at row stride 0, or (B, n_edits)
  int64_t edit_values_row_stride = 0;
  const bool* row_mask = nullptr;  // (B) or absent
  Matrix out;                      // (B, d) contiguous, dtype of x
  const void* packed = nullptr;    // of the encoder (saerec/packed.h), or absent
  int64_t packed_bytes = 0;
  int threads = 1;
};

void steer(const SteerParams& params);

}  // namespace saerec
