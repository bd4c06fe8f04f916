"""Training: gradients, recovery of planted features, resuming to the bit, dead features, evaluation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from saerec_fast import reference
from saerec_fast.sae import (
    ActivationStore,
    SAETrainingConfig,
    SparseAutoencoder,
    evaluate_sae,
    train_sae,
    training_step,
)
from saerec_fast.sae import training as training_module
from saerec_fast.sae.model import activation_to_dict
from saerec_fast.types import BatchTopK, JumpReLU, ReLU, TopK

D_MODEL, N_PLANTED, N_ROWS = 16, 24, 12_000
KINDS = ["relu", "topk", "batch_topk", "jump_relu", "gated"]


def planted(n_rows, seed):
    """Rows that are sparse sums (2 of 24 on average) of fixed directions, away from 0 and of no unit scale."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(N_PLANTED, D_MODEL, generator=torch.Generator().manual_seed(99))
    directions = torch.nn.functional.normalize(directions, dim=1)
    active = torch.rand(n_rows, N_PLANTED, generator=generator) < 2 / N_PLANTED
    strengths = active * (1 + torch.rand(n_rows, N_PLANTED, generator=generator))
    noise = 0.02 * torch.randn(n_rows, D_MODEL, generator=generator)
    return directions, 3 * strengths @ directions + noise + 0.5


def write_store(path, hidden):
    with ActivationStore.create(path, *hidden.shape) as writer:
        writer.append(hidden, np.zeros(len(hidden)), np.zeros(len(hidden)))
    return ActivationStore(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"), planted(N_ROWS, 0)[1])


def config_of(kind, **changes):
    values = {
        "n_features": 48,
        "activation": kind,
        "k": 3,
        "l1_coefficient": 3.0 if kind == "gated" else 1.0,
        "l0_coefficient": 0.5,
        "initial_threshold": 1.0,
        "learning_rate": 1e-2,
        "steps": 400,
        "batch_size": 512,
        "dead_after": 20_000,
    }
    return SAETrainingConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """One finished run per kind: (SAE, folder)."""
    runs = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        runs[kind] = (train_sae(store, config_of(kind), folder, progress=False), folder)
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_recovers_planted_features(trained, kind):
    sae, folder = trained[kind]
    log = json.loads((folder / "training.json").read_text())
    curve = log["curve"]
    assert log["complete"] is True
    assert [point["step"] for point in curve] == list(range(50, 401, 50))
    assert set(curve[0]) == {"step", "loss", "reconstruction_loss", "l0", "explained_variance", "dead_fraction"}
    assert curve[-1]["reconstruction_loss"] < 0.5 * curve[0]["reconstruction_loss"]
    assert curve[-1]["explained_variance"] > 0.85
    directions, held_out = planted(2000, 1)
    cosine = (directions @ sae.W_dec.detach().T).amax(1)
    assert cosine.mean() > 0.95
    quality = evaluate_sae(sae, [held_out])
    assert quality["explained_variance"] > 0.85
    assert quality["l0"] < 10
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert not sae.training
    assert all(parameter.grad is None for parameter in sae.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_finished_run_is_loaded(store, trained, kind):
    sae, folder = trained[kind]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sae.safetensors", "training.json"]
    again = train_sae(store, config_of(kind), folder, on_log=lambda point: pytest.fail("trained again"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in sae.state_dict().items())
    assert activation_to_dict(again.activation) == activation_to_dict(sae.activation)
    with pytest.raises(ValueError, match="differs in seed, steps"):
        train_sae(store, config_of(kind, steps=401, seed=1), folder)


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(store, tmp_path, kind):
    # dead_after is so short that auxiliary losses take part; 23 batches an epoch, so that the cut lies in the second.
    config = config_of(kind, steps=60, dead_after=1500)
    options = {"progress": False, "checkpoint_every": 13, "log_every": 5}
    expected = train_sae(store, config, tmp_path / "whole", **options)

    def cut(point):
        if point["step"] == 45:
            raise PowerCut

    with pytest.raises(PowerCut):
        train_sae(store, config, tmp_path / "cut", on_log=cut, **options)
    with pytest.raises(FileNotFoundError):
        SparseAutoencoder.load(tmp_path / "cut")
    resumed_steps = []
    got = train_sae(
        store, config, tmp_path / "cut", on_log=lambda point: resumed_steps.append(point["step"]), **options
    )
    assert resumed_steps == [40, 45, 50, 55, 60]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, got.state_dict()[name]), name
    assert activation_to_dict(got.activation) == activation_to_dict(expected.activation)
    for file in ("training.json", "config.json", "sae.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_resume_refuses_other_runs_and_damaged_checkpoints(store, tmp_path):
    config = config_of("topk", steps=20)

    def cut(point):
        raise PowerCut

    def start(config, resume=True):
        with pytest.raises(PowerCut):
            train_sae(
                store, config, tmp_path, resume=resume, progress=False, checkpoint_every=5, log_every=12, on_log=cut
            )

    start(config)
    with pytest.raises(ValueError, match="differs in k"):
        train_sae(store, config_of("topk", steps=20, k=4), tmp_path, progress=False)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors"):
        train_sae(store, config, tmp_path, progress=False)
    start(config_of("topk", steps=20, n_features=40), resume=False)
    train_sae(store, config_of("topk", steps=20, n_features=40), tmp_path, progress=False)


def reference_curve(store, config, steps):
    """The losses of a run whose every step is written in plain PyTorch: dense autograd, torch.optim.Adam."""
    trainer = training_module._Trainer(store, config, torch.device("cpu"))
    sae = trainer.sae
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate)
    silent = torch.zeros(config.n_features, dtype=torch.int64)
    losses = []
    for step, hidden in zip(range(steps), trainer.rows(), strict=False):
        z = (hidden - sae.mean) / sae.std
        dead = (silent > config.dead_after).nonzero().squeeze(1)
        optimizer.zero_grad()
        pre = reference.pre_activations(z, sae.W_enc, sae.b_enc, sae.b_dec)
        kinds = {"relu": ReLU(), "topk": TopK(config.k), "batch_topk": BatchTopK(config.k)}
        a = reference.activate(pre, kinds[config.activation])
        residual = a @ sae.W_dec + sae.b_dec - z
        loss = residual.square().sum(1).mean()
        if config.activation == "relu":
            loss = loss + config.penalty_at(step) * a.sum(1).mean()
        elif len(dead) > 0:
            scores = reference.pre_activations(z, sae.W_enc[dead], sae.b_enc[dead], sae.b_dec.detach())
            error = reference.activate(scores, TopK(min(trainer.auxiliary_k, len(dead)))) @ sae.W_dec[dead]
            loss = loss + (error + residual.detach()).square().sum(1).mean() * config.auxiliary_coefficient
        loss.backward()
        silent += len(z)
        silent[(a > 0).any(0)] = 0
        sae.remove_parallel_gradient_()
        optimizer.param_groups[0]["lr"] = config.learning_rate_at(step)
        optimizer.step()
        sae.normalize_decoder_()
        trainer.step += 1
        losses.append(loss.item())
    return losses, int(len(dead) > 0)


@pytest.mark.parametrize("kind", ["relu", "topk", "batch_topk"])
def test_losses_are_those_of_plain_pytorch(store, kind):
    # dead_after is so short that the auxiliary loss takes part.
    config = config_of(kind, steps=120, batch_size=256, dead_after=600, learning_rate=3e-3, k=2)
    expected, auxiliary = reference_curve(store, config, 120)
    assert auxiliary or kind == "relu"
    trainer = training_module._Trainer(store, config, torch.device("cpu"))
    losses = [trainer.train_step(hidden, True)["loss"] for hidden in trainer.rows()]
    # The same to rounding at first; later the choices near a tie differ, as they do between two runs of torch that sum
    # in another order.
    np.testing.assert_allclose(losses[:20], expected[:20], rtol=1e-4)
    np.testing.assert_allclose(losses, expected, rtol=0.02)
    assert losses[-1] < 0.6 * losses[0]


def test_batch_topk_threshold_keeps_k_on_held_out_rows(trained):
    sae, _ = trained["batch_topk"]
    assert isinstance(sae.activation, BatchTopK)
    assert sae.activation.threshold > 0
    assert evaluate_sae(sae, [planted(5000, 2)[1]])["l0"] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_auxiliary_loss_revives_dead_features(store, kind):
    def train(auxiliary_k):
        config = config_of(kind, auxiliary_k=auxiliary_k, n_features=28, steps=250, dead_after=2000)
        trainer = training_module._Trainer(store, config, torch.device("cpu"))
        with torch.no_grad():
            # Too weak ever to be among the largest: without help these have no gradient.
            trainer.sae.W_enc[:14] *= 0.05
        for hidden in trainer.rows():
            point = trainer.train_step(hidden, trainer.step == config.steps - 1)
        return point

    without, helped = train(0), train(8)
    assert without["dead_fraction"] > 0.3
    assert helped["dead_fraction"] < 0.1
    assert helped["explained_variance"] > without["explained_variance"] + 0.05


def test_auxiliary_loss_is_the_error_rebuilt_by_dead_features(store):
    trainer = training_module._Trainer(store, config_of("topk", auxiliary_k=2), torch.device("cpu"))
    sae = trainer.sae
    z = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(0))
    residual = training_step(sae, z).residual
    before = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    dead = torch.tensor([1, 4, 40])
    loss = trainer._add_auxiliary(z, residual, dead)

    W_enc, b_enc, W_dec = (p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec))
    pre = (z - sae.b_dec.detach()) @ W_enc[dead].T + b_enc[dead]
    top = pre.topk(2, dim=1)
    rebuilt = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ W_dec[dead]
    expected = (-residual - rebuilt).square().sum(1).mean() / 32
    torch.testing.assert_close(loss, expected.detach())
    expected.backward()
    torch.testing.assert_close(sae.W_enc.grad - before["W_enc"], W_enc.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.b_enc.grad - before["b_enc"], b_enc.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.grad - before["W_dec"], W_dec.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(sae.b_dec.grad, before["b_dec"])


@pytest.mark.parametrize(("kind", "weight"), [("relu", 1.0), ("gated", 3.0), ("jump_relu", 0.5), ("topk", 0.0)])
def test_the_penalty_warms_up_and_the_learning_rate_decays(kind, weight):
    config = config_of(kind, steps=100, l1_warmup_steps=10, learning_rate=1.0)
    assert [config.penalty_at(step) for step in (0, 5, 10, 99)] == pytest.approx([0, weight / 2, weight, weight])
    assert [config.learning_rate_at(step) for step in (0, 80, 90, 99)] == pytest.approx([1, 1, 0.5, 0.05])
    assert config_of(kind, steps=100).penalty_at(5) == pytest.approx(weight / 2)
    assert config_of(kind, l1_warmup_steps=0).penalty_at(0) == weight


@pytest.mark.parametrize(
    ("kind", "coefficient"), [("relu", "l1_coefficient"), ("jump_relu", "l0_coefficient"), ("gated", "l1_coefficient")]
)
def test_a_larger_penalty_means_fewer_active_features(store, tmp_path, kind, coefficient):
    sparse, dense = (
        train_sae(store, config_of(kind, steps=100, **{coefficient: weight}), tmp_path / name, progress=False)
        for name, weight in (("sparse", 2.0), ("dense", 0.01))
    )
    rows = [planted(1000, 3)[1]]
    assert evaluate_sae(sparse, rows)["l0"] < 0.7 * evaluate_sae(dense, rows)["l0"]


def test_store_smaller_than_a_batch(tmp_path):
    store = write_store(tmp_path / "store", planted(50, 0)[1])
    sae = train_sae(store, config_of("topk", steps=3, normalize=False), tmp_path / "sae", progress=True)
    assert float(sae.std) == 1.0


def test_a_loss_that_is_not_finite_is_an_error(store, tmp_path):
    with pytest.raises(FloatingPointError, match="learning rate"):
        train_sae(store, config_of("relu", learning_rate=1e30, steps=20), tmp_path, progress=False, log_every=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation: expected one of relu, topk, batch_topk, jump_relu, gated"),
        ({"l0_coefficient": -0.1}, "l0_coefficient: expected a finite number >= 0"),
        ({"bandwidth": 0.0}, "bandwidth: expected a finite number > 0"),
        ({"initial_threshold": float("inf")}, "initial_threshold: expected a finite number > 0"),
        ({"steps": 0}, "steps: expected an integer >= 1"),
        ({"k": 1.5}, "k: expected an integer"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number"),
        ({"activation": "topk", "k": 99}, r"k: expected at most 48 \(n_features\)"),
        ({"auxiliary_k": -1}, "auxiliary_k: expected an integer >= 0"),
    ],
)
def test_config_refuses_values_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        config_of("relu", **change)


@pytest.mark.parametrize("kind", KINDS)
def test_config_roundtrip(kind):
    config = config_of(kind)
    if kind == "jump_relu":
        config = replace(config, bandwidth=0.2, initial_threshold=0.7)
    again = SAETrainingConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert kind != "jump_relu" or again == config
    # Runs from before there was a jump_relu have settings without these.
    assert ("bandwidth" in config.to_dict()) == (kind == "jump_relu")
    with pytest.raises(ValueError, match="unknown keys"):
        SAETrainingConfig.from_dict({"surprise": 1})


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(0.5), TopK(4), BatchTopK(4, 0.3)], ids=repr)
def test_evaluation_matches_dense_formulas(activation):
    sae = SparseAutoencoder(D_MODEL, 48, activation, mean=0.3, std=1.5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_dec.fill_(0.1)
    x = planted(1000, 4)[1] + 100
    got = evaluate_sae(sae, x.split(300))
    assert sae.training
    sae.eval()
    a = sae.encode(x).dense().detach()
    error = (x - sae(x).detach()).double()
    variance = x.double().var(0, correction=0).sum()
    assert got["n_rows"] == 1000
    assert got["explained_variance"] == pytest.approx(float(1 - error.var(0, correction=0).sum() / variance), rel=1e-5)
    assert got["mae"] == pytest.approx(float(error.abs().mean()), rel=1e-6)
    assert got["rmse"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-6)
    assert got["thresholds"] == [0, 0.1, 0.5, 1, 2, 3]
    for index, threshold in enumerate(got["thresholds"]):
        fired = (a > threshold).double()
        assert got["l0_above"][index] == pytest.approx(float(fired.sum(1).mean()), abs=0.01)
        np.testing.assert_allclose(got["fired_fraction"][index], fired.mean(0).numpy(), atol=0.0021)
    assert got["l0"] == got["l0_above"][0]
    assert got["dead_fraction"] == pytest.approx(float((a.sum(0) == 0).double().mean()))


def test_evaluation_takes_batches_of_a_store_and_refuses_none(store):
    sae = SparseAutoencoder(D_MODEL, 48)
    assert evaluate_sae(sae, store.batches(5000))["n_rows"] == N_ROWS
    with pytest.raises(ValueError, match="at least one row"):
        evaluate_sae(sae, [torch.empty(0, D_MODEL)])
