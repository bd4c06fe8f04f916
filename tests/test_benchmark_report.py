from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import report
import steering_report
from scipy.stats import binom


def benchmark(way: str, role: str, seconds: float, **info: Any) -> dict[str, Any]:
    """As pytest-benchmark writes one."""
    setting = {"source": "random", "d": 64, "n": 2048, "k": 32, "rows": 64, "threads": 2}
    return {
        "extra_info": {"task": "topk", "title": "Encode + decode", "way": way, "role": role, **setting, **info},
        "stats": {"median": seconds, "iqr": seconds / 10, "rounds": 7},
    }


@pytest.fixture
def data() -> dict[str, Any]:
    return {
        "datetime": "2026-01-02T03:04:05",
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "machine_info": {
            "cpu": {"brand_raw": "Intel(R) Xeon(R) CPU @ 2.00GHz", "family": 6, "model": 85, "flags": ["avx2"]},
            "cores": 2,
            "caches": ["L1 Data 32K"],
            "memory_bytes": 8 << 30,
            "kernel": "6.1",
            "versions": {"torch": "2.13.0"},
            "peers": {"faiss": "1.15.1", "sparsify": "not available: no module"},
            "blas": [],
            "environment": {},
            "command": "make bench",
            "run": None,
        },
        "benchmarks": [
            benchmark("saerec_fast", "ours", 64e-6, extra_bytes=3 << 20),
            benchmark("saerec_functional", "variant", 1e-6),
            benchmark("eager", "torch", 256e-6),
            benchmark("library", "sae library", 640e-6),
            benchmark("matmul", "yardstick", 128e-6),
            benchmark("saerec_fast", "ours", 64e-6, rows=1),
            benchmark("matmul", "yardstick", 32e-6, rows=1),
        ],
        "not_measured": [{"cell": f"test_topk[{i}]", "reason": "no such library"} for i in range(5)],
    }


def columns(table: str, row: int) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return dict(zip(lines[0], lines[2 + row], strict=True))


def test_ratios_are_per_row_and_leave_variants_out(data: dict[str, Any]) -> None:
    table = report.ratio_table(report.read_tasks(data["benchmarks"])["topk"])
    found = columns(table, 0)
    assert found["ours, µs a row (IQR)"] == "1.00 (0.100)"
    assert found["fastest peer"] == "eager, 4.00"
    assert found["peer ÷ ours"] == "**4.00**"
    assert found["fastest SAE library"] == "library, 10.00"
    assert found["library ÷ ours"] == "**10.00**"
    assert found["ours ÷ matmul"] == "0.50"


def test_what_is_missing_leaves_a_dash(data: dict[str, Any]) -> None:
    task = report.read_tasks(data["benchmarks"])["topk"]
    found = columns(report.ratio_table(task), 1)
    assert found["fastest peer"] == found["peer ÷ ours"] == report.MISSING
    assert found["ours ÷ matmul"] == "2.00"
    assert columns(report.median_table(task), 1)["eager"] == report.MISSING
    memory = columns(report.memory_table(task), 0)
    assert memory["saerec_fast"] == "3"
    assert "eager" not in memory


def test_summary_spans_the_settings(data: dict[str, Any]) -> None:
    data["benchmarks"] += [
        benchmark("saerec_fast", "ours", 64e-6, n=4096),
        benchmark("eager", "torch", 128e-6, n=4096),
    ]
    found = columns(report.summary_table(report.read_tasks(data["benchmarks"]).values()), 0)
    assert found["B"] == "64"
    assert found["peer ÷ ours"] == "2.00 to 4.00"


def test_report_names_machine_missing_peers_and_reasons(data: dict[str, Any]) -> None:
    text = report.render(data)
    assert "not available: no module" in text
    assert "0123456789ab + changes" in text
    assert "no such library: `test_topk[0]`, `test_topk[1]`, `test_topk[2]` and 2 more" in text
    assert report.machine_slug(data) == "intel-xeon-model-85-2-cores"


@pytest.mark.parametrize(("value", "text"), [(0.12345, "0.123"), (1.234, "1.23"), (99.99, "99.99"), (123.4, "123")])
def test_numbers(value: float, text: str) -> None:
    assert report.number(value) == text


def steered(way: str, added: float, **info: Any) -> dict[str, Any]:
    """As the benchmark of steering records one, in which forward pass and scoring take 1 ms."""
    plan = {"host": "gpt2", "activation": "relu", "edits": "edit", "mode": "delta", "positions": "all"}
    interval = {"added": added, "added_low": added - 2e-6, "added_high": added + 2e-6, "unsteered": 1e-3}
    return {
        "extra_info": {"task": "steering", "way": way, **plan, "rows": 32, "threads": 2, **interval, **info},
        "stats": {"median": 1e-3},
    }


def test_added_time_is_shown_with_its_share_and_beside_the_others() -> None:
    cells = steering_report.read_added(
        [steered("saerec_fast", 20e-6), steered("nnsight", 500e-6), steered("saerec_fast", -1e-6, rows=1)]
    )
    found = columns(steering_report.added_table(cells), 0)
    assert found["saerec_fast"] == "20.00 (18.00 to 22.00)"
    assert found["unsteered"] == "1000"
    assert found["share that ours adds"] == "2.00 %"
    assert columns(steering_report.added_table(cells), 1)["saerec_fast"] == "−1.00 (−3.00 to 1.00)"
    assert columns(steering_report.ratio_table(cells), 0)["nnsight"] == "25.0"


def test_ratio_to_what_is_lost_in_the_noise_is_a_bound() -> None:
    cells = steering_report.read_added([steered("saerec_fast", -1e-6), steered("nnsight", 50e-6)])
    assert columns(steering_report.ratio_table(cells), 0)["nnsight"] == "> 50.0"


@pytest.mark.parametrize(
    ("added", "info", "goal", "verdict"),
    [
        (30e-6, {}, "delta plan of 8 edits, threshold SAE, all positions", "met"),
        (31e-6, {}, "delta plan of 8 edits, threshold SAE, all positions", "short"),
        (31e-6, {"activation": "batchtopk"}, "delta plan of 8 edits, threshold SAE, all positions", "short"),
        (31e-6, {"rows": 1}, "delta plan of 8 edits, threshold SAE, all positions, B = 1", "short"),
        (9e-6, {"edits": "add", "positions": "last"}, "add plan", "met"),
        (11e-6, {"edits": "add"}, "add plan", "short"),
        (29e-6, {"edits": "add", "rows": 1}, "add plan, B = 1", "met"),
        (51e-6, {"activation": "topk", "positions": "last"}, "TopK set plan, last position", "short"),
        (249e-6, {"activation": "topk"}, "TopK set plan, all positions", "met"),
        (151e-6, {"activation": "topk", "rows": 1}, "TopK set plan, all positions, B = 1", "short"),
    ],
)
def test_goals(added: float, info: dict[str, Any], goal: str, verdict: str) -> None:
    cells = steering_report.read_added([steered("saerec_fast", added, **info)])
    found = columns(steering_report.goal_details(cells), 0)
    assert (found["goal"], found["verdict"]) == (goal, verdict)
    assert len(steering_report.goal_details(cells).splitlines()) == 3
    summary = steering_report.goal_table(cells)
    row = next(line for line in summary.splitlines() if line.startswith(f"| {goal} |"))
    assert ("short in 1" in row) == (verdict == "short")


@pytest.mark.parametrize(("added", "certain"), [(31e-6, 0), (33e-6, 1)])
def test_goals_that_are_missed_for_certain(added: float, certain: int) -> None:
    cells = steering_report.read_added([steered("saerec_fast", added)])
    assert f"short in 1, for certain in {certain}" in steering_report.goal_table(cells)
    found = columns(steering_report.goal_details(cells), 0)
    assert found["95 % interval"] == f"{(added - 2e-6) / 1e-3:.2%} to {(added + 2e-6) / 1e-3:.2%}".replace("%", " %")


@pytest.mark.parametrize(("added", "interval"), [(20e-6, "27.8 × to 22.7 ×"), (1e-6, "∞ to 166.7 ×")])
def test_intervals_of_ratios(added: float, interval: str) -> None:
    cells = steering_report.read_added([steered("saerec_fast", added), steered("nnsight", 500e-6)])
    row = next(row for row in steering_report.goal_details(cells).splitlines() if "nnsight" in row)
    assert f"| {interval} |" in row


@pytest.mark.parametrize("count", [1, 5, 10, 80, 250])
def test_the_interval_of_a_median_holds_it_in_95_of_100_cases(count: int) -> None:
    low, high = steering_report.interval_of_median([float(rank) for rank in range(count)][::-1])
    # The median lies between ranks low and high where so many values, and no fewer, are below it.
    held = binom.cdf(high, count, 0.5) - binom.cdf(low, count, 0.5)
    assert held > 0.94 or (low, high) == (0, count - 1)
    narrower = binom.cdf(high - 1, count, 0.5) - binom.cdf(low + 1, count, 0.5)
    assert narrower < 0.95


@pytest.mark.parametrize(
    ("mode", "times", "verdict"), [("delta", 20, "met"), ("delta", 19, "short"), ("reconstruct", 4, "short")]
)
def test_goals_beside_nnsight(mode: str, times: float, verdict: str) -> None:
    cells = steering_report.read_added(
        [steered("saerec_fast", 8e-6, mode=mode), steered("nnsight", times * 8e-6, mode=mode)]
    )
    rows = steering_report.goal_details(cells).splitlines()
    assert any("nnsight" in row and row.endswith(f"| {verdict} |") for row in rows)


def test_one_report_leaves_the_other_alone(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = report.machine_slug(data)
    predictor = {"rows": 1, "steered": True, "threads": 4, "calls": 100, "requests_per_second": 800.0}
    served = {"extra_info": {"task": "predictor", **predictor, "p50": 5e-3, "p99": 9e-3}, "stats": {"median": 1.0}}
    for benchmarks in (data["benchmarks"], [steered("saerec_fast", 20e-6), served]):
        source = tmp_path / "run.json"
        source.write_text(json.dumps({**data, "benchmarks": benchmarks}))
        monkeypatch.setattr("sys.argv", ["report.py", str(source), str(tmp_path / "results")])
        report.main()
    ops, steering = ((tmp_path / "results" / f"{name}{suffix}.md").read_text() for suffix in ("", "-steering"))
    assert "Encode + decode" in ops
    assert "Predictor" not in ops
    assert "| 1 | yes | 4 | 100 | 800 | 5.00 | 9.00 |" in steering
    assert "no such library" in steering
