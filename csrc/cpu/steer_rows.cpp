// Delta steering of one tier: scores of the edited features, whether a top-k can have selected any of them, the edits,
// and what they add to the rows. Numbers of a slot lie side by side for all rows, so that one vector holds as many
// rows, whatever the edits do.
#include "kernels.h"
#include "saerec/steer.h"
#include "scores-inl.h"
#include "screen-inl.h"
#include "selection-inl.h"
#include "tier.inc"

namespace saerec {
namespace SAEREC_TIER {
namespace {

// Features a sweep counts before it looks which rows are settled: their codes and uppers fit the first-level cache.
constexpr int64_t kCountedFeatures = 256;

// A tile of scores-inl.h with the sides exchanged, kLanes rows for one feature: a product has the same bits either way.
template <class Element>
void score_slots_of(Element element, const SlotScoresTask& task) {
  using Storage = typename Element::Storage;
  const int64_t d = task.x.cols, stride = slot_stride(task.x.rows);
  for (int64_t row = 0; row < task.x.rows; row += kLanes) {
    const int64_t left = task.x.rows - row;
    EncodeTask tile;
    tile.x = task.x;
    tile.x.data = static_cast<Storage*>(task.x.data) + row * task.x.row_stride;
    tile.x.rows = left < kLanes ? left : kLanes;
    tile.shift = task.shift;
    tile.x_rows = task.x_rows;
    widen_rows_of(element, tile);
    const float* rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) rows[lane] = task.x_rows + (lane < left ? lane : 0) * d;
    for (int64_t slot = 0; slot < task.slots; ++slot) {
      float* out = task.out + slot * stride + row;
      score_tile(F32{}, task.weight + slot * d, d, rows, out);
      // Read once: for all the compiler knows, they are among what is written.
      if (task.biases != nullptr) {
        const float bias = task.biases[slot];
        for (int64_t lane = 0; lane < kLanes; ++lane) out[lane] += bias;
      }
      if (task.thresholds != nullptr) {
        const float threshold = task.thresholds[slot];
        // "Not <=": a NaN stays visible.
        for (int64_t lane = 0; lane < kLanes; ++lane) out[lane] = out[lane] <= threshold ? 0.0f : out[lane];
      }
    }
  }
}

// Rows that are neither settled nor given up stand first in the task's scratch, with their codes and screens.
struct OutscoredSweep {
  OutscoredTask& task;
  int64_t active = 0;

  void keep(int64_t from, uint32_t row, float bound, int64_t count) {
    const EncodeTask& encode = task.encode;
    const int64_t bytes = 4 * encode.packed->quads;
    if (from != active) {
      std::memcpy(encode.x_codes + active * bytes, encode.x_codes + from * bytes, static_cast<std::size_t>(bytes));
      encode.screens[active] = encode.screens[from];
    }
    task.rows[active] = row;
    task.bounds[active] = bound;
    task.counts[active] = count;
    ++active;
  }

  // An upper is not below the score, and its distance to it is at most twice the bound of the error, which in units of
  // the row's screen is coefficient * margin + what the bias was raised by (see screen-inl.h): with |error| <= e both
  // upper = score + error + e <= score + 2 e. So upper - 2 e > best makes score > best. All terms added here are
  // positive, as best is, so that raising them by their rounding errors raises the bound by them.
  void begin() {
    const EncodeTask& encode = task.encode;
    for (int64_t row = 0; row < encode.x.rows; ++row) {
      const float best = task.best[row];
      task.outscored[row] = best <= 0.0f;
      const RowScreen& screen = encode.screens[row];
      // A NaN takes part, and stays unsettled.
      if (best <= 0.0f || !screen.usable) continue;
      const float bias_raised = 4.0f * kBiasRounding * screen.inverse_step * encode.packed->max_bias;
      const float bound = (best * screen.inverse_step + bias_raised) * (1.0f + 8.0f * kRounding) + kUnderflow;
      keep(row, static_cast<uint32_t>(row), bound, 0);
    }
  }

  template <int Rows>
  void count_tiles(int64_t& row, int64_t first, int64_t last) {
    const EncodeTask& encode = task.encode;
    const int64_t stride = last - first;
    for (; row + Rows <= active; row += Rows) {
      CodeStream none;  // the next features may not be needed
      screen_tile<Rows>(encode, row, first, last, stride, none);
      for (int i = 0; i < Rows; ++i) {
        const float* uppers = encode.uppers + i * stride;
        const float* margins = encode.packed->margins + first;
        const Vec bound = set1(task.bounds[row + i]);
        const Vec spread = set1(2.0f * encode.screens[row + i].coefficient * (1.0f + 8.0f * kRounding));
        int64_t count = 0;
        for (int64_t j = 0; j < stride; j += kLanes) {
          const Vec needed = fmadd(load(F32{}, margins + j), spread, bound);
          count += __builtin_popcount(at_least(load(F32{}, uppers + j), needed));
        }
        task.counts[row + i] += count;
      }
    }
  }

  void run() {
    begin();
    const int64_t n = task.encode.feature_end;
    for (int64_t first = 0; first < n && active > 0; first += kCountedFeatures) {
      const int64_t padded = (n + kFeatureBlock - 1) / kFeatureBlock * kFeatureBlock;
      const int64_t last = first + kCountedFeatures < padded ? first + kCountedFeatures : padded;
      int64_t row = 0;
      count_tiles<kRowTile>(row, first, last);
      count_tiles<kRowTile / 2>(row, first, last);
      count_tiles<2>(row, first, last);
      count_tiles<1>(row, first, last);
      const int64_t counted = active;
      active = 0;
      for (int64_t i = 0; i < counted; ++i) {
        const int64_t count = task.counts[i];
        if (count >= task.k) task.outscored[task.rows[i]] = true;
        // One that has found less than half of what it should have by now will hardly find the rest.
        const bool hopeless = 2 * (count + 1) * n < task.k * last;
        if (count < task.k && !hopeless) keep(i, task.rows[i], task.bounds[i], count);
      }
    }
  }
};

// As torch.maximum and torch.minimum: a NaN on either side wins.
inline float nan_maximum(float a, float b) { return a != a || a > b ? a : b; }
inline float nan_minimum(float a, float b) { return a != a || a < b ? a : b; }

template <class Edit>
void edit_all(float* activations, int64_t rows, const Edit& edit) {
  for (int64_t row = 0; row < rows; ++row) activations[row] = edit(activations[row]);
}

}  // namespace

void score_slots(const SlotScoresTask& task) {
  with_element(task.x.dtype, [&](auto element) { score_slots_of(element, task); });
}

void find_outscored(OutscoredTask& task) {
  widen_rows(task.encode);
  screen_rows(task.encode);
  OutscoredSweep{task}.run();
}

void edit_slots(const EditTask& task) {
  for (int64_t i = 0; i < task.n_edits; ++i) {
    if (task.slots[i] < 0) continue;
    float* activations = task.activations + task.slots[i] * task.stride;
    const float value = task.values[i];
    switch (static_cast<EditOp>(task.ops[i])) {
      case EditOp::kSet:
        edit_all(activations, task.rows, [=](float) { return value; });
        break;
      case EditOp::kAdd:
        edit_all(activations, task.rows, [=](float a) { return a + value; });
        break;
      case EditOp::kScale:
        edit_all(activations, task.rows, [=](float a) { return a * value; });
        break;
      case EditOp::kClampMin:
        edit_all(activations, task.rows, [=](float a) { return nan_maximum(a, value); });
        break;
      case EditOp::kClampMax:
        edit_all(activations, task.rows, [=](float a) { return nan_minimum(a, value); });
        break;
    }
  }
}

}  // namespace SAEREC_TIER
}  // namespace saerec
