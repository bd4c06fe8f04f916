"""OpenAI's design of benchmarks/gpu_openai.py, a baseline of `make gpu`, against plain PyTorch in float64."""

from __future__ import annotations

import gpu_openai
import pytest
import torch
import ways
from cases import Case, Inputs
from triton_cases import on_device

# Widths on both sides of a power of two; more entries than a program of the sorted sum takes; most features off. In
# bfloat16, where rounded scores select others, all features.
CASES = [Case(1, 5, 1, 1), Case(17, 40, 7, 40), Case(64, 130, 16, 20), Case(17, 20, 20, 30, torch.bfloat16)]
NAMES = ("out", "loss", "W_enc", "b_enc", "b_dec", "W_dec")


def exact_inputs(case: Case) -> Inputs:
    """Small integers, so that no order of additions rounds in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(case.dtype)

    # Distinct biases: ties would let another top-k be as right.
    bias = (torch.arange(case.n) / 256).to(case.dtype)
    return Inputs(draw(case.rows, case.d), draw(case.n, case.d), bias, draw(case.d), draw(case.n, case.d))


def loss_and_gradients(step: ways.Step, x: torch.Tensor) -> list[torch.Tensor]:
    return [step(x), *step.gradients()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case) -> None:
    inputs = exact_inputs(case)
    exact = inputs.to(torch.float64)
    found = [on_device(lambda t: gpu_openai.forward(t, case.k)(t.x), inputs)]
    truth = [ways.TOPK["eager_bag"].build(exact, case.k)(exact.x)]
    found += on_device(lambda t: loss_and_gradients(gpu_openai.step(t, case.k), t.x), inputs)
    truth += loss_and_gradients(ways.STEP_TOPK["eager_bag"].build(exact, case.k), exact.x)
    tolerance = 1e-6 if case.dtype == torch.float32 else 0.01
    for name, actual, expected in zip(NAMES, found, truth, strict=True):
        assert actual.dtype == case.dtype, name
        error = float((actual.double() - expected).norm() / expected.norm())
        assert error <= tolerance, f"{name}: {error}"


def test_entries_that_are_off_are_skipped() -> None:
    """A feature that is off must not spread the NaN of its weights."""
    weight = torch.ones(3, 2)
    weight[1] = float("nan")
    indices, values = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert on_device(gpu_openai.decode, indices, values, weight).tolist() == [[2.0, 2.0], [3.0, 3.0]]
