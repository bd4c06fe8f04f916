"""Turns the json of pytest-benchmark into the tables of ``results/<machine>.md`` and ``<machine>-steering.md``.

``python benchmarks/report.py JSON FOLDER``; `make bench` calls it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PEER_ROLES = ("torch", "sae library", "search")
MISSING = "–"


@dataclass(frozen=True, order=True)
class Setting:
    """What all ways of a row of a table have in common."""

    source: str
    d: int
    n: int
    k: int
    rows: int
    threads: int

    @property
    def shape(self) -> str:
        return f"{self.d}, {self.n}, {self.k}" if self.k else f"{self.d}, {self.n}"


@dataclass(frozen=True)
class Cell:
    """One way in one setting; times in microseconds a row.

    Attributes:
        extra_bytes: resident memory of a call, where it was measured.
        active_share: of the features, where the activation does not fix it.
    """

    way: str
    role: str
    median: float
    iqr: float
    rounds: int
    extra_bytes: int | None
    active_share: float | None

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.iqr)})"


@dataclass
class Task:
    title: str
    settings: dict[Setting, dict[str, Cell]]

    def ways(self) -> list[str]:
        """In the order in which they first ran."""
        return list(dict.fromkeys(way for cells in self.settings.values() for way in cells))


def render(data: dict[str, Any]) -> str:
    """The report on a run."""
    tasks = read_tasks(data["benchmarks"])
    parts = ["# Benchmarks", describe_machine(data), "## Ratios, smallest to largest", summary_table(tasks.values())]
    for task in tasks.values():
        parts += [f"## {task.title}", ratio_table(task), "### Medians (IQR), µs a row", median_table(task)]
        memory = memory_table(task)
        if memory:
            parts += ["### Peak memory of one call beyond what was resident before it, MiB", memory]
    parts += ["## Floors of the encoder", floor_table(tasks.values())]
    if data.get("not_measured"):
        parts += ["## Not measured", not_measured(data["not_measured"])]
    return "\n\n".join(parts) + "\n"


def read_tasks(benchmarks: Iterable[dict[str, Any]]) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    for benchmark in benchmarks:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        task = tasks.setdefault(info["task"], Task(info["title"], {}))
        setting = Setting(*(info[name] for name in ("source", "d", "n", "k", "rows", "threads")))
        scale = 1e6 / info["rows"]
        task.settings.setdefault(setting, {})[info["way"]] = Cell(
            info["way"],
            info["role"],
            stats["median"] * scale,
            stats["iqr"] * scale,
            stats["rounds"],
            info.get("extra_bytes"),
            info.get("active_share"),
        )
    return tasks


def summary_table(tasks: Iterable[Task]) -> str:
    """The ratios of :func:`ratio_table`, of all shapes together."""
    spans: dict[tuple[str, ...], list[tuple[float | None, ...]]] = defaultdict(list)
    for task in tasks:
        for setting, cells in task.settings.items():
            ours, peer, library, matmul = _compared(cells)
            key = (task.title, setting.source, str(setting.rows), str(setting.threads))
            spans[key].append((_ratio(peer, ours), _ratio(library, ours), _ratio(ours, matmul)))
    rows = []
    for labels, ratios in spans.items():
        known = [[ratio for ratio in column if ratio is not None] for column in zip(*ratios, strict=True)]
        rows.append([*labels, *(f"{min(column):.2f} to {max(column):.2f}" if column else MISSING for column in known)])
    return table(["", "data", "B", "threads", "peer ÷ ours", "library ÷ ours", "ours ÷ matmul"], rows)


def ratio_table(task: Task) -> str:
    """Ours beside the fastest peer, the fastest SAE library and the bare matmul."""
    rows = []
    for setting, cells in task.settings.items():
        ours, peer, library, matmul = _compared(cells)
        active = ours.active_share if ours else None
        rows.append(
            [
                *_setting_columns(setting),
                MISSING if active is None else f"{active:.1%}",
                str(ours) if ours else MISSING,
                *_beside(peer, ours),
                *_beside(library, ours),
                number(matmul.median) if matmul else MISSING,
                two_places(_ratio(ours, matmul)),
            ]
        )
    header = [
        *_SETTING_HEADER,
        "features that fire",
        "ours, µs a row (IQR)",
        "fastest peer",
        "peer ÷ ours",
        "fastest SAE library",
        "library ÷ ours",
        "bare matmul",
        "ours ÷ matmul",
    ]
    return table(header, rows)


def median_table(task: Task) -> str:
    ways = task.ways()
    rows = [
        [*_setting_columns(setting), *(str(cells[way]) if way in cells else MISSING for way in ways)]
        for setting, cells in task.settings.items()
    ]
    return table([*_SETTING_HEADER, *ways], rows)


def memory_table(task: Task) -> str:
    """Empty where no memory was measured."""
    ways = task.ways()
    rows = []
    for setting, cells in task.settings.items():
        measured = {way: cell.extra_bytes for way, cell in cells.items() if cell.extra_bytes is not None}
        if measured:
            mebibytes = (f"{measured[way] / 2**20:.0f}" if way in measured else MISSING for way in ways)
            rows.append([*_setting_columns(setting), *mebibytes])
    return table([*_SETTING_HEADER, *ways], rows) if rows else ""


def floor_table(tasks: Iterable[Task]) -> str:
    """What an encoder that computes every score has to do: the same for a catalogue of n items."""
    settings = sorted({(s.d, s.n, s.rows) for task in tasks for s in task.settings})
    rows = [
        [str(d), str(n), str(rows), number(n * d / 1e3), number(n * d / rows + 8 * d), number(4 * n * d / rows + 8 * d)]
        for d, n, rows in settings
    ]
    header = [
        "d",
        "n",
        "B",
        "thousand multiply-adds a row",
        "bytes a row, int8 weights",
        "bytes a row, float32 weights",
    ]
    note = "Weights are read once a call, a hidden state is read and one written in float32."
    return f"{table(header, rows)}\n\n{note}"


def describe_machine(data: dict[str, Any], explained: str | None = None) -> str:
    """Where and how a run was made; ``explained`` says what the figures are."""
    machine, commit = data["machine_info"], data["commit_info"]
    cpu = machine["cpu"]
    flags = [flag for flag in FLAGS if flag in cpu.get("flags", [])]
    facts = {
        "Command": f"`{machine['command']}`",
        "Date, commit": f"{data['datetime'][:10]}, {commit['id'][:12]}{' + changes' if commit['dirty'] else ''}",
        "CPU": f"{cpu.get('brand_raw', 'unknown')}, family {cpu.get('family')}, model {cpu.get('model')}, "
        f"{machine['cores']} cores",
        "Caches": ", ".join(machine["caches"]) or "unknown",
        "Memory": f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        "Instruction sets": ", ".join(flags) or "unknown",
        "Software": ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f", Linux {machine['kernel']}",
        "BLAS of the peers": ", ".join(machine["blas"]),
        "Environment": ", ".join(f"`{name}={value}`" for name, value in machine["environment"].items())
        or "nothing set",
        "Trained recommender": machine["run"] or "none",
        **{f"Peer {name}": version for name, version in machine["peers"].items()},
    }
    explained = explained or (
        "Every way computes the same function of the same weights and was checked against float64 in this run before "
        "it was timed. Times are medians over rounds (3 where a call takes longer than 0.4 s, 7 to 50 otherwise), in "
        "microseconds a row, with the interquartile range in brackets. Compilation, packing and index building are "
        "not part of them. B is the number of rows of a call; `random` is Gaussian data, `run` the hidden states, "
        "SAE and items of the trained recommender."
    )
    return f"{table(['', ''], list(map(list, facts.items())))}\n\n{explained}"


def not_measured(entries: Iterable[dict[str, str]]) -> str:
    """Cells by reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        by_reason[entry["reason"]].append(entry["cell"])
    lines = []
    for reason, cells in by_reason.items():
        named = ", ".join(f"`{cell}`" for cell in cells[:3])
        more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
        lines.append(f"- {reason}: {named}{more}")
    return "\n".join(lines)


def machine_slug(data: dict[str, Any]) -> str:
    """A file name for the machine: CPU, model number (virtual machines hide the name), cores."""
    machine = data["machine_info"]
    cpu = machine["cpu"]
    name = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", " ", cpu.get("brand_raw", "cpu"), flags=re.IGNORECASE)
    text = f"{name} model {cpu.get('model', 'unknown')} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, without the columns that are missing in every row."""
    kept = [i for i in range(len(header)) if not rows or any(row[i] != MISSING for row in rows)]
    lines = [[header[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def number(value: float) -> str:
    """Short, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def two_places(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


_SETTING_HEADER = ("data", "d, n, k", "B", "threads")


def _setting_columns(setting: Setting) -> list[str]:
    return [setting.source, setting.shape, str(setting.rows), str(setting.threads)]


def _fastest(cells: dict[str, Cell], roles: Sequence[str]) -> Cell | None:
    return min((cell for cell in cells.values() if cell.role in roles), key=lambda cell: cell.median, default=None)


def _compared(cells: dict[str, Cell]) -> tuple[Cell | None, Cell | None, Cell | None, Cell | None]:
    """Ours, the fastest peer, the fastest SAE library, the bare matmul."""
    return (
        _fastest(cells, ("ours",)),
        _fastest(cells, PEER_ROLES),
        _fastest(cells, ("sae library",)),
        _fastest(cells, ("yardstick",)),
    )


def _ratio(numerator: Cell | None, denominator: Cell | None) -> float | None:
    return numerator.median / denominator.median if numerator and denominator else None


def _beside(other: Cell | None, ours: Cell | None) -> tuple[str, str]:
    if other is None:
        return MISSING, MISSING
    ratio = two_places(_ratio(other, ours))
    return f"{other.way}, {number(other.median)}", ratio if ours is None else f"**{ratio}**"


def main() -> None:
    source, folder = map(Path, sys.argv[1:])
    data = json.loads(source.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    # Here, since that module takes its tables from this one.
    from steering_report import TASKS, render_steering

    ops, steering = (
        [one for one in data["benchmarks"] if (one["extra_info"].get("task") in TASKS) == is_steering]
        for is_steering in (False, True)
    )
    for benchmarks, write, suffix in ((ops, render, ""), (steering, render_steering, "-steering")):
        if benchmarks:
            target = folder / f"{machine_slug(data)}{suffix}.md"
            target.write_text(write({**data, "benchmarks": benchmarks}))
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
