"""Builds, tests, sanitizes and times the GPU kernels: ``make gpu`` calls it.

``python benchmarks/gpu.py [--device cuda] [--seconds 450] [--out benchmarks/results]`` writes ``<gpu>.md``.
``--device cpu`` only measures, with small sizes, to try the script. What fails is in the report and in the exit status,
and the rest goes on; the report is written anew after each step and each measurement. Measurements get the seconds that
the other steps leave, and what the project's goals speak of comes first.

A fault on a GPU ends all that a process can do there. So the measuring is done by a process of its own, which notes
each result in a file; one that dies or hangs loses the way it was at, and another takes over from there.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

try:
    import torch
except ImportError as error:
    sys.exit(f"make gpu: {sys.executable} has no PyTorch ({error}); GPU_PYTHON=... names another Python.")

ROOT = Path(__file__).parents[1]
# Of this folder too: `make gpu` keeps a script's own folder off the path.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from gpu_report import Journal, report  # noqa: E402

# Before the measurements: what each is, the target of the Makefile, the seconds it may take.
STEPS = (
    ("build", "gpu-build", 180.0),
    ("tests of the CUDA C++ kernel", "gpu-test-cuda", 60.0),
    ("tests of the Triton kernels and of models", "gpu-test-triton", 90.0),
    ("compute-sanitizer", "gpu-sanitize", 60.0),
)
# What the steps have to leave for the measurements.
LEAST_SECONDS = 150.0
# Of one way, or of what a section needs before its first: libraries are imported and kernels compiled meanwhile.
HANG_SECONDS = 90.0
# Of the way that is under way when the time is up.
GRACE_SECONDS = 10.0
# Processes that die, after which the rest is left out.
MOST_DEATHS = 12
TIME_UP = "left out: the time was up"
# Lines of the output of a step that failed, at its end: of tests in several processes, what each of them says last.
OUTPUT_LINES = 120


def run_step(journal: Journal, name: str, command: list[str], seconds: float) -> None:
    """Runs a command for at most so many seconds and notes what became of it."""
    if seconds <= 0:
        journal.add("step", name=name, seconds=0.0, problem=TIME_UP, summary="", output="")
        return
    start, problem = time.monotonic(), ""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        # A session of its own, so that all it started can be stopped.
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
            problem = f"failed: {ending(status)}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} s"
            stop_group(process, signal.SIGINT)  # pytest then says what it has found so far
        finally:
            stop_group(process, signal.SIGKILL)
        output.seek(0)
        lines = [line.rstrip() for line in output if line.strip()]
    tail = "\n".join(lines[-OUTPUT_LINES:])
    print(f"--- {name}: {problem or 'passed'}\n{tail}", flush=True)
    journal.add(
        "step",
        name=name,
        seconds=time.monotonic() - start,
        problem=problem,
        summary=lines[-1] if lines else "",
        output=tail if problem else "",
    )


def stop_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)


def supervise(command: Callable[[], list[str]], journal: Journal, changed: Callable[[], None], end: float) -> str:
    """Runs the process that fills the journal, and another one when it dies or comes no further.

    Returns:
        Why the measurements are not complete, as far as that is not in the journal; empty if they are.
    """
    for _ in range(MOST_DEATHS):
        before = len(journal.events)
        worker = subprocess.Popen(command())
        why = ""
        try:
            seen, since = before, time.monotonic()
            while worker.poll() is None:
                time.sleep(0.1)
                journal.read()
                now = time.monotonic()
                if len(journal.events) != seen:
                    seen, since = len(journal.events), now
                    changed()
                if now > end + GRACE_SECONDS:
                    why = TIME_UP
                elif now > since + HANG_SECONDS:
                    why = f"stopped: no end within {HANG_SECONDS:.0f} s"
                if why:
                    worker.kill()
                    break
        finally:
            worker.kill()
            status = worker.wait()
        journal.read()
        if not status:
            changed()
            return ""
        why = why or f"the process died: {ending(status)}"
        advanced = len(journal.events) > before
        journal.close(why, failed=why != TIME_UP)
        if time.monotonic() > end:
            journal.add("left_out", section="what comes after it")
        changed()
        if time.monotonic() > end:
            return ""
        if not advanced:
            return why
    return f"{MOST_DEATHS} processes died"


def ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def machine_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"the CPU ({platform.machine()}), a dry run"


def commit() -> str:
    """Of the sources; a copy of them without their history has none."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def measure(device: str, seconds: float, journal: Path) -> None:
    """In the process that does nothing else: fills the journal."""
    import gpu_measure
    import peers

    peers.set_environment()
    gpu_measure.run(gpu_measure.Bench(device, seconds, Journal(journal)))


def main(arguments: list[str] | None = None) -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=450.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)  # of the process that measures
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("make gpu: PyTorch sees no CUDA device, and without one there is nothing to test or to time.")
    if options.journal is not None:
        measure(options.device, options.seconds, options.journal)
        return
    end, machine = start + options.seconds, machine_name(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.md"
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal")

        def write() -> None:
            # In one go: a kill in the middle of it must not cost the report before.
            path.with_suffix(".part").write_text(report(machine, commit(), journal))
            path.with_suffix(".part").replace(path)

        def command() -> list[str]:
            left = ["--seconds", str(end - time.monotonic()), "--journal", str(journal.path)]
            return [sys.executable, __file__, "--device", options.device, *left]

        for name, target, seconds in STEPS if options.device == "cuda" else ():
            left = end - time.monotonic() - LEAST_SECONDS
            run_step(journal, name, ["make", target], min(seconds, left))
            write()
        began = time.monotonic()
        problem = supervise(command, journal, write, end)
        seconds = time.monotonic() - began
        journal.add("step", name="measurements", seconds=seconds, problem=problem, summary="", output="")
        write()
    print(path.read_text())
    if journal.failures():
        sys.exit("\n".join(["make gpu: not all of it went well", *journal.failures()]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what this one started is stopped too
    main()
