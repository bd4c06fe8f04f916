"""Checkpoints of other libraries against their formulas, written out in plain torch, and what is refused."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from saerec_fast import SparseAutoencoder, load_sae, save_sae
from saerec_fast.types import BatchTopK, JumpReLU, ReLU, TopK

D, N, K = 6, 24, 4
FOREIGN = ("saelens", "sparsify", "dictionary_learning")


# The formulas, in float64, from the files alone.


def relu_of_topk(scores: Tensor, k: int) -> Tensor:
    largest = scores.topk(k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, largest.indices, largest.values.relu())


def relu_above(scores: Tensor, threshold: Tensor | float) -> Tensor:
    return scores.relu() * (scores > threshold)


def saelens_formula(folder: Path, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction; ``scale`` folded as SAELens folds it, so before norms are taken."""
    config = json.loads((folder / "cfg.json").read_text())
    weights = {name: tensor.double() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    W_dec, b_dec = weights["W_dec"] / scale, weights["b_dec"] / scale
    W_enc = weights["W_enc"] * scale
    centred = x - b_dec if config.get("apply_b_dec_to_input", True) else x
    architecture = config.get("architecture")
    if config.get("activation_fn_str") == "topk":
        architecture, config["k"] = "topk", config["activation_fn_kwargs"]["k"]
    rescaled = architecture in ("topk", "batchtopk") and config.get("rescale_acts_by_decoder_norm", False)
    norms = W_dec.norm(dim=1) if rescaled else torch.ones(N).double()
    if architecture == "gated":
        gate = centred @ W_enc + weights["b_gate"] > 0
        a = gate * (centred @ (W_enc * weights["r_mag"].exp()) + weights["b_mag"]).relu()
    else:
        scores = (centred @ W_enc + weights["b_enc"]) * norms
        a = {
            "standard": lambda: scores.relu(),
            "jumprelu": lambda: scores.relu() * (scores > weights["threshold"]),
            "topk": lambda: relu_of_topk(scores, int(config["k"])),
            "batchtopk": lambda: relu_above(scores, weights["topk_threshold"] / (scale if rescaled else 1.0)),
        }[architecture]()
    return a, (a / norms) @ W_dec + b_dec


def sparsify_formula(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    config = json.loads((folder / "cfg.json").read_text())
    weights = {name: tensor.double() for name, tensor in load_file(folder / "sae.safetensors").items()}
    scores = ((x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"]).relu()
    values, indices = scores.topk(config["k"], dim=-1)
    a = torch.zeros_like(scores).scatter(-1, indices, values)
    return a, a @ weights["W_dec"] + weights["b_dec"]


def dictionary_learning_formula(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    weights = {name: tensor.double() for name, tensor in torch.load(folder / "ae.pt", weights_only=True).items()}
    if kind == "GatedAutoEncoder":
        scores = (x - weights["decoder_bias"]) @ weights["encoder.weight"].T
        magnitude = weights["r_mag"].exp() * scores + weights["mag_bias"]
        a = (scores + weights["gate_bias"] > 0) * magnitude.relu()
        return a, a @ weights["decoder.weight"].T + weights["decoder_bias"]
    if kind == "JumpReluAutoEncoder":
        scores = x @ weights["W_enc"] + weights["b_enc"]
        a = (scores * (scores > weights["threshold"])).relu()
        return a, a @ weights["W_dec"] + weights["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        scores = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        a = relu_above(scores, weights["threshold"])
        return a, a @ weights["W_dec"] + weights["b_dec"]
    W_enc, b_enc, W_dec = weights["encoder.weight"].T, weights["encoder.bias"], weights["decoder.weight"].T
    if kind == "AutoEncoderNew":
        a = (x @ W_enc + b_enc).relu()
        return a, a @ W_dec + weights["decoder.bias"]
    if kind == "AutoEncoder":
        norms = W_dec.norm(dim=1)  # from_pretrained brings the decoder to unit norm
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
        a = ((x - weights["bias"]) @ W_enc + b_enc).relu()
        return a, a @ W_dec + weights["bias"]
    scores = (x - weights["b_dec"]) @ W_enc + b_enc
    a = (
        relu_of_topk(scores, int(weights["k"]))
        if kind == "AutoEncoderTopK"
        else relu_above(scores.relu(), weights["threshold"])
    )
    return a, a @ W_dec + weights["b_dec"]


FORMULAS = {
    "saelens": saelens_formula,
    "sparsify": sparsify_formula,
    "dictionary_learning": dictionary_learning_formula,
}


# Checkpoints with random weights, decoder rows of all norms, and thresholds on both sides of 0.


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def write_saelens(folder: Path, architecture: str, **options: Any) -> None:
    tensors = {"W_enc": random(D, N), "W_dec": random(N, D), "b_dec": random(D)}
    if architecture == "gated":
        tensors |= {"b_gate": random(N), "b_mag": random(N), "r_mag": random(N) * 0.3}
    else:
        tensors["b_enc"] = random(N)
    if architecture == "jumprelu":
        tensors["threshold"] = random(N)
    if architecture == "batchtopk":
        tensors["topk_threshold"] = torch.tensor(0.75, dtype=torch.float64)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_z"},
    }
    if architecture in ("topk", "batchtopk"):
        config |= {"k": K, "rescale_acts_by_decoder_norm": False}
    (folder / "cfg.json").write_text(json.dumps(config | options))


def write_old_saelens(folder: Path) -> None:
    """As SAELens wrote it before 6."""
    write_saelens(folder, "standard")
    config = {
        "d_in": D,
        "d_sae": N,
        "dtype": "torch.float32",
        "hook_point": "blocks.0.hook_resid_pre",
        "normalize_activations": False,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "sae_lens_version": "3.20.0",
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"scaling_factor": torch.ones(N)}, folder / "sae_weights.safetensors")


def write_sparsify(folder: Path, **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"encoder.weight": random(N, D), "encoder.bias": random(N), "W_dec": random(N, D), "b_dec": random(D)}
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K}
    config |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(config | options))


def write_dictionary_learning(folder: Path, kind: str, threshold: float = 0.75, unit: bool = False) -> None:
    linear = {"encoder.weight": random(N, D), "encoder.bias": random(N), "decoder.weight": random(D, N)}
    if unit:
        linear["decoder.weight"] /= linear["decoder.weight"].norm(dim=0)
    matrices = {"W_enc": random(D, N), "b_enc": random(N), "W_dec": random(N, D), "b_dec": random(D)}
    selection = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(threshold)}
    tensors = {
        "AutoEncoder": lambda: linear | {"bias": random(D)},
        "AutoEncoderNew": lambda: linear | {"decoder.bias": random(D)},
        "AutoEncoderTopK": lambda: linear | selection | {"b_dec": random(D)},
        "BatchTopKSAE": lambda: linear | selection | {"b_dec": random(D)},
        "MatryoshkaBatchTopKSAE": lambda: matrices | selection | {"group_sizes": torch.tensor([3, N - 3])},
        "JumpReluAutoEncoder": lambda: matrices | {"threshold": random(N)},
        "GatedAutoEncoder": lambda: {
            "encoder.weight": random(N, D),
            "decoder.weight": random(D, N),
            "decoder_bias": random(D),
            "r_mag": random(N) * 0.3,
            "gate_bias": random(N),
            "mag_bias": random(N),
        },
    }[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": N, "lr": 1e-3}
    if "k" in tensors:
        trainer["k"] = K
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))


CHECKPOINTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{
        f"saelens-{architecture}-{'centred' if centred else 'plain'}": (
            "saelens",
            lambda folder, architecture=architecture, centred=centred: write_saelens(
                folder, architecture, apply_b_dec_to_input=centred
            ),
        )
        for architecture in ("standard", "topk", "jumprelu", "gated", "batchtopk")
        for centred in (True, False)
    },
    **{
        f"saelens-{architecture}-rescaled-{'centred' if centred else 'plain'}": (
            "saelens",
            lambda folder, architecture=architecture, centred=centred: write_saelens(
                folder, architecture, apply_b_dec_to_input=centred, rescale_acts_by_decoder_norm=True
            ),
        )
        for architecture in ("topk", "batchtopk")
        for centred in (True, False)
    },
    "saelens-k-with-a-point": ("saelens", lambda folder: write_saelens(folder, "batchtopk", k=4.0)),
    "saelens-before-6": ("saelens", write_old_saelens),
    "sparsify": ("sparsify", write_sparsify),
    "sparsify-by-factor": ("sparsify", lambda folder: write_sparsify(folder, num_latents=0, expansion_factor=N // D)),
    **{
        f"dictionary_learning-{kind}": (
            "dictionary_learning",
            lambda folder, kind=kind: write_dictionary_learning(folder, kind),
        )
        for kind in (
            "AutoEncoder",
            "AutoEncoderNew",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
            "JumpReluAutoEncoder",
            "GatedAutoEncoder",
        )
    },
    "dictionary_learning-AutoEncoder-unit": (
        "dictionary_learning",
        lambda folder: write_dictionary_learning(folder, "AutoEncoder", unit=True),
    ),
    "dictionary_learning-BatchTopKSAE-untrained": (
        "dictionary_learning",
        lambda folder: write_dictionary_learning(folder, "BatchTopKSAE", threshold=-1.0),
    ),
}


def hidden_states(rows: int = 64) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(7)) * 2 + 0.5


def assert_same(sae: SparseAutoencoder, x: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """Within float32 rounding: no number on the way exceeds a few hundred, no sum has more than N + D terms."""
    a, reconstruction = expected
    tolerance = 2**-23 * (N + D) * 16
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x).dense().double(), a, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(sae(x).double(), reconstruction, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("automatic", [True, False])
def test_a_checkpoint_computes_what_its_library_does(name: str, automatic: bool, tmp_path: Path) -> None:
    format, write = CHECKPOINTS[name]
    write(tmp_path)
    x = hidden_states()
    expected = FORMULAS[format](tmp_path, x.double())
    assert 0 < (expected[0] > 0).double().mean() < 1
    sae = load_sae(tmp_path, "auto" if automatic else format)
    assert not sae.training
    assert all(part.dtype == torch.float32 and part.is_contiguous() for part in sae.parameters())
    assert_same(sae, x, expected)


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated", "batchtopk"])
@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": False}, {"rescale_acts_by_decoder_norm": True}])
def test_a_constant_factor_on_the_input_is_folded(
    from_file: bool, architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    write_saelens(tmp_path, architecture, normalize_activations="expected_average_only_in", **options)
    x = hidden_states()
    expected = saelens_formula(tmp_path, x.double(), scale=0.37)
    if from_file:
        (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.37}')
        assert_same(load_sae(tmp_path), x, expected)
    else:
        assert_same(load_sae(tmp_path, scaling_factor=0.37), x, expected)


def test_a_batch_topk_selects_over_the_batch_in_training(tmp_path: Path) -> None:
    write_saelens(tmp_path, "batchtopk", rescale_acts_by_decoder_norm=True)
    x = hidden_states()
    weights = {name: tensor.double() for name, tensor in load_file(tmp_path / "sae_weights.safetensors").items()}
    scores = (x.double() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    scores = (scores * weights["W_dec"].norm(dim=1)).relu()
    expected = relu_of_topk(scores.flatten(), K * x.shape[0]).reshape(scores.shape)
    with torch.no_grad():
        a = load_sae(tmp_path).train().encode(x).dense().double()
    torch.testing.assert_close(a, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_topk_rescales_unless_told_otherwise(tmp_path: Path) -> None:
    """SAELens' default of the option is another one for batchtopk than for topk."""
    write_saelens(tmp_path, "batchtopk", rescale_acts_by_decoder_norm=True)
    x = hidden_states()
    expected = saelens_formula(tmp_path, x.double())
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["rescale_acts_by_decoder_norm"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert_same(load_sae(tmp_path), x, expected)


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning"])
def test_a_score_at_the_threshold_is_inactive(format: str, tmp_path: Path) -> None:
    """Small integers, so that every sum is exact, with and without folding."""
    W_enc, b_dec = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([3.0])
    tensors = {"W_enc": W_enc, "b_enc": torch.zeros(3), "W_dec": torch.ones(3, 1), "b_dec": b_dec}
    tensors["threshold"] = torch.tensor([2.0, 4.0, 0.0])
    if format == "saelens":
        save_file(tensors, tmp_path / "sae_weights.safetensors")
        config = {"architecture": "jumprelu", "d_in": 1, "d_sae": 3, "dtype": "float32", "apply_b_dec_to_input": False}
        (tmp_path / "cfg.json").write_text(json.dumps(config | {"metadata": {"sae_lens_version": "6.0.0"}}))
    else:
        torch.save(tensors, tmp_path / "ae.pt")
    with torch.no_grad():
        a = load_sae(tmp_path).encode(torch.tensor([[2.0], [3.0], [0.0], [-1.0]])).dense()
    assert a.tolist() == [[0, 0, 0], [3, 6, 0], [0, 0, 0], [0, 0, 1]]


def test_sixteen_bits_are_kept_unless_values_have_to_be_combined(tmp_path: Path) -> None:
    for name, centred, expected in (("as_is", True, torch.bfloat16), ("folded", False, torch.float32)):
        write_saelens(tmp_path / name, "standard", dtype="bfloat16", apply_b_dec_to_input=centred)
        assert load_sae(tmp_path / name).W_enc.dtype == expected
        assert load_sae(tmp_path / name, dtype=torch.float64).b_enc.dtype == torch.float64
    # The checkpoint's type is SAELens' for the weights, whatever the file holds.
    raw = load_file(tmp_path / "folded" / "sae_weights.safetensors")
    weights = {tensor_name: tensor.bfloat16().double() for tensor_name, tensor in raw.items()}
    folded = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
    torch.testing.assert_close(load_sae(tmp_path / "folded").b_enc.double(), folded, rtol=1e-6, atol=1e-6)


def test_a_file_without_a_class_is_told_by_its_tensors(tmp_path: Path) -> None:
    x = hidden_states()
    for kind in ("AutoEncoder", "AutoEncoderNew", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder"):
        folder = tmp_path / kind
        write_dictionary_learning(folder, kind)
        expected = dictionary_learning_formula(folder, x.double())
        (folder / "config.json").unlink()
        (folder / "ae.pt").rename(folder / "ae_100.pt")
        assert_same(load_sae(folder / "ae_100.pt"), x, expected)
    for kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        write_dictionary_learning(tmp_path / kind, kind)
        (tmp_path / kind / "config.json").unlink()
        with pytest.raises(ValueError, match=r"ae\.pt: AutoEncoderTopK and BatchTopKSAE .* config\.json .*dict_class"):
            load_sae(tmp_path / kind)


def test_a_file_of_training_takes_the_config_above_it(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path, "BatchTopKSAE")
    x = hidden_states()
    expected = dictionary_learning_formula(tmp_path, x.double())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "ae.pt").rename(tmp_path / "checkpoints" / "ae_100.pt")
    assert_same(load_sae(tmp_path / "checkpoints" / "ae_100.pt"), x, expected)


def test_folding_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dictionary_learning(tmp_path, "AutoEncoderNew")
    whole = load_sae(tmp_path).b_enc
    monkeypatch.setattr("saerec_fast.sae.conversion._ROWS_AT_ONCE", 5)
    torch.testing.assert_close(load_sae(tmp_path).b_enc, whole, rtol=1e-6, atol=1e-6)


def test_a_topk_autoencoder_of_before_thresholds(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path, "AutoEncoderTopK")
    x = hidden_states()
    expected = dictionary_learning_formula(tmp_path, x.double())
    tensors = torch.load(tmp_path / "ae.pt", weights_only=True)
    del tensors["threshold"]
    torch.save(tensors, tmp_path / "ae.pt")
    assert_same(load_sae(tmp_path), x, expected)


# Writing.

ACTIVATIONS = {
    "relu": lambda: ReLU(),
    "jump_relu": lambda: JumpReLU(0.3),
    "jump_relu_per_feature": lambda: JumpReLU(torch.linspace(0, 1, N)),
    "topk": lambda: TopK(K),
    "batch_topk": lambda: BatchTopK(K, 0.4),
}


def make(
    activation: str, *, mean: float = 0.0, std: float = 1.0, unit: bool = False, **kwargs: Any
) -> SparseAutoencoder:
    sae = SparseAutoencoder(D, N, ACTIVATIONS[activation](), mean=mean, std=std, **kwargs)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        if unit:
            sae.normalize_decoder_()
    return sae.eval()


def can_hold(format: str, activation: str) -> bool:
    return format != "sparsify" or activation == "topk"


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 2.5)])
@pytest.mark.parametrize(
    ("format", "activation"),
    [(format, activation) for format in FOREIGN for activation in ACTIVATIONS if can_hold(format, activation)],
)
def test_what_is_written_computes_the_same(
    format: str, activation: str, mean: float, std: float, unit: bool, tmp_path: Path
) -> None:
    sae = make(activation, mean=mean, std=std, unit=unit)
    save_sae(sae, tmp_path, format)
    x = hidden_states()
    expected = FORMULAS[format](tmp_path, x.double())
    assert_same(sae, x, expected)
    again = load_sae(tmp_path)
    assert_same(again, x, expected)
    if format != "saelens" or activation != "batch_topk":  # which SAELens saves as a JumpReLU
        loaded = JumpReLU if activation.startswith("jump") else type(sae.activation)
        assert type(again.activation) is loaded
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"saelens": ["cfg.json", "sae_weights.safetensors"], "sparsify": ["cfg.json", "sae.safetensors"]}.get(
            format, ["ae.pt", "config.json"]
        )
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_its_own_format_is_the_one_of_the_methods(activation: str, tmp_path: Path) -> None:
    sae = make(activation, mean=0.7, std=2.5)
    save_sae(sae, tmp_path)
    for again in (load_sae(tmp_path), load_sae(tmp_path, "saerec_fast"), SparseAutoencoder.load(tmp_path)):
        for name, value in sae.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)
    assert load_sae(tmp_path, dtype=torch.float64).W_dec.dtype == torch.float64


@pytest.mark.parametrize("format", FOREIGN)
def test_writing_and_reading_again_changes_no_bit_where_nothing_is_folded(format: str, tmp_path: Path) -> None:
    sae = make("topk", unit=True)
    save_sae(sae, tmp_path, format)
    again = load_sae(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in sae.state_dict().items())


def test_sixteen_bits_are_written_in_float32_where_values_have_to_be_combined(tmp_path: Path) -> None:
    save_sae(make("topk", dtype=torch.bfloat16), tmp_path / "plain", "saelens")
    save_sae(make("topk", dtype=torch.bfloat16, std=2.5), tmp_path / "folded", "saelens")
    save_sae(make("jump_relu", dtype=torch.bfloat16), tmp_path / "threshold", "saelens")  # 0.3 is no bfloat16
    found = {
        folder.name: {tensor.dtype for tensor in load_file(folder / "sae_weights.safetensors").values()}
        for folder in tmp_path.iterdir()
    }
    assert found == {"plain": {torch.bfloat16}, "folded": {torch.float32}, "threshold": {torch.float32}}
    assert json.loads((tmp_path / "plain" / "cfg.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("format", FOREIGN)
def test_tied_weights_are_written_twice(format: str, tmp_path: Path) -> None:
    sae = make("topk")
    sae.W_enc = sae.W_dec
    save_sae(sae, tmp_path, format)
    again = load_sae(tmp_path)
    assert torch.equal(again.W_enc, sae.W_dec)
    assert torch.equal(again.W_dec, sae.W_dec)


@pytest.mark.parametrize("activation", ["relu", "jump_relu", "batch_topk"])
def test_sparsify_holds_topk_alone(activation: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TopK alone"):
        save_sae(make(activation), tmp_path / "sae", "sparsify")
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning"])
def test_a_batch_topk_needs_its_threshold(format: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BatchTopK with a threshold"):
        save_sae(SparseAutoencoder(D, N, BatchTopK(K)), tmp_path / "sae", format)
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("format", FOREIGN)
def test_weights_that_are_not_finite_are_not_written(format: str, tmp_path: Path) -> None:
    sae = make("topk")
    with torch.no_grad():
        sae.W_dec[3, 2] = float("nan")
    with pytest.raises(ValueError, match="expected finite weights"):
        save_sae(sae, tmp_path / "sae", format)
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("format", FOREIGN)
def test_a_failed_write_leaves_the_old_checkpoint(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sae(make("topk"), tmp_path, format)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("saerec_fast.files.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_sae(make("topk"), tmp_path, format)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_stopping_between_the_files_pairs_no_weights_with_another_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sae(make("topk"), tmp_path, "saelens")
    replace = os.replace

    def stop(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == "sae_weights.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_sae(make("relu"), tmp_path, "saelens")
    assert [path.name for path in tmp_path.iterdir()] == ["sae_weights.safetensors"]
    with pytest.raises(ValueError, match="expected the files of one format"):
        load_sae(tmp_path)


def test_one_folder_holds_one_format(tmp_path: Path) -> None:
    sae = make("topk")
    for format in ("saerec_fast", *FOREIGN):
        save_sae(sae, tmp_path / format, format)
        save_sae(sae, tmp_path / format, format)
        for other in {"saerec_fast", *FOREIGN} - {format}:
            with pytest.raises(ValueError, match=f"holds {format}"):
                save_sae(sae, tmp_path / format, other)
    for name in ("cfg.json", "sae.safetensors"):
        (tmp_path / "saelens" / name).write_bytes((tmp_path / "sparsify" / name).read_bytes())
    with pytest.raises(ValueError, match="saelens and sparsify: give the format"):
        load_sae(tmp_path / "saelens")
    load_sae(tmp_path / "saelens", "sparsify")


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize_activations": "layer_norm"}, r"normalize_activations: expected 'none' or .*'layer_norm'"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations: expected"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations: expected"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations: .*scaling_factor"),
        ({"reshape_activations": "hook_z"}, 'reshape_activations: expected "none"'),
        ({"architecture": "transcoder"}, r"architecture: expected one of standard, .*'transcoder'"),
        ({"architecture": None}, "architecture: expected a string"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input: expected true or false"),
        ({"rescale_acts_by_decoder_norm": "yes"}, "rescale_acts_by_decoder_norm: expected true or false"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
        ({"k": 2.5}, "k: expected a whole number >= 1, got 2.5"),
        ({"k": N + 1}, f"k: expected at most {N}"),
        ({"k": 0}, "k: expected a whole number"),
        ({"d_in": D + 1}, r"b_dec: expected shape \(7,\)|W_enc: expected shape \(7, "),
    ],
)
def test_saelens_options_that_cannot_be_held(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_saelens(tmp_path, "topk")
    change_config(tmp_path / "cfg.json", **options)
    with pytest.raises(ValueError, match=rf"(cfg\.json|safetensors): {message}"):
        load_sae(tmp_path)


def test_an_old_hook_z_config_is_seen_by_its_hook(tmp_path: Path) -> None:
    write_old_saelens(tmp_path)
    change_config(tmp_path / "cfg.json", hook_point="blocks.0.attn.hook_z")
    with pytest.raises(ValueError, match="reshape_activations"):
        load_sae(tmp_path)
    change_config(tmp_path / "cfg.json", activation_fn_str="tanh-relu")
    with pytest.raises(ValueError, match="activation_fn: expected relu or topk, got 'tanh-relu'"):
        load_sae(tmp_path)


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), True, "2", 10**400])
def test_scaling_factors_that_are_none(factor: Any, tmp_path: Path) -> None:
    write_saelens(tmp_path, "standard", normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match="scaling_factor: expected a finite number > 0"):
        load_sae(tmp_path, scaling_factor=factor)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    with pytest.raises(ValueError, match=r"activation_scaler\.json: scaling_factor: expected a finite number > 0"):
        load_sae(tmp_path)


def test_a_scaling_factor_where_there_is_nothing_to_scale(tmp_path: Path) -> None:
    write_saelens(tmp_path / "saelens", "standard")
    write_sparsify(tmp_path / "sparsify")
    for folder in tmp_path.iterdir():
        with pytest.raises(ValueError, match="scaling_factor: expected None"):
            load_sae(folder, scaling_factor=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "groupmax"}, 'activation: expected "topk", got .groupmax'),
        ({"transcode": True}, "transcode: expected false"),
        ({"skip_connection": True}, "skip_connection: expected false"),
        ({"num_latents": N + 1}, f"num_latents: expected {N}"),
        ({"num_latents": 0, "expansion_factor": 2}, f"num_latents: expected {N}"),
        ({"k": True}, "k: expected a whole number"),
        ({"d_in": str(D)}, "d_in: expected a whole number"),
    ],
)
def test_sparsify_options_that_cannot_be_held(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_sparsify(tmp_path, **options)
    with pytest.raises(ValueError, match=rf"cfg\.json: {message}"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "IdentityDict"}, r"config\.json: dict_class: expected one of AutoEncoder"),
        ({"dict_class": "AutoEncoder"}, r"ae\.pt: expected the tensors .* of AutoEncoder"),
        ({"dict_class": "BatchTopKSAE", "k": K + 1}, rf"config\.json: k: expected {K}, got {K + 1}"),
        ({"dict_class": "BatchTopKSAE", "dict_size": 5}, rf"config\.json: dict_size: expected {N}, got 5"),
    ],
)
def test_a_dictionary_learning_config_that_does_not_fit(trainer: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path, "BatchTopKSAE")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    with pytest.raises(ValueError, match=message):
        load_sae(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: trainer: expected an object"):
        load_sae(tmp_path)


def test_a_decoder_row_of_zeros_cannot_be_scaled(tmp_path: Path) -> None:
    write_saelens(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    change_tensors(tmp_path, lambda tensors: tensors["W_dec"][5].zero_())
    with pytest.raises(ValueError, match=r"safetensors: the decoder's row of feature 5 is 0"):
        load_sae(tmp_path)


def test_arguments(tmp_path: Path) -> None:
    write_sparsify(tmp_path)
    with pytest.raises(ValueError, match=r"format: expected one of saerec_fast, .*'onnx'"):
        load_sae(tmp_path, "onnx")
    with pytest.raises(ValueError, match=r"format: expected one of saerec_fast, .*'auto'"):
        save_sae(make("topk"), tmp_path, "auto")
    with pytest.raises(TypeError, match="dtype: expected a floating point dtype"):
        load_sae(tmp_path, dtype=torch.int32)
    with pytest.raises(TypeError, match="sae: expected a SparseAutoencoder, got Linear"):
        save_sae(torch.nn.Linear(2, 3), tmp_path)
    with pytest.raises(FileNotFoundError):
        load_sae(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"sae_weights\.safetensors"):
        load_sae(tmp_path, "saelens")
    with pytest.raises(ValueError, match="expected a folder"):
        load_sae(tmp_path / "cfg.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected the files of one format"):
        load_sae(tmp_path / "empty")


WRITERS: dict[str, Callable[[Path], None]] = {
    "saelens": lambda folder: write_saelens(folder, "jumprelu"),
    "sparsify": write_sparsify,
    "dictionary_learning": lambda folder: write_dictionary_learning(folder, "BatchTopKSAE"),
}
WEIGHTS = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors", "dictionary_learning": "ae.pt"}
CONFIGS = {"saelens": "cfg.json", "sparsify": "cfg.json", "dictionary_learning": "config.json"}


def change_config(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    (path,) = (folder / name for name in WEIGHTS.values() if (folder / name).exists())
    tensors = torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)
    change(tensors)
    torch.save(tensors, path) if path.suffix == ".pt" else save_file(tensors, path)


@contextmanager
def checkpoint(format: str) -> Iterator[Path]:
    """hypothesis runs a test's body many times, which a folder per test does not fit."""
    with tempfile.TemporaryDirectory() as name:
        WRITERS[format](Path(name))
        yield Path(name)


def tensor_names() -> list[tuple[str, str]]:
    found = []
    for format in FOREIGN:
        with checkpoint(format) as folder:
            change_tensors(folder, lambda tensors, format=format: found.extend((format, name) for name in tensors))
    return found


TENSORS = tensor_names()


@pytest.mark.parametrize(("format", "name"), TENSORS)
@pytest.mark.parametrize("damage", ["missing", "shape", "type", "nan", "infinite"])
def test_damaged_tensors_are_named(format: str, name: str, damage: str, tmp_path: Path) -> None:
    WRITERS[format](tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        if damage == "missing":
            del tensors[name]
        elif damage == "shape":
            tensors[name] = torch.stack([tensors[name], tensors[name]])
        elif damage == "type":
            tensors[name] = tensors[name].to(torch.complex64)
        else:
            tensors[name] = tensors[name].float()
            tensors[name].view(-1)[-1] = float(damage[:3])

    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=rf"{re.escape(WEIGHTS[format])}: .*{re.escape(name)}"):
        load_sae(tmp_path)


@pytest.mark.parametrize("format", FOREIGN)
def test_tensors_that_nobody_knows_are_named(format: str, tmp_path: Path) -> None:
    WRITERS[format](tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update(W_skip=torch.zeros(D, D)))
    with pytest.raises(ValueError, match=rf"{re.escape(WEIGHTS[format])}: .*W_skip"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("format", "key"),
    [("saelens", key) for key in ("architecture", "d_in", "d_sae", "dtype")]
    + [("sparsify", key) for key in ("d_in", "k")],
)
def test_missing_keys_are_named(format: str, key: str, tmp_path: Path) -> None:
    WRITERS[format](tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config[key]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"cfg\.json: {key}: expected .*, got nothing"):
        load_sae(tmp_path)


@pytest.mark.parametrize("format", FOREIGN)
@given(data=st.data())
def test_truncated_weights(format: str, data: st.DataObject) -> None:
    with checkpoint(format) as folder:
        path = folder / WEIGHTS[format]
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(ValueError, match=re.escape(WEIGHTS[format])):
            load_sae(folder)


@pytest.mark.parametrize("format", FOREIGN)
@pytest.mark.parametrize("which", ["weights", "config"])
@given(content=st.binary(max_size=200))
@settings(max_examples=50)
def test_files_of_something_else(format: str, which: str, content: bytes) -> None:
    with checkpoint(format) as folder:
        name = (WEIGHTS if which == "weights" else CONFIGS)[format]
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(name)):
            load_sae(folder)


def loaded_or_refused(folder: Path) -> SparseAutoencoder | None:
    try:
        return load_sae(folder)
    except ValueError as error:
        message = str(error)
    assert str(folder) in message
    return None


@pytest.mark.parametrize("format", FOREIGN)
@given(data=st.data())
def test_changed_bytes_raise_nothing_undocumented(format: str, data: st.DataObject) -> None:
    with checkpoint(format) as folder:
        path = folder / WEIGHTS[format]
        content = bytearray(path.read_bytes())
        for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[position] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        sae = loaded_or_refused(folder)
        assert sae is None or all(torch.isfinite(tensor).all() for tensor in sae.state_dict().values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("format", FOREIGN)
@given(data=st.data())
def test_values_of_any_type_in_a_config(format: str, data: st.DataObject) -> None:
    with checkpoint(format) as folder:
        path = folder / CONFIGS[format]
        config = json.loads(path.read_text())
        part = config["trainer"] if format == "dictionary_learning" else config
        key, value = data.draw(st.sampled_from(sorted(part))), data.draw(JSON)
        part[key] = value
        path.write_text(json.dumps(config))
        decisive = {"saelens": ("architecture", "d_in", "d_sae", "dtype"), "sparsify": ("d_in", "k", "activation")}
        decisive["dictionary_learning"] = ("dict_class", "k", "activation_dim", "dict_size")
        sae = loaded_or_refused(folder)
        # Only what is valid, or plays no part, may pass.
        if sae is not None:
            assert (sae.d_model, sae.n_features) == (D, N)
            assert key not in decisive[format] or isinstance(value, (str, int, float))


def test_deep_json(tmp_path: Path) -> None:
    write_sparsify(tmp_path)
    (tmp_path / "cfg.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"cfg\.json: not valid json"):
        load_sae(tmp_path)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    write_dictionary_learning(tmp_path, "AutoEncoder")
    torch.save({"bias": Payload()}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"ae\.pt: not a complete file of tensors alone"):
        load_sae(tmp_path)
    assert not (tmp_path / "ran").exists()
    for content in (
        [torch.ones(2)],
        {"bias": 3},
        {3: torch.ones(2)},
        torch.ones(2),
        {"bias": torch.eye(3).to_sparse()},
    ):
        torch.save(content, tmp_path / "ae.pt")
        with pytest.raises(ValueError, match=r"ae\.pt: .*expected a (state dict|dense tensor)"):
            load_sae(tmp_path)


def test_values_that_folding_makes_infinite(tmp_path: Path) -> None:
    write_saelens(tmp_path, "standard", apply_b_dec_to_input=False)
    change_tensors(tmp_path, lambda tensors: (tensors["W_enc"].fill_(3e38), tensors["b_dec"].fill_(3e38)))
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors: b_enc: the converted values are too large"):
        load_sae(tmp_path)
    write_saelens(tmp_path, "standard")
    change_tensors(tmp_path, lambda tensors: tensors["W_enc"].fill_(1e6))
    with pytest.raises(ValueError, match=r"W_enc: the converted values are too large for torch\.float16"):
        load_sae(tmp_path, dtype=torch.float16)
