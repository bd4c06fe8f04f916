#include "saerec/sparse_training_step.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace saerec {
namespace {

// Rows and features whose partial sums are added up in order: fixed sizes, so that sums do not depend on threads.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kMaxFeatureRanges = 256;
constexpr int64_t kMinRangeFeatures = 16;
constexpr int64_t kPanelBytes = int64_t{1} << 20;
constexpr int64_t kPackRows = 512;
constexpr int64_t kPackReuse = 4;
constexpr std::size_t kKeptBytes = std::size_t{64} << 20;

// Half as wide where only then a panel of W_dec fits a second-level cache of 2 MiB beside the rest.
Panels panel_layout(int64_t n, int64_t d) {
  Panels panels;
  panels.d = d;
  if (d > kMaxPanelColumns && n * kMaxPanelColumns * 4 > kPanelBytes) panels.columns = kMaxPanelColumns / 2;
  return panels;
}

std::vector<int32_t> indices32(const IndexArray& indices, int64_t entries) {
  std::vector<int32_t> copy;
  if (indices.type == IndexType::kInt32) return copy;
  copy.resize(static_cast<std::size_t>(entries));
  for (int64_t e = 0; e < entries; ++e) copy[e] = static_cast<int32_t>(index_at(indices, e));
  return copy;
}

// Entries whose activation is not <= 0, grouped by feature and in row order within a group: a counting sort over
// contiguous chunks of rows, so that the order does not depend on their number.
struct Grouping {
  std::vector<int64_t> offsets;  // (n + 1)
  StepEntry* entries = nullptr;
};

// Kept by the calling thread between steps up to a size: faulting fresh pages in costs as much as the step's
// arithmetic.
struct Workspace {
  ScratchBuffer states, weight, gradients, entries;
  void trim() {
    for (ScratchBuffer* buffer : {&states, &weight, &gradients, &entries}) buffer->release_above(kKeptBytes);
  }
};

void group_entries(const SparseTrainingStepParams& params, const int32_t* indices, const float* values,
                   const float* gradients, int threads, ScratchBuffer& buffer, Grouping& groups) {
  const int64_t rows = params.x.rows, n = params.weight_dec.rows;
  // Each chunk has n counters of its own, which must not cost more than its entries.
  const int64_t useful = 1 + params.offsets[rows] / std::max<int64_t>(n, 1);
  const int64_t chunks = std::max<int64_t>(1, std::min<int64_t>({threads, useful, rows}));
  const auto chunk_row = [&](int64_t chunk) { return rows * chunk / chunks; };
  std::vector<int64_t> cursors(static_cast<std::size_t>(chunks * n), 0);
  parallel_for(chunks, threads, [&](int64_t chunk) {
    int64_t* counts = cursors.data() + chunk * n;
    const int64_t end = params.offsets[chunk_row(chunk + 1)];
    for (int64_t e = params.offsets[chunk_row(chunk)]; e < end; ++e) counts[indices[e]] += !(values[e] <= 0);
  });
  groups.offsets.resize(static_cast<std::size_t>(n + 1));
  int64_t total = 0;
  for (int64_t f = 0; f < n; ++f) {
    groups.offsets[f] = total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t count = cursors[chunk * n + f];
      cursors[chunk * n + f] = total;
      total += count;
    }
    params.counts[f] = total - groups.offsets[f];
  }
  groups.offsets[n] = total;
  groups.entries = buffer.get<StepEntry>(std::max<int64_t>(total, 1));
  parallel_for(chunks, threads, [&](int64_t chunk) {
    int64_t* next = cursors.data() + chunk * n;
    for (int64_t row = chunk_row(chunk); row < chunk_row(chunk + 1); ++row) {
      for (int64_t e = params.offsets[row]; e < params.offsets[row + 1]; ++e) {
        if (!(values[e] <= 0)) {
          groups.entries[next[indices[e]]++] = {static_cast<int32_t>(row), values[e], gradients[e]};
        }
      }
    }
  });
}

}  // namespace

void sparse_training_step(const SparseTrainingStepParams& params) {
  const int64_t rows = params.x.rows, d = params.x.cols, n = params.weight_dec.rows;
  const Panels panels = panel_layout(n, d);
  const int64_t entries = params.offsets[rows], padded = panel_count(panels) * panels.columns;
  std::vector<float> bias_dec = widened(params.bias_dec);
  bias_dec.resize(static_cast<std::size_t>(padded), 0.0f);
  const std::vector<int32_t> converted = indices32(params.indices, entries);
  const int32_t* indices = converted.empty() ? static_cast<const int32_t*>(params.indices.data) : converted.data();
  const bool plain = params.values.dtype == DType::kFloat32 && params.values.stride == 1;
  Vector all_values = params.values;
  all_values.size = entries;
  const std::vector<float> wide_values = plain ? std::vector<float>() : widened(all_values);
  const float* values = plain ? static_cast<const float*>(params.values.data) : wide_values.data();
  const int threads = useful_threads(params.threads, (4 * entries + n) * d);

  const int64_t n_panels = panel_count(panels);
  static thread_local Workspace workspace;
  float* states = workspace.states.get<float>(2 * rows * padded);
  float* gradients = workspace.gradients.get<float>(std::max<int64_t>(entries, 1));
  // Where the entries read the rows of W_dec often enough, a panel of them in the cache is worth the copy.
  const bool in_place = params.weight_dec.dtype == DType::kFloat32 && d % kPanelAlignment == 0 &&
                        (n_panels == 1 || entries < kPackReuse * n);
  float* packed = in_place ? nullptr : workspace.weight.get<float>(n * padded);

  const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  std::vector<float> residual_sums(static_cast<std::size_t>(row_blocks * padded), 0.0f);
  std::vector<double> squares(static_cast<std::size_t>(row_blocks), 0.0), activations(squares);
  for (int64_t panel = 0; panel < n_panels; ++panel) {
    const float* weight = static_cast<const float*>(params.weight_dec.data) + panel * panels.columns;
    if (!in_place) {
      weight = packed + panel * panels.columns * n;
      parallel_for((n + kPackRows - 1) / kPackRows, threads, [&](int64_t part) {
        PanelTask task;
        task.panels = panels;
        task.matrix = params.weight_dec;
        task.panel = panel;
        task.row_begin = part * kPackRows;
        task.row_end = std::min(task.row_begin + kPackRows, n);
        task.out = packed + panel * panels.columns * n;
        active_kernels().pack_panel(task);
      });
    }
    parallel_for(row_blocks, threads, [&](int64_t block) {
      StepRowsTask task;
      task.panels = panels;
      task.panel = panel;
      task.row_begin = block * kBlockRows;
      task.row_end = std::min(task.row_begin + kBlockRows, rows);
      task.x = params.x;
      task.offsets = params.offsets;
      task.indices = indices;
      task.values = values;
      task.weight = weight;
      task.weight_stride = in_place ? params.weight_dec.row_stride : panel_width(panels, panel);
      task.bias_dec = bias_dec.data();
      task.scale = params.scale;
      task.penalty = params.penalty;
      task.states = states + 2 * panel * panels.columns * rows;
      task.entry_gradients = gradients;
      task.residual = params.residual;
      task.residual_sum = residual_sums.data() + block * padded + panel * panels.columns;
      active_kernels().step_rows(task);
      squares[block] += task.squared_sum;
      if (panel > 0) return;
      for (int64_t e = params.offsets[task.row_begin]; e < params.offsets[task.row_end]; ++e) {
        activations[block] += values[e];
      }
    });
  }
  params.sums[0] = params.sums[1] = 0;
  for (int64_t block = 0; block < row_blocks; ++block) {
    params.sums[0] += squares[block];
    params.sums[1] += activations[block];
  }

  Grouping groups;
  group_entries(params, indices, values, gradients, threads, workspace.entries, groups);

  const int64_t range = std::max(kMinRangeFeatures, (n + kMaxFeatureRanges - 1) / kMaxFeatureRanges);
  const int64_t ranges = (n + range - 1) / range;
  std::vector<float> bias_parts(static_cast<std::size_t>(n_panels * ranges * kMaxPanelColumns));
  // All features of a panel before the next one: the panel stays in cache.
  parallel_for(n_panels * ranges, threads, [&](int64_t part) {
    StepGroupsTask task;
    task.panels = panels;
    task.panel = part / ranges;
    task.feature_begin = part % ranges * range;
    task.feature_end = std::min(task.feature_begin + range, n);
    task.group_offsets = groups.offsets.data();
    task.entries = groups.entries;
    task.states = states + 2 * task.panel * panels.columns * rows;
    task.scale = params.scale;
    task.weight_enc = params.weight_enc;
    task.grad_weight_enc = params.grad_weight_enc;
    task.grad_weight_dec = params.grad_weight_dec;
    task.grad_bias_enc = params.grad_bias_enc;
    task.bias_part = bias_parts.data() + part * kMaxPanelColumns;
    active_kernels().step_groups(task);
  });

  for (int64_t j = 0; j < d; ++j) {
    double residual = 0, encoder = 0;
    for (int64_t block = 0; block < row_blocks; ++block) residual += residual_sums[block * padded + j];
    for (int64_t part = 0; part < ranges; ++part) {
      encoder += bias_parts[(j / panels.columns * ranges + part) * kMaxPanelColumns + j % panels.columns];
    }
    store_element(params.residual.dtype, params.grad_bias_dec, j,
                  static_cast<float>(params.scale * residual - encoder));
  }
  workspace.trim();
}

}  // namespace saerec
