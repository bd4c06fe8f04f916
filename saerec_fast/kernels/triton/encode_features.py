"""Dense activations ``(R, m)`` of chosen features of a threshold SAE: ``score if not (score <= threshold) else 0``.

Layout: ids int64 ``(m,)``; the rows of W_enc are gathered, so that m features cost m dot products. An id outside the
dictionary gives NaN: looking at ids on the host would wait for the device.

Accumulator: float32; tiles, shift and bias as in scores.py, so that an activation is the same bits as
``encode_threshold`` gives. Nothing is ordered.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saerec_fast.kernels.triton.floats import to_dtype_of
from saerec_fast.kernels.triton.launch import launch
from saerec_fast.kernels.triton.linear_topk import schedule
from saerec_fast.kernels.triton.scores import BLOCK_FEATURES, BLOCK_ROWS, load_states, prepare, score_tile


@triton.jit
def features_kernel(
    x_ptr,
    x_row,
    x_column,
    shift_ptr,
    w_ptr,
    w_row,
    bias_ptr,
    threshold_ptr,
    features_ptr,
    out_ptr,
    n_rows,
    n,
    m,
    PER_PLACE: tl.constexpr,
    SCALAR: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    places = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_place = places < m
    features = tl.load(features_ptr + places, mask=is_place, other=0)
    known = is_place & (features >= 0) & (features < n)
    bias_at = features
    if PER_PLACE:
        bias_at = places.to(tl.int64)
    held = load_states(x_ptr, x_row, x_column, rows, is_row, shift_ptr, 0, SHIFTED, D, BLOCK_D)
    scores = score_tile(
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
        known,
        SHIFTED,
        BIASED,
        D,
        BLOCK_D,
    )
    if SCALAR:
        threshold = tl.load(threshold_ptr) + tl.zeros([BLOCK_N], tl.float32)
    else:
        threshold = tl.load(threshold_ptr + features, mask=known, other=0.0)
    active = tl.where(scores <= threshold[None, :], 0.0, scores)
    active = tl.where(known[None, :], active, float("nan"))
    offsets = rows.to(tl.int64)[:, None] * m + places[None, :]
    tl.store(out_ptr + offsets, to_dtype_of(active, out_ptr), mask=is_row[:, None] & is_place[None, :])


def encode_features(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor,
    features: Tensor,
    *,
    value_dtype: torch.dtype | None = None,
) -> Tensor:
    """Activations ``(R, m)`` of the chosen features ``(m,)``, in the dtype of x unless told."""
    features = features.to(torch.int64).contiguous()
    threshold = threshold.to(torch.float32).contiguous()
    encoder = prepare(W_enc, b_enc, b_dec, features)
    n_rows, m = x.shape[0], features.shape[0]
    out = torch.empty((n_rows, m), dtype=value_dtype or x.dtype, device=x.device)
    launch(
        features_kernel,
        (triton.cdiv(n_rows, BLOCK_ROWS), triton.cdiv(m, BLOCK_FEATURES)),
        *encoder.states(x),
        threshold,
        features,
        out,
        n_rows,
        encoder.weight.shape[0],
        m,
        PER_PLACE=encoder.per_place,
        SCALAR=threshold.shape[0] == 1,
        **encoder.constants,
        # One stage spills on sm_80 here.
        **schedule(x.dtype, float32_stages=2),
    )
    return out
