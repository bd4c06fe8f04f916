"""The module against dense formulas, and what saving and loading keep and refuse."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saerec_fast import reference
from saerec_fast.sae import ActivationStore, SparseAutoencoder
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
        made_inside = make(ReLU(), 0.7, 2.5).eval()
        made_inside(x)
        made_inside.W_dec.mul_(2)
        torch.testing.assert_close(made_inside(x), dense(made_inside, x, ReLU())[1], rtol=1e-5, atol=1e-5)
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
    with pytest.raises(ValueError, match="feature ids < 41"):
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
