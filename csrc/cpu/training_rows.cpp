// The two passes of a training step over gathered rows: rows of W_dec per hidden state (reconstruction, then the entries'
// gradients while those rows are in cache), then rows of the panels per feature (gradients of both weight matrices in one
// pass). Compiled once per tier.
//
// Floor per hidden state with k entries: 4 k d multiply-adds, each with a load (reconstruction, dot product, two weight
// gradients), and 12 k d bytes from the second-level cache (rows of W_dec once, of the panels once; the dot products hit
// the first level while k d <= 8192). At d = 64, k = 32, one AVX-512 core with two loads a cycle and 48 bytes a cycle
// from the second level: 256 cycles of loads, 512 of transfers, and some 10 cycles an entry for the counting sort.
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
// Columns of a row of W_dec summed in one pass over the entries: as many as the registers hold.
constexpr int kDecodeVectors = kLanes == 16 ? 16 : 8;

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// Calls body(column, Vectors<N>, partial); partial is 0, or the columns of a last vector that is not whole.
template <class Body>
void for_decode_blocks(int64_t d, const Body& body) {
  int64_t j = 0;
  for (; j + kDecodeVectors * kLanes <= d; j += kDecodeVectors * kLanes) body(j, Vectors<kDecodeVectors>{}, 0);
  if (kDecodeVectors > 8 && j + 8 * kLanes <= d) {
    body(j, Vectors<8>{}, 0);
    j += 8 * kLanes;
  }
  for (; j + 4 * kLanes <= d; j += 4 * kLanes) body(j, Vectors<4>{}, 0);
  for (; j + kLanes <= d; j += kLanes) body(j, Vectors<1>{}, 0);
  if (j < d) body(j, Vectors<1>{}, d - j);
}

template <class Element>
Vec load_some(Element element, const typename Element::Storage* p, int64_t partial) {
  return partial > 0 ? load_partial(element, p, partial) : load(element, p);
}

template <class Element>
void store_some(Element element, typename Element::Storage* p, int64_t partial, Vec value) {
  if (partial > 0) {
    store_partial(element, p, partial, value);
  } else {
    store(element, p, value);
  }
}

float* panel_column(const StepPanels& panels, int64_t row, int64_t column) {
  return panel_row(panels, column / kPanelColumns, row) + column % kPanelColumns;
}

// Residual of one row into the panels, the residual matrix and the sums; returns its squared norm.
template <class Element>
float residual_row(Element element, const StepRowsTask& task, int64_t row) {
  using Storage = typename Element::Storage;
  const auto* weight = static_cast<const Storage*>(task.weight_dec.data);
  const auto* x = static_cast<const Storage*>(task.x.data) + row * task.x.row_stride;
  auto* residual = static_cast<Storage*>(task.residual.data) + row * task.residual.row_stride;
  const int64_t begin = task.offsets[row], end = task.offsets[row + 1], d = task.x.cols;
  Vec squares = zero();
  for_decode_blocks(d, [&](int64_t j, auto vectors, int64_t partial) {
    constexpr int kVectors = decltype(vectors)::value;
    Vec sums[kVectors], chains[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = zero();
    for (int64_t chain = begin; chain < end; chain += kChainEntries) {
      const int64_t chain_end = chain + kChainEntries < end ? chain + kChainEntries : end;
      for (int v = 0; v < kVectors; ++v) chains[v] = zero();
      for (int64_t e = chain; e < chain_end; ++e) {
        const Vec value = set1(task.values[e]);
        const Storage* w = weight + task.indices[e] * task.weight_dec.row_stride + j;
        for (int v = 0; v < kVectors; ++v) {
          chains[v] = fmadd(value, load_some(element, w + v * kLanes, partial), chains[v]);
        }
      }
      for (int v = 0; v < kVectors; ++v) sums[v] = add(sums[v], chains[v]);
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = j + v * kLanes;
      const Vec bias = task.bias_dec != nullptr ? load_some(F32{}, task.bias_dec + column, partial) : zero();
      const Vec state = load_some(element, x + column, partial);
      const Vec error = sub(add(sums[v], bias), state);
      float* panel = panel_column(task.panels, row, column);
      store(F32{}, panel, error);
      store(F32{}, panel + panel_width(d, column / kPanelColumns), sub(state, bias));
      store_some(element, residual + column, partial, error);
      float* column_sum = task.residual_sum + column;
      store(F32{}, column_sum, add(load(F32{}, column_sum), error));
      squares = fmadd(error, error, squares);
    }
  });
  // What is left of the last panel: whole vectors past d.
  const int64_t last = panel_count(d) - 1, width = panel_width(d, last);
  float* panel = panel_row(task.panels, last, row);
  for (int64_t j = (d - last * kPanelColumns + kLanes - 1) / kLanes * kLanes; j < width; j += kLanes) {
    store(F32{}, panel + j, zero());
    store(F32{}, panel + width + j, zero());
  }
  return reduce_add(squares);
}

// Adds <residual, row> of four rows of W_dec over columns [first, first + kVectors vectors) of a panel.
template <int kVectors, class Element>
inline void dot_columns(Element element, const float* residual, const typename Element::Storage* const* rows,
                        int64_t column, Vec* sums) {
  for (int v = 0; v < kVectors; ++v) {
    const Vec r = load(F32{}, residual + v * kLanes);
    for (int i = 0; i < 4; ++i) sums[i] = fmadd(r, load(element, rows[i] + column + v * kLanes), sums[i]);
  }
}

template <class Element>
void gradient_row(Element element, const StepRowsTask& task, int64_t row) {
  using Storage = typename Element::Storage;
  constexpr int kPanelVectors = kPanelColumns / kLanes;
  const auto* weight = static_cast<const Storage*>(task.weight_dec.data);
  const int64_t begin = task.offsets[row], end = task.offsets[row + 1], d = task.x.cols;
  for (int64_t e = begin; e < end; e += 4) {
    const int64_t count = end - e < 4 ? end - e : 4;
    const Storage* rows[4];
    for (int i = 0; i < 4; ++i) {
      rows[i] = weight + task.indices[i < count ? e + i : e] * task.weight_dec.row_stride;
    }
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    int64_t j = 0;
    for (; j + kPanelColumns <= d; j += kPanelColumns) {
      dot_columns<kPanelVectors>(element, panel_row(task.panels, j / kPanelColumns, row), rows, j, sums);
    }
    for (; j + kLanes <= d; j += kLanes) dot_columns<1>(element, panel_column(task.panels, row, j), rows, j, sums);
    if (j < d) {
      const Vec r = load(F32{}, panel_column(task.panels, row, j));
      for (int i = 0; i < 4; ++i) sums[i] = fmadd(r, load_partial(element, rows[i] + j, d - j), sums[i]);
    }
    float dots[4];
    reduce_add4(sums[0], sums[1], sums[2], sums[3], dots);
    for (int64_t i = 0; i < count; ++i) {
      // "Not <=", as the gradient of torch.relu: a NaN lets it pass.
      task.entry_gradients[e + i] = task.values[e + i] <= 0 ? 0.0f : task.scale * dots[i] + task.penalty;
    }
  }
}

// Sums of `value * residual` and `gradient * state` over a feature's entries: kVectors vectors of either from column j
// of the panel. Returns the sum of the entries' gradients.
template <int kVectors>
inline float group_sums(const StepGroupsTask& task, int64_t begin, int64_t end, int64_t j, Vec* residuals, Vec* states) {
  const int64_t width = panel_width(task.panels.d, task.panel), stride = 2 * width;
  const float* panel = panel_row(task.panels, task.panel, 0) + j;
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
      const float* row = panel + entry.row * stride;
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
  const int64_t d = task.panels.d;
  Vec residuals[kVectors], states[kVectors];
  const float sum = group_sums<kVectors>(task, task.group_offsets[feature], task.group_offsets[feature + 1], j,
                                         residuals, states);
  const Vec scale = set1(task.scale), bias_gradient = set1(sum);
  auto* grad_dec = static_cast<Storage*>(task.grad_weight_dec.data) + feature * task.grad_weight_dec.row_stride;
  auto* grad_enc = static_cast<Storage*>(task.grad_weight_enc.data) + feature * task.grad_weight_enc.row_stride;
  const auto* weight = static_cast<const Storage*>(task.weight_enc.data) + feature * task.weight_enc.row_stride;
  const bool fired = task.group_offsets[feature] < task.group_offsets[feature + 1];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = task.panel * kPanelColumns + j + v * kLanes;
    if (column >= d) break;
    const int64_t partial = d - column < kLanes ? d - column : 0;
    store_some(element, grad_dec + column, partial, mul(scale, residuals[v]));
    store_some(element, grad_enc + column, partial, states[v]);
    if (fired) {
      float* part = task.bias_part + j + v * kLanes;
      store(F32{}, part, fmadd(bias_gradient, load_some(element, weight + column, partial), load(F32{}, part)));
    }
  }
  return sum;
}

}  // namespace

void step_rows(StepRowsTask& task) {
  with_element(task.x.dtype, [&](auto element) {
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
      task.squared_sum += static_cast<double>(residual_row(element, task, row));
      gradient_row(element, task, row);
    }
  });
}

void step_groups(const StepGroupsTask& task) {
  with_element(task.grad_weight_dec.dtype, [&](auto element) {
    const int64_t width = panel_width(task.panels.d, task.panel);
    for (int64_t j = 0; j < kPanelColumns; j += kLanes) store(F32{}, task.bias_part + j, zero());
    for (int64_t feature = task.feature_begin; feature < task.feature_end; ++feature) {
      float sum = 0.0f;
      int64_t j = 0;
      for (; j + 4 * kLanes <= width; j += 4 * kLanes) sum = group_columns<4>(element, task, feature, j);
      const int64_t left = (width - j) / kLanes;
      if (left == 1) sum = group_columns<1>(element, task, feature, j);
      if (left == 2) sum = group_columns<2>(element, task, feature, j);
      if (left == 3) sum = group_columns<3>(element, task, feature, j);
      if (task.panel == 0) {
        using Storage = typename decltype(element)::Storage;
        static_cast<Storage*>(task.grad_bias_enc)[feature] = narrow(element, sum);
      }
    }
  });
}

}  // namespace SAEREC_TIER
}  // namespace saerec
