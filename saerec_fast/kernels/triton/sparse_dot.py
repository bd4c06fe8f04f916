"""``out[e] = <rows[r(e)], weight[index[e]]>`` for every entry e of sparse rows; 0 where the index is negative.

The gradient of decoding with respect to the values.

Layout: entries in compressed rows (int64 offsets), both matrices with unit column stride; one program per row, which
holds a block of the row and gathers 16 rows of the weights at a time.

Accumulator: float32, columns in blocks of up to 256 in ascending order, rounded once. Nothing is ordered.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saerec_fast.kernels.triton.decode_sparse import block_of, unit_columns
from saerec_fast.kernels.triton.floats import to_dtype_of, to_float32
from saerec_fast.kernels.triton.launch import launch


@triton.jit
def dot_kernel(
    offsets_ptr,
    indices_ptr,
    rows_ptr,
    rows_row,
    w_ptr,
    w_row,
    out_ptr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    for start in range(begin, end, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        indices = tl.load(indices_ptr + entries, mask=entries < end, other=-1)
        is_entry = indices >= 0
        total = tl.zeros([ENTRIES], tl.float32)
        for first in range(0, D, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            is_column = columns < D
            states = to_float32(tl.load(rows_ptr + row * rows_row + columns, mask=is_column, other=0.0))
            offsets = indices.to(tl.int64)[:, None] * w_row + columns[None, :]
            weights = tl.load(w_ptr + offsets, mask=is_entry[:, None] & is_column[None, :], other=0.0)
            products = tl.where(is_entry[:, None], states[None, :] * to_float32(weights), 0.0)
            total += tl.sum(products, axis=1)
        tl.store(out_ptr + entries, to_dtype_of(total, out_ptr), mask=entries < end)


def sparse_dot(
    offsets: Tensor, indices: Tensor, rows: Tensor, weight: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """``(entries,)`` in the dtype of weight unless told."""
    offsets, indices = offsets.contiguous(), indices.contiguous()
    rows, weight = unit_columns(rows), unit_columns(weight)
    # Places behind the last row's end are not visited.
    out = torch.zeros((indices.shape[0],), dtype=dtype or weight.dtype, device=weight.device)
    launch(
        dot_kernel,
        (offsets.shape[0] - 1,),
        offsets,
        indices,
        rows,
        rows.stride(0),
        weight,
        weight.stride(0),
        out,
        D=weight.shape[1],
        num_warps=4,
        **block_of(weight.shape[1]),
    )
    return out
