"""Encoder weights prepared for the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """What the CPU kernels read to leave most scores out: one byte per weight, scales and error bounds.

    Made by :func:`saerec_fast.pack_weights` from ``weight (n, d)`` and ``bias (n,)``, and given to the ops beside them.
    Results are the same bits with it as without. It may be saved, mapped or shared between processes like any tensor.

    Attributes:
        data: uint8 ``(bytes,)`` with a header that names its version and shape, about ``n · d`` bytes.
        shape: ``(n, d)``.
        source: identifies the tensors it was made from while they live, so that stale ones are noticed; ``None``: do
            not check.
    """

    data: Tensor
    shape: tuple[int, int]
    source: Any = field(default=None, repr=False)


def source_of(weight: Tensor, bias: Tensor | None) -> tuple[Any, ...] | None:
    """Changes when one of the tensors is replaced or written to; ``None`` where that cannot be seen."""
    tensors = [tensor for tensor in (weight, bias) if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
