"""From CPU tensors to the C++ kernels.

Arguments are trusted: the public ops in :mod:`saerec_fast.api` have checked them. Hidden states come as ``(R, d)``
with any strides; all tensors of a call but thresholds, edit values and offsets share one dtype.
"""

from __future__ import annotations

import math
import weakref
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saerec_fast import _C
from saerec_fast.backend import MODE_COUNTERS
from saerec_fast.reference import fold_normalization
from saerec_fast.types.plan import OPS, Direction, SteeringPlan

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INDEX_TYPE = {torch.int32: 0, torch.int64: 1}
# The C interface that tells all of a tensor at once (DLPack 1.3, from torch 2.10 on), else None.
TENSOR_EXCHANGE: object = getattr(Tensor, "__dlpack_c_exchange_api__", None)


def _matrix(tensor: Tensor) -> tuple[int, int, int, int, int]:
    rows, cols = tensor.shape
    row_stride, col_stride = tensor.stride()
    return tensor.data_ptr(), rows, cols, row_stride, col_stride


def _vector(tensor: Tensor | None) -> tuple[int, int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape[0], tensor.stride(0))


def _float_vector(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32)


def _packed(packed: Tensor | None) -> tuple[int, int] | None:
    return None if packed is None else (packed.data_ptr(), packed.shape[0])


def pack(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Packed encoder weights, uint8 ``(bytes,)``; see csrc/include/saerec/packed.h."""
    weight = _unit_columns(weight)
    out = torch.empty(_C.packed_size(*weight.shape), dtype=torch.uint8)
    _C.pack(_DTYPE[weight.dtype], _matrix(weight), _vector(bias), out.data_ptr(), torch.get_num_threads())
    return out


def linear_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    exclude_offsets: Tensor | None,
    exclude_ids: Tensor | None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values ``(R, k)`` in the dtype of x, indices int64 ``(R, k)``."""
    weight = _unit_columns(weight)
    values = torch.empty((x.shape[0], k), dtype=x.dtype)
    indices = torch.empty((x.shape[0], k), dtype=torch.int64)
    _C.linear_topk(
        _DTYPE[x.dtype],
        _matrix(x),
        _matrix(weight),
        _vector(bias),
        None,
        k,
        0 if exclude_offsets is None else exclude_offsets.data_ptr(),
        0 if exclude_ids is None else exclude_ids.data_ptr(),
        0 if exclude_ids is None else exclude_ids.shape[0],
        False,
        values.data_ptr(),
        indices.data_ptr(),
        1,
        _packed(packed),
        torch.get_num_threads(),
    )
    return values, indices


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int, packed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Values ``(R, k)`` after the ReLU, indices int32 ``(R, k)``."""
    W_enc = _unit_columns(W_enc)
    values = torch.empty((x.shape[0], k), dtype=x.dtype)
    indices = torch.empty((x.shape[0], k), dtype=torch.int32)
    _C.linear_topk(
        _DTYPE[x.dtype],
        _matrix(x),
        _matrix(W_enc),
        _vector(b_enc),
        _vector(b_dec),
        k,
        0,
        0,
        0,
        True,
        values.data_ptr(),
        indices.data_ptr(),
        0,
        _packed(packed),
        torch.get_num_threads(),
    )
    return values, indices


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor,
    packed: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets int64 ``(R + 1,)``, indices int32 ``(entries,)``, values ``(entries,)`` in the dtype of x.

    With a ``capacity``, indices and values ``(capacity,)``: the first entries, then -1 and 0; offsets as without.
    """
    W_enc = _unit_columns(W_enc)
    dtype = _DTYPE[x.dtype]
    threshold = _float_vector(threshold)
    rows = _C.encode_threshold(
        dtype,
        _matrix(x),
        _matrix(W_enc),
        _vector(b_enc),
        _vector(b_dec),
        _vector(threshold),
        _packed(packed),
        torch.get_num_threads(),
    )
    offsets = torch.empty(x.shape[0] + 1, dtype=torch.int64)
    places = max(rows.n_entries, capacity or 0)
    indices = torch.empty(places, dtype=torch.int32)
    values = torch.empty(places, dtype=x.dtype)
    rows.copy_to(offsets.data_ptr(), indices.data_ptr(), values.data_ptr(), dtype)
    if capacity is None:
        return offsets, indices, values
    indices[rows.n_entries :], values[rows.n_entries :] = -1, 0
    return offsets, indices[:capacity], values[:capacity]


def encode_features(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, threshold: Tensor, features: Tensor
) -> Tensor:
    """Activations of the chosen features ``(m,)``, dense ``(R, m)``."""
    W_enc = _unit_columns(W_enc)
    threshold = _float_vector(threshold)
    features = features.to(torch.int64).contiguous()
    out = torch.empty((x.shape[0], features.shape[0]), dtype=x.dtype)
    _C.encode_features(
        _DTYPE[x.dtype],
        _matrix(x),
        _matrix(W_enc),
        _vector(b_enc),
        _vector(b_dec),
        _vector(threshold),
        features.data_ptr(),
        features.shape[0],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def decode_sparse(offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """Decoded hidden states ``(R, d)`` in the dtype of W_dec."""
    offsets, indices = offsets.contiguous(), indices.contiguous()
    out = torch.empty((offsets.shape[0] - 1, W_dec.shape[1]), dtype=W_dec.dtype)
    _C.decode_sparse(
        _DTYPE[W_dec.dtype],
        offsets.data_ptr(),
        indices.data_ptr(),
        _INDEX_TYPE[indices.dtype],
        _vector(values),
        _DTYPE[values.dtype],
        _matrix(W_dec),
        _vector(b_dec),
        _matrix(out),
        torch.get_num_threads(),
    )
    return out


def sparse_dot(offsets: Tensor, indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """``out[e] = <rows[row(e)], weight[indices[e]]>``, ``(entries,)``; 0 where the index is negative."""
    offsets, indices = offsets.contiguous(), indices.contiguous()
    rows, weight = _unit_columns(rows), _unit_columns(weight)
    # Places behind the last row's end are not visited.
    out = torch.zeros(indices.shape[0], dtype=weight.dtype)
    _C.sparse_dot(
        _DTYPE[weight.dtype],
        offsets.data_ptr(),
        indices.data_ptr(),
        _INDEX_TYPE[indices.dtype],
        _matrix(rows),
        _matrix(weight),
        out.data_ptr(),
        _DTYPE[out.dtype],
        torch.get_num_threads(),
    )
    return out


def sparse_weight_gradient(
    offsets: Tensor, indices: Tensor, coefficients: Tensor, rows: Tensor, shift: Tensor | None, n: int
) -> tuple[Tensor, Tensor]:
    """``(n, d)``: per feature the sum of ``coefficient · (row − shift)``; ``(n,)``: the sum of coefficients."""
    offsets, indices = offsets.contiguous(), indices.contiguous()
    rows = _unit_columns(rows)
    out = torch.empty((n, rows.shape[1]), dtype=rows.dtype)
    out_sum = torch.empty(n, dtype=rows.dtype)
    _C.sparse_weight_gradient(
        _DTYPE[rows.dtype],
        offsets.data_ptr(),
        indices.data_ptr(),
        _INDEX_TYPE[indices.dtype],
        _vector(coefficients),
        _DTYPE[coefficients.dtype],
        _matrix(rows),
        _vector(shift),
        _matrix(out),
        out_sum.data_ptr(),
        torch.get_num_threads(),
    )
    return out, out_sum


def sparse_training_step(
    x: Tensor,
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    scale: float,
    penalty: float,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums float64 ``(2,)``, counts int64 ``(n,)``, residual ``(R, d)``, gradients of W_enc, b_enc, W_dec, b_dec.

    ``out`` gives contiguous tensors for the last five: fresh memory of their size costs as much as the step.
    """
    offsets, indices = offsets.contiguous(), indices.contiguous()
    x, W_enc, W_dec = _unit_columns(x), _unit_columns(W_enc), _unit_columns(W_dec)
    n, d = W_dec.shape
    sums, counts = torch.empty(2, dtype=torch.float64), torch.empty(n, dtype=torch.int64)
    if out is None:
        shapes = (x.shape, (n, d), (n,), (n, d), (d,))
        residual, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec = (torch.empty(s, dtype=x.dtype) for s in shapes)
    else:
        residual, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec = out
    _C.sparse_training_step(
        _DTYPE[x.dtype],
        _matrix(x),
        offsets.data_ptr(),
        indices.data_ptr(),
        _INDEX_TYPE[indices.dtype],
        _vector(values),
        _matrix(W_enc),
        _matrix(W_dec),
        _vector(b_dec),
        scale,
        penalty,
        _matrix(residual),
        sums.data_ptr(),
        counts.data_ptr(),
        _matrix(grad_W_enc),
        grad_b_enc.data_ptr(),
        _matrix(grad_W_dec),
        grad_b_dec.data_ptr(),
        torch.get_num_threads(),
    )
    return sums, counts, residual, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec


def largest_entries(offsets: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row offsets int64 ``(R + 1,)`` and ascending positions int64 ``(min(count, entries),)`` of the largest values."""
    offsets = offsets.contiguous()
    kept_offsets = torch.empty(offsets.shape[0], dtype=torch.int64)
    kept = torch.empty(min(count, values.shape[0]), dtype=torch.int64)
    _C.largest_entries(
        offsets.data_ptr(),
        offsets.shape[0] - 1,
        _DTYPE[values.dtype],
        _vector(values),
        kept.shape[0],
        kept_offsets.data_ptr(),
        kept.data_ptr(),
        torch.get_num_threads(),
    )
    return kept_offsets, kept


def adam_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    unit_rows: bool,
) -> None:
    """Updates the parameter and both moments in place; all float32, contiguous, ``(n, d)`` or ``(n,)``."""
    rows, cols = parameter.shape if parameter.dim() == 2 else (1, parameter.numel())
    _C.adam_step(
        parameter.data_ptr(),
        gradient.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        rows,
        cols,
        step,
        lr,
        *betas,
        eps,
        unit_rows,
        torch.get_num_threads(),
    )


def reconstruct(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    k: int,
    packed: Tensor | None = None,
) -> Tensor:
    """Reconstructed hidden states ``(R, d)``: top-k where k > 0, thresholds otherwise."""
    return BoundReconstruct(W_enc, b_enc, b_dec, W_dec, threshold, k, packed)(x)


class BoundReconstruct:
    """:func:`reconstruct` with the weights fixed: what is left to do for a batch is one allocation and one call.

    Keeps the tensors alive; they must not be replaced or written to while it is in use.
    """

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None,
        W_dec: Tensor,
        threshold: Tensor | None,
        k: int,
        packed: Tensor | None,
    ) -> None:
        self._kept, arguments = _autoencoder(W_enc, b_enc, b_dec, W_dec, threshold, k, packed)
        self._run = _C.BoundReconstruct(*arguments).run

    def __call__(self, x: Tensor) -> Tensor:
        """``x (..., d)`` on the CPU in the dtype of the weights."""
        if x.dim() != 2:
            return self(x.reshape(-1, x.shape[-1])).view(x.shape)
        rows, columns = x.stride()
        # The cheapest way to allocate in torch: a shape and a dtype cost three times as much.
        out = torch.empty_like(x) if columns == 1 and rows == x.shape[1] else torch.empty(x.shape, dtype=x.dtype)
        self._run(x.data_ptr(), x.shape[0], rows, columns, out.data_ptr(), torch.get_num_threads())
        return out


def steer_program(plan: SteeringPlan) -> _C.SteerProgram:
    """The plan as the kernel reads it, made once and kept with the plan. A mask of positions is not part of it."""
    program: _C.SteerProgram | None = plan.__dict__.get("_program")
    if program is None:
        positions, limit, clip = plan.positions, plan.max_relative_norm, plan.on_excess == "clip"
        named = isinstance(positions, str)
        program = _C.SteerProgram(
            plan.edits,
            Direction,
            OPS,
            plan.mode == "reconstruct",
            int(named and positions == "last"),
            math.inf if limit is None else limit,
            clip,
            named and (limit is None or clip),
        )
        plan.__dict__["_program"] = program
    return program


def steer_plans(plan: SteeringPlan | Sequence[SteeringPlan | None], strengths: Tensor | None = None) -> _C.SteerPlans:
    """What ``PlainSteer.run`` and :class:`BoundSteer` steer by.

    Args:
        plan: for all sequences, or one (or ``None``) for each.
        strengths: replace the values of the one plan: float32 ``(m,)`` or ``(B, m)``; read anew in every call of
            ``PlainSteer.run``.
    """
    if isinstance(plan, SteeringPlan):
        return _C.SteerPlans(steer_program(plan), strengths)
    return _C.SteerPlans([None if one is None else steer_program(one) for one in plan], None)


class BoundSteer:
    """:func:`steer` with the weights fixed, for whole plans: directions, limits, and a plan for every sequence.

    Keeps the tensors alive; they must not be replaced or written to while it is in use.
    """

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None,
        W_dec: Tensor,
        threshold: Tensor | None,
        k: int,
        packed: Tensor | None,
    ) -> None:
        self._kept, arguments = _autoencoder(W_enc, b_enc, b_dec, W_dec, threshold, k, packed)
        self._bound = _C.BoundSteer(*arguments)
        self._run = self._bound.run

    def __call__(
        self,
        x: Tensor,
        plan: SteeringPlan | Sequence[SteeringPlan | None],
        values: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, float]:
        """Steered hidden states, and the largest relative change of a row before clipping (0 without a limit).

        Args:
            x: ``(B, length, d)``, or ``(B, d)`` for sequences of one row, on the CPU in the dtype of the weights.
            plan: for all sequences, or one (or ``None``) for each. Masks of positions belong in ``valid``.
            values: replace those of the one plan: float32 ``(m,)`` or ``(B, m)``, contiguous.
            valid: bool with the leading shape of x, the rows that may change.
        """
        shape, strides = x.shape, x.stride()
        length, rows, row_stride = 1, shape[0], strides[0]
        if len(shape) == 3:
            length, row_stride = shape[1], strides[1]
            rows *= length
            if strides[0] != length * row_stride:
                x = x.contiguous()
                row_stride, strides = shape[2], x.stride()
        whole = strides[-1] == 1 and row_stride == shape[-1]
        out = torch.empty_like(x) if whole else torch.empty(shape, dtype=x.dtype)
        if valid is not None and not valid.is_contiguous():
            valid = valid.contiguous()
        mask = 0 if valid is None else valid.data_ptr()
        place = x.data_ptr(), rows, row_stride, strides[-1], length, out.data_ptr()
        data, stride = (0, 0) if values is None else (values.data_ptr(), values.shape[1] if values.dim() == 2 else 0)
        relative = self._run(*place, steer_plans(plan), data, stride, mask, torch.get_num_threads())
        return out, relative

    def plain(self, seen: list[tuple[dict[str, Any], str, Any, bool]]) -> _C.PlainSteer | None:
        """This call for contiguous ``x`` and ``valid``, with the least that Python can do for it.

        Args:
            seen: dictionary, key and value of everything that this object was made from, and whether plans that only
                add depend on it.

        Returns:
            An object with ``run(x, valid, plans)``, which returns ``None`` where one of ``seen`` was replaced or
            written to, gradients are on, a mode wants to see torch's calls (additions that were prepared are such calls
            and are made), a tensor is not what it takes, or the plans (of :func:`steer_plans`) are not for it. ``None``
            where this torch does not tell its modes.
        """
        weight = self._kept[0]
        assert weight is not None
        counters = [count for count in MODE_COUNTERS if count is not None]
        if len(counters) < len(MODE_COUNTERS):
            return None
        functions = torch.empty_like, torch.is_grad_enabled, torch.get_num_threads, torch.tensor, *counters
        return _C.PlainSteer(
            self._bound, seen, Tensor, TENSOR_EXCHANGE, weight.dtype, torch.bool, torch.float32, functions
        )


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
    """Steered hidden states ``(R, d)``. ``values`` is ``(m,)`` or ``(R, m)``, ``mask`` bool ``(R,)``."""
    weights = _unit_columns(W_enc), b_enc, b_dec, W_dec, packed
    return _steer(x, _places(*weights), threshold, k, reconstruct, features, ops, values, mask)


def _steer(
    x: Tensor,
    places: tuple[Any, ...],
    threshold: Tensor | None,
    k: int,
    reconstruct: bool,
    features: list[int],
    ops: list[int],
    values: Tensor,
    mask: Tensor | None,
) -> Tensor:
    values = _float_vector(values).contiguous()
    mask = None if mask is None else mask.contiguous()
    threshold = None if threshold is None else _float_vector(threshold)
    edit_features, edit_ops = array("q", features), array("q", ops)
    out = torch.empty(x.shape, dtype=x.dtype)
    *weights, packed = places
    _C.steer(
        _DTYPE[x.dtype],
        _matrix(x),
        *weights,
        k,
        None if threshold is None else _vector(threshold),
        reconstruct,
        len(features),
        edit_features.buffer_info()[0],
        edit_ops.buffer_info()[0],
        values.data_ptr(),
        values.shape[-1] if values.dim() == 2 else 0,
        0 if mask is None else mask.data_ptr(),
        _matrix(out),
        packed,
        torch.get_num_threads(),
    )
    return out


class _Kept(NamedTuple):
    """What was made of the weights of an autoencoder, as long as they do not change.

    Attributes:
        owner: its ``W_enc``.
        key: what changes with them.
        tensors: them under other names, so that no other ones get their addresses, and what was made.
        places: where that lies.
    """

    owner: weakref.ref[Tensor]
    key: list[int]
    tensors: tuple[Tensor, ...]
    places: tuple[Any, ...]


# By the id of W_enc, with which an entry goes: one for each autoencoder that graphs steer with.
_kept: dict[int, _Kept] = {}


def steer_normalized(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_dec: Tensor,
    threshold: Tensor | None,
    k: int,
    reconstruct: bool,
    features: list[int],
    ops: list[int],
    values: Tensor,
    mask: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    """:func:`steer` with weights of normalised hidden states. Folded and packed ones are kept until a weight changes,
    which its version counter tells."""
    tensors = [tensor for tensor in (W_enc, b_enc, b_dec, W_dec, mean, std) if tensor is not None]
    edits = threshold, k, reconstruct, features, ops, values, mask
    try:
        key = [number for tensor in tensors for number in (tensor.data_ptr(), tensor._version)]
    except RuntimeError:  # made under inference_mode: such a tensor does not count its versions
        W_enc, b_dec, W_dec = _folded(W_enc, b_dec, W_dec, mean, std)
        return steer(x, W_enc, b_enc, b_dec, W_dec, *edits)
    number = id(W_enc)
    kept = _kept.get(number)
    if kept is None or kept.key != key or kept.owner() is not W_enc:
        aliases = tuple(tensor.detach() for tensor in tensors)
        # Not W_enc itself, whose end is waited for.
        folded_W_enc, b_dec, W_dec = _folded(aliases[0], b_dec, W_dec, mean, std)
        weights = folded_W_enc, b_enc, b_dec, W_dec, pack(folded_W_enc, b_enc)
        owner = weakref.ref(W_enc, lambda _: _kept.pop(number, None))
        # Another thread may do the same meanwhile.
        _kept[number] = kept = _Kept(owner, key, (*aliases, *weights), _places(*weights))
    return _steer(x, kept.places, *edits)


def _folded(
    W_enc: Tensor, b_dec: Tensor, W_dec: Tensor, mean: Tensor | None, std: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if mean is None or std is None:
        return _unit_columns(W_enc), b_dec, W_dec
    W_enc, b_dec, W_dec = fold_normalization(W_enc, b_dec, W_dec, mean, std)
    return _unit_columns(W_enc), b_dec, W_dec


def _autoencoder(
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    k: int,
    packed: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The tensors whose addresses a bound call holds, and the arguments that name them."""
    W_enc = _unit_columns(W_enc)
    threshold = None if threshold is None else _float_vector(threshold)
    *weights, place_of_packed = _places(W_enc, b_enc, b_dec, W_dec, packed)
    return (W_enc, b_enc, b_dec, W_dec, threshold, packed), (
        _DTYPE[W_enc.dtype],
        *weights,
        k,
        None if threshold is None else _vector(threshold),
        place_of_packed,
    )


def _places(
    W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, W_dec: Tensor, packed: Tensor | None
) -> tuple[Any, ...]:
    """The arguments that name the weights of an autoencoder, ``W_enc`` with unit columns."""
    return _matrix(W_enc), _vector(b_enc), _vector(b_dec), _matrix(W_dec), _packed(packed)


def _unit_columns(matrix: Tensor) -> Tensor:
    # Most kernels read whole rows; a strided view is rare, and copying it is linear in its size.
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def isa() -> dict[str, Any]:
    """Tiers compiled, tiers this CPU can run, the tier in use."""
    return {"compiled": _C.compiled_isas(), "supported": _C.supported_isas(), "active": _C.active_isa()}
