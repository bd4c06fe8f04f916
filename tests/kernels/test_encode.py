from __future__ import annotations

import pytest
import torch
from cases import DTYPES, KERNEL_CASES, Case, Inputs, integer_inputs, make_inputs
from helpers import (
    LAYOUTS,
    assert_equal,
    assert_same_bits,
    assert_same_features,
    assert_top_k,
    in_layout,
    rounding,
    score_tolerance,
    sorted_by_feature,
    torch_threads,
    truth_scores,
)
from hypothesis import given
from hypothesis import strategies as st

import saerec_fast as fast
from saerec_fast import reference

pytestmark = pytest.mark.usefixtures("isa")

INF, NAN = float("inf"), float("nan")


def thresholds_of(kind: str, n: int) -> float | torch.Tensor:
    per_feature = torch.linspace(-0.5, 1.0, n)
    return {
        "relu": 0.0,
        "scalar": 0.7,
        "negative": -0.3,
        "per_feature": per_feature,
        "strided": _every_other(per_feature),
    }[kind]


def _every_other(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values, torch.full_like(values, NAN)], 1)[:, 0]


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_encode_topk(case: Case) -> None:
    inputs = make_inputs(case)
    features = fast.encode_topk(*inputs[:4], k=case.k, backend="cpu")
    assert features.indices.dtype == torch.int32
    assert features.offsets.tolist() == list(range(0, (case.rows + 1) * case.k, case.k))
    assert (features.n_features, features.batch_shape) == (case.n, (case.rows,))
    if case.rows == 0:
        return
    values, indices = features.values.view(-1, case.k), features.indices.view(-1, case.k).long()
    scores, slack = truth_scores(inputs), score_tolerance(inputs)
    assert (values >= 0).all()
    positive = (values > 0).all(-1)  # elsewhere the ReLU, which comes after the selection, hides the order
    top = fast.TopKResult(values[positive], indices[positive])
    assert_top_k(top, scores[positive], slack[positive], case.dtype)
    chosen = scores.gather(1, indices)
    bound = slack.gather(1, indices) + rounding(chosen, case.dtype) * 2
    assert ((values.double() - chosen.relu()).abs() <= bound).all()
    left_out = (scores - slack).scatter(1, indices, -INF).amax(-1)
    assert (left_out <= (chosen + slack.gather(1, indices)).amin(-1)).all()
    plain = reference.encode_topk(*inputs[:4], k=case.k)
    plain_errors = plain.values.view(-1, case.k) - scores.gather(1, plain.indices.view(-1, case.k).long()).relu()
    floor = torch.finfo(case.dtype).eps * float(scores.abs().max())
    assert (values - chosen.relu()).abs().max() <= 2 * plain_errors.abs().max() + floor


@pytest.mark.parametrize("kind", ["relu", "scalar", "negative", "per_feature", "strided"])
@pytest.mark.parametrize("case", KERNEL_CASES[::2], ids=str)  # three dtypes: every size still appears
def test_encode_threshold(case: Case, kind: str) -> None:
    inputs, threshold = make_inputs(case), thresholds_of(kind, case.n)
    features = fast.encode_threshold(*inputs[:4], threshold, backend="cpu")
    assert features.indices.dtype == torch.int32
    assert features.values.dtype == case.dtype
    assert features.offsets.shape == (case.rows + 1,)
    assert features.offsets[0] == 0
    assert features.offsets[-1] == len(features.values)
    keys = features.row_ids() * case.n + features.indices
    assert (keys.diff() > 0).all(), "features of a row do not ascend"
    if case.rows == 0:
        return
    scores, slack = truth_scores(inputs), score_tolerance(inputs)
    active = torch.zeros_like(scores, dtype=torch.bool)
    active[features.row_ids(), features.indices.long()] = True
    above = scores - torch.as_tensor(threshold, dtype=torch.float32)
    assert active[above > slack].all()
    assert not active[above < -slack].any()
    errors = (features.values.double() - scores[active]).abs()
    assert (errors <= slack[active] + 2 * rounding(scores[active], case.dtype)).all()
    plain = (reference.pre_activations(*inputs[:4]) - scores).abs()
    if errors.numel():
        floor = torch.finfo(case.dtype).eps * float(scores.abs().max())
        assert errors.max() <= 2 * plain.max() + floor


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from(DTYPES))
    case = Case(draw(st.integers(1, 9)), draw(st.integers(1, 80)), 1, draw(st.integers(0, 11)), dtype)
    inputs = integer_inputs(case, draw(st.integers(0, 10**6)))
    for tensor in (inputs.x, inputs.W_enc):
        for value in draw(st.lists(st.sampled_from([NAN, INF, -INF, -0.0]), max_size=2)):
            if tensor.numel():
                tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
    drop = draw(st.sampled_from([None, "b_enc", "b_dec"]))
    return inputs, drop


def _without(inputs: Inputs, drop: str | None) -> tuple:
    return tuple(None if name == drop else tensor for name, tensor in zip(inputs._fields[:4], inputs[:4], strict=True))


@given(problems(), st.data())
def test_any_integers_equal_the_reference(problem, data) -> None:
    inputs, drop = problem
    args, exact = _without(inputs, drop), _without(inputs.to(torch.float64), drop)
    n = inputs.W_enc.shape[0]
    k = data.draw(st.integers(1, n))
    assert_same_features(fast.encode_topk(*args, k=k, backend="cpu"), reference.encode_topk(*exact, k=k))
    threshold = data.draw(st.one_of(st.integers(-3, 3).map(float), st.just(torch.arange(n).float() % 5 - 2)))
    assert_same_features(
        fast.encode_threshold(*args, threshold, backend="cpu"), reference.encode_threshold(*exact, threshold)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_degenerate_rows(dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(7, 100, 1, 12, dtype))
    inputs.x[0], inputs.x[1], inputs.x[2] = 0, 3, -0.0
    inputs.x[3], inputs.x[4, 0], inputs.x[5, 6] = NAN, INF, -INF
    inputs.x[6] = inputs.b_dec
    exact = inputs.to(torch.float64)
    for k in (1, 31, 100):
        features = fast.encode_topk(*inputs[:4], k=k, backend="cpu")
        assert_same_features(features, reference.encode_topk(*exact[:4], k=k))
    for threshold in (0.0, 2.0, INF, -INF, NAN):
        features = fast.encode_threshold(*inputs[:4], threshold, backend="cpu")
        assert_same_features(features, reference.encode_threshold(*exact[:4], threshold))


def test_a_score_at_the_threshold_is_off_and_nan_is_on() -> None:
    x = torch.tensor([[1.0], [NAN]])
    features = fast.encode_threshold(x, torch.tensor([[1.0], [2.0], [3.0]]), None, None, 2.0, backend="cpu")
    assert features.offsets.tolist() == [0, 1, 4]
    assert features.indices.tolist() == [2, 0, 1, 2]
    assert features.values[0] == 3
    assert features.values[1:].isnan().all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 0, 3), (1, 1, 4)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape).numel()
    inputs = integer_inputs(Case(6, 50, 1, rows))
    inputs = inputs._replace(x=inputs.x.reshape(*shape, 6))
    exact = inputs.to(torch.float64)
    features = fast.encode_topk(*inputs[:4], k=15, backend="cpu")
    assert_same_features(features, reference.encode_topk(*exact[:4], k=15))
    assert features.dense().shape == (*shape, 50)
    assert_same_features(fast.encode_threshold(*inputs[:4], backend="cpu"), reference.encode_threshold(*exact[:4]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts_give_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(17, 257, 33, 13, dtype))
    moved = in_layout(inputs, layout)
    for encode in (
        lambda t: fast.encode_topk(*t[:4], k=33, backend="cpu"),
        lambda t: fast.encode_threshold(*t[:4], 0.4, backend="cpu"),
    ):
        plain, other = encode(inputs), encode(moved)
        assert_same_bits(other.values, plain.values)
        assert_same_bits(other.indices, plain.indices)
        assert_same_bits(other.offsets, plain.offsets)


@pytest.mark.parametrize("rows", [1, 3, 65])
def test_features_split_over_threads(rows: int) -> None:
    inputs = integer_inputs(Case(64, 20_001, 1, rows))
    expected_topk = sorted_by_feature(reference.encode_topk(*inputs[:4], k=129))
    expected = reference.encode_threshold(*inputs[:4], 40.0)
    assert len(expected.values) > rows
    for threads in (1, 2, 3, 5):
        with torch_threads(threads):
            assert_same_features(fast.encode_threshold(*inputs[:4], 40.0, backend="cpu"), expected)
            features = fast.encode_topk(*inputs[:4], k=129, backend="cpu")
            assert_same_features(sorted_by_feature(features), expected_topk)


def test_every_feature_active_in_every_row() -> None:
    # More entries than the log's first capacity, and not a multiple of it.
    inputs = integer_inputs(Case(5, 211, 1, 301))
    features = fast.encode_threshold(*inputs[:4], -INF, backend="cpu")
    assert len(features.values) == 211 * 301
    assert_same_features(features, reference.encode_threshold(*inputs[:4], -INF))


def test_encode_features_takes_columns_of_encode_threshold() -> None:
    inputs = integer_inputs(Case(5, 40, 1, 9))
    chosen = torch.tensor([39, 0, 7, 7], dtype=torch.int32)
    dense = fast.encode_threshold(*inputs[:4], 1.0, backend="cpu").dense()
    assert_equal(fast.encode_features(*inputs[:4], 1.0, chosen, backend="cpu"), dense[:, chosen.long()])
