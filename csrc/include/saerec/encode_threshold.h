// encode_threshold: the features with  not (score <= threshold)  per row, as compressed rows in ascending feature
// order.
//
// The number of entries is known only after the sweep, so the call is in two steps: encode_threshold() returns the
// entries in memory of its own, the caller allocates its outputs and copies them with SparseRows::copy_to.
#pragma once

#include <memory>
#include <vector>

#include "saerec/views.h"

namespace saerec {

struct EncodeThresholdParams {
  Matrix x;                      // (B, d)
  Matrix weight;                 // (n, d)
  Vector bias;                   // (n) or absent
  Vector shift;                  // (d) or absent
  Vector thresholds;             // (n), or size 1 for all features
  const void* packed = nullptr;  // of the encoder (saerec/packed.h), or absent
  int64_t packed_bytes = 0;
  int threads = 1;
};

class SparseRows {
 public:
  virtual ~SparseRows() = default;
  virtual int64_t n_entries() const = 0;
  // offsets (B + 1) int64, indices (n_entries) int32, values (n_entries) in dtype
  virtual void copy_to(int64_t* offsets, int32_t* indices, void* values, DType dtype) const = 0;
};

std::unique_ptr<SparseRows> encode_threshold(const EncodeThresholdParams& params);

}  // namespace saerec
