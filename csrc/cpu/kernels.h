// What each tier implements. Tasks are plain structs of pointers: code compiled with a tier's flags must not
// instantiate anything of the standard library, whose weak symbols the linker could take for the portable copy.
#pragma once

#include <cstdint>

#include "saerec/views.h"

namespace saerec {

// Rows handled by one task: x of the task (converted to float32) stays in L1/L2 while the dictionary streams by, and
// the price of transposing a block of weights is shared by this many rows.
constexpr int64_t kChunkRows = 128;
// Features per step of the sweep: two vectors of the widest tier. All tiers share it, so that candidate capacities do.
constexpr int64_t kFeatureBlock = 32;

// Candidates of one row during a top-k sweep. A new score enters unless score <= threshold; the threshold starts as NaN
// (everything enters) and becomes the k-th best so far each time the candidates are cut back.
struct TopKCandidates {
  float* values = nullptr;       // (rows, capacity)
  uint32_t* features = nullptr;  // (rows, capacity)
  int64_t* counts = nullptr;     // (rows)
  float* thresholds = nullptr;   // (rows)
  int64_t capacity = 0;
  int64_t k = 0;
  int32_t* keys = nullptr;  // (capacity) scratch
};

// Sorts pairs in descending order of value, ties by smallest feature, NaN first.
void sort_candidates(float* values, uint32_t* features, int64_t count);

// Entries found by a threshold sweep, in feature-block order; grows as needed.
struct ThresholdLog {
  uint32_t* rows = nullptr;
  uint32_t* features = nullptr;
  float* values = nullptr;
  int64_t count = 0;
  int64_t capacity = 0;
};

// Makes room for `extra` more entries. Throws std::bad_alloc.
void grow_log(ThresholdLog& log, int64_t extra);

// One sweep of some rows over features [begin, end) of the dictionary, or over a list of them.
struct SweepTask {
  Matrix x;  // the rows of this task
  Matrix weight;
  Vector bias;
  const float* shift = nullptr;  // (d) float32 or absent
  int64_t feature_begin = 0;
  int64_t feature_end = 0;
  const int64_t* feature_list = nullptr;  // when present, [begin, end) index into it
  float* x_scratch = nullptr;             // (rows, d)
  float* weight_scratch = nullptr;        // (d, kFeatureBlock), 64-byte aligned
};

struct TopKSweep {
  SweepTask sweep;
  TopKCandidates candidates;
  const int64_t* exclude_offsets = nullptr;  // (rows + 1) into exclude_ids, ids ascending within a row
  const int64_t* exclude_ids = nullptr;
  int64_t* exclude_cursor = nullptr;  // (rows) scratch
};

struct ThresholdSweep {
  SweepTask sweep;
  Vector thresholds;
  ThresholdLog* log = nullptr;
};

struct DenseSweep {
  SweepTask sweep;
  float* out = nullptr;  // (rows, feature_end - feature_begin)
};

struct DecodeTask {
  const int64_t* offsets = nullptr;  // (rows + 1), absolute
  IndexArray indices;
  Vector values;
  Matrix weight;
  const float* bias = nullptr;  // (d) float32 or absent
  Matrix base;                  // added to the sum; data == nullptr: nothing
  Matrix out;                   // the rows of this task
};

struct DotTask {
  const int64_t* offsets = nullptr;  // (rows + 1), absolute
  IndexArray indices;
  Matrix rows;
  Matrix weight;
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
};

struct GroupedSumTask {
  int64_t feature_begin = 0;
  int64_t feature_end = 0;
  const int64_t* group_offsets = nullptr;  // (n + 1)
  const int64_t* entries = nullptr;        // entry numbers grouped by feature, ascending
  const int32_t* entry_rows = nullptr;     // row of every entry
  Vector coefficients;
  Matrix rows;
  const float* shift = nullptr;
  Matrix out;
  void* out_sum = nullptr;
};

struct Kernels {
  void (*sweep_topk)(TopKSweep&);
  // Leaves the best (at most k) candidates of a row in their final order.
  void (*finish_topk)(TopKCandidates&, int64_t row);
  void (*sweep_threshold)(ThresholdSweep&);
  void (*sweep_dense)(DenseSweep&);
  void (*decode_rows)(const DecodeTask&);
  void (*dot_rows)(const DotTask&);
  void (*sum_groups)(const GroupedSumTask&);
};

const Kernels& active_kernels();

}  // namespace saerec
