"""The public ops: check the arguments, choose a backend, run.

Notation: hidden states ``x (..., d)``, ``W_enc (n, d)``, ``b_enc (n)``, ``W_dec (n, d)``, ``b_dec (d)``; float32,
bfloat16 or float16, all of one dtype (float64 runs on the reference). A bias of ``None`` is zero. Inputs may have any
strides and any alignment. Every op is differentiable in its floating point arguments but thresholds.
``backend="auto"`` takes the fastest backend that can run and falls back to the reference (see
:func:`saerec_fast.info.info`); a named one raises ``ValueError`` where it cannot run. ``"triton"`` takes CUDA
tensors, selects up to 512 features, and has not run on hardware yet (docs/gpu.md); ``packed`` is for the CPU kernels.

Raised by all: ``TypeError`` for a wrong type or dtype, ``ValueError`` for a wrong shape, device or range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saerec_fast import ops, reference, validation
from saerec_fast.backend import Backend, available_backends, is_transformed, resolve
from saerec_fast.types import (
    Activation,
    PackedWeights,
    Ragged,
    SparseFeatures,
    SteeringPlan,
    TopK,
    TopKResult,
    inference_threshold,
)
from saerec_fast.types.packed import source_of

if TYPE_CHECKING:
    from saerec_fast._C import SteerPlans
    from saerec_fast.kernels.cpu import BoundSteer

# First byte of PackedHeader.usable, see csrc/include/saerec/packed.h.
_USABLE = 12

_kernels: Any = None
if not available_backends()["cpu"]:
    from saerec_fast.kernels import cpu as _kernels

__all__ = [
    "decode_sparse",
    "encode_features",
    "encode_threshold",
    "encode_topk",
    "linear_topk",
    "pack_weights",
    "reconstruct",
    "steer",
]


def _run(backend: str, name: str, *args: Any) -> Any:
    """A kernel: directly under inference_mode, through the dispatcher where autograd or a compiler must see it."""
    if backend == "cpu" and not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return getattr(_kernels, name)(*args)
    return getattr(ops.operators_of(backend), name)(*args)


def pack_weights(weight: Tensor, bias: Tensor | None = None) -> PackedWeights:
    """Prepare encoder weights (or item embeddings) for many calls.

    The CPU kernels screen scores with a copy of the weights in bytes. Batches of 16 rows and more make it on the fly,
    at about the price of scoring a dozen rows; packed once, smaller batches are screened too.

    Args:
        weight: ``(n, d)`` on the CPU; float32, bfloat16 or float16.
        bias: ``(n,)``, the one that will be given beside ``weight``.

    Returns:
        What the ops take as ``packed``, as long as neither tensor changes.

    Raises:
        ValueError: weights or bias that are not finite, or not on the CPU; no kernels here to pack for.
    """
    validation.check_hidden("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected a tensor (n, d), got {tuple(weight.shape)}")
    validation.check_bias("bias", bias, weight.shape[0], weight)
    if resolve("cpu", weight) != "cpu" or _kernels is None:
        raise ValueError("backend: weights are packed for the CPU kernels, which cannot run here")
    n, d = weight.shape
    # Not as an inference tensor, even where inference_mode is on: a later call may save it for its backward.
    with torch.inference_mode(False), torch.no_grad():
        data = _kernels.pack(weight.detach(), bias)
    if int(data[_USABLE]) == 0:
        # The kernel, which has seen every weight, has found one that is too large or not finite. PyTorch looks only
        # now: in a forked child its threads would be waited for in vain.
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return PackedWeights(data, (n, d), source_of(weight, bias))


def linear_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    exclude: Ragged | Sequence[Sequence[int] | Tensor] | None = None,
    packed: PackedWeights | None = None,
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
        packed: ``pack_weights(weight, bias)``, made once; results are the same without.

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
    packed_bytes = validation.check_packed(packed, weight, bias)
    chosen = resolve(backend, x)
    if chosen == "reference":
        validation.check_exclude_values(excluded, weight.shape[0])
        return reference.linear_topk(x, weight, bias, k=k, exclude=excluded)
    if chosen != "cpu" and not torch.compiler.is_compiling():
        # Only the C++ kernels look for themselves; elsewhere it means to wait for the device.
        validation.check_exclude_values(excluded, weight.shape[0])
    offsets, ids = (None, None) if excluded is None else excluded
    values, indices = _run(chosen, "linear_topk", _flat(x), weight, bias, k, offsets, ids, packed_bytes)
    return TopKResult(values.view(*batch_shape, k), indices.view(*batch_shape, k))


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    *,
    k: int,
    packed: PackedWeights | None = None,
    backend: Backend = "auto",
) -> SparseFeatures:
    """Features of a top-k SAE: the k largest of ``W_enc (x − b_dec) + b_enc`` per row, then ReLU.

    Exactly k entries a row, in descending order; entries the ReLU cut stay as zeros. ``packed``:
    ``pack_weights(W_enc, b_enc)``, made once.
    """
    validation.check_encoder(x, W_enc, b_enc, b_dec)
    validation.check_k(k, W_enc.shape[0])
    packed_bytes = validation.check_packed(packed, W_enc, b_enc)
    chosen = resolve(backend, x)
    if chosen == "reference":
        return reference.encode_topk(x, W_enc, b_enc, b_dec, k=k)
    values, indices = _run(chosen, "encode_topk", _flat(x), W_enc, b_enc, b_dec, k, packed_bytes)
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
    capacity: int | None = None,
    packed: PackedWeights | None = None,
    backend: Backend = "auto",
) -> SparseFeatures:
    """Features whose pre-activation exceeds ``threshold`` (a number or ``(n,)``): 0 is a ReLU, others a JumpReLU.

    Args:
        capacity: ``None`` returns all entries. Their number depends on the data: the host waits for it, and under
            ``torch.compile(fullgraph=True)`` set ``torch._dynamo.config.capture_dynamic_output_shape_ops = True``. A
            number ≥ 0 fixes the shape of ``indices`` and ``values`` to ``(capacity,)``, and nothing waits: the same
            entries in the same order as far as they fit, then indices of -1 and values of 0. ``offsets`` end at what
            was stored; ``n_active`` (int64 scalar tensor, on the device) counts all: where it exceeds ``capacity``, the
            last entries are missing, get no gradient, and a second call with a larger capacity finds them.
        packed: ``pack_weights(W_enc, b_enc)``, made once.
    """
    validation.check_encoder(x, W_enc, b_enc, b_dec)
    packed_bytes = validation.check_packed(packed, W_enc, b_enc)
    bound = validation.check_threshold(threshold, W_enc.shape[0], x)
    validation.check_capacity(capacity)
    chosen = resolve(backend, x)
    if chosen == "reference":
        return reference.encode_threshold(x, W_enc, b_enc, b_dec, bound, capacity)
    arguments = (_flat(x), W_enc, b_enc, b_dec, bound, packed_bytes, capacity)
    offsets, indices, values = _run(chosen, "encode_threshold", *arguments)
    n_active = None
    if capacity is not None:
        n_active, offsets = offsets[-1], offsets.clamp(max=capacity)
    return SparseFeatures(offsets, indices, values, W_enc.shape[0], tuple(x.shape[:-1]), n_active)


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
    validation.check_features(features, W_enc.shape[0])
    chosen = resolve(backend, x)
    if chosen == "reference":
        return reference.encode_features(x, W_enc, b_enc, b_dec, bound, features)
    out = _run(chosen, "encode_features", _flat(x), W_enc, b_enc, b_dec, bound, features)
    return out.view(*x.shape[:-1], features.shape[0])


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
    chosen = resolve(backend, W_dec)
    if chosen == "reference":
        return reference.decode_sparse(features, W_dec, b_dec)
    out = _run(chosen, "decode_sparse", features.offsets, features.indices, features.values, W_dec, b_dec)
    return out.view(*features.batch_shape, W_dec.shape[1])


def reconstruct(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    activation: Activation,
    *,
    packed: PackedWeights | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Encode and decode in one kernel: ``act(W_enc (x − b_dec) + b_enc) W_dec + b_dec``, ``(..., d)``.

    ``packed``: ``pack_weights(W_enc, b_enc)``, made once.
    """
    k, threshold = _check_autoencoder(x, W_enc, b_enc, b_dec, W_dec, activation)
    packed_bytes = validation.check_packed(packed, W_enc, b_enc)
    chosen = resolve(backend, x)
    if chosen == "reference":
        return reference.reconstruct(x, W_enc, b_enc, b_dec, W_dec, activation)
    return _run(chosen, "reconstruct", _flat(x), W_enc, b_enc, b_dec, W_dec, threshold, k, packed_bytes).view(x.shape)


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
    packed: PackedWeights | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Encode, edit and decode hidden states in one kernel.

    Args:
        activation: ReLU, JumpReLU, TopK, or BatchTopK with a threshold.
        plan: the edits, their mode and positions.
        strengths: replace the plan's values; ``(m,)``, or broadcastable to ``(..., m)`` for strengths per row.
        valid: bool with the leading shape of x, False on padding, which is left untouched.
        packed: ``pack_weights(W_enc, b_enc)``, made once; of use where the whole dictionary is encoded.

    Under forward-mode derivatives and transforms of ``torch.func`` the backend ``auto`` is the reference.

    Returns:
        ``(..., d)``, always a fresh tensor. Rows outside the plan's positions, and in delta mode rows whose edits
        change nothing, are the same bits as in x.
    """
    k, threshold = _check_autoencoder(x, W_enc, b_enc, b_dec, W_dec, activation)
    validation.check_plan(plan, *W_enc.shape)
    batch_shape = x.shape[:-1]
    validation.check_strengths(strengths, plan, batch_shape, x)
    packed_bytes = validation.check_packed(packed, W_enc, b_enc)
    # The kernels know neither tangents nor batching rules.
    chosen = "reference" if backend == "auto" and is_transformed() else resolve(backend, x)
    if backend == "auto" and torch.compiler.is_compiling() and _is_by_features(plan, k):
        return steer_by_features(x, W_enc, b_enc, b_dec, W_dec, threshold, plan, strengths=strengths, valid=valid)
    if chosen == "reference":
        return reference.steer(x, W_enc, b_enc, b_dec, W_dec, activation, plan, strengths=strengths, valid=valid)
    autoencoder = W_enc, b_enc, b_dec, W_dec, threshold, k
    return _steer_rows(chosen, "steer", x, autoencoder, plan, strengths, valid, packed_bytes)


def _is_by_features(plan: SteeringPlan, k: int) -> bool:
    """Whether a compiler does better with the ops of such a plan as part of its graph."""
    return plan.only_adds or (plan.mode == "delta" and k == 0)


def steer_normalized(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    scalars: tuple[Tensor, Tensor] | None,
    activation: Activation,
    plan: SteeringPlan,
    *,
    strengths: Tensor | None,
    valid: Tensor | None,
) -> Tensor | None:
    """:func:`steer` with weights of normalised hidden states, ``(x − mean) / std``, for graphs: the operator keeps what
    it makes of the weights from one call to the next, which a graph would make anew in each. ``None`` where a graph
    does better otherwise, or no kernel runs.

    Args:
        weights: ``W_enc``, ``b_enc``, ``b_dec`` and ``W_dec``.
        scalars: ``mean`` and ``std``, ``None`` for 0 and 1.
    """
    k, threshold = _check_autoencoder(x, *weights, activation)
    if _is_by_features(plan, k) or is_transformed() or resolve("auto", x) != "cpu":
        return None
    validation.check_plan(plan, *weights[0].shape)
    validation.check_strengths(strengths, plan, x.shape[:-1], x)
    autoencoder = *weights, threshold, k
    mean, std = (None, None) if scalars is None else scalars
    return _steer_rows("cpu", "steer_normalized", x, autoencoder, plan, strengths, valid, mean, std)


def _steer_rows(
    backend: str,
    name: str,
    x: Tensor,
    autoencoder: tuple[Any, ...],
    plan: SteeringPlan,
    strengths: Tensor | None,
    valid: Tensor | None,
    *rest: Tensor | None,
) -> Tensor:
    """The kernel of that name, and what it leaves to do of the plan. ``rest``: its last arguments."""
    mask = reference.steered_positions(plan, x.shape[:-1], valid, x.device)
    values = _values_of_rows(x, plan, strengths)
    row_mask = None if mask is None else mask.reshape(-1)
    edits = _edits(plan, values)
    out = _run(backend, name, _flat(x), *autoencoder, plan.mode == "reconstruct", *edits, row_mask, *rest)
    return _with_directions_and_limit(x, out, plan, values, mask)


def steer_by_features(
    x: Tensor,
    W_enc: Tensor | None,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    plan: SteeringPlan,
    *,
    strengths: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """:func:`steer` in PyTorch's own ops, which a compiler fuses into the layers around it: for plans that only add,
    which need no encoder (all of it may be ``None``), and where features do not compete (``threshold`` ``(1,)`` or
    ``(n,)``) for any plan in delta mode. Trusts its arguments, but for the shapes of masks.
    """
    mask = reference.steered_positions(plan, x.shape[:-1], valid, x.device)
    values = _values_of_rows(x, plan, strengths)
    row_mask = None if mask is None else mask.reshape(-1)
    out = ops.steer_by_features(_flat(x), W_enc, b_enc, b_dec, W_dec, threshold, *_edits(plan, values), row_mask)
    return _with_directions_and_limit(x, out, plan, values, mask)


def _edits(plan: SteeringPlan, values: Tensor) -> tuple[list[int], list[int], Tensor]:
    """The edits of features alone: ids, codes of their ops, and their share of ``values``."""
    codes = [ops.EDIT_CODES[op] for op in plan.ops]
    if plan.direction_width is not None:
        values = values[..., [j for j, _ in plan.feature_edits]]
    return list(plan.features), codes, values


def _values_of_rows(x: Tensor, plan: SteeringPlan, strengths: Tensor | None) -> Tensor:
    """What the plan's edits do by how much: ``(m,)``, or ``(rows, m)`` for the rows of the flattened batch."""
    if strengths is None:
        return torch.tensor(plan.values, dtype=torch.float32, device=x.device)
    if strengths.dim() == 1:
        return strengths
    batch_shape, m = x.shape[:-1], len(plan.edits)
    return strengths.expand(*batch_shape, m).reshape(math.prod(batch_shape), m)


def _with_directions_and_limit(
    x: Tensor, rows: Tensor, plan: SteeringPlan, values: Tensor, mask: Tensor | None
) -> Tensor:
    """``rows (R, d)``, in which features are edited already, in the shape of ``x`` and with the rest of the plan."""
    out = rows.view(x.shape)
    if plan.direction_width is not None:
        all_values = values if values.dim() == 1 else values.reshape(*x.shape[:-1], len(plan.edits))
        moved = reference.add_change(out, reference.along_directions(plan, all_values).to(x.dtype))
        out = moved if mask is None else torch.where(mask.unsqueeze(-1), moved, out)
    return reference.limit_change(x, out, plan)


def _check_autoencoder(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, W_dec: Tensor, activation: Activation
) -> tuple[int, Tensor | None]:
    """Checks the parts of an SAE; ``k`` of a top-k (0 otherwise) and the threshold of the others."""
    validation.check_encoder(x, W_enc, b_enc, b_dec)
    validation.check_weight("W_dec", W_dec, x)
    if W_dec.shape != W_enc.shape:
        raise ValueError(f"W_dec: expected shape {tuple(W_enc.shape)} like W_enc, got {tuple(W_dec.shape)}")
    if isinstance(activation, TopK):
        validation.check_k(activation.k, W_enc.shape[0])
        return activation.k, None
    bound = inference_threshold(activation)
    assert bound is not None  # only TopK has none
    return 0, validation.check_threshold(bound, W_enc.shape[0], x)


def bind_reconstruct(
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    activation: Activation,
    packed: PackedWeights | None,
) -> Callable[[Tensor], Tensor] | None:
    """:func:`reconstruct` with all but ``x`` checked and fixed, without gradients; ``None`` where no kernel runs.

    What it returns takes CPU tensors ``(..., d)`` of the weights' dtype, and trusts that they are.
    """
    k, threshold = _check_autoencoder(W_enc, W_enc, b_enc, b_dec, W_dec, activation)
    packed_bytes = validation.check_packed(packed, W_enc, b_enc)
    if resolve("auto", W_enc) != "cpu" or _kernels is None:
        return None
    bound: Callable[[Tensor], Tensor] = _kernels.BoundReconstruct(
        W_enc.detach(), b_enc, b_dec, W_dec.detach(), threshold, k, packed_bytes
    )
    return bound


def bind_steer(
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    activation: Activation,
    packed: PackedWeights | None,
) -> BoundSteer | None:
    """:func:`steer` with the autoencoder checked and fixed, without gradients; ``None`` where no kernel runs.

    What it returns trusts its arguments: CPU tensors of the weights' dtype, and plans that fit.
    """
    k, threshold = _check_autoencoder(W_enc, W_enc, b_enc, b_dec, W_dec, activation)
    packed_bytes = validation.check_packed(packed, W_enc, b_enc)
    if resolve("auto", W_enc) != "cpu" or _kernels is None:
        return None
    bound: BoundSteer = _kernels.BoundSteer(W_enc.detach(), b_enc, b_dec, W_dec.detach(), threshold, k, packed_bytes)
    return bound


def steer_plans(
    plan: SteeringPlan | Sequence[SteeringPlan | None], strengths: Tensor | None = None
) -> SteerPlans | None:
    """What the ``run`` of :meth:`SparseAutoencoder.bind_steer` steers by, ``None`` where there are no kernels.

    Args:
        plan: for all sequences, or one (or ``None``) for each. One that ``run`` does not take makes it return ``None``.
        strengths: replace the values of the one plan: ``(m,)`` or ``(B, m)``; read anew in every call.
    """
    if _kernels is None:
        return None
    plans: SteerPlans = _kernels.steer_plans(plan, strengths)
    return plans


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
