"""Every op against the float64 reference on the CPU: in triton's interpreter, and compiled where `make gpu` runs it.

On integers all sums are exact, so that results on a GPU have the same bits in whatever order it adds.
"""

from __future__ import annotations

import os

import pytest
import torch
from cases import DTYPES, Case, Inputs
from helpers import assert_equal
from test_triton_ops import ACTIVATIONS, GRADIENTS, all_edits, differentiable_ops
from triton_cases import TWO_PASS_CASES, integer_inputs, integers

import saerec_fast as fast
from saerec_fast import reference

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# The interpreter, whose tests are the other files here, has time for no more than to show that this one is right.
SMALL = Case(9, 130, 16, 4)
LARGE_CASES = [Case(64, 2048, 32, 1000, dtype) for dtype in DTYPES] if DEVICE == "cuda" else []
TOP_K_CASES = [SMALL, *TWO_PASS_CASES, *LARGE_CASES] if DEVICE == "cuda" else [SMALL]
STEERED_DTYPES = DTYPES if DEVICE == "cuda" else DTYPES[1:2]
DIFFERENTIATED = GRADIENTS if DEVICE == "cuda" else GRADIENTS[::4]


def on_device(inputs: Inputs) -> Inputs:
    return Inputs(*(tensor.to(DEVICE) for tensor in inputs))


@pytest.mark.parametrize("case", TOP_K_CASES, ids=str)
def test_top_k(case: Case) -> None:
    inputs = integer_inputs(case)
    result = fast.encode_topk(*on_device(inputs)[:4], k=case.k, backend="triton")
    expected = reference.encode_topk(*inputs.to(torch.float64)[:4], k=case.k)
    assert_equal(result.indices.cpu(), expected.indices)
    assert_equal(result.values.cpu(), expected.values.to(case.dtype))


@pytest.mark.parametrize("name", ["relu", "topk"])
@pytest.mark.parametrize("case", [SMALL, *LARGE_CASES], ids=str)
def test_reconstruct(case: Case, name: str) -> None:
    inputs = integer_inputs(case)
    out = fast.reconstruct(*on_device(inputs), ACTIVATIONS[name], backend="triton")
    expected = reference.reconstruct(*inputs.to(torch.float64), ACTIVATIONS[name])
    if case.dtype == torch.float32:
        assert_equal(out.cpu(), expected.to(case.dtype))
    else:  # activations beyond what 16 bits hold exactly
        torch.testing.assert_close(out.cpu().double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("name", ["relu", "topk"])
@pytest.mark.parametrize("dtype", STEERED_DTYPES, ids=str)
def test_steer(dtype: torch.dtype, name: str, mode: str) -> None:
    inputs, plan = integer_inputs(Case(9, 130, 16, 4, dtype)), fast.SteeringPlan(all_edits(130), mode)
    out = fast.steer(*on_device(inputs), ACTIVATIONS[name], plan, backend="triton")
    assert_equal(out.cpu(), reference.steer(*inputs.to(torch.float64), ACTIVATIONS[name], plan).to(dtype))


@pytest.mark.parametrize(("name", "dtype"), DIFFERENTIATED, ids=str)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(9, 70, 16, 5, dtype))
    found: list[tuple[torch.Tensor | None, ...]] = []
    for module, options, of in (
        (fast, {"backend": "triton"}, on_device(inputs)),
        (reference, {}, inputs.to(torch.float64)),
    ):
        leaves = Inputs(*(tensor.clone().requires_grad_() for tensor in of))
        with torch.device(leaves.x.device):  # of the tensors that the op is given besides
            out = differentiable_ops(module, options)[name](leaves)
        cotangent = integers(*out.shape, low=-1, high=1, seed=4).to(out)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, cotangent, allow_unused=True)))
    for field, actual, expected in zip(("out", *Inputs._fields), *found, strict=True):
        if actual is None or expected is None:
            assert actual is None or not actual.any(), field
            assert expected is None or not expected.any(), field
            continue
        # In 16 bits what passes between two kernels is rounded there, on the way back as in eager PyTorch.
        tolerance = 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(
            actual.cpu(), expected.to(dtype), rtol=0, atol=tolerance, msg=lambda text, f=field: f"{f}: {text}"
        )
