// Exact selection of the k best of n scores by one block, and ordered compaction.
//
// Scores are kept as keys whose order as unsigned integers is the order of the scores: descending value, NaN above all,
// -0 tied with 0. A radix search over 11, 11 and 10 bits finds the k-th largest key; of the features that share it the
// first ones are taken. The histograms need three passes over the keys, and stop earlier once a bin is wanted whole.
#pragma once

#include "device.cuh"

namespace saerec {
namespace cuda {

constexpr uint32_t kNanKey = 0xffffffffu;

SAEREC_DEVICE uint32_t score_key(float score) {
  if (score != score) return kNanKey;
  const uint32_t bits = float_bits(score + 0.0f);  // makes -0 a 0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// The score of a key; that of kNanKey is a NaN.
SAEREC_DEVICE float key_score(uint32_t key) { return bits_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key); }

// The selected features: those above the cut's key, and those at it up to feature `last`.
struct Cut {
  uint32_t key;
  int last;
};

SAEREC_DEVICE bool is_selected(const Cut& cut, uint32_t key, int feature) {
  return key > cut.key || (key == cut.key && feature <= cut.last);
}

constexpr int kBins = 2048;
constexpr int kBinsPerThread = kBins / kThreads;
// One word of padding per stripe: a thread reads its bins, and a warp neighbouring stripes, without bank conflicts.
constexpr int kStripe = kThreads + 1;
constexpr int kHistogramWords = kBinsPerThread * kStripe;

SAEREC_DEVICE int bin_place(int bin) { return (bin % kBinsPerThread) * kStripe + bin / kBinsPerThread; }

struct SelectionScratch {
  uint32_t* histogram;  // (kHistogramWords)
  uint32_t* warps;      // (kWarps)
  uint32_t* result;     // (4)
};

// The sum of `value` over the threads before this one, and over all. `warps` must not be in use by an earlier scan: a
// barrier has to lie between.
template <class Machine>
SAEREC_DEVICE uint32_t exclusive_sum(Machine& machine, uint32_t value, uint32_t* warps, uint32_t* total) {
  const int lane = machine.thread() % kWarpSize, warp = machine.thread() / kWarpSize;
  uint32_t inclusive = value;
  SAEREC_UNROLL
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t before = machine.shuffle_up(inclusive, distance);
    if (lane >= distance) inclusive += before;
  }
  if (lane == kWarpSize - 1) warps[warp] = inclusive;
  machine.sync();
  uint32_t sum = 0, before = 0;
  SAEREC_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = sum;
    sum += warps[w];
  }
  *total = sum;
  return before + inclusive - value;
}

// Each warp takes a run of whole groups of 32 items, so that warps are in the order of the items.
SAEREC_DEVICE int warp_span(int count) { return (count + kThreads - 1) / kThreads * kWarpSize; }

// Writes the items of [begin, end) that are `wanted`, in order: write(place, item) for places 0, 1, …. The count is
// returned. The same barrier rule as for exclusive_sum holds; what is written needs a barrier before others read it.
template <class Machine, class Wanted, class Write>
SAEREC_DEVICE uint32_t compact(Machine& machine, int begin, int end, uint32_t* warps, const Wanted& wanted,
                               const Write& write) {
  const int lane = machine.thread() % kWarpSize, warp = machine.thread() / kWarpSize;
  const int span = warp_span(end - begin);
  const int first = minimum(begin + warp * span, end), last = minimum(first + span, end);
  uint32_t own = 0;
  for (int item = first; item < last; item += kWarpSize) {
    own += count_bits(machine.ballot(item + lane < last && wanted(item + lane)));
  }
  if (lane == 0) warps[warp] = own;
  machine.sync();
  uint32_t total = 0, place = 0;
  SAEREC_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) place = total;
    total += warps[w];
  }
  for (int item = first; item < last; item += kWarpSize) {
    const bool mine = item + lane < last && wanted(item + lane);
    const uint32_t votes = machine.ballot(mine);
    if (mine) write(place + count_bits(votes & ((1u << lane) - 1u)), item + lane);
    place += count_bits(votes);
  }
  return total;
}

// The cut of the k best of keys[0, n), 1 <= k <= n, for all threads. The keys must be visible to all of them, and no
// scan may be reading scratch.warps; when a thread returns, none does.
template <class Machine>
SAEREC_DEVICE Cut select_top_k(Machine& machine, const uint32_t* keys, int n, int k, const SelectionScratch& scratch) {
  const int thread = machine.thread();
  uint32_t prefix = 0, known = 0, needed = static_cast<uint32_t>(k), candidates = static_cast<uint32_t>(n);
  int shift = 32;
  while (shift > 0 && candidates != needed) {
    const int bits = shift == 32 || shift == 21 ? 11 : 10;
    shift -= bits;
    const uint32_t bin_mask = (1u << bits) - 1u;
    for (int place = thread; place < kHistogramWords; place += kThreads) scratch.histogram[place] = 0;
    machine.sync();
    for (int i = thread; i < n; i += kThreads) {
      const uint32_t key = keys[i];
      if ((key & known) == prefix) {
        machine.increment(scratch.histogram + bin_place(static_cast<int>((key >> shift) & bin_mask)));
      }
    }
    machine.sync();
    // Thread 0 holds the largest bins.
    const int top_bin = kBins - 1 - thread * kBinsPerThread;
    uint32_t own = 0;
    for (int i = 0; i < kBinsPerThread; ++i) own += scratch.histogram[bin_place(top_bin - i)];
    uint32_t total;
    uint32_t above = exclusive_sum(machine, own, scratch.warps, &total);
    if (above < needed && needed <= above + own) {
      int bin = top_bin;
      uint32_t in_bin = scratch.histogram[bin_place(bin)];
      while (above + in_bin < needed) {
        above += in_bin;
        in_bin = scratch.histogram[bin_place(--bin)];
      }
      scratch.result[0] = static_cast<uint32_t>(bin);
      scratch.result[1] = needed - above;
      scratch.result[2] = in_bin;
    }
    machine.sync();
    prefix |= scratch.result[0] << shift;
    known |= bin_mask << shift;
    needed = scratch.result[1];
    candidates = scratch.result[2];
  }
  Cut cut = {prefix, n};
  // All candidates share the prefix: either they are wanted whole, or the prefix is a key that more than the wanted
  // ones have, of which the first are taken.
  if (candidates != needed) {
    const uint32_t wanted = needed;
    compact(
        machine, 0, n, scratch.warps, [&](int i) { return keys[i] == prefix; },
        [&](uint32_t place, int i) {
          if (place + 1 == wanted) scratch.result[3] = static_cast<uint32_t>(i);
        });
    machine.sync();
    cut.last = static_cast<int>(scratch.result[3]);
  }
  return cut;
}

}  // namespace cuda
}  // namespace saerec
