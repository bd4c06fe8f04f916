// Exact scores of one row for a list of features, gathered from the rows of the weight matrix:
//
//   score[f] = sum_j (x[j] - shift[j]) * weight[f][j]  + bias[f]
//
// Every score that leaves an encoder is computed here, whatever found the feature, so that its bits depend on its row
// and its feature only. Accumulator: float32, one chain per lane (fused multiply-add on the vector tiers) over the
// vectors of the row, at most kChainVectors long, chains added in order; then the lanes, as in a tree; bias last.
// Tile: kLanes features, whose sums are reduced together by a transposition; that many independent chains hide the
// latency of the additions and of the scattered reads. A list that does not fill its last tile repeats a feature there.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace saerec {
namespace SAEREC_TIER {
namespace {

// Longer chains would lose more precision than a matmul, which sums in blocks too.
constexpr int64_t kChainVectors = 16;

// Rows up to this many bytes are fetched into the first-level cache, where two tiles of them have room.
constexpr int64_t kFirstLevelRow = 1024;

// sums[i] = lane-wise sums of x * rows[i] over dimensions [begin, end).
template <class Element>
inline void chain_sums(Element element, const float* x, const typename Element::Storage* const* rows, int64_t begin,
                       int64_t end, Vec* sums) {
  for (int i = 0; i < kLanes; ++i) sums[i] = zero();
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) {
    const Vec xj = load(F32{}, x + j);
    for (int i = 0; i < kLanes; ++i) sums[i] = fmadd(xj, load(element, rows[i] + j), sums[i]);
  }
  if (j < end) {
    const Vec xj = load_partial(F32{}, x + j, end - j);
    for (int i = 0; i < kLanes; ++i) sums[i] = fmadd(xj, load_partial(element, rows[i] + j, end - j), sums[i]);
  }
}

template <class Element>
inline void score_tile(Element element, const float* x, int64_t d, const typename Element::Storage* const* rows,
                       float* out) {
  constexpr int64_t kChain = kChainVectors * kLanes;
  Vec totals[kLanes];
  chain_sums(element, x, rows, 0, d < kChain ? d : kChain, totals);
  for (int64_t begin = kChain; begin < d; begin += kChain) {
    Vec sums[kLanes];
    chain_sums(element, x, rows, begin, d < begin + kChain ? d : begin + kChain, sums);
    for (int i = 0; i < kLanes; ++i) totals[i] = add(totals[i], sums[i]);
  }
  store(F32{}, out, reduce_each(totals));
}

template <class Element>
void score_list(Element element, const float* x, const EncodeTask& task, const uint32_t* features, int64_t count,
                float* out) {
  using Storage = typename Element::Storage;
  const auto* weight = static_cast<const Storage*>(task.weight.data);
  const auto* bias = static_cast<const Storage*>(task.bias.data);
  // The next tile's rows are on their way while this one's are multiplied.
  const int64_t row_bytes = task.weight.cols * static_cast<int64_t>(sizeof(Storage));
  const auto fetch = [&](int64_t begin) {
    const int64_t end = begin + kLanes < count ? begin + kLanes : count;
    for (int64_t i = begin; i < end; ++i) {
      const char* row = reinterpret_cast<const char*>(weight + features[i] * task.weight.row_stride);
      if (row_bytes <= kFirstLevelRow) {
        for (int64_t byte = 0; byte < row_bytes; byte += 64) prefetch(row + byte);
      } else {
        for (int64_t byte = 0; byte < row_bytes; byte += 64) prefetch_second_level(row + byte);
      }
    }
  };
  fetch(0);
  for (int64_t i = 0; i < count; i += kLanes) {
    fetch(i + kLanes);
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    const Storage* rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      rows[lane] = weight + features[i + (lane < left ? lane : 0)] * task.weight.row_stride;
    }
    float scores[kLanes];
    score_tile(element, x, task.weight.cols, rows, scores);
    for (int64_t lane = 0; lane < left; ++lane) {
      const float b = bias != nullptr ? widen(element, bias[features[i + lane] * task.bias.stride]) : 0.0f;
      out[i + lane] = bias != nullptr ? scores[lane] + b : scores[lane];
    }
  }
}

// out[i] = the score of row `row` of the task for features[i]. x_rows must hold the row.
inline void score_features(const EncodeTask& task, int64_t row, const uint32_t* features, int64_t count, float* out) {
  const float* x = task.x_rows + row * task.x.cols;
  with_element(task.weight.dtype, [&](auto element) { score_list(element, x, task, features, count, out); });
}

template <class Element>
void widen_rows_of(Element element, const EncodeTask& task) {
  const auto* data = static_cast<const typename Element::Storage*>(task.x.data);
  const int64_t d = task.x.cols;
  for (int64_t r = 0; r < task.x.rows; ++r) {
    const auto* in = data + r * task.x.row_stride;
    float* out = task.x_rows + r * d;
    int64_t j = 0;
    if (task.x.col_stride == 1) {
      for (; j + kLanes <= d; j += kLanes) {
        Vec value = load(element, in + j);
        if (task.shift != nullptr) value = sub(value, load(F32{}, task.shift + j));
        store(F32{}, out + j, value);
      }
    }
    for (; j < d; ++j) {
      const float value = widen(element, in[j * task.x.col_stride]);
      out[j] = task.shift != nullptr ? value - task.shift[j] : value;
    }
  }
}

// x - shift in float32 into x_rows.
inline void widen_rows(const EncodeTask& task) {
  with_element(task.x.dtype, [&](auto element) { widen_rows_of(element, task); });
}

}  // namespace
}  // namespace SAEREC_TIER
}  // namespace saerec
