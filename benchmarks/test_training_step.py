"""Forward pass, loss and backward pass of an SAE in training, on random data and on the run's hidden states."""

from __future__ import annotations

from typing import Any

import pytest
from ways import STEP_RELU, STEP_TOPK
from workloads import training_cases


@pytest.mark.parametrize("way", STEP_TOPK)
@pytest.mark.parametrize(("case", "threads"), training_cases("topk"))
def test_step_topk(measure: Any, case: Any, threads: int, way: str) -> None:
    measure("step_topk", case, threads, way)


@pytest.mark.parametrize("way", STEP_RELU)
@pytest.mark.parametrize(("case", "threads"), training_cases("relu"))
def test_step_relu(measure: Any, case: Any, threads: int, way: str) -> None:
    measure("step_relu", case, threads, way)
