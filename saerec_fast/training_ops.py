"""What training does beside the public ops: chooses a backend and runs it.

Arguments are trusted, and described by the reference twins in :mod:`saerec_fast.reference.training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saerec_fast import ops, reference
from saerec_fast.backend import available_backends, resolve

_kernels: Any = None
if not available_backends()["cpu"]:
    from saerec_fast.kernels import cpu as _kernels

__all__ = ["adam_step", "largest_entries", "sparse_training_step"]


def largest_entries(offsets: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    chosen = resolve("auto", values)
    if chosen == "reference":
        return reference.largest_entries(offsets, values, count)
    kept_offsets, kept = ops.operators_of(chosen).largest_entries(offsets, values, count)
    return kept_offsets, kept


def sparse_training_step(x: Tensor, *args: Any, out: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns sums and counts; the residual and the gradients of W_enc, b_enc, W_dec and b_dec go to ``out``."""
    if resolve("auto", x) == "cpu":
        # The operator without the dispatcher, which knows no tensors to write to.
        sums, counts, *_ = _kernels.sparse_training_step(x, *args, out=out)
    else:
        sums, counts, *results = reference.sparse_training_step(x, *args)
        for tensor, result in zip(out, results, strict=True):
            tensor.copy_(result)
    return sums, counts


def adam_step(parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *args: Any) -> None:
    tensors = (parameter, gradient, exp_avg, exp_avg_sq)
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    if fits and _kernels is not None:
        _kernels.adam_step(*tensors, *args)
        # Weights that were folded or packed are kept until a version counter moves.
        torch.autograd.graph.increment_version(parameter)
    else:
        reference.adam_step(*tensors, *args)
