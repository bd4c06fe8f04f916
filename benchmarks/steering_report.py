"""Tables of what steering adds to forward pass and scoring, and of the predictor; the goals beside the figures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from report import MISSING, describe_machine, not_measured, number, table

TASKS = ("steering", "predictor")
OURS = "saerec_fast"
# A threshold autoencoder scores the edited features alone.
THRESHOLDS = ("relu", "jumprelu", "batchtopk")
_HEADER = ("model", "SAE", "plan", "B", "threads")


@dataclass(frozen=True, order=True)
class Setting:
    """What the ways of a row have in common."""

    host: str
    activation: str
    edits: str
    mode: str
    positions: str
    rows: int
    threads: int

    @property
    def columns(self) -> list[str]:
        plan = f"{self.edits}, {self.mode}, {self.positions}"
        return [self.host, self.activation, plan, str(self.rows), str(self.threads)]


@dataclass(frozen=True)
class Added:
    """Seconds a call: the median over rounds of what a way adds, its 95 % interval, and the unsteered time."""

    median: float
    low: float
    high: float
    unsteered: float

    @property
    def share(self) -> float:
        return self.median / self.unsteered

    def __str__(self) -> str:
        return f"{microseconds(self.median)} ({microseconds(self.low)} to {microseconds(self.high)})"


Cells = dict[Setting, dict[str, Added]]


@dataclass(frozen=True)
class Goal:
    """Something the added time has to reach in every setting that it applies to.

    Attributes:
        title: in words.
        applies: to a setting.
        measured: from the ways of a setting; ``None`` where it was not measured.
        limit: what is to be reached.
        at_least: whether ``limit`` is the smallest value that will do, rather than the largest.
        unit: writes a value.
    """

    title: str
    applies: Callable[[Setting], bool]
    measured: Callable[[dict[str, Added]], float | None]
    limit: float
    at_least: bool
    unit: Callable[[float], str]

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def best_and_worst(self, ways: dict[str, Added]) -> tuple[float, float]:
        """At the ends of the interval of our added time; a ratio to an end that is not above 0 has no bound."""
        ours = ways[OURS]
        ends = [
            self.measured({**ways, OURS: replace(ours, median=end, low=end, high=end)}) for end in (ours.low, ours.high)
        ]
        best, worst = (math.inf if end is None else end for end in ends)
        return best, worst


def _share(ways: dict[str, Added]) -> float | None:
    return ways[OURS].share if OURS in ways else None


def _seconds(ways: dict[str, Added]) -> float | None:
    return ways[OURS].median if OURS in ways else None


def _beside_nnsight(ways: dict[str, Added]) -> float | None:
    return ratio(ways.get("nnsight"), ways.get(OURS))


def interval_of_median(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval, whatever the distribution: the number of values below the median is binomial."""
    in_order, count = sorted(values), len(values)
    below = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2))
    return in_order[below], in_order[-1 - below]


def ratio(other: Added | None, ours: Added | None) -> float | None:
    """How many times as much the other adds; where ours cannot be told from nothing, at least so many times."""
    if other is None or ours is None:
        return None
    least = ours.median if ours.median > 0 else ours.high
    return other.median / least if least > 0 else None


def microseconds(seconds: float) -> str:
    sign = "−" if seconds < 0 else ""
    return sign + number(abs(seconds) * 1e6)


def _microseconds_unit(seconds: float) -> str:
    return f"{microseconds(seconds)} µs"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _times(value: float) -> str:
    return "∞" if value == math.inf else f"{value:.1f} ×"


def _adds(setting: Setting) -> bool:
    return setting.edits == "add"


def _edits_of_threshold(setting: Setting) -> bool:
    """A delta plan at all positions, by an SAE whose features are independent."""
    return (setting.edits, setting.mode, setting.positions) == ("edit", "delta", "all") and (
        setting.activation in THRESHOLDS
    )


def _edits_of_topk(setting: Setting, positions: str) -> bool:
    return (setting.edits, setting.mode) == ("edit", "delta") and (
        (setting.activation, setting.positions) == ("topk", positions)
    )


GOALS = (
    Goal("add plan", lambda s: _adds(s) and s.rows > 1, _share, 0.01, False, _percent),
    Goal(
        "delta plan of 8 edits, threshold SAE, all positions",
        lambda s: _edits_of_threshold(s) and s.rows > 1,
        _share,
        0.03,
        False,
        _percent,
    ),
    Goal(
        "TopK set plan, last position",
        lambda s: _edits_of_topk(s, "last") and s.rows > 1,
        _share,
        0.05,
        False,
        _percent,
    ),
    Goal(
        "TopK set plan, all positions",
        lambda s: _edits_of_topk(s, "all") and s.rows > 1,
        _share,
        0.25,
        False,
        _percent,
    ),
    Goal("add plan, B = 1", lambda s: _adds(s) and s.rows == 1, _seconds, 30e-6, False, _microseconds_unit),
    Goal(
        "delta plan of 8 edits, threshold SAE, all positions, B = 1",
        lambda s: _edits_of_threshold(s) and s.rows == 1,
        _seconds,
        30e-6,
        False,
        _microseconds_unit,
    ),
    Goal(
        "TopK set plan, all positions, B = 1",
        lambda s: _edits_of_topk(s, "all") and s.rows == 1,
        _seconds,
        150e-6,
        False,
        _microseconds_unit,
    ),
    Goal(
        "nnsight + dictionary_learning ÷ ours, ReLU delta plan",
        lambda s: _edits_of_threshold(s) and s.activation == "relu",
        _beside_nnsight,
        20.0,
        True,
        _times,
    ),
    Goal(
        "nnsight + dictionary_learning ÷ ours, reconstruct, all positions",
        lambda s: (s.mode, s.positions) == ("reconstruct", "all"),
        _beside_nnsight,
        5.0,
        True,
        _times,
    ),
)


def render_steering(data: dict[str, Any]) -> str:
    """The report on a run of the benchmarks of steering and of the predictor."""
    cells = read_added(data["benchmarks"])
    predictions = [one for one in data["benchmarks"] if one["extra_info"].get("task") == "predictor"]
    parts = ["# Steering", describe_machine(data, _EXPLAINED)]
    if cells:
        parts += ["## Goals", goal_table(cells), "## Goals, setting by setting", goal_details(cells)]
        parts += ["## Added time, µs a call (95 % interval)", added_table(cells)]
        parts += ["## Added time of the others ÷ ours", ratio_table(cells)]
    if predictions:
        parts += ["## Predictor", predictor_table(predictions)]
    if data.get("not_measured"):
        parts += ["## Not measured", not_measured(data["not_measured"])]
    return "\n\n".join(parts) + "\n"


def read_added(benchmarks: Iterable[dict[str, Any]]) -> Cells:
    cells: Cells = defaultdict(dict)
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if info.get("task") == "steering":
            setting = Setting(
                *(info[name] for name in ("host", "activation", "edits", "mode", "positions", "rows", "threads"))
            )
            cells[setting][info["way"]] = Added(info["added"], info["added_low"], info["added_high"], info["unsteered"])
    return dict(cells)


def goal_table(cells: Cells) -> str:
    """Every goal with the best and the worst of the settings it applies to."""
    rows = []
    for goal in GOALS:
        measured = _measured(goal, cells)
        values = [value for _, value in measured]
        best_first = sorted(values, reverse=goal.at_least)
        short = [setting for setting, value in measured if not goal.met(value)]
        certain = sum(not goal.met(goal.best_and_worst(cells[setting])[0]) for setting in short)
        verdict = MISSING if not values else f"short in {len(short)}, for certain in {certain}" if short else "met"
        rows.append(
            [
                goal.title,
                ("≥ " if goal.at_least else "≤ ") + goal.unit(goal.limit),
                goal.unit(best_first[0]) if values else MISSING,
                goal.unit(best_first[-1]) if values else MISSING,
                str(len(values)),
                verdict,
            ]
        )
    return table(["goal", "limit", "best", "worst", "settings", "verdict"], rows)


def goal_details(cells: Cells) -> str:
    rows = [
        [
            goal.title,
            setting.host,
            setting.activation,
            setting.positions,
            str(setting.rows),
            str(setting.threads),
            goal.unit(value),
            " to ".join(map(goal.unit, goal.best_and_worst(cells[setting]))),
            "met" if goal.met(value) else "short",
        ]
        for goal in GOALS
        for setting, value in _measured(goal, cells)
    ]
    header = ["goal", "model", "SAE", "positions", "B", "threads", "measured", "95 % interval", "verdict"]
    return table(header, rows)


def added_table(cells: Cells) -> str:
    ways = _ways(cells)
    rows = []
    for setting, added in cells.items():
        ours = added.get(OURS)
        one = ours or next(iter(added.values()))
        rows.append(
            [
                *setting.columns,
                microseconds(one.unsteered),
                _percent(ours.share) if ours else MISSING,
                *(str(added[way]) if way in added else MISSING for way in ways),
            ]
        )
    return table([*_HEADER, "unsteered", "share that ours adds", *ways], rows)


def ratio_table(cells: Cells) -> str:
    others = [way for way in _ways(cells) if way != OURS]
    rows = []
    for setting, added in cells.items():
        ours = added.get(OURS)
        ratios = [ratio(added.get(way), ours) for way in others]
        # Where ours is lost in the noise the ratio is a bound.
        bound = "> " if ours is not None and ours.median <= 0 else ""
        if any(value is not None for value in ratios):
            texts = (MISSING if value is None else f"{bound}{value:.1f}" for value in ratios)
            rows.append([*setting.columns, *texts])
    return table([*_HEADER, *others], rows)


def predictor_table(benchmarks: Iterable[dict[str, Any]]) -> str:
    rows = []
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        rows.append(
            [
                str(info["rows"]),
                "yes" if info["steered"] else "no",
                str(info["threads"]),
                str(info["calls"]),
                number(info["requests_per_second"]),
                *(number(1e3 * info[name]) for name in ("p50", "p99")),
            ]
        )
    header = ["requests a call", "edits", "threads", "calls", "requests a second", "p50, ms", "p99, ms"]
    return f"{table(header, rows)}\n\nTimes are of a call, from asking to answer."


def _measured(goal: Goal, cells: Cells) -> list[tuple[Setting, float]]:
    """The goals are about models of fixed size, so that a trained run, which has its own, is left out."""
    found = []
    for setting, ways in cells.items():
        value = goal.measured(ways) if setting.host != "run" and goal.applies(setting) else None
        if value is not None:
            found.append((setting, value))
    return found


def _ways(cells: Cells) -> list[str]:
    return list(dict.fromkeys(way for added in cells.values() for way in added))


_EXPLAINED = (
    "Every way makes the same edits to the same hidden states, and its recommendations were compared with those of the"
    " reference in float64 in this run before it was timed. Blocks of calls alternate between a recommender with the "
    "plan and one without, which share their parameters; each steered block is compared with the mean of the two "
    "unsteered ones around it. Figures are medians of these differences, in microseconds a call (forward pass, scores "
    "of the last position, the 10 best items), with their 95 % confidence interval in brackets, by order statistics. B"
    " is the number of sequences of a call, each of the model's full length. `gpt2` and `rectools` are Hugging Face's "
    "GPT-2 and RecTools' SASRec with random weights (d = 64, 2 layers, 2 heads, 50 positions, 3417 items; SAE with n ="
    " 2048 features of which about 32 fire), `run` is the trained recommender; with `-compiled`, both copies ran under "
    "`torch.compile`. `second_copy` has no plan either: how far the comparison itself is off. Plans: `add`, 8 features "
    "added to; `edit`, 4 set and 4 scaled; `set`, one set; `own`, `edit` with other features and values in each "
    "sequence, plans made within the call."
)
