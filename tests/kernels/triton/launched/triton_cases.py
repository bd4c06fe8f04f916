"""Shared by these tests: where kernels run, sizes that take the interpreter seconds, data whose float32 sums are exact.

Tests hold tensors on the CPU, compute what they expect there, and reach the kernels through ``device``, ``operators``
and :func:`on_device` alone. On a GPU these move what a kernel is given there, and what it returns back; under
TRITON_INTERPRET=1 the CPU is the device. conftest.py refuses any other way to a kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from cases import DTYPES, KERNEL_CASES, Case
from helpers import assert_equal, moved

import saerec_fast as fast
from saerec_fast import ops, reference
from saerec_fast.kernels.triton.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
# What runs on the device now, in whatever threads.
running: list[Callable[..., Any]] = []


def to(device: str, value: Any) -> Any:
    """Tensors, and what ops are given and return that holds some, on a device; they keep their layout."""
    if isinstance(value, torch.Tensor):
        return moved(value, device)
    if isinstance(value, fast.JumpReLU):
        return fast.JumpReLU(to(device, value.threshold))
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).to(device)
    if isinstance(value, (tuple, list)):
        parts = [to(device, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def on_device(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a function returns for arguments on the device, on the CPU."""
    running.append(function)
    try:
        result = function(*to(DEVICE, args), **{name: to(DEVICE, value) for name, value in options.items()})
    finally:
        running.pop()
    return to("cpu", result)


# The public ops on the Triton kernels, and torch.ops.saerec_fast_triton; from and to tensors on the CPU.
OPS = set(reference.__all__) & set(fast.__all__)
device = SimpleNamespace(**{name: partial(on_device, getattr(fast, name), backend="triton") for name in OPS})
_triton = ops.operators_of("triton")
operators = SimpleNamespace(**{name: partial(on_device, getattr(_triton, name)) for name in ops._SCHEMAS})

# A compiler takes a second for what the interpreter starts at once: on a GPU each size has one dtype, in turn.
SMALL_CASES = [case for case in KERNEL_CASES if case.rows <= 13]
if not INTERPRETED:
    SMALL_CASES = [case for i, case in enumerate(SMALL_CASES) if i % 3 == i // 3 % 3]
# More features than the list of candidates holds, and more rows than a tile: every kernel of a top-k runs.
TWO_PASS_CASES = [Case(17, 257, 33, 70, DTYPES[0]), *(Case(40, 700, 16, 9, dtype) for dtype in DTYPES)]
# Many programs, and rows in several waves of them; for compiled code.
LARGE_CASES = [] if INTERPRETED else [Case(64, 2048, 32, 1000, dtype) for dtype in DTYPES]


def integers(
    *shape: int, low: int = -2, high: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def check_top_k(x, weight, bias=None, *, k, exclude=None) -> fast.TopKResult:
    """Equality with the float64 reference, rounded once."""
    result = device.linear_topk(x, weight, bias, k=k, exclude=exclude)
    if exclude is not None and not isinstance(exclude, fast.Ragged):
        exclude = fast.Ragged.from_lists(exclude)
    bias = None if bias is None else bias.double()
    expected = reference.linear_topk(x.double(), weight.double(), bias, k=k, exclude=exclude)
    assert_equal(result.indices, expected.indices)
    assert_equal(result.values, expected.values.to(x.dtype))
    return result
