"""Scores of a block of rows against a block of features, which every encoder kernel here is built from.

``score[r, j] = Σ_c (x[r, c] − shift[c]) · w[j, c] + bias[j]``

Layout: hidden states ``x (R, d)`` with any strides, weights ``w (n, d)`` with unit column stride, vectors contiguous.
Offsets of rows are 64-bit.

Accumulator: float32. The product of two 16-bit numbers is exact in it, and those go through the tensor cores. Float32
inputs are multiplied as they are (``input_precision="ieee"``, fused multiply-adds outside the tensor cores): a single
pass of tf32 drops 13 bits, and that three passes stay within the contract's bound could not be shown without hardware.

Shift: float32 takes it off in registers, as the reference does. A centred 16-bit number would have to be rounded before
the tensor cores take it, so there ``−W shift`` goes into a float32 bias (``folded_bias``), a sum over the weights once
per call.

Order: ``order_of`` maps a score to an int32 that sorts as the contract asks (NaN above everything, both zeros equal);
``pack`` puts the feature below it, so that one int64 comparison also settles ties by the smallest index.

Tiles: 64 rows, because sm_90's warpgroup product takes 64, and 64 features: the accumulator, its order and the 64-bit
addresses of the kernels that store parts of it then fit into the registers of eight warps. They are the same for every
batch size, so that a row's scores are the same bits in whatever batch it arrives. Narrow states (16-bit: up to 128
columns, float32: up to 16) are held for all features; wider ones are read again, 32 or 16 columns at a time, the
largest blocks with which no kernel spills on sm_80 and sm_90 (tests/kernels/triton/test_aot.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saerec_fast.kernels.triton.floats import product, to_float32
from saerec_fast.kernels.triton.launch import launch

# An order below that of any score: of features that are excluded, or that do not exist.
LOWEST: tl.constexpr = tl.constexpr(-(2**31))

BLOCK_ROWS = 64
BLOCK_FEATURES = 64


@triton.jit
def order_of(scores):
    """int32 that sorts as the scores do: NaN above everything, -0.0 equal to 0.0."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(magnitude == 0, 0, order)
    return tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, order)


@triton.jit
def score_of(order):
    """Inverse of ``order_of``, but for the sign of zero and the bits of a NaN."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def pack(order, features):
    """int64 that sorts by order, then by smallest feature."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - features).to(tl.int64)


@triton.jit
def load_states(
    x_ptr,
    x_row,
    x_column,
    rows,
    is_row,
    shift_ptr,
    start,
    SHIFTED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Columns ``start`` … of the rows ``(rows, BLOCK_D)``, less the shift; 0 outside."""
    columns = start + tl.arange(0, BLOCK_D)
    is_column = columns < D
    inside = is_row[:, None] & is_column[None, :]
    offsets = rows.to(tl.int64)[:, None] * x_row + columns.to(tl.int64)[None, :] * x_column
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    if SHIFTED:
        shift = tl.load(shift_ptr + columns, mask=is_column, other=0.0)
        # Rows outside the batch become −shift; nobody reads their scores.
        x = x - shift[None, :]
    return x


@triton.jit
def load_weights(w_ptr, w_row, features, is_feature, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns ``start`` … of the features' weights, transposed ``(BLOCK_D, features)``; 0 outside."""
    columns = start + tl.arange(0, BLOCK_D)
    offsets = features.to(tl.int64)[None, :] * w_row + columns[:, None]
    return tl.load(w_ptr + offsets, mask=is_feature[None, :] & (columns < D)[:, None], other=0.0)


@triton.jit
def score_tile(
    held,
    x_ptr,
    x_row,
    x_column,
    rows,
    is_row,
    shift_ptr,
    w_ptr,
    w_row,
    bias_ptr,
    bias_at,
    features,
    is_feature,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores ``(rows, features)``, float32. ``held`` are the rows' first BLOCK_D columns; ``bias_at`` says where in the
    bias the features stand."""
    scores = tl.zeros([rows.shape[0], features.shape[0]], tl.float32)
    if D <= BLOCK_D:
        weights = load_weights(w_ptr, w_row, features, is_feature, 0, D, BLOCK_D)
        scores = product(held, weights, scores)
    else:
        for start in range(0, D, BLOCK_D):
            x = load_states(x_ptr, x_row, x_column, rows, is_row, shift_ptr, start, SHIFTED, D, BLOCK_D)
            weights = load_weights(w_ptr, w_row, features, is_feature, start, D, BLOCK_D)
            scores = product(x, weights, scores)
    if BIASED:
        scores += to_float32(tl.load(bias_ptr + bias_at, mask=is_feature, other=0.0))[None, :]
    return scores


@triton.jit
def folded_bias_kernel(
    w_ptr,
    w_row,
    bias_ptr,
    shift_ptr,
    features_ptr,
    out_ptr,
    size,
    n,
    BIASED: tl.constexpr,
    CHOSEN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[i] = bias[j] − <w[j], shift>`` in float32 for every feature j, or for the i-th of the chosen ones."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    features = places
    if CHOSEN:
        features = tl.load(features_ptr + places, mask=inside, other=0)
    known = inside & (features >= 0) & (features < n)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        is_column = columns < D
        shift = to_float32(tl.load(shift_ptr + columns, mask=is_column, other=0.0))
        offsets = features.to(tl.int64)[:, None] * w_row + columns[None, :]
        weights = tl.load(w_ptr + offsets, mask=known[:, None] & is_column[None, :], other=0.0)
        total += tl.sum(to_float32(weights) * shift[None, :], axis=1)
    bias = tl.zeros([BLOCK], tl.float32)
    if BIASED:
        bias = to_float32(tl.load(bias_ptr + features, mask=known, other=0.0))
    tl.store(out_ptr + places, bias - total, mask=inside)


FOLD_BLOCK = 32


class Encoder(NamedTuple):
    """Weights as the kernels take them; ``states`` and ``constants`` are what each of those launches begins with."""

    weight: Tensor  # (n, d), unit column stride
    bias: Tensor | None  # (n,), or one for each chosen feature
    shift: Tensor | None  # (d,), float32 weights only
    per_place: bool  # whether the bias is one of chosen features

    def states(self, x: Tensor) -> tuple[Any, ...]:
        # A pointer that no kernel reads where there is no bias or shift.
        bias, shift = (x if vector is None else vector for vector in (self.bias, self.shift))
        return x, x.stride(0), x.stride(1), shift, self.weight, self.weight.stride(0), bias

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "SHIFTED": self.shift is not None,
            "BIASED": self.bias is not None,
            "D": self.weight.shape[1],
            "BLOCK_D": block_columns(self.weight.shape[1], self.weight.dtype),
            "BLOCK_M": BLOCK_ROWS,
            "BLOCK_N": BLOCK_FEATURES,
        }


def prepare(weight: Tensor, bias: Tensor | None, shift: Tensor | None, features: Tensor | None = None) -> Encoder:
    """The encoder of all features, or of the chosen ones (int64 ``(m,)``)."""
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    shift = None if shift is None else shift.contiguous()
    if shift is None or weight.dtype == torch.float32:
        return Encoder(weight, bias, shift, per_place=False)
    n, d = weight.shape
    size = n if features is None else features.shape[0]
    folded = torch.empty((size,), dtype=torch.float32, device=weight.device)
    launch(
        folded_bias_kernel,
        (triton.cdiv(size, FOLD_BLOCK),),
        weight,
        weight.stride(0),
        weight if bias is None else bias,
        shift,
        weight if features is None else features,
        folded,
        size,
        n,
        BIASED=bias is not None,
        CHOSEN=features is not None,
        D=d,
        BLOCK_D=min(triton.next_power_of_2(d), 128),
        BLOCK=FOLD_BLOCK,
        num_warps=4,
    )
    return Encoder(weight, folded, None, per_place=features is not None)


def block_columns(d: int, dtype: torch.dtype) -> int:
    """Columns multiplied at a time; all of them where the rows are held."""
    held, block = (16, 16) if dtype == torch.float32 else (128, 32)
    return max(triton.next_power_of_2(d), 16) if d <= held else block
