"""The module against dense formulas, and what saving and loading keep and refuse."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saerec_fast import reference
from saerec_fast.sae import ActivationStore, SparseAutoencoder
from saerec_fast.sae.conversion import load_sae, save_sae
from saerec_fast.types import BatchTopK, Edit, JumpReLU, ReLU, SparseFeatures, SteeringPlan, TopK

D_MODEL, N_FEATURES = 9, 41
ACTIVATIONS = {
    "relu": lambda: ReLU(),
    "jump_relu": lambda: JumpReLU(0.3),
    "jump_relu_per_feature": lambda: JumpReLU(torch.linspace(0, 1, N_FEATURES)),
    "topk": lambda: TopK(5),
    "batch_topk": lambda: BatchTopK(5, 0.4),
}
NORMALIZATIONS = {"plain": (0.0, 1.0), "normalized": (0.7, 2.5)}


def make(activation, mean=0.0, std=1.0, **kwargs):
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(D_MODEL, N_FEATURES, activation, mean=mean, std=std, generator=generator, **kwargs)
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(N_FEATURES, generator=generator) * 0.1)
        sae.b_dec.copy_(torch.randn(D_MODEL, generator=generator))
        sae.W_enc.add_(torch.randn(N_FEATURES, D_MODEL, generator=generator) * 0.1)
    return sae


def hidden_states(*shape):
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def dense(sae, x, activation):
    """The definition, in normalised units and back."""
    z = (x - sae.mean) / sae.std
    a = reference.ops.activate((z - sae.b_dec) @ sae.W_enc.T + sae.b_enc, activation)
    return a, (a @ sae.W_dec + sae.b_dec) * sae.std + sae.mean


@pytest.fixture(params=ACTIVATIONS)
def activation(request):
    return ACTIVATIONS[request.param]()


@pytest.fixture(params=NORMALIZATIONS)
def scalars(request):
    return NORMALIZATIONS[request.param]


def test_initial_dictionary():
    sae = SparseAutoencoder(8, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    again = SparseAutoencoder(8, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.W_enc, sae.W_enc)


@pytest.mark.parametrize("shape", [(), (1,), (17,), (3, 4), (0,), (2, 0)])
def test_values_match_the_dense_formula(activation, scalars, shape):
    sae = make(activation, *scalars).eval()
    x = hidden_states(*shape)
    with torch.no_grad():
        a, expected = dense(sae, x, activation)
        torch.testing.assert_close(sae(x), expected, rtol=1e-5, atol=1e-5)
        features = sae.encode(x)
        torch.testing.assert_close(features.dense(), a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_match_the_dense_formula(activation, scalars, training):
    sae = make(activation, *scalars).train(training)
    x = hidden_states(6, 5).requires_grad_()
    weight = torch.randn(6, 5, D_MODEL, generator=torch.Generator().manual_seed(2))
    trained_with = BatchTopK(5) if training and isinstance(activation, BatchTopK) else activation
    arguments = [x, *sae.parameters()]
    expected_value = dense(sae, x, trained_with)[1]
    expected = torch.autograd.grad((expected_value * weight).sum(), arguments)
    value = sae(x)
    torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad((value * weight).sum(), arguments), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_batch_topk_needs_a_threshold_outside_training():
    sae = make(BatchTopK(3))
    assert int(sae.encode(hidden_states(20)).offsets[-1]) == 60
    sae.eval()
    for call in (sae, sae.encode):
        with pytest.raises(ValueError, match="BatchTopK needs a threshold"):
            call(hidden_states(2))
    sae.activation = BatchTopK(3, 0.5)
    sae(hidden_states(2))


def test_batch_topk_breaks_ties_by_position():
    sae = SparseAutoencoder(1, 4, BatchTopK(2))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [1.0], [2.0], [1.0]]))
    features = sae.encode(torch.ones(2, 1))
    assert features.offsets.tolist() == [0, 3, 4]
    assert features.indices.tolist() == [0, 1, 2, 2]
    assert sae.encode(-torch.ones(2, 1)).indices.tolist() == []
    assert sae.encode(torch.empty(0, 1)).offsets.tolist() == [0]


def batch_topk_by_sorting(sae, x, k):
    """The selection in one stable sort of all pre-activations: flat positions, ascending."""
    pre = reference.pre_activations(x, sae.W_enc, sae.b_enc, sae.b_dec)
    flat = pre.detach().flatten()
    chosen = flat.sort(descending=True, stable=True).indices[: k * x.shape[0]]
    return chosen[~(flat[chosen] <= 0)].sort().values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 64, 65, 700])
@pytest.mark.parametrize("k", [1, 5, 30, 41])
def test_batch_topk_is_the_exact_selection(rows, k, dtype):
    # Small integers: exact in every type, and full of ties.
    generator = torch.Generator().manual_seed(rows * k)
    sae = make(BatchTopK(k)).to(dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    x = torch.randint(-2, 3, (rows, D_MODEL), generator=generator).to(dtype)
    features = sae.encode(x)
    got = features.row_ids() * N_FEATURES + features.indices
    assert torch.equal(got, batch_topk_by_sorting(sae, x, k))


def test_batch_topk_where_few_rows_have_all_large_activations():
    """The sampled rows mislead in both directions; only time may suffer."""
    sae = make(BatchTopK(5))
    for loud in (slice(0, 700, 10), slice(5, 700, 10), slice(3, 4)):
        x = hidden_states(700)
        x[loud] *= 100
        features = sae.encode(x)
        got = features.row_ids() * N_FEATURES + features.indices
        assert torch.equal(got, batch_topk_by_sorting(sae, x, 5))


def test_batch_topk_counts_nan_as_largest():
    sae = make(BatchTopK(5))
    x = hidden_states(100)
    x[[13, 14]] = float("nan")
    features = sae.encode(x)
    assert features.values.isnan().sum() == 2 * N_FEATURES
    assert len(features.values) == 500
    x[:] = float("nan")
    assert torch.equal(sae.encode(x).row_ids(), (torch.arange(500) // N_FEATURES))


def test_folded_weights_without_normalization_are_the_parameters():
    sae = make(ReLU()).eval()
    weights = sae.folded_weights()
    assert weights.W_enc is sae.W_enc
    assert weights.W_dec is sae.W_dec


def test_folded_weights_are_kept_until_something_changes():
    sae = make(ReLU(), 0.7, 2.5).eval()
    x = hidden_states(4)

    def check():
        torch.testing.assert_close(sae(x), dense(sae, x, ReLU())[1], rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        first = sae.folded_weights()
        assert sae.folded_weights().W_enc is first.W_enc
        check()
        sae.W_enc.mul_(1.5)
        check()
        sae.b_dec.add_(1)
        check()
        sae.std.fill_(3)
        check()
        sae.set_normalization(0.0, 1.0)
        check()
        assert sae.folded_weights().W_enc is sae.W_enc
        sae.mean.fill_(0.5)
        check()
        sae.load_state_dict(make(ReLU(), 0.1, 1.1).state_dict())
        check()
    with torch.inference_mode():
        check()
    sae.requires_grad_(False)
    x.requires_grad_()
    sae(x).sum().backward()
    assert x.grad is not None


def test_bfloat16_keeps_the_scalars_and_rounds_once(activation):
    sae = make(activation, 0.7123, 2.5123).to(torch.bfloat16).eval()
    assert sae.mean.dtype == sae.std.dtype == torch.float32
    assert float(sae.mean) == pytest.approx(0.7123, rel=1e-6)
    weights = sae.folded_weights()
    expected = (sae.W_enc.double() / sae.std.double()).to(torch.bfloat16)
    torch.testing.assert_close(weights.W_enc, expected, rtol=2**-8, atol=0)
    x = hidden_states(6).to(torch.bfloat16)
    assert sae(x).dtype == torch.bfloat16
    truth = make(activation, 0.7123, 2.5123).eval()
    # Near a threshold or the k-th score rounding may switch a feature, so only the whole is compared.
    assert (sae(x).float() - truth(x.float())).norm() < 0.1 * truth(x.float()).norm()


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
def test_steer_is_the_reference_in_normalized_units(activation, scalars, mode):
    sae = make(activation, *scalars).eval()
    plan = SteeringPlan([Edit(0, "set", 2.0), Edit(7, "add", -1.0), Edit(3, "scale", 0.0)], mode, positions="last")
    x = hidden_states(3, 4)
    valid = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        z = (x - sae.mean) / sae.std
        expected = (
            reference.steer(z, sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec, activation, plan, valid=valid) * sae.std
            + sae.mean
        )
        steered = sae.steer(x, plan, valid=valid)
        torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(steered[2], x[2])
        stronger = sae.steer(x, plan, strengths=torch.tensor([9.0, 0.0, 1.0]), valid=valid)
        assert not torch.equal(stronger[1, 3], steered[1, 3])
        assert torch.equal(sae.steer(x, SteeringPlan()), x)


def test_wrong_arguments_are_refused():
    sae = make(TopK(3))
    plan = SteeringPlan([Edit(N_FEATURES, "set", 1.0)])
    for call in (sae, sae.encode, lambda x: sae.steer(x, SteeringPlan())):
        with pytest.raises(ValueError, match=rf"x: expected shape \(\.\.\., {D_MODEL}\).*got \(2, 8\)"):
            call(torch.zeros(2, 8))
    with pytest.raises(TypeError, match=r"strengths: expected a floating point tensor .*got list"):
        sae.steer(torch.zeros(2, D_MODEL), SteeringPlan([Edit(0, "set", 1.0)]), strengths=[1.0])
    with pytest.raises(ValueError, match="feature ids go from 0 to 40, got 41"):
        sae.steer(hidden_states(2), plan)
    other = SparseFeatures(
        torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0), 5, (0,)
    )
    with pytest.raises(ValueError, match="dictionary of 41 features, got one of 5"):
        sae.decode(other)
    with pytest.raises(ValueError, match="k: expected at most 41"):
        sae.activation = TopK(42)
    with pytest.raises(ValueError, match=r"threshold: expected a scalar or \(41,\)"):
        sae.activation = JumpReLU(torch.zeros(40))
    with pytest.raises(TypeError, match="activation: expected"):
        SparseAutoencoder(2, 2, "relu")
    with pytest.raises(ValueError, match="n_features"):
        SparseAutoencoder(2, 0)
    with pytest.raises(ValueError, match="std"):
        SparseAutoencoder(2, 2, std=0.0)


def test_init_from_a_store(tmp_path):
    hidden = hidden_states(200)
    with ActivationStore.create(tmp_path, 200, D_MODEL) as writer:
        writer.append(hidden, np.zeros(200), np.zeros(200))
    store = ActivationStore(tmp_path)
    sae = SparseAutoencoder(D_MODEL, N_FEATURES)
    sae.init_from(store)
    torch.testing.assert_close(sae.b_dec.detach(), hidden.mean(0))
    sae.init_from(store, normalize=True)
    mean, std = store.mean_std()
    assert float(sae.mean) == pytest.approx(mean)
    torch.testing.assert_close(sae.b_dec.detach() * std + mean, hidden.mean(0))
    with pytest.raises(ValueError, match="width 3"):
        SparseAutoencoder(3, 4).init_from(store)


def test_decoder_helpers():
    sae = make(ReLU())
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0, 3, N_FEATURES)[:, None])
    sae.normalize_decoder_()
    torch.testing.assert_close(sae.W_dec[1:].norm(dim=1), torch.ones(N_FEATURES - 1))
    assert not sae.W_dec[0].any()
    sae.remove_parallel_gradient_()
    sae.W_dec.grad = torch.randn(N_FEATURES, D_MODEL)
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_gradient_()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(N_FEATURES), atol=1e-6, rtol=0)
    assert torch.equal(sae.W_dec.grad[0], before[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, activation, scalars, dtype):
    sae = make(activation, *scalars).to(dtype).eval()
    sae.save(tmp_path / "sae")
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["config.json", "sae.safetensors"]
    state = torch.random.get_rng_state()
    loaded = SparseAutoencoder.load(tmp_path / "sae")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not loaded.training
    assert type(loaded.activation) is type(activation)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    x = hidden_states(5).to(dtype)
    assert torch.equal(loaded(x), sae(x))


def test_save_refuses_weights_that_are_not_finite(tmp_path):
    sae = make(ReLU())
    with torch.no_grad():
        sae.b_enc[3] = float("inf")
    with pytest.raises(ValueError, match="b_enc: expected finite"):
        sae.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def rewrite(folder, change):
    """Change the tensors of a saved SAE and sign the config again, so that only the change is wrong."""
    tensors = load_file(folder / "sae.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256((folder / "sae.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def saved(tmp_path):
    make(JumpReLU(torch.rand(N_FEATURES))).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", ["sae.safetensors", "config.json"])
def test_load_refuses_missing_and_truncated_files(saved, file):
    content = (saved / file).read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 3):
        (saved / file).write_bytes(content[:length])
        with pytest.raises(ValueError, match=file.replace(".", r"\.")):
            SparseAutoencoder.load(saved)
    (saved / file).unlink()
    with pytest.raises(FileNotFoundError, match=file.replace(".", r"\.")):
        SparseAutoencoder.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("b_enc"), "expected tensors"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "expected tensors"),
        (lambda tensors: tensors.update(W_dec=torch.zeros(3, 3)), r"W_dec: expected shape \(41, 9\), got \(3, 3\)"),
        (lambda tensors: tensors["W_enc"][2].fill_(float("nan")), "W_enc: expected finite"),
        (lambda tensors: tensors["std"].fill_(0), "std: expected a number > 0"),
        (lambda tensors: tensors["threshold"].fill_(-1), "threshold: expected numbers >= 0"),
        (lambda tensors: tensors.update(b_enc=tensors["b_enc"].half()), "b_enc: expected a floating type"),
    ],
)
def test_load_refuses_weights_that_do_not_fit(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=rf"sae\.safetensors: {message}"):
        SparseAutoencoder.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, '"format": "saerec_fast.sae"'),
        ({"version": 2}, "expected version 1, got 2"),
        ({"surprise": 1}, "expected keys"),
        ({"n_features": "many"}, "n_features: expected an integer"),
        ({"activation": {"kind": "swish"}}, "activation: expected an object whose kind is one of"),
        ({"activation": {"kind": "topk"}}, "activation: expected keys"),
        ({"activation": {"kind": "topk", "k": 1000}}, "k: expected at most 41"),
        ({"activation": {"kind": "jump_relu", "threshold": "high"}}, "expected a number as threshold"),
    ],
)
def test_load_refuses_configs_that_do_not_fit(saved, change, message):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        SparseAutoencoder.load(saved)


def test_load_refuses_weights_of_another_save(saved):
    config = (saved / "config.json").read_bytes()
    make(JumpReLU(torch.rand(N_FEATURES))).save(saved)
    (saved / "config.json").write_bytes(config)
    with pytest.raises(ValueError, match="weights_sha256"):
        SparseAutoencoder.load(saved)


def test_compiles_to_one_graph(activation, scalars):
    torch._dynamo.reset()
    sae = make(activation, *scalars).eval()
    x = hidden_states(6)
    plan = SteeringPlan([Edit(1, "add", 2.0)])
    with torch.no_grad():
        compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), sae(x), rtol=1e-5, atol=1e-5)
        steer = torch.compile(lambda x: sae.steer(x, plan), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(steer(x), sae.steer(x, plan), rtol=1e-5, atol=1e-5)


LARGE = 300  # features enough for scores to be screened


def make_large(activation, mean=0.0, std=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(D_MODEL, LARGE, activation, mean=mean, std=std, generator=generator)
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(LARGE, generator=generator) * 0.1)
        sae.b_dec.copy_(torch.randn(D_MODEL, generator=generator))
    return sae.to(dtype).eval()


def replace(sae, name):
    setattr(sae, name, torch.nn.Parameter(getattr(sae, name).detach() * 0.5 + 0.25))


def assign_data(sae, name):
    tensor = getattr(sae, name)
    tensor.data = tensor.data * 0.5 + 0.25


def in_place(name):
    return lambda sae: getattr(sae, name).mul_(0.5).add_(0.25)


# Everything that can change what a module computes.
CHANGES = {
    **{f"{name} in place": in_place(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "mean", "std")},
    **{f"{name} replaced": lambda sae, name=name: replace(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
    **{
        f"{name} by .data": lambda sae, name=name: assign_data(sae, name)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "mean", "std")
    },
    "buffer replaced": lambda sae: setattr(sae, "mean", sae.mean + 0.5),
    "load_state_dict": lambda sae: sae.load_state_dict(
        {key: value * 0.5 + 0.25 for key, value in sae.state_dict().items()}
    ),
    "load_state_dict assign": lambda sae: sae.load_state_dict(
        {key: value * 0.5 + 0.25 for key, value in sae.state_dict().items()}, assign=True
    ),
    "set_normalization": lambda sae: sae.set_normalization(-0.4, 1.7),
    "no normalization": lambda sae: sae.set_normalization(0.0, 1.0),
    "topk": lambda sae: setattr(sae, "activation", TopK(3)),
    "relu": lambda sae: setattr(sae, "activation", ReLU()),
    "jump_relu": lambda sae: setattr(sae, "activation", JumpReLU(0.2)),
    "jump_relu per feature": lambda sae: setattr(sae, "activation", JumpReLU(torch.linspace(0, 1, LARGE))),
    "batch_topk": lambda sae: setattr(sae, "activation", BatchTopK(4, 0.1)),
    "optimizer step": lambda sae: step(sae),
    "normalize_decoder_": lambda sae: [sae.W_dec.mul_(3), sae.normalize_decoder_()],
}


def step(sae):
    with torch.enable_grad():
        optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
        sae(hidden_states(30)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def check_dense(sae, x):
    """Every way into the module gives what the definition does, with the weights of now."""
    with torch.no_grad():
        activations, expected = dense(sae, x, sae.activation)
        for value in (sae(x), sae.decode(sae.encode(x))):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.encode(x).dense(), activations, rtol=1e-4, atol=1e-4)
        plan = SteeringPlan([Edit(7, "add", 0.5)], "reconstruct")
        steered = expected + 0.5 * sae.std * sae.W_dec[7]
        torch.testing.assert_close(sae.steer(x, plan), steered, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("start", ["relu", "topk", "jump_relu"])
def test_every_change_is_noticed(change, start, scalars):
    sae = make_large(
        {"relu": ReLU(), "topk": TopK(5), "jump_relu": JumpReLU(torch.full((LARGE,), 0.1))}[start], *scalars
    )
    if start == "jump_relu":
        CHANGES_TO_THRESHOLD[len(change) % 2](sae)
    for x in (hidden_states(5), hidden_states(20)):  # too few to be packed for, and enough
        check_dense(sae, x)
        with torch.no_grad():
            CHANGES[change](sae)
        check_dense(sae, x)


CHANGES_TO_THRESHOLD = (
    lambda sae: check_dense(sae, hidden_states(3)) or sae.threshold.mul_(2),
    lambda sae: check_dense(sae, hidden_states(3)) or setattr(sae, "threshold", sae.threshold + 0.3),
)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "mean"])
@pytest.mark.parametrize("how", ["replaced", "data"])
def test_memory_of_a_tensor_that_is_gone_is_not_taken_for_it(how, name, scalars):
    # Allocators give the address of a tensor that is gone to the next one of its size, whose version is the same. In
    # large blocks, which come straight from the system, and in small ones.
    sae, x = SparseAutoencoder(64, 2048, TopK(5), mean=scalars[0], std=scalars[1]).eval(), torch.randn(20, 64)

    def set_randomly():
        old = getattr(sae, name)
        new = torch.randn(old.shape)
        if how == "data":
            old.data = new
        else:
            setattr(sae, name, torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new)

    with torch.no_grad():
        for _ in range(5):
            for call in (sae, lambda x: sae.decode(sae.encode(x))):
                sae(x)
                sae.encode(x)
                for _ in range(3):
                    set_randomly()
                torch.testing.assert_close(call(x), dense(sae, x, TopK(5))[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_change_of_type_is_noticed(dtype, scalars):
    sae = make_large(TopK(5), *scalars)
    x = hidden_states(20)
    check_dense(sae, x)
    sae.to(dtype)
    with torch.no_grad():
        assert sae(x.to(dtype)).dtype == dtype
        if dtype == torch.float64:
            check_dense(sae, x.double())
        with pytest.raises(TypeError, match="expected"):
            sae(x)
        sae.W_enc.mul_(0.5)
        sae.to(torch.float32)
        check_dense(sae, x)


def test_changes_in_training_are_seen_in_evaluation(activation, scalars):
    sae = make(activation, *scalars)
    x = hidden_states(20)
    for _ in range(3):
        sae.eval()
        check_dense(sae, x)
        sae.train()
        with torch.no_grad():
            sae(x)
            sae.W_enc.data.mul_(1.1)  # no version counter moves


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sae: pickle.loads(pickle.dumps(sae)), copy.copy])
def test_copies_after_a_forward_pass(activation, scalars, copied):
    sae, x = make(activation, *scalars).eval(), hidden_states(20)
    check_dense(sae, x)
    twin = copied(sae)
    with torch.no_grad():
        assert torch.equal(twin(x), sae(x))
        if copied is not copy.copy:  # which shares the parameters
            before = sae(x)
            twin.W_enc.mul_(0.5)
            twin.std.mul_(2)
            assert torch.equal(sae(x), before)
    check_dense(twin, x)
    check_dense(sae, x)


def test_modes_of_autograd_give_the_same_values(activation, scalars):
    sae = make(activation, *scalars).eval()
    for x in (hidden_states(20), hidden_states(3, 5), hidden_states()):
        with_grad = sae(x)
        assert with_grad.requires_grad
        with torch.no_grad():
            without = sae(x)
        with torch.inference_mode():
            inference = sae(x)
        sae.requires_grad_(False)
        frozen = sae(x)
        sae.requires_grad_(True)
        for value in (without, inference, frozen):
            assert not value.requires_grad
            torch.testing.assert_close(value, with_grad, rtol=1e-5, atol=1e-5)
        # What was kept under inference_mode must not stand in the way of a graph.
        assert torch.autograd.grad(sae(x).sum(), sae.W_dec)[0].any()


def checkpoint(tmp_path, format="saerec_fast"):
    save_sae(make(JumpReLU(torch.linspace(0, 1, N_FEATURES)), *NORMALIZATIONS["normalized"]), tmp_path, format)
    return tmp_path


MADE_INSIDE = {
    "made": lambda _: make(JumpReLU(torch.linspace(0, 1, N_FEATURES)), 0.7, 2.5),
    "activation set": lambda outside: setattr(outside, "activation", JumpReLU(torch.ones(N_FEATURES))) or outside,
    "double": lambda outside: outside.double(),
    "to": lambda outside: torch.nn.Sequential(outside).to(torch.bfloat16)[0],
    "to_empty": lambda _: make(ReLU(), device="meta").to_empty(device="cpu"),
}
LOADED_INSIDE = {
    "loaded": lambda path: SparseAutoencoder.load(checkpoint(path)),
    "load_sae": lambda path: load_sae(checkpoint(path)),
    "in another type": lambda path: load_sae(checkpoint(path), dtype=torch.float64),
    "of another library": lambda path: load_sae(checkpoint(path, "saelens")),
}


@pytest.mark.parametrize("how", [*MADE_INSIDE, *LOADED_INSIDE])
def test_ordinary_tensors_under_inference_mode(how, tmp_path):
    outside = make(JumpReLU(torch.linspace(0, 1, N_FEATURES)), 0.7, 2.5)
    with torch.inference_mode():
        sae = MADE_INSIDE[how](outside) if how in MADE_INSIDE else LOADED_INSIDE[how](tmp_path)
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert torch.ones(1).is_inference()
    assert not any(tensor.is_inference() for tensor in sae.state_dict(keep_vars=True).values())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in sae.parameters())
    assert not any(buffer.requires_grad for buffer in sae.buffers())
    if how == "to_empty":
        sae.load_state_dict(make(ReLU()).state_dict())
    x = hidden_states(6).to(sae.W_enc.dtype)
    sae.train()(x).square().mean().backward()
    with torch.no_grad():
        before = sae.W_dec.clone()
    torch.optim.SGD(sae.parameters(), lr=0.1).step()
    assert not torch.equal(sae.W_dec, before)


@pytest.mark.parametrize("loaded", [False, True])
def test_what_was_made_under_inference_mode_keeps_its_kernels_until_something_changes(loaded, tmp_path, scalars):
    x = hidden_states(20)
    make_large(TopK(5), *scalars).save(tmp_path)
    with torch.inference_mode():
        sae = SparseAutoencoder.load(tmp_path) if loaded else make_large(TopK(5), *scalars)
        for change in (lambda: None, lambda: sae.W_dec.mul_(2), lambda: sae.b_enc.add_(0.1), lambda: sae.std.fill_(3)):
            change()
            check_dense(sae, x)
            folded, bound = sae.folded_weights(), sae._bound_kernels(x.dtype)
            check_dense(sae, x)
            assert sae.folded_weights().W_enc is folded.W_enc
            assert bound is not None
            assert sae._bound_kernels(x.dtype) is bound
            assert sae.bind_steer() is not None
    check_dense(sae, x)


INFERENCE_TENSORS = {
    "assigned": lambda sae: [setattr(sae, name, torch.nn.Parameter(p.clone())) for name, p in sae.named_parameters()],
    "one of them": lambda sae: setattr(sae, "W_dec", torch.nn.Parameter(sae.W_dec.clone())),
    "scalars": lambda sae: [setattr(sae, name, getattr(sae, name).clone()) for name in ("mean", "std")],
    "copied": copy.deepcopy,
    "unpickled": lambda sae: pickle.loads(pickle.dumps(sae)),
    "assigned and moved": lambda sae: INFERENCE_TENSORS["assigned"](sae) and sae.double().float(),
    "copied and moved": lambda sae: copy.deepcopy(sae).double().float(),
}


@pytest.mark.parametrize("how", INFERENCE_TENSORS)
def test_inference_tensors_go_the_general_way(how, scalars):
    """They do not tell when they are written to, so nothing that is made from them may be kept."""
    sae, x = make_large(TopK(5), *scalars), hidden_states(20)
    with torch.inference_mode():
        made = INFERENCE_TENSORS[how](sae)
        sae = made if isinstance(made, SparseAutoencoder) else sae
        for _ in range(3):
            check_dense(sae, x)
            assert sae._bound_kernels(x.dtype) is None
            assert sae.bind_steer() is None
            sae.W_dec.mul_(2)
            sae.std.mul_(1.5)
    check_dense(sae, x)
    check_dense(copy.deepcopy(sae), x)


def test_inference_tensors_that_have_moved_outside(scalars):
    """torch then takes them for ordinary ones, but still no versions are counted."""
    outside, x = make_large(TopK(5), *scalars), hidden_states(20)
    with torch.inference_mode():
        sae = copy.deepcopy(outside)
    sae.double().float()
    assert not sae.W_enc.is_inference()
    plan = SteeringPlan([Edit(7, "add", 0.5)], "reconstruct")
    with torch.no_grad():
        for call in (lambda sae: sae(x), lambda sae: sae.encode(x).dense(), lambda sae: sae.steer(x, plan)):
            torch.testing.assert_close(call(sae), call(outside), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "unaligned", "empty", "parameter"])
def test_any_layout_of_hidden_states(layout):
    sae, x = make_large(TopK(5)), hidden_states(20)
    moved = {
        "transposed": x.T.contiguous().T,
        "strided": torch.stack([x, x + 1], 1)[:, 0],
        "expanded": x[:1].expand(20, -1),
        "unaligned": torch.cat([torch.zeros(1), x.flatten()])[1:].view(20, D_MODEL),
        "empty": x[:0],
        "parameter": torch.nn.Parameter(x, requires_grad=False),
    }[layout]
    with torch.no_grad():
        out = sae(moved)
        assert torch.equal(out, sae(moved.detach().clone(memory_format=torch.contiguous_format)))
        assert out.shape == moved.shape


def test_subclasses_may_have_parameters_and_buffers_of_their_own():
    class Counting(SparseAutoencoder):
        def __init__(self):
            super().__init__(D_MODEL, LARGE, TopK(5))
            self.register_buffer("uses", torch.zeros(LARGE))
            self.gain = torch.nn.Parameter(torch.ones(()))

    sae = Counting().eval()
    check_dense(sae, hidden_states(20))
    with torch.no_grad():
        sae.W_enc.mul_(0.5)
    check_dense(sae, hidden_states(20))


def test_functional_call_uses_the_given_parameters(scalars):
    sae, x = make_large(TopK(5), *scalars), hidden_states(20)
    with torch.no_grad():
        before = sae(x)
        for factor in (0.5, 2.0, 0.5):
            given = {name: parameter * factor for name, parameter in sae.named_parameters()}
            called = torch.func.functional_call(sae, given, x)
            twin = copy.deepcopy(sae)
            for parameter in twin.parameters():
                parameter.mul_(factor)
            torch.testing.assert_close(called, twin(x), rtol=1e-5, atol=1e-5)
            assert torch.equal(sae(x), before)


def test_threads_share_a_module(activation):
    sae, x = make(activation, 0.7, 2.5).eval(), hidden_states(40)
    with torch.no_grad():
        expected = copy.deepcopy(sae)(x)

    def work(_):
        with torch.no_grad():
            return [sae(x), sae.decode(sae.encode(x))]

    with ThreadPoolExecutor(4) as pool:
        for forward, decoded in pool.map(work, range(16)):
            assert torch.equal(forward, expected)
            torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("warm", [True, False])
def test_a_forked_child_reconstructs(warm):
    sae, x = make_large(TopK(5)), hidden_states(1000)
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            expected = copy.deepcopy(sae)(x)  # opens threads
            if warm:
                sae(x)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads in the parent
                child = os.fork()
            if child == 0:
                same = False
                try:
                    same = sae(x).numpy().tobytes() == expected.numpy().tobytes()
                    sae.encode(x)
                finally:
                    os._exit(0 if same else 1)
        deadline = time.monotonic() + 60
        while (answer := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail("the child hangs")
            time.sleep(0.01)
        assert answer[1] == 0
    finally:
        torch.set_num_threads(1)


def test_a_compiled_module_sees_changes(scalars):
    torch._dynamo.reset()
    sae, x = make_large(TopK(5), *scalars), hidden_states(20)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), sae(x), rtol=1e-5, atol=1e-5)
            sae.W_enc.mul_(0.5)
    leaf = x.clone().requires_grad_()
    compiled(leaf).square().sum().backward()
    other = x.clone().requires_grad_()
    sae(other).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (20,), (3, 4), (0,)])
def test_chosen_features_are_columns_of_all(activation, scalars, shape):
    sae, x = make(activation, *scalars).eval(), hidden_states(*shape)
    with torch.no_grad():
        whole = sae.encode(x).dense()
        never = [f for f in range(N_FEATURES) if not whole[..., f].any()]
        for ids in ([7], [40, 0, 7, 7, 40], [*never[:3], 1], list(range(N_FEATURES)), []):
            for dtype in (torch.int32, torch.int64):
                chosen = torch.tensor(ids, dtype=dtype)
                columns = sae.encode_features(x, chosen)
                assert columns.shape == (*shape, len(ids))
                torch.testing.assert_close(columns, whole[..., chosen.long()], rtol=0, atol=0)


def test_gradients_of_chosen_features(activation, scalars):
    sae, x = make(activation, *scalars), hidden_states(12).requires_grad_()
    sae.eval()
    chosen = torch.tensor([40, 0, 7, 7, 3])
    weight = torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
    arguments = [x, sae.W_enc, sae.b_enc, sae.b_dec]
    expected_value = dense(sae, x, activation)[0][:, chosen]
    expected = torch.autograd.grad((expected_value * weight).sum(), arguments)
    value = sae.encode_features(x, chosen)
    torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad((value * weight).sum(), arguments), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_chosen_features_that_are_refused(activation):
    sae, x = make(activation).eval(), hidden_states(2)
    for ids in ([41], [-1], [3, 99]):
        with pytest.raises(ValueError, match="features: ids go from 0 to 40, got"):
            sae.encode_features(x, torch.tensor(ids))
    for ids in (torch.ones(2), torch.ones(1, 2).int(), torch.tensor(1), torch.ones(2).bool()):
        with pytest.raises(ValueError, match=r"features: expected integer ids \(m,\), got"):
            sae.encode_features(x, ids)
    with pytest.raises(TypeError, match="features: expected"):
        sae.encode_features(x, [1, 2])
    with pytest.raises(ValueError, match="x: expected shape"):
        sae.encode_features(torch.zeros(2, 8), torch.tensor([1]))
    sae.activation = BatchTopK(3)
    with pytest.raises(ValueError, match="BatchTopK needs a threshold"):
        sae.encode_features(x, torch.tensor([1]))


def test_forward_encode_and_steer_share_one_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    from saerec_fast.kernels import cpu

    packings = []

    def counted(*args, pack=cpu.pack):
        packings.append(args)
        return pack(*args)

    monkeypatch.setattr(cpu, "pack", counted)
    sae = SparseAutoencoder(8, 512, TopK(4)).eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        sae(x)
        sae.encode(x)
        sae(x)
        assert len(packings) == 1
        sae.W_enc.mul_(2)
        sae(x)
        sae.encode(x)
    assert len(packings) == 2


def test_threads_that_bind_a_module_at_once():
    """Each folds and packs weights of its own until one of them keeps its own; none may take half of another's."""
    x = hidden_states(40)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(60):
            sae, barrier = make_large(ReLU(), 0.1, 1.3), Barrier(4)

            def work(_, sae=sae, barrier=barrier):
                barrier.wait()
                with torch.no_grad():
                    return sae.decode(sae.encode(x)), sae(x)

            for decoded, forward in pool.map(work, range(4)):
                torch.testing.assert_close(decoded, forward, rtol=1e-5, atol=1e-5)
