#include "encode_rows.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <vector>

#include "parallel.h"

namespace saerec {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

SweepTask sweep_task(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights, int64_t begin,
                     int64_t end) {
  SweepTask task;
  task.x = x;
  task.weight = weights.weight;
  task.bias = weights.bias;
  task.shift = weights.shift;
  task.feature_begin = begin;
  task.feature_end = end;
  task.x_scratch = scratch.x.get<float>(x.rows * x.cols);
  task.weight_scratch = scratch.weight.get<float>(round_up(x.cols, 16) * kFeatureBlock);
  return task;
}

// malloc'ed arrays are replaced one by one, so a failed one leaves the log as it was.
template <class T>
void reallocate(T*& array, int64_t capacity) {
  void* grown = std::realloc(array, static_cast<std::size_t>(capacity) * sizeof(T));
  if (grown == nullptr) throw std::bad_alloc();
  array = static_cast<T*>(grown);
}

}  // namespace

EncoderScratch::~EncoderScratch() {
  std::free(log.rows);
  std::free(log.features);
  std::free(log.values);
}

EncoderScratch& thread_encoder_scratch() {
  thread_local EncoderScratch scratch;
  return scratch;
}

Matrix row_range(const Matrix& x, int64_t row_begin, int64_t rows) {
  Matrix part = x;
  part.data = static_cast<char*>(x.data) + row_begin * x.row_stride * dtype_size(x.dtype);
  part.rows = rows;
  return part;
}

uint64_t candidate_key(float value, uint32_t feature) {
  const uint32_t tie = ~feature;
  uint32_t order = 0xFFFFFFFFu;
  if (!std::isnan(value)) {
    const float unsigned_zero = value + 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &unsigned_zero, 4);
    order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  return static_cast<uint64_t>(order) << 32 | tie;
}

float key_value(uint64_t key) {
  const uint32_t order = static_cast<uint32_t>(key >> 32);
  if (order == 0xFFFFFFFFu) return std::numeric_limits<float>::quiet_NaN();
  const uint32_t bits = order & 0x80000000u ? order & 0x7FFFFFFFu : ~order;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t key_feature(uint64_t key) { return ~static_cast<uint32_t>(key); }

void sort_candidates(float* values, uint32_t* features, int64_t count) {
  std::vector<uint64_t> keys;
  keys.reserve(static_cast<std::size_t>(count));
  for (int64_t i = 0; i < count; ++i) keys.push_back(candidate_key(values[i], features[i]));
  std::sort(keys.begin(), keys.end(), std::greater<uint64_t>());
  for (int64_t i = 0; i < count; ++i) {
    values[i] = key_value(keys[i]);
    features[i] = key_feature(keys[i]);
  }
}

TopKCandidates sweep_topk_chunk(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights, int64_t begin,
                                int64_t end, int64_t k, const int64_t* exclude_offsets, const int64_t* exclude_ids) {
  TopKSweep task;
  task.sweep = sweep_task(scratch, x, weights, begin, end);
  TopKCandidates& candidates = task.candidates;
  candidates.k = k;
  // Room for as many newcomers as there are kept ones (and not too few) makes a cut, which is linear in the capacity,
  // cost a bounded number of steps per newcomer.
  candidates.capacity = round_up(k + std::max<int64_t>(k, 64) + kFeatureBlock, 16);
  candidates.values = scratch.values.get<float>(x.rows * candidates.capacity);
  candidates.features = scratch.features.get<uint32_t>(x.rows * candidates.capacity);
  candidates.counts = scratch.counts.get<int64_t>(x.rows);
  candidates.thresholds = scratch.thresholds.get<float>(x.rows);
  candidates.keys = scratch.keys.get<int32_t>(candidates.capacity);
  std::fill_n(candidates.counts, x.rows, int64_t{0});
  std::fill_n(candidates.thresholds, x.rows, std::numeric_limits<float>::quiet_NaN());
  if (exclude_offsets != nullptr) {
    task.exclude_offsets = exclude_offsets;
    task.exclude_ids = exclude_ids;
    task.exclude_cursor = scratch.cursors.get<int64_t>(x.rows);
    std::fill_n(task.exclude_cursor, x.rows, int64_t{0});
  }
  active_kernels().sweep_topk(task);
  for (int64_t r = 0; r < x.rows; ++r) active_kernels().finish_topk(candidates, r);
  return candidates;
}

void grow_log(ThresholdLog& log, int64_t extra) {
  const int64_t capacity = std::max<int64_t>(log.capacity * 2, log.count + extra + 4096);
  reallocate(log.rows, capacity);
  reallocate(log.features, capacity);
  reallocate(log.values, capacity);
  log.capacity = capacity;
}

const ThresholdLog& sweep_threshold_chunk(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights,
                                          int64_t begin, int64_t end, const Vector& thresholds) {
  ThresholdSweep task;
  task.sweep = sweep_task(scratch, x, weights, begin, end);
  task.thresholds = thresholds;
  scratch.log.count = 0;
  task.log = &scratch.log;
  active_kernels().sweep_threshold(task);
  return scratch.log;
}

void sweep_feature_list(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights,
                        const int64_t* features, int64_t count, float* out) {
  DenseSweep task;
  task.sweep = sweep_task(scratch, x, weights, 0, count);
  task.sweep.feature_list = features;
  task.out = out;
  active_kernels().sweep_dense(task);
}

SweepPartition partition_sweep(int64_t rows, int64_t features, int64_t d, int threads, bool split_features) {
  SweepPartition partition;
  partition.threads = useful_threads(threads, sweep_operations(rows, features, d));
  partition.segment_features = std::max<int64_t>(features, 1);
  if (rows == 0) return partition;
  // Chunks of a multiple of 8 rows fill the row tiles of every tier but for the last chunk.
  const int64_t share = round_up((rows + partition.threads - 1) / partition.threads, 8);
  partition.chunk_rows = std::min(std::min(share, kChunkRows), rows);
  partition.chunks = (rows + partition.chunk_rows - 1) / partition.chunk_rows;
  if (split_features && partition.chunks < partition.threads) {
    const int64_t wanted = (partition.threads + partition.chunks - 1) / partition.chunks;
    partition.segment_features = round_up((features + wanted - 1) / wanted, kFeatureBlock);
    partition.segments = (features + partition.segment_features - 1) / partition.segment_features;
  }
  return partition;
}

}  // namespace saerec
