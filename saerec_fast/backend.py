"""Which backend runs an op, and why."""

from __future__ import annotations

import importlib
import os
import sys
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "cpu", "triton", "cuda", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# dtypes the kernels take; float64 runs on the reference.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ISA_VARIABLE = "SAEREC_FAST_ISA"

INTERPRET_VARIABLE = "TRITON_INTERPRET"  # triton's own


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
    triton = _triton_problem(triton_is_interpreted())
    return {"cpu": _extension_problem, "triton": triton, "cuda": _cuda_problem(triton), "reference": ""}


def _cuda_problem(triton_problem: str) -> str:
    from saerec_fast.kernels import cuda

    # All ops but steer run on Triton's kernels there.
    return cuda.available() or (f"its other ops need triton: {triton_problem}" if triton_problem else "")


def triton_is_interpreted() -> bool:
    """Whether the Triton kernels run, or would run, in triton's interpreter, on CPU tensors."""
    # The variable counts when kernels are imported, not after.
    loaded = sys.modules.get("saerec_fast.kernels.triton.launch")
    if loaded is not None:
        return bool(loaded.INTERPRETED)
    return os.environ.get(INTERPRET_VARIABLE, "").lower() in ("1", "true", "yes", "on", "y")


@lru_cache
def _triton_problem(interpreted: bool) -> str:
    if not interpreted and not torch.cuda.is_available():
        return f"it needs a CUDA device, and torch sees none ({INTERPRET_VARIABLE}=1 interprets the kernels on the CPU)"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation fails in many ways
        return f"triton cannot be imported ({error})"
    return ""


def is_transformed() -> bool:
    """Whether forward-mode derivatives or ``torch.func`` transforms are under way, also without gradients.

    A tensor may then stand for more than its memory holds. What a compiler traces is not looked at.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


# How many modes that want to see torch's calls are on, and whether torch.jit traces; of torch's own, so that another
# version may lack them.
MODE_COUNTERS = tuple(
    getattr(torch._C, name, None) for name in ("_len_torch_dispatch_stack", "_len_torch_function_stack", "_is_tracing")
)


def is_watched() -> bool:
    """Whether a ``TorchDispatchMode``, ``TorchFunctionMode`` or ``torch.jit.trace`` is on, which kernels called
    directly would escape; also where this torch does not tell."""
    return any(count is None or count() for count in MODE_COUNTERS)


def choose(device_type: str) -> str:
    """The backend that ``auto`` takes for tensors on a device type such as ``"cpu"`` or ``"cuda"``."""
    # The Triton kernels have not run on hardware yet: until they have, only who asks for them gets them.
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
    if backend != "reference":
        if backend == "cpu" or (backend == "triton" and triton_is_interpreted()):
            device_type, where = "cpu", "on the CPU"
        else:
            device_type, where = "cuda", "on a CUDA device"
        if x.device.type != device_type:
            raise ValueError(f"backend: {backend!r} needs tensors {where}, got {x.device}")
        if x.dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"backend: {backend!r} takes float32, bfloat16 and float16, got {x.dtype}; use 'reference'"
            )
    return backend
