// encode_features: activations of chosen features only, dense:
//
//   out[r][i] = a where not (a <= threshold) else 0,   a = <x[r] - shift, weight[features[i]]> + bias[features[i]]
#pragma once

#include "saerec/views.h"

namespace saerec {

struct EncodeFeaturesParams {
  Matrix x;                           // (B, d)
  Matrix weight;                      // (n, d), unit column stride
  Vector bias;                        // (n) or absent
  Vector shift;                       // (d) or absent
  Vector thresholds;                  // (n), or size 1 for all features
  const int64_t* features = nullptr;  // (m), each in [0, n)
  int64_t n_features = 0;             // m
  void* out = nullptr;                // (B, m) contiguous, dtype of x
  int threads = 1;
};

void encode_features(const EncodeFeaturesParams& params);

}  // namespace saerec
