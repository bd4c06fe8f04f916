// Encoding of one chunk of rows, shared by the drivers of linear_topk, encode_threshold and steer.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace saerec {

// The scratch of one thread; see thread_encoder_scratch().
struct EncoderScratch {
  ScratchBuffer x, codes, screens, uppers;
  ScratchBuffer values, features, counts, scored, bounds, maxima, reached, keys, cursors, positions, chosen_features,
      chosen_scores, exact;
  ScratchBuffer log_ends, group_offsets, group_features, group_values;
  ThresholdLog log;  // owns malloc'ed arrays, kept between calls
  ~EncoderScratch();
};

EncoderScratch& thread_encoder_scratch();

struct EncoderWeights {
  Matrix weight;  // (n, d), unit column stride
  Vector bias;
  const float* shift = nullptr;  // (d) float32 or absent
  PackedView packed;             // codes == nullptr: scores are computed without a screen
};

// Packed weights as a caller hands them in: absent where data == nullptr.
struct PackedBytes {
  const void* data = nullptr;
  int64_t bytes = 0;
};

// Decides whether `rows` rows are screened: with the packed weights given, or with ones packed here where that pays.
// Those live in scratch of the calling thread, until its next call. k is 0 for thresholds. Throws std::invalid_argument
// where packed weights do not fit.
EncoderWeights prepare_weights(const Matrix& weight, const Vector& bias, const std::vector<float>& shift,
                               const PackedBytes& packed, int64_t rows, int64_t k, int threads);

// Rows [row_begin, row_begin + rows) of x.
Matrix row_range(const Matrix& x, int64_t row_begin, int64_t rows);

// The best (at most k) of each row of a chunk over features [begin, end), sorted or in ascending order of feature;
// valid until the scratch is used again. exclude_offsets point at the chunk's first row.
TopKCandidates encode_topk_chunk(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights, int64_t begin,
                                 int64_t end, int64_t k, bool sorted, const int64_t* exclude_offsets,
                                 const int64_t* exclude_ids);

// Order-preserving key: greater is better (descending value with NaN above all, then smallest feature).
uint64_t candidate_key(float value, uint32_t feature);
float key_value(uint64_t key);
uint32_t key_feature(uint64_t key);

// Thresholds of all n features as encode_threshold_chunk takes them.
std::vector<float> widened_thresholds(const Vector& thresholds, int64_t n);

// The entries of a chunk over features [begin, end) above their threshold, in the scratch's log.
const ThresholdLog& encode_threshold_chunk(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights,
                                           int64_t begin, int64_t end, const float* thresholds);

// A log with its entries grouped by row: row r holds [offsets[r], offsets[r + 1]). Valid until the scratch is used
// again.
struct GroupedLog {
  const int64_t* offsets = nullptr;
  const uint32_t* features = nullptr;
  const float* values = nullptr;
};

GroupedLog group_by_row(EncoderScratch& scratch, const ThresholdLog& log, int64_t rows);

// Scores of a chunk for a list of features, (rows, count) row-major into out.
void encode_feature_list(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights,
                         const uint32_t* features, int64_t count, float* out);

// outscored[r] = whether k features of row r of a chunk score above best[r] for certain. Needs packed weights.
void find_outscored_rows(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights, int64_t k,
                         const float* best, bool* outscored);

// Cost of a sweep in multiply-adds of float32, for deciding on threads; those of the screen cost a quarter.
inline int64_t sweep_operations(int64_t rows, int64_t features, int64_t d) { return rows * features * d / 4; }

// How the rows of a sweep are cut into tasks: chunks of at most kChunkRows rows, and, where that leaves threads
// idle, each chunk's dictionary into segments.
struct SweepPartition {
  int threads = 1;
  int64_t chunk_rows = 1;
  int64_t chunks = 0;
  int64_t segments = 1;
  int64_t segment_features = 0;  // a multiple of kFeatureBlock
};

SweepPartition partition_sweep(int64_t rows, int64_t features, int64_t d, int threads, bool split_features);

}  // namespace saerec
