from __future__ import annotations

import pytest
import torch
from cases import DTYPES, KERNEL_CASES, Case, make_inputs
from helpers import (
    EPS32,
    LAYOUTS,
    assert_equal,
    assert_no_worse,
    assert_same_bits,
    assert_top_k,
    in_layout,
    score_tolerance,
    torch_threads,
)
from hypothesis import given
from hypothesis import strategies as st

import saerec_fast as fast
from saerec_fast import _C, reference

pytestmark = pytest.mark.usefixtures("isa")

INF, NAN = float("inf"), float("nan")


def integers(
    *shape: int, low: int = -4, high: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def exact(x, weight, bias=None, *, k, exclude=None) -> fast.TopKResult:
    """The reference in float64, for data on which float32 sums are exact."""
    if exclude is not None and not isinstance(exclude, fast.Ragged):
        exclude = fast.Ragged.from_lists(exclude)
    bias = None if bias is None else bias.double()
    result = reference.linear_topk(x.double(), weight.double(), bias, k=k, exclude=exclude)
    return fast.TopKResult(result.values.to(x.dtype), result.indices)


def check_exact(x, weight, bias=None, *, k, exclude=None) -> fast.TopKResult:
    result = fast.linear_topk(x, weight, bias, k=k, exclude=exclude, backend="cpu")
    expected = exact(x, weight, bias, k=k, exclude=exclude)
    assert_equal(result.indices, expected.indices)
    assert_equal(result.values, expected.values)
    return result


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_returns_a_true_top_k(case: Case) -> None:
    inputs = make_inputs(case)
    x, weight, bias = inputs[:3]
    result = fast.linear_topk(x, weight, bias, k=case.k, backend="cpu")
    assert result.values.shape == result.indices.shape == (case.rows, case.k)
    assert result.indices.dtype == torch.int64
    if case.rows == 0:
        return
    scores = x.double() @ weight.double().T + bias.double()
    tolerance = (case.d + 2) * EPS32 * (x.double().abs() @ weight.double().abs().T + bias.double().abs())
    assert_top_k(result, scores, tolerance, case.dtype)
    plain = reference.linear_topk(x, weight, bias, k=case.k)
    # Values against the scores of the features that were chosen: at near ties both choices are right.
    errors = result.values - scores.gather(1, result.indices)
    plain_errors = plain.values - scores.gather(1, plain.indices)
    floor = torch.finfo(case.dtype).eps * float(scores.abs().max())
    assert errors.abs().max() <= 2 * plain_errors.abs().max() + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "n", "k", "rows"), [(3, 1, 1, 2), (7, 100, 33, 9), (16, 333, 129, 5), (9, 65, 65, 3)])
def test_equals_the_reference_on_integers(d: int, n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    # Few distinct scores: most of the selection is decided by the tie rule.
    x, weight, bias = integers(rows, d, dtype=dtype), integers(n, d, low=-1, high=1, seed=1, dtype=dtype), None
    check_exact(x, weight, bias, k=k)
    check_exact(x, weight, integers(n, seed=2, dtype=dtype), k=k)


@pytest.mark.parametrize("k", [1, 16, 31, 128, 129, 500])
def test_ties_go_to_the_smallest_index(k: int) -> None:
    x, weight = torch.ones(5, 8), torch.ones(500, 8)
    result = check_exact(x, weight, k=k)
    assert_equal(result.indices, torch.arange(k).expand(5, k))


def test_later_better_scores_displace_earlier_ones() -> None:
    # Ascending scores cut the candidates back as often as can be.
    n, k = 3000, 17
    weight = torch.arange(n, dtype=torch.float32).reshape(n, 1)
    result = check_exact(torch.tensor([[1.0], [-1.0], [0.0]]), weight, k=k)
    assert_equal(result.indices[0], torch.arange(n - 1, n - 1 - k, -1))


def test_signed_zeros_tie() -> None:
    weight = torch.tensor([[-0.0], [0.0], [-0.0], [1.0], [0.0]])
    result = check_exact(torch.tensor([[1.0], [-1.0]]), weight, torch.tensor([-0.0, -0.0, 0.0, 0.0, -0.0]), k=5)
    assert result.indices.tolist() == [[3, 0, 1, 2, 4], [0, 1, 2, 4, 3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_rows(dtype: torch.dtype) -> None:
    x = integers(40, 6, dtype=dtype)
    for row, values in enumerate([(NAN, 0), (INF, 1), (-INF, 2), (INF, -INF), (NAN, NAN), (0, 0)]):
        x[3 * row, :2] = torch.tensor(values, dtype=dtype)
    weight = integers(150, 6, seed=3, dtype=dtype)
    for k in (1, 40, 150):
        check_exact(x, weight, k=k)
    weight[[0, 77, 149], [1, 2, 3]] = torch.tensor([INF, NAN, -INF], dtype=dtype)
    check_exact(x, weight, integers(150, seed=4, dtype=dtype), k=20)


def test_more_nans_than_k() -> None:
    weight = torch.ones(400, 2)
    weight[100:300] = NAN
    result = check_exact(torch.ones(3, 2), weight, k=7)
    assert result.indices[0].tolist() == list(range(100, 107))
    assert result.values.isnan().all()


def test_scores_of_minus_infinity_are_candidates() -> None:
    bias = torch.full((70,), -INF)
    result = check_exact(integers(3, 4), integers(70, 4), bias, k=33, exclude=[[0, 2], [], range(60)])
    assert result.indices[0, :3].tolist() == [1, 3, 4]
    assert result.indices[2].tolist() == [*range(60, 70), *[-1] * 23]


def test_overflow_to_infinity_ties() -> None:
    # One product a score: what a sum of several overflowing ones gives depends on whether they are fused.
    x = integers(4, 1) * 2.0**100
    weight = integers(90, 1, seed=5) * 2.0**60
    result = fast.linear_topk(x, weight, k=40, backend="cpu")
    expected = reference.linear_topk(x, weight, k=40)
    assert expected.values.isinf().any()
    assert_equal(result.indices, expected.indices)
    assert_equal(result.values, expected.values)


def test_overflow_of_the_output_dtype_keeps_the_order_of_the_scores() -> None:
    x = torch.tensor([[300.0, 0.0]], dtype=torch.float16)
    weight = torch.tensor([[299.0, 0], [400, 0], [-500, 0], [300, 0], [1, 0]], dtype=torch.float16)
    result = fast.linear_topk(x, weight, k=5, backend="cpu")
    assert result.indices.tolist() == [[1, 3, 0, 4, 2]]
    assert result.values.tolist() == [[INF, INF, INF, 300.0, -INF]]


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-60, 2.0**60], ids=["subnormal", "tiny", "huge"])
def test_scales(scale: float) -> None:
    x, weight = integers(9, 5), integers(200, 5, seed=6) * scale
    result = check_exact(x, weight, k=31)
    assert result.values.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_subnormal_halves(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    x = torch.tensor([[1.0], [-3.0]], dtype=dtype)
    weight = (torch.arange(-40, 41, dtype=torch.float64) * smallest).to(dtype).reshape(-1, 1)
    assert weight.unique().numel() == 81
    check_exact(x, weight, k=81)


@pytest.mark.parametrize("rows", [1, 300])
def test_exclude(rows: int) -> None:
    n, d, k = 70, 4, 17
    x, weight = integers(rows, d), integers(n, d, seed=7)
    generator = torch.Generator().manual_seed(8)
    lists: list[list[int]] = [
        torch.randint(0, n, (r % 61,), generator=generator).tolist() for r in range(rows)
    ]  # unsorted, with repeats, the first empty
    lists[rows // 2] = list(range(n))
    lists[-1] = list(range(n - 1, 5, -1))
    result = check_exact(x, weight, k=k, exclude=lists)
    for row, seen in enumerate(lists):
        assert not set(result.indices[row].tolist()) & set(seen)
    assert_equal(fast.linear_topk(x, weight, k=k, exclude=fast.Ragged.from_lists(lists)).indices, result.indices)


def test_excluding_everything_leaves_padding() -> None:
    result = fast.linear_topk(torch.ones(2, 3), torch.ones(40, 3), k=40, exclude=[range(40), []], backend="cpu")
    assert result.indices[0].tolist() == [-1] * 40
    assert (result.values[0] == -INF).all()
    assert result.indices[1].tolist() == list(range(40))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [[-1], [40], [3, 99, 5]])
def test_excluded_ids_out_of_range(bad: list[int], backend: str) -> None:
    with pytest.raises(ValueError, match=r"exclude: expected ids from 0 to 39"):
        fast.linear_topk(torch.ones(2, 3), torch.ones(40, 3), k=2, exclude=[[], bad], backend=backend)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 0, 3), (1, 1, 4)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    x, weight = integers(*shape, 6), integers(50, 6, seed=9)
    result = check_exact(x, weight, k=15)
    assert result.values.shape == (*shape, 15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts_give_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(17, 257, 33, 13, dtype))
    plain = fast.linear_topk(*inputs[:3], k=33, backend="cpu")
    moved = fast.linear_topk(*in_layout(inputs, layout)[:3], k=33, backend="cpu")
    assert_same_bits(moved.values, plain.values)
    assert_same_bits(moved.indices, plain.indices)


def test_expanded_inputs() -> None:
    x, weight, bias = integers(1, 1).expand(9, 12), integers(1, 12, seed=1).expand(65, 12), torch.ones(1).expand(65)
    check_exact(x, weight, bias, k=16)
    check_exact(integers(4, 1, 12).expand(4, 3, 12), integers(65, 1).expand(65, 12), k=16)


@pytest.mark.parametrize("rows", [1, 2, 9, 65])
def test_features_split_over_threads(rows: int) -> None:
    # Few rows against many features: threads share the dictionary, and their parts must merge by the same order.
    x, weight = integers(rows, 64, low=-1, high=1), integers(20_001, 64, low=-1, high=1, seed=1)
    lists = [range(r, 20_001, 3) for r in range(rows)]
    results = []
    for threads in (1, 2, 3, 5):
        with torch_threads(threads):
            results.append(fast.linear_topk(x, weight, k=129, backend="cpu"))
            results.append(fast.linear_topk(x, weight, k=129, exclude=lists, backend="cpu"))
    expected = exact(x, weight, k=129), exact(x, weight, k=129, exclude=lists)
    for i, result in enumerate(results):
        assert_equal(result.indices, expected[i % 2].indices)
        assert_equal(result.values, expected[i % 2].values)


def test_one_threads_part_holds_all_of_the_top_k() -> None:
    # 20001 features, each on its own level, in ascending and in descending order.
    weight = torch.zeros(20_001, 64)
    weight[:, 0] = torch.arange(20_001)
    x = torch.zeros(2, 64)
    x[0, 0], x[1, 0] = 1, -1
    for threads in (2, 3, 5):
        with torch_threads(threads):
            check_exact(x, weight, k=300)


def test_k_larger_than_a_threads_part() -> None:
    x, weight = integers(1, 64), integers(2100, 64, seed=1)
    with torch_threads(5):
        check_exact(x, weight, k=2000)


@pytest.mark.parametrize("distribution", ["normal", "log_normal", "cauchy"])
def test_heavy_tails(distribution: str) -> None:
    inputs = make_inputs(Case(64, 500, 32, 20))
    x, weight = inputs.x, inputs.W_enc
    if distribution == "log_normal":
        x, weight = x.sign() * (3 * x).exp(), weight.sign() * (3 * weight).exp()
    elif distribution == "cauchy":
        x = x / torch.roll(x, 1, 0)
    no_bias = torch.zeros_like(inputs.b_enc)
    inputs = inputs._replace(x=x, W_enc=weight, b_enc=no_bias, b_dec=torch.zeros_like(inputs.b_dec))
    result = fast.linear_topk(x, weight, k=32, backend="cpu")
    assert_top_k(result, x.double() @ weight.double().T, score_tolerance(inputs), torch.float32)


@st.composite
def problems(draw):
    d, n, rows = draw(st.integers(1, 9)), draw(st.integers(1, 80)), draw(st.integers(0, 11))
    dtype = draw(st.sampled_from(DTYPES))
    seed, spread = draw(st.integers(0, 10**6)), draw(st.integers(0, 3))
    x, weight = (
        integers(size, d, low=-spread, high=spread, seed=seed + i, dtype=dtype) for i, size in enumerate([rows, n])
    )
    bias = integers(n, low=-spread, high=spread, seed=seed + 2, dtype=dtype) if draw(st.booleans()) else None
    for tensor in (x, weight):
        for value in draw(st.lists(st.sampled_from([NAN, INF, -INF, -0.0]), max_size=2)):
            if tensor.numel():
                tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
    exclude = None
    if draw(st.booleans()):
        ids = st.lists(st.integers(0, n - 1), max_size=2 * n)
        exclude = draw(st.lists(ids, min_size=rows, max_size=rows))
    return x, weight, bias, draw(st.integers(1, n)), exclude


@given(problems())
def test_any_integers_equal_the_reference(problem) -> None:
    x, weight, bias, k, exclude = problem
    check_exact(x, weight, bias, k=k, exclude=exclude)


def test_tiers_agree_within_rounding() -> None:
    inputs = make_inputs(Case(129, 400, 31, 50))
    result = fast.linear_topk(*inputs[:3], k=31, backend="cpu")
    active = _C.active_isa()
    _C.set_isa("scalar")
    scalar = fast.linear_topk(*inputs[:3], k=31, backend="cpu")
    _C.set_isa(active)
    no_shift = inputs._replace(b_dec=torch.zeros_like(inputs.b_dec))
    # The i-th largest of two sets of scores differs by no more than the scores do.
    slack = 2 * score_tolerance(no_shift).amax(-1, keepdim=True)
    assert ((result.values - scalar.values).abs() <= slack).all()


@pytest.mark.parametrize("d", [512, 1000, 4096])
def test_wide_states_lose_no_more_than_a_matmul(d: int) -> None:
    """All features selected, so that every score is compared, not only those that survive."""
    inputs = make_inputs(Case(d=d, n=100, k=100, rows=130))
    plain = inputs.x @ inputs.W_enc.T + inputs.b_enc
    truth = inputs.x.double() @ inputs.W_enc.double().T + inputs.b_enc.double()
    result = fast.linear_topk(inputs.x, inputs.W_enc, inputs.b_enc, k=100, backend="cpu")
    scores = torch.empty_like(plain).scatter_(1, result.indices, result.values)
    assert_no_worse(scores, plain, truth, 2.0)
