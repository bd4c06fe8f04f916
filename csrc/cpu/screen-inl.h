// Screening: upper bounds of all scores of a row at a quarter of the price of the scores, from bytes.
//
//   weight[f][j] ~ w = scale[f] * q[f][j],  q whole, |q| <= 127      x[r][j] ~ y = step[r] * p[r][j],  |p| <=
//   kByteLevels score / step = sum_j p q * scale + bias / step + error, |error| <= |x - y| / step * |w| + |x| / step *
//   |weight - w| + rounding          (Cauchy-Schwarz, norms over j)
//
// To take one multiply-add per score, the two terms are bounded by one product, coefficient[r] * margin[f], with
//   margin      = kTypicalError * |w| + |weight - w| + rounding of both sides, relative to |weight|
//   coefficient = max(|x - y| / kTypicalError, |x|) / step
// whatever kTypicalError is; the bound is tight where it is near |x - y| / |x|. A screened score plus its error bound,
// the "upper", is never below the exact score that scores-inl.h computes: what lies below a threshold here is below it
// there, and only the rest is scored.
//
// Layout: codes q + 128 unsigned, blocks of 32 features, four dimensions side by side (saerec/packed.h); codes p
// signed, row by row, four dimensions broadcast at a time. Accumulator: int32, exact; it starts at -128 * sum_j p,
// which takes the 128 out again. Tile: kRowTile rows x 2 vectors of features, which fills the registers and loads each
// weight vector once per kRowTile dot products.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace saerec {
namespace SAEREC_TIER {
namespace {

// |x - y| / |x| of a Gaussian row with 127 levels (its largest element is about 2.8 standard deviations).
constexpr float kTypicalError = 0.0064f;
constexpr float kWeightLevels = 127.0f;
// Beyond these magnitudes products or their sums might leave the range of float32.
constexpr float kLargest = 1.1258999e15f;       // 2^50
constexpr float kSmallest = 8.8817842e-16f;     // 2^-50
constexpr float kRounding = 1.1920929e-7f;      // 2^-23
constexpr float kBiasRounding = 7.6293945e-6f;  // 2^-17, of a bias in units of a step, added to a score
constexpr float kUnderflow = 1e-30f;
constexpr int64_t kCacheLine = 64;

inline float square_root(float value) {
#if defined(SAEREC_TIER_AVX2) || defined(SAEREC_TIER_AVX512)
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(value)));
#else
  return __builtin_sqrtf(value);
#endif
}

inline float absolute(float value) { return value < 0.0f ? -value : value; }

// Bound of the relative rounding error of sums over d dimensions, in every tier.
inline float summation_error(int64_t d) { return (static_cast<float>(d) * 0.25f + 32.0f) * kRounding; }

struct Magnitude {
  float largest;  // of the absolute values
  bool finite;
};

inline Magnitude magnitude_of(const float* values, int64_t d) {
  Vec largest = zero(), poison = zero();
  int64_t j = 0;
  const auto take = [&](Vec value) {
    largest = maximum(largest, maximum(value, sub(zero(), value)));
    poison = fmadd(value, zero(), poison);  // NaN once a value is not finite
  };
  for (; j + kLanes <= d; j += kLanes) take(load(F32{}, values + j));
  if (j < d) take(load_partial(F32{}, values + j, d - j));
  return {reduce_max(largest), reduce_add(poison) == 0.0f};
}

struct Quantized {
  float code_norm;      // |q|
  float residual_norm;  // |values * inverse_step - q|
  float code_sum;
};

// codes[j] = round(values[j] * inverse_step) + offset; d rounded up to a multiple of 4 bytes are written, the last ones
// as `offset`. codes needs kLanes bytes of overhang.
inline Quantized quantize(const float* values, int64_t d, float inverse_step, float offset, uint8_t* codes) {
  const Vec scale = set1(inverse_step), shift = set1(offset);
  Vec code_squares = zero(), residual_squares = zero(), code_sum = zero();
  const auto take = [&](Vec value, uint8_t* out) {
    const Vec scaled = mul(value, scale), code = round_even(scaled), residual = sub(scaled, code);
    code_squares = fmadd(code, code, code_squares);
    residual_squares = fmadd(residual, residual, residual_squares);
    code_sum = add(code_sum, code);
    store_bytes(out, add(code, shift));
  };
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) take(load(F32{}, values + j), codes + j);
  if (j < d) take(load_partial(F32{}, values + j, d - j), codes + j);
  return {square_root(reduce_add(code_squares)), square_root(reduce_add(residual_squares)), reduce_add(code_sum)};
}

// Codes and screens of the rows of a task.
inline void screen_rows(const EncodeTask& task) {
  const int64_t d = task.x.cols, stride = 4 * task.packed->quads;
  const float slack = 1.0f + 2.0f * summation_error(d);
  uint8_t* codes = reinterpret_cast<uint8_t*>(task.x_codes);
  for (int64_t r = 0; r < task.x.rows; ++r) {
    const float* x = task.x_rows + r * d;
    RowScreen& screen = task.screens[r];
    screen = RowScreen{};
    const Magnitude magnitude = magnitude_of(x, d);
    const bool zero_row = magnitude.largest == 0.0f;
    screen.usable = magnitude.finite && (zero_row || (magnitude.largest >= kSmallest && magnitude.largest <= kLargest));
    if (screen.usable && !zero_row) screen.inverse_step = static_cast<float>(kByteLevels) / magnitude.largest;
    // An unusable row passes through the tile with its neighbours; zeros keep that harmless.
    const float inverse_step = screen.usable ? screen.inverse_step : 0.0f;
    Quantized quantized = {0.0f, 0.0f, 0.0f};
    if (screen.usable) {
      quantized = quantize(x, d, inverse_step, 0.0f, codes + r * stride);
    } else {
      for (int64_t j = 0; j < stride; ++j) codes[r * stride + j] = 0;
    }
    const float norm = quantized.code_norm + quantized.residual_norm;
    const float residual = quantized.residual_norm * slack + norm * 2.0f * kRounding;
    const float by_residual = residual / kTypicalError;
    screen.coefficient = (by_residual > norm ? by_residual : norm) * slack;
    screen.code_sum = static_cast<int32_t>(quantized.code_sum);
  }
}

// Uppers of Rows rows for 32 features, rows `out_stride` apart.
template <int Rows>
inline void screen_block(const uint8_t* codes, int64_t quads, const int8_t* x_codes, int64_t x_stride,
                         const RowScreen* screens, const float* scales, const float* biases, const float* margins,
                         float* out, int64_t out_stride) {
  for (int64_t i = 0; i < kFeatureBlock; i += 2 * kLanes) {
    Quads sums[Rows][2];
    for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = quads_set1(-128 * screens[r].code_sum);
    const uint8_t* w = codes + 4 * i;
    for (int64_t j = 0; j < quads; ++j, w += 4 * kFeatureBlock) {
      const Quads w0 = quads_load(w), w1 = quads_load(w + 4 * kLanes);
      for (int r = 0; r < Rows; ++r) {
        int32_t four;
        std::memcpy(&four, x_codes + r * x_stride + 4 * j, 4);
        const Quads xj = quads_set1(four);
        sums[r][0] = quad_dot(sums[r][0], w0, xj);
        sums[r][1] = quad_dot(sums[r][1], w1, xj);
      }
    }
    for (int v = 0; v < 2; ++v) {
      const int64_t column = i + v * kLanes;
      const Vec scale = load(F32{}, scales + column), bias = load(F32{}, biases + column);
      const Vec margin = load(F32{}, margins + column);
      for (int r = 0; r < Rows; ++r) {
        const Vec rest = fmadd(bias, set1(screens[r].inverse_step), mul(margin, set1(screens[r].coefficient)));
        store(F32{}, out + r * out_stride + column, fmadd(to_float(sums[r][v]), scale, rest));
      }
    }
  }
}

// Codes on their way into the second-level cache, some lines with each block of features that a tile of rows passes:
// all rows then find the next range's codes there, where the first tile of them would have waited for each line to come
// from the third-level cache or memory.
class CodeStream {
 public:
  CodeStream() = default;

  // The codes of up to `count` features from `first` on, spread over `blocks` blocks.
  CodeStream(const EncodeTask& task, int64_t first, int64_t count, int64_t blocks) {
    const int64_t feature_bytes = 4 * task.packed->quads, left = task.feature_end - first;
    // For a single tile they would only come twice as far.
    if (left <= 0 || task.x.rows <= kRowTile) return;
    next_ = task.packed->codes + first * feature_bytes;
    lines_left_ = (left < count ? left : count) * feature_bytes / kCacheLine;
    lines_per_block_ = (lines_left_ + blocks - 1) / blocks;
  }

  void advance() {
    const int64_t lines = lines_left_ < lines_per_block_ ? lines_left_ : lines_per_block_;
    for (int64_t line = 0; line < lines; ++line) prefetch_second_level(next_ + line * kCacheLine);
    next_ += lines * kCacheLine;
    lines_left_ -= lines;
  }

 private:
  const uint8_t* next_ = nullptr;
  int64_t lines_left_ = 0;
  int64_t lines_per_block_ = 0;
};

// Uppers of rows [row, row + Rows) for features [first, last) into task.uppers, rows `stride` apart.
template <int Rows>
void screen_tile(const EncodeTask& task, int64_t row, int64_t first, int64_t last, int64_t stride, CodeStream& coming) {
  const PackedView& packed = *task.packed;
  const int64_t x_stride = 4 * packed.quads;
  for (int64_t feature = first; feature < last; feature += kFeatureBlock) {
    screen_block<Rows>(packed.codes + feature * x_stride, packed.quads, task.x_codes + row * x_stride, x_stride,
                       task.screens + row, packed.scales + feature, packed.biases + feature, packed.margins + feature,
                       task.uppers + (feature - first), stride);
    coming.advance();
  }
}

template <class Element>
void pack_feature(Element element, PackTask& task, int64_t feature, float* row, uint8_t* codes) {
  using Storage = typename Element::Storage;
  const int64_t n = task.weight.rows, d = task.weight.cols;
  float* scales = const_cast<float*>(task.view.scales);
  float* biases = const_cast<float*>(task.view.biases);
  float* margins = const_cast<float*>(task.view.margins);
  if (feature >= n) {
    scales[feature] = margins[feature] = 0.0f;
    biases[feature] = -__builtin_inff();
    for (int64_t j = 0; j < 4 * task.view.quads; ++j) codes[j] = 128;
    return;
  }
  const Storage* in = static_cast<const Storage*>(task.weight.data) + feature * task.weight.row_stride;
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) store(F32{}, row + j, load(element, in + j));
  for (; j < d; ++j) row[j] = widen(element, in[j]);
  const Magnitude magnitude = magnitude_of(row, d);
  const float bias = task.bias.data != nullptr ? value_at(task.bias, feature) : 0.0f;
  const float bias_magnitude = absolute(bias);
  // Comparisons that a NaN fails.
  if (!(magnitude.finite && magnitude.largest <= kLargest && bias_magnitude <= kLargest)) task.usable = false;
  task.max_bias = bias_magnitude > task.max_bias ? bias_magnitude : task.max_bias;
  biases[feature] = bias + bias_magnitude * kBiasRounding;
  if (!task.usable) return;
  // A row of tiny weights gets zeros as codes, and all of it counts as residual.
  const bool tiny = magnitude.largest < kSmallest;
  const float inverse_step = tiny ? 0.0f : kWeightLevels / magnitude.largest;
  const float step = tiny ? 0.0f : magnitude.largest / kWeightLevels;
  const Quantized quantized = quantize(row, d, inverse_step, 128.0f, codes);
  for (int64_t rest = d; rest < 4 * task.view.quads; ++rest) codes[rest] = 128;
  const float code_norm = quantized.code_norm * step;
  float residual_norm = quantized.residual_norm * step;
  if (tiny) residual_norm = magnitude.largest * square_root(static_cast<float>(d));
  const float norm = code_norm + residual_norm;
  const float rounding = summation_error(d);
  scales[feature] = step;
  margins[feature] =
      (kTypicalError * code_norm + residual_norm + 2.0f * rounding * norm) * (1.0f + rounding) + kUnderflow;
}

template <class Element>
void pack_block(Element element, PackTask& task, int64_t block) {
  const int64_t quads = task.view.quads, code_stride = task.code_stride;
  for (int64_t i = 0; i < kFeatureBlock; ++i) {
    pack_feature(element, task, block * kFeatureBlock + i, task.row, task.row_codes + i * code_stride);
  }
  auto* out = reinterpret_cast<uint32_t*>(const_cast<uint8_t*>(task.view.codes)) + block * kFeatureBlock * quads;
  const auto* in = reinterpret_cast<const uint32_t*>(task.row_codes);
  for (int64_t j = 0; j < quads; j += kLanes) {
    // The last tile would write past the block.
    uint32_t tile[kLanes * kFeatureBlock];
    const bool whole = j + kLanes <= quads;
    uint32_t* place = whole ? out + j * kFeatureBlock : tile;
    for (int64_t i = 0; i < kFeatureBlock; i += kLanes) {
      transpose_quads(in + i * (code_stride / 4) + j, code_stride / 4, place + i, kFeatureBlock);
    }
    if (!whole) std::memcpy(out + j * kFeatureBlock, tile, static_cast<std::size_t>(4 * kFeatureBlock * (quads - j)));
  }
}

}  // namespace
}  // namespace SAEREC_TIER
}  // namespace saerec
