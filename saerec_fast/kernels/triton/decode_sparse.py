"""``out[r] = Σ_e value[e] · W_dec[index[e]] + b_dec`` over the entries e of row r.

Layout: entries in compressed rows (int64 offsets), ``W_dec (n, d)`` with unit column stride, one program per row and
block of columns. Entries with a negative index are padding.

Accumulator: float32, rounded once. Entries are added 16 at a time, always in the same grouping: a row's bits depend on
its own entries alone. Duplicates simply add up.

Tile: 16 entries × up to 256 columns: 16 rows of W_dec in flight hide the latency of a gather from the second-level
cache, and one program then covers the width of most dictionaries.

Configurations: how many of these gathers are under way. Each waits for the indices before it, and a row has only 2 to 4
of them, so that more than three cannot be of use. Warps and tile stay, since the order of a sum is theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saerec_fast.kernels.triton.floats import to_dtype_of, to_float32
from saerec_fast.kernels.triton.tuning import launch_tuned


@triton.jit
def decoded(
    indices_ptr,
    values_ptr,
    begin,
    end,
    w_ptr,
    w_row,
    columns,
    is_column,
    BLOCK_D: tl.constexpr,
    ENTRIES: tl.constexpr,
    STAGES: tl.constexpr = 1,
):
    """``Σ value · w[index]`` over entries ``begin … end``, float32 ``(BLOCK_D,)``."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(begin, end, ENTRIES, num_stages=STAGES):
        entries = start + tl.arange(0, ENTRIES)
        indices = tl.load(indices_ptr + entries, mask=entries < end, other=-1)
        values = to_float32(tl.load(values_ptr + entries, mask=entries < end, other=0.0))
        is_entry = indices >= 0
        offsets = indices.to(tl.int64)[:, None] * w_row + columns[None, :]
        weights = to_float32(tl.load(w_ptr + offsets, mask=is_entry[:, None] & is_column[None, :], other=0.0))
        # The value of padding is −inf after linear_topk.
        total += tl.sum(tl.where(is_entry, values, 0.0)[:, None] * weights, axis=0)
    return total


@triton.jit
def decode_kernel(
    offsets_ptr,
    indices_ptr,
    values_ptr,
    w_ptr,
    w_row,
    bias_ptr,
    out_ptr,
    d,
    BIASED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < d
    begin, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    total = decoded(indices_ptr, values_ptr, begin, end, w_ptr, w_row, columns, is_column, BLOCK_D, ENTRIES, STAGES)
    if BIASED:
        total += to_float32(tl.load(bias_ptr + columns, mask=is_column, other=0.0))
    tl.store(out_ptr + row * d + columns, to_dtype_of(total, out_ptr), mask=is_column)


CONFIGURATIONS = [triton.Config({"STAGES": stages}, num_warps=4) for stages in (1, 2, 3)]


def block_of(d: int) -> dict[str, Any]:
    return {"BLOCK_D": max(min(triton.next_power_of_2(d), 256), 16), "ENTRIES": 16}


def unit_columns(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def decode_sparse(
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Decoded hidden states ``(R, d)`` in the dtype of W_dec unless told."""
    offsets, indices, values = offsets.contiguous(), indices.contiguous(), values.contiguous()
    W_dec = unit_columns(W_dec)
    n_rows, d = offsets.shape[0] - 1, W_dec.shape[1]
    out = torch.empty((n_rows, d), dtype=dtype or W_dec.dtype, device=W_dec.device)
    launch_tuned(
        decode_kernel,
        CONFIGURATIONS,
        lambda constants: (n_rows, triton.cdiv(d, constants["BLOCK_D"])),
        (n_rows, d),
        offsets,
        indices,
        values,
        W_dec,
        W_dec.stride(0),
        out if b_dec is None else b_dec.contiguous(),
        out,
        d,
        BIASED=b_dec is not None,
        **block_of(d),
    )
    return out
