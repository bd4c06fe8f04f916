"""Encode + decode beside what a user would pick instead, in one run: eager PyTorch, and the bare encoder matmul.

``make bench`` runs them. Random Gaussian data; every case is checked against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BENCHMARK_CASES, Case, Inputs, make_inputs
from torch import Tensor

import saerec_fast as sf

# Two standard deviations of a score: about 2 % of the features fire.
THRESHOLD = 2.0


def topk_fused(inputs: Inputs, case: Case) -> Tensor:
    features = sf.encode_topk(inputs.x, inputs.W_enc, inputs.b_enc, inputs.b_dec, k=case.k)
    return sf.decode_sparse(features, inputs.W_dec, inputs.b_dec)


def topk_eager(inputs: Inputs, case: Case) -> Tensor:
    values, indices = torch.addmm(inputs.b_enc, inputs.x - inputs.b_dec, inputs.W_enc.T).topk(case.k)
    decoded = torch.nn.functional.embedding_bag(indices, inputs.W_dec, per_sample_weights=values.relu(), mode="sum")
    return decoded + inputs.b_dec


def threshold_fused(inputs: Inputs, case: Case) -> Tensor:
    features = sf.encode_threshold(inputs.x, inputs.W_enc, inputs.b_enc, inputs.b_dec, THRESHOLD)
    return sf.decode_sparse(features, inputs.W_dec, inputs.b_dec)


def threshold_eager(inputs: Inputs, case: Case) -> Tensor:
    pre = torch.addmm(inputs.b_enc, inputs.x - inputs.b_dec, inputs.W_enc.T)
    return torch.where(pre > THRESHOLD, pre, 0) @ inputs.W_dec + inputs.b_dec


def encoder_matmul(inputs: Inputs, case: Case) -> Tensor:
    return torch.addmm(inputs.b_enc, inputs.x, inputs.W_enc.T)


TOPK: dict[str, Callable[[Inputs, Case], Tensor]] = {
    "saerec_fast": topk_fused,
    "eager": topk_eager,
    "addmm_alone": encoder_matmul,
}
THRESHOLDED: dict[str, Callable[[Inputs, Case], Tensor]] = {
    "saerec_fast": threshold_fused,
    "eager": threshold_eager,
    "addmm_alone": encoder_matmul,
}


@pytest.mark.parametrize("way", TOPK)
@pytest.mark.parametrize("case", BENCHMARK_CASES, ids=str)
def test_topk(benchmark: Any, case: Case, way: str) -> None:
    time_one(benchmark, f"top-k, {case}", TOPK[way], case, sf.TopK(case.k))


@pytest.mark.parametrize("way", THRESHOLDED)
@pytest.mark.parametrize("case", BENCHMARK_CASES, ids=str)
def test_threshold(benchmark: Any, case: Case, way: str) -> None:
    time_one(benchmark, f"threshold, {case}", THRESHOLDED[way], case, sf.JumpReLU(THRESHOLD))


def time_one(
    benchmark: Any, group: str, way: Callable[[Inputs, Case], Tensor], case: Case, activation: sf.TopK | sf.JumpReLU
) -> None:
    inputs = make_inputs(case)
    benchmark.group = group
    with torch.inference_mode():
        if way is not encoder_matmul:
            checked = inputs._replace(x=inputs.x[:256])
            truth = sf.reference.reconstruct(*(tensor.double() for tensor in checked), activation)
            torch.testing.assert_close(way(checked, case).double(), truth, rtol=1e-4, atol=1e-4)
        benchmark.pedantic(way, args=(inputs, case), rounds=15, iterations=1, warmup_rounds=3)
