#include "saerec/sparse_gradients.h"

#include <algorithm>
#include <vector>

#include "convert.h"
#include "encode_rows.h"
#include "kernels.h"
#include "parallel.h"

namespace saerec {

void sparse_dot(const SparseDotParams& params) {
  const int64_t rows = params.rows.rows;
  if (rows == 0) return;
  const int threads = useful_threads(params.threads, params.offsets[rows] * params.rows.cols);
  const int64_t chunk_rows = std::max<int64_t>(1, std::min(kChunkRows, (rows + threads - 1) / threads));
  parallel_for((rows + chunk_rows - 1) / chunk_rows, threads, [&](int64_t chunk) {
    const int64_t first = chunk * chunk_rows;
    DotTask task;
    task.offsets = params.offsets + first;
    task.indices = params.indices;
    task.rows = row_range(params.rows, first, std::min(chunk_rows, rows - first));
    task.weight = params.weight;
    task.out = params.out;
    task.out_dtype = params.out_dtype;
    active_kernels().dot_rows(task);
  });
}

void sparse_weight_gradient(const SparseWeightGradientParams& params) {
  const int64_t rows = params.rows.rows, n = params.out.rows;
  if (n == 0) return;
  const int64_t entries = params.offsets[rows];
  const std::vector<float> shift = widened(params.shift);
  std::vector<int64_t> group_offsets(static_cast<std::size_t>(n + 1), 0);
  std::vector<int64_t> grouped(static_cast<std::size_t>(entries));
  std::vector<int32_t> entry_rows(static_cast<std::size_t>(entries));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t e = params.offsets[r]; e < params.offsets[r + 1]; ++e) {
      entry_rows[e] = static_cast<int32_t>(r);
      const int64_t feature = index_at(params.indices, e);
      if (feature >= 0) ++group_offsets[feature + 1];
    }
  }
  for (int64_t f = 0; f < n; ++f) group_offsets[f + 1] += group_offsets[f];
  std::vector<int64_t> next(group_offsets.begin(), group_offsets.end() - 1);
  for (int64_t e = 0; e < entries; ++e) {
    const int64_t feature = index_at(params.indices, e);
    if (feature >= 0) grouped[next[feature]++] = e;
  }
  const int threads = useful_threads(params.threads, (entries + n) * params.rows.cols);
  // Small ranges: popular features make groups very uneven, and dynamic scheduling evens ranges out.
  const int64_t range = std::max<int64_t>(1, std::min<int64_t>(64, n / (threads * 8) + 1));
  parallel_for((n + range - 1) / range, threads, [&](int64_t part) {
    GroupedSumTask task;
    task.feature_begin = part * range;
    task.feature_end = std::min(task.feature_begin + range, n);
    task.group_offsets = group_offsets.data();
    task.entries = grouped.data();
    task.entry_rows = entry_rows.data();
    task.coefficients = params.coefficients;
    task.rows = params.rows;
    task.shift = shift.empty() ? nullptr : shift.data();
    task.out = params.out;
    task.out_sum = params.out_sum;
    active_kernels().sum_groups(task);
  });
}

}  // namespace saerec
