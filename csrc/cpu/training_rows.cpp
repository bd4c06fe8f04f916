// The two passes of a training step over gathered rows: rows of W_dec per hidden state (reconstruction, then the
// entries' gradients while those rows are in cache), then rows of the panels per feature (gradients of both weight
// matrices in one pass). Compiled once per tier.
//
// Floor per hidden state with k entries: 4 k d multiply-adds, each with a load (reconstruction, dot product, two weight
// gradients), and 12 k d bytes from the second-level cache (rows of W_dec once, of the panels once; the dot products
// hit the first level while k d <= 8192). At d = 64, k = 32, one AVX-512 core with two loads a cycle and 48 bytes a
// cycle from the second level: 256 cycles of loads, 512 of transfers, and some 10 cycles an entry for the counting
// sort.
//
// Accumulator: float32, chains of kChainEntries entries as in rows.cpp; dot products have one chain per lane.
#include "kernels.h"
#include "simd.h"
#include "simd_arithmetic.h"
#include "tier.inc"

namespace saerec {
namespace SAEREC_TIER {
namespace {

constexpr int64_t kChainEntries = 32;

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// Calls body(column, Vectors<N>) for columns of a panel, in blocks that leave registers for two sums each.
template <class Body>
void for_column_blocks(int64_t width, const Body& body) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes) body(j, Vectors<4>{});
  const int64_t left = (width - j) / kLanes;
  if (left == 1) body(j, Vectors<1>{});
  if (left == 2) body(j, Vectors<2>{});
  if (left == 3) body(j, Vectors<3>{});
}

// The whole vector at `column` of a row of d columns, zero past d; nothing past d is read.
template <class Element>
Vec load_columns(Element element, const typename Element::Storage* row, int64_t column, int64_t d) {
  if (column + kLanes <= d) return load(element, row + column);
  return column < d ? load_partial(element, row + column, d - column) : zero();
}

template <class Element>
void store_columns(Element element, typename Element::Storage* row, int64_t column, int64_t d, Vec value) {
  if (column + kLanes <= d) {
    store(element, row + column, value);
  } else if (column < d) {
    store_partial(element, row + column, d - column, value);
  }
}

// Sums kVectors vectors of rows of W_dec from column j of the panel; two chains, since one would wait for its
// additions.
template <int kVectors>
inline void decode_columns(const StepRowsTask& task, int64_t begin, int64_t end, int64_t j, Vec* sums) {
  for (int v = 0; v < kVectors; ++v) sums[v] = zero();
  for (int64_t chain = begin; chain < end; chain += kChainEntries) {
    const int64_t chain_end = chain + kChainEntries < end ? chain + kChainEntries : end;
    Vec even[kVectors], odd[kVectors];
    for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = zero();
    int64_t e = chain;
    for (; e + 2 <= chain_end; e += 2) {
      const Vec first = set1(task.values[e]), second = set1(task.values[e + 1]);
      const float* w = task.weight + task.indices[e] * task.weight_stride + j;
      const float* u = task.weight + task.indices[e + 1] * task.weight_stride + j;
      for (int v = 0; v < kVectors; ++v) even[v] = fmadd(first, load(F32{}, w + v * kLanes), even[v]);
      for (int v = 0; v < kVectors; ++v) odd[v] = fmadd(second, load(F32{}, u + v * kLanes), odd[v]);
    }
    if (e < chain_end) {
      const Vec last = set1(task.values[e]);
      const float* w = task.weight + task.indices[e] * task.weight_stride + j;
      for (int v = 0; v < kVectors; ++v) even[v] = fmadd(last, load(F32{}, w + v * kLanes), even[v]);
    }
    for (int v = 0; v < kVectors; ++v) sums[v] = add(sums[v], add(even[v], odd[v]));
  }
}

// Residual of one row's columns into the panel, the residual matrix and the sums; returns its squared norm.
template <class Element>
float residual_row(Element element, const StepRowsTask& task, int64_t row) {
  using Storage = typename Element::Storage;
  const auto* x = static_cast<const Storage*>(task.x.data) + row * task.x.row_stride;
  auto* residual = static_cast<Storage*>(task.residual.data) + row * task.residual.row_stride;
  const int64_t d = task.x.cols, width = panel_width(task.panels, task.panel), first = task.panel * task.panels.columns;
  float* states = task.states + row * 2 * width;
  Vec squares = zero();
  for_column_blocks(width, [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    Vec sums[kVectors];
    decode_columns<kVectors>(task, task.offsets[row], task.offsets[row + 1], j, sums);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = j + v * kLanes;
      const Vec bias = load(F32{}, task.bias_dec + first + column);
      const Vec state = load_columns(element, x, first + column, d);
      const Vec error = sub(add(sums[v], bias), state);
      store(F32{}, states + column, error);
      store(F32{}, states + width + column, sub(state, bias));
      store_columns(element, residual, first + column, d, error);
      store(F32{}, task.residual_sum + column, add(load(F32{}, task.residual_sum + column), error));
      squares = fmadd(error, error, squares);
    }
  });
  return reduce_add(squares);
}

// Adds this panel's part of <residual, W_dec[f]> to the row's entries, and turns the whole into their gradients.
void gradient_row(const StepRowsTask& task, int64_t row) {
  const int64_t begin = task.offsets[row], end = task.offsets[row + 1];
  const int64_t width = panel_width(task.panels, task.panel);
  const bool last = task.panel + 1 == panel_count(task.panels);
  const float* residual = task.states + row * 2 * width;
  for (int64_t e = begin; e < end; e += 4) {
    const int64_t count = end - e < 4 ? end - e : 4;
    const float* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = task.weight + task.indices[i < count ? e + i : e] * task.weight_stride;
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    for_column_blocks(width, [&](int64_t j, auto vectors) {
      for (int v = 0; v < decltype(vectors)::value; ++v) {
        const int64_t column = j + v * kLanes;
        const Vec r = load(F32{}, residual + column);
        for (int i = 0; i < 4; ++i) sums[i] = fmadd(r, load(F32{}, rows[i] + column), sums[i]);
      }
    });
    float dots[4];
    reduce_add4(sums[0], sums[1], sums[2], sums[3], dots);
    for (int64_t i = 0; i < count; ++i) {
      const float dot = task.panel == 0 ? dots[i] : task.entry_gradients[e + i] + dots[i];
      // "Not <=", as the gradient of torch.relu: a NaN lets it pass.
      const float gradient = task.values[e + i] <= 0 ? 0.0f : task.scale * dot + task.penalty;
      task.entry_gradients[e + i] = last ? gradient : dot;
    }
  }
}

// Sums of `value * residual` and `gradient * state` over a feature's entries: kVectors vectors of either from column j
// of the panel. Returns the sum of the entries' gradients.
template <int kVectors>
inline float group_sums(const StepGroupsTask& task, int64_t begin, int64_t end, int64_t j, Vec* residuals,
                        Vec* states) {
  const int64_t width = panel_width(task.panels, task.panel), stride = 2 * width;
  const float* states_panel = task.states + j;
  float sum = 0.0f;
  for (int v = 0; v < kVectors; ++v) residuals[v] = states[v] = zero();
  for (int64_t chain = begin; chain < end; chain += kChainEntries) {
    const int64_t chain_end = chain + kChainEntries < end ? chain + kChainEntries : end;
    Vec r[kVectors], s[kVectors];
    float chain_sum = 0.0f;
    for (int v = 0; v < kVectors; ++v) r[v] = s[v] = zero();
    for (int64_t e = chain; e < chain_end; ++e) {
      const StepEntry& entry = task.entries[e];
      const Vec value = set1(entry.value), gradient = set1(entry.gradient);
      const float* row = states_panel + entry.row * stride;
      for (int v = 0; v < kVectors; ++v) r[v] = fmadd(value, load(F32{}, row + v * kLanes), r[v]);
      for (int v = 0; v < kVectors; ++v) s[v] = fmadd(gradient, load(F32{}, row + width + v * kLanes), s[v]);
      chain_sum += entry.gradient;
    }
    for (int v = 0; v < kVectors; ++v) residuals[v] = add(residuals[v], r[v]);
    for (int v = 0; v < kVectors; ++v) states[v] = add(states[v], s[v]);
    sum += chain_sum;
  }
  return sum;
}

template <int kVectors, class Element>
float group_columns(Element element, const StepGroupsTask& task, int64_t feature, int64_t j) {
  using Storage = typename Element::Storage;
  const int64_t begin = task.group_offsets[feature], end = task.group_offsets[feature + 1];
  const int64_t d = task.grad_weight_dec.cols;
  Vec residuals[kVectors], states[kVectors];
  const float sum = group_sums<kVectors>(task, begin, end, j, residuals, states);
  const Vec scale = set1(task.scale), bias_gradient = set1(sum);
  auto* grad_dec = static_cast<Storage*>(task.grad_weight_dec.data) + feature * task.grad_weight_dec.row_stride;
  auto* grad_enc = static_cast<Storage*>(task.grad_weight_enc.data) + feature * task.grad_weight_enc.row_stride;
  const auto* weight = static_cast<const Storage*>(task.weight_enc.data) + feature * task.weight_enc.row_stride;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = task.panel * task.panels.columns + j + v * kLanes;
    store_columns(element, grad_dec, column, d, mul(scale, residuals[v]));
    store_columns(element, grad_enc, column, d, states[v]);
    if (begin == end) continue;
    float* part = task.bias_part + j + v * kLanes;
    store(F32{}, part, fmadd(bias_gradient, load_columns(element, weight, column, d), load(F32{}, part)));
  }
  return sum;
}

}  // namespace

void pack_panel(const PanelTask& task) {
  with_element(task.matrix.dtype, [&](auto element) {
    const auto* data = static_cast<const typename decltype(element)::Storage*>(task.matrix.data);
    const int64_t width = panel_width(task.panels, task.panel), first = task.panel * task.panels.columns;
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
      for (int64_t j = 0; j < width; j += kLanes) {
        const Vec columns = load_columns(element, data + row * task.matrix.row_stride, first + j, task.matrix.cols);
        store(F32{}, task.out + row * width + j, columns);
      }
    }
  });
}

void step_rows(StepRowsTask& task) {
  with_element(task.x.dtype, [&](auto element) {
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
      task.squared_sum += static_cast<double>(residual_row(element, task, row));
      gradient_row(task, row);
    }
  });
}

void step_groups(const StepGroupsTask& task) {
  with_element(task.grad_weight_dec.dtype, [&](auto element) {
    const int64_t width = panel_width(task.panels, task.panel);
    for (int64_t j = 0; j < kMaxPanelColumns; j += kLanes) store(F32{}, task.bias_part + j, zero());
    for (int64_t feature = task.feature_begin; feature < task.feature_end; ++feature) {
      float sum = 0.0f;
      for_column_blocks(width, [&](int64_t j, auto vectors) {
        sum = group_columns<decltype(vectors)::value>(element, task, feature, j);
      });
      if (task.panel == 0) {
        using Storage = typename decltype(element)::Storage;
        static_cast<Storage*>(task.grad_bias_enc)[feature] = narrow(element, sum);
      }
    }
  });
}

}  // namespace SAEREC_TIER
}  // namespace saerec
