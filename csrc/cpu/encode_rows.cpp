#include "encode_rows.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <vector>

#include "convert.h"
#include "parallel.h"

namespace saerec {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Below this many rows packing, which costs about as much as scoring a dozen of them, does not pay.
constexpr int64_t kMinRowsToPack = 16;
// With fewer features to a selected one most of them would have to be scored anyway.
constexpr int64_t kMinFeaturesPerSelected = 8;
constexpr int64_t kMinFeaturesToScreen = 256;

// Bytes of codes that the second-level cache of any CPU of the last years holds beside the rows.
constexpr int64_t kCachedCodes = 1 << 20;
constexpr int64_t kTasksPerThread = 4;

EncodeTask encode_task(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights, int64_t begin,
                       int64_t end) {
  EncodeTask task;
  task.x = x;
  task.weight = weights.weight;
  task.bias = weights.bias;
  task.shift = weights.shift;
  task.feature_begin = begin;
  task.feature_end = end;
  task.x_rows = scratch.x.get<float>(x.rows * x.cols);
  if (weights.packed.codes != nullptr) {
    task.packed = &weights.packed;
    // The codes of the last row may overhang by a vector.
    task.x_codes = scratch.codes.get<int8_t>(x.rows * 4 * weights.packed.quads + 64);
    task.screens = scratch.screens.get<RowScreen>(x.rows);
    task.uppers = scratch.uppers.get<float>(kMaxRowTile * range_features(x.cols));
  }
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

EncoderWeights prepare_weights(const Matrix& weight, const Vector& bias, const std::vector<float>& shift,
                               const PackedBytes& packed, int64_t rows, int64_t k, int threads) {
  EncoderWeights weights;
  weights.weight = weight;
  weights.bias = bias;
  weights.shift = shift.empty() ? nullptr : shift.data();
  const int64_t n = weight.rows, d = weight.cols;
  PackedView view;
  const bool given = packed.data != nullptr && open_packed(packed.data, packed.bytes, n, d, &view);
  if (n < kMinFeaturesToScreen || n < k * kMinFeaturesPerSelected || d == 0) return weights;
  if (given) {
    weights.packed = view;
  } else if (packed.data == nullptr && rows >= kMinRowsToPack) {
    thread_local ScratchBuffer buffer;
    const int64_t bytes = packed_size(n, d);
    PackParams params;
    params.weight = weight;
    params.bias = bias;
    params.out = buffer.get<char>(bytes);
    params.threads = threads;
    pack(params);
    if (open_packed(params.out, bytes, n, d, &view)) weights.packed = view;
  }
  return weights;
}

TopKCandidates encode_topk_chunk(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights, int64_t begin,
                                 int64_t end, int64_t k, bool sorted, const int64_t* exclude_offsets,
                                 const int64_t* exclude_ids) {
  TopKTask task;
  task.encode = encode_task(scratch, x, weights, begin, end);
  TopKCandidates& candidates = task.candidates;
  candidates.k = k;
  candidates.sorted = sorted;
  candidates.capacity = candidate_capacity(k, x.cols);
  candidates.values = scratch.values.get<float>(x.rows * candidates.capacity);
  candidates.features = scratch.features.get<uint32_t>(x.rows * candidates.capacity);
  candidates.counts = scratch.counts.get<int64_t>(x.rows);
  candidates.scored = scratch.scored.get<int64_t>(x.rows);
  candidates.bounds = scratch.bounds.get<float>(x.rows);
  if (weights.packed.codes != nullptr) {
    candidates.reached = scratch.reached.get<float>(x.rows);
    candidates.maxima = scratch.maxima.get<float>(x.rows * group_count(k));
    std::fill_n(candidates.maxima, x.rows * group_count(k), -std::numeric_limits<float>::infinity());
  }
  candidates.keys = scratch.keys.get<int32_t>(candidates.capacity);
  std::fill_n(candidates.counts, x.rows, int64_t{0});
  std::fill_n(candidates.scored, x.rows, int64_t{0});
  std::fill_n(candidates.bounds, x.rows, -std::numeric_limits<float>::infinity());
  task.positions = scratch.positions.get<uint32_t>(candidates.capacity);
  task.features = scratch.chosen_features.get<uint32_t>(candidates.capacity);
  task.scores = scratch.chosen_scores.get<float>(candidates.capacity);
  task.exact = scratch.exact.get<float>(candidates.capacity);
  if (exclude_offsets != nullptr) {
    task.exclude_offsets = exclude_offsets;
    task.exclude_ids = exclude_ids;
    task.exclude_cursor = scratch.cursors.get<int64_t>(x.rows);
    std::fill_n(task.exclude_cursor, x.rows, int64_t{0});
  }
  active_kernels().encode_topk(task);
  return candidates;
}

void grow_log(ThresholdLog& log, int64_t extra) {
  const int64_t capacity = std::max<int64_t>(log.capacity * 2, log.count + extra + kMaxLanes + 4096);
  reallocate(log.features, capacity);
  reallocate(log.values, capacity);
  log.capacity = capacity;
}

std::vector<float> widened_thresholds(const Vector& thresholds, int64_t n) {
  std::vector<float> values(static_cast<std::size_t>(round_up(n, kFeatureBlock)), 0.0f);
  for (int64_t i = 0; i < n; ++i) values[i] = element_at(thresholds, thresholds.size == 1 ? 0 : i);
  return values;
}

const ThresholdLog& encode_threshold_chunk(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights,
                                           int64_t begin, int64_t end, const float* thresholds) {
  ThresholdTask task;
  task.encode = encode_task(scratch, x, weights, begin, end);
  task.thresholds = thresholds;
  task.features = scratch.features.get<uint32_t>(range_features(x.cols) + 16);
  task.values = scratch.values.get<float>(range_features(x.cols) + 16);
  ThresholdLog& log = scratch.log;
  log.count = 0;
  log.ranges = (end - begin + range_features(x.cols) - 1) / range_features(x.cols);
  log.ends = scratch.log_ends.get<int64_t>(log.ranges * x.rows);
  task.log = &log;
  active_kernels().encode_threshold(task);
  return log;
}

GroupedLog group_by_row(EncoderScratch& scratch, const ThresholdLog& log, int64_t rows) {
  int64_t* offsets = scratch.group_offsets.get<int64_t>(rows + 1);
  offsets[0] = 0;
  if (log.ranges == 1) {
    std::copy_n(log.ends, rows, offsets + 1);
    return {offsets, log.features, log.values};
  }
  uint32_t* features = scratch.group_features.get<uint32_t>(log.count);
  float* values = scratch.group_values.get<float>(log.count);
  int64_t place = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t range = 0; range < log.ranges; ++range) {
      const int64_t run = range * rows + r, begin = run > 0 ? log.ends[run - 1] : 0, count = log.ends[run] - begin;
      std::copy_n(log.features + begin, count, features + place);
      std::copy_n(log.values + begin, count, values + place);
      place += count;
    }
    offsets[r + 1] = place;
  }
  return {offsets, features, values};
}

void encode_feature_list(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights,
                         const uint32_t* features, int64_t count, float* out) {
  FeatureListTask task;
  task.encode = encode_task(scratch, x, weights, 0, weights.weight.rows);
  task.features = features;
  task.count = count;
  task.out = out;
  active_kernels().encode_features(task);
}

void find_outscored_rows(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights, int64_t k,
                         const float* best, bool* outscored) {
  OutscoredTask task;
  task.encode = encode_task(scratch, x, weights, 0, weights.weight.rows);
  task.best = best;
  task.k = k;
  task.outscored = outscored;
  task.rows = scratch.positions.get<uint32_t>(x.rows);
  task.counts = scratch.counts.get<int64_t>(x.rows);
  task.bounds = scratch.bounds.get<float>(x.rows);
  active_kernels().find_outscored(task);
}

SweepPartition partition_sweep(int64_t rows, int64_t features, int64_t d, int threads, bool split_features) {
  SweepPartition partition;
  partition.threads = useful_threads(threads, sweep_operations(rows, features, d));
  partition.segment_features = std::max<int64_t>(features, 1);
  if (rows == 0) return partition;
  // Where the codes stay in the second-level cache, several tasks a thread cost nothing, and a thread that comes late
  // or is slow keeps the others waiting for less.
  const int64_t tasks =
      partition.threads * (partition.threads > 1 && features * d <= kCachedCodes ? kTasksPerThread : 1);
  // Chunks of a multiple of 8 rows fill the row tiles of every tier but for the last chunk.
  const int64_t share = round_up((rows + tasks - 1) / tasks, 8);
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
