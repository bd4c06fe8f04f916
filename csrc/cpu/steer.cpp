#include "saerec/steer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "convert.h"
#include "encode_rows.h"
#include "parallel.h"
#include "scratch.h"

namespace saerec {
namespace {

char* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<char*>(matrix.data) + row * matrix.row_stride * dtype_size(matrix.dtype);
}

Vector row_vector(const Matrix& matrix, int64_t row) {
  return {row_of(matrix, row), matrix.dtype, matrix.cols, matrix.col_stride};
}

void append_widened(std::vector<float>& values, const Vector& vector) {
  const std::vector<float> more = widened(vector);
  values.insert(values.end(), more.begin(), more.end());
}

const float* data_or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

// What a plan adds to every steered row of a sequence: the features that are only added to, and its directions.
struct Offset {
  bool changes = false;       // whether rows change at all by it
  std::vector<float> vector;  // (d), with the shift of the decoder where the plan reconstructs; empty for nothing

  const float* data() const { return data_or_null(vector); }
};

// A plan in terms of its distinct features ("slots", ascending) and of what it adds whatever the activations are.
struct CompiledPlan {
  std::vector<int64_t> features;       // (slots) features whose change depends on their activation
  std::vector<int64_t> edit_slots;     // (n_edits), -1 for edits of `added`
  std::vector<float> slot_threshold;   // (slots), empty for top-k, as what follows is for plans that reconstruct
  std::vector<float> slot_bias;        // (slots), or empty for none
  std::vector<float> slot_weight_enc;  // (slots, d), as the next side by side for the kernels
  std::vector<float> slot_weight_dec;
  std::array<uint64_t, 16> slot_bits{};  // a bit for every slot, at its feature modulo the number of bits
  std::vector<int64_t> added;            // features that are only added to, and directions (below 0)
  std::vector<int64_t> edit_added;       // (n_edits), place in `added`, -1 for edits of slots
  bool slot_weight_dec_is_finite = false;
  bool encodes_all = false;
  Offset offset;  // where all sequences have the same

  int64_t slots() const { return static_cast<int64_t>(features.size()); }

  static uint64_t slot_bit(int64_t feature) { return uint64_t{1} << (feature & 63); }
  uint64_t& slot_word(int64_t feature) { return slot_bits[static_cast<std::size_t>(feature >> 6 & 15)]; }

  // As slot_of, for the entries of an encoded row, most of which are no slots: a look at one bit tells.
  int64_t slot_of_entry(int64_t feature) const {
    const uint64_t word = slot_bits[static_cast<std::size_t>(feature >> 6 & 15)];
    return (word & slot_bit(feature)) == 0 ? -1 : slot_of(feature);
  }

  int64_t slot_of(int64_t feature) const {
    const auto place = std::lower_bound(features.begin(), features.end(), feature);
    return place != features.end() && *place == feature ? place - features.begin() : -1;
  }
};

bool has_same_offset(const CompiledPlan& compiled, const SteerPlan& plan) {
  return compiled.added.empty() || plan.values_stride == 0;
}

// shift: of the decoder, (d) or null.
void set_offset(Offset& offset, const SteerParams& params, const CompiledPlan& compiled, const SteerPlan& plan,
                const float* shift, int64_t sequence) {
  const int64_t d = params.weight_dec.cols;
  if (!plan.reconstruct) shift = nullptr;
  offset.changes = false;
  offset.vector.clear();
  if (compiled.added.empty()) {
    if (shift != nullptr) offset.vector.assign(shift, shift + d);
    return;
  }
  // All edits of a feature are one change, which may be none.
  std::vector<float> sums(compiled.added.size(), 0.0f);
  for (int64_t i = 0; i < plan.n_edits; ++i) {
    if (compiled.edit_added[i] >= 0) sums[compiled.edit_added[i]] += plan.values[sequence * plan.values_stride + i];
  }
  offset.vector.assign(static_cast<std::size_t>(d), 0.0f);
  for (std::size_t i = 0; i < sums.size(); ++i) {
    if (sums[i] == 0.0f) continue;
    offset.changes = true;
    const int64_t feature = compiled.added[i];
    const Vector row = feature < 0 ? Vector{plan.directions + (-1 - feature) * d, DType::kFloat32, d, 1}
                                   : row_vector(params.weight_dec, feature);
    for (int64_t j = 0; j < d; ++j) offset.vector[j] += sums[i] * element_at(row, j);
  }
  if (shift != nullptr) {
    for (int64_t j = 0; j < d; ++j) offset.vector[j] += shift[j];
  } else if (!offset.changes) {
    offset.vector.clear();
  }
}

CompiledPlan compile(const SteerParams& params, const SteerPlan& plan, const float* shift) {
  CompiledPlan compiled;
  for (int64_t i = 0; i < plan.n_edits; ++i) {
    if (plan.features[i] >= params.weight_enc.rows) {
      throw std::invalid_argument("plan: feature ids go from 0 to " + std::to_string(params.weight_enc.rows - 1) +
                                  ", got " + std::to_string(plan.features[i]));
    }
  }
  for (int64_t i = 0; i < plan.n_edits; ++i) {
    const bool adds = plan.ops[i] == static_cast<int64_t>(EditOp::kAdd);
    if (plan.features[i] >= 0 && (plan.reconstruct || !adds)) compiled.features.push_back(plan.features[i]);
  }
  std::sort(compiled.features.begin(), compiled.features.end());
  compiled.features.erase(std::unique(compiled.features.begin(), compiled.features.end()), compiled.features.end());
  for (const int64_t feature : compiled.features) compiled.slot_word(feature) |= CompiledPlan::slot_bit(feature);
  for (int64_t i = 0; i < plan.n_edits; ++i) {
    compiled.edit_slots.push_back(plan.features[i] < 0 ? -1 : compiled.slot_of(plan.features[i]));
    if (compiled.edit_slots.back() < 0) compiled.added.push_back(plan.features[i]);
  }
  std::sort(compiled.added.begin(), compiled.added.end());
  compiled.added.erase(std::unique(compiled.added.begin(), compiled.added.end()), compiled.added.end());
  for (int64_t i = 0; i < plan.n_edits; ++i) {
    const auto place = std::lower_bound(compiled.added.begin(), compiled.added.end(), plan.features[i]);
    compiled.edit_added.push_back(compiled.edit_slots[i] < 0 ? place - compiled.added.begin() : -1);
  }
  if (!plan.reconstruct) {
    for (const int64_t feature : compiled.features) {
      append_widened(compiled.slot_weight_enc, row_vector(params.weight_enc, feature));
      append_widened(compiled.slot_weight_dec, row_vector(params.weight_dec, feature));
      if (params.bias.data != nullptr) compiled.slot_bias.push_back(element_at(params.bias, feature));
      if (params.k > 0) continue;
      compiled.slot_threshold.push_back(element_at(params.thresholds, params.thresholds.size == 1 ? 0 : feature));
    }
  }
  compiled.slot_weight_dec_is_finite = std::all_of(compiled.slot_weight_dec.begin(), compiled.slot_weight_dec.end(),
                                                   [](float w) { return std::isfinite(w); });
  compiled.encodes_all = plan.reconstruct || (params.k > 0 && compiled.slots() > 0);
  if (has_same_offset(compiled, plan)) set_offset(compiled.offset, params, compiled, plan, shift, 0);
  return compiled;
}

// What one thread holds while steering a chunk.
struct SteerScratch {
  ScratchBuffer x, out;               // (rows, d) gathered, where the rows do not lie side by side
  ScratchBuffer activations, edited;  // (slots, slot_stride(rows))
  ScratchBuffer x_tile, changed;      // of the kernels
  ScratchBuffer best, outscored, undecided_x;
  std::vector<int64_t> undecided;
  ScratchBuffer offsets, features, values;  // of a' as sparse rows
};

SteerScratch& thread_steer_scratch() {
  thread_local SteerScratch scratch;
  return scratch;
}

// Bit for bit: neither rounding nor -0 + 0 may touch a row that is not steered.
void copy_row(const Matrix& from, int64_t from_row, const Matrix& to, int64_t to_row) {
  const int64_t size = dtype_size(from.dtype);
  const char* in = row_of(from, from_row);
  char* out = row_of(to, to_row);
  if (from.col_stride == 1) {
    std::memcpy(out, in, static_cast<std::size_t>(from.cols * size));
    return;
  }
  for (int64_t j = 0; j < from.cols; ++j) {
    std::memcpy(out + j * size, in + j * from.col_stride * size, static_cast<std::size_t>(size));
  }
}

// The rows of one plan: [0, count) of x where `rows` is empty, else those listed, ascending.
struct Job {
  const CompiledPlan* compiled = nullptr;
  const SteerPlan* plan = nullptr;
  int64_t count = 0;
  std::vector<int64_t> rows;

  int64_t row(int64_t i) const { return rows.empty() ? i : rows[static_cast<std::size_t>(i)]; }
};

class ChunkSteerer {
 public:
  ChunkSteerer(const SteerParams& params, const Job& job, const EncoderWeights& weights, const float* thresholds,
               int64_t first, int64_t rows)
      : params_(params),
        compiled_(*job.compiled),
        plan_(*job.plan),
        job_(job),
        weights_(weights),
        thresholds_(thresholds),
        first_(first),
        scratch_(thread_steer_scratch()),
        stride_(slot_stride(rows)) {
    const int64_t begin = job.row(first);
    if (params.x.col_stride == 1 && job.row(first + rows - 1) == begin + rows - 1) {
      x_ = row_range(params.x, begin, rows);
      out_ = row_range(params.out, begin, rows);
      return;
    }
    gathered_ = true;
    const int64_t d = params.x.cols, bytes = rows * d * dtype_size(params.x.dtype);
    x_ = {scratch_.x.get<char>(bytes), params.x.dtype, rows, d, d, 1};
    out_ = {scratch_.out.get<char>(bytes), params.x.dtype, rows, d, d, 1};
    for (int64_t r = 0; r < rows; ++r) copy_row(params.x, job.row(first + r), x_, r);
  }

  // Returns the largest relative change of a row, 0 where the plan has no limit.
  float run() {
    activations_ = scratch_.activations.get<float>(compiled_.slots() * stride_);
    if (plan_.reconstruct) {
      encode_all();
    } else {
      encode_edited();
    }
    for (int64_t begin = 0; begin < x_.rows;) {
      const int64_t end = plan_.values_stride == 0 ? x_.rows : end_of_sequence(begin);
      const bool same = has_same_offset(compiled_, plan_);
      if (!same) set_offset(own_offset_, params_, compiled_, plan_, weights_.shift, sequence(begin));
      const Offset& offset = same ? compiled_.offset : own_offset_;
      if (plan_.reconstruct) {
        reconstruct(offset, begin, end);
      } else {
        change(offset, begin, end);
      }
      begin = end;
    }
    const float largest = std::isinf(plan_.max_relative_norm) ? 0.0f : limit_changes();
    if (gathered_) {
      for (int64_t r = 0; r < x_.rows; ++r) copy_row(out_, r, params_.out, job_.row(first_ + r));
    }
    return largest;
  }

 private:
  int64_t sequence(int64_t row) const { return job_.row(first_ + row) / params_.length; }

  int64_t end_of_sequence(int64_t row) const {
    const int64_t own = sequence(row);
    while (row < x_.rows && sequence(row) == own) ++row;
    return row;
  }

  // Activations of the edited features only.
  void encode_edited() {
    if (compiled_.slots() == 0) return;
    SlotScoresTask task;
    task.x = x_;
    task.shift = weights_.shift;
    task.weight = compiled_.slot_weight_enc.data();
    task.biases = data_or_null(compiled_.slot_bias);
    task.thresholds = data_or_null(compiled_.slot_threshold);
    task.slots = compiled_.slots();
    task.x_rows = scratch_.x_tile.get<float>(kMaxLanes * x_.cols);
    task.out = activations_;
    active_kernels().score_slots(task);
    if (params_.k > 0) select();
  }

  // From scores to what is left of them by the top-k, which is looked for only in rows that may have selected a slot.
  void select() {
    const int64_t rows = x_.rows;
    float* best = scratch_.best.get<float>(rows);
    std::copy_n(activations_, rows, best);
    for (int64_t slot = 1; slot < compiled_.slots(); ++slot) {
      const float* scores = activations_ + slot * stride_;
      // A NaN stays.
      for (int64_t r = 0; r < rows; ++r) best[r] = scores[r] <= best[r] || best[r] != best[r] ? best[r] : scores[r];
    }
    bool* outscored = scratch_.outscored.get<bool>(rows);
    // Scores of 0 and less are 0 after the selection too.
    for (int64_t r = 0; r < rows; ++r) outscored[r] = best[r] <= 0.0f;
    // With more slots most rows have one that is selected, and the search would be in vain.
    if (weights_.packed.codes != nullptr && compiled_.slots() * params_.k < params_.weight_enc.rows) {
      find_outscored_rows(thread_encoder_scratch(), x_, weights_, params_.k, best, outscored);
    }
    std::fill_n(activations_, compiled_.slots() * stride_, 0.0f);
    std::vector<int64_t>& undecided = scratch_.undecided;
    undecided.clear();
    for (int64_t r = 0; r < rows; ++r) {
      if (!outscored[r]) undecided.push_back(r);
    }
    if (undecided.empty()) return;
    Matrix x = x_;
    x.rows = static_cast<int64_t>(undecided.size());
    if (x.rows < rows) {
      x.data = scratch_.undecided_x.get<char>(x.rows * x.cols * dtype_size(x.dtype));
      x.row_stride = x.cols;
      for (int64_t i = 0; i < x.rows; ++i) copy_row(x_, undecided[static_cast<std::size_t>(i)], x, i);
    }
    const TopKCandidates selected = topk_of(x);
    for (int64_t i = 0; i < x.rows; ++i) {
      const float* values = selected.values + i * selected.capacity;
      const uint32_t* features = selected.features + i * selected.capacity;
      for (int64_t j = 0; j < selected.counts[i]; ++j) {
        const int64_t slot = compiled_.slot_of_entry(features[j]);
        if (slot < 0) continue;
        activations_[slot * stride_ + undecided[static_cast<std::size_t>(i)]] = values[j] < 0.0f ? 0.0f : values[j];
      }
    }
  }

  // a' of every row as sparse entries: the unedited features, then the edited ones.
  void encode_all() {
    std::fill_n(activations_, compiled_.slots() * stride_, 0.0f);
    if (params_.k > 0) {
      const TopKCandidates selected = topk_of(x_);
      make_room(x_.rows * selected.k);
      for (int64_t r = 0; r < x_.rows; ++r) {
        float* values = selected.values + r * selected.capacity;
        for (int64_t i = 0; i < selected.counts[r]; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];
        take_row(r, selected.features + r * selected.capacity, values, selected.counts[r]);
      }
      return;
    }
    EncoderScratch& scratch = thread_encoder_scratch();
    const ThresholdLog& log = encode_threshold_chunk(scratch, x_, weights_, 0, params_.weight_enc.rows, thresholds_);
    const GroupedLog active = group_by_row(scratch, log, x_.rows);
    make_room(log.count);
    for (int64_t r = 0; r < x_.rows; ++r) {
      const int64_t begin = active.offsets[r];
      take_row(r, active.features + begin, active.values + begin, active.offsets[r + 1] - begin);
    }
  }

  // The k best of each row, in ascending order of feature.
  TopKCandidates topk_of(const Matrix& x) const {
    return encode_topk_chunk(thread_encoder_scratch(), x, weights_, 0, params_.weight_enc.rows, params_.k, false,
                             nullptr, nullptr);
  }

  // For so many entries before any is edited.
  void make_room(int64_t entries) {
    entries += compiled_.slots() * x_.rows;
    offsets_ = scratch_.offsets.get<int64_t>(x_.rows + 1);
    features_ = scratch_.features.get<int32_t>(entries);
    values_ = scratch_.values.get<float>(entries);
    offsets_[0] = 0;
  }

  // After the rows before it: its entries that are no slots, then all slots, whose values follow once they are edited.
  void take_row(int64_t row, const uint32_t* features, const float* values, int64_t count) {
    int64_t end = offsets_[row];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = compiled_.slot_of_entry(features[i]);
      if (slot >= 0) {
        activations_[slot * stride_ + row] = values[i];
        continue;
      }
      // They fit int32: a dictionary of 2^31 rows would not fit memory.
      features_[end] = static_cast<int32_t>(features[i]);
      values_[end++] = values[i];
    }
    for (const int64_t feature : compiled_.features) features_[end++] = static_cast<int32_t>(feature);
    offsets_[row + 1] = end;
  }

  // Edits rows [begin, end), of one sequence where each has values of its own.
  void edit(float* activations, int64_t begin, int64_t end) const {
    EditTask task;
    task.rows = end - begin;
    task.stride = stride_;
    task.activations = activations + begin;
    task.n_edits = plan_.n_edits;
    task.slots = compiled_.edit_slots.data();
    task.ops = plan_.ops;
    task.values = plan_.values + (plan_.values_stride == 0 ? 0 : sequence(begin) * plan_.values_stride);
    active_kernels().edit_slots(task);
  }

  void change(const Offset& offset, int64_t begin, int64_t end) {
    const int64_t slots = compiled_.slots();
    float* edited = scratch_.edited.get<float>(slots * stride_);
    for (int64_t slot = 0; slot < slots; ++slot) {
      std::copy_n(activations_ + slot * stride_ + begin, end - begin, edited + slot * stride_ + begin);
    }
    edit(edited, begin, end);
    ChangesTask task;
    task.x = row_range(x_, begin, end - begin);
    task.out = row_range(out_, begin, end - begin);
    task.slots = slots;
    task.stride = stride_;
    task.before = activations_ + begin;
    task.after = edited + begin;
    task.weight = compiled_.slot_weight_dec.data();
    task.offset = offset.data();
    task.offset_changes = offset.changes;
    task.changed = scratch_.changed.get<uint32_t>((slots + 31) / 32 * stride_);
    task.weight_is_finite = compiled_.slot_weight_dec_is_finite;
    active_kernels().add_changes(task);
  }

  void reconstruct(const Offset& offset, int64_t begin, int64_t end) {
    edit(activations_, begin, end);
    for (int64_t r = begin; r < end; ++r) {
      float* values = values_ + offsets_[r + 1] - compiled_.slots();
      for (int64_t slot = 0; slot < compiled_.slots(); ++slot) values[slot] = activations_[slot * stride_ + r];
    }
    decode(offset, begin, end);
  }

  void decode(const Offset& offset, int64_t begin, int64_t end) const {
    DecodeTask task;
    task.begins = offsets_ + begin;
    task.ends = task.begins + 1;
    task.indices = {features_, IndexType::kInt32};
    task.values = {values_, DType::kFloat32, offsets_[x_.rows], 1};
    task.weight = params_.weight_dec;
    task.bias = offset.data();
    task.out = row_range(out_, begin, end - begin);
    active_kernels().decode_rows(task);
  }

  float limit_changes() const {
    float largest = 0.0f;
    const float limit = plan_.max_relative_norm;
    for (int64_t r = 0; r < x_.rows; ++r) {
      const Vector before = {row_of(x_, r), x_.dtype, x_.cols, x_.col_stride};
      const Vector after = {row_of(out_, r), out_.dtype, out_.cols, 1};
      double norm = 0.0, change_norm = 0.0;
      for (int64_t j = 0; j < x_.cols; ++j) {
        const double value = element_at(before, j), change = element_at(after, j) - value;
        norm += value * value;
        change_norm += change * change;
      }
      if (change_norm == 0.0) continue;
      const float relative = static_cast<float>(std::sqrt(change_norm / norm));
      // A NaN stays: neither largest nor clipped.
      if (relative > largest) largest = relative;
      if (!plan_.clip || !(relative > limit)) continue;
      const float scale = limit / relative;
      for (int64_t j = 0; j < x_.cols; ++j) {
        const float value = element_at(before, j);
        store_element(out_.dtype, row_of(out_, r), j, value + scale * (element_at(after, j) - value));
      }
    }
    return largest;
  }

  const SteerParams& params_;
  const CompiledPlan& compiled_;
  const SteerPlan& plan_;
  const Job& job_;
  const EncoderWeights& weights_;
  const float* thresholds_;
  int64_t first_;
  SteerScratch& scratch_;
  Offset own_offset_;
  int64_t stride_;
  float* activations_ = nullptr;  // (slots, stride_)
  // a' of the chunk's rows as sparse entries, in scratch: row r holds [offsets_[r], offsets_[r + 1])
  int64_t* offsets_ = nullptr;
  int32_t* features_ = nullptr;
  float* values_ = nullptr;
  bool gathered_ = false;
  Matrix x_;
  Matrix out_;
};

// The rows each plan changes; plan_of_row gets the plan of every row, -1 for none.
std::vector<Job> jobs_of(const SteerParams& params, const std::vector<CompiledPlan>& plans,
                         std::vector<int32_t>& plan_of_row) {
  std::vector<Job> jobs(plans.size());
  for (std::size_t p = 0; p < plans.size(); ++p) {
    jobs[p].compiled = &plans[p];
    jobs[p].plan = &params.plans[p];
  }
  const int64_t rows = params.x.rows, length = params.length;
  const bool* valid = params.valid;
  if (valid != nullptr && std::memchr(valid, 0, static_cast<std::size_t>(rows)) == nullptr) valid = nullptr;
  if (params.sequence_plans == nullptr && valid == nullptr && params.plans[0].positions == Positions::kAll) {
    jobs[0].count = rows;
    return jobs;
  }
  plan_of_row.assign(static_cast<std::size_t>(rows), -1);
  const auto take = [&](int32_t plan, int64_t row) {
    plan_of_row[static_cast<std::size_t>(row)] = plan;
    jobs[static_cast<std::size_t>(plan)].rows.push_back(row);
  };
  for (int64_t begin = 0; begin < rows; begin += length) {
    const int32_t plan = params.sequence_plans == nullptr ? 0 : params.sequence_plans[begin / length];
    if (plan < 0) continue;
    const bool last = params.plans[plan].positions == Positions::kLast;
    int64_t end = begin + length;
    if (last) {
      while (end > begin && valid != nullptr && !valid[end - 1]) --end;
      if (end > begin) take(plan, end - 1);
      continue;
    }
    for (int64_t row = begin; row < end; ++row) {
      if (valid == nullptr || valid[row]) take(plan, row);
    }
  }
  for (Job& job : jobs) job.count = static_cast<int64_t>(job.rows.size());
  return jobs;
}

// Runs of them at once where they lie side by side.
void copy_rows_without_plan(const SteerParams& params, const std::vector<int32_t>& plan_of_row) {
  const int64_t rows = static_cast<int64_t>(plan_of_row.size()), d = params.x.cols;
  const bool side_by_side = params.x.col_stride == 1 && params.x.row_stride == d;
  for (int64_t row = 0; row < rows;) {
    int64_t end = row;
    while (end < rows && plan_of_row[static_cast<std::size_t>(end)] < 0) ++end;
    if (side_by_side && end > row) {
      std::memcpy(row_of(params.out, row), row_of(params.x, row),
                  static_cast<std::size_t>((end - row) * d * dtype_size(params.x.dtype)));
    } else {
      for (int64_t r = row; r < end; ++r) copy_row(params.x, r, params.out, r);
    }
    row = end + 1;
  }
}

struct Chunk {
  const Job* job;
  int64_t first;
  int64_t rows;
};

// Of `rows` rows of a plan.
int64_t operations_of(const SteerParams& params, const CompiledPlan& plan, int64_t rows) {
  const int64_t features = plan.encodes_all ? params.weight_enc.rows : 4 * plan.slots() + 4;
  return sweep_operations(rows, features, params.weight_dec.cols);
}

}  // namespace

struct CompiledSteer {
  std::vector<CompiledPlan> plans;
  std::vector<float> shift;       // (d), or empty for none
  std::vector<float> thresholds;  // (n), empty where no plan compares all features with theirs
};

std::shared_ptr<const CompiledSteer> compile_steer(const SteerParams& params) {
  auto compiled = std::make_shared<CompiledSteer>();
  compiled->shift = widened(params.shift);
  bool needs_thresholds = false;
  for (int64_t p = 0; p < params.n_plans; ++p) {
    compiled->plans.push_back(compile(params, params.plans[p], data_or_null(compiled->shift)));
    needs_thresholds = needs_thresholds || (compiled->plans.back().encodes_all && params.k == 0);
  }
  if (needs_thresholds) compiled->thresholds = widened_thresholds(params.thresholds, params.weight_enc.rows);
  return compiled;
}

const float* vector_to_add(const SteerPlan* plans, const CompiledSteer& compiled) {
  if (compiled.plans.size() != 1) return nullptr;
  const SteerPlan& plan = plans[0];
  const CompiledPlan& only = compiled.plans[0];
  const bool adds = !plan.reconstruct && only.slots() == 0 && has_same_offset(only, plan) && only.offset.changes;
  return adds && std::isinf(plan.max_relative_norm) ? only.offset.data() : nullptr;
}

int64_t steer_operations(const SteerParams& params, const CompiledSteer& compiled) {
  int64_t most = 0;
  for (const CompiledPlan& plan : compiled.plans) most = std::max(most, operations_of(params, plan, params.x.rows));
  return most;
}

float steer(const SteerParams& params) { return steer(params, *compile_steer(params)); }

float steer(const SteerParams& params, const CompiledSteer& compiled) {
  const int64_t rows = params.x.rows, d = params.x.cols;
  if (rows == 0 || d == 0) return 0.0f;
  std::vector<int32_t> plan_of_row;
  const std::vector<Job> jobs = jobs_of(params, compiled.plans, plan_of_row);

  int64_t encoded_rows = 0, operations = 0;
  for (const Job& job : jobs) {
    if (job.compiled->encodes_all) encoded_rows += job.count;
    operations += operations_of(params, *job.compiled, job.count);
  }
  const EncoderWeights weights =
      prepare_weights(params.weight_enc, params.bias, compiled.shift, {params.packed, params.packed_bytes},
                      encoded_rows, params.k, params.threads);

  const int threads = useful_threads(params.threads, operations);
  std::vector<Chunk> chunks;
  for (const Job& job : jobs) {
    const int64_t step = partition_sweep(job.count, params.weight_enc.rows, d, threads, false).chunk_rows;
    for (int64_t first = 0; first < job.count; first += step) {
      chunks.push_back({&job, first, std::min(step, job.count - first)});
    }
  }
  std::vector<float> largest(chunks.size(), 0.0f);
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t i) {
    const Chunk& chunk = chunks[static_cast<std::size_t>(i)];
    largest[static_cast<std::size_t>(i)] =
        ChunkSteerer(params, *chunk.job, weights, compiled.thresholds.data(), chunk.first, chunk.rows).run();
  });
  copy_rows_without_plan(params, plan_of_row);
  return largest.empty() ? 0.0f : *std::max_element(largest.begin(), largest.end());
}

}  // namespace saerec
