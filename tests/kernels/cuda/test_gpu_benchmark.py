"""What `make gpu` runs, on the CPU: its steps, its measurements with the CUDA kernel emulated, and its report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_measure
import peers
import pytest
import torch
import ways
from gpu_report import NO_WORK, YARDSTICK, Journal, Rates, Row, Section, Work, goals, report

from saerec_fast.kernels import cuda

WORK = Work(1.0, 1.0, 1.0)
FOLDERS = [str(gpu.ROOT / name) for name in ("tests", "benchmarks")]


def not_installed(peer: str) -> None:
    cause = ModuleNotFoundError(f"No module named '{peer}'")
    raise peers.PeerUnavailableError(f"{peer}: {cause}") from cause


def test_every_section_is_in_the_report(emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda: "")
    monkeypatch.setattr(gpu_measure, "usable", lambda backend: f"no {backend} here")
    monkeypatch.setattr(peers, "load", not_installed)
    journal = Journal()
    gpu_measure.run(gpu_measure.Bench("cpu", journal=journal))
    assert emulated.emulation.shapes[-1].encodes
    assert journal.failures() == []
    text = report("a machine", "abc", journal)
    for title in ("Serving steer", "Encode + decode", "Training step"):
        assert f"## {title}, 6 rows, (d, n, k) = (8, 40, 4), float32" in text
    # Way, time, floor, bytes, operations, multiple of the floor, peak, time of the host, error, note.
    number = r"[\d.]+(?:e[+-]\d+)?"
    timed = re.findall(
        rf"^\| ([^|]+) \| {number} \| {number} \| {number} \| {number} \| {number} \| – \| (?:{number}|–) \|"
        rf" ({number}|–) \|  \|$",
        text,
        re.MULTILINE,
    )
    assert [way for way, _ in timed] == [
        *("saerec_fast, CUDA C++", YARDSTICK, "eager PyTorch"),
        *(YARDSTICK, "eager_bag", "eager_dense"),
        *(YARDSTICK, "eager_bag"),
    ]
    assert float(dict(timed)["saerec_fast, CUDA C++"]) < 1e-5
    for peer, sections in (("sae_lens", 2), ("sae_lens_sparse", 1), ("sparsify", 2), ("dictionary_learning", 2)):
        assert len(re.findall(rf"^\| {peer} \| – .*\| not installed: No module named", text, re.MULTILINE)) == sections
    for op, backend, sections in (("steer", "cuda", 1), ("steer", "triton", 1), ("reconstruct", "triton", 4)):
        row = rf"^\| saerec_fast.{op}, backend {backend}(, tuned)? \| – \|.* no {backend} here \|$"
        assert len(re.findall(row, text, re.MULTILINE)) == sections


def test_what_the_goals_speak_of_comes_first() -> None:
    calls = gpu_measure.calls(quick=False)
    assert [call[0].__name__ for call in calls[:6]] == ["forward"] * 2 + ["training"] * 2 + ["serving"] * 2
    assert calls[0][1:5] == calls[1][1:5] == (64, 2048, 32, 65536)
    assert calls[4][1:5] == calls[5][1:5] == (64, 2048, 32, 64)
    assert len(set(calls)) == len(calls)


@pytest.mark.parametrize("wrong", [float("nan"), 2.0])
def test_a_wrong_way_has_no_time(wrong: float) -> None:
    section = Section("title", WORK)
    bench = gpu_measure.Bench("cpu")
    bench.measure(section, "a", lambda: None, lambda _: wrong, 1.0, graph=False)
    bench.measure(section, "b", lambda: None, lambda _: 0.5, 1.0, graph=False)
    assert [(row.seconds is None, row.note) for row in section.rows] == [(True, "wrong"), (False, "")]


def test_a_way_that_fails_leaves_its_reason() -> None:
    section = Section("title", WORK)
    gpu_measure.Bench("cpu").measure(section, "a", lambda: 1 // 0, None, 1.0, graph=False)
    assert "ZeroDivisionError" in section.rows[0].note


def test_the_floor_is_the_larger_of_bytes_and_operations() -> None:
    rates = Rates(10.0, {torch.float32: 100.0})
    assert rates.work(50.0, 100.0, torch.float32).seconds == 5.0
    assert rates.work(50.0, 1000.0, torch.float32).seconds == 10.0


def test_after_its_time_it_only_says_what_is_missing() -> None:
    section, called = Section("title", WORK), []
    gpu_measure.Bench("cpu", seconds=-1.0).measure(section, "a", lambda: called.append(1), None, 1.0, graph=False)
    assert (section.rows[0].seconds, section.rows[0].note, called) == (None, "left out: the time was up", [])


def test_tuned_ways_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = pytest.importorskip("saerec_fast.kernels.triton.tuning")
    kind = tuning.Kind("emit_kernel", torch.device("cpu"), 1024, (), (), ())
    configuration = tuning.triton.Config({"BLOCK_M": 128}, num_warps=8, num_stages=4)
    chosen = [{}, {kind: configuration}] * 2
    monkeypatch.setattr(tuning, "chosen", lambda: chosen.pop(0))
    outs = [torch.zeros(2)] * 3 + [torch.zeros(2), torch.zeros(2), torch.ones(2)]
    section, bench = Section("title", WORK), gpu_measure.Bench("cpu")
    # The default, tuning and the check each call it; of the first way the timing does too.
    bench.measure(section, "a", lambda: 0, None, 1.0, graph=False)
    for name, results in (("b", [*outs[:3], outs[0]]), ("c", outs[3:])):
        gpu_measure.measure_tuned(bench, section, name, lambda left=results: left.pop(0), lambda out: 0.0, 1.0)
    assert [row.seconds is None for row in section.rows] == [False, False, True]
    assert section.rows[1].note == "emit_kernel (1024 rows): 8 warps, 4 stages, BLOCK_M 128"
    assert section.rows[2].note == "wrong"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ways_of_the_cpu_benchmark_agree_with_the_truth(dtype: torch.dtype) -> None:
    """In the dtype they are given, on the device they are given."""
    problem = gpu_measure.Problem.make(gpu_measure.Bench("cpu"), 8, 40, 4, 6, dtype)
    truth = gpu_measure.eager_reconstruct(problem.first(6, torch.float64))
    inputs = problem.inputs(dtype)
    for name in ("eager_bag", "eager_dense"):
        out = ways.TOPK[name].build(inputs, 4)(inputs.x)
        assert out.dtype == dtype
        assert gpu_measure.relative_error(out, truth, torch.ones(6, dtype=torch.bool)) < 1e-5


WORKER = """
import os, sys, time
from pathlib import Path
sys.path[:0] = {folders!r}
import gpu_measure
from gpu_report import Journal, NO_WORK, Section

def section(bench, rates, title, *ways):
    if not ways:
        raise ValueError("cannot be prepared")
    for way in ways:
        bench.measure(Section(title, NO_WORK), way, getattr(os, way, time.time), None, 0.0, graph=False)

calls = [(section, "first", "a", "abort", "b"), (section, "second"), (section, "third", "c")]
gpu_measure.calls = lambda quick: calls
gpu_measure.run(gpu_measure.Bench("cpu", journal=Journal(Path({path!r}))))
"""
# Begins a way and comes no further; the next process finds it done.
HANGING_WORKER = """
import json, sys, time
with open({path!r}, "a+") as file:
    file.seek(0)
    if "row" in file.read():
        sys.exit()
    print(json.dumps(dict(event="begun", section="first", way="hang")), file=file)
time.sleep(600)
"""


def supervised(path: Path, script: str, seconds: float = 600.0) -> tuple[Journal, str, list[int]]:
    """The journal, why it is not complete, and how many events it had each time the report was due."""
    journal, lengths = Journal(path), []
    problem = gpu.supervise(
        lambda: [sys.executable, "-c", script.format(folders=FOLDERS, path=str(path))],
        journal,
        lambda: lengths.append(len(journal.events)),
        time.monotonic() + seconds,
    )
    return journal, problem, lengths


def test_another_process_takes_over_from_one_that_died(tmp_path: Path) -> None:
    journal, problem, lengths = supervised(tmp_path / "journal", WORKER)
    assert problem == ""
    rows = {title: {row.way: row for row in rows} for title, rows in journal.rows().items()}
    assert list(rows["first"]) == ["a", "abort", "b"]
    assert rows["first"]["abort"].note == "the process died: signal SIGABRT"
    assert rows["first"]["a"].seconds is not None
    assert rows["first"]["b"].seconds is not None
    assert rows["third"]["c"].seconds is not None
    assert journal.failures() == [
        "first: abort: the process died: signal SIGABRT",
        "section second: preparing it: ValueError: cannot be prepared",
    ]
    assert lengths == sorted(lengths)
    assert lengths[-1] == len(journal.events)


def test_a_process_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "HANG_SECONDS", 3.0)
    journal, problem, _ = supervised(tmp_path / "journal", HANGING_WORKER)
    assert problem == ""
    assert journal.failures() == ["first: hang: stopped: no end within 3 s"]


def test_when_the_time_is_up_the_rest_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1.0)
    journal, problem, lengths = supervised(tmp_path / "journal", HANGING_WORKER, seconds=2.0)
    assert (problem, journal.failures()) == ("", [])
    assert [row.note for row in journal.rows()["first"]] == ["left out: the time was up"]
    assert "Left out, since the time was up: what comes after it." in report("a machine", "abc", journal)
    assert lengths[-1] == len(journal.events)


def test_a_process_that_cannot_begin_is_not_tried_again(tmp_path: Path) -> None:
    journal, runs = Journal(tmp_path / "journal"), []

    def command() -> list[str]:
        runs.append(1)
        return [sys.executable, "-c", "raise SystemExit(5)"]

    assert gpu.supervise(command, journal, lambda: None, time.monotonic() + 100) == "the process died: exit status 5"
    assert len(runs) == 1


def step_of(script: str, seconds: float) -> dict[str, object]:
    journal = Journal()
    gpu.run_step(journal, "name", [sys.executable, "-c", script], seconds)
    (step,) = journal.named("step")
    return step


def test_a_step_leaves_its_outcome_and_the_output_of_a_failure() -> None:
    step = step_of("print('12 passed')", 60.0)
    assert (step["problem"], step["summary"], step["output"]) == ("", "12 passed", "")
    step = step_of("import sys; [print(i) for i in range(999)]; sys.exit('the reason')", 60.0)
    assert (step["problem"], step["summary"]) == ("failed: exit status 1", "the reason")
    assert str(step["output"]).splitlines() == [*map(str, range(1000 - gpu.OUTPUT_LINES, 999)), "the reason"]
    assert step_of("", 0.0)["problem"] == "left out: the time was up"


def test_a_step_that_takes_too_long_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    child = f"import os, time; open({str(path)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    step = step_of(
        f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])", 5.0
    )
    assert step["problem"] == "stopped after 5 s"
    assert "begun" in str(step["output"])
    stat = Path(f"/proc/{path.read_text()}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("target", [target for _, target, _ in gpu.STEPS])
def test_every_step_is_a_target(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", target, "WHEELS=wheels"]
    result = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_what_fails_is_in_the_report_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two targets of the Makefile for the steps; the process that measures finds no GPU."""
    monkeypatch.setattr(gpu, "STEPS", (("one", "no-such-target", 60.0), ("two", "help", 60.0)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    with pytest.raises(SystemExit, match="one: failed: exit status 2\nmeasurements: the process died: exit status 1"):
        gpu.main(["--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["test-gpu.md"]
    text = (tmp_path / "test-gpu.md").read_text()
    assert re.search(r"^\| one \| \d+ \| failed: exit status 2 \|", text, re.MULTILINE)
    assert re.search(r"^\| two \| \d+ \| passed \|", text, re.MULTILINE)
    assert "No rule to make target" in text
    capsys.readouterr()


def test_a_dry_run_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, gpu.__file__, "--device", "cpu", "--out", str(tmp_path)]
    # Libraries beside it may be missing or fail.
    result = subprocess.run(command, capture_output=True, text=True)
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-a-dry-run.md")
    text = path.read_text()
    assert text.count("| eager_bag | ") == 2, result.stderr
    assert "saerec-fast 0" in text
    assert "| measurements | " in text


FORWARD = "Encode + decode, 65536 rows, (d, n, k) = (64, 2048, 32), bfloat16"
TRAINING = "Training step, 16384 rows, (d, n, k) = (64, 2048, 32), bfloat16"
SERVING = "Serving steer, 64 rows, (d, n, k) = (64, 2048, 32), bfloat16"


def made_up(path: Path | None = None) -> Journal:
    journal = Journal(path)
    for section, way, seconds in (
        (FORWARD, "saerec_fast.reconstruct", 2.0),
        (FORWARD, YARDSTICK, 1.25),
        (FORWARD, "sparsify", 11.0),
        (FORWARD, "eager_bag", 12.0),
        (TRAINING, "saerec_fast.reconstruct", 4.0),
        (TRAINING, "saerec_fast.reconstruct, tuned", 3.0),
        (TRAINING, "sparsify", 9.0),
        (SERVING, "saerec_fast, CUDA C++", 11e-6),
        (SERVING, "eager PyTorch", 1.0),
    ):
        journal.add_row(section, Row(way, WORK, seconds))
    return journal


def test_goals_are_set_beside_what_was_measured() -> None:
    journal = made_up()
    found = [(title, value, met) for title, _, value, met in goals(journal.rows())]
    assert found == [
        (FORWARD, 5.5, True),
        (FORWARD, 1.6, True),
        (TRAINING, 3.0, False),
        (SERVING, pytest.approx(11), True),
    ]
    assert f"| {TRAINING} | at least 4 × as fast as sparsify | 3 | short |" in report("a machine", "abc", journal)


def test_a_goal_without_its_measurement_has_no_verdict() -> None:
    journal = Journal()
    journal.add_row(TRAINING, Row("saerec_fast.reconstruct", WORK, 4.0))
    journal.add_row(TRAINING, Row("sparsify", NO_WORK, note="RuntimeError: a | b\nc", failed=True))
    text = report("a machine", "abc", journal)
    assert f"| {TRAINING} | at least 4 × as fast as sparsify | – |  |" in text
    assert "RuntimeError: a \\| b c |" in text
    assert f"- {TRAINING}: sparsify: RuntimeError" in text


def test_there_is_a_report_after_each_event() -> None:
    events, journal = made_up().events, Journal()
    assert report("a machine", "abc", journal).startswith("# GPU kernels on a machine")
    for event in events:
        journal.events.append(event)
        assert f"| {event['row']['way']} | " in report("a machine", "abc", journal)


def test_half_a_line_of_a_process_that_died_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = made_up(path)
    with path.open("a") as file:
        file.write('{"event": "row", "sec')
    assert Journal(path).events == journal.events
    Journal(path).add("finished", section=SERVING)
    assert Journal(path).is_closed(SERVING)
    assert Journal(path).rows() == journal.rows()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_stops_with_one_sentence() -> None:
    result = subprocess.run([sys.executable, gpu.__file__], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"make gpu: PyTorch sees no CUDA device.*\.\n", result.stderr)
