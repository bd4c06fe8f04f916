"""The sizes at which kernels are tested, and random inputs for tests/ and benchmarks/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """``rows`` hidden states of width ``d`` against ``n`` features, ``k`` of them selected."""

    d: int
    n: int
    k: int
    rows: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"d{self.d}-n{self.n}-k{self.k}-rows{self.rows}-{str(self.dtype).removeprefix('torch.')}"


class Inputs(NamedTuple):
    x: Tensor  # (rows, d)
    W_enc: Tensor  # (n, d)
    b_enc: Tensor  # (n,)
    b_dec: Tensor  # (d,)
    W_dec: Tensor  # (n, d)

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(tensor.to(dtype) for tensor in self))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Widths on both sides of every vector length (4, 8, 16) and of the feature block (32), row counts on both sides of
# the row tiles (2, 6, 8) and of the chunk (128); each size appears, their product does not.
_SIZES = [
    (1, 1, 1, 1),
    (15, 17, 1, 3),
    (16, 16, 16, 2),
    (17, 33, 15, 7),
    (31, 31, 17, 8),
    (33, 129, 31, 9),
    (64, 129, 129, 6),
    (129, 65, 33, 13),
    (200, 15, 15, 1),
    (8, 130, 1, 0),
    (5, 32, 16, 128),
    (17, 257, 33, 129),
    (64, 1000, 129, 130),
    (16, 1001, 16, 300),
]
KERNEL_CASES = [Case(*sizes, dtype) for sizes in _SIZES for dtype in DTYPES]


def make_inputs(case: Case, seed: int = 0, scale: float = 1.0) -> Inputs:
    """Gaussian hidden states and weights of a random SAE; scores have a standard deviation near ``scale``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(case.dtype)

    return Inputs(
        x=normal(case.rows, case.d, std=scale),
        W_enc=normal(case.n, case.d, std=case.d**-0.5),
        b_enc=normal(case.n, std=0.1 * scale),
        b_dec=normal(case.d, std=0.1 * scale),
        W_dec=normal(case.n, case.d, std=case.d**-0.5),
    )


def integer_inputs(case: Case, seed: int = 0, largest: int = 2) -> Inputs:
    """Small integers: every sum is exact, so that the order of additions cannot matter, and scores tie."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=generator).to(case.dtype)

    return Inputs(draw(case.rows, case.d), draw(case.n, case.d), draw(case.n), draw(case.d), draw(case.n, case.d))
