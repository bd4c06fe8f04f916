"""Per feature j, over the entries e with index j: ``Σ c[e] · (rows[r(e)] − shift)`` ``(n, d)`` and ``Σ c[e]`` ``(n,)``.

The gradient of encoding and of decoding with respect to the weights.

1. The entries are sorted by feature on the device (stable: those of one feature stay in row order), and every entry's
   row is found by a search in the offsets; nothing waits for the host.
2. One program per feature and block of columns adds that feature's entries 16 at a time, in that order: no atomics, the
   same bits every time. A feature without entries gets zeros.

Accumulator: float32, rounded once. Entries with a negative index are padding.

Tile: 16 entries × up to 128 columns, as in decode_sparse.py; narrower blocks, because the programs of a few very active
features decide when the launch ends.

Configurations: how many blocks of entries are under way. Such a program is a chain of loads that wait for each other
(order, row, hidden state). Warps and tile stay, since the order of a sum is theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saerec_fast.kernels.triton.decode_sparse import unit_columns
from saerec_fast.kernels.triton.floats import to_dtype_of, to_float32
from saerec_fast.kernels.triton.tuning import launch_tuned


@triton.jit
def gradient_kernel(
    bounds_ptr,
    order_ptr,
    entry_rows_ptr,
    coefficients_ptr,
    rows_ptr,
    rows_row,
    shift_ptr,
    out_ptr,
    sums_ptr,
    d,
    SHIFTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < d
    begin, end = tl.load(bounds_ptr + feature), tl.load(bounds_ptr + feature + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    coefficient_total = tl.zeros([ENTRIES], tl.float32)
    if SHIFTED:
        shift = to_float32(tl.load(shift_ptr + columns, mask=is_column, other=0.0))
    for start in tl.range(begin, end, ENTRIES, num_stages=STAGES):
        places = start + tl.arange(0, ENTRIES)
        is_entry = places < end
        entries = tl.load(order_ptr + places, mask=is_entry, other=0)
        rows = tl.load(entry_rows_ptr + entries, mask=is_entry, other=0)
        coefficients = to_float32(tl.load(coefficients_ptr + entries, mask=is_entry, other=0.0))
        inside = is_entry[:, None] & is_column[None, :]
        states = to_float32(tl.load(rows_ptr + rows[:, None] * rows_row + columns[None, :], mask=inside, other=0.0))
        if SHIFTED:
            states = tl.where(inside, states - shift[None, :], 0.0)
        total += tl.sum(coefficients[:, None] * states, axis=0)
        coefficient_total += coefficients
    tl.store(out_ptr + feature * d + columns, to_dtype_of(total, out_ptr), mask=is_column)
    if tl.program_id(1) == 0:
        tl.store(sums_ptr + feature, to_dtype_of(tl.sum(coefficient_total, axis=0), sums_ptr))


CONFIGURATIONS = [triton.Config({"STAGES": stages}, num_warps=4) for stages in (1, 2, 3)]


def sparse_weight_gradient(
    offsets: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    shift: Tensor | None,
    n: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``(n, d)`` and ``(n,)`` in the dtype of rows unless told."""
    rows, coefficients = unit_columns(rows), coefficients.contiguous()
    d, device = rows.shape[1], rows.device
    ordered, order = indices.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(n + 1, device=device, dtype=ordered.dtype))
    places = torch.arange(indices.shape[0], device=device)
    entry_rows = torch.searchsorted(offsets.contiguous(), places, right=True) - 1
    out = torch.empty((n, d), dtype=dtype or rows.dtype, device=device)
    sums = torch.empty((n,), dtype=dtype or rows.dtype, device=device)
    launch_tuned(
        gradient_kernel,
        CONFIGURATIONS,
        lambda constants: (n, triton.cdiv(d, constants["BLOCK_D"])),
        (rows.shape[0], n, d),
        bounds,
        order,
        entry_rows,
        coefficients,
        rows,
        rows.stride(0),
        rows if shift is None else shift.contiguous(),
        out,
        sums,
        d,
        SHIFTED=shift is not None,
        BLOCK_D=max(min(triton.next_power_of_2(d), 128), 16),
        ENTRIES=16,
    )
    return out, sums
