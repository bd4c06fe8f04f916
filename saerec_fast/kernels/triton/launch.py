"""How kernels are started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.library import wrap_triton
from triton.runtime.jit import JITFunction, jit


@jit
def _probe() -> None:
    pass


# TRITON_INTERPRET decides when a kernel is decorated, not when it is launched.
INTERPRETED = not isinstance(_probe, JITFunction)

# Products and sums may be fused, as on the CPU: float32 tiles depend on it for their speed. Triton's default is to
# change with 3.10, and 3.9 warns of it.
OPTIONS = {"enable_fp_fusion": True}


_recorded: ContextVar[bool] = ContextVar("recorded", default=False)


@contextmanager
def recording() -> Iterator[None]:
    """Inside, :func:`launch` leaves a kernel in the graph that torch.compile is tracing, and starts nothing."""
    token = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Whether a graph is being traced, whose tensors hold nothing."""
    return _recorded.get()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Starts a kernel on the current stream, unless its grid is empty, which CUDA refuses."""
    if 0 not in grid:
        kernel = wrap_triton(kernel) if is_recording() else kernel
        kernel[grid](*args, **constants, **OPTIONS)
