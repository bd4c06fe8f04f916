// The serving steer: encode, edit, decode and add, in one launch. The kernel code, written against a Machine.
//
// Formula: saerec/steer.h. Two kernels:
//
// steer_slots    delta plans that need no encoder sweep: one block per row scores the edited features alone (none of
//                them where every edit adds).
// steer_encoded  top-k plans whose edits depend on activations, and reconstruct: a cluster of blocks takes kRows rows.
//                Each block scores a slice of the dictionary for all of them, so that one read of W_enc serves kRows
//                rows, and leaves each score in the shared memory of the block that owns its row (or in a workspace,
//                where dictionaries are larger than that). After one cluster barrier every block finishes its rows.
//
// Score: float32 fused multiply-adds of (x - shift) and weights. Eight lanes share a feature: lane l sums the columns
// whose 16-byte vector has index l modulo 8, in ascending order; then the lanes are added as a tree (distances 4, 2,
// 1); bias last. The order depends on d and the element size alone, so a score has the same bits for any batch, tile,
// cluster or list it is computed in. Decoding adds entries in ascending order of feature in as many interleaved sums as
// threads share a column, and then those sums in order.
//
// Tile: a warp scores 16 features (4 a group of eight lanes) for kRows rows, which makes 4 independent 16-byte loads
// per lane and 4 * kRows multiply-adds for each word of them. Ties: smallest feature first.
#pragma once

#include "selection.cuh"

namespace saerec {
namespace cuda {

constexpr int kMaxEdits = 256;  // the plan travels as a kernel parameter; one thread per edited feature
constexpr int kMaxTopK = 512;

static_assert(kMaxEdits <= kThreads, "one thread per slot");

// The codes of saerec/steer.h.
enum PlanOp : uint8_t { kPlanSet, kPlanAdd, kPlanScale, kPlanClampMin, kPlanClampMax };

// The plan in terms of its distinct features ("slots", ascending), with the edits grouped by slot.
struct KernelPlan {
  int32_t slots;
  int32_t features[kMaxEdits];         // (slots)
  uint16_t first_edit[kMaxEdits + 1];  // (slots + 1) into the two below
  uint8_t edits[kMaxEdits];            // the edit's place in the caller's plan, where its strength is
  uint8_t ops[kMaxEdits];              // PlanOp
  uint8_t adds_only[kMaxEdits];        // (slots) every edit adds, so the change does not depend on the activation
};

// Strides are in elements.
struct KernelArguments {
  const void* x;
  int64_t x_row_stride, x_col_stride;
  const void* weight_enc;  // (n, d), unit column stride
  int64_t weight_enc_stride;
  const void* bias;  // (n) or absent
  int64_t bias_stride;
  const void* shift;  // (d) or absent
  int64_t shift_stride;
  const void* weight_dec;  // (n, d), unit column stride
  int64_t weight_dec_stride;
  const float* thresholds;   // where k == 0
  int64_t threshold_stride;  // 0: one for all features
  const float* edit_values;
  int64_t edit_values_row_stride;
  const bool* row_mask;  // (rows) or absent
  void* out;             // (rows, d) contiguous
  uint32_t* keys;        // (rows, n) workspace, or absent: scores stay in shared memory
  int64_t rows;
  int32_t n, d, k;
  bool reconstruct;
  bool needs_scores;                            // steer_slots: some slot depends on its activation
  bool weight_enc_aligned, weight_dec_aligned;  // every row starts at a multiple of 16 bytes
  KernelPlan plan;
};

constexpr int kFeatureLanes = 8;
constexpr int kFeatureGroups = kWarpSize / kFeatureLanes;
constexpr int kFeaturesPerGroup = 4;
constexpr int kWarpFeatures = kFeatureGroups * kFeaturesPerGroup;

constexpr int kListEntries = 1024;
constexpr int kScanFeatures = 512;  // features scanned between two looks at how full the list is
constexpr int kPartialWords = kThreads * 8;
constexpr int kScratchWords = kHistogramWords > kPartialWords ? kHistogramWords : kPartialWords;

static_assert(kMaxTopK + kMaxEdits <= kListEntries, "a top-k row is one list");
static_assert(kScanFeatures + kMaxEdits <= kListEntries, "a scan and the edited features fit into an empty list");

// Shared memory of a block; offsets in 4-byte words, each a multiple of 4.
struct Layout {
  int columns;      // of x, padded with zeros to whole rounds of eight lanes
  int x;            // (kRows, columns) x - shift
  int sums;         // (d rounded up to 8) the decoded row
  int activations;  // (kMaxEdits) before the edits
  int features;     // (kListEntries) entries to decode
  int values;       // (kListEntries)
  int scratch;      // histogram, or partial sums of the decoder
  int small;        // (16) warp totals and results
  int keys;         // (owned rows, n)
  int64_t words;
};

// owned_rows is 0 where keys are in the workspace.
SAEREC_HOST_DEVICE inline Layout layout_of(int vector, int tile_rows, int64_t owned_rows, int n, int d) {
  Layout layout;
  const int round = vector * kFeatureLanes;
  layout.columns = (d + round - 1) / round * round;
  layout.x = 0;
  layout.sums = tile_rows * layout.columns;
  layout.activations = layout.sums + (d + 7) / 8 * 8;
  layout.features = layout.activations + kMaxEdits;
  layout.values = layout.features + kListEntries;
  layout.scratch = layout.values + kListEntries;
  layout.small = layout.scratch + (kScratchWords + 3) / 4 * 4;
  layout.keys = layout.small + 16;
  layout.words = layout.keys + owned_rows * n;
  return layout;
}

template <class Element>
struct SharedMemory {
  Layout layout;
  float *x, *sums, *activations, *values;
  int32_t* features;
  uint32_t *scratch, *small, *keys;

  SAEREC_DEVICE SharedMemory(char* memory, const Layout& places) : layout(places) {
    float* words = reinterpret_cast<float*>(memory);
    uint32_t* integers = reinterpret_cast<uint32_t*>(memory);
    x = words + layout.x;
    sums = words + layout.sums;
    activations = words + layout.activations;
    values = words + layout.values;
    features = reinterpret_cast<int32_t*>(memory) + layout.features;
    scratch = integers + layout.scratch;
    small = integers + layout.small;
    keys = integers + layout.keys;
  }
};

// Where a column of x lies in its row: the lanes' 16-byte words of a round side by side, so that a warp reads them
// without bank conflicts also where a lane takes two of them.
template <class Element>
SAEREC_DEVICE int x_place(int column) {
  constexpr int kRound = Element::kVector * kFeatureLanes;
  const int in_round = column % kRound, lane = in_round / Element::kVector, part = in_round % Element::kVector;
  return column - in_round + part / 4 * (4 * kFeatureLanes) + lane * 4 + part % 4;
}

SAEREC_DEVICE bool is_steered(const KernelArguments& arguments, int64_t row) {
  return arguments.row_mask == nullptr || arguments.row_mask[row];
}

// Bit for bit: neither rounding nor -0 + 0 may touch a row that is not steered.
template <class Element, class Machine>
SAEREC_DEVICE void copy_row(Machine& machine, const KernelArguments& arguments, int64_t row) {
  using Storage = typename Element::Storage;
  const Storage* in = static_cast<const Storage*>(arguments.x) + row * arguments.x_row_stride;
  Storage* out = static_cast<Storage*>(arguments.out) + row * arguments.d;
  for (int j = machine.thread(); j < arguments.d; j += kThreads) out[j] = in[j * arguments.x_col_stride];
}

// x - shift of `count` rows from `first` on, zeros in the padding and in missing rows of the tile.
template <class Element, int kRows, class Machine>
SAEREC_DEVICE void load_rows(Machine& machine, const KernelArguments& arguments, int64_t first, int count,
                             const SharedMemory<Element>& shared) {
  using Storage = typename Element::Storage;
  const Storage* x = static_cast<const Storage*>(arguments.x);
  const Storage* shift = static_cast<const Storage*>(arguments.shift);
  const int columns = shared.layout.columns;
  // All rows in one loop: each thread loads once where a row is narrower than the block, as at serving widths.
  SAEREC_UNROLL_BY(2)
  for (int i = machine.thread(); i < kRows * columns; i += kThreads) {
    const int r = i / columns, j = i % columns;
    float value = 0.0f;
    if (r < count && j < arguments.d) {
      value = Element::widen(read_only(x + (first + r) * arguments.x_row_stride + j * arguments.x_col_stride));
      if (shift != nullptr) value -= Element::widen(read_only(shift + j * arguments.shift_stride));
    }
    shared.x[r * columns + x_place<Element>(j)] = value;
  }
}

// One step of adding kValues sums over the lanes `distance` apart: each lane keeps the half it will hold the total of,
// and sends the other. With a single sum left, both keep it.
template <int kValues, class Machine>
SAEREC_DEVICE void add_lanes(Machine& machine, int distance, float* values) {
  if constexpr (kValues == 1) {
    values[0] += machine.shuffle_xor(values[0], distance);
  } else {
    constexpr int kHalf = kValues / 2;
    const bool upper = (machine.thread() & distance) != 0;
    SAEREC_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? values[i + kHalf] : values[i];
      const float sent = upper ? values[i] : values[i + kHalf];
      values[i] = kept + machine.shuffle_xor(sent, distance);
    }
  }
}

// sums[i * kRows + r] += x[r] * weights of feature i, over the lane's columns from `column` on. weights(i, part, out)
// gives columns [column + part, column + part + 4).
template <class Element, int kRows, class Weights>
SAEREC_DEVICE void add_products(const SharedMemory<Element>& shared, int column, const Weights& weights,
                                float (&sums)[kFeaturesPerGroup * kRows]) {
  const float* x = shared.x + x_place<Element>(column);
  SAEREC_UNROLL
  for (int part = 0; part < Element::kVector; part += 4) {
    float ws[kFeaturesPerGroup][4];
    SAEREC_UNROLL
    for (int i = 0; i < kFeaturesPerGroup; ++i) weights(i, part, ws[i]);
    SAEREC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float xs[4];
      const float* place = x + r * shared.layout.columns + part * kFeatureLanes;
      widen_four(Float32{}, load_vector_shared(place), 0, xs);
      SAEREC_UNROLL
      for (int i = 0; i < kFeaturesPerGroup; ++i) {
        SAEREC_UNROLL
        for (int j = 0; j < 4; ++j) sums[i * kRows + r] = fmaf(xs[j], ws[i][j], sums[i * kRows + r]);
      }
    }
  }
}

// Scores of items [begin, end) for kRows rows in shared memory: use(item, row, score), once each. feature(item) is the
// dictionary's row. All threads of a block call it; its warps take tiles in turn.
template <class Element, int kRows, class Machine, class Feature, class Use>
SAEREC_DEVICE void score(Machine& machine, const KernelArguments& arguments, const SharedMemory<Element>& shared,
                         int begin, int end, const Feature& feature, const Use& use) {
  using Storage = typename Element::Storage;
  constexpr int kVector = Element::kVector;
  constexpr int kSums = kFeaturesPerGroup * kRows;
  // What a lane holds after the exchanges.
  constexpr int kKept = kSums >= kFeatureLanes ? kSums / kFeatureLanes : 1;
  constexpr int kSharers = kSums >= kFeatureLanes ? 1 : kFeatureLanes / kSums;
  const int thread = machine.thread(), lane = thread % kFeatureLanes;
  const int group = thread % kWarpSize / kFeatureLanes, warp = thread / kWarpSize;
  const Storage* weight = static_cast<const Storage*>(arguments.weight_enc);
  const Storage* bias = static_cast<const Storage*>(arguments.bias);
  constexpr int kRound = kVector * kFeatureLanes;
  // Rounds whose loads are under way together; with 8 rows there are no registers for two.
  [[maybe_unused]] constexpr int kRoundsAtOnce = kRows > 4 ? 1 : 2;
  const int columns = shared.layout.columns;
  // Columns of rounds that all eight lanes can load as vectors.
  const int whole = arguments.weight_enc_aligned ? arguments.d / kRound * kRound : 0;

  for (int first = begin + warp * kWarpFeatures; first < end; first += kWarps * kWarpFeatures) {
    const Storage* rows[kFeaturesPerGroup];
    SAEREC_UNROLL
    for (int i = 0; i < kFeaturesPerGroup; ++i) {
      const int item = minimum(first + i * kFeatureGroups + group, end - 1);
      rows[i] = weight + static_cast<int64_t>(feature(item)) * arguments.weight_enc_stride;
    }
    float sums[kSums];
    SAEREC_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    int column = lane * kVector;
    SAEREC_UNROLL_BY(kRoundsAtOnce)
    for (; column < whole; column += kRound) {
      Vector16 vectors[kFeaturesPerGroup];
      SAEREC_UNROLL
      for (int i = 0; i < kFeaturesPerGroup; ++i) vectors[i] = load_vector(rows[i] + column);
      add_products<Element, kRows>(
          shared, column, [&](int i, int part, float (&out)[4]) { widen_four(Element{}, vectors[i], part, out); },
          sums);
    }
    for (; column < columns; column += kRound) {
      add_products<Element, kRows>(
          shared, column,
          [&](int i, int part, float (&out)[4]) { load_four<Element>(rows[i], column + part, arguments.d, out); },
          sums);
    }
    add_lanes<kSums>(machine, 4, sums);
    add_lanes<(kSums >= 2 ? kSums / 2 : 1)>(machine, 2, sums);
    add_lanes<(kSums >= 4 ? kSums / 4 : 1)>(machine, 1, sums);
    // The bits of the lane, from the highest, say which half was kept in each exchange.
    const int kept_first = lane / kSharers * kKept;
    SAEREC_UNROLL
    for (int j = 0; j < kKept; ++j) {
      const int index = kept_first + j, i = index / kRows, r = index % kRows;
      const int item = first + i * kFeatureGroups + group;
      if (lane % kSharers == 0 && item < end) {
        const float total = sums[j];
        use(item, r,
            bias != nullptr ? total + Element::widen(read_only(bias + feature(item) * arguments.bias_stride)) : total);
      }
    }
  }
}

// As torch.maximum and torch.minimum: a NaN on either side wins.
SAEREC_DEVICE float nan_maximum(float a, float b) { return a != a || a > b ? a : b; }
SAEREC_DEVICE float nan_minimum(float a, float b) { return a != a || a < b ? a : b; }

SAEREC_DEVICE float apply_edit(uint8_t op, float activation, float value) {
  switch (op) {
    case kPlanSet:
      return value;
    case kPlanAdd:
      return activation + value;
    case kPlanScale:
      return activation * value;
    case kPlanClampMin:
      return nan_maximum(activation, value);
    default:
      return nan_minimum(activation, value);
  }
}

// The slot's activation in this row after its edits.
SAEREC_DEVICE float edited_activation(const KernelArguments& arguments, int64_t row, int slot, float activation) {
  const KernelPlan& plan = arguments.plan;
  const float* strengths = arguments.edit_values + row * arguments.edit_values_row_stride;
  for (int i = plan.first_edit[slot]; i < plan.first_edit[slot + 1]; ++i) {
    activation = apply_edit(plan.ops[i], activation, read_only(strengths + plan.edits[i]));
  }
  return activation;
}

SAEREC_DEVICE bool is_slot(const KernelPlan& plan, int feature) {
  int low = 0, high = plan.slots;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (plan.features[middle] < feature) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < plan.slots && plan.features[low] == feature;
}

// Appends the edited features to the list: in reconstruct mode all of them with a', else those that change with a' - a.
// `before` is the activation of this thread's slot. The count of the list is returned; a barrier is the caller's.
template <class Element, class Machine>
SAEREC_DEVICE uint32_t append_slots(Machine& machine, const KernelArguments& arguments, int64_t row,
                                    const SharedMemory<Element>& shared, uint32_t count, float before) {
  const KernelPlan& plan = arguments.plan;
  const int slot = machine.thread();
  float entry = 0.0f;
  if (slot < plan.slots) {
    entry = edited_activation(arguments, row, slot, before);
    if (!arguments.reconstruct) entry -= before;
  }
  const bool emitted = slot < plan.slots && (arguments.reconstruct || entry != 0.0f);
  uint32_t total;
  const uint32_t place = count + exclusive_sum(machine, emitted ? 1u : 0u, shared.small, &total);
  if (emitted) {
    shared.features[place] = plan.features[slot];
    shared.values[place] = entry;
  }
  return count + total;
}

// sums += list @ W_dec. Every thread adds the columns congruent to its index modulo the block, here as elsewhere, so
// that sums need no barriers. Begins with one, so that the list can be read.
template <class Element, class Machine>
SAEREC_DEVICE void decode(Machine& machine, const KernelArguments& arguments, const SharedMemory<Element>& shared,
                          uint32_t count) {
  using Storage = typename Element::Storage;
  constexpr int kVector = Element::kVector;
  const Storage* weight = static_cast<const Storage*>(arguments.weight_dec);
  float* partial = reinterpret_cast<float*>(shared.scratch);
  const int d = arguments.d, thread = machine.thread();
  // Lanes side by side take a row, 16 bytes each; what is left of the block takes other entries.
  int lanes = 1;
  while (lanes < kThreads && lanes * kVector < d) lanes *= 2;
  const int groups = kThreads / lanes, group = thread / lanes, panel = lanes * kVector;
  for (int panel_begin = 0; panel_begin < d; panel_begin += panel) {
    machine.sync();
    const int column = panel_begin + thread % lanes * kVector;
    float own[kVector];
    SAEREC_UNROLL
    for (int i = 0; i < kVector; ++i) own[i] = 0.0f;
    const auto add_entry = [&](uint32_t e, const float (&weights)[kVector]) {
      const float value = shared.values[e];
      SAEREC_UNROLL
      for (int i = 0; i < kVector; ++i) own[i] = fmaf(value, weights[i], own[i]);
    };
    const auto row_of = [&](uint32_t e) {
      return weight + static_cast<int64_t>(shared.features[e]) * arguments.weight_dec_stride;
    };
    uint32_t e = static_cast<uint32_t>(group);
    if (arguments.weight_dec_aligned && column + kVector <= d) {
      SAEREC_UNROLL_BY(4)
      for (; e < count; e += static_cast<uint32_t>(groups)) {
        const Vector16 vector = load_vector(row_of(e) + column);
        float weights[kVector];
        SAEREC_UNROLL
        for (int part = 0; part < kVector; part += 4) {
          float four[4];
          widen_four(Element{}, vector, part, four);
          SAEREC_UNROLL
          for (int j = 0; j < 4; ++j) weights[part + j] = four[j];
        }
        add_entry(e, weights);
      }
    } else if (column < d) {
      for (; e < count; e += static_cast<uint32_t>(groups)) {
        float weights[kVector];
        SAEREC_UNROLL
        for (int part = 0; part < kVector; part += 4) {
          float four[4];
          load_four<Element>(row_of(e), column + part, d, four);
          SAEREC_UNROLL
          for (int j = 0; j < 4; ++j) weights[part + j] = four[j];
        }
        add_entry(e, weights);
      }
    }
    SAEREC_UNROLL
    for (int i = 0; i < kVector; ++i) partial[thread * kVector + i] = own[i];
    machine.sync();
    for (int j = thread; j < panel && panel_begin + j < d; j += kThreads) {
      float total = partial[j];
      for (int g = 1; g < groups; ++g) total += partial[g * panel + j];
      shared.sums[panel_begin + j] += total;
    }
  }
}

template <class Element, class Machine>
SAEREC_DEVICE void clear_sums(Machine& machine, const KernelArguments& arguments, const SharedMemory<Element>& shared) {
  for (int j = machine.thread(); j < arguments.d; j += kThreads) shared.sums[j] = 0.0f;
}

// out = sums + x, or + shift in reconstruct mode, rounded once.
template <class Element, class Machine>
SAEREC_DEVICE void store_row(Machine& machine, const KernelArguments& arguments, const SharedMemory<Element>& shared,
                             int64_t row) {
  using Storage = typename Element::Storage;
  const Storage* x = static_cast<const Storage*>(arguments.x) + row * arguments.x_row_stride;
  const Storage* shift = static_cast<const Storage*>(arguments.shift);
  Storage* out = static_cast<Storage*>(arguments.out) + row * arguments.d;
  for (int j = machine.thread(); j < arguments.d; j += kThreads) {
    float value = shared.sums[j];
    if (!arguments.reconstruct) {
      value += Element::widen(read_only(x + j * arguments.x_col_stride));
    } else if (shift != nullptr) {
      value += Element::widen(read_only(shift + j * arguments.shift_stride));
    }
    out[j] = Element::narrow(value);
  }
}

// Decodes the edited features and stores the row; where nothing changes its bits are copied.
template <class Element, class Machine>
SAEREC_DEVICE void finish_delta(Machine& machine, const KernelArguments& arguments, const SharedMemory<Element>& shared,
                                int64_t row, float before) {
  const uint32_t count = append_slots(machine, arguments, row, shared, 0, before);
  if (count == 0) {
    copy_row<Element>(machine, arguments, row);
    return;
  }
  clear_sums(machine, arguments, shared);
  decode(machine, arguments, shared, count);
  store_row(machine, arguments, shared, row);
}

// keys[0, n) of the row -> its reconstruction from the edited activations.
template <class Element, class Machine>
SAEREC_DEVICE void finish_reconstruct(Machine& machine, const KernelArguments& arguments,
                                      const SharedMemory<Element>& shared, int64_t row, const uint32_t* keys,
                                      const Cut& cut, float before) {
  const bool top_k = arguments.k > 0;
  clear_sums(machine, arguments, shared);
  // The list of a top-k row cannot overflow; the others are decoded as it fills.
  const int scan = top_k ? arguments.n : kScanFeatures;
  uint32_t count = 0;
  for (int begin = 0; begin < arguments.n; begin += scan) {
    const int end = minimum(begin + scan, arguments.n);
    if (count + static_cast<uint32_t>(end - begin) + static_cast<uint32_t>(arguments.plan.slots) > kListEntries &&
        !top_k) {
      decode(machine, arguments, shared, count);
      count = 0;
    }
    const auto wanted = [&](int feature) {
      const uint32_t key = keys[feature];
      const bool active = top_k ? is_selected(cut, key, feature) : key != 0;
      return active && !is_slot(arguments.plan, feature);
    };
    const auto write = [&](uint32_t place, int feature) {
      const float value = top_k ? key_score(keys[feature]) : bits_float(keys[feature]);
      shared.features[count + place] = feature;
      shared.values[count + place] = top_k && value < 0.0f ? 0.0f : value;
    };
    count += compact(machine, begin, end, shared.small, wanted, write);
    machine.sync();
  }
  count = append_slots(machine, arguments, row, shared, count, before);
  decode(machine, arguments, shared, count);
  store_row(machine, arguments, shared, row);
}

template <class Element, class Machine>
SAEREC_DEVICE void finish_row(Machine& machine, const KernelArguments& arguments, const SharedMemory<Element>& shared,
                              int64_t row, const uint32_t* keys) {
  if (!is_steered(arguments, row)) {
    copy_row<Element>(machine, arguments, row);
    return;
  }
  const bool top_k = arguments.k > 0;
  Cut cut = {0, 0};
  if (top_k) {
    const SelectionScratch scratch = {shared.scratch, shared.small, shared.small + kWarps};
    cut = select_top_k(machine, keys, arguments.n, arguments.k, scratch);
  }
  const int slot = machine.thread();
  float before = 0.0f;
  if (slot < arguments.plan.slots && (arguments.reconstruct || arguments.plan.adds_only[slot] == 0)) {
    const int feature = arguments.plan.features[slot];
    const uint32_t key = keys[feature];
    if (!top_k) {
      before = bits_float(key);
    } else if (is_selected(cut, key, feature)) {
      before = key_score(key);
      if (before < 0.0f) before = 0.0f;
    }
  }
  if (arguments.reconstruct) {
    finish_reconstruct(machine, arguments, shared, row, keys, cut, before);
  } else {
    finish_delta(machine, arguments, shared, row, before);
  }
}

template <class Element, int kRows, class Machine>
SAEREC_DEVICE void steer_encoded(Machine& machine, const KernelArguments& arguments) {
  const int rank = machine.rank(), ranks = machine.ranks();  // ranks: 1, 2, 4 or 8
  const int rank_bits = (ranks > 1 ? 1 : 0) + (ranks > 2 ? 1 : 0) + (ranks > 4 ? 1 : 0);
  const int64_t first = machine.cluster() * kRows, left = arguments.rows - first;
  const int count = left < kRows ? static_cast<int>(left) : kRows;
  const int64_t owned = arguments.keys != nullptr ? 0 : (kRows + ranks - 1) / ranks;
  const SharedMemory<Element> shared(machine.shared(),
                                     layout_of(Element::kVector, kRows, owned, arguments.n, arguments.d));
  bool any_steered = false;
  for (int r = 0; r < count; ++r) any_steered |= is_steered(arguments, first + r);
  // The same for all blocks of the cluster, so that none waits for another in vain.
  if (any_steered) {
    load_rows<Element, kRows>(machine, arguments, first, count, shared);
    // Also: every block has started before another writes into its memory.
    machine.sync_cluster();
    const int slice = (arguments.n + ranks - 1) / ranks;
    const int begin = minimum(rank * slice, arguments.n), end = minimum(begin + slice, arguments.n);
    score<Element, kRows>(
        machine, arguments, shared, begin, end, [](int item) { return item; },
        [&](int feature, int r, float value) {
          if (r >= count) return;
          uint32_t key;
          if (arguments.k > 0) {
            key = score_key(value);
          } else {
            // Not "value > threshold": a NaN stays visible.
            const bool off = value <= read_only(arguments.thresholds + feature * arguments.threshold_stride);
            key = off ? 0u : float_bits(value);
          }
          if (arguments.keys != nullptr) {
            arguments.keys[(first + r) * arguments.n + feature] = key;
          } else {
            const int64_t place = static_cast<int64_t>(r >> rank_bits) * arguments.n + feature;
            *machine.remote(shared.keys + place, r & (ranks - 1)) = key;
          }
        });
    machine.sync_cluster();
  }
  for (int r = rank; r < count; r += ranks) {
    const uint32_t* keys = arguments.keys != nullptr ? arguments.keys + (first + r) * arguments.n
                                                     : shared.keys + static_cast<int64_t>(r >> rank_bits) * arguments.n;
    finish_row(machine, arguments, shared, first + r, keys);
    machine.sync();
  }
}

// One block per row.
template <class Element, class Machine>
SAEREC_DEVICE void steer_slots(Machine& machine, const KernelArguments& arguments) {
  const int64_t row = machine.cluster();
  if (!is_steered(arguments, row)) {
    copy_row<Element>(machine, arguments, row);
    return;
  }
  const KernelPlan& plan = arguments.plan;
  const SharedMemory<Element> shared(machine.shared(), layout_of(Element::kVector, 1, 0, arguments.n, arguments.d));
  const int slot = machine.thread();
  float before = 0.0f;
  if (arguments.needs_scores) {
    load_rows<Element, 1>(machine, arguments, row, 1, shared);
    machine.sync();
    score<Element, 1>(
        machine, arguments, shared, 0, plan.slots, [&](int item) { return plan.features[item]; },
        [&](int item, int, float value) {
          const bool off = value <= read_only(arguments.thresholds + plan.features[item] * arguments.threshold_stride);
          shared.activations[item] = off ? 0.0f : value;
        });
    machine.sync();
    if (slot < plan.slots && plan.adds_only[slot] == 0) before = shared.activations[slot];
  }
  finish_delta(machine, arguments, shared, row, before);
}

}  // namespace cuda
}  // namespace saerec
