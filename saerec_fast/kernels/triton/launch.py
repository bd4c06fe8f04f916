"""How kernels are started: as part of a graph where a compiler traces, by the interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, jit


@jit
def _probe():
    pass


# TRITON_INTERPRET decides when a kernel is decorated, not when it is launched.
INTERPRETED = not isinstance(_probe, JITFunction)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Starts a kernel unless its grid is empty, which CUDA refuses."""
    if any(isinstance(size, int) and size == 0 for size in grid):
        return
    if isinstance(kernel, (JITFunction, Autotuner)) and not INTERPRETED:
        # Plain outside of a trace; inside, a node of the graph that Inductor sees through.
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **constants)
