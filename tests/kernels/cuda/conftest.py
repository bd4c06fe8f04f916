from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import emulation
import pytest
import torch
from cases import Inputs
from helpers import moved
from torch import Tensor

import saerec_fast as fast
from saerec_fast import ops, reference
from saerec_fast.kernels import cuda
from saerec_fast.types import Activation, TopK
from saerec_fast.types.activations import inference_threshold

# Set by `make gpu`: a missing GPU then fails the tests that need it instead of skipping them.
GPU_REQUIRED = os.environ.get("SAEREC_REQUIRE_GPU") == "1"


@dataclass
class Kernel:
    """The kernel of kernels.cuda with the arguments of ``saerec_fast.steer``, from and to tensors on the CPU."""

    device: str
    emulation: emulation.Emulation | None = None

    def steer(
        self,
        inputs: Inputs,
        activation: Activation,
        plan: fast.SteeringPlan,
        strengths: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        batch_shape = inputs.x.shape[:-1]
        tensors = [None if tensor is None else moved(tensor, self.device) for tensor in inputs]  # biases may be absent
        values = torch.tensor(plan.values, dtype=torch.float32) if strengths is None else strengths
        if values.dim() > 1:
            values = values.expand(*batch_shape, len(plan.edits)).reshape(math.prod(batch_shape), len(plan.edits))
        mask = reference.steered_positions(plan, batch_shape, valid, torch.device("cpu"))
        x, W_enc, b_enc, b_dec, W_dec = tensors
        out = cuda.steer(
            x.reshape(-1, x.shape[-1]),
            W_enc,
            b_enc,
            b_dec,
            W_dec,
            None if isinstance(activation, TopK) else moved(threshold_of(activation), self.device),
            activation.k if isinstance(activation, TopK) else 0,
            plan.mode == "reconstruct",
            [edit.feature for edit in plan.edits],
            [ops.EDIT_CODES[edit.op] for edit in plan.edits],
            moved(values, self.device),
            None if mask is None else moved(mask.reshape(-1), self.device),
        )
        return out.view(inputs.x.shape).cpu()


def threshold_of(activation: Activation) -> Tensor:
    return torch.as_tensor(inference_threshold(activation), dtype=torch.float32).reshape(-1)


@pytest.fixture(scope="session")
def emulated_library() -> object:
    if emulation.compiler() is None:
        pytest.fail("a C++ compiler is needed to build the emulation with, as for the extension")
    return emulation.build()


@pytest.fixture
def emulated(emulated_library, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    extension = emulation.Emulation(emulated_library)
    monkeypatch.setattr(cuda, "_extension", extension)
    monkeypatch.setattr(cuda, "_current_stream", lambda device: 0)
    return Kernel("cpu", extension)


@pytest.fixture
def lacking() -> Callable[[str], NoReturn]:
    """For what a machine may lack."""
    return pytest.fail if GPU_REQUIRED else pytest.skip


@pytest.fixture
def on_device(lacking: Callable[[str], NoReturn]) -> Kernel:
    problem = cuda.available()
    if problem:
        lacking(problem)
    return Kernel("cuda")


@pytest.fixture(params=["emulated", "on_device"] if GPU_REQUIRED or not cuda.available() else ["emulated"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.getfixturevalue(request.param)
