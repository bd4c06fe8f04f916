"""benchmarks/gpu.py on the CPU: the script that `make gpu` ends with, with the CUDA kernel emulated."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gpu
import peers
import pytest
import torch
import ways

from saerec_fast.kernels import cuda

YARDSTICK = "torch.addmm, bfloat16 (the encoder alone)"
WORK = gpu.Work(1.0, 1.0, 1.0)


def not_installed(peer: str) -> None:
    cause = ModuleNotFoundError(f"No module named '{peer}'")
    raise peers.PeerUnavailableError(f"{peer}: {cause}") from cause


def test_a_dry_run_writes_the_report(emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "available", lambda: "")
    monkeypatch.setattr(gpu, "usable", lambda backend: f"no {backend} here")
    monkeypatch.setattr(peers, "load", not_installed)
    gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-a-dry-run.md")
    text = path.read_text()
    assert emulated.emulation.shapes[-1].encodes
    for title in ("Serving steer", "Encode + decode", "Training step"):
        assert f"## {title}, 6 rows, (d, n, k) = (8, 40, 4), float32" in text
    # Way, time, floor, bytes, operations, multiple of the floor, time of the host, error, note.
    number = r"[\d.]+(?:e[+-]\d+)?"
    timed = re.findall(
        rf"^\| ([^|]+) \| {number} \| {number} \| {number} \| {number} \| {number} \| (?:{number}|–) \|"
        rf" ({number}|–) \|  \|$",
        text,
        re.MULTILINE,
    )
    errors = dict(timed)
    assert [way for way, _ in timed] == [
        *("eager PyTorch", YARDSTICK, "saerec_fast, CUDA C++"),
        *("eager_bag", "eager_dense", YARDSTICK),
        *("eager_bag", YARDSTICK),
    ]
    for peer, sections in (("sae_lens", 2), ("sae_lens_sparse", 1), ("sparsify", 2), ("dictionary_learning", 2)):
        assert len(re.findall(rf"^\| {peer} \| – .*\| not installed: No module named", text, re.MULTILINE)) == sections
    assert "Libraries: sae_lens not available: " in text
    assert float(errors["saerec_fast, CUDA C++"]) < 1e-5
    for op, backend, sections in (("steer", "cuda", 1), ("steer", "triton", 1), ("reconstruct", "triton", 4)):
        row = rf"^\| saerec_fast.{op}, backend {backend}(, tuned)? \| – \|.* no {backend} here \|$"
        assert len(re.findall(row, text, re.MULTILINE)) == sections


@pytest.mark.parametrize("wrong", [float("nan"), 2.0])
def test_a_wrong_way_has_no_time(wrong: float) -> None:
    section = gpu.Section("title", WORK)
    bench = gpu.Bench("cpu")
    bench.measure(section, "a", lambda: None, lambda _: wrong, 1.0, graph=False)
    bench.measure(section, "b", lambda: None, lambda _: 0.5, 1.0, graph=False)
    assert [(row.seconds is None, row.note) for row in section.rows] == [(True, "wrong"), (False, "")]


def test_a_way_that_fails_leaves_its_reason() -> None:
    section = gpu.Section("title", WORK)
    gpu.Bench("cpu").measure(section, "a", lambda: 1 // 0, None, 1.0, graph=False)
    assert "ZeroDivisionError" in section.rows[0].note


def test_the_floor_is_the_larger_of_bytes_and_operations() -> None:
    rates = gpu.Rates(10.0, {torch.float32: 100.0})
    assert rates.work(50.0, 100.0, torch.float32).seconds == 5.0
    assert rates.work(50.0, 1000.0, torch.float32).seconds == 10.0


def test_after_its_time_it_only_says_what_is_missing() -> None:
    section, called = gpu.Section("title", WORK), []
    gpu.Bench("cpu", seconds=-1.0).measure(section, "a", lambda: called.append(1), None, 1.0, graph=False)
    assert (section.rows[0].seconds, section.rows[0].note, called) == (None, "left out: the time was up", [])


def test_tuned_ways_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = pytest.importorskip("saerec_fast.kernels.triton.tuning")
    kind = tuning.Kind("emit_kernel", torch.device("cpu"), 1024, (), (), ())
    configuration = tuning.triton.Config({"BLOCK_M": 128}, num_warps=8, num_stages=4)
    chosen = [{}, {kind: configuration}] * 2
    monkeypatch.setattr(tuning, "chosen", lambda: chosen.pop(0))
    outs = [torch.zeros(2)] * 3 + [torch.zeros(2), torch.zeros(2), torch.ones(2)]
    section, bench = gpu.Section("title", WORK), gpu.Bench("cpu")
    # The default, tuning and the check each call it; of the first way the timing does too.
    bench.measure(section, "a", lambda: 0, None, 1.0, graph=False)
    for name, results in (("b", [*outs[:3], outs[0]]), ("c", outs[3:])):
        gpu.measure_tuned(bench, section, name, lambda left=results: left.pop(0), lambda out: 0.0, 1.0)
    assert [row.seconds is None for row in section.rows] == [False, False, True]
    assert section.rows[1].note == "emit_kernel (1024 rows): 8 warps, 4 stages, BLOCK_M 128"
    assert section.rows[2].note == "wrong"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ways_of_the_cpu_benchmark_agree_with_the_truth(dtype: torch.dtype) -> None:
    """In the dtype they are given, on the device they are given."""
    problem = gpu.Problem.make(gpu.Bench("cpu"), 8, 40, 4, 6, dtype)
    truth = gpu.eager_reconstruct(problem.first(6, torch.float64))
    inputs = problem.inputs(dtype)
    for name in ("eager_bag", "eager_dense"):
        out = ways.TOPK[name].build(inputs, 4)(inputs.x)
        assert out.dtype == dtype
        assert gpu.relative_error(out, truth, torch.ones(6, dtype=torch.bool)) < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_stops_with_one_sentence() -> None:
    result = subprocess.run([sys.executable, gpu.__file__, "--check"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"make gpu: PyTorch sees no CUDA device.*\.\n", result.stderr)
