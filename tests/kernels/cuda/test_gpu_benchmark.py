"""benchmarks/gpu.py on the CPU: the script that `make gpu` ends with, with the CUDA kernel emulated."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch

from saerec_fast.kernels import cuda


def test_a_dry_run_writes_the_report(emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "available", lambda: "")
    monkeypatch.setattr(gpu, "usable", lambda backend: f"no {backend} here")
    gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-a-dry-run.md")
    text = path.read_text()
    assert emulated.emulation.shapes[-1].encodes
    for title in ("Serving steer", "Encode + decode", "Training step"):
        assert f"## {title}, 6 rows, (d, n, k) = (8, 40, 4), float32" in text
    assert text.count("Floor ") == 3
    # Way, time, multiple of the floor, time of the host, error, note.
    timed = re.findall(
        r"^\| ([^|]+) \| [\d.e+]+ \| [\d.]+ \| (?:[\d.e+]+|–) \| ([\d.e-]+|–) \|  \|$", text, re.MULTILINE
    )
    errors = dict(timed)
    assert len(timed) == 7
    assert float(errors["saerec_fast, CUDA C++"]) < 1e-5
    for op, backend, sections in (("steer", "cuda", 1), ("steer", "triton", 1), ("reconstruct", "triton", 2)):
        row = f"| saerec_fast.{op}, backend {backend} | – | – | – | – | no {backend} here |"
        assert text.count(row) == sections


@pytest.mark.parametrize("wrong", [float("nan"), 2.0])
def test_a_wrong_way_has_no_time(wrong: float) -> None:
    section = gpu.Section("title", 1.0, 1.0, 1.0)
    bench = gpu.Bench("cpu")
    bench.measure(section, "a", lambda: None, lambda _: wrong, 1.0, graph=False)
    bench.measure(section, "b", lambda: None, lambda _: 0.5, 1.0, graph=False)
    assert [(row.seconds is None, row.note) for row in section.rows] == [(True, "wrong"), (False, "")]


def test_a_way_that_fails_leaves_its_reason() -> None:
    section = gpu.Section("title", 1.0, 1.0, 1.0)
    gpu.Bench("cpu").measure(section, "a", lambda: 1 // 0, None, 1.0, graph=False)
    assert "ZeroDivisionError" in section.rows[0].note


def test_the_floor_is_the_larger_of_bytes_and_operations() -> None:
    rates = gpu.Rates(10.0, {torch.float32: 100.0})
    assert rates.floor(50.0, 100.0, torch.float32) == 5.0
    assert rates.floor(50.0, 1000.0, torch.float32) == 10.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_stops_with_one_sentence() -> None:
    result = subprocess.run([sys.executable, gpu.__file__, "--check"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"make gpu: PyTorch sees no CUDA device.*\.\n", result.stderr)
