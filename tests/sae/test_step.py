"""The fused step against autograd, for every activation; the optimiser beside torch's."""

from __future__ import annotations

import pytest
import torch

from saerec_fast import ops
from saerec_fast.sae import Adam, SparseAutoencoder, training_step
from saerec_fast.sae import step as step_module
from saerec_fast.types import BatchTopK, JumpReLU, ReLU, TopK

D_MODEL, N_FEATURES = 20, 70
ACTIVATIONS = [ReLU(), JumpReLU(0.3), TopK(6), BatchTopK(6)]


def make(activation, dtype=torch.float32):
    sae = SparseAutoencoder(
        D_MODEL, N_FEATURES, activation, mean=3.0, std=2.0, generator=torch.Generator().manual_seed(0), dtype=dtype
    )
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
        sae.W_enc.add_(torch.randn(N_FEATURES, D_MODEL) * 0.1)
    return sae


def rows(count, dtype=torch.float32):
    return torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def by_autograd(sae, z, l1):
    plain = SparseAutoencoder(D_MODEL, N_FEATURES, sae.activation, dtype=z.dtype)
    with torch.no_grad():
        for parameter, source in zip(plain.parameters(), sae.parameters(), strict=True):
            parameter.copy_(source)
    features = plain.encode(z)
    residual = plain.decode(features) - z
    size = max(len(z), 1)
    (residual.square().sum() / size + l1 * features.values.sum() / size).backward()
    return features, residual.detach(), [parameter.grad for parameter in plain.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [0, 1, 200])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_gradients_are_those_of_autograd(activation, count, dtype):
    sae, z = make(activation, dtype), rows(count, dtype)
    for parameter in sae.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))  # what is there must not matter
    result = training_step(sae, z, l1_coefficient=0.1)
    features, residual, gradients = by_autograd(sae, z, 0.1)
    torch.testing.assert_close(result.residual, residual, rtol=1e-5, atol=1e-5)
    if result.features is not None:
        assert torch.equal(result.features.indices, features.indices)
    active = features.indices[features.values > 0].long()
    assert torch.equal(result.counts, torch.bincount(active, minlength=N_FEATURES))
    size = max(count, 1)
    assert result.reconstruction_loss.item() == pytest.approx(residual.square().sum().item() / size, rel=1e-5)
    assert result.l1.item() == pytest.approx(features.values.sum().item() / size, rel=1e-5)
    for parameter, expected in zip(sae.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)
    kept = [parameter.grad for parameter in sae.parameters()]
    training_step(sae, z)
    assert all(parameter.grad is gradient for parameter, gradient in zip(sae.parameters(), kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_and_sparse_steps_agree(monkeypatch, dtype):
    monkeypatch.setattr(step_module, "_CHUNK_ELEMENTS", N_FEATURES * 40)
    sae, z = make(ReLU(), dtype), rows(100, dtype)
    results = []
    for bound in (0.0, 1.0):
        monkeypatch.setattr(step_module, "_DENSE_ABOVE", bound)
        results.append((training_step(sae, z, l1_coefficient=0.1), [p.grad.clone() for p in sae.parameters()]))
    (dense, dense_gradients), (sparse, gradients) = results
    assert dense.features is None
    assert sparse.features is not None
    for name in ("reconstruction_loss", "l1", "counts", "residual"):
        torch.testing.assert_close(getattr(dense, name), getattr(sparse, name), rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(dense_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_relu_step_is_dense_above_a_density_only():
    sae, z = make(ReLU()), rows(500)
    for bias, dense in ((-3.0, False), (0.0, True), (-2.0, False)):
        with torch.no_grad():
            sae.b_enc.fill_(bias)
        result = training_step(sae, z)
        assert (result.features is None) == dense
        assert (result.counts.sum() / (500 * N_FEATURES) > step_module._DENSE_ABOVE) == dense


def test_steps_do_not_depend_on_torch_having_gradients_on():
    sae, z = make(TopK(6)), rows(30)
    training_step(sae, z)
    expected = sae.W_dec.grad.clone()
    sae.zero_grad()
    with torch.no_grad():
        training_step(sae, z)
    assert torch.equal(sae.W_dec.grad, expected)


def test_arguments_are_checked():
    sae = make(TopK(6))
    with pytest.raises(ValueError, match="z: expected shape"):
        training_step(sae, rows(4)[0])
    with pytest.raises(ValueError, match="x"):
        training_step(sae, torch.zeros(3, D_MODEL + 1))
    with pytest.raises(TypeError):
        training_step(sae, rows(4, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adam_is_torch_adam_with_a_normalised_decoder(dtype):
    sae, other, z = make(TopK(6), dtype), make(TopK(6), dtype), rows(200, dtype)
    other.load_state_dict(sae.state_dict())
    ours = Adam(sae, lr=1e-2)
    theirs = torch.optim.Adam(other.parameters(), lr=1e-2, fused=True)
    before = sae.W_enc._version
    for _ in range(100):
        training_step(sae, z)
        for parameter, source in zip(other.parameters(), sae.parameters(), strict=True):
            parameter.grad = source.grad.clone()
        other.remove_parallel_gradient_()
        theirs.step()
        other.normalize_decoder_()
        ours.step()
    # Where a gradient is nothing but the rounding of what was taken out, Adam divides it by eps = 1e-8.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-7}
    for parameter, expected in zip(sae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, **tolerance)
    assert sae.W_enc._version > before
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_FEATURES, dtype=dtype))
    # The state has torch's layout.
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()
    assert ours.state_dict()["state"][0].keys() == theirs.state_dict()["state"][0].keys()
    theirs.load_state_dict({**theirs.state_dict(), "state": ours.state_dict()["state"]})


def test_adam_follows_its_arguments():
    sae = make(TopK(6))
    for options, message in (({"lr": -1}, "lr"), ({"betas": (0.9, 1.0)}, "betas"), ({"eps": float("nan")}, "eps")):
        with pytest.raises(ValueError, match=f"{message}: expected"):
            Adam(sae, **options)
    optimizer = Adam(sae)
    state = [parameter.clone() for parameter in sae.parameters()]
    optimizer.step()  # no gradients: nothing to do
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), state, strict=True))

    def closure():
        return training_step(sae, rows(20)).reconstruction_loss

    losses = [float(optimizer.step(closure)) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_the_operator_compiles():
    x, offsets = rows(4), ops.uniform_offsets(4, 2, torch.device("cpu"))
    sae = make(TopK(2))
    arguments = (x, offsets, torch.arange(8).int(), torch.rand(8), sae.W_enc, sae.W_dec, sae.b_dec, 0.5, 0.1)
    arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    step = torch.ops.saerec_fast.sparse_training_step
    compiled = torch.compile(lambda *a: step(*a), backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(got, expected)
