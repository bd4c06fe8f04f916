// Selection among the candidates of a row: the k best, and their order. Written as plain loops over int32 keys, which
// compilers vectorise for every tier.
//
// Key: the float32 bits made to compare as signed integers; -0 equals +0, every NaN is the largest key. Candidates
// always stand in ascending order of feature, so among equal keys the earlier one is the one to keep.
// The k-th largest key is found by bisection over the keys' range: some ten counting passes over a few hundred keys, no
// data-dependent branches, where quickselect mispredicts about once per key.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace saerec {
namespace SAEREC_TIER {
namespace {

constexpr int32_t kNaNKey = 0x7FFFFFFF;

inline int32_t order_key(float value) {
  const float unsigned_zero = value + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &unsigned_zero, 4);
  const int32_t key = bits ^ (bits >> 31 & 0x7FFFFFFF);
  return value != value ? kNaNKey : key;
}

inline float key_to_value(int32_t key) {
  const int32_t bits = key ^ (key >> 31 & 0x7FFFFFFF);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int64_t count_at_least(const int32_t* keys, int64_t count, int32_t bound) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += keys[i] >= bound;
  return total;
}

// The k-th largest of count keys, 1 <= k <= count.
inline int32_t kth_largest_key(const int32_t* keys, int64_t count, int64_t k) {
  int32_t low = kNaNKey, high = -kNaNKey - 1;
  for (int64_t i = 0; i < count; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  while (low < high) {
    // In int64: the distance of two int32 need not be one.
    const int32_t middle = static_cast<int32_t>(low + (static_cast<int64_t>(high) - low + 1) / 2);
    const int64_t above = count_at_least(keys, count, middle);
    if (above == k) {
      int32_t smallest = kNaNKey;
      for (int64_t i = 0; i < count; ++i) {
        const int32_t key = keys[i] >= middle ? keys[i] : kNaNKey;
        smallest = key < smallest ? key : smallest;
      }
      return smallest;
    }
    if (above > k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Keeps the k best candidates of a row, in their order, and raises the row's threshold. candidates.keys then holds
// the keys of what is left.
void cut_to_k(TopKCandidates& candidates, int64_t row) {
  const int64_t count = candidates.counts[row], k = candidates.k;
  float* values = candidates.values + row * candidates.capacity;
  uint32_t* features = candidates.features + row * candidates.capacity;
  int32_t* keys = candidates.keys;
  for (int64_t i = 0; i < count; ++i) keys[i] = order_key(values[i]);
  if (count < k) return;
  const int32_t kth = kth_largest_key(keys, count, k);
  int64_t ties = k;
  for (int64_t i = 0; i < count; ++i) ties -= keys[i] > kth;
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool take_tie = keys[i] == kth && ties > 0;
    ties -= take_tie;
    values[kept] = values[i];
    features[kept] = features[i];
    const int32_t key = keys[i];
    keys[kept] = key;
    kept += key > kth || take_tie;
  }
  candidates.counts[row] = k;
  candidates.thresholds[row] = kth == kNaNKey ? __builtin_nanf("") : key_to_value(kth);
}

// Up to this many a row is sorted by counting, for each, the larger ones; beyond it that is slower than a real sort.
constexpr int64_t kCountingSortLimit = 128;

void sort_row(TopKCandidates& candidates, int64_t row) {
  cut_to_k(candidates, row);
  const int64_t count = candidates.counts[row];
  float* values = candidates.values + row * candidates.capacity;
  uint32_t* features = candidates.features + row * candidates.capacity;
  if (count > kCountingSortLimit) {
    sort_candidates(values, features, count);
    return;
  }
  const int32_t* keys = candidates.keys;
  float sorted_values[kCountingSortLimit];
  uint32_t sorted_features[kCountingSortLimit];
  int32_t taken[kCountingSortLimit] = {};
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = keys[i];
    int32_t rank = 0;
    for (int64_t j = 0; j < count; ++j) rank += keys[j] > key;
    // Equal keys share a rank and take its places one after the other, smallest feature first.
    const int32_t place = rank + taken[rank]++;
    sorted_values[place] = values[i];
    sorted_features[place] = features[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    values[i] = sorted_values[i];
    features[i] = sorted_features[i];
  }
}

}  // namespace
}  // namespace SAEREC_TIER
}  // namespace saerec
