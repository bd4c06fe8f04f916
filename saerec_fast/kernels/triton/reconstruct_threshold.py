"""Encode and decode with a threshold SAE, without a list of what is active: ``Σ_j a_j W_dec[j] + b_dec``, where a_j is
the score s_j if ``not (s_j <= t_j)``, else 0.

1. ``sum_kernel``: for a block of rows and a block of columns, the score tiles of scores.py one after the other; the
   activations of each are multiplied with their rows of W_dec and added up. No size depends on the data, so that the
   host waits for nothing.
2. ``finish_kernel``: adds b_dec and, of ``steer``, the edited features. The first kernel leaves these out by their ids:
   whatever their scores round to, none is counted twice, or not at all.

Accumulator: float32, rounded once. 16-bit activations are rounded before the tensor cores multiply them with W_dec, as
eager PyTorch does; float32 is multiplied outside of them (scores.py). A feature that is off adds ``0 · W_dec[j]``: NaN
where that is not finite, as in the reference.

Order: features are added up in parts of 1024, and the parts in theirs, at every batch size. Many blocks of rows get a
program each that goes through all parts; few get one for every part, since the device would be idle otherwise. Both
give the same bits. Tiles in which nothing is active are multiplied like others: among so many rows they are rare, and
a branch would keep the next weights from being loaded ahead.

Tiles: what the sums leave of the registers (tests/kernels/triton/test_aot.py sees that nothing spills). 16 bits: up to
128 columns the states are held, and a tile is 128 rows, 16 for each of eight warps, so that activations need not change
owners between the products; wider states take 64 rows. Float32: 64 rows and 32 features, of which the second product
keeps a thread's share in registers. Columns in blocks of up to 256, each of which computes the scores anew.

Configurations: how many tiles of weights are under way; tiles and warps stay, as in linear_topk.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saerec_fast.kernels.triton.decode_sparse import block_of, decoded, unit_columns
from saerec_fast.kernels.triton.floats import product, to_dtype_of, to_float32
from saerec_fast.kernels.triton.launch import launch
from saerec_fast.kernels.triton.scores import block_columns, load_states, prepare, score_tile
from saerec_fast.kernels.triton.tuning import launch_tuned


@triton.jit
def sum_kernel(
    x_ptr,
    x_row,
    x_column,
    shift_ptr,
    w_ptr,
    w_row,
    bias_ptr,
    threshold_ptr,
    left_out_ptr,
    decoder_ptr,
    decoder_row,
    sums_ptr,
    n_rows,
    n,
    parts_per_program,
    SCALAR: tl.constexpr,
    LEAVES_OUT: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    """``sums (programs of axis 2, R, D)``: of each program's parts of TILES tiles."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column = columns < D
    held = load_states(x_ptr, x_row, x_column, rows, is_row, shift_ptr, 0, SHIFTED, D, BLOCK_D)
    n_tiles = tl.cdiv(n, BLOCK_N)
    first = tl.program_id(2) * parts_per_program
    last = tl.minimum(first + parts_per_program, tl.cdiv(n_tiles, TILES))
    for part in range(first, last):
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for tile in range(part * TILES, tl.minimum((part + 1) * TILES, n_tiles)):
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
            counted = is_feature
            if LEAVES_OUT:
                counted = is_feature & (tl.load(left_out_ptr + features, mask=is_feature, other=1) == 0)
            # A comparison that is false for NaN: such a score is active.
            activations = tl.where((scores <= threshold[None, :]) | (counted == 0)[None, :], 0.0, scores)
            offsets = features.to(tl.int64)[:, None] * decoder_row + columns[None, :]
            weights = tl.load(decoder_ptr + offsets, mask=is_feature[:, None] & is_column[None, :], other=0.0)
            total = product(to_dtype_of(activations, decoder_ptr), weights, total)
        places = sums_ptr + (tl.program_id(2).to(tl.int64) * n_rows + rows)[:, None] * D + columns[None, :]
        inside = is_row[:, None] & is_column[None, :]
        if part > first:
            # What this program has stored itself, perhaps another thread of it.
            tl.debug_barrier()
            total += tl.load(places, mask=inside, other=0.0)
        tl.store(places, total, mask=inside)


@triton.jit
def finish_kernel(
    x_ptr,
    x_row,
    x_column,
    sums_ptr,
    sums_part,
    n_parts,
    slots_ptr,
    edited_ptr,
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
    """``Σ_p sums[p] + edited @ W_dec[slots] + b_dec``; rows outside the mask are copied."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < d
    places = sums_ptr + row * d + columns
    total = tl.load(places, mask=is_column, other=0.0)
    for _ in range(1, n_parts):
        places += sums_part
        total += tl.load(places, mask=is_column, other=0.0)
    edited = edited_ptr + row * n_slots
    total += decoded(slots_ptr, edited, 0, n_slots, w_ptr, w_row, columns, is_column, BLOCK_D, ENTRIES)
    if BIASED:
        total += to_float32(tl.load(bias_ptr + columns, mask=is_column, other=0.0))
    out = to_dtype_of(total, out_ptr)
    if MASKED:
        x = tl.load(x_ptr + row * x_row + columns.to(tl.int64) * x_column, mask=is_column, other=0.0)
        out = tl.where(tl.load(mask_ptr + row) != 0, out, x)
    tl.store(out_ptr + row * d + columns, out, mask=is_column)


PART = 1024
# Programs that leave few multiprocessors idle. Below, sums are kept for each part: of at most this many blocks of rows.
BUSY_PROGRAMS = 128


def tile_of(d: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows, features and columns of a tile, and columns of the states multiplied at a time."""
    width = max(triton.next_power_of_2(d), 16)
    if dtype == torch.float32:
        rows, features, step = 64, 32, block_columns(d, dtype)
    elif width <= 128:
        rows, features, step = 128, 32, width
    else:
        rows, features, step = 64, 64, 16
    return {"BLOCK_M": rows, "BLOCK_N": features, "BLOCK_C": min(width, 256), "BLOCK_D": step}


def configurations(d: int, dtype: torch.dtype) -> list[triton.Config]:
    """Other stages than these spill at some width, and in float32."""
    if dtype == torch.float32:
        warps, stages = (4 if d <= 128 else 8), [1]
    else:
        warps, stages = 8, [3, 4] if d <= 128 else [2]
    return [triton.Config({}, num_warps=warps, num_stages=count) for count in stages]


def reconstruct_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor,
    *,
    edits: tuple[Tensor, Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Reconstructed hidden states ``(R, d)``.

    Args:
        edits: features int64 ``(m,)``, their activations float32 ``(R, m)`` instead of those that would be encoded, and
            int8 ``(n,)``, not 0 where a feature is one of them.
        mask: bool ``(R,)``; the other rows are copied from x.
    """
    (n_rows, d), n = x.shape, W_enc.shape[0]
    encoder, W_dec = prepare(W_enc, b_enc, b_dec), unit_columns(W_dec)
    threshold = threshold.to(torch.float32).contiguous()
    constants = {**encoder.constants, **tile_of(d, x.dtype)}
    parts = triton.cdiv(n, PART)
    blocks = triton.cdiv(n_rows, constants["BLOCK_M"]), triton.cdiv(d, constants["BLOCK_C"])
    programs = parts if blocks[0] * blocks[1] < BUSY_PROGRAMS else 1
    sums = torch.empty((programs, n_rows, d), dtype=torch.float32, device=x.device)
    slots, edited, left_out = (threshold, threshold, threshold) if edits is None else edits
    launch_tuned(
        sum_kernel,
        configurations(d, x.dtype),
        lambda _: (*blocks, programs),
        (n_rows, n, programs),
        *encoder.states(x),
        threshold,
        left_out,
        W_dec,
        W_dec.stride(0),
        sums,
        n_rows,
        n,
        parts // programs,
        SCALAR=threshold.shape[0] == 1,
        LEAVES_OUT=edits is not None,
        TILES=PART // constants["BLOCK_N"],
        **constants,
    )
    out = torch.empty((n_rows, d), dtype=x.dtype, device=x.device)
    block = block_of(d)
    launch(
        finish_kernel,
        (n_rows, triton.cdiv(d, block["BLOCK_D"])),
        x,
        *x.stride(),
        sums,
        sums.stride(0),
        programs,
        slots,
        edited,
        0 if edits is None else slots.shape[0],
        out if mask is None else mask.contiguous().view(torch.uint8),
        W_dec,
        W_dec.stride(0),
        out if b_dec is None else b_dec.contiguous(),
        out,
        d,
        MASKED=mask is not None,
        BIASED=b_dec is not None,
        num_warps=4,
        **block,
    )
    return out
