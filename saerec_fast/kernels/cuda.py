"""From CUDA tensors to the CUDA C++ kernel of the serving steer; see docs/cuda.md.

Importing this module never fails: :func:`available` says whether the kernel can run. As in
:mod:`saerec_fast.kernels.cpu`, arguments are trusted: hidden states come as ``(R, d)`` with any strides, all tensors
of a call share one device, and all but thresholds and edit values one dtype.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_extension: ModuleType | None
try:
    _extension, _import_problem = importlib.import_module("saerec_fast._cuda"), ""
except ImportError as error:
    _extension, _import_problem = None, f"the CUDA extension is missing ({error}); build with -DSAEREC_CUDA=ON and nvcc"

# kMaxEdits of csrc/cuda/steer_kernel.cuh.
MAX_EDITS = 256

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available() -> str:
    """Reason why the kernel cannot run here, empty if it can."""
    if _extension is None:
        return _import_problem
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    devices, reason = _extension.device_count()
    if not devices:
        return f"the CUDA runtime sees no device ({reason})"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"compute capability 8.0 or newer is needed, the current device has {major}.{minor}"


def supports(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    k: int,
    reconstruct: bool,
    features: list[int],
    ops: list[int],
) -> str:
    """Reason why :func:`steer` does not take these arguments, empty if it does. :func:`available` comes first."""
    if x.dtype not in _DTYPE:
        return f"x: expected float32, bfloat16 or float16, got {x.dtype}"
    return _call(x, W_enc, b_enc, b_dec, W_dec, threshold, k, reconstruct, features, ops).problem()


def steer(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    k: int,
    reconstruct: bool,
    features: list[int],
    ops: list[int],
    values: Tensor,
    mask: Tensor | None,
    packed: Tensor | None = None,
) -> Tensor:
    """Steered hidden states ``(R, d)``, one launch on the current stream; nothing waits for the device.

    Args:
        values: ``(m,)`` or ``(R, m)``. Read when the kernel runs, as is ``mask``: a captured CUDA graph takes what
            they hold when it is replayed, while the features and ops are those of the capture. Strengths that are
            not contiguous float32 cost a copy, another launch.
        mask: bool ``(R,)``, the rows to steer.
        packed: not used, there for the signature of :func:`saerec_fast.kernels.cpu.steer`.

    Raises:
        ValueError: arguments that :func:`supports` names a reason for.
        RuntimeError: the launch fails.
    """
    values = values.to(torch.float32).contiguous()
    mask = None if mask is None else mask.contiguous()
    threshold = None if threshold is None else threshold.to(torch.float32)
    W_enc, W_dec = _unit_columns(W_enc), _unit_columns(W_dec)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    call = _call(x, W_enc, b_enc, b_dec, W_dec, threshold, k, reconstruct, features, ops)
    bytes_needed = call.workspace_bytes()
    workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=x.device) if bytes_needed else None
    call.launch(
        values.data_ptr(),
        values.shape[-1] if values.dim() == 2 else 0,
        0 if mask is None else mask.data_ptr(),
        _matrix(out),
        0 if workspace is None else workspace.data_ptr(),
        bytes_needed,
        _current_stream(x.device),
    )
    return out


def _call(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    k: int,
    reconstruct: bool,
    features: list[int],
    ops: list[int],
) -> Any:
    assert _extension is not None, _import_problem
    return _extension.SteerCall(
        x.device.index or 0,
        _DTYPE[x.dtype],
        _matrix(x),
        _matrix(W_enc),
        _vector(b_enc),
        _vector(b_dec),
        _matrix(W_dec),
        k,
        _vector(threshold),
        reconstruct,
        features,
        ops,
    )


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _matrix(tensor: Tensor) -> tuple[int, int, int, int, int]:
    rows, cols = tensor.shape
    row_stride, col_stride = tensor.stride()
    return tensor.data_ptr(), rows, cols, row_stride, col_stride


def _vector(tensor: Tensor | None) -> tuple[int, int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape[0], tensor.stride(0))


def _unit_columns(matrix: Tensor) -> Tensor:
    # The kernel reads whole rows; a strided view is rare, and copying it is linear in its size.
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
