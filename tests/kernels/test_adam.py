"""Adam against torch's own, its twin in PyTorch, and float64."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits, torch_threads

from saerec_fast import reference
from saerec_fast.kernels import cpu

pytestmark = pytest.mark.usefixtures("isa")

SETTINGS = (1e-2, (0.9, 0.999), 1e-8)


def start(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parameter = torch.nn.functional.normalize(torch.randn(shape), dim=-1).to(dtype)
    return parameter, torch.zeros_like(parameter), torch.zeros_like(parameter)


def gradient_at(step: int, shape: torch.Size) -> torch.Tensor:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
    gradient[torch.rand(shape[0], generator=torch.Generator().manual_seed(step)) < 0.3] = 0
    return gradient * 10.0 ** (step % 7 - 4)


@pytest.mark.parametrize("shape", [(40, 64), (7, 33), (3, 1), (0, 5), (129,), (1,)], ids=str)
def test_300_steps_of_torch(shape: tuple[int, ...], isa: str) -> None:
    parameter, exp_avg, exp_avg_sq = start(*shape)
    theirs = torch.nn.Parameter(parameter.clone())
    optimizer = torch.optim.Adam([theirs], lr=SETTINGS[0], fused=True)
    for step in range(1, 301):
        gradient = gradient_at(step, parameter.shape)
        theirs.grad = gradient.clone()
        optimizer.step()
        cpu.adam_step(parameter, gradient, exp_avg, exp_avg_sq, step, *SETTINGS, False)
    if parameter.numel() == 0:
        return
    state = optimizer.state[theirs]
    torch.testing.assert_close(exp_avg, state["exp_avg"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exp_avg_sq, state["exp_avg_sq"], rtol=1e-5, atol=0)
    torch.testing.assert_close(parameter, theirs.detach(), rtol=1e-5, atol=2e-6)
    # torch has its vector code for whole vectors only, and fuses multiplications and additions in it.
    if isa != "scalar" and shape == (40, 64) and torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert_same_bits(parameter, theirs.detach())
        assert_same_bits(exp_avg, state["exp_avg"])
        assert_same_bits(exp_avg_sq, state["exp_avg_sq"])


@pytest.mark.parametrize("shape", [(40, 64), (7, 33), (30, 200), (3, 1)], ids=str)
def test_unit_rows_against_float64(shape: tuple[int, int]) -> None:
    ours, plain = start(*shape), None
    plain = tuple(tensor.clone() for tensor in ours)
    truth = tuple(tensor.double() for tensor in ours)
    for step in range(1, 101):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        cpu.adam_step(ours[0], gradient, *ours[1:], step, *SETTINGS, True)
        reference.adam_step(plain[0], gradient, *plain[1:], step, *SETTINGS, True)
        reference.adam_step(truth[0], gradient.double(), *truth[1:], step, *SETTINGS, True)
    torch.testing.assert_close(ours[0].norm(dim=1), torch.ones(shape[0]))
    for actual, twin, expected in zip(ours, plain, truth, strict=True):
        error, plain_error = ((t.double() - expected).abs().max() for t in (actual, twin))
        assert error <= 3 * plain_error + 1e-6


@pytest.mark.parametrize("unit_rows", [False, True])
def test_rows_that_never_had_a_gradient_keep_their_bits(unit_rows: bool) -> None:
    parameter, exp_avg, exp_avg_sq = start(20, 24)
    parameter[3] *= 2  # would be scaled to unit norm
    before, gradient = parameter.clone(), torch.randn(20, 24)
    gradient[[3, 7]] = 0
    gradient[7, 3] = -0.0
    cpu.adam_step(parameter, gradient, exp_avg, exp_avg_sq, 1, *SETTINGS, unit_rows)
    same = (parameter == before).all(1)
    assert same.nonzero().flatten().tolist() == [3, 7]
    # Moments alone move a row.
    cpu.adam_step(parameter, torch.zeros(20, 24), exp_avg, exp_avg_sq, 2, *SETTINGS, unit_rows)
    assert not (parameter == before).all(1)[[0, 1]].any()
    gradient[3, 5] = float("nan")
    cpu.adam_step(parameter, gradient, exp_avg, exp_avg_sq, 3, *SETTINGS, unit_rows)
    assert parameter[3].isnan().any()


def test_rows_of_zeros_stay() -> None:
    parameter, exp_avg, exp_avg_sq = torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5)
    exp_avg_sq += 1
    cpu.adam_step(parameter, torch.zeros(2, 5), exp_avg, exp_avg_sq, 1, *SETTINGS, True)
    assert torch.equal(parameter, torch.zeros(2, 5))


@pytest.mark.parametrize("unit_rows", [False, True])
def test_threads_do_not_change_bits(unit_rows: bool) -> None:
    first, gradient, results = start(3000, 70), torch.randn(3000, 70), []
    for threads in (1, 2, 4):
        tensors = [tensor.clone() for tensor in first]
        with torch_threads(threads):
            cpu.adam_step(tensors[0], gradient, *tensors[1:], 1, *SETTINGS, unit_rows)
        results.append(tensors)
    for tensors in results[1:]:
        for tensor, same in zip(tensors, results[0], strict=True):
            assert_same_bits(tensor, same)
