// The encoders of one tier: screen a range of features, keep those that may matter, score them exactly.
//
// For a range (a piece of the dictionary whose codes fit the second-level cache) all rows of the task pass, kRowTile at
// a time: the screen leaves their uppers in scratch, then each row picks its candidates while they are still in cache.
// Rows that cannot be screened, and tasks without packed weights, take every feature as a candidate.
#include "kernels.h"
#include "scores-inl.h"
#include "screen-inl.h"
#include "selection-inl.h"
#include "tier.inc"

namespace saerec {
namespace SAEREC_TIER {
namespace {

// What a sink may need of the range at hand.
struct Range {
  int64_t first;
  int64_t count;
  int64_t padded;  // count rounded up to kFeatureBlock; uppers beyond count are -infinity
  bool last;
};

template <class Sink>
void screen_range(const EncodeTask& task, const Range& range, Sink& sink) {
  const int64_t tiles_of_rows = (task.x.rows + kRowTile - 1) / kRowTile;
  CodeStream coming(task, range.first + range.padded, range_features(task.x.cols),
                    range.padded / kFeatureBlock * tiles_of_rows);
  int64_t row = 0;
  const auto tiles = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    for (; row + kRows <= task.x.rows; row += kRows) {
      screen_tile<kRows>(task, row, range.first, range.first + range.count, range.padded, coming);
      for (int i = 0; i < kRows; ++i) {
        if (task.screens[row + i].usable) {
          sink.screened(row + i, task.uppers + i * range.padded);
        } else {
          sink.every(row + i);
        }
      }
    }
  };
  tiles(Number<kRowTile>{});
  tiles(Number<kRowTile / 2>{});
  if (kRowTile > 4) tiles(Number<2>{});
  tiles(Number<1>{});
}

// sink.begin(range), then for every row sink.screened(row, uppers) or sink.every(row).
template <class Sink>
void sweep(const EncodeTask& task, Sink& sink) {
  widen_rows(task);
  if (task.packed != nullptr) screen_rows(task);
  const int64_t step = range_features(task.x.cols);
  for (int64_t first = task.feature_begin; first < task.feature_end; first += step) {
    const int64_t left = task.feature_end - first;
    Range range;
    range.first = first;
    range.count = left < step ? left : step;
    range.padded = (range.count + kFeatureBlock - 1) / kFeatureBlock * kFeatureBlock;
    range.last = left <= step;
    sink.begin(range);
    if (task.packed != nullptr) {
      screen_range(task, range, sink);
    } else {
      for (int64_t row = 0; row < task.x.rows; ++row) sink.every(row);
    }
  }
}

constexpr uint32_t kAllLanes = (1u << kLanes) - 1u;

inline uint32_t lanes_before(int64_t left) { return left < kLanes ? (1u << left) - 1u : kAllLanes; }

// Elements of weight rows beyond those of k candidates above which two steps of scoring beat one.
constexpr int64_t kMinSurplus = 3072;

struct TopKSink {
  TopKTask& task;
  Range range = {};
  float max_margin = 0.0f;  // of all ranges so far
  float guess = 0.5f;       // see group_bound
  // Bounds are raised where a quarter more ranges have been seen than the last time: in between they would rise by
  // little. Few ranges: by each; always by the last.
  int64_t ranges_seen = 0;
  int64_t next_raise = 0;
  bool raises = false;

  void begin(const Range& next) {
    range = next;
    if (task.encode.packed == nullptr) return;
    raises = range.last || ranges_seen >= next_raise;
    ++ranges_seen;
    if (raises) next_raise = ranges_seen + ranges_seen / 4;
    Vec largest = set1(max_margin);
    for (int64_t i = 0; i < range.padded; i += kLanes) {
      largest = maximum(largest, load(F32{}, task.encode.packed->margins + range.first + i));
    }
    max_margin = reduce_max(largest);
  }

  // Calls body(id) for the excluded ids of a row in the range; ranges come in ascending order.
  template <class Body>
  void for_each_excluded(int64_t row, const Body& body) {
    if (task.exclude_offsets == nullptr) return;
    const int64_t* ids = task.exclude_ids + task.exclude_offsets[row];
    const int64_t count = task.exclude_offsets[row + 1] - task.exclude_offsets[row];
    int64_t& cursor = task.exclude_cursor[row];
    while (cursor < count && ids[cursor] < range.first) ++cursor;
    for (; cursor < count && ids[cursor] < range.first + range.count; ++cursor) body(ids[cursor]);
  }

  // How far an upper may lie above its score, for a feature of this margin, in units of the row's screen.
  float uncertainty(const RowScreen& screen, float margin) const {
    return 2.0f * screen.coefficient * margin +
           4.0f * kBiasRounding * screen.inverse_step * task.encode.packed->max_bias;
  }

  void screened(int64_t row, float* uppers) {
    TopKCandidates& candidates = task.candidates;
    for_each_excluded(row, [&](int64_t id) { uppers[id - range.first] = -__builtin_inff(); });
    raise_bound(row, uppers);
    const int64_t end = row * candidates.capacity + candidates.counts[row];
    uint32_t* features = candidates.features + end;
    const int64_t added = append_reaching(features, uppers, range.padded, range.first, candidates.bounds[row]);
    for (int64_t i = 0; i < added; ++i) candidates.values[end + i] = uppers[features[i] - range.first];
    candidates.counts[row] += added;
    const auto too_many = [&] {
      return candidates.counts[row] - candidates.scored[row] >= pending_limit(candidates.k);
    };
    if (!range.last && !too_many()) return;
    prune_pending(row);
    if (range.last || too_many()) score_pending(row);
  }

  void raise_bound(int64_t row, const float* uppers) {
    TopKCandidates& candidates = task.candidates;
    const RowScreen& screen = task.encode.screens[row];
    const int64_t groups = group_count(candidates.k);
    float* maxima = candidates.maxima + row * groups;
    take_maxima(maxima, groups, uppers, range.padded);
    if (!raises) return;
    const float reached = group_bound(maxima, groups, candidates.k, candidates.bounds[row], guess);
    candidates.reached[row] = reached;
    if (reached != -__builtin_inff()) {
      const float bound = reached - uncertainty(screen, max_margin) - absolute(reached) * 8.0f * kRounding;
      if (bound > candidates.bounds[row]) candidates.bounds[row] = bound;
    }
    // Above the marks of what does not take part.
    if (candidates.bounds[row] < -kLargestFloat) candidates.bounds[row] = -kLargestFloat;
  }

  // Drops the pending candidates below the bound of now.
  void prune_pending(int64_t row) {
    TopKCandidates& candidates = task.candidates;
    const int64_t pending = candidates.counts[row] - candidates.scored[row];
    const int64_t begin = row * candidates.capacity + candidates.scored[row];
    float* uppers = candidates.values + begin;
    uint32_t* features = candidates.features + begin;
    const Vec bound = set1(candidates.bounds[row]);
    int64_t kept = 0;
    for (int64_t i = 0; i < pending; i += kLanes) {
      const Vec upper = load(F32{}, uppers + i);
      kept += pack_front(uppers + kept, features + kept, upper, quads_load(features + i),
                         at_least(upper, bound) & lanes_before(pending - i));
    }
    candidates.counts[row] = candidates.scored[row] + kept;
  }

  // The bound so far allows for the uncertainty of the screen twice: of the k-th best, and of each candidate. Scoring
  // those first that reach what k of the uppers reach takes the first away, and with it many of the rows to be read.
  // Needs all candidates of the row pending.
  void score_promising(int64_t row) {
    TopKCandidates& candidates = task.candidates;
    const int64_t pending = candidates.counts[row];
    float* uppers = candidates.values + row * candidates.capacity;
    uint32_t* features = candidates.features + row * candidates.capacity;
    const Vec reached = set1(candidates.reached[row]);
    const auto promising = [&](int64_t i) { return at_least(load(F32{}, uppers + i), reached); };
    const int64_t chosen = score_where(row, features, pending, promising);
    if (chosen >= candidates.k) raise_to(row, kth_largest(task.scores, chosen));
    const Vec bound = set1(candidates.bounds[row]);
    const auto reaching = [&](int64_t i) { return at_least(load(F32{}, uppers + i), bound); };
    score_where(row, features, pending, [&](int64_t i) { return reaching(i) & ~promising(i); });
    int64_t kept = 0;
    for (int64_t i = 0; i < pending; i += kLanes) {
      kept += pack_front(uppers + kept, features + kept, load(F32{}, task.exact + i), quads_load(features + i),
                         reaching(i) & lanes_before(pending - i));
    }
    candidates.counts[row] = kept;
  }

  // task.exact[i] = score of features[i] where bit l of choose(v) says so, i = v + l. Returns how many.
  template <class Choose>
  int64_t score_where(int64_t row, const uint32_t* features, int64_t count, const Choose& choose) {
    LaneIds lanes(0);
    int64_t chosen = 0;
    for (int64_t i = 0; i < count; i += kLanes) {
      chosen += lanes.store_next(task.positions + chosen, choose(i) & lanes_before(count - i));
    }
    for (int64_t i = 0; i < chosen; ++i) task.features[i] = features[task.positions[i]];
    score_features(task.encode, row, task.features, chosen, task.scores);
    for (int64_t i = 0; i < chosen; ++i) task.exact[task.positions[i]] = task.scores[i];
    return chosen;
  }

  // Raises the bound of a row to a score that k of its candidates reach.
  void raise_to(int64_t row, float score) {
    float& bound = task.candidates.bounds[row];
    const float scaled = score * task.encode.screens[row].inverse_step;
    const float lowered = scaled - absolute(scaled) * 8.0f * kRounding;
    if (lowered > bound) bound = lowered;
  }

  float kth_largest(const float* scores, int64_t count) {
    const TopKCandidates& candidates = task.candidates;
    fill_keys(candidates.keys, scores, count);
    return key_to_value(kth_largest_key(candidates.keys, count, candidates.k));
  }

  static float smallest_of(const float* scores, int64_t count) {
    float smallest = scores[0];
    for (int64_t i = 1; i < count; ++i) smallest = scores[i] < smallest ? scores[i] : smallest;
    return smallest;
  }

  void every(int64_t row) {
    TopKCandidates& candidates = task.candidates;
    uint32_t* pending = candidates.features + row * candidates.capacity + candidates.counts[row];
    int64_t added = 0, next = range.first;
    const auto take_until = [&](int64_t end) {
      for (; next < end; ++next) pending[added++] = static_cast<uint32_t>(next);
    };
    for_each_excluded(row, [&](int64_t id) {
      take_until(id);
      next = id + 1;
    });
    take_until(range.first + range.count);
    candidates.counts[row] += added;
    score_pending(row);
  }

  void score_pending(int64_t row) {
    TopKCandidates& candidates = task.candidates;
    const int64_t scored = candidates.scored[row], pending = candidates.counts[row] - scored;
    const int64_t base = row * candidates.capacity;
    const bool screened = task.encode.packed != nullptr && task.encode.screens[row].usable;
    if (screened && scored == 0 && (pending - candidates.k) * task.encode.x.cols > kMinSurplus) {
      score_promising(row);
    } else {
      score_features(task.encode, row, candidates.features + base + scored, pending, candidates.values + base + scored);
    }
    candidates.scored[row] = candidates.counts[row];
    if (range.last && candidates.sorted) {
      sort_row(candidates, row);
      return;
    }
    cut_to_k(candidates, row);
    if (!range.last && screened && candidates.counts[row] == candidates.k) {
      raise_to(row, smallest_of(candidates.values + base, candidates.k));
    }
  }
};

struct ThresholdSink {
  ThresholdTask& task;
  Range range = {};
  bool uniform = false;  // one threshold for all features of the range
  int64_t runs = 0;      // rows of ranges so far

  void begin(const Range& next) {
    range = next;
    const float* thresholds = task.thresholds + range.first;
    const Vec first = set1(thresholds[0]);
    uniform = true;
    for (int64_t i = 0; i < range.count; i += kLanes) {
      const Vec some = load(F32{}, thresholds + i);
      const uint32_t lanes = lanes_before(range.count - i);
      uniform = uniform && (at_least(some, first) & at_least(first, some) & lanes) == lanes;
    }
  }

  // In units of a step, lowered by what that rounds.
  static Vec lowered(Vec threshold, Vec inverse_step) {
    const Vec scaled = mul(threshold, inverse_step);
    const Vec bound = fmadd(maximum(scaled, sub(zero(), scaled)), set1(-8.0f * kRounding), scaled);
    // maximum() takes its second argument in place of a NaN: such a threshold leaves nothing out. Nor does that of
    // -infinity, but for the uppers of -infinity beyond the last feature.
    return maximum(bound, set1(-kLargestFloat));
  }

  void screened(int64_t row, const float* uppers) {
    const Vec inverse_step = set1(task.encode.screens[row].inverse_step);
    const float* thresholds = task.thresholds + range.first;
    if (uniform) {
      const float bound = reduce_max(lowered(set1(thresholds[0]), inverse_step));
      score(row, append_reaching(task.features, uppers, range.padded, range.first, bound));
      return;
    }
    uint32_t* features = task.features;
    LaneIds lanes(range.first);
    int64_t count = 0;
    for (int64_t i = 0; i < range.padded; i += kLanes) {
      const Vec bound = lowered(load(F32{}, thresholds + i), inverse_step);
      count += lanes.store_next(features + count, at_least(load(F32{}, uppers + i), bound));
    }
    score(row, count);
  }

  void every(int64_t row) {
    for (int64_t i = 0; i < range.count; ++i) task.features[i] = static_cast<uint32_t>(range.first + i);
    score(row, range.count);
  }

  void score(int64_t row, int64_t count) {
    score_features(task.encode, row, task.features, count, task.values);
    ThresholdLog& log = *task.log;
    if (log.capacity - log.count < count + kLanes) grow_log(log, count);
    // "Not <=": a NaN stays visible.
    if (uniform) {
      const Vec threshold = set1(task.thresholds[range.first]);
      for (int64_t i = 0; i < count; i += kLanes) {
        const Vec value = load(F32{}, task.values + i);
        const uint32_t active = ~at_least(threshold, value) & lanes_before(count - i);
        log.count +=
            pack_front(log.values + log.count, log.features + log.count, value, quads_load(task.features + i), active);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        log.features[log.count] = task.features[i];
        log.values[log.count] = task.values[i];
        log.count += !(task.values[i] <= task.thresholds[task.features[i]]);
      }
    }
    log.ends[runs++] = log.count;
  }
};

}  // namespace

void pack_blocks(PackTask& task) {
  with_element(task.weight.dtype, [&](auto element) {
    for (int64_t block = task.block_begin; block < task.block_end; ++block) pack_block(element, task, block);
  });
}

void encode_topk(TopKTask& task) {
  TopKSink sink{task};
  sweep(task.encode, sink);
  if (task.encode.feature_begin >= task.encode.feature_end) {
    for (int64_t row = 0; row < task.encode.x.rows; ++row) sort_row(task.candidates, row);
  }
}

void encode_threshold(ThresholdTask& task) {
  ThresholdSink sink{task};
  sweep(task.encode, sink);
}

void encode_features(FeatureListTask& task) {
  widen_rows(task.encode);
  for (int64_t row = 0; row < task.encode.x.rows; ++row) {
    score_features(task.encode, row, task.features, task.count, task.out + row * task.count);
  }
}

}  // namespace SAEREC_TIER
}  // namespace saerec
