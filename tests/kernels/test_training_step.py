"""The step after the encoder against autograd through the float64 reference, and its twin."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from cases import KERNEL_CASES, Case, make_inputs
from helpers import assert_no_worse, assert_same_bits, torch_threads
from torch import Tensor

from saerec_fast import reference
from saerec_fast.kernels import cpu

pytestmark = pytest.mark.usefixtures("isa")


class Step(NamedTuple):
    """Arguments of a step, in the order of the operator."""

    x: Tensor
    offsets: Tensor
    indices: Tensor
    values: Tensor
    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor | None
    scale: float
    penalty: float

    def to(self, dtype: torch.dtype) -> Step:
        return Step(*(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in self))


OUTPUTS = ("sums", "counts", "residual", "W_enc", "b_enc", "W_dec", "b_dec")


def make_step(case: Case, ragged: bool = False) -> Step:
    """Rows of ``case.k`` entries, or of 0 to k; every third activation is 0."""
    inputs = make_inputs(case)
    generator = torch.Generator().manual_seed(7)
    counts = torch.full((case.rows,), case.k)
    if ragged:
        counts = torch.randint(0, case.k + 1, (case.rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    chosen = [torch.randperm(case.n, generator=generator)[:count] for count in counts.tolist()]
    indices = torch.cat([*chosen, torch.empty(0, dtype=torch.int64)]).int()
    values = torch.rand(len(indices), generator=generator) + 0.1
    values[::3] = 0
    return Step(
        inputs.x,
        offsets,
        indices,
        values.to(case.dtype),
        inputs.W_enc,
        inputs.W_dec,
        inputs.b_dec,
        2 / max(case.rows, 1),
        0.03,
    )


def run(module, step: Step) -> dict[str, Tensor]:
    return dict(zip(OUTPUTS, module.sparse_training_step(*step), strict=True))


def check(step: Step) -> None:
    actual, plain, truth = run(cpu, step), run(reference, step), run(reference, step.to(torch.float64))
    assert torch.equal(actual["counts"], truth["counts"])
    torch.testing.assert_close(
        actual["sums"], truth["sums"], rtol=1e-5 if step.x.dtype == torch.float32 else 1e-4, atol=0
    )
    for name in OUTPUTS[2:]:
        assert actual[name].dtype == step.x.dtype
        assert_no_worse(actual[name], plain[name], truth[name], factor=3)


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_against_the_reference(case: Case) -> None:
    check(make_step(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_length(dtype: torch.dtype) -> None:
    check(make_step(Case(80, 61, 50, 200, dtype), ragged=True))


def test_packed_and_unpacked_decoders() -> None:
    # Several panels: few entries read the decoder in place, many a packed copy; above 4096 features panels are narrow.
    for d, n, k, rows in [(128, 50, 1, 100), (128, 50, 40, 100), (130, 4100, 60, 300), (96, 4100, 2, 30)]:
        check(make_step(Case(d, n, k, rows)))


def test_reference_is_autograd_of_the_loss() -> None:
    step = make_step(Case(9, 30, 7, 40)).to(torch.float64)
    x, _, indices, _, W_enc, W_dec, b_dec, scale, penalty = step
    leaves = [t.clone().requires_grad_() for t in (W_enc, torch.zeros(30, dtype=torch.float64), W_dec, b_dec)]
    pre = reference.pre_activations(x, leaves[0], leaves[1], leaves[3])
    rows = torch.arange(40).repeat_interleave(7)
    values = pre[rows, indices.long()].relu()
    activations = torch.zeros(40, 30, dtype=torch.float64).index_put((rows, indices.long()), values)
    loss = scale / 2 * (activations @ leaves[2] + leaves[3] - x).square().sum() + penalty * activations.sum()
    expected = torch.autograd.grad(loss, leaves)
    got = run(reference, step._replace(values=values.detach()))
    for name, gradient in zip(OUTPUTS[3:], expected, strict=True):
        torch.testing.assert_close(got[name], gradient)
    assert scale / 2 * got["sums"][0] + penalty * got["sums"][1] == pytest.approx(loss.item())


@pytest.mark.parametrize("case", [Case(64, 300, 32, 1500), Case(100, 40, 30, 700)], ids=str)
def test_threads_do_not_change_bits(case: Case) -> None:
    step = make_step(case, ragged=True)
    alone = run(cpu, step)
    for threads in (2, 4):
        with torch_threads(threads):
            together = run(cpu, step)
        for name in OUTPUTS:
            assert_same_bits(together[name], alone[name])


def test_features_that_never_fire_have_no_gradient() -> None:
    step = make_step(Case(20, 40, 5, 30))
    step = step._replace(indices=step.indices % 5 + torch.arange(5, dtype=torch.int32).repeat(30) * 5)
    result = run(cpu, step)
    silent = result["counts"] == 0
    assert silent.sum() >= 15
    for name in ("W_enc", "b_enc", "W_dec"):
        assert not result[name][silent].any()


def test_a_row_that_is_not_finite_reaches_its_own_features_only() -> None:
    step = make_step(Case(20, 200, 5, 12))
    clean = run(cpu, step)
    for bad in (float("nan"), float("inf")):
        x, values = step.x.clone(), step.values.clone()
        x[3, 4], values[15] = bad, bad
        result = run(cpu, step._replace(x=x, values=values))
        own = torch.zeros(200, dtype=torch.bool)
        own[step.indices[15:20].long()] = True
        assert not result["sums"].isfinite().any()
        assert not result["W_dec"][step.indices[15]].isfinite().all()
        assert not result["b_dec"].isfinite().all()
        for name in ("W_enc", "b_enc", "W_dec"):
            assert_same_bits(result[name][~own], clean[name][~own])


def test_indices_views_and_no_bias() -> None:
    step = make_step(Case(33, 50, 6, 20))
    expected = run(cpu, step)
    views = step._replace(
        x=step.x.T.contiguous().T,
        W_enc=step.W_enc.T.contiguous().T,
        W_dec=torch.stack([step.W_dec, step.W_dec], 1)[:, 0],
        values=torch.stack([step.values, step.values], 1)[:, 0],
        indices=step.indices.long(),
    )
    result = run(cpu, views)
    for name in OUTPUTS:
        assert_same_bits(result[name], expected[name])
    check(step._replace(b_dec=None))


def test_results_go_where_they_are_asked_to() -> None:
    step = make_step(Case(33, 50, 6, 20))
    expected = cpu.sparse_training_step(*step)
    out = tuple(torch.full_like(tensor, 7) for tensor in expected[2:])
    sums, counts, *results = cpu.sparse_training_step(*step, out=out)
    for tensor, result, same in zip(out, results, expected[2:], strict=True):
        assert tensor is result
        assert_same_bits(tensor, same)
    assert_same_bits(sums, expected[0])
    assert_same_bits(counts, expected[1])
