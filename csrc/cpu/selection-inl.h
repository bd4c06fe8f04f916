// Selection: a lower bound of the k-th largest of a row's screened scores, the k best of its candidates, their order.
//
// The bound comes from maxima of groups of scores, one group per lane and vector: the k-th largest of at least k
// disjoint groups' maxima is not above the k-th largest score, and with four times as many groups as k about as many
// scores lie above it as k. It is found by bisection over the values, which stops a few groups above k.
//
// The k best are found among int32 keys, in plain loops that compilers vectorise for every tier.
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
constexpr float kLargestFloat = 3.4028235e38f;

template <int N>
struct Number {
  static constexpr int value = N;
};

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

// Keys stand in whole vectors: fill_keys puts smallest keys into the places beyond the end.
constexpr int32_t kSmallestKey = -kNaNKey - 1;

inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

inline void fill_keys(int32_t* keys, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) keys[i] = order_key(values[i]);
  for (int64_t i = count; i < whole_vectors(count); ++i) keys[i] = kSmallestKey;
}

inline int64_t count_at_least(const int32_t* keys, int64_t count, int32_t bound) {
  const Quads b = quads_set1(bound);
  int64_t total = 0;
  for (int64_t i = 0; i < count; i += kLanes) total += __builtin_popcount(at_least(quads_load(keys + i), b));
  return total;
}

// The k-th largest of count keys, 1 <= k <= count; see fill_keys.
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

// Takes count more scores (a multiple of kFeatureBlock) into the group maxima.
template <int Groups>
inline void take_maxima_of(float* maxima, int64_t groups, const float* scores, int64_t count) {
  const int64_t used = Groups > 0 ? Groups : groups;
  Vec held[Groups > 0 ? Groups / kLanes : 1];
  if (Groups > 0) {
    for (int64_t g = 0; g < used / kLanes; ++g) held[g] = load(F32{}, maxima + g * kLanes);
  }
  for (int64_t i = 0; i < count; i += used) {
    const int64_t end = count - i < used ? count - i : used;
    for (int64_t g = 0; g * kLanes < end; ++g) {
      const Vec score = load(F32{}, scores + i + g * kLanes);
      if (Groups > 0) {
        held[g] = maximum(held[g], score);
      } else {
        store(F32{}, maxima + g * kLanes, maximum(load(F32{}, maxima + g * kLanes), score));
      }
    }
  }
  if (Groups > 0) {
    for (int64_t g = 0; g < used / kLanes; ++g) store(F32{}, maxima + g * kLanes, held[g]);
  }
}

inline void take_maxima(float* maxima, int64_t groups, const float* scores, int64_t count) {
  if (groups == 256 && count % 256 == 0) {
    take_maxima_of<256>(maxima, groups, scores, count);
  } else {
    take_maxima_of<0>(maxima, groups, scores, count);
  }
}

// A value that at least k of the group maxima reach, not below `known`, or -infinity where fewer than k groups have
// anything. Maxima are finite or -infinity.
inline float group_bound(const float* maxima, int64_t groups, int64_t k, float known, float& guess) {
  if (groups < k) return -__builtin_inff();
  Vec highest = set1(-__builtin_inff());
  Vec lowest = set1(__builtin_inff());
  for (int64_t i = 0; i < groups; i += kLanes) {
    const Vec maxima_i = load(F32{}, maxima + i);
    highest = maximum(highest, maxima_i);
    lowest = minimum(lowest, maxima_i);
  }
  const auto reaching = [&](float bound) {
    const Vec b = set1(bound);
    int64_t reached = 0;
    for (int64_t i = 0; i < groups; i += kLanes) reached += __builtin_popcount(at_least(load(F32{}, maxima + i), b));
    return reached;
  };
  float low = reduce_min(lowest), high = reduce_max(highest);
  if (known > low) low = known;
  if (low == -__builtin_inff()) {
    low = -kLargestFloat;
    if (reaching(low) < k) return -__builtin_inff();
  }
  // Rows of a batch resemble each other: where the last one's bound lay between its lowest and highest maximum is tried
  // first, then a little beside it.
  const float bottom = low, span = high * 0.5f - low * 0.5f;
  float probe = low + span * guess * 2.0f, width = span * 0.125f;
  for (int step = 0; step < 32; ++step) {
    if (!(probe > low && probe < high)) {
      probe = low * 0.5f + high * 0.5f;
      if (!(probe > low && probe < high)) break;
    }
    const int64_t reached = reaching(probe);
    const bool enough = reached >= k;
    low = enough ? probe : low;
    high = enough ? high : probe;
    if (enough && reached <= k + k / 8 + 2) break;
    const float beside = enough ? probe + width : probe - width;
    probe = step == 0 ? beside : low * 0.5f + high * 0.5f;
  }
  if (span > 0.0f) guess = (low - bottom) / span * 0.5f;
  return low;
}

// Appends the ids of the scores that reach the bound; ids needs room for count and a vector more.
inline int64_t append_reaching(uint32_t* ids, const float* scores, int64_t count, int64_t first, float bound) {
  const Vec b = set1(bound);
  LaneIds lanes(first);
  int64_t added = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    added += lanes.store_next(ids + added, at_least(load(F32{}, scores + i), b));
  }
  return added;
}

// Keeps the k best of count keys with their values and features, in their order; 1 <= k < count, see fill_keys.
inline void keep_k(const int32_t* keys, float* values, uint32_t* features, int64_t count, int64_t k) {
  const int32_t kth = kth_largest_key(keys, count, k);
  int64_t kept = 0;
  if (count_at_least(keys, count, kth) == k) {
    const Quads bound = quads_set1(kth);
    for (int64_t i = 0; i < count; i += kLanes) {
      const uint32_t mask = at_least(quads_load(keys + i), bound);
      kept += pack_front(values + kept, features + kept, load(F32{}, values + i), quads_load(features + i), mask);
    }
    return;
  }
  int64_t ties = k;
  for (int64_t i = 0; i < count; ++i) ties -= keys[i] > kth;
  for (int64_t i = 0; i < count; ++i) {
    const bool take_tie = keys[i] == kth && ties > 0;
    ties -= take_tie;
    values[kept] = values[i];
    features[kept] = features[i];
    kept += keys[i] > kth || take_tie;
  }
}

// Keeps the k best candidates of a row, in their order. All of them must be scored.
inline void cut_to_k(TopKCandidates& candidates, int64_t row) {
  const int64_t count = candidates.counts[row], k = candidates.k;
  if (count <= k) return;
  float* values = candidates.values + row * candidates.capacity;
  fill_keys(candidates.keys, values, count);
  keep_k(candidates.keys, values, candidates.features + row * candidates.capacity, count, k);
  candidates.counts[row] = candidates.scored[row] = k;
}

// Up to this many candidates are sorted by counting, for each, the larger ones; beyond it a real sort is faster.
constexpr int64_t kCountingSortLimit = 128;

// Leaves the k best candidates of a row, all of them scored, in their final order.
inline void sort_row(TopKCandidates& candidates, int64_t row) {
  if (candidates.counts[row] > kCountingSortLimit) cut_to_k(candidates, row);
  const int64_t count = candidates.counts[row];
  const int64_t kept = count < candidates.k ? count : candidates.k;
  float* values = candidates.values + row * candidates.capacity;
  uint32_t* features = candidates.features + row * candidates.capacity;
  candidates.counts[row] = candidates.scored[row] = kept;
  // One zero and one NaN, whatever path a score took.
  for (int64_t i = 0; i < count; ++i) values[i] = values[i] == values[i] ? values[i] + 0.0f : __builtin_nanf("");
  if (count > kCountingSortLimit) {
    sort_candidates(values, features, kept);
    return;
  }
  int32_t keys[kCountingSortLimit], ranks[kCountingSortLimit];
  fill_keys(keys, values, count);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Quads mine = quads_load(keys + i);
    // Two sums: each addition waits for the one before.
    Quads larger[2] = {quads_set1(0), quads_set1(0)};
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      larger[0] = count_less(larger[0], mine, quads_set1(keys[j]));
      larger[1] = count_less(larger[1], mine, quads_set1(keys[j + 1]));
    }
    if (j < count) larger[0] = count_less(larger[0], mine, quads_set1(keys[j]));
    quads_store(ranks + i, quads_add(larger[0], larger[1]));
  }
  float sorted_values[kCountingSortLimit];
  uint32_t sorted_features[kCountingSortLimit];
  int8_t taken[kCountingSortLimit] = {};
  for (int64_t i = 0; i < count; ++i) {
    // Equal keys share a rank and take its places one after the other, smallest feature first.
    const int32_t place = ranks[i] + taken[ranks[i]]++;
    sorted_values[place] = values[i];
    sorted_features[place] = features[i];
  }
  for (int64_t i = 0; i < kept; ++i) {
    values[i] = sorted_values[i];
    features[i] = sorted_features[i];
  }
}

}  // namespace
}  // namespace SAEREC_TIER
}  // namespace saerec
