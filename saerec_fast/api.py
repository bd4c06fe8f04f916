"""The public ops: check the arguments, choose a backend, run.

Notation: hidden states ``x (..., d)``, ``W_enc (n, d)``, ``b_enc (n)``, ``W_dec (n, d)``, ``b_dec (d)``; float32,
bfloat16 or float16, all of one dtype (float64 runs on the reference). A bias of ``None`` is zero. Inputs may have any
strides and any alignment. Every op is differentiable in its floating point arguments but thresholds.
``backend="auto"`` takes the fastest backend that can run and falls back to the reference (see
:func:`saerec_fast.info.info`); a named one raises ``ValueError`` where it cannot run.

Raised by all: ``TypeError`` for a wrong type or dtype, ``ValueError`` for a wrong shape, device or range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saerec_fast import ops, reference, validation
from saerec_fast.backend import Backend, available_backends, resolve
from saerec_fast.types import (
    Activation,
    Ragged,
    SparseFeatures,
    SteeringPlan,
    TopK,
    TopKResult,
    inference_threshold,
)

_kernels: Any = None
if not available_backends()["cpu"]:
    from saerec_fast.kernels import cpu as _kernels

__all__ = [
    "decode_sparse",
    "encode_features",
    "encode_threshold",
    "encode_topk",
    "linear_topk",
    "reconstruct",
    "steer",
]


def _run(name: str, *args: Any) -> Any:
    """A kernel: directly under inference_mode, through the dispatcher where autograd or a compiler must see it."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return getattr(_kernels, name)(*args)
    return getattr(torch.ops.saerec_fast, name)(*args)


def linear_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    exclude: Ragged | Sequence[Sequence[int] | Tensor] | None = None,
    backend: Backend = "auto",
) -> TopKResult:
    """The k largest of ``x @ weight.T + bias`` per row, exact, without writing the ``(rows, n)`` scores.

    Args:
        x: ``(..., d)``.
        weight: ``(n, d)``, one row per candidate (feature, item).
        bias: ``(n,)``.
        k: how many, 1 ≤ k ≤ n.
        exclude: per row (over the flattened batch) ids to leave out, as :class:`Ragged` or one sequence per row;
            for example the items a user has seen. Rows with fewer than k candidates left end in ``(-inf, -1)``.

    Returns:
        values ``(..., k)`` in the dtype of x and indices int64 ``(..., k)``: descending, ties by smallest
        index, NaN above everything.
    """
    validation.check_hidden("x", x)
    validation.check_weight("weight", weight, x)
    validation.check_bias("bias", bias, weight.shape[0], x)
    validation.check_k(k, weight.shape[0])
    batch_shape = x.shape[:-1]
    excluded = validation.check_exclude(exclude, batch_shape.numel(), x)
    if resolve(backend, x) == "reference":
        validation.check_exclude_ids(excluded, weight.shape[0])
        return reference.linear_topk(x, weight, bias, k=k, exclude=excluded)
    offsets, ids = (None, None) if excluded is None else excluded
    values, indices = _run("linear_topk", _flat(x), weight, bias, k, offsets, ids)
    return TopKResult(values.view(*batch_shape, k), indices.view(*batch_shape, k))


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    *,
    k: int,
    backend: Backend = "auto",
) -> SparseFeatures:
    """Features of a top-k SAE: the k largest of ``W_enc (x − b_dec) + b_enc`` per row, then ReLU.

    Exactly k entries a row, in descending order; entries the ReLU cut stay as zeros.
    """
    validation.check_encoder(x, W_enc, b_enc, b_dec)
    validation.check_k(k, W_enc.shape[0])
    if resolve(backend, x) == "reference":
        return reference.encode_topk(x, W_enc, b_enc, b_dec, k=k)
    values, indices = _run("encode_topk", _flat(x), W_enc, b_enc, b_dec, k)
    batch_shape = x.shape[:-1]
    offsets = ops.uniform_offsets(batch_shape.numel(), k, x.device)
    return SparseFeatures(offsets, indices.view(-1), values.view(-1), W_enc.shape[0], tuple(batch_shape))


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: float | Tensor = 0.0,
    *,
    backend: Backend = "auto",
) -> SparseFeatures:
    """Features whose pre-activation exceeds ``threshold`` (a number or ``(n,)``): 0 is a ReLU, others a JumpReLU.

    The number of entries depends on the data: under ``torch.compile(fullgraph=True)`` set
    ``torch._dynamo.config.capture_dynamic_output_shape_ops = True``.
    """
    validation.check_encoder(x, W_enc, b_enc, b_dec)
    bound = validation.check_threshold(threshold, W_enc.shape[0], x)
    if resolve(backend, x) == "reference":
        return reference.encode_threshold(x, W_enc, b_enc, b_dec, bound)
    offsets, indices, values = _run("encode_threshold", _flat(x), W_enc, b_enc, b_dec, bound)
    return SparseFeatures(offsets, indices, values, W_enc.shape[0], tuple(x.shape[:-1]))


def encode_features(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: float | Tensor,
    features: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Dense activations ``(..., m)`` of the chosen ``features`` (integer ids ``(m,)``) of a threshold SAE."""
    validation.check_encoder(x, W_enc, b_enc, b_dec)
    bound = validation.check_threshold(threshold, W_enc.shape[0], x)
    if features.dim() != 1 or features.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"features: expected integer ids (m,), got {features.dtype} {tuple(features.shape)}")
    n = W_enc.shape[0]
    if features.numel() and (int(features.min()) < 0 or int(features.max()) >= n):
        raise ValueError(f"features: ids go from 0 to {n - 1}, got {int(features.min())} to {int(features.max())}")
    resolve(backend, x)
    # m columns of a matmul: a dense product is the least work, whatever the backend.
    return reference.encode_features(x, W_enc, b_enc, b_dec, bound, features)


def decode_sparse(
    features: SparseFeatures, W_dec: Tensor, b_dec: Tensor | None, *, backend: Backend = "auto"
) -> Tensor:
    """``a W_dec + b_dec``, ``(*batch_shape, d)`` in the dtype of ``W_dec``."""
    if not isinstance(features, SparseFeatures):
        raise TypeError(f"features: expected SparseFeatures, got {type(features).__name__}")
    validation.check_hidden("W_dec", W_dec)
    if W_dec.dim() != 2 or W_dec.shape[0] != features.n_features:
        raise ValueError(f"W_dec: expected shape ({features.n_features}, d), got {tuple(W_dec.shape)}")
    validation.check_bias("b_dec", b_dec, W_dec.shape[1], W_dec)
    if features.values.dtype != W_dec.dtype:
        raise TypeError(f"features: expected values of {W_dec.dtype} like W_dec, got {features.values.dtype}")
    if resolve(backend, W_dec) == "reference":
        return reference.decode_sparse(features, W_dec, b_dec)
    out = _run("decode_sparse", features.offsets, features.indices, features.values, W_dec, b_dec)
    return out.view(*features.batch_shape, W_dec.shape[1])


def reconstruct(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    activation: Activation,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Encode and decode: ``act(W_enc (x − b_dec) + b_enc) W_dec + b_dec``, ``(..., d)``."""
    return steer(x, W_enc, b_enc, b_dec, W_dec, activation, SteeringPlan(mode="reconstruct"), backend=backend)


def steer(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    activation: Activation,
    plan: SteeringPlan,
    *,
    strengths: Tensor | None = None,
    valid: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Encode, edit and decode hidden states in one kernel.

    Args:
        activation: ReLU, JumpReLU, TopK, or BatchTopK with a threshold.
        plan: the edits, their mode and positions.
        strengths: replace the plan's values; ``(m,)``, or broadcastable to ``(..., m)`` for strengths per row.
        valid: bool with the leading shape of x, False on padding, which is left untouched.

    Returns:
        ``(..., d)``, always a fresh tensor. Rows outside the plan's positions, and in delta mode rows whose edits
        change nothing, are the same bits as in x.
    """
    validation.check_encoder(x, W_enc, b_enc, b_dec)
    validation.check_weight("W_dec", W_dec, x)
    if W_dec.shape != W_enc.shape:
        raise ValueError(f"W_dec: expected shape {tuple(W_enc.shape)} like W_enc, got {tuple(W_dec.shape)}")
    validation.check_plan(plan, W_enc.shape[0])
    batch_shape = x.shape[:-1]
    validation.check_strengths(strengths, plan, batch_shape, x)
    k = 0
    threshold: Tensor | None = None
    if isinstance(activation, TopK):
        k = activation.k
        validation.check_k(k, W_enc.shape[0])
    else:
        bound = inference_threshold(activation)
        assert bound is not None
        threshold = validation.check_threshold(bound, W_enc.shape[0], x)
    if resolve(backend, x) == "reference":
        return reference.steer(x, W_enc, b_enc, b_dec, W_dec, activation, plan, strengths=strengths, valid=valid)
    mask = reference.steered_positions(plan, batch_shape, valid, x.device)
    if strengths is None:
        values = torch.tensor(plan.values, dtype=torch.float32, device=x.device)
    elif strengths.dim() == 1:
        values = strengths
    else:
        values = strengths.expand(*batch_shape, len(plan.edits)).reshape(batch_shape.numel(), len(plan.edits))
    out = _run(
        "steer",
        _flat(x),
        W_enc,
        b_enc,
        b_dec,
        W_dec,
        threshold,
        k,
        plan.mode == "reconstruct",
        [edit.feature for edit in plan.edits],
        [ops.EDIT_CODES[edit.op] for edit in plan.edits],
        values,
        None if mask is None else mask.reshape(-1),
    )
    return out.view(x.shape)


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
