"""Encode, edit and decode hidden states: ``x + Σ_j (a'_j − a_j) W_dec[j]``, or ``a' W_dec + b_dec``.

The least exact work that the plan allows:

| | delta | reconstruct |
|---|---|---|
| only ``add`` | no encoding | all features |
| other edits, threshold SAE | one dot product per edited feature | all features, and the edited ones |
| other edits, top-k SAE | all features | all features |

1. The encoders of the other files give activations, unrounded.
2. ``edit_kernel``: per edited feature ("slot") the edits in the plan's order; the change ``a' − a`` or ``a'``, float32
   ``(R, slots)``. A feature that is only added to changes by the sum of its values, also where its activation is not
   finite.
3. ``apply_kernel`` or ``rebuild_kernel``: one program per row and block of columns. Rows outside the mask, rows without
   a change and elements whose change sums to 0 are copied: the same bits. Mode ``reconstruct`` of a threshold SAE of up
   to 512 columns makes no list of entries to rebuild from: reconstruct_threshold.py.

Accumulator: float32, rounded once; entries and slots 16 at a time in their order (decode_sparse.py). Ties: as in the
encoders.

What depends on the plan alone lies on the device and is kept: calls with the same plan copy nothing from the host, and
can be captured in a CUDA graph after a first call, unless that list is made (threshold SAEs of more than 512 columns).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saerec_fast.kernels.triton.decode_sparse import block_of, decoded, unit_columns
from saerec_fast.kernels.triton.encode_features import encode_features
from saerec_fast.kernels.triton.encode_threshold import encode_threshold
from saerec_fast.kernels.triton.encode_topk import encode_topk
from saerec_fast.kernels.triton.floats import to_dtype_of, to_float32
from saerec_fast.kernels.triton.launch import launch
from saerec_fast.kernels.triton.reconstruct import MAX_FUSED_WIDTH
from saerec_fast.kernels.triton.reconstruct_threshold import reconstruct_threshold

ADD = 1  # its code in saerec_fast.ops.EDIT_CODES

SET_CODE: tl.constexpr = tl.constexpr(0)
ADD_CODE: tl.constexpr = tl.constexpr(ADD)
SCALE_CODE: tl.constexpr = tl.constexpr(2)
CLAMP_MIN_CODE: tl.constexpr = tl.constexpr(3)


@triton.jit
def edit_kernel(
    activations_ptr,
    indices_ptr,
    entries_per_row,
    slots_ptr,
    edit_slots_ptr,
    edit_ops_ptr,
    values_ptr,
    values_row,
    out_ptr,
    n_rows,
    n_encoded,
    n_edits,
    REBUILDS: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out (R, slots)``. ``activations`` are ``(R, n_encoded)``, of the first slots; or sparse, k entries a row."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = rows.to(tl.int64)
    is_row = rows < n_rows
    slot = tl.program_id(1)
    before = tl.zeros([BLOCK], tl.float32)
    if slot < n_encoded:
        if SPARSE:
            feature = tl.load(slots_ptr + slot)
            for entry in range(entries_per_row):
                place = wide * entries_per_row + entry
                same = tl.load(indices_ptr + place, mask=is_row, other=-1) == feature
                before = tl.where(same, tl.load(activations_ptr + place, mask=is_row, other=0.0), before)
        else:
            before = tl.load(activations_ptr + wide * n_encoded + slot, mask=is_row, other=0.0)
    after = before
    added = tl.zeros([BLOCK], tl.float32)
    for edit in range(n_edits):
        if tl.load(edit_slots_ptr + edit) == slot:
            op = tl.load(edit_ops_ptr + edit)
            value = tl.load(values_ptr + wide * values_row + edit, mask=is_row, other=0.0)
            if op == SET_CODE:
                after = value
            elif op == ADD_CODE:
                after += value
                added += value
            elif op == SCALE_CODE:
                after *= value
            elif op == CLAMP_MIN_CODE:
                # NaN stays, as with torch.maximum.
                after = tl.where((after >= value) | (after != after), after, value)
            else:
                after = tl.where((after <= value) | (after != after), after, value)
    result = after
    if not REBUILDS:
        result = after - before
        if slot >= n_encoded:
            result = added
    tl.store(out_ptr + wide * tl.num_programs(1) + slot, result, mask=is_row)


@triton.jit
def apply_kernel(
    x_ptr,
    x_row,
    x_column,
    changes_ptr,
    slots_ptr,
    n_slots,
    mask_ptr,
    w_ptr,
    w_row,
    out_ptr,
    d,
    MASKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """``x + changes @ W_dec[slots]``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < d
    x = tl.load(x_ptr + row * x_row + columns.to(tl.int64) * x_column, mask=is_column, other=0.0)
    changes = changes_ptr + row * n_slots
    change = decoded(slots_ptr, changes, 0, n_slots, w_ptr, w_row, columns, is_column, BLOCK_D, ENTRIES)
    differs = 0
    for start in range(0, n_slots, ENTRIES):
        places = start + tl.arange(0, ENTRIES)
        own = tl.load(changes + places, mask=places < n_slots, other=0.0)
        differs = tl.maximum(differs, tl.max((own != 0).to(tl.int32), axis=0))
    if MASKED:
        differs = differs * (tl.load(mask_ptr + row) != 0).to(tl.int32)
    steered = to_dtype_of(to_float32(x) + change, out_ptr)
    out = tl.where((change == 0) | (differs == 0), x, steered)
    tl.store(out_ptr + row * d + columns, out, mask=is_column)


@triton.jit
def rebuild_kernel(
    x_ptr,
    x_row,
    x_column,
    offsets_ptr,
    indices_ptr,
    activations_ptr,
    slot_of_ptr,
    edited_ptr,
    slots_ptr,
    n_slots,
    mask_ptr,
    w_ptr,
    w_row,
    bias_ptr,
    out_ptr,
    d,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """``a' W_dec + b_dec``: sparse entries less those of edited features, and the edited features."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < d
    begin, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, ENTRIES):
        places = start + tl.arange(0, ENTRIES)
        indices = tl.load(indices_ptr + places, mask=places < end, other=0)
        kept = (places < end) & (tl.load(slot_of_ptr + indices) == 0)
        values = tl.load(activations_ptr + places, mask=kept, other=0.0)
        offsets = indices.to(tl.int64)[:, None] * w_row + columns[None, :]
        weights = to_float32(tl.load(w_ptr + offsets, mask=kept[:, None] & is_column[None, :], other=0.0))
        total += tl.sum(values[:, None] * weights, axis=0)
    edited = edited_ptr + row * n_slots
    total += decoded(slots_ptr, edited, 0, n_slots, w_ptr, w_row, columns, is_column, BLOCK_D, ENTRIES)
    if BIASED:
        total += to_float32(tl.load(bias_ptr + columns, mask=is_column, other=0.0))
    out = to_dtype_of(total, out_ptr)
    if MASKED:
        x = tl.load(x_ptr + row * x_row + columns.to(tl.int64) * x_column, mask=is_column, other=0.0)
        out = tl.where(tl.load(mask_ptr + row) != 0, out, x)
    tl.store(out_ptr + row * d + columns, out, mask=is_column)


EDIT_BLOCK = 128


class _Plan(NamedTuple):
    slots: Tensor  # int64 (slots,), edited features: first those whose activations are needed
    n_encoded: int
    edit_slots: Tensor  # int32 (edits,)
    edit_ops: Tensor  # int32 (edits,)
    slot_of: Tensor  # int8 (n,), 1 where a feature is edited


@lru_cache(maxsize=64)
def _plan(features: tuple[int, ...], ops: tuple[int, ...], reconstruct: bool, n: int, device: torch.device) -> _Plan:
    needed = {f for f, op in zip(features, ops, strict=True) if reconstruct or op != ADD}
    slots = [*sorted(needed), *sorted(set(features) - needed)]
    place = {feature: slot for slot, feature in enumerate(slots)}
    # A cached tensor must serve calls with gradients as well.
    with torch.inference_mode(False):
        slot_of = torch.zeros(n, dtype=torch.int8)
        slot_of[slots] = 1
        return _Plan(
            torch.tensor(slots, dtype=torch.int64).to(device),
            len(needed),
            torch.tensor([place[f] for f in features], dtype=torch.int32).to(device),
            torch.tensor(ops, dtype=torch.int32).to(device),
            slot_of.to(device),
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
    n_rows, d = x.shape
    out = torch.empty((n_rows, d), dtype=x.dtype, device=x.device)
    if not features and not reconstruct:
        return out.copy_(x)
    plan = _plan(tuple(features), tuple(ops), reconstruct, W_enc.shape[0], x.device)
    n_slots = plan.slots.shape[0]
    W_dec = unit_columns(W_dec)
    sparse: tuple[Tensor, Tensor, Tensor] | None = None
    activations = changes = torch.empty((n_rows, n_slots), dtype=torch.float32, device=x.device)
    if k > 0 and (reconstruct or plan.n_encoded):
        entries, indices = encode_topk(x, W_enc, b_enc, b_dec, k, value_dtype=torch.float32)
        offsets = torch.arange(n_rows + 1, device=x.device) * k
        sparse, activations = (offsets, indices.view(-1), entries.view(-1)), entries
    elif threshold is not None:
        if reconstruct and d > MAX_FUSED_WIDTH:
            sparse = encode_threshold(x, W_enc, b_enc, b_dec, threshold, value_dtype=torch.float32)
        if plan.n_encoded:
            edited = plan.slots[: plan.n_encoded]
            activations = encode_features(x, W_enc, b_enc, b_dec, threshold, edited, value_dtype=torch.float32)
    values = values.to(torch.float32).contiguous()
    launch(
        edit_kernel,
        (triton.cdiv(n_rows, EDIT_BLOCK), n_slots),
        activations,
        plan.slots if sparse is None else sparse[1],
        k,
        plan.slots,
        plan.edit_slots,
        plan.edit_ops,
        values,
        values.shape[-1] if values.dim() == 2 else 0,
        changes,
        n_rows,
        plan.n_encoded,
        len(features),
        REBUILDS=reconstruct,
        SPARSE=k > 0,
        BLOCK=EDIT_BLOCK,
        num_warps=4,
    )
    if reconstruct and sparse is None:
        assert threshold is not None
        edits = plan.slots, changes, plan.slot_of
        return reconstruct_threshold(x, W_enc, b_enc, b_dec, W_dec, threshold, edits=edits, mask=mask)
    block = block_of(d)
    grid = (n_rows, triton.cdiv(d, block["BLOCK_D"]))
    mask_bytes = changes if mask is None else mask.contiguous().view(torch.uint8)
    constants = {"MASKED": mask is not None, "num_warps": 4, **block}
    tail = (plan.slots, n_slots, mask_bytes, W_dec, W_dec.stride(0))
    if sparse is None or not reconstruct:
        launch(apply_kernel, grid, x, *x.stride(), changes, *tail, out, d, **constants)
        return out
    bias = changes if b_dec is None else b_dec.contiguous()
    launch(
        rebuild_kernel,
        grid,
        x,
        *x.stride(),
        *sparse,
        plan.slot_of,
        changes,
        *tail,
        bias,
        out,
        d,
        BIASED=b_dec is not None,
        **constants,
    )
    return out
