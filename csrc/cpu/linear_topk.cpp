#include "saerec/linear_topk.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "convert.h"
#include "encode_rows.h"
#include "topk_rows.h"

namespace saerec {
namespace {

template <class Index>
void write_indices(Index* out, const uint32_t* features, int64_t count, int64_t k) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Index>(features[i]);
  for (int64_t i = count; i < k; ++i) out[i] = -1;
}

void write_row(const LinearTopKParams& params, int64_t row, const float* values, const uint32_t* features,
               int64_t count) {
  const int64_t k = params.k, first = row * k;
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  const auto value = [&](int64_t i) {
    const float raw = i < count ? values[i] : kNothing;
    return params.relu && raw < 0.0f ? 0.0f : raw;
  };
  if (params.x.dtype == DType::kFloat32) {
    float* out = static_cast<float*>(params.values) + first;
    for (int64_t i = 0; i < k; ++i) out[i] = value(i);
  } else {
    for (int64_t i = 0; i < k; ++i) store_element(params.x.dtype, params.values, first + i, value(i));
  }
  if (params.index_type == IndexType::kInt32) {
    write_indices(static_cast<int32_t*>(params.indices) + first, features, count, k);
  } else {
    write_indices(static_cast<int64_t*>(params.indices) + first, features, count, k);
  }
}

// The sweep walks each row's excluded ids once, in ascending order.
std::vector<int64_t> sorted_exclude_ids(const LinearTopKParams& params) {
  std::vector<int64_t> ids;
  if (params.exclude_offsets == nullptr) return ids;
  const int64_t* offsets = params.exclude_offsets;
  bool rising = offsets[0] == 0 && offsets[params.x.rows] == params.exclude_count;
  for (int64_t row = 0; row < params.x.rows; ++row) rising = rising && offsets[row] <= offsets[row + 1];
  if (!rising) {
    throw std::invalid_argument("exclude: offsets must rise from 0 to " + std::to_string(params.exclude_count) +
                                ", the number of ids");
  }
  ids.assign(params.exclude_ids, params.exclude_ids + offsets[params.x.rows]);
  for (int64_t row = 0; row < params.x.rows; ++row) {
    std::sort(ids.begin() + offsets[row], ids.begin() + offsets[row + 1]);
    const bool empty = offsets[row] == offsets[row + 1];
    if (!empty && (ids[offsets[row]] < 0 || ids[offsets[row + 1] - 1] >= params.weight.rows)) {
      throw std::invalid_argument("exclude: expected ids from 0 to " + std::to_string(params.weight.rows - 1) +
                                  ", got " + std::to_string(ids[offsets[row]]) + " to " +
                                  std::to_string(ids[offsets[row + 1] - 1]) + " in row " + std::to_string(row));
    }
  }
  return ids;
}

}  // namespace

void linear_topk(const LinearTopKParams& params) {
  const int64_t rows = params.x.rows, k = params.k;
  if (rows == 0 || k == 0) return;
  const std::vector<float> shift = widened(params.shift);
  const std::vector<int64_t> exclude_ids = sorted_exclude_ids(params);
  const EncoderWeights weights =
      prepare_weights(params.weight, params.bias, shift, {params.packed, params.packed_bytes}, rows, k, params.threads);
  TopKRows request;
  request.x = params.x;
  request.k = k;
  request.exclude_offsets = params.exclude_offsets;
  request.exclude_ids = exclude_ids.data();
  request.threads = params.threads;
  for_each_topk_row(request, weights, [&](int64_t row, float* values, uint32_t* features, int64_t count) {
    write_row(params, row, values, features, count);
  });
}

}  // namespace saerec
