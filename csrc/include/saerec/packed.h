// Packed encoder weights: what screening reads instead of the weights themselves. One block of memory that can be
// copied, mapped and shared between processes of one machine.
//
// Layout, every part at a multiple of 64 bytes, n rounded up to a multiple of 32 ("padded"), d to one of 4:
//   header     PackedHeader
//   scales     (padded) float32    a code's unit: weight[f][j] is about scales[f] * (code - 128)
//   biases     (padded) float32    bias[f], raised by its own rounding error; -inf beyond n
//   margins    (padded) float32    bounds the error of a screened score, see csrc/cpu/screen-inl.h
//   codes      (padded / 32, d / 4, 32, 4) uint8, so that one vector holds four dimensions of each of its features
#pragma once

#include <cstdint>

#include "saerec/views.h"

namespace saerec {

constexpr int64_t kPackedBlock = 32;
constexpr uint32_t kPackedVersion = 1;

struct PackedHeader {
  char magic[8];  // "saerecPW"
  uint32_t version;
  uint32_t usable;  // 0: weights not finite or too large for screening
  int64_t n;
  int64_t d;
  int64_t bytes;
  float max_bias;  // largest |bias|
  float reserved[5];
};
static_assert(sizeof(PackedHeader) == 64, "the parts after it stay aligned");

struct PackedView {
  const float* scales = nullptr;
  const float* biases = nullptr;
  const float* margins = nullptr;
  const uint8_t* codes = nullptr;
  int64_t quads = 0;  // groups of four dimensions
  float max_bias = 0.0f;
};

struct PackParams {
  Matrix weight;        // (n, d), unit column stride
  Vector bias;          // (n) or absent
  void* out = nullptr;  // packed_size(n, d) bytes at a multiple of 64
  int threads = 1;
};

int64_t packed_size(int64_t n, int64_t d);
void pack(const PackParams& params);

// Where the parts are. Throws std::invalid_argument unless `data` holds weights of n features and d dimensions packed
// by this version. Returns false, and leaves the view alone, where they were packed but cannot be screened.
bool open_packed(const void* data, int64_t bytes, int64_t n, int64_t d, PackedView* view);

}  // namespace saerec
