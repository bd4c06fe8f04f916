// What each tier implements. Tasks are plain structs of pointers: code compiled with a tier's flags must not
// instantiate anything of the standard library, whose weak symbols the linker could take for the portable copy.
#pragma once

#include <cstdint>

#include "saerec/packed.h"
#include "saerec/views.h"

namespace saerec {

// Rows handled by one task: x of the task (converted to float32) stays in L2 while the dictionary streams by.
constexpr int64_t kChunkRows = 128;
// Features the screen scores side by side: the block of the packed layout.
constexpr int64_t kFeatureBlock = kPackedBlock;
// More dimensions could overflow a 32-bit sum of byte products.
constexpr int64_t kMaxScreenedDimensions = 1 << 16;

// Features whose scores a sweep holds at a time: as many as make 256 KiB of codes, so that those stay in L2 while the
// rows of the task pass, but enough for the largest k, and few enough for the scores of a tile of rows to stay there
// too.
static inline int64_t range_features(int64_t d) {
  const int64_t fitting = (int64_t{1} << 18) / (d > 0 ? d : 1) / kFeatureBlock * kFeatureBlock;
  return fitting < 512 ? 512 : fitting > 2048 ? 2048 : fitting;
}

struct PackTask {
  Matrix weight;
  Vector bias;
  PackedView view;  // written through
  int64_t block_begin = 0;
  int64_t block_end = 0;
  float* row = nullptr;          // scratch (d)
  uint8_t* row_codes = nullptr;  // scratch (kFeatureBlock, code_stride), 64-byte aligned
  int64_t code_stride = 0;       // bytes: 4 * quads rounded up to 64
  float max_bias = 0.0f;         // out
  bool usable = true;            // out
};

// What screening knows of a row of hidden states. Screened scores are in units of the row's code step.
struct RowScreen {
  float inverse_step = 1.0f;
  float coefficient = 0.0f;  // times a feature's margin: bound of the error of its screened score
  int32_t code_sum = 0;
  bool usable = false;  // false: not finite, or too large or small; all its scores are computed exactly
};

// Some rows against features [begin, end) of the dictionary.
struct EncodeTask {
  Matrix x;  // the rows of this task
  Matrix weight;
  Vector bias;
  const float* shift = nullptr;        // (d) float32 or absent
  const PackedView* packed = nullptr;  // absent: every score is computed exactly
  int64_t feature_begin = 0;           // a multiple of kFeatureBlock
  int64_t feature_end = 0;
  float* x_rows = nullptr;       // scratch (rows, d)
  int8_t* x_codes = nullptr;     // scratch (rows, 4 * quads)
  RowScreen* screens = nullptr;  // scratch (rows)
  float* uppers = nullptr;       // scratch (kMaxRowTile, range_features(d))
};
constexpr int64_t kMaxRowTile = 8;

// Vectors of group maxima (see selection-inl.h) for a top-k sweep: four groups to a selected feature.
constexpr int64_t kMaxGroups = 2048;
static inline int64_t group_count(int64_t k) {
  int64_t groups = 256;
  while (groups < 4 * k && groups < kMaxGroups) groups *= 2;
  return groups;
}

// Candidates of one row during a top-k sweep, in ascending order of feature: the first `scored` with their scores, at
// most k of them after a cut; the others, pending, with their uppers.
struct TopKCandidates {
  float* values = nullptr;       // (rows, capacity)
  uint32_t* features = nullptr;  // (rows, capacity)
  int64_t* counts = nullptr;     // (rows)
  int64_t* scored = nullptr;     // (rows)
  float* bounds = nullptr;       // (rows) a lower bound of the k-th best, in units of the row's screen
  float* maxima = nullptr;       // (rows, group_count(k)) of the uppers seen so far
  float* reached = nullptr;      // (rows) a value that k of those maxima reach, or -infinity
  int64_t capacity = 0;
  int64_t k = 0;
  bool sorted = true;       // leave them in descending order; otherwise in ascending order of feature
  int32_t* keys = nullptr;  // (capacity) scratch
};

// Pending candidates at which a row's are scored, unless the sweep is over before.
static inline int64_t pending_limit(int64_t k) { return 8 * k + 1024; }

// Room that the candidates of a row need: those kept, those pending, a range of newcomers, a vector's overhang.
static inline int64_t candidate_capacity(int64_t k, int64_t d) {
  return (k + pending_limit(k) + range_features(d) + 31) / 16 * 16;
}

// Sorts pairs in descending order of value, ties by smallest feature, NaN first.
void sort_candidates(float* values, uint32_t* features, int64_t count);

// Entries found by a threshold sweep: range of features by range, in each row by row, in ascending order of feature.
// Grows as needed.
struct ThresholdLog {
  uint32_t* features = nullptr;
  float* values = nullptr;
  int64_t count = 0;
  int64_t capacity = 0;
  int64_t* ends = nullptr;  // scratch (ranges, rows): where the entries of a range and row end
  int64_t ranges = 0;
};

// Makes room for `extra` more entries and a vector's overhang. Throws std::bad_alloc.
void grow_log(ThresholdLog& log, int64_t extra);

struct TopKTask {
  EncodeTask encode;
  TopKCandidates candidates;
  const int64_t* exclude_offsets = nullptr;  // (rows + 1) into exclude_ids, ids ascending within a row
  const int64_t* exclude_ids = nullptr;
  int64_t* exclude_cursor = nullptr;  // (rows) scratch
  uint32_t* positions = nullptr;      // scratch (capacity), as the next three
  uint32_t* features = nullptr;
  float* scores = nullptr;
  float* exact = nullptr;
};

struct ThresholdTask {
  EncodeTask encode;
  const float* thresholds = nullptr;  // (n) float32, rounded up to kFeatureBlock
  uint32_t* features = nullptr;       // scratch (range_features(d) + 16)
  float* values = nullptr;            // scratch (range_features(d) + 16)
  ThresholdLog* log = nullptr;
};

// Exact scores of some rows for a list of features.
struct FeatureListTask {
  EncodeTask encode;
  const uint32_t* features = nullptr;  // (count)
  int64_t count = 0;
  float* out = nullptr;  // (rows, count)
};

// Exact scores of some rows for the features of a steering plan, its slots, each slot's beside each other.
struct SlotScoresTask {
  Matrix x;  // the rows of this task, unit column stride
  const float* shift = nullptr;
  const float* weight = nullptr;      // (slots, d)
  const float* biases = nullptr;      // (slots) or absent
  const float* thresholds = nullptr;  // (slots) or absent: scores that do not exceed theirs become 0
  int64_t slots = 0;
  float* x_rows = nullptr;  // scratch (kMaxLanes, d)
  float* out = nullptr;     // (slots, slot_stride(rows)); what lies beyond the rows has no meaning
};
constexpr int64_t kMaxLanes = 16;  // of the widest tier
static inline int64_t slot_stride(int64_t rows) { return (rows + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// Which rows have k features that score above `best` for certain: no feature that scores `best` or less is selected.
struct OutscoredTask {
  EncodeTask encode;            // with packed weights, all features
  const float* best = nullptr;  // (rows)
  int64_t k = 0;
  bool* outscored = nullptr;  // out (rows); "false" is no statement
  uint32_t* rows = nullptr;   // scratch (rows), as the next two
  int64_t* counts = nullptr;
  float* bounds = nullptr;
};

// Edits of some rows with the same values: what the activations become.
struct EditTask {
  int64_t rows = 0;
  int64_t stride = 0;              // of a slot's activations
  float* activations = nullptr;    // (slots, stride), in place
  int64_t n_edits = 0;             // applied in order
  const int64_t* slots = nullptr;  // (n_edits), below 0: no slot's
  const int64_t* ops = nullptr;    // (n_edits), EditOp
  const float* values = nullptr;   // (n_edits)
};

// out = x + sum_s (after[s] - before[s]) weight[s] + offset. Rows that neither change are copied bit for bit.
struct ChangesTask {
  Matrix x;  // unit column stride, as out
  Matrix out;
  int64_t slots = 0;
  int64_t stride = 0;
  const float* before = nullptr;  // (slots, stride)
  float* after = nullptr;         // (slots, stride); overwritten with the differences
  const float* weight = nullptr;  // (slots, d)
  const float* offset = nullptr;  // (d) or absent
  bool offset_changes = false;    // whether rows are to have it added where no slot changes
  uint32_t* changed = nullptr;    // scratch (slots / 32 rounded up, stride)
  bool weight_is_finite = false;  // no NaN or infinity in it, so that a slot that does not change adds 0
};

struct DecodeTask {
  const int64_t* begins = nullptr;  // (rows), absolute: the entries of row r are [begins[r], ends[r])
  const int64_t* ends = nullptr;
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

struct PanelTask {
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
  void (*pack_blocks)(PackTask&);
  // Leaves the best (at most k) candidates of every row.
  void (*encode_topk)(TopKTask&);
  void (*encode_threshold)(ThresholdTask&);
  void (*encode_features)(FeatureListTask&);
  void (*score_slots)(const SlotScoresTask&);
  void (*find_outscored)(OutscoredTask&);
  void (*edit_slots)(const EditTask&);
  void (*add_changes)(const ChangesTask&);
  void (*decode_rows)(const DecodeTask&);
  void (*dot_rows)(const DotTask&);
  void (*sum_groups)(const GroupedSumTask&);
  void (*pack_panel)(const PanelTask&);
  void (*step_rows)(StepRowsTask&);
  void (*step_groups)(const StepGroupsTask&);
  void (*adam_rows)(const AdamTask&);
};

const Kernels& active_kernels();

}  // namespace saerec
