"""Runs interpreted/ in a process of its own: triton reads TRITON_INTERPRET when it is imported, and other tests, or
what they import, import it too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
INTERPRETED = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


def test_there_is_something_to_run() -> None:
    assert INTERPRETED


@pytest.mark.parametrize("path", INTERPRETED, ids=lambda path: path.stem)
def test_in_the_interpreter(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
