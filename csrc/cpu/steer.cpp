#include "saerec/steer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "convert.h"
#include "encode_rows.h"
#include "parallel.h"

namespace saerec {
namespace {

// As torch.maximum and torch.minimum: a NaN on either side wins.
float nan_maximum(float a, float b) { return std::isnan(a) || a > b ? a : b; }
float nan_minimum(float a, float b) { return std::isnan(a) || a < b ? a : b; }

float apply_edit(EditOp op, float activation, float value) {
  switch (op) {
    case EditOp::kSet:
      return value;
    case EditOp::kAdd:
      return activation + value;
    case EditOp::kScale:
      return activation * value;
    case EditOp::kClampMin:
      return nan_maximum(activation, value);
    case EditOp::kClampMax:
      return nan_minimum(activation, value);
  }
  return activation;
}

// The plan in terms of its distinct features ("slots", ascending).
struct CompiledPlan {
  std::vector<int64_t> features;      // (slots)
  std::vector<uint32_t> feature_ids;  // (slots), the same
  std::vector<int64_t> edit_slots;    // (n_edits)
  std::vector<float> slot_threshold;  // (slots), empty for top-k
  std::vector<char> adds_only;        // (slots) every edit adds, so the change does not depend on the activation
  bool needs_activations = false;     // not all slots are adds_only

  int64_t slots() const { return static_cast<int64_t>(features.size()); }

  int64_t slot_of(int64_t feature) const {
    const auto place = std::lower_bound(features.begin(), features.end(), feature);
    return place != features.end() && *place == feature ? place - features.begin() : -1;
  }
};

CompiledPlan compile(const SteerParams& params) {
  CompiledPlan plan;
  plan.features.assign(params.edit_features, params.edit_features + params.n_edits);
  std::sort(plan.features.begin(), plan.features.end());
  plan.features.erase(std::unique(plan.features.begin(), plan.features.end()), plan.features.end());
  plan.feature_ids.assign(plan.features.begin(), plan.features.end());
  plan.adds_only.assign(plan.features.size(), 1);
  for (int64_t i = 0; i < params.n_edits; ++i) {
    const int64_t slot = plan.slot_of(params.edit_features[i]);
    plan.edit_slots.push_back(slot);
    if (params.edit_ops[i] != static_cast<int64_t>(EditOp::kAdd)) {
      plan.adds_only[slot] = 0;
      plan.needs_activations = true;
    }
  }
  if (params.k == 0) {
    for (const int64_t feature : plan.features) {
      plan.slot_threshold.push_back(element_at(params.thresholds, params.thresholds.size == 1 ? 0 : feature));
    }
  }
  return plan;
}

// What one thread holds while steering a chunk.
struct SteerScratch {
  std::vector<float> activations;  // (rows, slots) before the edits
  std::vector<int64_t> offsets;
  std::vector<int64_t> features;
  std::vector<float> values;
};

SteerScratch& thread_steer_scratch() {
  thread_local SteerScratch scratch;
  return scratch;
}

class ChunkSteerer {
 public:
  ChunkSteerer(const SteerParams& params, const CompiledPlan& plan, const EncoderWeights& weights,
               const float* thresholds, int64_t first, int64_t rows)
      : params_(params),
        plan_(plan),
        weights_(weights),
        thresholds_(thresholds),
        first_(first),
        x_(row_range(params.x, first, rows)),
        out_(row_range(params.out, first, rows)) {}

  void run() {
    SteerScratch& scratch = thread_steer_scratch();
    scratch.offsets.assign(1, 0);
    scratch.features.clear();
    scratch.values.clear();
    if (params_.reconstruct) {
      encode_all(scratch);
    } else {
      encode_edited(scratch);
      for (int64_t r = 0; r < x_.rows; ++r) {
        if (steered(r)) emit_changes(scratch, r);
        end_row(scratch);
      }
    }
    decode(scratch);
    for (int64_t r = 0; r < x_.rows; ++r) {
      const bool unchanged = !params_.reconstruct && scratch.offsets[r] == scratch.offsets[r + 1];
      if (unchanged || !steered(r)) copy_row(r);
    }
  }

 private:
  bool steered(int64_t row) const { return params_.row_mask == nullptr || params_.row_mask[first_ + row]; }

  float edit_value(int64_t row, int64_t edit) const {
    return params_.edit_values[(first_ + row) * params_.edit_values_row_stride + edit];
  }

  static void emit(SteerScratch& scratch, int64_t feature, float value) {
    scratch.features.push_back(feature);
    scratch.values.push_back(value);
  }

  static void end_row(SteerScratch& scratch) {
    scratch.offsets.push_back(static_cast<int64_t>(scratch.features.size()));
  }

  // Activations of the edited features only; 0 for those only added to, whose activation would cancel (were it finite).
  void encode_edited(SteerScratch& scratch) {
    const int64_t slots = plan_.slots();
    scratch.activations.assign(static_cast<std::size_t>(x_.rows * slots), 0.0f);
    if (!plan_.needs_activations) return;
    if (params_.k == 0) {
      encode_feature_list(thread_encoder_scratch(), x_, weights_, plan_.feature_ids.data(), slots,
                          scratch.activations.data());
      for (int64_t i = 0; i < x_.rows * slots; ++i) {
        const int64_t slot = i % slots;
        if (plan_.adds_only[slot] || scratch.activations[i] <= plan_.slot_threshold[slot])
          scratch.activations[i] = 0.0f;
      }
      return;
    }
    for_each_topk_entry([&](int64_t row, int64_t feature, float value) {
      const int64_t slot = plan_.slot_of(feature);
      if (slot >= 0 && !plan_.adds_only[slot]) scratch.activations[row * slots + slot] = value;
    });
  }

  // a' of every row as sparse entries: the unedited features, then the edited ones.
  void encode_all(SteerScratch& scratch) {
    const int64_t slots = plan_.slots();
    scratch.activations.assign(static_cast<std::size_t>(x_.rows * slots), 0.0f);
    int64_t current = 0;
    const auto finish_rows_before = [&](int64_t row) {
      for (; current < row; ++current) {
        emit_edited(scratch, current);
        end_row(scratch);
      }
    };
    const auto take = [&](int64_t row, int64_t feature, float value) {
      finish_rows_before(row);
      const int64_t slot = plan_.slot_of(feature);
      if (slot >= 0) {
        scratch.activations[row * slots + slot] = value;
      } else {
        emit(scratch, feature, value);
      }
    };
    if (params_.k > 0) {
      for_each_topk_entry(take);
    } else {
      for_each_threshold_entry(take);
    }
    finish_rows_before(x_.rows);
  }

  template <class Take>
  void for_each_topk_entry(const Take& take) {
    const TopKCandidates candidates = encode_topk_chunk(thread_encoder_scratch(), x_, weights_, 0,
                                                        params_.weight_enc.rows, params_.k, true, nullptr, nullptr);
    for (int64_t r = 0; r < x_.rows; ++r) {
      const float* values = candidates.values + r * candidates.capacity;
      const uint32_t* features = candidates.features + r * candidates.capacity;
      for (int64_t i = 0; i < candidates.counts[r]; ++i) take(r, features[i], values[i] < 0.0f ? 0.0f : values[i]);
    }
  }

  template <class Take>
  void for_each_threshold_entry(const Take& take) {
    const ThresholdLog& log =
        encode_threshold_chunk(thread_encoder_scratch(), x_, weights_, 0, params_.weight_enc.rows, thresholds_);
    const GroupedLog grouped = group_by_row(thread_encoder_scratch(), log, x_.rows);
    for (int64_t r = 0; r < x_.rows; ++r) {
      for (int64_t i = grouped.offsets[r]; i < grouped.offsets[r + 1]; ++i) {
        take(r, grouped.features[i], grouped.values[i]);
      }
    }
  }

  // Applies the edits of a row; edited(slot) is then its a'.
  template <class Use>
  void edit_row(const SteerScratch& scratch, int64_t row, const Use& use) {
    const int64_t slots = plan_.slots();
    const float* before = scratch.activations.data() + row * slots;
    edited_.assign(before, before + slots);
    for (int64_t i = 0; i < params_.n_edits; ++i) {
      float& activation = edited_[plan_.edit_slots[i]];
      activation = apply_edit(static_cast<EditOp>(params_.edit_ops[i]), activation, edit_value(row, i));
    }
    for (int64_t slot = 0; slot < slots; ++slot) use(slot, before[slot], edited_[slot]);
  }

  void emit_changes(SteerScratch& scratch, int64_t row) {
    edit_row(scratch, row, [&](int64_t slot, float before, float after) {
      const float change = after - before;
      if (change != 0.0f) emit(scratch, plan_.features[slot], change);
    });
  }

  void emit_edited(SteerScratch& scratch, int64_t row) {
    edit_row(scratch, row, [&](int64_t slot, float, float after) { emit(scratch, plan_.features[slot], after); });
  }

  void decode(const SteerScratch& scratch) {
    DecodeTask task;
    task.begins = scratch.offsets.data();
    task.ends = task.begins + 1;
    task.indices = {scratch.features.data(), IndexType::kInt64};
    task.values = {scratch.values.data(), DType::kFloat32, static_cast<int64_t>(scratch.values.size()), 1};
    task.weight = params_.weight_dec;
    if (params_.reconstruct) {
      task.bias = weights_.shift;
    } else {
      task.base = x_;
    }
    task.out = out_;
    active_kernels().decode_rows(task);
  }

  // Bit for bit: neither rounding nor -0 + 0 may touch a row that is not steered.
  void copy_row(int64_t row) {
    const int64_t size = dtype_size(x_.dtype);
    const char* in = static_cast<const char*>(x_.data) + row * x_.row_stride * size;
    char* out = static_cast<char*>(out_.data) + row * out_.row_stride * size;
    if (x_.col_stride == 1) {
      std::memcpy(out, in, static_cast<std::size_t>(x_.cols * size));
      return;
    }
    for (int64_t j = 0; j < x_.cols; ++j) {
      std::memcpy(out + j * size, in + j * x_.col_stride * size, static_cast<std::size_t>(size));
    }
  }

  const SteerParams& params_;
  const CompiledPlan& plan_;
  const EncoderWeights& weights_;
  const float* thresholds_;
  int64_t first_;
  Matrix x_;
  Matrix out_;
  std::vector<float> edited_;
};

}  // namespace

void steer(const SteerParams& params) {
  const int64_t rows = params.x.rows, d = params.x.cols;
  if (rows == 0 || d == 0) return;
  const CompiledPlan plan = compile(params);
  const std::vector<float> shift = widened(params.shift);
  const bool encodes_all = params.reconstruct || (params.k > 0 && plan.needs_activations);
  const EncoderWeights weights =
      prepare_weights(params.weight_enc, params.bias, shift, {params.packed, params.packed_bytes},
                      encodes_all ? rows : 0, params.k, params.threads);
  const std::vector<float> thresholds = encodes_all && params.k == 0
                                            ? widened_thresholds(params.thresholds, params.weight_enc.rows)
                                            : std::vector<float>();
  const int64_t swept = encodes_all ? params.weight_enc.rows : plan.slots();
  const SweepPartition partition = partition_sweep(rows, swept, d, params.threads, false);
  parallel_for(partition.chunks, partition.threads, [&](int64_t chunk) {
    const int64_t first = chunk * partition.chunk_rows;
    ChunkSteerer(params, plan, weights, thresholds.data(), first, std::min(partition.chunk_rows, rows - first)).run();
  });
}

}  // namespace saerec
