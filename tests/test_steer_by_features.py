"""Steering in PyTorch's own ops, which compiled code takes where no features compete, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, Case, Inputs, make_inputs
from hypothesis import given
from hypothesis import strategies as st
from kernels.helpers import assert_no_worse, assert_same_bits, decided_rows
from torch import Tensor

import saerec_fast as fast
from saerec_fast import reference
from saerec_fast.api import steer_by_features
from saerec_fast.types.plan import OPS

INF, NAN = float("inf"), float("nan")
N, D, ROWS = 60, 16, 15
EDITS = [fast.Edit(f, op, v) for f, op, v in zip([0, 20, 30, 30, 59], OPS, (1.5, -0.75, 2.0, 0.5, 0.25), strict=True)]
ADDS = [fast.Edit(0, "add", 1.5), fast.Edit(59, "add", -0.5), fast.Edit(0, "add", 0.25)]
ACTIVATIONS = {
    "relu": fast.ReLU(),
    "jumprelu": fast.JumpReLU(0.4),
    "jumprelu_per_feature": fast.JumpReLU(torch.linspace(0.0, 1.0, N)),
    "batch_topk": fast.BatchTopK(7, threshold=0.8),
    "topk": fast.TopK(7),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def by_features(
    t: Inputs, activation: Any, plan: fast.SteeringPlan, strengths: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    if plan.only_adds:
        return steer_by_features(t.x, None, None, None, t.W_dec, None, plan, strengths=strengths, valid=valid)
    threshold = reference.ops.inference_threshold(activation)
    bound = torch.as_tensor(threshold, dtype=torch.float32).reshape(-1)
    weights = t.W_enc, t.b_enc, t.b_dec, t.W_dec
    return steer_by_features(t.x, *weights, bound, plan, strengths=strengths, valid=valid)


def cells() -> list[Any]:
    return [
        pytest.param(activation, edits, id=f"{name}-{kind}")
        for name, activation in ACTIVATIONS.items()
        for kind, edits in (("edits", EDITS), ("adds", ADDS))
        if name != "topk" or edits is ADDS
    ]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("activation", "edits"), cells())
def test_values(activation: Any, edits: list[fast.Edit], dtype: torch.dtype) -> None:
    t = make_inputs(Case(D, N, 7, 129, dtype))
    direction = fast.Direction(torch.linspace(-1, 1, D), 0.5)
    for plan in (fast.SteeringPlan(edits), fast.SteeringPlan([edits[0], direction, *edits[1:]], max_relative_norm=0.5)):
        exact = t.to(torch.float64)
        truth = reference.steer(*exact, activation, plan)
        plain = reference.steer(*t, activation, plan)
        out = by_features(t, activation, plan)
        assert out.dtype == dtype
        rows = (
            slice(None)
            if plan.only_adds
            else decided_rows(t, fast.JumpReLU(0.8) if "Batch" in repr(activation) else activation)
        )
        assert_no_worse(out[rows], plain[rows], truth[rows], 2)


@pytest.mark.parametrize(("activation", "edits"), cells())
def test_gradients(activation: Any, edits: list[fast.Edit]) -> None:
    plan = fast.SteeringPlan(edits)
    strengths = torch.rand(ROWS, len(edits), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for steer in (by_features, lambda t, *args, **named: reference.steer(*t, *args, **named)):
        t = make_inputs(Case(D, N, 7, ROWS, torch.float64))
        leaves = [*(tensor.requires_grad_() for tensor in t), strengths.clone().requires_grad_()]
        steered = steer(t, activation, plan, strengths=leaves[-1])
        grads = torch.autograd.grad(steered.square().sum(), leaves, allow_unused=True)
        results.append([torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch, about its own internals
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@torch.no_grad()
def test_rows_that_stay_keep_their_bits(dtype: torch.dtype, compiled: bool) -> None:
    t = make_inputs(Case(D, N, 7, ROWS, dtype))
    t.x[0, ::2] = -0.0
    t.x[1] = NAN
    t.x[2] = INF
    valid = torch.arange(ROWS) > 3
    neutral = [
        fast.Edit(0, "add", 0.0),
        fast.Edit(1, "scale", 1.0),
        fast.Edit(2, "clamp_min", -1e9),
        fast.Edit(3, "clamp_max", 1e9),
    ]
    steer = torch.compile(by_features, fullgraph=True) if compiled else by_features
    steered = steer(t, fast.ReLU(), fast.SteeringPlan(EDITS), valid=valid)
    # Inductor computes bfloat16 in float32, and on the way back one NaN becomes another.
    kept = ~valid & ~t.x.isnan().any(-1)
    assert kept.sum() == 3
    assert_same_bits(steered[kept], t.x[kept])
    assert steered[1].isnan().all()
    assert not torch.equal(steered[valid], t.x[valid])
    unchanged = steer(t, fast.ReLU(), fast.SteeringPlan(neutral))
    finite = t.x.isfinite().all(-1)
    assert_same_bits(unchanged[finite], t.x[finite])


@pytest.mark.parametrize("edits", [EDITS, ADDS], ids=["edits", "adds"])
@torch.no_grad()
def test_rows_that_are_no_numbers(edits: list[fast.Edit]) -> None:
    t = make_inputs(Case(D, N, 7, ROWS))
    t.x[1, 3], t.x[2, 5], t.x[4] = NAN, INF, -INF
    plan = fast.SteeringPlan(edits)
    torch.testing.assert_close(
        by_features(t, fast.ReLU(), plan), reference.steer(*t, fast.ReLU(), plan), equal_nan=True
    )


@given(data=st.data())
@torch.no_grad()
def test_any_plan(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(0,), (1,), (17,), (2, 5), (3, 1), (0, 4), (2, 0)]))
    flat = make_inputs(Case(D, N, 7, max(1, torch.Size(shape).numel())), seed=data.draw(st.integers(0, 99)))
    t = flat._replace(x=flat.x[: torch.Size(shape).numel()].reshape(*shape, D))
    edit = st.builds(fast.Edit, st.sampled_from([0, 7, 7, 59]), st.sampled_from(OPS), st.floats(-3, 3))
    direction = st.just(fast.Direction(torch.linspace(1, 2, D), 0.5))
    edits = data.draw(st.lists(st.one_of(edit, direction), min_size=1, max_size=6))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    positions = data.draw(st.sampled_from(["all", "last", mask] if len(shape) > 1 else ["all", mask]))
    valid = data.draw(st.sampled_from([None, mask.roll(1)]))
    strengths = data.draw(st.sampled_from([None, (len(edits),), (*shape, len(edits)), (*[1] * len(shape), len(edits))]))
    if strengths is not None:
        strengths = torch.randn(strengths, generator=torch.Generator().manual_seed(4))
    plan = fast.SteeringPlan(edits, positions=positions, max_relative_norm=data.draw(st.sampled_from([None, 0.3])))
    activation = fast.JumpReLU(0.3)
    steered = by_features(t, activation, plan, strengths, valid)
    expected = reference.steer(*t, activation, plan, strengths=strengths, valid=valid)
    assert steered.data_ptr() != t.x.data_ptr() or t.x.numel() == 0
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)


def test_compiled_code_looks_at_little() -> None:
    """A plan that only adds does not even look at the encoder."""
    sae = fast.SparseAutoencoder(D, N, fast.TopK(7), mean=0.2, std=1.5).eval()
    x = make_inputs(Case(D, N, 7, ROWS)).x
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    steer = torch.compile(lambda x: sae.steer(x, fast.SteeringPlan(ADDS)), backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(steer(x), sae.steer(x, fast.SteeringPlan(ADDS)))
    (graph,) = graphs
    names = " ".join(str(node.name) for node in graph.graph.find_nodes(op="placeholder")).lower()
    assert "w_dec" in names
    assert "w_enc" not in names
    assert "b_enc" not in names
