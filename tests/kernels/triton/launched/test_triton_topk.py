"""linear_topk and encode_topk."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Case, integer_inputs, make_inputs
from helpers import (
    EPS32,
    LAYOUTS,
    assert_equal,
    assert_same_bits,
    assert_same_features,
    assert_top_k,
    in_layout,
    rounding,
    score_tolerance,
    truth_scores,
)
from triton_cases import LARGE_CASES, SMALL_CASES, TWO_PASS_CASES, check_top_k, device, integers

import saerec_fast as fast
from saerec_fast import reference
from saerec_fast.kernels.triton import linear_topk

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("case", SMALL_CASES + TWO_PASS_CASES + LARGE_CASES, ids=str)
def test_returns_a_true_top_k(case: Case) -> None:
    x, weight, bias = make_inputs(case)[:3]
    result = device.linear_topk(x, weight, bias, k=case.k)
    assert result.values.shape == result.indices.shape == (case.rows, case.k)
    assert result.indices.dtype == torch.int64
    scores = x.double() @ weight.double().T + bias.double()
    tolerance = (case.d + 2) * EPS32 * (x.double().abs() @ weight.double().abs().T + bias.double().abs())
    assert_top_k(result, scores, tolerance, case.dtype)


@pytest.mark.parametrize("case", SMALL_CASES[::3] + TWO_PASS_CASES[1:] + LARGE_CASES, ids=str)
def test_encode_topk(case: Case) -> None:
    inputs = make_inputs(case)
    features = device.encode_topk(*inputs[:4], k=case.k)
    assert features.indices.dtype == torch.int32
    assert features.offsets.tolist() == list(range(0, (case.rows + 1) * case.k, case.k))
    if case.rows == 0:
        return
    values, indices = features.values.view(-1, case.k), features.indices.view(-1, case.k).long()
    scores, slack = truth_scores(inputs), score_tolerance(inputs)
    positive = (values > 0).all(-1)
    assert_top_k(fast.TopKResult(values[positive], indices[positive]), scores[positive], slack[positive], case.dtype)
    chosen = scores.gather(1, indices)
    bound = slack.gather(1, indices) + rounding(chosen, case.dtype) * 2
    assert ((values.double() - chosen.relu()).abs() <= bound).all()
    left_out = (scores - slack).scatter(1, indices, -INF).amax(-1)
    assert (left_out <= (chosen + slack.gather(1, indices)).amin(-1)).all()


@pytest.mark.parametrize("case", [*(Case(6, 200, 17, 5, dtype) for dtype in DTYPES), *LARGE_CASES], ids=str)
def test_encode_topk_equals_the_reference_on_integers(case: Case) -> None:
    inputs = integer_inputs(case)
    expected = reference.encode_topk(*inputs.to(torch.float64)[:4], k=case.k)
    assert_same_features(device.encode_topk(*inputs[:4], k=case.k), expected)


@pytest.mark.parametrize("k", [1, 16, 129])
def test_ties_go_to_the_smallest_index(k: int) -> None:
    # All scores reach any bound: the list overflows, and the rows are repaired.
    result = check_top_k(torch.ones(3, 8), torch.ones(500, 8), k=k)
    assert_equal(result.indices, torch.arange(k).expand(3, k))


def test_only_the_rows_that_overflow_are_repaired() -> None:
    x = integers(70, 6, low=-4, high=4)
    x[5], x[64] = 0, 0
    check_top_k(x, integers(300, 6, low=-9, high=9, seed=1), k=7)


def test_lists_that_overflow_before_the_best_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_topk, "PROGRAMS", 1)
    # One program, so that a group is one residue of the feature by 64. The best scores lie in 5 groups, the best of all
    # last: the bound is what the other groups reach, and the list is full of them long before.
    features = torch.arange(640)
    weight = torch.where(features % 64 < 5, features * 3 + 5000, features % 11).float().unsqueeze(1)
    for k in (16, 60):  # more than the best alone for the second
        check_top_k(torch.tensor([[1.0], [-1.0], [0.0]]), weight, k=k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference_on_integers(dtype: torch.dtype) -> None:
    x, weight = integers(5, 9, dtype=dtype), integers(333, 9, low=-1, high=1, seed=1, dtype=dtype)
    check_top_k(x, weight, integers(333, seed=2, dtype=dtype), k=33)
    check_top_k(x[:2], weight[:129], k=129)


def test_signed_zeros_tie() -> None:
    weight = torch.tensor([[-0.0], [0.0], [-0.0], [1.0], [0.0]])
    result = check_top_k(torch.tensor([[1.0], [-1.0]]), weight, torch.tensor([-0.0, -0.0, 0.0, 0.0, -0.0]), k=5)
    assert result.indices.tolist() == [[3, 0, 1, 2, 4], [0, 1, 2, 4, 3]]


# numpy, on which the interpreter computes, warns of what is tested here.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_rows(dtype: torch.dtype) -> None:
    x = integers(12, 6, dtype=dtype)
    for row, values in enumerate([(NAN, 0), (INF, 1), (-INF, 2), (INF, -INF), (NAN, NAN)]):
        x[2 * row, :2] = torch.tensor(values, dtype=dtype)
    weight = integers(150, 6, seed=3, dtype=dtype)
    for k in (1, 40):
        check_top_k(x, weight, k=k)
    weight[[0, 77, 149], [1, 2, 3]] = torch.tensor([INF, NAN, -INF], dtype=dtype)
    check_top_k(x, weight, integers(150, seed=4, dtype=dtype), k=20)


def test_more_nans_than_k() -> None:
    weight = torch.ones(400, 2)
    weight[100:300] = NAN
    result = check_top_k(torch.ones(3, 2), weight, k=7)
    assert result.indices[0].tolist() == list(range(100, 107))


def test_scores_of_minus_infinity_are_candidates() -> None:
    bias = torch.full((70,), -INF)
    result = check_top_k(integers(3, 4), integers(70, 4), bias, k=33, exclude=[[0, 2], [], range(60)])
    assert result.indices[0, :3].tolist() == [1, 3, 4]
    assert result.indices[2].tolist() == [*range(60, 70), *[-1] * 23]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_overflow_of_the_output_dtype_keeps_the_order_of_the_scores() -> None:
    x = torch.tensor([[300.0, 0.0]], dtype=torch.float16)
    weight = torch.tensor([[299.0, 0], [400, 0], [-500, 0], [300, 0], [1, 0]], dtype=torch.float16)
    result = device.linear_topk(x, weight, k=5)
    assert result.indices.tolist() == [[1, 3, 0, 4, 2]]
    assert result.values.tolist() == [[INF, INF, INF, 300.0, -INF]]


@pytest.mark.parametrize("n", [70, 400])
def test_exclude(n: int) -> None:
    rows, k = 9, 17
    lists: list[list[int]] = [
        [(7 * i) % n for i in range(20 * r)] for r in range(rows)
    ]  # with repeats, the first empty
    lists[4], lists[8] = list(range(n)), list(range(n - 1, 5, -1))
    result = check_top_k(integers(rows, 4), integers(n, 4, seed=7), k=k, exclude=lists)
    assert result.indices[4].tolist() == [-1] * k
    assert result.values[8, 6:].eq(-INF).all()


def test_excluded_ids_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"exclude: expected ids from 0 to 39"):
        device.linear_topk(torch.ones(2, 3), torch.ones(40, 3), k=2, exclude=[[], [40]])


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 0, 3)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    result = check_top_k(integers(*shape, 6), integers(50, 6, seed=9), k=15)
    assert result.values.shape == (*shape, 15)


def test_k_above_the_kernels_limit() -> None:
    with pytest.raises(ValueError, match="k: the Triton kernels select up to 512 features, got 513"):
        device.linear_topk(torch.ones(2, 3), torch.ones(600, 3), k=513)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts_give_the_same_bits(layout: str) -> None:
    inputs = make_inputs(Case(17, 257, 33, 5))
    plain = device.linear_topk(*inputs[:3], k=33)
    moved = device.linear_topk(*in_layout(inputs, layout)[:3], k=33)
    assert_same_bits(moved.values, plain.values)
    assert_same_bits(moved.indices, plain.indices)


def test_bits_do_not_depend_on_the_batch() -> None:
    x, weight, bias = make_inputs(Case(33, 500, 17, 70))[:3]
    whole = device.linear_topk(x, weight, bias, k=17)
    for rows in (slice(0, 1), slice(60, 70)):
        part = device.linear_topk(x[rows], weight, bias, k=17)
        assert_same_bits(part.values, whole.values[rows])
        assert_same_bits(part.indices, whole.indices[rows])
