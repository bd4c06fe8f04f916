"""Encode + decode of an SAE, on random data and on hidden states of a trained recommender with its own SAE."""

from __future__ import annotations

from typing import Any

import pytest
from ways import RELU, TOPK
from workloads import THREADS, sae_cases


@pytest.mark.parametrize("way", TOPK)
@pytest.mark.parametrize("threads", THREADS, ids="threads{}".format)
@pytest.mark.parametrize("case", sae_cases("topk"), ids=str)
def test_topk(measure: Any, case: Any, threads: int, way: str) -> None:
    measure("topk", case, threads, way)


@pytest.mark.parametrize("way", RELU)
@pytest.mark.parametrize("threads", THREADS, ids="threads{}".format)
@pytest.mark.parametrize("case", sae_cases("relu"), ids=str)
def test_relu(measure: Any, case: Any, threads: int, way: str) -> None:
    measure("relu", case, threads, way)
