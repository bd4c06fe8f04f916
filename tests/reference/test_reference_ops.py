"""The reference against its definitions, written as explicit loops over Python numbers.

Data are small integers (halves, where noted), so that sums are exact in float64 and ties are ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from saerec_fast import reference
from saerec_fast.types import (
    Activation,
    BatchTopK,
    Edit,
    JumpReLU,
    Ragged,
    ReLU,
    SparseFeatures,
    SteeringPlan,
    TopK,
)

D, N = 3, 7
INF, NAN = math.inf, math.nan
SHAPES: list[tuple[int, ...]] = [(), (4,), (2, 3), (2, 1, 2), (0,), (3, 0), (0, 2)]
PER_FEATURE = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, 1.0, 3.0], dtype=torch.float64)
ACTIVATIONS = [
    ReLU(),
    JumpReLU(2.0),
    JumpReLU(PER_FEATURE),
    TopK(3),
    TopK(N),
    BatchTopK(2, threshold=1.0),
]


class Weights:
    """Integer weights; ``without`` names biases that are None."""

    def __init__(self, without: Sequence[str] = (), dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(11)

        def draw(*shape: int) -> Tensor:
            return torch.randint(-3, 4, shape, generator=generator).to(dtype)

        self.W_enc, self.W_dec = draw(N, D), draw(N, D)
        b_enc, b_dec = draw(N), draw(D)
        self.b_enc = None if "b_enc" in without else b_enc
        self.b_dec = None if "b_dec" in without else b_dec

    @property
    def encoder(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.W_enc, self.b_enc, self.b_dec

    @property
    def all(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        return *self.encoder, self.W_dec


def hidden(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(-4, 5, (*shape, D), generator=torch.Generator().manual_seed(seed)).double()


def rows_of(tensor: Tensor) -> list[list[float]]:
    return tensor.reshape(-1, tensor.shape[-1]).tolist()


def exactly(actual: Tensor, rows: list[list[float]], shape: tuple[int, ...]) -> None:
    """``actual`` has this shape and these rows, NaN where they have NaN."""
    expected = torch.tensor(rows, dtype=torch.float64).reshape(shape)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0, equal_nan=True)


def loop_scores(row: list[float], weight: list[list[float]], bias: list[float]) -> list[float]:
    return [sum(w * v for w, v in zip(line, row, strict=True)) + b for line, b in zip(weight, bias, strict=True)]


def loop_order(scores: list[float]) -> list[int]:
    """Indices: NaN first, then descending, ties by smallest index."""
    return sorted(range(len(scores)), key=lambda j: (not math.isnan(scores[j]), -scores[j], j))


def loop_pre(row: list[float], w: Weights) -> list[float]:
    shift = [0.0] * D if w.b_dec is None else w.b_dec.tolist()
    bias = [0.0] * N if w.b_enc is None else w.b_enc.tolist()
    return loop_scores([v - s for v, s in zip(row, shift, strict=True)], w.W_enc.tolist(), bias)


def loop_activate(pre: list[float], activation: Activation) -> list[float]:
    if isinstance(activation, TopK):
        chosen = set(loop_order(pre)[: activation.k])
        return [p if j in chosen and not p <= 0 else 0.0 for j, p in enumerate(pre)]
    threshold: Any = 0.0 if isinstance(activation, ReLU) else activation.threshold
    limits = threshold.tolist() if isinstance(threshold, Tensor) else [threshold] * len(pre)
    return [0.0 if p <= limit else p for p, limit in zip(pre, limits, strict=True)]


def loop_decode(a: list[float], w: Weights, *, bias: bool = True) -> list[float]:
    start = [0.0] * D if w.b_dec is None or not bias else w.b_dec.tolist()
    return [start[i] + sum(a[j] * w.W_dec[j, i].item() for j in range(len(a))) for i in range(D)]


def loop_edit(a: float, op: str, value: float) -> float:
    if op == "set":
        return value
    if op == "add":
        return a + value
    if op == "scale":
        return a * value
    return max(a, value) if op == "clamp_min" else min(a, value)


def loop_steer(row: list[float], w: Weights, activation: Activation, plan: SteeringPlan, values: Any) -> list[float]:
    a = loop_activate(loop_pre(row, w), activation)
    edited = list(a)
    for edit, value in zip(plan.edits, values, strict=True):
        edited[edit.feature] = loop_edit(edited[edit.feature], edit.op, value)
    if plan.mode == "reconstruct":
        return loop_decode(edited, w)
    change = loop_decode([e - b for e, b in zip(edited, a, strict=True)], w, bias=False)
    return [v + c for v, c in zip(row, change, strict=True)]


class TestLinearTopK:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("k", [1, 3, N])
    @pytest.mark.parametrize("with_bias", [True, False])
    def test_values_and_indices(self, shape: tuple[int, ...], k: int, with_bias: bool) -> None:
        w, x = Weights(), hidden(*shape)
        bias = w.b_enc if with_bias else None
        values, indices = reference.linear_topk(x, w.W_enc, bias, k=k)
        scores = [
            loop_scores(row, w.W_enc.tolist(), [0.0] * N if bias is None else bias.tolist()) for row in rows_of(x)
        ]
        orders = [loop_order(row)[:k] for row in scores]
        exactly(indices, [[float(j) for j in order] for order in orders], (*shape, k))
        exactly(values, [[row[j] for j in order] for row, order in zip(scores, orders, strict=True)], (*shape, k))
        assert indices.dtype == torch.int64
        assert values.dtype == x.dtype

    def test_ties_go_to_the_smallest_index(self) -> None:
        weight = torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0], [2.0]] * 50)
        values, indices = reference.linear_topk(torch.tensor([[1.0], [-1.0], [0.0]]), weight, k=5)
        assert indices.tolist() == [[1, 3, 5, 7, 9], [0, 2, 4, 6, 8], [0, 1, 2, 3, 4]]
        assert values.tolist() == [[2.0] * 5, [-1.0] * 5, [0.0] * 5]

    def test_zeros_of_either_sign_tie(self) -> None:
        bias = torch.tensor([-0.0, 0.0, -0.0, 0.0])
        assert reference.linear_topk(torch.zeros(1), torch.zeros(4, 1), bias, k=4).indices.tolist() == [0, 1, 2, 3]

    def test_nan_is_largest_and_infinities_rank(self) -> None:
        bias = torch.tensor([INF, 1.0, NAN, -INF, INF, NAN, 2.0])
        values, indices = reference.linear_topk(torch.zeros(1, D), torch.zeros(7, D), bias, k=7)
        assert indices.tolist() == [[2, 5, 0, 4, 6, 1, 3]]
        exactly(values, [[NAN, NAN, INF, INF, 2.0, 1.0, -INF]], (1, 7))
        row = reference.linear_topk(torch.full((1, D), NAN), Weights(dtype=torch.float32).W_enc, k=3)
        assert row.indices.tolist() == [[0, 1, 2]]

    @pytest.mark.parametrize("k", [1, 4, N])
    def test_exclude(self, k: int) -> None:
        w, x = Weights(), hidden(2, 3)
        lists: list[list[int]] = [[], [0], [6, 2, 6, 2], list(range(N)), [1, 2, 3, 4, 5, 6], [3]]
        values, indices = reference.linear_topk(x, w.W_enc, w.b_enc, k=k, exclude=Ragged.from_lists(lists))
        wanted_values, wanted_indices = [], []
        assert w.b_enc is not None
        for row, gone in zip(rows_of(x), lists, strict=True):
            scores = loop_scores(row, w.W_enc.tolist(), w.b_enc.tolist())
            order = [j for j in loop_order(scores) if j not in gone][:k]
            missing = k - len(order)
            wanted_indices.append([float(j) for j in order] + [-1.0] * missing)
            wanted_values.append([scores[j] for j in order] + [-INF] * missing)
        exactly(indices, wanted_indices, (2, 3, k))
        exactly(values, wanted_values, (2, 3, k))

    def test_an_excluded_nan_goes_and_a_score_of_minus_infinity_stays(self) -> None:
        bias = torch.tensor([NAN, -INF, 1.0, -INF])
        result = reference.linear_topk(
            torch.zeros(1, 1), torch.zeros(4, 1), bias, k=4, exclude=Ragged.from_lists([[0, 3]])
        )
        assert result.indices.tolist() == [[2, 1, -1, -1]]
        assert result.values.tolist() == [[1.0, -INF, -INF, -INF]]

    def test_exclude_of_no_rows(self) -> None:
        result = reference.linear_topk(torch.zeros(0, D), torch.zeros(4, D), k=2, exclude=Ragged.from_lists([]))
        assert result.indices.shape == result.values.shape == (0, 2)

    def test_gradients(self) -> None:
        x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, D), (N, D), (N,)))
        exclude = Ragged.from_lists([[0], [], list(range(N)), [1, 2, 3, 4, 5]])
        assert gradcheck(lambda *args: reference.linear_topk(*args, k=3).values, (x, weight, bias))

        def finite(*args: Tensor) -> Tensor:
            values = reference.linear_topk(*args, k=3, exclude=exclude).values
            return values.masked_fill(values == -INF, 0.0)

        assert gradcheck(finite, (x, weight, bias))


class TestEncode:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("without", [(), ("b_enc",), ("b_dec",), ("b_enc", "b_dec")])
    def test_pre_activations(self, shape: tuple[int, ...], without: Sequence[str]) -> None:
        w, x = Weights(without), hidden(*shape)
        exactly(reference.pre_activations(x, *w.encoder), [loop_pre(row, w) for row in rows_of(x)], (*shape, N))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
    def test_activate(self, shape: tuple[int, ...], activation: Activation) -> None:
        w, x = Weights(), hidden(*shape)
        pre = reference.pre_activations(x, *w.encoder)
        exactly(
            reference.activate(pre, activation), [loop_activate(row, activation) for row in rows_of(pre)], pre.shape
        )

    def test_batch_topk_in_training_selects_over_the_batch(self) -> None:
        pre = torch.tensor([[5.0, 4.0, 3.0, -1.0], [0.5, 3.0, -2.0, 0.1], [-1.0, -2.0, -3.0, -4.0]])
        kept = torch.tensor([[5.0, 4.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        assert torch.equal(reference.activate(pre, BatchTopK(1)), kept)  # of two 3.0, the first
        kept[1] = torch.tensor([0.5, 3.0, 0.0, 0.1])
        assert torch.equal(reference.activate(pre, BatchTopK(2)), kept)
        assert torch.equal(reference.activate(pre, BatchTopK(4)), kept)  # ReLU after the selection
        assert torch.equal(reference.activate(pre, BatchTopK(9)), kept)  # more than there are
        assert reference.activate(pre[:0], BatchTopK(2)).shape == (0, 4)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("k", [1, 3, N])
    def test_encode_topk(self, shape: tuple[int, ...], k: int) -> None:
        w, x = Weights(), hidden(*shape)
        features = reference.encode_topk(x, *w.encoder, k=k)
        check_layout(features, shape)
        pre = [loop_pre(row, w) for row in rows_of(x)]
        orders = [loop_order(row)[:k] for row in pre]
        assert features.offsets.tolist() == [k * row for row in range(len(pre) + 1)]
        assert features.indices.tolist() == [j for order in orders for j in order]
        wanted = [max(row[j], 0.0) for row, order in zip(pre, orders, strict=True) for j in order]
        exactly(features.values, [wanted], (len(wanted),))  # also the zeros that the ReLU made
        exactly(features.dense(), [loop_activate(row, TopK(k)) for row in pre], (*shape, N))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("threshold", [0.0, 2.0, torch.tensor(2.0), torch.tensor([2.0]), PER_FEATURE], ids=str)
    def test_encode_threshold(self, shape: tuple[int, ...], threshold: float | Tensor) -> None:
        w, x = Weights(), hidden(*shape)
        features = reference.encode_threshold(x, *w.encoder, threshold)
        check_layout(features, shape)
        limits = torch.as_tensor(threshold).double().expand(N).tolist()
        pre = [loop_pre(row, w) for row in rows_of(x)]
        active = [[j for j in range(N) if row[j] > limits[j]] for row in pre]
        assert features.indices.tolist() == [j for row in active for j in row]
        assert features.offsets.tolist() == [sum(map(len, active[:row])) for row in range(len(pre) + 1)]
        wanted = [row[j] for row, chosen in zip(pre, active, strict=True) for j in chosen]
        exactly(features.values, [wanted], (len(wanted),))

    def test_equal_to_the_threshold_is_not_active(self) -> None:
        eye = torch.eye(2)
        x = torch.tensor([[2.0, 2.0], [1.0, 3.0]])
        features = reference.encode_threshold(x, eye, None, None, torch.tensor([1.0, 2.0]))
        assert features.dense().tolist() == [[2.0, 0.0], [0.0, 3.0]]

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("threshold", [0.0, 2.0, torch.tensor(2.0), torch.tensor([2.0]), PER_FEATURE], ids=str)
    @pytest.mark.parametrize("chosen", [[5, 0, 5], [], list(range(N))])
    def test_encode_features(self, shape: tuple[int, ...], threshold: Any, chosen: list[int]) -> None:
        w, x = Weights(), hidden(*shape)
        ids = torch.tensor(chosen, dtype=torch.int64)
        actual = reference.encode_features(x, *w.encoder, threshold, ids)
        limits = torch.as_tensor(threshold).double().expand(N)
        dense = [loop_activate(loop_pre(row, w), JumpReLU(limits)) for row in rows_of(x)]
        exactly(actual, [[row[j] for j in chosen] for row in dense], (*shape, len(chosen)))

    def test_nan_and_infinity_stay_visible(self) -> None:
        x = torch.tensor([[NAN, 0.0], [INF, 0.0], [-INF, 0.0]])
        weight = torch.eye(2)
        by_threshold = reference.encode_threshold(x, weight, None, None, 5.0)
        # 0 · inf is NaN in the other feature's dot product.
        exactly(by_threshold.dense(), [[NAN, NAN], [INF, NAN], [0.0, NAN]], (3, 2))
        top = reference.encode_topk(x, weight, None, None, k=1)
        assert top.indices.tolist() == [0, 1, 1]
        exactly(top.values, [[NAN, NAN, NAN]], (3,))
        exactly(reference.activate(x, ReLU()), [[NAN, 0.0], [INF, 0.0], [0.0, 0.0]], (3, 2))
        exactly(reference.activate(x, TopK(1)), [[NAN, 0.0], [INF, 0.0], [0.0, 0.0]], (3, 2))

    def test_gradients(self) -> None:
        x, W_enc, b_enc, b_dec = smooth_encoder()
        for encode in (
            lambda *args: reference.encode_topk(*args, k=3).dense(),
            lambda *args: reference.encode_threshold(*args, 0.3).dense(),
            lambda *args: reference.encode_features(*args, 0.3, torch.tensor([4, 0])),
        ):
            assert gradcheck(encode, (x, W_enc, b_enc, b_dec))


def check_layout(features: SparseFeatures, shape: tuple[int, ...]) -> None:
    assert features.batch_shape == shape
    assert features.n_features == N
    assert features.offsets.dtype == torch.int64
    assert features.indices.dtype == torch.int32
    assert features.offsets.shape == (torch.Size(shape).numel() + 1,)


def smooth_encoder() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 2, D), (N, D), (N,), (D,))
    x, W_enc, b_enc, b_dec = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(tensor.requires_grad_() for tensor in (x, W_enc, b_enc, b_dec))  # type: ignore[return-value]


class TestDecode:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("without", [(), ("b_dec",)])
    def test_decode_sparse(self, shape: tuple[int, ...], without: Sequence[str]) -> None:
        w, x = Weights(without), hidden(*shape)
        features = reference.encode_topk(x, *w.encoder, k=3)
        actual = reference.decode_sparse(features, w.W_dec, w.b_dec)
        dense = rows_of(features.dense())
        exactly(actual, [loop_decode(row, w) for row in dense], (*shape, D))

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_reconstruct(self, shape: tuple[int, ...], activation: Activation) -> None:
        w, x = Weights(), hidden(*shape)
        actual = reference.reconstruct(x, *w.all, activation)
        wanted = [loop_decode(loop_activate(loop_pre(row, w), activation), w) for row in rows_of(x)]
        exactly(actual, wanted, (*shape, D))
        by_steering = reference.steer(x, *w.all, activation, SteeringPlan(mode="reconstruct"))
        assert torch.equal(by_steering, actual)

    def test_gradients(self) -> None:
        x, W_enc, b_enc, b_dec = smooth_encoder()
        W_dec = torch.randn(N, D, dtype=torch.float64, requires_grad=True)

        def decode(values: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
            offsets, indices = torch.tensor([0, 2, 2, 3]), torch.tensor([6, 1, 0])
            return reference.decode_sparse(SparseFeatures(offsets, indices, values, N, (3,)), W_dec, b_dec)

        assert gradcheck(decode, (torch.randn(3, dtype=torch.float64, requires_grad=True), W_dec, b_dec))
        for activation in (ReLU(), TopK(3), BatchTopK(2)):
            assert gradcheck(
                lambda *args, activation=activation: reference.reconstruct(*args, activation),
                (x, W_enc, b_enc, b_dec, W_dec),
            )


OPS_AND_VALUES = [("set", 2.0), ("add", 1.5), ("scale", -0.5), ("clamp_min", 3.0), ("clamp_max", 1.0)]
EACH_OP = [[Edit(feature, op, value)] for (op, value), feature in product(OPS_AND_VALUES, (0, 3))]  # type: ignore[arg-type]
SEVERAL = [
    [],
    [Edit(6, "set", 2.0), Edit(0, "add", -1.0), Edit(2, "scale", 2.0)],
    # The order of edits of one feature matters.
    [Edit(4, "set", 2.0), Edit(4, "scale", 3.0), Edit(4, "add", 1.0)],
    [Edit(4, "add", 1.0), Edit(4, "scale", 3.0), Edit(4, "clamp_max", 2.0)],
    [Edit(1, "add", 1.0), Edit(5, "set", 0.0), Edit(1, "add", 2.0)],
]


class TestSteer:
    @pytest.mark.parametrize("edits", EACH_OP + SEVERAL, ids=lambda edits: "-".join(e.op for e in edits) or "none")
    @pytest.mark.parametrize("mode", ["delta", "reconstruct"])
    @pytest.mark.parametrize("activation", [ReLU(), JumpReLU(PER_FEATURE), TopK(3)], ids=repr)
    def test_edits(self, edits: list[Edit], mode: Any, activation: Activation) -> None:
        w, x = Weights(), hidden(2, 5)
        plan = SteeringPlan(edits, mode=mode)
        actual = reference.steer(x, *w.all, activation, plan)
        exactly(actual, [loop_steer(row, w, activation, plan, plan.values) for row in rows_of(x)], x.shape)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("mode", ["delta", "reconstruct"])
    def test_shapes(self, shape: tuple[int, ...], mode: Any) -> None:
        w, x = Weights(("b_enc", "b_dec")), hidden(*shape)
        plan = SteeringPlan(SEVERAL[1], mode=mode)
        actual = reference.steer(x, *w.all, ReLU(), plan)
        exactly(actual, [loop_steer(row, w, ReLU(), plan, plan.values) for row in rows_of(x)], (*shape, D))

    @pytest.mark.parametrize("mode", ["delta", "reconstruct"])
    @pytest.mark.parametrize(
        ("batch_shape", "shape"),
        [((2, 3), (3,)), ((3, 2), (3, 1, 3)), ((2,), (2, 3)), ((2, 3), (1, 3, 3)), ((2, 3), (2, 3, 3)), ((), (3,))],
    )
    def test_strengths_broadcast(self, batch_shape: tuple[int, ...], shape: tuple[int, ...], mode: Any) -> None:
        w, x = Weights(), hidden(*batch_shape)
        plan = SteeringPlan(SEVERAL[1], mode=mode)
        strengths = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(8)).double()
        actual = reference.steer(x, *w.all, TopK(3), plan, strengths=strengths)
        values = strengths.expand(*x.shape[:-1], 3).reshape(-1, 3).tolist()
        rows = [loop_steer(row, w, TopK(3), plan, own) for row, own in zip(rows_of(x), values, strict=True)]
        exactly(actual, rows, x.shape)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_strengths_of_another_type(self, dtype: torch.dtype) -> None:
        w, x = Weights(dtype=dtype), hidden(2, 3).to(dtype)
        for op, value in OPS_AND_VALUES:
            plan = SteeringPlan([Edit(3, op, 0.0)])  # type: ignore[arg-type]
            steered = reference.steer(x, *w.all, ReLU(), plan, strengths=torch.full((2, 1, 1), value))
            assert steered.dtype == dtype
            wanted = torch.tensor([loop_steer(row, w, ReLU(), plan, [value]) for row in rows_of(x)]).reshape(x.shape)
            torch.testing.assert_close(steered.float(), wanted, rtol=torch.finfo(dtype).eps, atol=0)

    @pytest.mark.parametrize("mode", ["delta", "reconstruct"])
    @pytest.mark.parametrize("positions", ["all", "last", "mask"])
    @pytest.mark.parametrize("padding", ["none", "right", "left", "ragged"])
    def test_positions(self, positions: Any, padding: str, mode: Any) -> None:
        w, x = Weights(), hidden(4, 5)
        valid = {
            "none": None,
            "right": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
            "left": [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]],
            "ragged": [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]],
        }[padding]
        mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(4)) < 0.5
        plan = SteeringPlan(SEVERAL[1], mode=mode, positions=mask if positions == "mask" else positions)
        given = None if valid is None else torch.tensor(valid, dtype=torch.bool)
        actual = reference.steer(x, *w.all, ReLU(), plan, valid=given)
        for row in range(4):
            allowed = [step for step in range(5) if valid is None or valid[row][step]]
            chosen = {
                "all": allowed,
                "last": allowed[-1:],
                "mask": [step for step in allowed if mask[row, step]],
            }[positions]
            for step in range(5):
                before = x[row, step].tolist()
                wanted = loop_steer(before, w, ReLU(), plan, plan.values) if step in chosen else before
                exactly(actual[row, step], [wanted], (D,))

    def test_last_of_empty_sequences(self) -> None:
        w, plan = Weights(), SteeringPlan(SEVERAL[1], positions="last")
        for shape in ((2, 0), (0, 3)):
            for valid in (None, torch.ones(shape, dtype=torch.bool)):
                assert reference.steer(hidden(*shape), *w.all, ReLU(), plan, valid=valid).shape == (*shape, D)

    def test_positions_are_checked(self) -> None:
        w, x = Weights(), hidden(2, 3)
        wrong = torch.ones(3, 2, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"positions: expected a mask of shape \(2, 3\), got \(3, 2\)"):
            reference.steer(x, *w.all, ReLU(), SteeringPlan(SEVERAL[1], positions=wrong))
        with pytest.raises(ValueError, match=r"valid: expected shape \(2, 3\), got \(3, 2\)"):
            reference.steer(x, *w.all, ReLU(), SteeringPlan(SEVERAL[1]), valid=wrong)
        with pytest.raises(ValueError, match="positions: 'last' needs hidden states"):
            reference.steer(hidden(), *w.all, ReLU(), SteeringPlan(SEVERAL[1], positions="last"))

    @pytest.mark.parametrize("edits", [[], [Edit(1, "add", 0.0), Edit(2, "scale", 1.0), Edit(3, "clamp_min", -1.0)]])
    def test_rows_that_nothing_changes_keep_their_bits_and_are_fresh(self, edits: list[Edit]) -> None:
        w = Weights(dtype=torch.float32)
        x = torch.tensor([[-0.0, 0.0, 1e-42], [-1.5, -0.0, 3e30], [0.1, -0.3, -0.0]])
        steered = reference.steer(x, *w.all, ReLU(), SteeringPlan(edits))
        assert torch.equal(steered.view(torch.int32), x.view(torch.int32))
        assert steered.data_ptr() != x.data_ptr()

    def test_what_is_only_added_to_needs_no_activation(self) -> None:
        """Where the activation is infinite or NaN, adding to it moves the hidden state by the value all the same."""
        W_enc = torch.tensor([[INF, 0.0], [0.0, 1.0]])
        W_dec = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        x = torch.tensor([[1.0, 1.0], [0.0, 1.0]])  # the first feature is infinite, then NaN
        plan = SteeringPlan([Edit(0, "add", 3.0)])
        steered = reference.steer(x, W_enc, None, None, W_dec, ReLU(), plan)
        assert steered.tolist() == [[1.0, 7.0], [0.0, 7.0]]

    @pytest.mark.parametrize("mode", ["delta", "reconstruct"])
    def test_nan_rows_do_not_spread(self, mode: Any) -> None:
        w, x = Weights(), hidden(3)
        plan = SteeringPlan(SEVERAL[1], mode=mode)
        clean = reference.steer(x, *w.all, TopK(3), plan)
        x[1, 0] = NAN
        steered = reference.steer(x, *w.all, TopK(3), plan)
        assert steered[1].isnan().any()
        assert torch.equal(steered[[0, 2]], clean[[0, 2]])

    @pytest.mark.parametrize("edits", [*EACH_OP[::2], *SEVERAL[1:]], ids=lambda edits: "-".join(e.op for e in edits))
    @pytest.mark.parametrize("mode", ["delta", "reconstruct"])
    @pytest.mark.parametrize("activation", [ReLU(), TopK(3)], ids=repr)
    def test_gradients(self, edits: list[Edit], mode: Any, activation: Activation) -> None:
        x, W_enc, b_enc, b_dec = smooth_encoder()
        W_dec = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
        strengths = torch.rand(2, 1, len(edits), dtype=torch.float64, requires_grad=True)
        valid = torch.tensor([[True, False], [True, True]])
        plan = SteeringPlan(edits, mode=mode)

        def steer(*args: Tensor) -> Tensor:
            *weights, strengths = args
            return reference.steer(*weights, activation, plan, strengths=strengths, valid=valid)

        assert gradcheck(steer, (x, W_enc, b_enc, b_dec, W_dec, strengths))

    @pytest.mark.parametrize(("op", "neutral"), [("add", 0.0), ("scale", 1.0)])
    def test_strengths_that_change_nothing_have_a_gradient(self, op: Any, neutral: float) -> None:
        """That is where learning them starts."""
        x, *encoder = (tensor.detach() for tensor in smooth_encoder())
        W_dec = torch.randn(N, D, dtype=torch.float64)
        strengths = torch.full((1,), neutral, dtype=torch.float64, requires_grad=True)
        plan = SteeringPlan([Edit(int(reference.activate(x @ encoder[0].T, ReLU()).sum((0, 1)).argmax()), op, 0.0)])

        def steer(strengths: Tensor) -> Tensor:
            return reference.steer(x, *encoder, W_dec, ReLU(), plan, strengths=strengths)

        assert gradcheck(steer, (strengths,))
        (gradient,) = torch.autograd.grad(steer(strengths).square().sum(), strengths)
        assert gradient != 0


@pytest.mark.parametrize("name", reference.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert callable(getattr(reference, name))
