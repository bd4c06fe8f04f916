// reconstruct: encode and decode a batch of hidden states in one pass over its rows.
//
//   out = sum_f act(<x - shift, weight_enc[f]> + bias[f]) weight_dec[f] + shift
//
// Sums run over the active features in ascending order.
#pragma once

#include "saerec/views.h"

namespace saerec {

struct ReconstructParams {
  Matrix x;                      // (B, d)
  Matrix weight_enc;             // (n, d)
  Vector bias;                   // (n) or absent
  Vector shift;                  // (d) or absent
  Matrix weight_dec;             // (n, d)
  int64_t k = 0;                 // > 0: top-k, then ReLU; 0: thresholds
  Vector thresholds;             // (n), or size 1 for all features
  Matrix out;                    // (B, d) contiguous, dtype of x
  const void* packed = nullptr;  // of the encoder (saerec/packed.h), or absent
  int64_t packed_bytes = 0;
  int threads = 1;
};

void reconstruct(const ReconstructParams& params);

}  // namespace saerec
