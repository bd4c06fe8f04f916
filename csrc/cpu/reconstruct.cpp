#include "saerec/reconstruct.h"

#include <algorithm>
#include <vector>

#include "convert.h"
#include "encode_rows.h"
#include "parallel.h"
#include "topk_rows.h"

namespace saerec {
namespace {

DecodeTask decode_task(const ReconstructParams& params, const EncoderWeights& weights) {
  DecodeTask task;
  task.weight = params.weight_dec;
  task.bias = weights.shift;
  return task;
}

void reconstruct_topk(const ReconstructParams& params, const EncoderWeights& weights) {
  TopKRows request;
  request.x = params.x;
  request.k = params.k;
  request.sorted = false;
  request.threads = params.threads;
  for_each_topk_row(request, weights, [&](int64_t row, float* values, uint32_t* features, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];
    const int64_t begin = 0;
    DecodeTask task = decode_task(params, weights);
    task.begins = &begin;
    task.ends = &count;
    // Feature ids fit int32: a dictionary of 2^31 rows would not fit memory.
    task.indices = {features, IndexType::kInt32};
    task.values = {values, DType::kFloat32, count, 1};
    task.out = row_range(params.out, row, 1);
    active_kernels().decode_rows(task);
  });
}

void reconstruct_threshold(const ReconstructParams& params, const EncoderWeights& weights) {
  const int64_t rows = params.x.rows, n = params.weight_enc.rows;
  const std::vector<float> thresholds = widened_thresholds(params.thresholds, n);
  const SweepPartition partition = partition_sweep(rows, n, params.x.cols, params.threads, false);
  parallel_for(partition.chunks, partition.threads, [&](int64_t chunk) {
    const int64_t first = chunk * partition.chunk_rows;
    const int64_t count = std::min(partition.chunk_rows, rows - first);
    EncoderScratch& scratch = thread_encoder_scratch();
    const ThresholdLog& log =
        encode_threshold_chunk(scratch, row_range(params.x, first, count), weights, 0, n, thresholds.data());
    const GroupedLog grouped = group_by_row(scratch, log, count);
    DecodeTask task = decode_task(params, weights);
    task.begins = grouped.offsets;
    task.ends = grouped.offsets + 1;
    task.indices = {grouped.features, IndexType::kInt32};
    task.values = {grouped.values, DType::kFloat32, log.count, 1};
    task.out = row_range(params.out, first, count);
    active_kernels().decode_rows(task);
  });
}

}  // namespace

void reconstruct(const ReconstructParams& params) {
  if (params.x.rows == 0 || params.x.cols == 0) return;
  const std::vector<float> shift = widened(params.shift);
  const EncoderWeights weights =
      prepare_weights(params.weight_enc, params.bias, shift, {params.packed, params.packed_bytes}, params.x.rows,
                      params.k, params.threads);
  if (params.k > 0) {
    reconstruct_topk(params, weights);
  } else {
    reconstruct_threshold(params, weights);
  }
}

}  // namespace saerec
