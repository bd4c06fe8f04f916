from __future__ import annotations

from typing import Any

import pytest
import torch

from saerec_fast.types import BatchTopK, JumpReLU, ReLU, TopK, inference_threshold


def test_inference_thresholds() -> None:
    per_feature = torch.tensor([0.1, 0.2])
    assert inference_threshold(ReLU()) == 0.0
    assert inference_threshold(JumpReLU()) == 0.0
    assert inference_threshold(JumpReLU(0.3)) == 0.3
    assert inference_threshold(JumpReLU(per_feature)) is per_feature
    assert inference_threshold(TopK(3)) is None
    assert inference_threshold(BatchTopK(3, threshold=0.0)) == 0.0
    assert inference_threshold(BatchTopK(3, threshold=0.4)) == 0.4
    with pytest.raises(ValueError, match="BatchTopK needs a threshold at inference"):
        inference_threshold(BatchTopK(3))
    with pytest.raises(TypeError, match="activation: expected ReLU, JumpReLU, TopK or BatchTopK, got str"):
        inference_threshold("relu")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [TopK, BatchTopK])
@pytest.mark.parametrize("k", [0, -1, 2.0, True, "3", None])
def test_k_is_checked(kind: Any, k: Any) -> None:
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got"):
        kind(k)


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_thresholds_are_checked(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold: expected a number >= 0"):
        JumpReLU(threshold)
    with pytest.raises(ValueError, match="threshold: expected a number >= 0 or None"):
        BatchTopK(3, threshold)


def test_thresholds_per_feature_have_one_dimension() -> None:
    with pytest.raises(ValueError, match=r"threshold: .*got shape \(2, 3\)"):
        JumpReLU(torch.zeros(2, 3))
