#include "saerec/largest_entries.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "convert.h"
#include "parallel.h"

namespace saerec {
namespace {

constexpr int kBucketBits = 12;
constexpr int64_t kBuckets = 1 << kBucketBits;

// Orders as the values do; NaN is largest, and -0 equals 0.
uint32_t value_key(float value) {
  if (value != value) return ~0u;
  value += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace

void largest_entries(const LargestEntriesParams& params) {
  const int64_t rows = params.rows, entries = params.offsets[rows];
  const bool plain = params.values.dtype == DType::kFloat32 && params.values.stride == 1;
  Vector all_values = params.values;
  all_values.size = entries;
  const std::vector<float> wide = plain ? std::vector<float>() : widened(all_values);
  const float* values = plain ? static_cast<const float*>(params.values.data) : wide.data();
  const int threads = useful_threads(params.threads, entries * 16);
  const int64_t chunks = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
  const auto chunk_row = [&](int64_t chunk) { return rows * chunk / chunks; };
  const auto for_entries = [&](int64_t chunk, const auto& body) {
    const int64_t end = params.offsets[chunk_row(chunk + 1)];
    for (int64_t e = params.offsets[chunk_row(chunk)]; e < end; ++e) body(e, value_key(values[e]));
  };

  // The key of the last entry kept: its bucket by leading bits, then its place within the bucket.
  uint32_t cut = ~0u;
  int64_t larger = 0, ties = 0;
  if (params.count > 0) {
    std::vector<int64_t> histograms(static_cast<std::size_t>(chunks * kBuckets), 0);
    parallel_for(chunks, threads, [&](int64_t chunk) {
      int64_t* counts = histograms.data() + chunk * kBuckets;
      for_entries(chunk, [&](int64_t, uint32_t key) { ++counts[key >> (32 - kBucketBits)]; });
    });
    int64_t bucket = kBuckets, above = 0, within = 0;
    while (above + within < params.count) {
      above += within;
      within = 0;
      --bucket;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) within += histograms[chunk * kBuckets + bucket];
    }
    std::vector<uint32_t> keys;
    keys.reserve(static_cast<std::size_t>(within));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for_entries(chunk, [&](int64_t, uint32_t key) {
        if (key >> (32 - kBucketBits) == bucket) keys.push_back(key);
      });
    }
    const auto last = keys.begin() + (params.count - above - 1);
    std::nth_element(keys.begin(), last, keys.end(), std::greater<uint32_t>());
    cut = *last;
    larger = above + std::count_if(keys.begin(), keys.end(), [&](uint32_t key) { return key > cut; });
    ties = params.count - larger;
  }

  int64_t kept = 0;
  params.kept_offsets[0] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t e = params.offsets[row]; params.count > 0 && e < params.offsets[row + 1]; ++e) {
      const uint32_t key = value_key(values[e]);
      if (key > cut || (key == cut && ties > 0)) {
        ties -= key == cut;
        params.kept[kept++] = e;
      }
    }
    params.kept_offsets[row + 1] = kept;
  }
}

}  // namespace saerec
