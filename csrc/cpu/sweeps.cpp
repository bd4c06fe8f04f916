// The three sinks of the sweep: top-k candidates, a log of what exceeds a threshold, or every score.
// Compiled once per tier.
#include "kernels.h"
#include "selection-inl.h"
#include "sweep-inl.h"
#include "tier.inc"

namespace saerec {
namespace SAEREC_TIER {
namespace {

// Selection of the running top-k: a score enters unless it is <= the row's threshold. Features come in ascending order,
// so a later score equal to the k-th best loses the tie and need not enter.
struct TopKSink {
  TopKSweep& task;

  void begin_block(int64_t, int64_t) {}

  uint32_t excluded(int64_t row, int64_t first) {
    uint32_t mask = 0;
    int64_t& cursor = task.exclude_cursor[row];
    const int64_t begin = task.exclude_offsets[row], end = task.exclude_offsets[row + 1];
    while (begin + cursor < end && task.exclude_ids[begin + cursor] < first) ++cursor;
    for (int64_t i = begin + cursor; i < end && task.exclude_ids[i] < first + kFeatureBlock; ++i) {
      mask |= 1u << (task.exclude_ids[i] - first);
    }
    return mask;
  }

  uint32_t entering(int64_t row, const float* scores) const {
    const Vec threshold = set1(task.candidates.thresholds[row]);
    uint32_t mask = 0;
    for (int i = 0; i < kFeatureBlock; i += kLanes) mask |= not_le(load(F32{}, scores + i), threshold) << i;
    return mask;
  }

  void row(int64_t row, int64_t first, const float* scores, uint32_t valid) {
    uint32_t mask = entering(row, scores) & valid;
    if (mask == 0) return;
    TopKCandidates& candidates = task.candidates;
    if (candidates.counts[row] + kFeatureBlock > candidates.capacity) {
      cut_to_k(candidates, row);
      mask &= entering(row, scores);
    }
    if (task.exclude_offsets != nullptr) mask &= ~excluded(row, first);
    int64_t count = candidates.counts[row];
    float* values = candidates.values + row * candidates.capacity;
    uint32_t* features = candidates.features + row * candidates.capacity;
    for (int i = 0; i < kFeatureBlock; i += kLanes) {
      const uint32_t lanes = mask >> i & ((kLanes < 32 ? 1u << kLanes : 0u) - 1u);
      if (lanes == 0) continue;
      count +=
          append(values + count, features + count, load(F32{}, scores + i), static_cast<uint32_t>(first + i), lanes);
    }
    candidates.counts[row] = count;
  }
};

struct ThresholdSink {
  ThresholdSweep& task;
  float thresholds[kFeatureBlock];

  void begin_block(int64_t first, int64_t count) {
    for (int64_t i = 0; i < kFeatureBlock; ++i) {
      const int64_t feature = i < count ? first + i : first;
      thresholds[i] = value_at(task.thresholds, task.thresholds.size == 1 ? 0 : feature);
    }
  }

  void row(int64_t row, int64_t first, const float* scores, uint32_t valid) {
    ThresholdLog& log = *task.log;
    if (log.capacity - log.count < kFeatureBlock) grow_log(log, kFeatureBlock);
    for (int i = 0; i < kFeatureBlock; i += kLanes) {
      const Vec value = load(F32{}, scores + i);
      uint32_t lanes = not_le(value, load(F32{}, thresholds + i));
      lanes &= valid >> i;
      if (lanes == 0) continue;
      const int added =
          append(log.values + log.count, log.features + log.count, value, static_cast<uint32_t>(first + i), lanes);
      for (int j = 0; j < added; ++j) log.rows[log.count + j] = static_cast<uint32_t>(row);
      log.count += added;
    }
  }
};

struct DenseSink {
  DenseSweep& task;
  int64_t count = 0;

  void begin_block(int64_t, int64_t block_count) { count = block_count; }

  void row(int64_t row, int64_t first, const float* scores, uint32_t) {
    const int64_t columns = task.sweep.feature_end - task.sweep.feature_begin;
    float* out = task.out + row * columns + (first - task.sweep.feature_begin);
    for (int64_t i = 0; i < count; ++i) out[i] = scores[i];
  }
};

}  // namespace

void sweep_topk(TopKSweep& task) {
  TopKSink sink{task};
  sweep(task.sweep, sink);
}

void finish_topk(TopKCandidates& candidates, int64_t row) { sort_row(candidates, row); }

void sweep_threshold(ThresholdSweep& task) {
  ThresholdSink sink{task, {}};
  sweep(task.sweep, sink);
}

void sweep_dense(DenseSweep& task) {
  DenseSink sink{task};
  sweep(task.sweep, sink);
}

}  // namespace SAEREC_TIER
}  // namespace saerec
