"""What ``make gpu`` found, as its processes note it down event by event, and the report made of that."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

OURS = "saerec_fast"
YARDSTICK = "torch.addmm, bfloat16 (the encoder alone)"


@dataclass(frozen=True)
class Rates:
    """Measured ceilings of the device: bytes a second of a large copy, operations a second of large products."""

    bytes: float
    operations: dict[torch.dtype, float]

    def work(self, moved: float, operations: float, dtype: torch.dtype) -> Work:
        """With the seconds that no program of so many bytes and operations goes below."""
        return Work(moved, operations, max(moved / self.bytes, operations / self.operations[dtype]))


@dataclass(frozen=True)
class Work:
    """What has to be done at least: bytes through memory, operations, and the seconds that these take."""

    moved: float
    operations: float
    seconds: float


NO_WORK = Work(0.0, 0.0, 0.0)


@dataclass
class Row:
    way: str
    work: Work
    seconds: float | None = None  # on the device, a median
    call_seconds: float | None = None  # of the host, where calls follow each other
    peak: int | None = None  # bytes on the device during a call, beyond those before it
    error: float | None = None
    note: str = ""
    failed: bool = False  # it was tried, and raised or was wrong


@dataclass
class Section:
    title: str
    work: Work
    rows: list[Row] = field(default_factory=list)


class Journal:
    """What became of each step and each way, a line of JSON for each event.

    It is also how one process learns what another has done, and takes over when that one has died. Events: ``facts``
    (of the machine, by name), ``step``, ``rates``, ``begun`` (section, way; an empty way while a section is prepared),
    ``row``, ``finished`` and ``left_out`` (section). A section has two names: that of the call that measures it, known
    before its title is.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        self.read()

    def read(self) -> None:
        """Also what another process has written; a line that it did not finish does not count."""
        if self.path is None or not self.path.exists():
            return
        self.events = []
        for line in self.path.read_text().splitlines(keepends=True):
            with suppress(json.JSONDecodeError):
                self.events += [json.loads(line)] if line.endswith("\n") else []

    def add(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})
        if self.path is not None:
            # A process that died may have left half a line.
            torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
            with self.path.open("a") as file:
                file.write("\n" * torn + json.dumps(self.events[-1]) + "\n")

    def add_row(self, section: str, row: Row) -> None:
        self.add("row", section=section, row=asdict(row))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [found for found in self.events if found["event"] == event]

    def has(self, section: str, way: str) -> bool:
        return any((found["section"], found["row"]["way"]) == (section, way) for found in self.named("row"))

    def is_closed(self, section: str) -> bool:
        """Whether a section was measured, or could not be prepared."""
        return any(found["section"] == section for found in self.named("finished")) or self.has(section, "")

    def close(self, why: str, failed: bool = True) -> None:
        """Notes why the process that wrote the last event came no further."""
        if self.events and self.events[-1]["event"] == "begun":
            section, way = self.events[-1]["section"], self.events[-1]["way"]
            self.add_row(section, Row(way, NO_WORK, note=why, failed=failed))

    def rates(self) -> Rates | None:
        for event in self.named("rates"):
            return Rates(event["bytes"], {getattr(torch, n): o for n, o in event["operations"].items()})
        return None

    def facts(self) -> dict[str, str]:
        return {name: value for event in self.named("facts") for name, value in event["facts"].items()}

    def rows(self) -> dict[str, list[Row]]:
        """Of each section."""
        sections: dict[str, list[Row]] = {}
        for event in self.named("row"):
            row = Row(**{**event["row"], "work": Work(**event["row"]["work"])})
            sections.setdefault(event["section"], []).append(row)
        return sections

    def failures(self) -> list[str]:
        """Steps and ways that were tried in vain."""
        steps = [f"{step['name']}: {step['problem']}" for step in self.named("step") if step["problem"]]
        return steps + [
            f"{section}: {row.way or 'preparing it'}: {row.note}"
            for section, rows in self.rows().items()
            for row in rows
            if row.failed
        ]


def goals(rows: dict[str, list[Row]]) -> list[tuple[str, str, float | None, bool]]:
    """Section, goal, what was measured, whether that meets it; of the sections that the project's goals speak of."""
    found: list[tuple[str, str, float | None, bool]] = []
    for title, ways in rows.items():
        times = {row.way: row.seconds for row in ways if row.seconds is not None}
        ours = min((seconds for way, seconds in times.items() if way.startswith(OURS)), default=None)
        peers = [seconds for way, seconds in times.items() if not way.startswith(OURS) and way != YARDSTICK]

        def ratio(numerator: float | None, denominator: float | None) -> float | None:
            return numerator / denominator if numerator and denominator else None

        if title.startswith("Encode + decode, 65536 rows"):
            faster, share = ratio(min(peers, default=None), ours), ratio(ours, times.get(YARDSTICK))
            found.append((title, "at least 5 × as fast as the fastest peer", faster, (faster or 0.0) >= 5))
            found.append((title, "at most 2 × the bfloat16 addmm", share, share is not None and share <= 2))
        elif title.startswith("Training step"):
            faster = ratio(times.get("sparsify"), ours)
            found.append((title, "at least 4 × as fast as sparsify", faster, (faster or 0.0) >= 4))
        elif title.startswith("Serving steer, 64 rows, (d, n, k) = (64, 2048,"):
            micro = None if ours is None else ours * 1e6
            found.append((title, "under 12 µs in a CUDA graph", micro, micro is not None and micro < 12))
    return found


EXPLANATION = """\
Times are medians on the device; serving calls are replayed from a CUDA graph of 20, whose weights stay in the
second-level cache. *call* is the host's time a call without a graph. The floor of a way is the larger of its bytes over
the copy rate and its operations over the rate of products; the yardstick, which stores all scores, has its own. *peak*
is the device memory of a call beyond what was there before it. *error* is ‖out − truth‖ / ‖truth‖ against float64 in
the same run, without rows in which rounding decides about the k-th feature; a wrong way has no time. PyTorch in
bfloat16 rounds its scores before it selects, and is allowed the error that this makes; so is sparsify, which multiplies
in bfloat16 whatever it is given. *tuned*: with the configurations in the note, which must give the bits of the default.

*OpenAI's design, re-implemented*: dense product, torch.topk and Triton kernels around the sparse activations, as
published with arXiv 2406.04093. Not OpenAI's code, which no package index has, but written anew after the description
(`benchmarks/gpu_openai.py`)."""


def report(machine: str, commit: str, journal: Journal) -> str:
    """As far as the journal goes; after each event there is a whole one."""
    facts, sections = journal.facts(), journal.rows()
    parts = [f"# GPU kernels on {machine}", f"`make gpu` at commit {commit}."]
    if facts:
        parts.append("; ".join(f"{name} {value}" for name, value in facts.items()) + ".")
    rates = journal.rates()
    if rates is not None:
        products = [f"{name_of(t)} products {rate / 1e12:.3g} TFLOP/s" for t, rate in rates.operations.items()]
        copy = f"copy {rates.bytes / 1e12:.3g} TB/s (bytes read and written)"
        parts.append(f"Measured ceilings: {', '.join([copy, *products])}.")
    steps = journal.named("step")
    if steps:
        cells = [[s["name"], f"{s['seconds']:.0f}", s["problem"] or "passed", s["summary"]] for s in steps]
        parts.append(table(["step", "s", "", "last line"], cells))
    if journal.failures():
        parts.append("## What failed\n\n" + "\n".join(f"- {escaped(failure)}" for failure in journal.failures()))
    goal_rows = goals(sections)
    if goal_rows:
        cells = [
            [
                title,
                goal,
                "–" if value is None else f"{value:.3g}",
                "" if value is None else ("met" if met else "short"),
            ]
            for title, goal, value, met in goal_rows
        ]
        parts.append("## Goals\n\n" + table(["section", "goal", "measured", ""], cells))
    if sections:
        parts.append(EXPLANATION)
    header = ["way", "µs", "floor µs", "MB", "GFLOP", "× floor", "peak MB", "call µs", "error", ""]
    parts += [f"## {title}\n\n" + table(header, [row_cells(row) for row in rows]) for title, rows in sections.items()]
    left_out = [event["section"] for event in journal.named("left_out")]
    if left_out:
        parts.append("Left out, since the time was up: " + "; ".join(left_out) + ".")
    parts += [
        f"## Output of a step that failed: {step['name']}\n\n```\n{step['output']}\n```"
        for step in steps
        if step["problem"] and step["output"]
    ]
    return "\n\n".join(parts) + "\n"


def row_cells(row: Row) -> list[str]:
    work = row.work
    return [
        row.way,
        micros(row.seconds),
        *(micros(work.seconds), f"{work.moved / 1e6:.3g}", f"{work.operations / 1e9:.3g}"),
        "–" if row.seconds is None or not work.seconds else f"{row.seconds / work.seconds:.1f}",
        "–" if row.peak is None else f"{row.peak / 1e6:.3g}",
        micros(row.call_seconds),
        "–" if row.error is None else f"{row.error:.1e}",
        row.note,
    ]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in rows])


def escaped(text: str) -> str:
    """As one line that no table takes for several cells."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def micros(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:.3g}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
