"""How kernels are started."""

from __future__ import annotations

from typing import Any

from triton.runtime.jit import JITFunction, jit


@jit
def _probe() -> None:
    pass


# TRITON_INTERPRET decides when a kernel is decorated, not when it is launched.
INTERPRETED = not isinstance(_probe, JITFunction)

# Products and sums may be fused, as on the CPU: float32 tiles depend on it for their speed. Triton's default is to
# change with 3.10, and 3.9 warns of it.
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Starts a kernel on the current stream, unless its grid is empty, which CUDA refuses."""
    if 0 not in grid:
        kernel[grid](*args, **constants, **OPTIONS)
