"""The largest of sparse values against a stable sort."""

from __future__ import annotations

import pytest
import torch
from helpers import torch_threads
from hypothesis import given
from hypothesis import strategies as st

from saerec_fast import reference
from saerec_fast.kernels import cpu

SPECIAL = [0.0, -0.0, 1.0, 1.0 + 2**-23, -1.0, 1e-42, 3e38, float("inf"), float("-inf"), float("nan")]


def check(offsets: torch.Tensor, values: torch.Tensor, count: int) -> None:
    for actual, expected in zip(
        cpu.largest_entries(offsets, values, count), reference.largest_entries(offsets, values, count), strict=True
    ):
        assert actual.dtype == torch.int64
        assert torch.equal(actual, expected)


@given(st.lists(st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), max_size=6), max_size=8), st.integers(0, 50))
def test_any_values(rows: list[list[float]], count: int) -> None:
    counts = torch.tensor([0, *map(len, rows)])
    values = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
    check(counts.cumsum(0), values, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_large_batches(dtype: torch.dtype, threads: int) -> None:
    counts = torch.randint(0, 60, (2000,))
    values = torch.randn(int(counts.sum())).to(dtype)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    with torch_threads(threads):
        for count in (1, len(values) // 3, len(values) - 1, len(values)):
            check(offsets, values, count)
        check(offsets, torch.stack([values, values], 1)[:, 0], 1000)
        check(offsets, torch.ones_like(values), 1000)
