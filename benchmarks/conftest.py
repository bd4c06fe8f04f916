"""How a cell is checked and timed, and what the results say about the machine and about what could not be measured."""

from __future__ import annotations

import math
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from memory import extra_bytes
from steering import ROWS, STEERING, compiled, host, sharing_copy, steering_truth
from steering_report import interval_of_median
from tasks import TASKS, check_recommendations, grad_mode
from threadpoolctl import threadpool_info
from ways import set_threads
from workloads import MAX_THREADS, MEMORY_ROWS, active_share, run_name

import saerec_fast as sf

# Seconds: of a cell, of a round (shorter calls are repeated within one), and of a call that gets few rounds only.
CELL_TIME = 0.5
ROUND_TIME = 1e-3
LONG_CALL = 0.4
ROUNDS = range(7, 51)
LONG_ROUNDS = 3

# Seconds of a cell of steering (small differences of two long times need more), and of a block of calls.
STEERING_TIME = {"ours": 2.0, "yardstick": 2.0}
OTHERS_STEERING_TIME = 0.3
# A call of the largest batch takes a hundred milliseconds, and faults pages in or not.
LARGE_BATCH_TIMES = 3
BLOCK_TIME = 5e-3
STEERING_ROUNDS = range(5, 251)

_not_measured: list[dict[str, str]] = []


def pytest_configure(config: pytest.Config) -> None:
    peers.set_environment()
    # The peers' warnings are not errors of ours.
    config.addinivalue_line("filterwarnings", "ignore")


@pytest.fixture
def measure(benchmark: Any) -> Callable[[str, Any, int, str], None]:
    """Check a way of a task on a case, then time it."""

    def run(task_name: str, case: Any, threads: int, way_name: str) -> None:
        task = TASKS[task_name]
        way = task.ways[way_name]
        try:
            call, x = task.prepare(case, way_name, threads)
        except peers.PeerUnavailableError as error:
            pytest.skip(str(error))
        benchmark.group = f"{task.title}: {case}, threads {threads}"
        benchmark.extra_info.update(
            task=task_name, title=task.title, way=way_name, role=way.role, threads=threads, case=str(case), **vars(case)
        )
        if task_name == "relu":
            benchmark.extra_info["active_share"] = active_share(case)
        with grad_mode(task):
            if way.role != "yardstick":
                task.check(case, call, x)
            _time(benchmark, call, x)
        if case.rows == MEMORY_ROWS[task_name] and threads == MAX_THREADS:
            benchmark.extra_info["extra_bytes"] = extra_bytes(task_name, case, way_name, threads)

    return run


@pytest.fixture
def measure_added(benchmark: Any) -> Callable[[Any, int, str], None]:
    """Check a way to steer, then time what it adds to forward pass and scoring."""

    def run(case: Any, threads: int, way_name: str) -> None:
        way = STEERING[way_name]
        try:
            plain = host(case.host).recommender
            steered = way.build(case, sharing_copy(plain))
        except peers.PeerUnavailableError as error:
            pytest.skip(str(error))
        set_threads(threads)
        with torch.inference_mode():
            if case.compiled:
                torch.compiler.reset()
                plain, steered = compiled(plain), compiled(steered)
                plain(host(case.host).tokens[: case.rows])
            # A yardstick steers nothing that could be compared.
            yardstick = way.role == "yardstick"
            tokens = steering_truth(case).tokens if yardstick else check_recommendations(case, steered)
            budget = STEERING_TIME.get(way.role, OTHERS_STEERING_TIME)
            if way_name == "saerec_fast" and case.rows == ROWS[-1]:
                budget *= LARGE_BATCH_TIMES
            seconds = _time_added(benchmark, plain, steered, tokens, budget)
        benchmark.group = f"Steering: {case}, threads {threads}"
        benchmark.extra_info.update(
            task="steering",
            way=way_name,
            role=way.role,
            threads=threads,
            host=case.model,
            activation=case.activation,
            rows=case.rows,
            **vars(case.plan),
            **seconds,
        )

    return run


def _time_added(
    benchmark: Any, plain: Callable[[Any], Any], steered: Callable[[Any], Any], tokens: Any, budget: float
) -> dict[str, float]:
    """Seconds a call: blocks of calls alternate between the two, and each steered block is compared with the mean of
    the two unsteered ones around it, so that a machine that slows down over time adds nothing."""
    for call in (plain, steered):
        call(tokens)
    once = max(min(_seconds(call, tokens) for _ in range(3)) for call in (plain, steered))
    calls = max(1, math.ceil(BLOCK_TIME / once))
    rounds = min(max(int(budget / (2 * calls * once)), STEERING_ROUNDS.start), STEERING_ROUNDS.stop - 1)
    between: list[float] = []

    def block(call: Callable[[Any], Any]) -> None:
        for _ in range(calls):
            call(tokens)

    def time_unsteered() -> None:
        between.append(_seconds(block, plain))

    benchmark.pedantic(block, args=(steered,), setup=time_unsteered, rounds=rounds, iterations=1)
    time_unsteered()
    with_plan = benchmark.stats.stats.data
    without = between[-rounds - 1 :]
    added = [
        (one - 0.5 * (before + after)) / calls
        for one, before, after in zip(with_plan, without[:-1], without[1:], strict=True)
    ]
    low, high = interval_of_median(added)
    return {
        "added": statistics.median(added),
        "added_low": low,
        "added_high": high,
        "unsteered": statistics.median(without) / calls,
        "calls": calls,
    }


def _time(benchmark: Any, call: Callable[[Any], Any], x: Any) -> None:
    once = _seconds(call, x)
    if once < LONG_CALL / 2:  # the first call may have met page faults; a long one need not be repeated for them
        once = min(once, _seconds(call, x), _seconds(call, x))
    iterations = max(1, math.ceil(ROUND_TIME / once))
    rounds = min(max(int(CELL_TIME / (once * iterations)), ROUNDS.start), ROUNDS.stop - 1)
    if once > LONG_CALL:
        rounds = LONG_ROUNDS
    benchmark.pedantic(call, args=(x,), rounds=rounds, iterations=iterations, warmup_rounds=int(once < LONG_CALL))


def _seconds(call: Callable[[Any], Any], x: Any) -> float:
    started = time.perf_counter()
    call(x)
    return time.perf_counter() - started


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome == "passed" or (report.when == "teardown" and report.outcome == "failed"):
        return
    if report.skipped:
        assert isinstance(report.longrepr, tuple)
        reason = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = "failed: " + (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]
    _not_measured.append({"cell": report.nodeid.partition("::")[2], "reason": reason})


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # Not the host's name: results are published.
    machine_info.pop("node", None)
    machine_info.update(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        caches=_caches(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        versions={"python": platform.python_version(), "torch": torch.__version__, "saerec_fast": sf.__version__},
        peers=peers.versions(),
        blas=[
            f"{library['prefix']} {library['version']} ({library.get('architecture', '?')})"
            for library in threadpool_info()
            if library["user_api"] == "blas"
        ],
        environment={
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "OPENBLAS_CORETYPE", "SPARSIFY_DISABLE_TRITON", "SAEREC_FAST_ISA")
            if name in os.environ
        },
        command=os.environ.get("SAEREC_BENCH_COMMAND") or shlex.join(["pytest", *config.invocation_params.args]),
        run=run_name(),
    )


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["not_measured"] = _not_measured


def _caches() -> list[str]:
    """As "L1 Data 48K", of the first core."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        found.append(f"L{level} {kind} {size}")
    return found
