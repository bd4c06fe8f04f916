// steer: encode, edit and decode a batch of sequences of hidden states in one pass over the rows that plans change.
//
// delta:       out = x + sum_u (a'_u - a_u) weight_dec[u] + sum_i v_i direction[i]   over the edited features u
// reconstruct: out = sum_f a'_f weight_dec[f] + shift + sum_i v_i direction[i]
// with a = act(<x - shift, weight_enc> + bias). Rows outside a plan's positions, rows of sequences without a plan, and
// in delta mode rows whose edits change nothing, are copied bit for bit. Delta mode does the least exact work: no
// encoding when every edit adds (the change is then one vector a sequence), one dot product per edited feature
// otherwise, and for top-k the whole encoder only on rows where a screen cannot tell that k other features score
// higher.
#pragma once

#include <limits>
#include <memory>

#include "saerec/views.h"

namespace saerec {

enum class EditOp : int { kSet = 0, kAdd = 1, kScale = 2, kClampMin = 3, kClampMax = 4 };
enum class Positions : int { kAll = 0, kLast = 1 };

struct SteerPlan {
  int64_t n_edits = 0;
  const int64_t* features = nullptr;  // (n_edits), each in [0, n), or -1 - i for direction i
  const int64_t* ops = nullptr;       // (n_edits), EditOp; kAdd for directions
  const float* values = nullptr;      // (n_edits), or (sequences, n_edits) at values_stride
  int64_t values_stride = 0;
  const float* directions = nullptr;  // (n_directions, d) contiguous
  bool reconstruct = false;
  Positions positions = Positions::kAll;
  // Limit of |out - x| / |x| of a row. With clip, larger changes are scaled down to it.
  float max_relative_norm = std::numeric_limits<float>::infinity();
  bool clip = false;
};

struct SteerParams {
  Matrix x;            // (B, d): sequences of `length` rows, one after the other
  int64_t length = 1;  // divides B
  Matrix weight_enc;   // (n, d)
  Vector bias;         // (n) or absent
  Vector shift;        // (d) or absent
  Matrix weight_dec;   // (n, d)
  int64_t k = 0;       // > 0: top-k; 0: thresholds
  Vector thresholds;   // (n), or size 1 for all features
  const SteerPlan* plans = nullptr;
  int64_t n_plans = 0;
  const int32_t* sequence_plans = nullptr;  // (B / length) plan of each sequence, -1 for none; absent: plan 0 for all
  const bool* valid = nullptr;              // (B) or absent: rows that may change
  Matrix out;                               // (B, d) contiguous, dtype of x
  const void* packed = nullptr;             // of the encoder (saerec/packed.h), or absent
  int64_t packed_bytes = 0;
  int threads = 1;
};

// Plans in terms of an autoencoder: all that does not depend on the hidden states. The few rows of weights they need
// lie together in it, and are read from there rather than from all over the dictionary.
struct CompiledSteer;

// Of params' weights, activation and plans; the rest is not looked at. Refers to nothing of it. Values of a plan with
// values_stride != 0 are not looked at either. Throws std::invalid_argument for a feature that the dictionary lacks.
std::shared_ptr<const CompiledSteer> compile_steer(const SteerParams& params);

// (d): what is added to every row at the positions of the only plan, where that is all that is done; else null. plans:
// of compiled, with which it lives.
const float* vector_to_add(const SteerPlan* plans, const CompiledSteer& compiled);

// Multiply-adds of float32 for params.x.rows rows, about.
int64_t steer_operations(const SteerParams& params, const CompiledSteer& compiled);

// Returns the largest |out - x| / |x| before clipping, over the rows of plans with a finite limit; 0 without any.
// compiled: of the same weights and plans.
float steer(const SteerParams& params, const CompiledSteer& compiled);
float steer(const SteerParams& params);

}  // namespace saerec
