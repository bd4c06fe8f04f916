"""Whole plans in one kernel call: sequences, directions, dose limits, a plan for every sequence."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import DTYPES, Case, make_inputs
from helpers import assert_equal, assert_same_bits, torch_threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import saerec_fast as fast
from saerec_fast import reference
from saerec_fast.types import Activation
from saerec_fast.types.plan import OPS

pytestmark = pytest.mark.usefixtures("isa")


def make_sae(activation: Activation, d: int, n: int, dtype: torch.dtype, draw: Any) -> fast.SparseAutoencoder:
    sae = fast.SparseAutoencoder(d, n, activation, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(draw(*parameter.shape))
    return sae


def integers(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randint(-2, 3, shape, generator=generator).float()


@torch.no_grad()
def steer_at_once(sae: fast.SparseAutoencoder, x: Tensor, plan: Any, **options: Any) -> Tensor:
    """Only the one kernel call, not what stands in where it cannot be used."""
    steered = sae._steer_bound(x, plan, options.get("strengths"), options.get("valid"))
    assert steered is not None, "fell back"
    assert_same_bits(sae.steer(x, plan, **options), steered)
    return steered


def by_reference(sae: fast.SparseAutoencoder, x: Tensor, plan: fast.SteeringPlan, **options: Any) -> Tensor:
    weights = [tensor.detach().double() for tensor in (sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec)]
    return reference.steer(x.double(), *weights, sae.activation, plan, **options).to(x.dtype)


def entries_of(d: int, n: int) -> st.SearchStrategy[fast.Edit | fast.Direction]:
    values = st.integers(-3, 3).map(float)
    vectors = st.lists(st.integers(-2, 2), min_size=d, max_size=d)
    return st.builds(fast.Edit, st.integers(0, n - 1), st.sampled_from(OPS), values) | st.builds(
        fast.Direction, vectors, values
    )


def plans_of(d: int, n: int) -> st.SearchStrategy[fast.SteeringPlan]:
    return st.builds(
        fast.SteeringPlan,
        st.lists(entries_of(d, n), max_size=5),
        st.sampled_from(["delta", "reconstruct"]),
        st.sampled_from(["all", "last"]),
    )


@st.composite
def problems(draw: Any) -> tuple[fast.SparseAutoencoder, Tensor, Tensor | None]:
    d, n, batch, length = (draw(st.integers(1, top)) for top in (12, 40, 5, 6))
    activations = [
        fast.ReLU(),
        fast.JumpReLU(2.0),
        fast.TopK(draw(st.integers(1, n))),
        fast.BatchTopK(1, threshold=1.0),
    ]
    dtype, numbers = draw(st.sampled_from(DTYPES)), integers(draw(st.integers(0, 10**6)))
    sae = make_sae(draw(st.sampled_from(activations)), d, n, dtype, numbers)
    x = numbers(batch, length, d).to(dtype)
    valid = numbers(batch, length) > -1 if draw(st.booleans()) else None
    return sae, x, valid


@given(st.data())
def test_any_plan_equals_the_reference(data: Any) -> None:
    sae, x, valid = data.draw(problems())
    plan = data.draw(plans_of(sae.d_model, sae.n_features))
    if data.draw(st.booleans()):
        mask = torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(1)) < 0.5
        plan = plan.at_positions(mask)
    m, options = len(plan.edits), {"valid": valid}
    if data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([(m,), (x.shape[0], 1, m)]))
        options["strengths"] = torch.arange(torch.Size(shape).numel()).reshape(shape).remainder(7).sub(3.0)
    assert_equal(steer_at_once(sae, x, plan, **options), by_reference(sae, x, plan, **options))


@given(st.data())
def test_plans_of_their_own_equal_each_alone(data: Any) -> None:
    sae, x, valid = data.draw(problems())
    few = data.draw(st.lists(plans_of(sae.d_model, sae.n_features), min_size=1, max_size=3))
    plans = data.draw(st.lists(st.sampled_from([None, *few]), min_size=len(x), max_size=len(x)))
    together = steer_at_once(sae, x, plans, valid=valid)
    for row, plan in enumerate(plans):
        own_valid = None if valid is None else valid[row : row + 1]
        if plan is None:
            assert_same_bits(together[row], x[row])
        else:
            assert_same_bits(together[row : row + 1], steer_at_once(sae, x[row : row + 1], plan, valid=own_valid))
    with torch.no_grad():
        assert_equal(together, sae._steer_each(x, plans, valid))


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [fast.ReLU(), fast.TopK(8)], ids=repr)
def test_many_sequences_any_threads(activation: Activation, dtype: torch.dtype, mode: Any) -> None:
    inputs = make_inputs(Case(24, 300, 8, 40 * 50))
    sae = make_sae(
        activation, 24, 300, dtype, lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(3))
    )
    x = inputs.x.to(dtype).view(40, 50, 24)
    direction = fast.Direction(torch.linspace(-1, 1, 24), 0.5)
    plans = [
        fast.SteeringPlan([fast.Edit(3, "set", 1.0), direction], mode),
        fast.SteeringPlan([fast.Edit(299, "scale", 2.0)], mode, "last"),
        fast.SteeringPlan([fast.Edit(7, "add", 1.0), fast.Edit(7, "add", -1.0)]),
        None,
    ]
    own = [plans[row % 4] for row in range(40)]
    with torch_threads(1):
        alone = steer_at_once(sae, x, own)
    with torch_threads(4):
        assert_same_bits(steer_at_once(sae, x, own), alone)
    assert_same_bits(alone[2::4], x[2::4])
    assert_same_bits(alone[3::4], x[3::4])
    assert_same_bits(alone[1::4, :-1], x[1::4, :-1])
    assert (alone[1::4, -1] != x[1::4, -1]).any() or mode == "delta"
    assert (alone[0::4] != x[0::4]).any(-1).all()


@pytest.mark.parametrize("layout", ["rows", "transposed", "padded", "expanded"])
def test_memory_layouts(layout: str) -> None:
    sae = make_sae(fast.ReLU(), 6, 20, torch.float32, integers(5))
    numbers = integers(6)
    x = {
        "rows": numbers(8, 6, 6)[::2],
        "transposed": numbers(5, 4, 6).transpose(0, 1),
        "padded": numbers(4, 5, 9)[..., :6],
        "expanded": numbers(4, 1, 6).expand(4, 5, 6),
    }[layout]
    plan = fast.SteeringPlan([fast.Edit(3, "set", 2.0), fast.Edit(4, "add", 1.0)])
    valid = numbers(*x.shape[1::-1]).T > -2
    for options in ({}, {"valid": valid}):
        assert_equal(steer_at_once(sae, x, plan, **options), by_reference(sae, x, plan, **options))


class TestLimit:
    """The dose limit, on rows whose change is known: a direction of norm 1 is added 3 times."""

    def limited(self, on_excess: Any, limit: float | None = 0.5) -> fast.SteeringPlan:
        direction = fast.Direction([1.0, 0.0, 0.0, 0.0], 3.0)
        return fast.SteeringPlan([direction], max_relative_norm=limit, on_excess=on_excess)

    def rows(self) -> Tensor:
        # Norms 2, 10, 0 and NaN: relative changes 1.5, 0.3, infinite, not a number.
        return torch.tensor([[0, 2.0, 0, 0], [0, 0, 10.0, 0], [0, 0, 0, 0], [float("nan"), 0, 0, 1]])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("way", ["kernel", "op", "reference"])
    def test_clip(self, way: str, dtype: torch.dtype) -> None:
        x, plan = self.rows().to(dtype), self.limited("clip")
        sae = make_sae(fast.ReLU(), 4, 9, dtype, integers(1))
        expected = x.clone()
        expected[:2, 0] = torch.tensor([1.0, 3.0])
        expected[3, 0] = float("nan")
        steer = {
            "kernel": lambda: steer_at_once(sae, x, plan),
            "op": lambda: fast.steer(x, sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec, sae.activation, plan),
            "reference": lambda: by_reference(sae, x, plan),
        }[way]
        torch.testing.assert_close(steer(), expected, equal_nan=True, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("way", ["kernel", "reference"])
    def test_warn_and_reject(self, way: str) -> None:
        sae = make_sae(fast.ReLU(), 4, 9, torch.float32, integers(1))
        steer = steer_at_once if way == "kernel" else by_reference
        with pytest.warns(UserWarning, match=r"changes a hidden state by 1\.5 times its norm, more than .* 0\.5"):
            steered = steer(sae, self.rows()[:2], self.limited("warn"))
        assert steered[:, 0].tolist() == [3.0, 3.0]
        with pytest.raises(ValueError, match=r"plan: .* 1\.5 times"):
            steer(sae, self.rows()[:2], self.limited("reject"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            steer(sae, self.rows()[1:2], self.limited("reject"))
            steer(sae, self.rows()[:2], self.limited("warn", 2.0))

    def test_only_rows_of_the_plan_count(self) -> None:
        sae = make_sae(fast.ReLU(), 4, 9, torch.float32, integers(1))
        x = self.rows()[:2].unsqueeze(0)
        steer_at_once(sae, x, self.limited("reject").at_positions("last"))
        unlimited = fast.SteeringPlan([fast.Edit(1, "add", 100.0)])
        steered = steer_at_once(sae, x.transpose(0, 1).contiguous(), [unlimited, self.limited("clip")])
        assert_same_bits(steered[1], steer_at_once(sae, x[:, 1:], self.limited("clip"))[0])

    def test_one_of_several_plans_rejects(self) -> None:
        sae = make_sae(fast.ReLU(), 4, 9, torch.float32, integers(1))
        with torch.no_grad(), pytest.raises(ValueError, match="times its norm"):
            sae.steer(self.rows()[:1].unsqueeze(0), [self.limited("reject")])


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (0, 4)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    sae = make_sae(fast.TopK(3), 4, 9, torch.float32, integers(1))
    plan = fast.SteeringPlan([fast.Edit(1, "set", 1.0)])
    assert steer_at_once(sae, torch.empty(shape), plan).shape == shape
    assert steer_at_once(sae, torch.empty(shape), [plan] * shape[0]).shape == shape


def test_a_program_belongs_to_its_plan() -> None:
    sae = make_sae(fast.ReLU(), 4, 9, torch.float32, integers(1))
    x = integers(2)(2, 3, 4)
    plan = fast.SteeringPlan([fast.Edit(1, "add", 1.0)])
    once = steer_at_once(sae, x, plan)
    twice = steer_at_once(sae, x, plan.scaled(2.0))
    assert_equal(twice - x, 2 * (once - x))
    assert_same_bits(steer_at_once(sae, x, plan), once)
