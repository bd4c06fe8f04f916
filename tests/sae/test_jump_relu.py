"""Trained thresholds: the step against the estimators of the paper in plain autograd."""

from __future__ import annotations

import pytest
import torch

from saerec_fast.sae import SparseAutoencoder
from saerec_fast.sae import step as step_module
from saerec_fast.sae.jump_relu import TrainedThresholds
from saerec_fast.types import JumpReLU

D_MODEL, N_FEATURES, BANDWIDTH = 12, 40, 0.4


def rectangle(u):
    return ((u > -0.5) & (u < 0.5)).to(u)


class Jump(torch.autograd.Function):
    """``pre · H(pre − θ)`` with the pseudo-derivative for ``θ``."""

    @staticmethod
    def forward(ctx, pre, threshold):
        ctx.save_for_backward(pre, threshold)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, gradient):
        pre, threshold = ctx.saved_tensors
        estimate = -(threshold / BANDWIDTH) * rectangle((pre - threshold) / BANDWIDTH) * gradient
        return (pre > threshold) * gradient, estimate.sum(0)


class Step(torch.autograd.Function):
    """``H(pre − θ)`` with the pseudo-derivative for ``θ``."""

    @staticmethod
    def forward(ctx, pre, threshold):
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx, gradient):
        pre, threshold = ctx.saved_tensors
        return None, (-rectangle((pre - threshold) / BANDWIDTH) / BANDWIDTH * gradient).sum(0)


def make(initial=0.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(D_MODEL, N_FEATURES, generator=generator, dtype=dtype)
    encoder = TrainedThresholds(N_FEATURES, initial=initial, bandwidth=BANDWIDTH).to(dtype)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1, generator=generator)
        sae.b_dec.normal_(generator=generator)
        encoder.log_threshold.add_(torch.rand(N_FEATURES, generator=generator, dtype=dtype))
    return sae, encoder


def rows(count, dtype=torch.float64):
    return torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=dtype)


def by_autograd(sae, encoder, z, l0_coefficient):
    parameters = [p.detach().clone().requires_grad_() for p in (*sae.parameters(), *encoder.parameters())]
    W_enc, b_enc, W_dec, b_dec, log_threshold = parameters
    threshold = log_threshold.exp()
    pre = (z - b_dec) @ W_enc.T + b_enc
    a = Jump.apply(pre, threshold)
    residual = a @ W_dec + b_dec - z
    loss = residual.square().sum(1).mean() + l0_coefficient * Step.apply(pre, threshold).sum(1).mean()
    loss.backward()
    return loss, residual, (a > 0).sum(0), [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("initial", [0.05, 0.5], ids=["window_beyond_0", "window_above_0"])
def test_gradients_are_those_of_the_paper(monkeypatch, dtype, initial):
    # The last chunk is a short one.
    monkeypatch.setattr(step_module, "_CHUNK_ELEMENTS", N_FEATURES * 64)
    (sae, encoder), z = make(initial, dtype), rows(150, dtype)
    for parameter in (*sae.parameters(), *encoder.parameters()):
        parameter.grad = torch.full_like(parameter, float("nan"))  # what is there must not matter
    result = encoder.training_step(sae, z, 0.3)
    loss, residual, counts, gradients = by_autograd(sae, encoder, z, 0.3)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(result.loss, loss.detach().double(), **tolerance)
    torch.testing.assert_close(result.residual, residual.detach(), **tolerance)
    assert torch.equal(result.counts, counts)
    assert (gradients[-1] != 0).double().mean() > 0.9
    for parameter, expected in zip((*sae.parameters(), *encoder.parameters()), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, **tolerance)


def test_the_penalty_moves_thresholds_only():
    (sae, encoder), z = make(), rows(100)
    encoder.training_step(sae, z, 0.0)
    free = [parameter.grad.clone() for parameter in sae.parameters()]
    without = encoder.log_threshold.grad.clone()
    encoder.training_step(sae, z, 10.0)
    assert all(torch.equal(parameter.grad, kept) for parameter, kept in zip(sae.parameters(), free, strict=True))
    # A descent step raises every threshold that some pre-activation is near.
    raised = encoder.log_threshold.grad < without
    assert raised.double().mean() > 0.9
    assert torch.equal(encoder.log_threshold.grad[~raised], without[~raised])


def test_the_autoencoder_gets_the_thresholds():
    (sae, encoder), z = make(), rows(50)
    expected = encoder.training_step(sae, z, 0.3)
    encoder.finish(sae)
    assert isinstance(sae.activation, JumpReLU)
    torch.testing.assert_close(sae.threshold, encoder.log_threshold.detach().exp())
    torch.testing.assert_close(sae.eval()(z).detach() - z, expected.residual)
    assert torch.equal(torch.bincount(sae.encode(z).indices, minlength=N_FEATURES), expected.counts)
