#include "saerec/encode_features.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "convert.h"
#include "encode_rows.h"
#include "parallel.h"

namespace saerec {

void encode_features(const EncodeFeaturesParams& params) {
  const int64_t rows = params.x.rows, m = params.n_features;
  if (rows == 0 || m == 0) return;
  const auto [lowest, highest] = std::minmax_element(params.features, params.features + m);
  if (*lowest < 0 || *highest >= params.weight.rows) {
    throw std::invalid_argument("features: ids go from 0 to " + std::to_string(params.weight.rows - 1) + ", got " +
                                std::to_string(*lowest) + " to " + std::to_string(*highest));
  }
  const std::vector<float> shift = widened(params.shift);
  const EncoderWeights weights = prepare_weights(params.weight, params.bias, shift, {}, 0, 0, params.threads);
  std::vector<uint32_t> features(params.features, params.features + m);
  std::vector<float> thresholds;
  for (const uint32_t feature : features) {
    thresholds.push_back(element_at(params.thresholds, params.thresholds.size == 1 ? 0 : feature));
  }
  const SweepPartition partition = partition_sweep(rows, m, params.x.cols, params.threads, false);
  parallel_for(partition.chunks, partition.threads, [&](int64_t chunk) {
    const int64_t first = chunk * partition.chunk_rows;
    const int64_t count = std::min(partition.chunk_rows, rows - first);
    EncoderScratch& scratch = thread_encoder_scratch();
    float* scores = scratch.group_values.get<float>(count * m);
    encode_feature_list(scratch, row_range(params.x, first, count), weights, features.data(), m, scores);
    for (int64_t i = 0; i < count * m; ++i) {
      const float activation = scores[i] <= thresholds[i % m] ? 0.0f : scores[i];
      store_element(params.x.dtype, params.out, first * m + i, activation);
    }
  });
}

}  // namespace saerec
