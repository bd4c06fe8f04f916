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

// Matrices of a training step as float32 panels of some columns: all rows of a panel before the next panel, so that the
// panel stays in the second-level cache while rows of it are gathered. Columns past d are zero, up to panel_width.
constexpr int64_t kPanelAlignment = 16;  // a vector of the widest tier
constexpr int64_t kMaxPanelColumns = 64;

struct Panels {
  int64_t d = 0;
  int64_t columns = kMaxPanelColumns;  // a multiple of kPanelAlignment
};

static inline int64_t panel_count(const Panels& panels) { return (panels.d + panels.columns - 1) / panels.columns; }
static inline int64_t panel_width(const Panels& panels, int64_t panel) {
  const int64_t columns = panels.d - panel * panels.columns;
  return columns >= panels.columns ? panels.columns
                                   : (columns + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment;
}

struct PackTask {
  Panels panels;
  Matrix matrix;
  int64_t panel = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  float* out = nullptr;  // (matrix.rows, panel_width): the panel
};

// One panel of rows [row_begin, row_end) of a training step: reconstruction, residual, dot products of the entries.
struct StepRowsTask {
  Panels panels;
  int64_t panel = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  Matrix x;  // all rows
  const int64_t* offsets = nullptr;
  const int32_t* indices = nullptr;
  const float* values = nullptr;
  const float* weight = nullptr;  // this panel's first column of W_dec
  int64_t weight_stride = 0;
  const float* bias_dec = nullptr;  // (panel_count * panels.columns), zero past d
  float scale = 1;
  float penalty = 0;
  float* states = nullptr;  // this panel; a row holds its residual, then x less the bias, each panel_width long
  float* entry_gradients = nullptr;  // the dot products so far, after the last panel the gradients
  Matrix residual;
  float* residual_sum = nullptr;  // (panel_width): of these rows; starts at zero
  double squared_sum = 0;         // of these rows
};

struct StepEntry {
  int32_t row;
  float value;
  float gradient;
};

// Columns of one panel of the weight gradients of features [feature_begin, feature_end).
struct StepGroupsTask {
  Panels panels;
  int64_t panel = 0;
  int64_t feature_begin = 0;
  int64_t feature_end = 0;
  const int64_t* group_offsets = nullptr;  // (n + 1)
  const StepEntry* entries = nullptr;      // grouped by feature, in row order
  const float* states = nullptr;           // as StepRowsTask
  float scale = 1;
  Matrix weight_enc;
  Matrix grad_weight_enc;
  Matrix grad_weight_dec;
  void* grad_bias_enc = nullptr;
  float* bias_part = nullptr;  // (kMaxPanelColumns): this panel's columns of sum_f grad_bias_enc[f] * W_enc[f]; written
};

// Rows [row_begin, row_end) of an Adam step. Numbers are rounded to float32 where torch rounds them.
struct AdamTask {
  float* parameter = nullptr;
  const float* gradient = nullptr;
  float* exp_avg = nullptr;
  float* exp_avg_sq = nullptr;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  int64_t cols = 0;
  float negative_step_size = 0;
  float one_minus_beta1 = 0;
  float beta2 = 0;
  float one_minus_beta2 = 0;
  float correction2_sqrt = 1;
  float epsilon = 0;
  bool unit_rows = false;
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
  void (*pack_panel)(const PackTask&);
  void (*step_rows)(StepRowsTask&);
  void (*step_groups)(const StepGroupsTask&);
  void (*adam_rows)(const AdamTask&);
};

const Kernels& active_kernels();

}  // namespace saerec
