"""Rows of int64 in descending order: a bitonic network of compare-and-exchange steps in registers.

``tl.sort`` finds the partner of an element by a reduction with exclusive or, which Triton's interpreter evaluates
element by element in Python: minutes for what tests need. Here it is a sum less the element, exact modulo 2^64, and
otherwise the same network.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sort_descending(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """``x (ROWS, SIZE)``, int64, SIZE a power of two."""
    LOG: tl.constexpr = SIZE.bit_length() - 1
    for stage in tl.static_range(1, LOG + 1):
        for step in tl.static_range(stage):
            x = _exchange(x, ROWS, SIZE, stage, 1 << (stage - 1 - step))
    return x


@triton.jit
def _exchange(x, ROWS: tl.constexpr, SIZE: tl.constexpr, STAGE: tl.constexpr, DISTANCE: tl.constexpr):
    OUTER: tl.constexpr = SIZE // (2 * DISTANCE)
    pairs = tl.reshape(x, [ROWS, OUTER, 2, DISTANCE])
    partner = tl.sum(pairs, axis=2)[:, :, None, :] - pairs
    place = tl.reshape(tl.arange(0, SIZE), [1, OUTER, 2, DISTANCE])
    # Runs of 2^STAGE alternate between descending and ascending; the last stage is one descending run.
    takes_larger = ((place // DISTANCE) & 1) == ((place >> STAGE) & 1)
    pairs = tl.where(takes_larger, tl.maximum(pairs, partner), tl.minimum(pairs, partner))
    return tl.reshape(pairs, [ROWS, SIZE])
