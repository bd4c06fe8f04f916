#include "saerec/encode_threshold.h"

#include <algorithm>
#include <cstring>

#include "convert.h"
#include "encode_rows.h"
#include "parallel.h"

namespace saerec {
namespace {

// The entries of one chunk over one segment of the dictionary, grouped by row.
struct Part {
  std::vector<int64_t> row_offsets;  // (chunk rows + 1)
  std::vector<int32_t> features;
  std::vector<float> values;
};

// A row's features stand ascending in the log, so they come out ascending.
Part part_of(EncoderScratch& scratch, const ThresholdLog& log, int64_t rows) {
  const GroupedLog grouped = group_by_row(scratch, log, rows);
  Part part;
  part.row_offsets.assign(grouped.offsets, grouped.offsets + rows + 1);
  part.features.assign(grouped.features, grouped.features + log.count);
  part.values.assign(grouped.values, grouped.values + log.count);
  return part;
}

class Parts final : public SparseRows {
 public:
  Parts(int64_t rows, const SweepPartition& partition)
      : rows_(rows), partition_(partition), parts_(static_cast<std::size_t>(partition.chunks * partition.segments)) {}

  Part& part(int64_t task) { return parts_[task]; }

  int64_t n_entries() const override {
    int64_t total = 0;
    for (const Part& part : parts_) total += static_cast<int64_t>(part.features.size());
    return total;
  }

  void copy_to(int64_t* offsets, int32_t* indices, void* values, DType dtype) const override {
    const int64_t segments = partition_.segments;
    offsets[0] = 0;
    for (int64_t chunk = 0; chunk < partition_.chunks; ++chunk) {
      const int64_t first = chunk * partition_.chunk_rows;
      const int64_t count = std::min(partition_.chunk_rows, rows_ - first);
      for (int64_t r = 0; r < count; ++r) {
        int64_t end = offsets[first + r];
        for (int64_t s = 0; s < segments; ++s) end += row_entries(parts_[chunk * segments + s], r);
        offsets[first + r + 1] = end;
      }
    }
    parallel_for(partition_.chunks, partition_.threads, [&](int64_t chunk) {
      const int64_t first = chunk * partition_.chunk_rows;
      const int64_t count = std::min(partition_.chunk_rows, rows_ - first);
      for (int64_t r = 0; r < count; ++r) {
        int64_t place = offsets[first + r];
        for (int64_t s = 0; s < segments; ++s) {
          const Part& part = parts_[chunk * segments + s];
          const int64_t begin = part.row_offsets[r], entries = row_entries(part, r);
          std::copy_n(part.features.begin() + begin, entries, indices + place);
          if (dtype == DType::kFloat32) {
            std::copy_n(part.values.begin() + begin, entries, static_cast<float*>(values) + place);
          } else {
            for (int64_t i = 0; i < entries; ++i) store_element(dtype, values, place + i, part.values[begin + i]);
          }
          place += entries;
        }
      }
    });
  }

 private:
  static int64_t row_entries(const Part& part, int64_t row) {
    return part.row_offsets[row + 1] - part.row_offsets[row];
  }

  int64_t rows_;
  SweepPartition partition_;
  std::vector<Part> parts_;
};

}  // namespace

std::unique_ptr<SparseRows> encode_threshold(const EncodeThresholdParams& params) {
  const int64_t rows = params.x.rows, n = params.weight.rows;
  const std::vector<float> shift = widened(params.shift);
  const EncoderWeights weights =
      prepare_weights(params.weight, params.bias, shift, {params.packed, params.packed_bytes}, rows, 0, params.threads);
  const std::vector<float> thresholds = widened_thresholds(params.thresholds, n);
  const SweepPartition partition = partition_sweep(rows, n, params.x.cols, params.threads, true);
  auto parts = std::make_unique<Parts>(rows, partition);
  parallel_for(partition.chunks * partition.segments, partition.threads, [&](int64_t task) {
    const int64_t chunk = task / partition.segments, segment = task % partition.segments;
    const int64_t row_begin = chunk * partition.chunk_rows;
    const int64_t row_count = std::min(partition.chunk_rows, rows - row_begin);
    const int64_t begin = segment * partition.segment_features;
    const int64_t end = std::min(begin + partition.segment_features, n);
    EncoderScratch& scratch = thread_encoder_scratch();
    const ThresholdLog& log = encode_threshold_chunk(scratch, row_range(params.x, row_begin, row_count), weights, begin,
                                                     end, thresholds.data());
    parts->part(task) = part_of(scratch, log, row_count);
  });
  return parts;
}

}  // namespace saerec
