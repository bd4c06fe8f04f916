"""Pure PyTorch twins of the ops: same names, same signatures less ``backend``; dense and differentiable.

Notation: ``x (..., d)`` hidden states, ``W_enc (n, d)``, ``b_enc (n)``, ``W_dec (n, d)``, ``b_dec (d)``;
``pre = W_enc (x − b_dec) + b_enc``, ``a = act(pre)``, ``x̂ = a W_dec + b_dec``. A bias of ``None`` is zero.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from saerec_fast.types import (
    Activation,
    BatchTopK,
    Edit,
    Ragged,
    SparseFeatures,
    SteeringPlan,
    TopK,
    TopKResult,
    inference_threshold,
)


def linear_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int, exclude: Ragged | None = None
) -> TopKResult:
    """The k largest of ``x @ weight.T + bias`` per row: descending, ties by smallest index, NaN largest."""
    scores = x @ weight.T
    if bias is not None:
        scores = scores + bias
    flat = scores.reshape(-1, weight.shape[0])
    excluded = torch.zeros_like(flat, dtype=torch.bool)
    if exclude is not None:
        excluded[exclude.row_ids(), exclude.ids] = True
    order = flat.detach().sort(dim=-1, descending=True, stable=True).indices
    # A second stable sort moves the excluded behind everything else, also behind scores of -inf.
    last = excluded.gather(-1, order).to(torch.uint8).sort(dim=-1, stable=True).indices
    indices = order.gather(-1, last)[:, :k]
    gone = excluded.gather(-1, indices)
    values = flat.gather(-1, indices).masked_fill(gone, float("-inf"))
    indices = indices.masked_fill(gone, -1)
    shape = (*x.shape[:-1], k)
    return TopKResult(values.reshape(shape), indices.reshape(shape))


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> Tensor:
    """``W_enc (x − b_dec) + b_enc``, dense ``(..., n)``."""
    centred = x if b_dec is None else x - b_dec
    pre = centred @ W_enc.T
    return pre if b_enc is None else pre + b_enc


def activate(pre: Tensor, activation: Activation) -> Tensor:
    """Dense activations of dense pre-activations ``(..., n)``.

    :class:`BatchTopK` without a threshold selects over the whole batch, as in training; with one it is a
    :class:`JumpReLU`.
    """
    if isinstance(activation, TopK):
        top = linear_topk_of_scores(pre, activation.k)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    if isinstance(activation, BatchTopK) and activation.threshold is None:
        flat = pre.reshape(1, -1)
        rows = pre.numel() // max(pre.shape[-1], 1)
        top = linear_topk_of_scores(flat, min(activation.k * rows, flat.shape[-1]))
        return torch.zeros_like(flat).scatter(-1, top.indices, top.values.relu()).reshape(pre.shape)
    threshold = inference_threshold(activation)
    assert threshold is not None  # only TopK has none
    return torch.where(_is_active(pre, threshold), pre, 0)


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, *, k: int) -> SparseFeatures:
    """Features of a top-k SAE: exactly k entries a row, ReLU after the selection."""
    top = linear_topk_of_scores(pre_activations(x, W_enc, b_enc, b_dec), k)
    batch_shape = tuple(x.shape[:-1])
    rows = top.values.shape[:-1].numel()
    offsets = torch.arange(rows + 1, device=x.device) * k
    return SparseFeatures(
        offsets, top.indices.reshape(-1).int(), top.values.reshape(-1).relu(), W_enc.shape[0], batch_shape
    )


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: float | Tensor = 0.0,
    capacity: int | None = None,
) -> SparseFeatures:
    """Features whose pre-activation exceeds ``threshold`` (a number or ``(n,)``); NaN counts as active. With a
    ``capacity`` the first ones in row order, in as many places, and their number without it in ``n_active``."""
    flat = pre_activations(x, W_enc, b_enc, b_dec).reshape(-1, W_enc.shape[0])
    active = _is_active(flat, threshold)
    offsets = torch.cat([active.new_zeros(1, dtype=torch.int64), active.sum(-1).cumsum(0)])
    n, batch_shape = W_enc.shape[0], tuple(x.shape[:-1])
    if capacity is not None:
        # Nothing here depends on the number of entries; what is off or too much goes to one place more.
        on = active.reshape(-1)
        places = torch.where(on, on.cumsum(0) - 1, capacity).clamp(max=capacity)
        columns = torch.arange(n, dtype=torch.int32, device=x.device).repeat(flat.shape[0])
        indices = columns.new_full((capacity + 1,), -1).scatter(0, places, columns)[:capacity]
        values = flat.new_zeros(capacity + 1).scatter(0, places, flat.reshape(-1))[:capacity]
        return SparseFeatures(offsets.clamp(max=capacity), indices, values, n, batch_shape, offsets[-1])
    rows, columns = active.nonzero(as_tuple=True)
    return SparseFeatures(offsets, columns.int(), flat[rows, columns], n, batch_shape)


def encode_features(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: float | Tensor,
    features: Tensor,
) -> Tensor:
    """Dense activations ``(..., m)`` of the chosen features ``(m,)`` of a threshold SAE."""
    chosen_bias = None if b_enc is None else b_enc[features]
    pre = pre_activations(x, W_enc[features], chosen_bias, b_dec)
    if isinstance(threshold, Tensor) and threshold.numel() > 1:
        threshold = threshold[features]
    return torch.where(_is_active(pre, threshold), pre, 0)


def decode_sparse(features: SparseFeatures, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """``a W_dec + b_dec``, ``(*batch_shape, d)``."""
    decoded = features.dense() @ W_dec
    return decoded if b_dec is None else decoded + b_dec


def reconstruct(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    activation: Activation,
) -> Tensor:
    """Encode and decode: ``act(W_enc (x − b_dec) + b_enc) W_dec + b_dec``."""
    decoded = activate(pre_activations(x, W_enc, b_enc, b_dec), activation) @ W_dec
    return decoded if b_dec is None else decoded + b_dec


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
) -> Tensor:
    """Encode, edit, decode. ``strengths`` ``(m,)`` or ``(..., m)`` replace the plan's values; rows outside the
    plan's positions, or not ``valid`` (bool, leading shape of ``x``), come back unchanged."""
    if plan.mode == "delta" and not plan.edits:
        return x.clone()
    a = activate(pre_activations(x, W_enc, b_enc, b_dec), activation)
    values = x.new_tensor(plan.values) if strengths is None else strengths.to(x.dtype)
    edited = a
    for j, edit in plan.feature_edits:
        column = apply_edit(edited[..., edit.feature], edit, values[..., j])
        index = torch.tensor([edit.feature], device=x.device)
        edited = edited.index_copy(-1, index, column.unsqueeze(-1))
    if plan.mode == "delta":
        change = x.new_zeros(())
        changed = sorted({edit.feature for _, edit in plan.feature_edits})
        columns = []
        for feature in changed:
            own = [(j, edit) for j, edit in plan.feature_edits if edit.feature == feature]
            if all(edit.op == "add" for _, edit in own):
                # a cancels, also where it is infinite or NaN.
                columns.append(values[..., [j for j, _ in own]].sum(-1).expand(x.shape[:-1]))
            else:
                columns.append(edited[..., feature] - a[..., feature])
        if changed:
            change = torch.stack(columns, -1) @ W_dec[changed]
        if plan.directions:
            change = change + along_directions(plan, values)
        steered = add_change(x, change)
    else:
        steered = edited @ W_dec
        steered = steered if b_dec is None else steered + b_dec
        if plan.directions:
            steered = steered + along_directions(plan, values)
    mask = steered_positions(plan, x.shape[:-1], valid, x.device)
    steered = steered if mask is None else torch.where(mask.unsqueeze(-1), steered, x)
    return limit_change(x, steered, plan)


def fold_normalization(
    W_enc: Tensor, b_dec: Tensor, W_dec: Tensor, mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``W_enc / std``, ``std · b_dec + mean`` and ``std · W_dec``: weights for hidden states in their own units.

    In float32 at least, so that a bfloat16 weight is rounded once.
    """
    wide = torch.promote_types(W_enc.dtype, torch.float32)
    return (
        (W_enc.to(wide) / std).to(W_enc.dtype),
        (b_dec.to(wide) * std + mean).to(b_dec.dtype),
        fold_decoder(W_dec, std),
    )


def fold_decoder(W_dec: Tensor, std: Tensor) -> Tensor:
    """The last of :func:`fold_normalization`, alone."""
    return (W_dec.to(torch.promote_types(W_dec.dtype, torch.float32)) * std).to(W_dec.dtype)


def along_directions(plan: SteeringPlan, values: Tensor) -> Tensor:
    """What the plan's directions add, ``(..., d)``, for the values ``(..., m)`` of all its edits."""
    places = [j for j, _ in plan.directions]
    vectors = torch.stack([direction.vector for _, direction in plan.directions]).to(values)
    return values[..., places] @ vectors


def add_change(x: Tensor, change: Tensor) -> Tensor:
    """``x + change``, where a change of zero keeps the bits of ``x``: x + 0.0 would turn -0.0 into 0.0."""
    return x - (-change + 0.0)


def limit_change(x: Tensor, steered: Tensor, plan: SteeringPlan) -> Tensor:
    """``steered`` with changes of more than ``plan.max_relative_norm · ‖x‖`` dealt with as the plan says.

    Raises:
        ValueError: the plan rejects such a change.
    """
    limit = plan.max_relative_norm
    if limit is None:
        return steered
    change = (steered - x).to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(change.dtype).tiny
    norm = torch.linalg.vector_norm(x.to(change.dtype), dim=-1, keepdim=True)
    change_norm = torch.linalg.vector_norm(change, dim=-1, keepdim=True)
    if plan.on_excess != "clip":
        if torch.compiler.is_compiling():
            raise ValueError(f"on_excess: {plan.on_excess!r} has to look at values; compiled code takes 'clip' only")
        # What is not a number is not compared.
        relative = (change_norm / norm.clamp_min(tiny)).detach().nan_to_num(0.0)
        report_excess(float(relative.amax()) if x.numel() else 0.0, plan)
        return steered
    allowed = limit * norm
    clipped = x + (change * (allowed / change_norm.clamp_min(tiny))).to(x.dtype)
    return torch.where(change_norm > allowed, clipped, steered)


def report_excess(relative: float, plan: SteeringPlan) -> None:
    """Warn of, or reject, a largest relative change above the plan's limit, unless the plan clips it.

    Raises:
        ValueError: the plan rejects such a change.
    """
    if plan.max_relative_norm is None or plan.on_excess == "clip" or not relative > plan.max_relative_norm:
        return
    message = (
        f"plan: changes a hidden state by {relative:.3g} times its norm, more than max_relative_norm "
        f"{plan.max_relative_norm:g}"
    )
    if plan.on_excess == "reject":
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def apply_edit(a: Tensor, edit: Edit, value: Tensor) -> Tensor:
    """One edit applied to activations ``a (...)`` with ``value`` broadcast against it."""
    match edit.op:
        case "set":
            return value.expand_as(a).to(a.dtype)
        case "add":
            return a + value
        case "scale":
            return a * value
        case "clamp_min":
            return torch.maximum(a, value.to(a.dtype))
        case "clamp_max":
            return torch.minimum(a, value.to(a.dtype))
    raise ValueError(f"op: unknown {edit.op!r}")


def steered_positions(
    plan: SteeringPlan, batch_shape: torch.Size, valid: Tensor | None, device: torch.device
) -> Tensor | None:
    """The rows a plan changes, bool ``batch_shape``; ``None`` means all of them.

    ``last`` is each sequence's last valid position along the last batch dimension.

    Raises:
        TypeError: a mask that is not a bool tensor.
        ValueError: a mask whose shape is not ``batch_shape``, or ``last`` without a sequence dimension.
    """
    if valid is not None and (not isinstance(valid, Tensor) or valid.dtype != torch.bool):
        came = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid: expected a bool tensor, got {came}")
    if valid is not None and valid.shape != batch_shape:
        raise ValueError(f"valid: expected shape {tuple(batch_shape)}, got {tuple(valid.shape)}")
    if isinstance(plan.positions, Tensor):
        if plan.positions.shape != batch_shape:
            raise ValueError(
                f"positions: expected a mask of shape {tuple(batch_shape)}, got {tuple(plan.positions.shape)}"
            )
        mask = plan.positions.to(device)
        return mask if valid is None else mask & valid
    if plan.positions == "all":
        return valid
    if not batch_shape:
        raise ValueError("positions: 'last' needs hidden states (..., length, d), got (d,)")
    length = batch_shape[-1]
    steps = torch.arange(length, device=device).expand(batch_shape)
    if valid is None:
        return steps == length - 1
    last = torch.where(valid, steps, -1).amax(-1, keepdim=True) if length else steps
    return valid & (steps == last)


def linear_topk_of_scores(scores: Tensor, k: int) -> TopKResult:
    """Top-k of ready scores ``(..., n)`` under the order of :func:`linear_topk`."""
    indices = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return TopKResult(scores.gather(-1, indices), indices)


def _is_active(pre: Tensor, threshold: float | Tensor) -> Tensor:
    # "Not ≤" rather than ">": a NaN must stay visible in the output, as with torch.relu.
    return ~(pre <= threshold)
