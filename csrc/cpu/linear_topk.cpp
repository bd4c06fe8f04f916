#include "saerec/linear_topk.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "convert.h"
#include "encode_rows.h"
#include "parallel.h"

namespace saerec {
namespace {

void write_row(const LinearTopKParams& params, int64_t row, const float* values, const uint32_t* features,
               int64_t count) {
  for (int64_t i = 0; i < params.k; ++i) {
    float value = -std::numeric_limits<float>::infinity();
    int64_t feature = -1;
    if (i < count) {
      // The same bits on every path: merging goes through keys, which know one zero and one NaN.
      value = key_value(candidate_key(values[i], 0));
      feature = features[i];
    }
    if (params.relu && value < 0.0f) value = 0.0f;
    store_element(params.x.dtype, params.values, row * params.k + i, value);
    if (params.index_type == IndexType::kInt32) {
      static_cast<int32_t*>(params.indices)[row * params.k + i] = static_cast<int32_t>(feature);
    } else {
      static_cast<int64_t*>(params.indices)[row * params.k + i] = feature;
    }
  }
}

// The sweep walks each row's excluded ids once, in ascending order.
std::vector<int64_t> sorted_exclude_ids(const LinearTopKParams& params) {
  std::vector<int64_t> ids;
  if (params.exclude_offsets == nullptr) return ids;
  const int64_t* offsets = params.exclude_offsets;
  ids.assign(params.exclude_ids, params.exclude_ids + offsets[params.x.rows]);
  for (int64_t row = 0; row < params.x.rows; ++row) {
    std::sort(ids.begin() + offsets[row], ids.begin() + offsets[row + 1]);
    const bool empty = offsets[row] == offsets[row + 1];
    if (!empty && (ids[offsets[row]] < 0 || ids[offsets[row + 1] - 1] >= params.weight.rows)) {
      throw std::invalid_argument("exclude: expected ids from 0 to " + std::to_string(params.weight.rows - 1) +
                                  ", got " + std::to_string(ids[offsets[row]]) + " to " +
                                  std::to_string(ids[offsets[row + 1] - 1]) + " in row " + std::to_string(row));
    }
  }
  return ids;
}

}  // namespace

void linear_topk(const LinearTopKParams& params) {
  const int64_t rows = params.x.rows, n = params.weight.rows, k = params.k;
  if (rows == 0 || k == 0) return;
  const std::vector<float> shift = widened(params.shift);
  const std::vector<int64_t> exclude_ids = sorted_exclude_ids(params);
  EncoderWeights weights{params.weight, params.bias, shift.empty() ? nullptr : shift.data()};
  const SweepPartition partition = partition_sweep(rows, n, params.x.cols, params.threads, true);

  // With several segments every one leaves its best k keys of each row here, merged below.
  const int64_t segments = partition.segments;
  std::vector<uint64_t> segment_keys(segments > 1 ? static_cast<std::size_t>(rows * segments * k) : 0);
  std::vector<int64_t> segment_counts(segments > 1 ? static_cast<std::size_t>(rows * segments) : 0);

  parallel_for(partition.chunks * segments, partition.threads, [&](int64_t task) {
    const int64_t chunk = task / segments, segment = task % segments;
    const int64_t row_begin = chunk * partition.chunk_rows;
    const int64_t row_count = std::min(partition.chunk_rows, rows - row_begin);
    const int64_t begin = segment * partition.segment_features;
    const int64_t end = std::min(begin + partition.segment_features, n);
    const TopKCandidates candidates = sweep_topk_chunk(
        thread_encoder_scratch(), row_range(params.x, row_begin, row_count), weights, begin, end, k,
        params.exclude_offsets != nullptr ? params.exclude_offsets + row_begin : nullptr, exclude_ids.data());
    for (int64_t r = 0; r < row_count; ++r) {
      const int64_t count = candidates.counts[r], row = row_begin + r;
      const float* values = candidates.values + r * candidates.capacity;
      const uint32_t* features = candidates.features + r * candidates.capacity;
      if (segments == 1) {
        write_row(params, row, values, features, count);
        continue;
      }
      const int64_t slot = row * segments + segment;
      for (int64_t i = 0; i < count; ++i) segment_keys[slot * k + i] = candidate_key(values[i], features[i]);
      segment_counts[slot] = count;
    }
  });
  if (segments == 1) return;
  std::vector<uint64_t> merged;
  std::vector<float> values;
  std::vector<uint32_t> features;
  for (int64_t row = 0; row < rows; ++row) {
    merged.clear();
    for (int64_t slot = row * segments; slot < (row + 1) * segments; ++slot) {
      const auto begin = segment_keys.begin() + slot * k;
      merged.insert(merged.end(), begin, begin + segment_counts[slot]);
    }
    const int64_t kept = std::min<int64_t>(k, static_cast<int64_t>(merged.size()));
    std::partial_sort(merged.begin(), merged.begin() + kept, merged.end(), std::greater<uint64_t>());
    values.clear();
    features.clear();
    for (int64_t i = 0; i < kept; ++i) {
      values.push_back(key_value(merged[i]));
      features.push_back(key_feature(merged[i]));
    }
    write_row(params, row, values.data(), features.data(), kept);
  }
}

}  // namespace saerec
