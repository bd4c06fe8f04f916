from __future__ import annotations

from typing import Any

import pytest
import report


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
