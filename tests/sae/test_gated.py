"""The gate: the step against the loss of the paper in plain autograd; folding."""

from __future__ import annotations

import pytest
import torch

from saerec_fast.sae import SparseAutoencoder, evaluate_sae
from saerec_fast.sae import step as step_module
from saerec_fast.sae.gated import Gate
from saerec_fast.types import JumpReLU

D_MODEL, N_FEATURES = 12, 40


def make(dtype=torch.float64):
    """Biases of both signs, so that some gates are open where the magnitude is 0."""
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(D_MODEL, N_FEATURES, generator=generator, dtype=dtype)
    gate = Gate(N_FEATURES).to(dtype)
    with torch.no_grad():
        for tensor, std in ((sae.b_enc, 0.5), (sae.b_dec, 1.0), (gate.r_mag, 0.5), (gate.b_gate, 0.5)):
            tensor.normal_(std=std, generator=generator)
    return sae, gate


def rows(count, dtype=torch.float64):
    return torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gated_forward(z, W_enc, b_mag, W_dec, b_dec, r_mag, b_gate):
    """Gate pre-activations, activations and reconstruction, as in the paper."""
    centred = z - b_dec
    gate = centred @ W_enc.T + b_gate
    magnitude = centred @ (W_enc * r_mag.exp()[:, None]).T + b_mag
    a = (gate > 0) * magnitude.relu()
    return gate, a, a @ W_dec + b_dec


def by_autograd(sae, gate, z, l1_coefficient):
    parameters = [p.detach().clone().requires_grad_() for p in (*sae.parameters(), *gate.parameters())]
    W_dec, b_dec = parameters[2:4]
    pre, a, reconstruction = gated_forward(z, *parameters)
    l1 = pre.relu().sum(1).mean()
    auxiliary = pre.relu() @ W_dec.detach() + b_dec.detach() - z
    residual = reconstruction - z
    loss = residual.square().sum(1).mean() + l1_coefficient * l1 + auxiliary.square().sum(1).mean()
    loss.backward()
    return loss, l1, residual, (a > 0).sum(0), [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("dense_above", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_those_of_the_paper(monkeypatch, dtype, dense_above):
    monkeypatch.setattr(step_module, "_DENSE_ABOVE", dense_above)
    (sae, gate), z = make(dtype), rows(150, dtype)
    for parameter in (*sae.parameters(), *gate.parameters()):
        parameter.grad = torch.full_like(parameter, float("nan"))  # what is there must not matter
    result = gate.training_step(sae, z, 0.3)
    loss, l1, residual, counts, gradients = by_autograd(sae, gate, z, 0.3)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(result.loss, loss.detach().double(), **tolerance)
    torch.testing.assert_close(result.l1, l1.detach().double(), **tolerance)
    torch.testing.assert_close(result.residual, residual.detach(), **tolerance)
    assert torch.equal(result.counts, counts)
    for parameter, expected in zip((*sae.parameters(), *gate.parameters()), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, **tolerance)


def test_folding_keeps_every_output():
    (sae, gate), z = make(), rows(500)
    sae.set_normalization(3.0, 2.0)
    parameters = [parameter.detach().clone() for parameter in (*sae.parameters(), *gate.parameters())]
    pre, a, reconstruction = gated_forward(z, *parameters)
    assert ((pre > 0) & (a == 0)).any()
    assert ((pre <= 0) & (parameters[1] > 0)).any()
    gate.finish(sae)
    sae.eval()
    assert isinstance(sae.activation, JumpReLU)
    x = z * 2 + 3
    torch.testing.assert_close(sae.encode(x).dense().detach(), a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sae(x).detach(), reconstruction * 2 + 3, rtol=1e-9, atol=1e-12)
    assert evaluate_sae(sae, [x])["l0"] == pytest.approx(float((a > 0).sum(1).double().mean()))
