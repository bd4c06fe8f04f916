// The top-k of every row of a batch: cuts the batch into tasks, and the dictionary too where there are fewer rows than
// would keep the threads busy; then each piece leaves its best k of a row, which are merged.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "encode_rows.h"
#include "parallel.h"

namespace saerec {

struct TopKRows {
  Matrix x;  // (B, d)
  int64_t k = 0;
  bool sorted = true;                        // descending; otherwise in ascending order of feature
  const int64_t* exclude_offsets = nullptr;  // (B + 1) or absent
  const int64_t* exclude_ids = nullptr;      // ascending within a row
  int threads = 1;
};

// Calls use(row, values, features, count) once for every row, from any thread. The arrays may be changed.
template <class Use>
void for_each_topk_row(const TopKRows& request, const EncoderWeights& weights, const Use& use) {
  const int64_t rows = request.x.rows, n = weights.weight.rows, k = request.k;
  const SweepPartition partition = partition_sweep(rows, n, request.x.cols, request.threads, true);
  const int64_t segments = partition.segments;
  std::vector<uint64_t> segment_keys(segments > 1 ? static_cast<std::size_t>(rows * segments * k) : 0);
  std::vector<int64_t> segment_counts(segments > 1 ? static_cast<std::size_t>(rows * segments) : 0);

  parallel_for(partition.chunks * segments, partition.threads, [&](int64_t task) {
    const int64_t chunk = task / segments, segment = task % segments;
    const int64_t row_begin = chunk * partition.chunk_rows;
    const int64_t row_count = std::min(partition.chunk_rows, rows - row_begin);
    const int64_t begin = segment * partition.segment_features;
    const int64_t end = std::min(begin + partition.segment_features, n);
    const TopKCandidates candidates = encode_topk_chunk(
        thread_encoder_scratch(), row_range(request.x, row_begin, row_count), weights, begin, end, k,
        request.sorted || segments > 1,
        request.exclude_offsets != nullptr ? request.exclude_offsets + row_begin : nullptr, request.exclude_ids);
    for (int64_t r = 0; r < row_count; ++r) {
      const int64_t count = candidates.counts[r], row = row_begin + r;
      float* values = candidates.values + r * candidates.capacity;
      uint32_t* features = candidates.features + r * candidates.capacity;
      if (segments == 1) {
        use(row, values, features, count);
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
    // A caller that asked for no order gets the one of a single segment, so that sums over a row keep their bits.
    if (!request.sorted) {
      std::sort(merged.begin(), merged.begin() + kept,
                [](uint64_t a, uint64_t b) { return key_feature(a) < key_feature(b); });
    }
    values.clear();
    features.clear();
    for (int64_t i = 0; i < kept; ++i) {
      values.push_back(key_value(merged[i]));
      features.push_back(key_feature(merged[i]));
    }
    use(row, values.data(), features.data(), kept);
  }
}

}  // namespace saerec
