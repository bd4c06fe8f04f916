"""Which backend runs an op, and why."""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "cpu", "triton", "cuda", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# dtypes the C++ kernels take; float64 runs on the reference.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ISA_VARIABLE = "SAEREC_FAST_ISA"


def _load_extension() -> str:
    """Reason why the C++ extension cannot be used, empty if it can."""
    try:
        from saerec_fast import _C
    except ImportError as error:
        return f"the C++ extension is missing ({error}); build it with `pip install .`"
    isa = os.environ.get(ISA_VARIABLE)
    if isa:
        try:
            _C.set_isa(isa)
        except ValueError as error:
            return str(error)
    # libgomp's threads do not survive a fork: a child that opened a parallel region would hang.
    os.register_at_fork(after_in_child=lambda: _C.set_serial(True))
    return ""


_extension_problem = _load_extension()


def available_backends() -> dict[str, str]:
    """Every backend, with an empty string if it can run here, else the reason why not."""
    gpu = "GPU kernels are not part of this version"
    return {"cpu": _extension_problem, "triton": gpu, "cuda": gpu, "reference": ""}


def choose(device_type: str) -> str:
    """The backend that ``auto`` takes for tensors on a device type such as ``"cpu"`` or ``"cuda"``."""
    return "cpu" if device_type == "cpu" and not _extension_problem else "reference"


def resolve(backend: str, x: Tensor) -> str:
    """The backend to run for input ``x``: ``auto`` may fall back to the reference, a named one must be able to run.

    Raises:
        ValueError: an unknown backend, or one that cannot run here or on this input.
    """
    if backend == "auto":
        return choose(x.device.type) if x.dtype in KERNEL_DTYPES else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    problem = available_backends()[backend]
    if problem:
        usable = [name for name, reason in available_backends().items() if not reason]
        raise ValueError(f"backend: {backend!r} cannot run here: {problem}; usable: {', '.join(usable)}")
    if backend == "cpu":
        if x.device.type != "cpu":
            raise ValueError(f"backend: 'cpu' needs tensors on the CPU, got {x.device}")
        if x.dtype not in KERNEL_DTYPES:
            raise ValueError(f"backend: 'cpu' takes float32, bfloat16 and float16, got {x.dtype}; use 'reference'")
    return backend
