"""Runs launched/ in triton's interpreter, in processes of its own: triton reads TRITON_INTERPRET when it is imported,
and other tests, or what they import, import it too.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
PYTEST = ("env", "TRITON_INTERPRET=1", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5")
INTERPRETED = sorted((Path(__file__).parent / "launched").glob("test_*.py"))


def test_there_is_something_to_run() -> None:
    assert INTERPRETED


@pytest.mark.parametrize(
    "command", [(*PYTEST, str(path)) for path in INTERPRETED], ids=[path.stem for path in INTERPRETED]
)
def test_in_the_interpreter(
    command: tuple[str, ...], result_of: Callable[[tuple[str, ...]], subprocess.CompletedProcess[str]]
) -> None:
    result = result_of(command)
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
