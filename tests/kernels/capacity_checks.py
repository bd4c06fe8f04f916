"""What ``encode_threshold`` promises with a capacity, for every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import Inputs
from helpers import assert_equal, assert_same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import saerec_fast as fast

ATEN = torch.ops.aten
# What makes the host wait for a device, or gives a tensor whose size the host must know.
WAITING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.is_nonzero, ATEN.equal}


class RefuseWaiting(TorchDispatchMode):
    """Inside, an operator that would wait for a device raises."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operator.overloadpacket not in WAITING, f"{operator} waits for the device"
        return operator(*args, **(kwargs or {}))


def without_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in which what would make the host wait for a device raises; on a GPU by PyTorch's own check too."""

    def run(*args: Any, **options: Any) -> Any:
        previous = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
        if previous is not None:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with RefuseWaiting():
                return function(*args, **options)
        finally:
            if previous is not None:
                torch.cuda.set_sync_debug_mode(previous)

    return run


def check_capacity(inputs: Inputs, threshold: float | Tensor, capacity: int, backend: str) -> None:
    """The first entries of the exact form, a defined tail, and what consumers make of them."""
    exact = fast.encode_threshold(*inputs[:4], threshold, backend=backend)
    fixed = fast.encode_threshold(*inputs[:4], threshold, capacity=capacity, backend=backend)
    entries = len(exact.indices)
    stored = min(entries, capacity)
    assert exact.n_active is None
    assert fixed.n_active is not None
    assert (fixed.n_active.shape, fixed.n_active.dtype) == ((), torch.int64)
    assert int(fixed.n_active) == entries
    assert fixed.indices.shape == fixed.values.shape == (capacity,)
    assert (fixed.indices.dtype, fixed.values.dtype) == (torch.int32, inputs.x.dtype)
    assert_equal(fixed.offsets, exact.offsets.clamp(max=capacity))
    assert_equal(fixed.indices[:stored], exact.indices[:stored])
    assert_same_bits(fixed.values[:stored], exact.values[:stored])
    assert (fixed.indices[stored:] == -1).all()
    assert (fixed.values[stored:] == 0).all()
    cut = exact._replace(offsets=fixed.offsets, indices=exact.indices[:stored], values=exact.values[:stored])
    assert_same_bits(fixed.dense(), cut.dense())
    assert_equal(fixed.to_sparse_csr().to_dense(), cut.to_sparse_csr().to_dense())
    decoded = fast.decode_sparse(fixed, inputs.W_dec, inputs.b_dec, backend=backend)
    assert_same_bits(decoded, fast.decode_sparse(cut, inputs.W_dec, inputs.b_dec, backend=backend))


def capacities_around(inputs: Inputs, threshold: float | Tensor) -> list[int]:
    """None, one, and the number of entries with one less and one more, and many more."""
    entries = len(fast.encode_threshold(*inputs[:4], threshold, backend="reference").indices)
    return sorted({0, 1, max(entries - 1, 0), entries, entries + 1, entries + 40})


def check_gradients(inputs: Inputs, threshold: float, capacity: int, backend: str) -> None:
    """Those of the exact form's first entries; none through entries that were cut or places that hold nothing."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randint(-2, 3, (max(capacity, 1),), generator=generator).to(inputs.x)
    found = []
    for limit in (None, capacity):
        leaves = Inputs(*(tensor.clone().requires_grad_() for tensor in inputs))
        features = fast.encode_threshold(*leaves[:4], threshold, capacity=limit, backend=backend)
        if limit is None:
            stored = min(len(features.indices), capacity)
            features = features._replace(
                offsets=features.offsets.clamp(max=capacity),
                indices=features.indices[:stored],
                values=features.values[:stored],
            )
        decoded = fast.decode_sparse(features, leaves.W_dec, leaves.b_dec, backend=backend)
        loss = decoded.sum() + (features.values * weights[: len(features.values)]).sum() + features.dense().sum()
        found.append(torch.autograd.grad(loss, leaves))
    for name, actual, expected in zip(Inputs._fields, found[1], found[0], strict=True):
        assert torch.equal(actual, expected), name
