"""Exact top-k of ``score[r, j] = <x[r], w[j]> + bias[j]`` per row, without writing the scores.

1. ``group_maxima_kernel``: features fall into groups, one maximum each is kept per row: ``G`` numbers instead of n. A
   group is one column of the tile over consecutive tiles, so that the maximum needs no exchange between threads.
2. ``bound_kernel``: a value that at least k of the maxima, hence at least k scores, reach; by bisection.
3. ``emit_kernel``: the same tiles again; what reaches the bound goes to the row's list of at most ``CAPACITY``
   candidates. One counter per row gives out the places, one addition per row and tile: the list's order varies from run
   to run, what is in it and how many do not.
4. ``repair_kernel``: rows with more candidates than fit (many ties, mostly), or fewer than k, get exactly their k best,
   by bisection over recomputed scores. Always launched, so that the host never waits to learn whether there are any.
5. ``select_kernel``: sorts a row's candidates and keeps k.

Why it is exact: the candidates are all features whose score in step 3 reaches the bound, and there are at least k of
them; so the k best by the scores of step 3 are among them, whatever step 1 computed. Steps 1 and 2 only decide how
many.

Order: int32 images of float32 scores (see scores.py); int64 with the feature below, so that ties go to the smallest
index and no two candidates are equal: the sort's result does not depend on the order in which they came.

Accumulator: float32. Excluded features are a bit mask ``(R, n / 32)``.

Sizes: groups are about 4 k, so that the bound is passed by about 1.15 k features of random data (see docs/gpu.md), and
more where few rows would leave the device idle; the list holds 2 k. Dictionaries that fit into the list skip steps 1
and 2.

Configurations (tuning.py): step 1 may choose its tile, as whatever it computes only decides how many candidates there
are. Step 3 keeps its own, and its warps: with others the tensor cores multiply in other shapes, and that those round
alike could not be shown without hardware. It chooses how many tiles of weights are loaded ahead, in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saerec_fast.kernels.triton.decode_sparse import block_of, decoded
from saerec_fast.kernels.triton.floats import to_dtype_of, to_float32
from saerec_fast.kernels.triton.launch import INTERPRETED, launch
from saerec_fast.kernels.triton.scores import (
    BLOCK_FEATURES,
    BLOCK_ROWS,
    LOWEST,
    Encoder,
    load_states,
    order_of,
    pack,
    prepare,
    score_of,
    score_tile,
)
from saerec_fast.kernels.triton.sort import sort_descending
from saerec_fast.kernels.triton.tuning import launch_tuned

MAX_K = 512


@triton.jit
def order_tile(
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
    excluded_ptr,
    excluded_row,
    features,
    n,
    EXCLUDES: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Orders ``(rows, features)`` of the scores, LOWEST where a feature is excluded or there is none."""
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
    candidate = is_row[:, None] & is_feature[None, :]
    if EXCLUDES:
        # One load for 32 features: an address for each would not fit into the registers.
        WORDS: tl.constexpr = features.shape[0] // 32
        places = tl.min(features, axis=0) // 32 + tl.arange(0, WORDS)
        words = excluded_ptr + rows.to(tl.int64)[:, None] * excluded_row + places[None, :]
        word = tl.load(words, mask=is_row[:, None] & (places < excluded_row)[None, :], other=0)
        bits = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        candidate = candidate & (tl.reshape(bits, [rows.shape[0], features.shape[0]]) == 0)
    return tl.where(candidate, order_of(scores), LOWEST)


@triton.jit
def group_maxima_kernel(
    x_ptr,
    x_row,
    x_column,
    shift_ptr,
    w_ptr,
    w_row,
    bias_ptr,
    excluded_ptr,
    excluded_row,
    maxima_ptr,
    n_rows,
    n,
    tiles_per_group,
    EXCLUDES: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``maxima (R, programs of axis 1 · BLOCK_N)``: per row and group the largest order."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    held = load_states(x_ptr, x_row, x_column, rows, is_row, shift_ptr, 0, SHIFTED, D, BLOCK_D)
    best = tl.full([BLOCK_M, BLOCK_N], LOWEST, tl.int32)
    first = tl.program_id(1) * tiles_per_group
    last = tl.minimum(first + tiles_per_group, tl.cdiv(n, BLOCK_N))
    for tile in range(first, last):
        features = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        order = order_tile(
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
            excluded_ptr,
            excluded_row,
            features,
            n,
            EXCLUDES,
            SHIFTED,
            BIASED,
            D,
            BLOCK_D,
        )
        best = tl.maximum(best, order)
    groups = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_groups = tl.num_programs(1) * BLOCK_N
    tl.store(maxima_ptr + rows.to(tl.int64)[:, None] * n_groups + groups[None, :], best, mask=is_row[:, None])


@triton.jit
def bound_kernel(
    maxima_ptr,
    bounds_ptr,
    n_rows,
    n_groups,
    k,
    RESOLUTION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """``bounds (R,)``: an order that at least k of the row's maxima reach, at most RESOLUTION below the largest."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    groups = tl.arange(0, BLOCK_GROUPS)
    is_row = rows < n_rows
    inside = is_row[:, None] & (groups < n_groups)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n_groups + groups[None, :]
    maxima = tl.load(maxima_ptr + offsets, mask=inside, other=LOWEST)
    # Of rows outside the batch all maxima are LOWEST, so that their search ends at once.
    high = tl.max(maxima, axis=1).to(tl.int64)
    low = tl.min(tl.where(maxima == LOWEST, 0x7FFFFFFF, maxima), axis=1).to(tl.int64)
    reach = tl.sum((maxima > LOWEST).to(tl.int32), axis=1)
    low = tl.where(reach >= k, low, LOWEST)
    high = tl.where(reach >= k, high, LOWEST)
    while tl.max(high - low, axis=0) > RESOLUTION:
        middle = low + (high - low + 1) // 2
        reach = tl.sum((maxima >= middle.to(tl.int32)[:, None]).to(tl.int32), axis=1)
        low = tl.where(reach >= k, middle, low)
        high = tl.where(reach >= k, high, middle - 1)
    # Rows whose search ended first may have gone on with the others, each step of which keeps the bound true.
    tl.store(bounds_ptr + rows, low.to(tl.int32), mask=is_row)


@triton.jit
def emit_kernel(
    x_ptr,
    x_row,
    x_column,
    shift_ptr,
    w_ptr,
    w_row,
    bias_ptr,
    excluded_ptr,
    excluded_row,
    bounds_ptr,
    counts_ptr,
    candidates_ptr,
    n_rows,
    n,
    tiles_per_program,
    EXCLUDES: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """``candidates (R, CAPACITY)``: packed orders that reach the bound; ``counts (R,)``: how many do, all told."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    held = load_states(x_ptr, x_row, x_column, rows, is_row, shift_ptr, 0, SHIFTED, D, BLOCK_D)
    bounds = tl.load(bounds_ptr + rows, mask=is_row, other=0)
    lists = candidates_ptr + rows.to(tl.int64) * CAPACITY
    first = tl.program_id(1) * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tl.cdiv(n, BLOCK_N))
    for tile in range(first, last):
        features = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        order = order_tile(
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
            excluded_ptr,
            excluded_row,
            features,
            n,
            EXCLUDES,
            SHIFTED,
            BIASED,
            D,
            BLOCK_D,
        )
        found = (order >= bounds[:, None]) & (order > LOWEST)
        places = tl.cumsum(found.to(tl.int32), axis=1)
        total = tl.sum(found.to(tl.int32), axis=1)
        taken = tl.atomic_add(counts_ptr + rows, total, mask=is_row & (total > 0), sem="relaxed")
        places += taken[:, None] - 1
        tl.store(lists[:, None] + places, pack(order, features[None, :]), mask=found & (places < CAPACITY))


@triton.jit
def repair_kernel(
    x_ptr,
    x_row,
    x_column,
    shift_ptr,
    w_ptr,
    w_row,
    bias_ptr,
    excluded_ptr,
    excluded_row,
    bounds_ptr,
    counts_ptr,
    candidates_ptr,
    n_rows,
    n,
    k,
    EXCLUDES: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Gives rows whose list is of no use exactly their k best candidates; a program owns its rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    bounds = tl.load(bounds_ptr + rows, mask=is_row, other=LOWEST)
    counts = tl.load(counts_ptr + rows, mask=is_row, other=0)
    # A row without a bound and with fewer than k candidates has no more than these.
    broken = is_row & ((counts > CAPACITY) | ((counts < k) & (bounds > LOWEST)))
    if tl.max(broken.to(tl.int32), axis=0) > 0:
        held = load_states(x_ptr, x_row, x_column, rows, is_row, shift_ptr, 0, SHIFTED, D, BLOCK_D)
        low = tl.maximum(bounds, LOWEST + 1)
        high = tl.full([BLOCK_M], LOWEST, tl.int32)
        kept_above = tl.zeros([BLOCK_M], tl.int32)
        lists = candidates_ptr + rows.to(tl.int64) * CAPACITY
        # Sweeps over all features, each comparing with one order per row: the first (stage 0) checks the bound and
        # finds the largest order, then some bisect (1), one counts what is above the k-th largest (2), the last
        # writes (3).
        stage = 0
        while stage < 4:
            middle = low
            if stage == 1:
                wide = low.to(tl.int64)
                middle = (wide + (high - wide + 1) // 2).to(tl.int32)
            above = tl.zeros([BLOCK_M], tl.int32)
            equal = tl.zeros([BLOCK_M], tl.int32)
            for tile in range(tl.cdiv(n, BLOCK_N)):
                features = tile * BLOCK_N + tl.arange(0, BLOCK_N)
                order = order_tile(
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
                    excluded_ptr,
                    excluded_row,
                    features,
                    n,
                    EXCLUDES,
                    SHIFTED,
                    BIASED,
                    D,
                    BLOCK_D,
                )
                greater = (order > middle[:, None]).to(tl.int32)
                ties = (order == middle[:, None]).to(tl.int32)
                if stage == 0:
                    high = tl.maximum(high, tl.max(order, axis=1))
                if stage == 3:
                    # First all that are greater, then ties as long as there is room, each in the order of features.
                    # Both ranks in one scan: a tile has fewer than 2^16 features.
                    ranks = tl.cumsum(greater | (ties << 16), axis=1)
                    place = above[:, None] + (ranks & 0xFFFF) - 1
                    place = tl.where(greater != 0, place, (kept_above + equal)[:, None] + (ranks >> 16) - 1)
                    kept = (greater + ties != 0) & (place < k) & broken[:, None]
                    tl.store(lists[:, None] + place, pack(order, features[None, :]), mask=kept)
                above += tl.sum(greater, axis=1)
                equal += tl.sum(ties, axis=1)
            reach = above + equal
            if stage == 0:
                low = tl.where(reach >= k, low, LOWEST + 1)
                # Nothing to look for in the other rows.
                high = tl.where(broken, tl.maximum(high, low), low)
                stage = 1
            elif stage == 1:
                low = tl.where(reach >= k, middle, low)
                high = tl.where(reach >= k, high, middle - 1)
            else:
                if stage == 2:
                    kept_above = above
                else:
                    tl.store(counts_ptr + rows, tl.minimum(reach, k), mask=broken)
                stage += 1
            found = tl.max((high > low).to(tl.int32), axis=0) == 0
            if (stage == 1) & found:
                stage = 2


@triton.jit
def select_kernel(
    counts_ptr,
    candidates_ptr,
    values_ptr,
    indices_ptr,
    n_rows,
    k,
    w_ptr,
    w_row,
    shift_ptr,
    out_ptr,
    d,
    RELU: tl.constexpr,
    DECODES: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The k largest candidates of each row, in order; with DECODES (one row a program) also what they decode to."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    counts = tl.load(counts_ptr + rows, mask=is_row, other=0)
    places = tl.arange(0, CAPACITY)
    offsets = rows.to(tl.int64)[:, None] * CAPACITY + places[None, :]
    nothing = tl.full([BLOCK_M, CAPACITY], LOWEST, tl.int64) << 32
    candidates = tl.load(candidates_ptr + offsets, mask=places[None, :] < counts[:, None], other=0)
    candidates = tl.where(places[None, :] < counts[:, None], candidates, nothing)
    candidates = sort_descending(candidates, BLOCK_M, CAPACITY)
    order = (candidates >> 32).to(tl.int32)
    missing = order == LOWEST
    values = score_of(order)
    if RELU:
        values = tl.where(values <= 0, 0.0, values)
    values = tl.where(missing, float("-inf"), values)
    indices = tl.where(missing, -1, 0x7FFFFFFF - (candidates & 0x7FFFFFFF).to(tl.int32))
    kept = is_row[:, None] & (places < k)[None, :]
    out = rows.to(tl.int64)[:, None] * k + places[None, :]
    tl.store(values_ptr + out, to_dtype_of(values, values_ptr), mask=kept)
    tl.store(indices_ptr + out, indices.to(indices_ptr.dtype.element_ty), mask=kept)
    if DECODES:
        # The program reads back what its own threads have written.
        tl.debug_barrier()
        row = tl.program_id(0).to(tl.int64)
        for start in range(0, d, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            total = decoded(
                indices_ptr, values_ptr, row * k, row * k + k, w_ptr, w_row, columns, columns < d, BLOCK_D, ENTRIES
            )
            if SHIFTED:
                total += to_float32(tl.load(shift_ptr + columns, mask=columns < d, other=0.0))
            tl.store(out_ptr + row * d + columns, to_dtype_of(total, out_ptr), mask=columns < d)


@triton.jit
def exclude_kernel(offsets_ptr, ids_ptr, mask_ptr, words, n, BLOCK: tl.constexpr):
    """Sets the bits of one row's excluded ids in ``mask (R, words)``, which comes in as zeros."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    for start in range(begin, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + places, mask=places < end, other=-1)
        known = (ids >= 0) & (ids < n)
        bit = (tl.full([BLOCK], 1, tl.int32) << (ids & 31).to(tl.int32)).to(tl.int32)
        tl.atomic_or(mask_ptr + row * words + (ids >> 5), bit, mask=known, sem="relaxed")


# Programs that keep a large device busy: a few for each of 132 multiprocessors.
PROGRAMS = 512
MAX_GROUPS = 4096
RESOLUTION = 1 << 10
EXCLUDE_BLOCK = 128


def capacity_of(k: int) -> int:
    return triton.next_power_of_2(max(2 * k, 64))


def tiles_per_group(n_rows: int, n: int, k: int) -> int:
    """Tiles that share a group: about 4 k groups, more for few rows, and at most MAX_GROUPS."""
    tiles = triton.cdiv(n, BLOCK_FEATURES)
    by_k = triton.cdiv(4 * k, BLOCK_FEATURES)
    by_rows = PROGRAMS // triton.cdiv(n_rows, BLOCK_ROWS)
    parts = min(max(by_k, by_rows), MAX_GROUPS // BLOCK_FEATURES, tiles)
    return triton.cdiv(tiles, parts)


def top_k(
    x: Tensor,
    encoder: Encoder,
    k: int,
    exclude_offsets: Tensor | None,
    exclude_ids: Tensor | None,
    *,
    relu: bool,
    index_dtype: torch.dtype,
    value_dtype: torch.dtype,
    decoder: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values and indices ``(R, k)``; with a decoder ``(W_dec, b_dec)`` also the decoded rows ``(R, d)``."""
    if k > MAX_K:
        raise ValueError(f"k: the Triton kernels select up to {MAX_K} features, got {k}; use backend='reference'")
    n_rows, device = x.shape[0], x.device
    n = encoder.weight.shape[0]
    values = torch.empty((n_rows, k), dtype=value_dtype, device=device)
    indices = torch.empty((n_rows, k), dtype=index_dtype, device=device)
    out = None if decoder is None else torch.empty((n_rows, x.shape[1]), dtype=x.dtype, device=device)
    if n_rows == 0:
        return values, indices, out
    capacity = capacity_of(k)
    blocks = triton.cdiv(n_rows, BLOCK_ROWS)
    words = triton.cdiv(n, 32)
    excluded: Tensor | None = None
    if exclude_offsets is not None and exclude_ids is not None:
        excluded = torch.zeros((n_rows, words), dtype=torch.int32, device=device)
        launch(
            exclude_kernel,
            (n_rows,),
            exclude_offsets,
            exclude_ids,
            excluded,
            words,
            n,
            BLOCK=EXCLUDE_BLOCK,
            num_warps=1,
        )
    states = (*encoder.states(x), x if excluded is None else excluded, words)
    constants = {**encoder.constants, "EXCLUDES": excluded is not None}
    if n <= capacity:
        bounds = torch.full((n_rows,), LOWEST.value, dtype=torch.int32, device=device)
    else:
        bounds = lower_bounds(states, constants, n_rows, n, k, device)
    counts = torch.zeros((n_rows,), dtype=torch.int32, device=device)
    candidates = torch.empty((n_rows, capacity), dtype=torch.int64, device=device)
    tiles = triton.cdiv(n, BLOCK_FEATURES)
    per_program = triton.cdiv(tiles, min(max(PROGRAMS // blocks, 1), tiles))
    lists = (bounds, counts, candidates, n_rows, n)
    launch_tuned(
        emit_kernel,
        emit_configurations(x.dtype),
        lambda _: (blocks, triton.cdiv(tiles, per_program)),
        (n_rows, n),
        *states,
        *lists,
        per_program,
        appends_to=["counts_ptr"],
        CAPACITY=capacity,
        **constants,
    )
    launch(repair_kernel, (blocks,), *states, *lists, k, CAPACITY=capacity, **constants, **schedule(x.dtype))
    W_dec, b_dec = (values, None) if decoder is None else decoder
    block_m = 1 if decoder is not None else rows_per_program(capacity)
    launch(
        select_kernel,
        (triton.cdiv(n_rows, block_m),),
        counts,
        candidates,
        values,
        indices,
        n_rows,
        k,
        W_dec,
        W_dec.stride(0),
        values if b_dec is None else b_dec,
        values if out is None else out,
        x.shape[1],
        RELU=relu,
        DECODES=decoder is not None,
        SHIFTED=b_dec is not None,
        BLOCK_M=block_m,
        CAPACITY=capacity,
        num_warps=4 if block_m * capacity >= 512 else 2,
        **block_of(x.shape[1]),
    )
    return values, indices, out


def lower_bounds(
    states: tuple[Any, ...], constants: dict[str, Any], n_rows: int, n: int, k: int, device: torch.device
) -> Tensor:
    """int32 ``(R,)``: per row an order that at least k scores reach."""
    per_group = tiles_per_group(n_rows, n, k)
    configurations = maxima_configurations(states[0].dtype)

    def groups(of: dict[str, Any]) -> int:
        return triton.cdiv(triton.cdiv(n, of["BLOCK_N"]), per_group) * of["BLOCK_N"]

    def grid(of: dict[str, Any]) -> tuple[int, ...]:
        return triton.cdiv(n_rows, of["BLOCK_M"]), groups(of) // of["BLOCK_N"]

    # Room for the most groups; a row takes as many as its configuration has.
    room = max(groups(configuration.kwargs) for configuration in configurations)
    maxima = torch.empty((n_rows * room,), dtype=torch.int32, device=device)
    bounds = torch.empty((n_rows,), dtype=torch.int32, device=device)
    launched = launch_tuned(
        group_maxima_kernel,
        configurations,
        grid,
        (n_rows, n, per_group),
        *states,
        maxima,
        n_rows,
        n,
        per_group,
        **{name: value for name, value in constants.items() if name not in configurations[0].kwargs},
    )
    n_groups = groups(launched.kwargs)
    block_groups = triton.next_power_of_2(n_groups)
    block_m = rows_per_program(block_groups)
    launch(
        bound_kernel,
        (triton.cdiv(n_rows, block_m),),
        maxima,
        bounds,
        n_rows,
        n_groups,
        k,
        RESOLUTION=RESOLUTION,
        BLOCK_M=block_m,
        BLOCK_GROUPS=block_groups,
        num_warps=4,
    )
    return bounds


def rows_per_program(width: int) -> int:
    """Rows that make 512 elements a program; the interpreter's time goes by operations, not by elements."""
    return max((8192 if INTERPRETED else 512) // width, 1)


def schedule(dtype: torch.dtype, float32_stages: int = 1) -> dict[str, int]:
    """Eight warps, two warpgroups: with four the kernels that store parts of a tile run out of registers. Weights in 16
    bits are loaded three tiles ahead; in float32, where arithmetic decides, loading ahead only costs registers."""
    return {"num_warps": 8, "num_stages": float32_stages if dtype == torch.float32 else 3}


def maxima_configurations(dtype: torch.dtype) -> list[triton.Config]:
    """Of step 1; all give about the same number of groups.

    16 bits: loads further ahead, for latency; half the warps, so that more programs share a multiprocessor and one's
    comparisons hide another's products; 128 rows, which read the weights half as often; 128 features, which read the
    states half as often and make wider instructions. Both at once spill. Float32: half the warps, so that a thread
    multiplies twice as much of what it loads; 128 features with as many more warps, since 128 rows spill.
    """
    tiles = [(64, 64, 8, 1), (64, 64, 4, 1), (64, 128, 16, 1)]
    if dtype != torch.float32:
        tiles = [(64, 64, 8, 3), (64, 64, 8, 4), (64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 3)]
    return [
        triton.Config({"BLOCK_M": rows, "BLOCK_N": features}, num_warps=warps, num_stages=stages)
        for rows, features, warps, stages in tiles
    ]


def emit_configurations(dtype: torch.dtype) -> list[triton.Config]:
    """Of step 3, and of the passes of ``encode_threshold``. In float32 a second stage spills."""
    options = schedule(dtype)
    stages = [1] if dtype == torch.float32 else [3, 2, 4]
    return [triton.Config({}, num_warps=options["num_warps"], num_stages=count) for count in stages]


def linear_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    exclude_offsets: Tensor | None,
    exclude_ids: Tensor | None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values ``(R, k)`` in the dtype of x, indices int64 ``(R, k)``; ``(-inf, -1)`` where candidates have run out."""
    values, indices, _ = top_k(
        x,
        prepare(weight, bias, None),
        k,
        exclude_offsets,
        exclude_ids,
        relu=False,
        index_dtype=torch.int64,
        value_dtype=x.dtype,
    )
    return values, indices
