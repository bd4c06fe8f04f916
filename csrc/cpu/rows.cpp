// Kernels over gathered rows of a weight matrix: weighted sums (decode), dot products and grouped sums (gradients).
// Compiled once per tier.
//
// Accumulator: float32. Sums run over the entries in the order given, one chain per output column and kChainEntries
// entries, so they do not depend on how rows or features are split over threads, and their error grows with the number
// of chains rather than of entries. Column blocks of 8 vectors (then 1) keep the sums in registers while the entries
// pass; a block of 8 is 128 columns on AVX-512, so d = 64 ... 128 needs a single pass.
#include "kernels.h"
#include "simd.h"
#include "tier.inc"

namespace saerec {
namespace SAEREC_TIER {
namespace {

constexpr int kBlockVectors = 8;
constexpr int64_t kChainEntries = 32;
// Up to so many slots all of them are added, changed or not: cheaper than branches that cannot be foretold.
constexpr int64_t kDenseSlots = 16;

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// Calls body(column, Vectors<N>, columns): whole blocks of 8, 4 and 1 vectors, then the partial vector that is left.
template <class Body>
void for_column_blocks(int64_t d, const Body& body) {
  int64_t j = 0;
  for (; j + kBlockVectors * kLanes <= d; j += kBlockVectors * kLanes) body(j, Vectors<kBlockVectors>{}, 0);
  for (; j + 4 * kLanes <= d; j += 4 * kLanes) body(j, Vectors<4>{}, 0);
  for (; j + kLanes <= d; j += kLanes) body(j, Vectors<1>{}, 0);
  if (j < d) body(j, Vectors<1>{}, d - j);
}

// A vector, or its first `partial` lanes where partial > 0.
template <class Element>
Vec load_some(Element element, const typename Element::Storage* p, int64_t partial) {
  return partial > 0 ? load_partial(element, p, partial) : load(element, p);
}

template <class Element>
void store_some(Element element, typename Element::Storage* p, int64_t partial, Vec value) {
  if (partial > 0) {
    store_partial(element, p, partial, value);
  } else {
    store(element, p, value);
  }
}

// Indices of any of the two types, and values widened, without a branch per entry.
template <class Index, class Value, class Element>
void decode_row(Index, Value value_element, Element element, const DecodeTask& task, int64_t row) {
  using Storage = typename Element::Storage;
  const auto* indices = static_cast<const Index*>(task.indices.data);
  const auto* values = static_cast<const typename Value::Storage*>(task.values.data);
  const auto* weight = static_cast<const Storage*>(task.weight.data);
  const auto* base = static_cast<const Storage*>(task.base.data);
  auto* out = static_cast<Storage*>(task.out.data) + row * task.out.row_stride;
  const int64_t begin = task.begins[row], end = task.ends[row];
  for_column_blocks(task.out.cols, [&](int64_t j, auto vectors, int64_t partial) {
    constexpr int kVectors = decltype(vectors)::value;
    Vec sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = zero();
    for (int64_t chain = begin; chain < end; chain += kChainEntries) {
      const int64_t chain_end = chain + kChainEntries < end ? chain + kChainEntries : end;
      Vec chains[kVectors];
      for (int v = 0; v < kVectors; ++v) chains[v] = zero();
      for (int64_t e = chain; e < chain_end; ++e) {
        const int64_t feature = indices[e];
        if (feature < 0) continue;
        const Vec value = set1(widen(value_element, values[e * task.values.stride]));
        const Storage* w = weight + feature * task.weight.row_stride + j;
        for (int v = 0; v < kVectors; ++v) {
          chains[v] = fmadd(value, load_some(element, w + v * kLanes, partial), chains[v]);
        }
      }
      for (int v = 0; v < kVectors; ++v) sums[v] = add(sums[v], chains[v]);
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = j + v * kLanes;
      if (task.bias != nullptr) sums[v] = add(sums[v], load_some(F32{}, task.bias + column, partial));
      if (base != nullptr) {
        sums[v] = add(sums[v], load_some(element, base + row * task.base.row_stride + column, partial));
      }
      store_some(element, out + column, partial, sums[v]);
    }
  });
}

// Any column strides; for views no serving path makes, so one column at a time.
template <class Element>
void decode_row_strided(Element element, const DecodeTask& task, int64_t row) {
  using Storage = typename Element::Storage;
  const auto* weight = static_cast<const Storage*>(task.weight.data);
  const auto* base = static_cast<const Storage*>(task.base.data);
  auto* out = static_cast<Storage*>(task.out.data) + row * task.out.row_stride;
  for (int64_t j = 0; j < task.out.cols; ++j) {
    float sum = 0.0f;
    const int64_t end = task.ends[row];
    for (int64_t chain = task.begins[row]; chain < end; chain += kChainEntries) {
      const int64_t chain_end = chain + kChainEntries < end ? chain + kChainEntries : end;
      float chain_sum = 0.0f;
      for (int64_t e = chain; e < chain_end; ++e) {
        const int64_t feature = index_at(task.indices, e);
        if (feature < 0) continue;
        chain_sum += value_at(task.values, e) *
                     widen(element, weight[feature * task.weight.row_stride + j * task.weight.col_stride]);
      }
      sum += chain_sum;
    }
    if (task.bias != nullptr) sum += task.bias[j];
    if (base != nullptr) sum += widen(element, base[row * task.base.row_stride + j * task.base.col_stride]);
    out[j * task.out.col_stride] = narrow(element, sum);
  }
}

// Decodes as decode_row does, the slots that change being the entries.
template <class Element>
void add_changes_of(Element element, const ChangesTask& task) {
  using Storage = typename Element::Storage;
  const int64_t d = task.x.cols, words = (task.slots + 31) / 32;
  const bool dense = task.weight_is_finite && task.slots <= kDenseSlots;
  for (int64_t row = 0; row < task.x.rows; ++row) {
    const Storage* x = static_cast<const Storage*>(task.x.data) + row * task.x.row_stride;
    Storage* out = static_cast<Storage*>(task.out.data) + row * task.out.row_stride;
    const uint32_t* changed = task.changed + row;
    bool changes = task.offset_changes;
    for (int64_t word = 0; word < words; ++word) changes = changes || changed[word * task.stride] != 0;
    if (!changes) {
      std::memcpy(out, x, static_cast<std::size_t>(d) * sizeof(Storage));
      continue;
    }
    for_column_blocks(d, [&](int64_t j, auto vectors, int64_t partial) {
      constexpr int kVectors = decltype(vectors)::value;
      Vec sums[kVectors], chains[kVectors];
      for (int v = 0; v < kVectors; ++v) sums[v] = chains[v] = zero();
      int64_t entries = 0;
      const auto end_chain = [&] {
        for (int v = 0; v < kVectors; ++v) {
          sums[v] = add(sums[v], chains[v]);
          chains[v] = zero();
        }
        entries = 0;
      };
      const auto add_slot = [&](int64_t slot) {
        const Vec change = set1(task.after[slot * task.stride + row]);
        const float* w = task.weight + slot * d + j;
        for (int v = 0; v < kVectors; ++v) {
          chains[v] = fmadd(change, load_some(F32{}, w + v * kLanes, partial), chains[v]);
        }
        if (++entries == kChainEntries) end_chain();
      };
      if (dense) {
        for (int64_t slot = 0; slot < task.slots; ++slot) add_slot(slot);
      } else {
        for (int64_t word = 0; word < words; ++word) {
          for (uint32_t left = changed[word * task.stride]; left != 0; left &= left - 1) {
            add_slot(word * 32 + __builtin_ctz(left));
          }
        }
      }
      if (entries > 0) end_chain();
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = j + v * kLanes;
        if (task.offset != nullptr) sums[v] = add(sums[v], load_some(F32{}, task.offset + column, partial));
        sums[v] = add(sums[v], load_some(element, x + column, partial));
        store_some(element, out + column, partial, sums[v]);
      }
    });
  }
}

void store_scalar(DType dtype, void* data, int64_t i, float value) {
  with_element(dtype, [&](auto element) {
    static_cast<typename decltype(element)::Storage*>(data)[i] = narrow(element, value);
  });
}

}  // namespace

void decode_rows(const DecodeTask& task) {
  const bool unit_columns = task.weight.col_stride == 1 && task.out.col_stride == 1 &&
                            (task.base.data == nullptr || task.base.col_stride == 1);
  with_element(task.weight.dtype, [&](auto element) {
    if (!unit_columns) {
      for (int64_t row = 0; row < task.out.rows; ++row) decode_row_strided(element, task, row);
      return;
    }
    with_element(task.values.dtype, [&](auto value) {
      for (int64_t row = 0; row < task.out.rows; ++row) {
        if (task.indices.type == IndexType::kInt32) {
          decode_row(int32_t{}, value, element, task, row);
        } else {
          decode_row(int64_t{}, value, element, task, row);
        }
      }
    });
  });
}

void add_changes(const ChangesTask& task) {
  const int64_t rows = task.x.rows;
  for (int64_t word = 0; word * 32 < task.slots; ++word) {
    uint32_t* changed = task.changed + word * task.stride;
    for (int64_t row = 0; row < rows; ++row) changed[row] = 0;
    for (int64_t slot = word * 32; slot < task.slots && slot < word * 32 + 32; ++slot) {
      const float* before = task.before + slot * task.stride;
      float* after = task.after + slot * task.stride;
      const uint32_t bit = uint32_t{1} << (slot & 31);
      for (int64_t row = 0; row < rows; ++row) {
        after[row] -= before[row];
        // "Not ==": a NaN changes the row.
        changed[row] |= after[row] == 0.0f ? 0u : bit;
      }
    }
  }
  with_element(task.x.dtype, [&](auto element) { add_changes_of(element, task); });
}

void dot_rows(const DotTask& task) {
  with_element(task.weight.dtype, [&](auto element) {
    using Storage = typename decltype(element)::Storage;
    const int64_t d = task.weight.cols;
    for (int64_t r = 0; r < task.rows.rows; ++r) {
      const Storage* row = static_cast<const Storage*>(task.rows.data) + r * task.rows.row_stride;
      for (int64_t e = task.offsets[r]; e < task.offsets[r + 1]; ++e) {
        const int64_t feature = index_at(task.indices, e);
        float dot = 0.0f;
        if (feature >= 0) {
          const Storage* w = static_cast<const Storage*>(task.weight.data) + feature * task.weight.row_stride;
          Vec sum = zero();
          for_column_blocks(d, [&](int64_t j, auto vectors, int64_t partial) {
            for (int v = 0; v < decltype(vectors)::value; ++v) {
              const int64_t column = j + v * kLanes;
              sum = fmadd(load_some(element, row + column, partial), load_some(element, w + column, partial), sum);
            }
          });
          dot = reduce_add(sum);
        }
        store_scalar(task.out_dtype, task.out, e, dot);
      }
    }
  });
}

void sum_groups(const GroupedSumTask& task) {
  with_element(task.rows.dtype, [&](auto element) {
    using Storage = typename decltype(element)::Storage;
    const auto* rows = static_cast<const Storage*>(task.rows.data);
    for (int64_t feature = task.feature_begin; feature < task.feature_end; ++feature) {
      const int64_t begin = task.group_offsets[feature], end = task.group_offsets[feature + 1];
      Storage* out = static_cast<Storage*>(task.out.data) + feature * task.out.row_stride;
      for_column_blocks(task.out.cols, [&](int64_t j, auto vectors, int64_t partial) {
        constexpr int kVectors = decltype(vectors)::value;
        Vec sums[kVectors], shifts[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          sums[v] = zero();
          shifts[v] = task.shift != nullptr ? load_some(F32{}, task.shift + j + v * kLanes, partial) : zero();
        }
        for (int64_t chain = begin; chain < end; chain += kChainEntries) {
          const int64_t chain_end = chain + kChainEntries < end ? chain + kChainEntries : end;
          Vec chains[kVectors];
          for (int v = 0; v < kVectors; ++v) chains[v] = zero();
          for (int64_t i = chain; i < chain_end; ++i) {
            const int64_t entry = task.entries[i];
            const Vec coefficient = set1(value_at(task.coefficients, entry));
            const Storage* row = rows + task.entry_rows[entry] * task.rows.row_stride + j;
            for (int v = 0; v < kVectors; ++v) {
              const Vec centred = sub(load_some(element, row + v * kLanes, partial), shifts[v]);
              chains[v] = fmadd(coefficient, centred, chains[v]);
            }
          }
          for (int v = 0; v < kVectors; ++v) sums[v] = add(sums[v], chains[v]);
        }
        for (int v = 0; v < kVectors; ++v) store_some(element, out + j + v * kLanes, partial, sums[v]);
      });
      if (task.out_sum != nullptr) {
        float sum = 0.0f;
        for (int64_t chain = begin; chain < end; chain += kChainEntries) {
          const int64_t chain_end = chain + kChainEntries < end ? chain + kChainEntries : end;
          float chain_sum = 0.0f;
          for (int64_t i = chain; i < chain_end; ++i) chain_sum += value_at(task.coefficients, task.entries[i]);
          sum += chain_sum;
        }
        store_scalar(task.out.dtype, task.out_sum, feature, sum);
      }
    }
  });
}

}  // namespace SAEREC_TIER
}  // namespace saerec
