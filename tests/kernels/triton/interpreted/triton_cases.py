"""Shared by the interpreted tests: sizes that take the interpreter seconds, and data whose float32 sums are exact."""

from __future__ import annotations

import torch
from cases import DTYPES, KERNEL_CASES, Case, Inputs
from helpers import assert_equal

import saerec_fast as fast
from saerec_fast import reference

SMALL_CASES = [case for case in KERNEL_CASES if case.rows <= 13]
# More features than the list of candidates holds, and more rows than a tile: every kernel of a top-k runs.
TWO_PASS_CASES = [Case(17, 257, 33, 70, DTYPES[0]), *(Case(40, 700, 16, 9, dtype) for dtype in DTYPES)]


def integers(
    *shape: int, low: int = -2, high: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def integer_inputs(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(case.dtype)

    return Inputs(draw(case.rows, case.d), draw(case.n, case.d), draw(case.n), draw(case.d), draw(case.n, case.d))


def check_top_k(x, weight, bias=None, *, k, exclude=None) -> fast.TopKResult:
    """Equality with the float64 reference, rounded once."""
    result = fast.linear_topk(x, weight, bias, k=k, exclude=exclude, backend="triton")
    if exclude is not None and not isinstance(exclude, fast.Ragged):
        exclude = fast.Ragged.from_lists(exclude)
    bias = None if bias is None else bias.double()
    expected = reference.linear_topk(x.double(), weight.double(), bias, k=k, exclude=exclude)
    assert_equal(result.indices, expected.indices)
    assert_equal(result.values, expected.values.to(x.dtype))
    return result


def check_features(actual: fast.SparseFeatures, expected: fast.SparseFeatures) -> None:
    """The same for sparse rows."""
    assert actual.batch_shape == expected.batch_shape
    assert actual.n_features == expected.n_features
    assert_equal(actual.offsets, expected.offsets)
    assert_equal(actual.indices, expected.indices)
    assert_equal(actual.values, expected.values.to(actual.values.dtype))
