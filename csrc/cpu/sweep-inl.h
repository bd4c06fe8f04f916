// The sweep every encoder shares: scores of some rows against a range of the dictionary, handed to a sink 32 at a time.
//
//   score[r][f] = sum_j (x[r][j] - shift[j]) * weight[f][j]  + bias[f]
//
// Layout: one SIMD lane per feature. A block of 32 feature rows is transposed to (d, 32) float32 in scratch, which all
// rows of the task then share; x is converted to (rows, d) float32 once.
// Accumulator: float32, j ascending, one chain per score and 256 dimensions (fused multiply-add on the vector tiers),
// chains added in order, bias last. That is the same wherever a row or feature falls in a tile, so a score's bits
// depend on its row and feature only. Tile: kRowTile rows x 2 vectors, as many accumulators as the registers hold; the
// transposed block of d = 64 takes 8 KB and stays in L1 while all rows of the task pass.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace saerec {
namespace SAEREC_TIER {
namespace {

constexpr int kTileFeatures = 2 * kLanes;

// Longer chains would lose more precision than a matmul, which sums in blocks too.
constexpr int64_t kChainDimensions = 256;

template <int N>
struct Rows {
  static constexpr int value = N;
};

template <class Element>
void widen_rows(Element element, const SweepTask& task) {
  const auto* data = static_cast<const typename Element::Storage*>(task.x.data);
  const int64_t d = task.x.cols;
  for (int64_t r = 0; r < task.x.rows; ++r) {
    const auto* in = data + r * task.x.row_stride;
    float* out = task.x_scratch + r * d;
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

// weight_scratch[j * 32 + i] = weight[feature first + i][j], zero beyond the end of the range.
template <class Element>
void transpose_block(Element element, const SweepTask& task, int64_t first, int64_t count) {
  using Storage = typename Element::Storage;
  const auto* data = static_cast<const Storage*>(task.weight.data);
  const int64_t d = task.weight.cols;
  const Storage* rows[kFeatureBlock];
  for (int64_t i = 0; i < kFeatureBlock; ++i) {
    if (i >= count) {
      rows[i] = nullptr;
      continue;
    }
    const int64_t feature = task.feature_list != nullptr ? task.feature_list[first + i] : first + i;
    rows[i] = data + feature * task.weight.row_stride;
  }
  if (task.weight.col_stride != 1) {
    for (int64_t j = 0; j < d; ++j) {
      for (int64_t i = 0; i < kFeatureBlock; ++i) {
        task.weight_scratch[j * kFeatureBlock + i] =
            rows[i] != nullptr ? widen(element, rows[i][j * task.weight.col_stride]) : 0.0f;
      }
    }
    return;
  }
  for (int64_t i = 0; i < kFeatureBlock; i += kLanes) {
    const Storage* tile_rows[kLanes];
    for (int64_t j = 0; j < d; j += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        tile_rows[lane] = rows[i + lane] != nullptr ? rows[i + lane] + j : nullptr;
      }
      const int columns = d - j < kLanes ? static_cast<int>(d - j) : kLanes;
      // The last tile may write past d: the scratch has room for d rounded up to a multiple of 16.
      transpose_tile(element, tile_rows, columns, task.weight_scratch + j * kFeatureBlock + i, kFeatureBlock);
    }
  }
}

// Scores of Rows rows against the block, scores[r * 32 + i].
template <int Rows>
void score_tile(const float* x, int64_t x_stride, const float* block, const float* bias, int64_t d, float* scores) {
  for (int64_t i = 0; i < kFeatureBlock; i += kTileFeatures) {
    const float* weights = block + i;
    for (int64_t chain = 0; chain < d; chain += kChainDimensions) {
      const int64_t chain_end = chain + kChainDimensions < d ? chain + kChainDimensions : d;
      Vec sums[Rows][2];
      for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = zero();
      for (int64_t j = chain; j < chain_end; ++j, weights += kFeatureBlock) {
        const Vec w0 = load(F32{}, weights), w1 = load(F32{}, weights + kLanes);
        for (int r = 0; r < Rows; ++r) {
          const Vec xj = set1(x[r * x_stride + j]);
          sums[r][0] = fmadd(xj, w0, sums[r][0]);
          sums[r][1] = fmadd(xj, w1, sums[r][1]);
        }
      }
      const Vec b0 = load(F32{}, bias + i), b1 = load(F32{}, bias + i + kLanes);
      for (int r = 0; r < Rows; ++r) {
        float* out = scores + r * kFeatureBlock + i;
        if (chain > 0) {
          sums[r][0] = add(sums[r][0], load(F32{}, out));
          sums[r][1] = add(sums[r][1], load(F32{}, out + kLanes));
        }
        if (chain_end == d) {
          sums[r][0] = add(sums[r][0], b0);
          sums[r][1] = add(sums[r][1], b1);
        }
        store(F32{}, out, sums[r][0]);
        store(F32{}, out + kLanes, sums[r][1]);
      }
    }
  }
}

// sink.begin_block(first, count), then sink.row(row, first, scores, valid) for every row, where bit i of valid says
// that feature first + i exists.
template <class Sink>
void sweep(const SweepTask& task, Sink& sink) {
  const int64_t d = task.x.cols;
  const float* x = task.x_scratch;
  int64_t x_stride = d;
  if (task.x.dtype == DType::kFloat32 && task.x.col_stride == 1 && task.shift == nullptr) {
    x = static_cast<const float*>(task.x.data);
    x_stride = task.x.row_stride;
  } else {
    with_element(task.x.dtype, [&](auto element) { widen_rows(element, task); });
  }
  for (int64_t first = task.feature_begin; first < task.feature_end; first += kFeatureBlock) {
    const int64_t left = task.feature_end - first;
    const int64_t count = left < kFeatureBlock ? left : kFeatureBlock;
    with_element(task.weight.dtype, [&](auto element) { transpose_block(element, task, first, count); });
    float bias[kFeatureBlock] = {};
    if (task.bias.data != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        bias[i] = value_at(task.bias, task.feature_list != nullptr ? task.feature_list[first + i] : first + i);
      }
    }
    const uint32_t valid = count == 32 ? 0xFFFFFFFFu : (1u << count) - 1u;
    sink.begin_block(first, count);
    float scores[kRowTile * kFeatureBlock];
    int64_t r = 0;
    const auto tile = [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      for (; r + kRows <= task.x.rows; r += kRows) {
        score_tile<kRows>(x + r * x_stride, x_stride, task.weight_scratch, bias, d, scores);
        for (int i = 0; i < kRows; ++i) sink.row(r + i, first, scores + i * kFeatureBlock, valid);
      }
    };
    tile(Rows<kRowTile>{});
    tile(Rows<2>{});
    tile(Rows<1>{});
  }
}

}  // namespace
}  // namespace SAEREC_TIER
}  // namespace saerec
