"""Screening leaves scores out, never changes one: large dictionaries, data that is hard for it, every way into it.

A batch is screened with packed weights, or, from 16 rows on, with ones packed on the fly; a few rows without packed
weights are not. All must give the same bits, which float64 then judges.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, Case, Inputs, integer_inputs, make_inputs
from helpers import (
    EPS32,
    assert_equal,
    assert_same_bits,
    assert_same_features,
    assert_top_k,
    rounding,
    score_tolerance,
    torch_threads,
    truth_scores,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saerec_fast as fast
from saerec_fast import reference

pytestmark = pytest.mark.usefixtures("isa")

INF, NAN = float("inf"), float("nan")
ROWS = 19  # packed on the fly, and not a multiple of any tile of rows

# (d, n): one feature range or several, the last one ragged; widths on both sides of vectors and of groups of four.
SIZES = [
    (1, 2500),
    (2, 4129),
    (3, 300),
    (5, 2081),
    (15, 2049),
    (16, 4096),
    (17, 260),
    (63, 1000),
    (64, 4200),
    (65, 777),
    (129, 4127),
    (300, 1800),
    (512, 3100),  # enough ranges for some not to raise the bound
]
KS = (1, 2, 17, 64, 129, 512)


def _outlier_dimension(t: Tensor) -> Tensor:
    t[..., -1] *= 1e4
    return t


def _mixed_rows(t: Tensor) -> Tensor:
    """Zeros, a constant, -0.0, a unit vector, tiny and huge rows beside ordinary ones."""
    t[0], t[1], t[2] = 0, 0.37, -0.0
    t[3], t[3, 0] = 0, 1
    t[4] *= 1e-30
    t[5] *= 1e12
    t[6] = t[6].abs()
    t[7] = t[7] * 1e-40
    return t


def _uneven_norms(t: Tensor) -> Tensor:
    return t * torch.logspace(-3, 3, len(t))[torch.randperm(len(t))].unsqueeze(-1)


def _duplicates(t: Tensor) -> Tensor:
    return t[torch.randint(0, max(len(t) // 7, 1), (len(t),))]


HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "mixed": _mixed_rows,
    "outlier_dimension": _outlier_dimension,
    "levels": lambda t: t.sign(),
    "heavy_tails": lambda t: t.sign() * (3 * t).exp(),
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "mixed": _mixed_rows,
    "uneven_norms": _uneven_norms,
    "duplicates": _duplicates,
    "identical": lambda t: t[:1].expand_as(t).contiguous(),
    "zero": torch.zeros_like,
    "outlier_dimension": _outlier_dimension,
    "one_negative": lambda t: -t.abs(),
}
BIASES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda t: None,
    "plain": lambda t: t,
    "huge": lambda t: t * 1e6,
    "one_huge": lambda t: t.index_fill(0, torch.tensor([len(t) // 2]), 1e6),
    "tiny": lambda t: t * 1e-30,
    "all_huge_and_close": lambda t: 1e6 + t,
    "negative": lambda t: -1e6 - t.abs(),
}
SCALES = (1e-30, 1e-18, 1e-6, 1.0, 1e6, 1e18, 1e30)


@st.composite
def hard_problems(draw):
    d, n = draw(st.sampled_from(SIZES))
    k = draw(st.sampled_from([k for k in KS if 8 * k <= n]))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    inputs = make_inputs(Case(d, n, k, ROWS), seed=draw(st.integers(0, 10**6)))
    x = HIDDEN[draw(st.sampled_from(list(HIDDEN)))](inputs.x)
    weight = WEIGHTS[draw(st.sampled_from(list(WEIGHTS)))](inputs.W_enc)
    bias = BIASES[draw(st.sampled_from(list(BIASES)))](inputs.b_enc)
    if draw(st.booleans()):
        scale = draw(st.sampled_from(SCALES))
        x, weight = x * scale, weight * min(draw(st.sampled_from(SCALES)), 1e6 / scale)
        # Overflow is not a matter of screening.
        x, weight = x.clamp(-1e30, 1e30), weight.clamp(-1e30, 1e30)
    shift = inputs.b_dec * float(x.abs().median()) if draw(st.booleans()) else torch.zeros(d)
    return Inputs(x, weight, bias, shift, inputs.W_dec), k


def encoder(t: Inputs) -> tuple:
    return t[:4]


def dense_bias(t: Inputs) -> Inputs:
    return t if t.b_enc is not None else t._replace(b_enc=torch.zeros(len(t.W_enc)))


def assert_smallest_index_first(indices: Tensor, t: Inputs) -> None:
    """Of features with one and the same weights and bias the first ones are chosen, in ascending order."""
    rows = torch.cat([t.W_enc, dense_bias(t).b_enc.unsqueeze(-1)], 1) + 0.0
    group = rows.unique(dim=0, return_inverse=True)[1]
    order = group.argsort(stable=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), group.bincount().cumsum(0)[:-1]])
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group)) - starts[group[order]]
    chosen = group[indices]
    earlier = (chosen.unsqueeze(-1) == chosen.unsqueeze(-2)).tril(-1).sum(-1)
    assert_equal(earlier, rank[indices])


def one_by_one(op: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    """An op on single rows, which are not screened without packed weights."""
    return tuple(map(torch.cat, zip(*(op(x[r : r + 1]) for r in range(len(x))), strict=True)))


def threshold_entries(x: Tensor, t: Inputs, threshold, **options) -> tuple[Tensor, ...]:
    features = fast.encode_threshold(x, *t[1:4], threshold, backend="cpu", **options)
    return features.offsets.diff(), features.indices, features.values


@given(hard_problems())
@settings(max_examples=60, derandomize=True)
def test_top_k_of_hard_data(problem) -> None:
    t, k = problem
    packed = fast.pack_weights(t.W_enc, t.b_enc)
    centred = t.x - t.b_dec
    result = fast.linear_topk(centred, t.W_enc, t.b_enc, k=k, backend="cpu")
    alone = one_by_one(lambda x: fast.linear_topk(x, t.W_enc, t.b_enc, k=k, backend="cpu"), centred)
    with_packed = fast.linear_topk(centred, t.W_enc, t.b_enc, k=k, packed=packed, backend="cpu")
    features = fast.encode_topk(*encoder(t), k=k, packed=packed, backend="cpu")
    for values, indices in (alone, with_packed):
        assert_same_bits(values, result.values)
        assert_same_bits(indices, result.indices)
    assert_same_bits(features.indices.view(-1, k), result.indices.int())
    assert_same_bits(features.values.view(-1, k), result.values.clamp(min=0))
    whole = dense_bias(t)._replace(x=centred, b_dec=torch.zeros_like(t.b_dec))
    assert_top_k(result, truth_scores(whole), score_tolerance(whole), torch.float32)
    assert_smallest_index_first(result.indices, t)


@pytest.mark.parametrize("n", [2000, 4000])
@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0])
def test_many_candidates_in_one_range_or_two(n: int, spread: float) -> None:
    """Scores so close that the screen leaves few to hundreds of candidates, in a dictionary of one range or of two."""
    torch.manual_seed(0)
    d, k = 64, 32
    weight = torch.randn(d) + spread * torch.randn(n, d)
    x = torch.randn(ROWS, d) * torch.logspace(-3, 3, ROWS).unsqueeze(-1)
    bias = torch.zeros(n)
    result = fast.linear_topk(x, weight, bias, k=k, packed=fast.pack_weights(weight, bias), backend="cpu")
    values, indices = one_by_one(lambda row: fast.linear_topk(row, weight, bias, k=k, backend="cpu"), x)
    assert_same_bits(result.values, values)
    assert_same_bits(result.indices, indices)


@given(hard_problems(), st.sampled_from(["zero", "median", "largest", "per_feature", "negative"]))
@settings(max_examples=60, derandomize=True)
def test_thresholds_on_hard_data(problem, kind: str) -> None:
    t, _ = problem
    whole = dense_bias(t)
    scores, slack = truth_scores(whole), score_tolerance(whole)
    threshold = {
        "zero": 0.0,
        "median": float(scores.median()),
        "largest": float(scores.max()),
        "negative": -float(scores.abs().median()),
        # Of one row: each of its scores lies on its threshold.
        "per_feature": reference.pre_activations(*encoder(whole))[11],
    }[kind]
    counts, indices, values = threshold_entries(t.x, t, threshold)
    for other in (
        one_by_one(lambda x: threshold_entries(x, t, threshold), t.x),
        threshold_entries(t.x, t, threshold, packed=fast.pack_weights(t.W_enc, t.b_enc)),
    ):
        for tensor, expected in zip(other, (counts, indices, values), strict=True):
            assert_same_bits(tensor, expected)
    active = torch.zeros_like(scores, dtype=torch.bool)
    active[torch.arange(ROWS).repeat_interleave(counts), indices.long()] = True
    above = scores - torch.as_tensor(threshold, dtype=torch.float32)
    assert active[above > slack].all()
    assert not active[above < -slack].any()
    assert ((values - scores[active]).abs() <= slack[active] + rounding(scores[active], torch.float32)).all()


@given(hard_problems(), st.sampled_from(["topk", "relu", "jumprelu"]))
@settings(max_examples=40, derandomize=True)
def test_reconstruct_hard_data(problem, kind: str) -> None:
    t, k = problem
    packed = fast.pack_weights(t.W_enc, t.b_enc)
    if kind == "topk":
        activation: fast.types.Activation = fast.TopK(k)
        features = fast.encode_topk(*encoder(t), k=k, packed=packed, backend="cpu")
    else:
        bound = 0.0 if kind == "relu" else abs(float(truth_scores(dense_bias(t)).median()))
        activation = fast.JumpReLU(bound)
        features = fast.encode_threshold(*encoder(t), bound, packed=packed, backend="cpu")
    result = fast.reconstruct(*t, activation, backend="cpu")
    (alone,) = one_by_one(lambda x: (fast.reconstruct(x, *t[1:], activation, backend="cpu"),), t.x)
    assert_same_bits(alone, result)
    assert_same_bits(fast.reconstruct(*t, activation, packed=packed, backend="cpu"), result)
    # The features are judged above; this is the sum over them.
    exact = features._replace(values=features.values.double())
    truth = reference.decode_sparse(exact, t.W_dec.double(), t.b_dec.double())
    active = int(features.offsets.diff().max())
    magnitude = exact.dense().abs() @ t.W_dec.double().abs() + t.b_dec.double().abs()
    bound = (active + 3) * EPS32 * magnitude + torch.finfo(torch.float32).tiny
    assert ((result - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "n", "k"), [(3, 2500, 129), (64, 4129, 17), (130, 4200, 512), (512, 1100, 64)])
def test_equals_the_reference_on_integers(d: int, n: int, k: int, dtype: torch.dtype) -> None:
    # A handful of distinct scores: ties decide, within a range and between ranges.
    t = integer_inputs(Case(d, n, k, ROWS, dtype), largest=1)
    exact = t.to(torch.float64)
    for rows in (ROWS, 3):
        args, truth = (t.x[:rows], *t[1:4]), (exact.x[:rows], *exact[1:4])
        packed = fast.pack_weights(t.W_enc, t.b_enc)
        features = fast.encode_topk(*args, k=k, packed=packed, backend="cpu")
        assert_same_features(features, reference.encode_topk(*truth, k=k))
        for threshold in (0.0, 2.0, -1.0, torch.arange(n) % 7 - 3.0):
            features = fast.encode_threshold(*args, threshold, packed=packed, backend="cpu")
            assert_same_features(features, reference.encode_threshold(*truth, threshold))


@pytest.mark.parametrize("k", [1, 17, 250])
@pytest.mark.parametrize("weights", ["finite", "not_finite"])
def test_rows_and_weights_that_are_not_finite(weights: str, k: int) -> None:
    t = integer_inputs(Case(20, 2300, 1, 40), largest=1)
    for row, values in enumerate([(NAN, 0), (INF, 1), (-INF, 2), (INF, -INF), (NAN, NAN), (0, 0), (1e38, 1)]):
        t.x[3 * row, :2] = torch.tensor(values)
    packed = None
    if weights == "finite":
        packed = fast.pack_weights(t.W_enc, t.b_enc)
    else:
        t.W_enc[[0, 777, 2299], [1, 2, 3]] = torch.tensor([INF, NAN, -INF])
        t.b_enc[[5, 6, 2200]] = torch.tensor([INF, NAN, -INF])
    t = t._replace(b_dec=torch.zeros(20))
    exact = t.to(torch.float64)
    t.x[18], exact.x[18] = 0, 0  # 1e38 is there to pass between the others, its sums depend on their order
    top = fast.encode_topk(*encoder(t), k=k, packed=packed, backend="cpu")
    assert_same_features(top, reference.encode_topk(*encoder(exact), k=k))
    for threshold in (0.0, 3.0, INF, -INF, NAN):
        features = fast.encode_threshold(*encoder(t), threshold, packed=packed, backend="cpu")
        assert_same_features(features, reference.encode_threshold(*encoder(exact), threshold))


def test_weights_too_large_to_be_screened() -> None:
    t = integer_inputs(Case(5, 600, 1, ROWS), largest=1)
    for weight, bias in ((t.W_enc * 2.0**70, None), (t.W_enc, t.b_enc * 2.0**70)):
        packed = fast.pack_weights(weight, bias)
        result = fast.linear_topk(t.x, weight, bias, k=17, packed=packed, backend="cpu")
        double_bias = None if bias is None else bias.double()
        expected = reference.linear_topk(t.x.double(), weight.double(), double_bias, k=17)
        assert_equal(result.indices, expected.indices)


@pytest.mark.parametrize("k", [2048, 2049, 2100, 3000])
def test_more_features_selected_than_groups_of_scores(k: int) -> None:
    # The first range of features beats all others, so that the rest of the k come from far below.
    t = integer_inputs(Case(2, 8 * k, k, ROWS), largest=1)
    t.W_enc[:, 0], t.W_enc[:2048, 0], t.x[:, 0] = -8, 8, 2
    for packed in (None, fast.pack_weights(t.W_enc)):
        result = fast.linear_topk(t.x, t.W_enc, k=k, packed=packed, backend="cpu")
        expected = reference.linear_topk(t.x.double(), t.W_enc.double(), k=k)
        assert_equal(result.indices, expected.indices)
        assert_equal(result.values, expected.values.float())


@pytest.mark.parametrize("deceptive", ["first_range", "everywhere"])
@pytest.mark.parametrize("reverse", [False, True])
def test_errors_of_the_screen_that_all_add_up(reverse: bool, deceptive: str) -> None:
    # Bytes round all but the first dimension of x to 0. Most features are made of just these: their scores look far
    # better than they are, and hide a few short weights, whose bounds are tight, in another range.
    n, d, k = 4500, 64, 5
    x = torch.full((ROWS, d), 0.49 / 127)
    x[:, 0] = 1
    weight = torch.full((n, d), -1.0)
    weight[:, 0] = 0
    if deceptive == "first_range":
        weight[2048:] = 0
        weight[2048:, 0] = -20 / 127
    good = torch.arange(3000, 3000 + 3 * k, 3)
    weight[good] = 0
    weight[good, 0] = -10 / 127
    if reverse:
        weight = weight.flip(0)
    expected = reference.linear_topk(x.double(), weight.double(), k=k)
    for packed in (None, fast.pack_weights(weight)):
        assert_equal(fast.linear_topk(x, weight, k=k, packed=packed, backend="cpu").indices, expected.indices)


@pytest.mark.parametrize("order", ["ascending", "descending", "alternating"])
def test_one_feature_per_level(order: str) -> None:
    # Every later feature displaces one, or none does; neighbours are closer than the screen can tell.
    n, k = 6000, 129
    levels = torch.arange(n, dtype=torch.float32) + 1e5
    if order == "descending":
        levels = levels.flip(0)
    elif order == "alternating":
        levels[::2] = -levels[::2]
    weight = torch.zeros(n, 64)
    weight[:, 5] = levels
    x = torch.zeros(ROWS, 64)
    x[::2, 5], x[1::2, 5] = 1, -1
    result = fast.linear_topk(x, weight, k=k, backend="cpu")
    expected = reference.linear_topk(x.double(), weight.double(), k=k)
    assert_equal(result.indices, expected.indices)
    assert_equal(result.values, expected.values.float())


def exclude_lists(n: int, rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lists = [
        torch.randint(0, n, (97 * r,), generator=generator).tolist() for r in range(rows)
    ]  # unsorted, the first empty
    lists[1] = [0, n - 1, 0, n - 1]
    lists[2] = list(range(n))
    lists[3] = list(range(n - 5))
    lists[4] = list(range(0, n, 2)) * 2
    lists[5] = list(range(2000, 2100))  # on both sides of a range's end
    lists[6] = []
    return lists


@pytest.mark.parametrize("d", [16, 300])
@pytest.mark.parametrize("k", [1, 64, 500])
def test_excluded_features_of_several_ranges(k: int, d: int) -> None:
    n, rows = 5000, ROWS
    t = integer_inputs(Case(d, n, 1, rows), largest=1)
    t.x[7] = NAN
    lists = exclude_lists(n, rows)
    # Each row's best ones are excluded too.
    best = fast.linear_topk(t.x, t.W_enc, t.b_enc, k=k).indices
    for row in range(8, rows):
        lists[row] += best[row].tolist()
    exact = t.to(torch.float64)
    ragged = fast.Ragged.from_lists(lists)
    expected = reference.linear_topk(exact.x, exact.W_enc, exact.b_enc, k=k, exclude=ragged)
    packed = fast.pack_weights(t.W_enc, t.b_enc)
    for options in ({}, {"packed": packed}):
        for threads in (1, 4):
            with torch_threads(threads):
                result = fast.linear_topk(t.x, t.W_enc, t.b_enc, k=k, exclude=lists, backend="cpu", **options)
            assert_equal(result.indices, expected.indices)
            assert_equal(result.values, expected.values.float())
    for row in range(6):
        single = fast.linear_topk(t.x[row], t.W_enc, t.b_enc, k=k, exclude=[lists[row]], packed=packed, backend="cpu")
        assert_equal(single.indices, expected.indices[row])


def test_excluding_the_only_good_features() -> None:
    # What is left lies far below what was left out, and all of it is close together.
    x, weight = torch.ones(ROWS, 8), torch.full((5000, 8), 1e-3)
    weight[1000:1600] = 1e3
    weight[:, 0] += torch.arange(5000) * 1e-6
    result = fast.linear_topk(x, weight, k=64, exclude=[range(1000, 1600)] * ROWS, backend="cpu")
    exact = reference.linear_topk(
        x[:1].double(), weight.double(), k=64, exclude=fast.Ragged.from_lists([range(1000, 1600)])
    )
    assert_equal(result.values, result.values[:1].expand(ROWS, -1))
    torch.testing.assert_close(result.values[:1].double(), exact.values, rtol=1e-6, atol=0)


CASE = Case(65, 2500, 33, 140)


def forward_ops(k: int) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Ops that screen, as functions of the inputs and ``packed``; what they return is aligned with the rows."""
    edits = [fast.Edit(0, "set", 1.5), fast.Edit(7, "scale", 0.5), fast.Edit(2400, "clamp_min", 0.25)]

    def steered(activation: fast.types.Activation, mode: str) -> Callable[..., tuple[Tensor, ...]]:
        plan = fast.SteeringPlan(edits, mode=mode)
        return lambda t, **o: (fast.steer(*t, activation, plan, backend="cpu", **o),)

    def encode_topk(t: Inputs, **options) -> tuple[Tensor, ...]:
        features = fast.encode_topk(*t[:4], k=k, backend="cpu", **options)
        return features.values.view(-1, k), features.indices.view(-1, k)

    def encode_threshold(t: Inputs, **options) -> tuple[Tensor, ...]:
        features = fast.encode_threshold(*t[:4], 0.3, backend="cpu", **options)
        return features.dense(), features.offsets.diff()

    return {
        "linear_topk": lambda t, **o: tuple(fast.linear_topk(*t[:3], k=k, backend="cpu", **o)),
        "encode_topk": encode_topk,
        "encode_threshold": encode_threshold,
        "reconstruct_topk": lambda t, **o: (fast.reconstruct(*t, fast.TopK(k), backend="cpu", **o),),
        "reconstruct_relu": lambda t, **o: (fast.reconstruct(*t, fast.ReLU(), backend="cpu", **o),),
        "steer_delta_topk": steered(fast.TopK(k), "delta"),
        "steer_reconstruct_topk": steered(fast.TopK(k), "reconstruct"),
        "steer_reconstruct_jumprelu": steered(fast.JumpReLU(0.3), "reconstruct"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", forward_ops(33))
def test_packing_batch_and_threads_do_not_change_bits(name: str, dtype: torch.dtype) -> None:
    op = forward_ops(33)[name]
    t = make_inputs(Case(CASE.d, CASE.n, CASE.k, CASE.rows, dtype))
    packed = fast.pack_weights(t.W_enc, t.b_enc)
    expected = op(t)

    def check(actual: tuple[Tensor, ...], rows: slice) -> None:
        for tensor, whole in zip(actual, expected, strict=True):
            assert_same_bits(tensor, whole[rows])

    check(op(t, packed=packed), slice(None))
    for rows in (slice(0, 1), slice(3, 4), slice(129, 140), slice(5, 21), slice(10, 139)):
        part = t._replace(x=t.x[rows])
        check(op(part), rows)
        check(op(part, packed=packed), rows)
    for threads in (2, 4):
        with torch_threads(threads):
            check(op(t), slice(None))
            check(op(t, packed=fast.pack_weights(t.W_enc, t.b_enc)), slice(None))
            for rows in (slice(3, 4), slice(5, 21)):
                check(op(t._replace(x=t.x[rows]), packed=packed), rows)


@pytest.mark.parametrize("name", forward_ops(33))
def test_a_row_does_not_see_the_others(name: str) -> None:
    # The bound of a row starts from a guess of where the one before it lay.
    op, t = forward_ops(33)[name], make_inputs(CASE)
    strange = t.x.clone()
    strange[::2] = 0
    strange[2::4] = 1e20
    strange[4::8] = NAN
    for tensor, expected in zip(op(t._replace(x=strange)), op(t), strict=True):
        assert_same_bits(tensor[1::2], expected[1::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 15, 16, 130])
def test_encode_features_has_the_bits_of_encode_threshold(rows: int, dtype: torch.dtype) -> None:
    t = make_inputs(Case(300, 700, 1, rows, dtype))
    if rows > 2:
        t.x[1], t.x[2] = 0, NAN
    chosen = torch.randperm(700)[:133].repeat(2)
    thresholds = (0.0, -0.2, torch.linspace(-1, 1, 700))
    for threshold in thresholds:
        dense = fast.encode_threshold(*encoder(t), threshold, backend="cpu").dense()
        for features in (chosen, chosen.int(), chosen[:1], chosen[:0]):
            actual = fast.encode_features(*encoder(t), threshold, features, backend="cpu")
            # Zeros of one sign: dense() puts them in, the kernel leaves them out.
            assert_same_bits(actual.nan_to_num(123.0) + 0.0, dense[:, features.long()].nan_to_num(123.0) + 0.0)
