"""How much resident memory one call takes beyond what was there before it."""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import re
from pathlib import Path
from typing import Any

from tasks import TASKS, grad_mode

_TIMEOUT = 300.0

# Children are forked from a process that has imported everything and computed nothing: they start at once, and no
# buffer of an earlier call hides what a call allocates.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["memory_preload"])


def extra_bytes(task: str, case: Any, way: str, threads: int) -> int | None:
    """Peak resident memory of one call, less what was resident before; ``None`` where it cannot be measured."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with _context.Pool(1) as pool:
        try:
            return pool.apply_async(_measure, (task, case, way, threads)).get(_TIMEOUT)
        except multiprocessing.TimeoutError:  # among others where the child was killed for its memory
            return None


def _measure(task_name: str, case: Any, way: str, threads: int) -> int:
    task = TASKS[task_name]
    # What is made once (packed weights, thread pools, compiled code) is not the call's; a buffer that grows with the
    # batch is, so that the call before has a single row where the way allows it.
    if task_name == "catalogue":
        one_user, x = task.prepare(dataclasses.replace(case, rows=1), way, threads)
        one_user(x)
        del one_user, x
    call, x = task.prepare(case, way, threads)
    with grad_mode(task):
        if task_name != "catalogue":
            call(x if task.ways[way].compiled else x[:1])
        ctypes.CDLL(None).malloc_trim(0)  # or the call could run in memory that was freed just now
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _status("VmRSS")
        call(x)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, field
    return 1024 * int(match[1])
