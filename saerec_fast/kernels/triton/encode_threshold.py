"""Features whose score is ``not (score <= threshold)``, in ascending order per row: compressed rows.

1. ``mark_kernel``: scores tile by tile; one bit per feature that is active, ``(R, n / 32)`` words, and how many there
   are per row and part of the dictionary.
2. An exclusive scan of these counts (``torch.cumsum``): where each part's entries start.
3. The host reads the total, once, to allocate exactly: the only wait. With a capacity it does not, and nothing waits,
   as a CUDA graph asks for.
4. ``fill_kernel``: the same tiles again; the bits, not the recomputed scores, say what is stored, and a running count
   per row says where. So the entries always fit what was counted; those beyond the capacity are not stored.

Accumulator: float32. Order: ascending feature, which has no ties. NaN is active.

Tiles: those of scores.py. Few rows are spread over parts of the dictionary, many are not.

Configurations: how many tiles of weights are loaded ahead, as of ``emit_kernel`` (linear_topk.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saerec_fast.kernels.triton.floats import to_dtype_of
from saerec_fast.kernels.triton.linear_topk import PROGRAMS, emit_configurations
from saerec_fast.kernels.triton.scores import BLOCK_FEATURES, BLOCK_ROWS, load_states, prepare, score_tile
from saerec_fast.kernels.triton.tuning import launch_tuned


@triton.jit
def mark_kernel(
    x_ptr,
    x_row,
    x_column,
    shift_ptr,
    w_ptr,
    w_row,
    bias_ptr,
    threshold_ptr,
    words_ptr,
    counts_ptr,
    n_rows,
    n,
    tiles_per_part,
    SCALAR: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``words (R, tiles · BLOCK_N / 32)``: bits of active features; ``counts (R, parts)``."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    held = load_states(x_ptr, x_row, x_column, rows, is_row, shift_ptr, 0, SHIFTED, D, BLOCK_D)
    part = tl.program_id(1)
    n_tiles = tl.cdiv(n, BLOCK_N)
    WORDS: tl.constexpr = BLOCK_N // 32
    words_per_row = n_tiles * WORDS
    count = tl.zeros([BLOCK_M], tl.int32)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, n_tiles)):
        features = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_feature = features < n
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
            features,
            features,
            is_feature,
            SHIFTED,
            BIASED,
            D,
            BLOCK_D,
        )
        if SCALAR:
            threshold = tl.load(threshold_ptr) + tl.zeros([BLOCK_N], tl.float32)
        else:
            threshold = tl.load(threshold_ptr + features, mask=is_feature, other=0.0)
        # A comparison that is false for NaN, negated.
        off = scores <= threshold[None, :]
        active = tl.where(off, 0, 1) * (is_row[:, None] & is_feature[None, :]).to(tl.int32)
        count += tl.sum(active, axis=1)
        bits = tl.reshape(active << (features & 31)[None, :], [BLOCK_M, WORDS, 32])
        word = tl.sum(bits, axis=2)
        places = tile * WORDS + tl.arange(0, WORDS)
        offsets = rows.to(tl.int64)[:, None] * words_per_row + places[None, :]
        tl.store(words_ptr + offsets, word, mask=is_row[:, None])
    tl.store(counts_ptr + rows.to(tl.int64) * tl.num_programs(1) + part, count, mask=is_row)


@triton.jit
def fill_kernel(
    x_ptr,
    x_row,
    x_column,
    shift_ptr,
    w_ptr,
    w_row,
    bias_ptr,
    words_ptr,
    starts_ptr,
    indices_ptr,
    values_ptr,
    n_rows,
    n,
    tiles_per_part,
    capacity,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Indices and values of the features that ``words`` names, from ``starts (R · parts,)`` on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    held = load_states(x_ptr, x_row, x_column, rows, is_row, shift_ptr, 0, SHIFTED, D, BLOCK_D)
    part = tl.program_id(1)
    n_tiles = tl.cdiv(n, BLOCK_N)
    words_per_row = n_tiles * (BLOCK_N // 32)
    written = tl.load(starts_ptr + rows.to(tl.int64) * tl.num_programs(1) + part, mask=is_row, other=0)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, n_tiles)):
        features = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_feature = features < n
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
            features,
            features,
            is_feature,
            SHIFTED,
            BIASED,
            D,
            BLOCK_D,
        )
        words = words_ptr + rows.to(tl.int64)[:, None] * words_per_row + (features >> 5)[None, :]
        inside = is_row[:, None] & is_feature[None, :]
        active = (tl.load(words, mask=inside, other=0) >> (features & 31)[None, :]) & 1
        places = written[:, None] + (tl.cumsum(active, axis=1) - 1)
        stored = (active > 0) & (places < capacity)
        tl.store(indices_ptr + places, tl.broadcast_to(features[None, :], [BLOCK_M, BLOCK_N]), mask=stored)
        tl.store(values_ptr + places, to_dtype_of(scores, values_ptr), mask=stored)
        written += tl.sum(active, axis=1)


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor,
    packed: Tensor | None = None,
    capacity: int | None = None,
    *,
    value_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets int64 ``(R + 1,)``, indices int32 ``(entries,)``, values ``(entries,)`` in the dtype of x unless told.

    With a ``capacity``, indices and values ``(capacity,)``: the first entries, then -1 and 0; offsets as without.
    """
    n_rows, n, device = x.shape[0], W_enc.shape[0], x.device
    encoder = prepare(W_enc, b_enc, b_dec)
    states: tuple[Any, ...] = encoder.states(x)
    threshold = threshold.to(torch.float32).contiguous()
    tiles, blocks = triton.cdiv(n, BLOCK_FEATURES), triton.cdiv(n_rows, BLOCK_ROWS)
    per_part = triton.cdiv(tiles, min(max(PROGRAMS // max(blocks, 1), 1), tiles))
    parts = triton.cdiv(tiles, per_part)
    words = torch.empty((n_rows, tiles * (BLOCK_FEATURES // 32)), dtype=torch.int32, device=device)
    counts = torch.empty((n_rows, parts), dtype=torch.int32, device=device)
    grid = (blocks, parts)
    launch_tuned(
        mark_kernel,
        emit_configurations(x.dtype),
        lambda _: grid,
        (n_rows, n),
        *states,
        threshold,
        words,
        counts,
        n_rows,
        n,
        per_part,
        SCALAR=threshold.shape[0] == 1,
        **encoder.constants,
    )
    ends = counts.view(-1).cumsum(0, dtype=torch.int64)
    starts = torch.zeros((n_rows * parts + 1,), dtype=torch.int64, device=device)
    starts[1:] = ends
    if capacity is None:
        places = int(starts[-1])
        indices = torch.empty((places,), dtype=torch.int32, device=device)
        values = torch.empty((places,), dtype=value_dtype or x.dtype, device=device)
    else:
        places = capacity
        indices = torch.full((places,), -1, dtype=torch.int32, device=device)
        values = torch.zeros((places,), dtype=value_dtype or x.dtype, device=device)
    launch_tuned(
        fill_kernel,
        emit_configurations(x.dtype),
        lambda _: grid,
        (n_rows, n),
        *states,
        words,
        starts,
        indices,
        values,
        n_rows,
        n,
        per_part,
        places,
        **encoder.constants,
    )
    return starts[::parts].contiguous(), indices, values
