// Encoding of one chunk of rows, shared by the drivers of linear_topk, encode_threshold and steer.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "scratch.h"

namespace saerec {

// The scratch of one thread; see thread_encoder_scratch().
struct EncoderScratch {
  ScratchBuffer x, weight, values, features, counts, thresholds, keys, cursors;
  ScratchBuffer log_rows, log_features, log_values;
  ThresholdLog log;  // owns malloc'ed arrays, kept between calls
  ~EncoderScratch();
};

EncoderScratch& thread_encoder_scratch();

struct EncoderWeights {
  Matrix weight;
  Vector bias;
  const float* shift = nullptr;  // (d) float32 or absent
};

// Rows [row_begin, row_begin + rows) of x.
Matrix row_range(const Matrix& x, int64_t row_begin, int64_t rows);

// The best (at most k) of each row of a chunk over features [begin, end), in final order; valid until the scratch is
// used again. exclude_offsets point at the chunk's first row.
TopKCandidates sweep_topk_chunk(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights, int64_t begin,
                                int64_t end, int64_t k, const int64_t* exclude_offsets, const int64_t* exclude_ids);

// Order-preserving key: greater is better (descending value with NaN above all, then smallest feature).
uint64_t candidate_key(float value, uint32_t feature);
float key_value(uint64_t key);
uint32_t key_feature(uint64_t key);

// The entries of a chunk over features [begin, end) above their threshold, in the scratch's log.
const ThresholdLog& sweep_threshold_chunk(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights,
                                          int64_t begin, int64_t end, const Vector& thresholds);

// Scores of a chunk for a list of features, (rows, count) row-major into out.
void sweep_feature_list(EncoderScratch& scratch, const Matrix& x, const EncoderWeights& weights,
                        const int64_t* features, int64_t count, float* out);

// Multiply-adds of a chunk's sweep, for deciding on threads.
inline int64_t sweep_operations(int64_t rows, int64_t features, int64_t d) { return rows * features * d; }

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
