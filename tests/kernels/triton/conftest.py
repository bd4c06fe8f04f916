"""What is in launched/ starts kernels: on a GPU, where `make gpu` runs it, or under TRITON_INTERPRET=1, which has to be
set before anything imports triton; test_interpreter.py starts it so.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

if os.environ.get("TRITON_INTERPRET") != "1" and os.environ.get("SAEREC_REQUIRE_GPU") != "1":
    collect_ignore_glob = ["launched/*"]

Command = tuple[str, ...]


@pytest.fixture(scope="session")
def result_of(request: pytest.FixtureRequest) -> Iterator[Callable[[Command], subprocess.CompletedProcess[str]]]:
    """What became of a test's parameter ``command``, run in a process of its own.

    They are many minutes of work for one core each: the first test starts those of all selected tests, as many at once
    as there are cores.
    """
    commands = [
        item.callspec.params["command"]
        for item in request.session.items
        if "result_of" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running: dict[Command, Future[subprocess.CompletedProcess[str]]] = {
            command: pool.submit(
                subprocess.run, command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
            )
            for command in commands
        }
        yield lambda command: running[command].result()
        for future in running.values():
            future.cancel()
