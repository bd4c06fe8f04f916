"""Which of a kernel's few configurations is launched.

The first of a kernel's configurations is its default, and what runs unless somebody asks for tuning: with
:func:`autotuning` around a warm-up, or ``SAEREC_FAST_TRITON_AUTOTUNE=1`` for a whole process. Then the first call of a
kind times them all; later calls of that kind, captured ones too, launch the fastest. Nothing is timed

* for up to 256 rows: those are serving batches, in which a pause of seconds is a fault; they get the default;
* while a CUDA graph is captured, which must not wait for the device: the default, or what has been found before;
* when torch.compile takes an operator apart, whose tensors hold nothing: the default.

A kind is what :class:`Kind` says. Rows count in powers of four, so that the shorter last batch of an epoch, or a batch
that grows, rarely meets a new one. Triton keeps the times in its own cache on disk, by the exact sizes: another process
that asks for tuning at these sizes reads them.

No choice changes a result. Configurations of one kernel add the same numbers in the same order: they differ in how many
loads are under way, never in the tiles of a sum or in the warps that share it (tests/kernels/triton/test_aot.py
compares products and sums of the compiled code). ``group_maxima_kernel`` alone has other tiles to choose from, since
its scores only decide how many candidates there are (linear_topk.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saerec_fast.kernels.triton.launch import INTERPRETED, OPTIONS, is_recording, launch

VARIABLE = "SAEREC_FAST_TRITON_AUTOTUNE"
SERVING_ROWS = 256

Grid = Callable[[dict[str, Any]], tuple[int, ...]]


class Kind(NamedTuple):
    """Calls that share a choice."""

    kernel: str
    device: torch.device
    rows: int  # the least power of four that is not below
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    constants: tuple[tuple[str, Any], ...]


# Of the process, not of a context: backward passes run in threads of their own.
_asked = int(os.environ.get(VARIABLE) == "1")
_chosen: dict[Kind, triton.Config] = {}
_lock = threading.RLock()


@contextmanager
def autotuning() -> Iterator[None]:
    """Inside, the first call of each kind with more than 256 rows times the configurations of its kernels.

    In all threads of the process. To be left before latency matters, and before a CUDA graph is captured, which
    contains what has been chosen by then.
    """
    global _asked
    with _lock:
        _asked += 1
    try:
        yield
    finally:
        with _lock:
            _asked -= 1


def chosen() -> dict[Kind, triton.Config]:
    """What has been chosen in this process."""
    return dict(_chosen)


def launch_tuned(
    kernel: Any,
    configurations: Sequence[triton.Config],
    grid: Grid,
    sizes: tuple[int, ...],
    *args: Any,
    appends_to: Sequence[str] = (),
    **constants: Any,
) -> triton.Config:
    """Launches a kernel in one of its configurations, the first being the default, and returns that one.

    Args:
        kernel: as for :func:`~saerec_fast.kernels.triton.launch.launch`.
        configurations: values of constants that are not in ``constants``, warps and stages.
        grid: of the constants.
        sizes: rows of the batch, and what else decides which is fastest beside dtypes and constants.
        appends_to: names of arguments that come in as zeros and are added to: zeros again before each trial.
    """
    configuration, (rows, *others) = configurations[0], sizes
    if len(configurations) > 1 and (_chosen or _asked) and not is_recording() and rows > SERVING_ROWS:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        dtypes = tuple(tensor.dtype for tensor in tensors)
        names = tuple(sorted(constants.items()))
        kind = Kind(kernel.__name__, tensors[0].device, rows_class(rows), tuple(others), dtypes, names)
        if kind not in _chosen and _asked and not is_captured(tensors[0]):
            # One at a time: two would time each other. The last run of the trials is the launch.
            with _lock:
                if kind not in _chosen:
                    _chosen[kind] = fastest(kernel, configurations, grid, appends_to, args, constants)
                    return _chosen[kind]
        configuration = _chosen.get(kind, configuration)
    constants |= configuration.kwargs
    schedule = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    launch(kernel, grid(constants), *args, **constants, **schedule)
    return configuration


def is_captured(tensor: Tensor) -> bool:
    """Whether what is launched for a tensor goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def rows_class(rows: int) -> int:
    """The least power of four that is not below."""
    return 4 ** -(-(rows - 1).bit_length() // 2)


def fastest(
    kernel: Any,
    configurations: Sequence[triton.Config],
    grid: Grid,
    appends_to: Sequence[str],
    args: tuple[Any, ...],
    constants: dict[str, Any],
) -> triton.Config:
    """Runs the kernel in every configuration, and at last in the fastest."""
    numbers = [name for name, arg in zip(kernel.arg_names, args, strict=False) if not isinstance(arg, Tensor)]
    tuner = triton.autotune(
        list(configurations),
        key=[*numbers, *constants],
        reset_to_zero=list(appends_to),
        do_bench=measured,
        cache_results=True,
    )(kernel)
    tuner[grid](*args, **constants, **OPTIONS)
    best: triton.Config = tuner.best_config
    return best


def measured(call: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
    """Milliseconds of a call."""
    if INTERPRETED:
        start = time.perf_counter()
        call()
        return [(time.perf_counter() - start) * 1e3] * len(quantiles)
    times: list[float] = triton.testing.do_bench(call, quantiles=quantiles)
    return times
