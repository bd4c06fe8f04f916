"""What is in launched/ starts kernels: on a GPU, where `make gpu` runs it, or under TRITON_INTERPRET=1, which has to be
set before anything imports triton; test_interpreter.py starts it so.

Such commands, a test's parameter ``command``, are many minutes of work for one core. They run beside all other tests,
which rarely need more than one core either, and are looked at after them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1" and os.environ.get("SAEREC_REQUIRE_GPU") != "1":
    collect_ignore_glob = ["launched/*"]

Command = tuple[str, ...]


class Beside:
    """Commands in the background; in a process of its own, as some tests fork this one, which must have no threads."""

    def __init__(self, commands: list[Command], at_once: int) -> None:
        self.commands = commands
        self.folder = Path(tempfile.mkdtemp())
        script = [sys.executable, str(Path(__file__).with_name("run_beside.py")), str(self.folder), str(at_once)]
        self.process = subprocess.Popen(script, stdin=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            json.dump(commands, pipe)

    def result(self, command: Command) -> subprocess.CompletedProcess[str]:
        path = self.folder / f"{self.commands.index(command)}.json"
        while not path.exists():
            if self.process.poll() is not None and not path.exists():
                pytest.fail(f"the process that runs {command} ended with {self.process.returncode}")
            time.sleep(0.1)
        return subprocess.CompletedProcess(command, **json.loads(path.read_text()))

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()
        shutil.rmtree(self.folder)


BESIDE = pytest.StashKey[Beside]()


def _runs_beside(item: pytest.Item) -> bool:
    return "result_of" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_runs_beside)


def pytest_collection_finish(session: pytest.Session) -> None:
    own = [item for item in session.items if _runs_beside(item)]
    if not own or session.config.option.collectonly:
        return
    cores = os.cpu_count() or 1
    at_once = cores if len(own) == len(session.items) else max(1, cores - 1)
    session.config.stash[BESIDE] = Beside([item.callspec.params["command"] for item in own], at_once)  # type: ignore[attr-defined]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if BESIDE in session.config.stash:
        session.config.stash[BESIDE].stop()


@pytest.fixture(scope="session")
def result_of(request: pytest.FixtureRequest) -> Callable[[Command], subprocess.CompletedProcess[str]]:
    """What became of a test's parameter ``command``, run in a process of its own."""
    return request.config.stash[BESIDE].result
