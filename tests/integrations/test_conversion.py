"""Conversions held against the libraries themselves: what they save, and what they load.

A library that cannot be imported is a failure here, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from saerec_fast import SparseAutoencoder, load_sae, save_sae
from saerec_fast.types import BatchTopK, JumpReLU, ReLU, TopK

# The libraries' warnings are not errors of ours.
pytestmark = pytest.mark.filterwarnings("ignore")

D, N, K, ROWS = 16, 96, 8, 256


def hidden_states() -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(7)) * 2 + 0.5


def randomize(module: nn.Module) -> None:
    """All parameters, so that no bias is 0 and no decoder row of unit norm."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if name == "r_mag" else 1.0))


def assert_same(sae: SparseAutoencoder, a: Tensor, reconstruction: Tensor) -> None:
    """Both sides compute in float32; sums have at most N + D terms of at most a few tens."""
    tolerance = 2**-23 * (N + D) * 8
    x = hidden_states()
    assert 0 < (a > 0).float().mean() < 1
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x).dense(), a, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(sae(x), reconstruction, rtol=tolerance, atol=8 * tolerance)


@torch.no_grad()
def outputs(theirs: Any) -> tuple[Tensor, Tensor]:
    a = theirs.encode(hidden_states())
    return a, theirs.decode(a)


# SAELens.


def sae_lens_sae(architecture: str, training: bool = False, **options: Any) -> Any:
    peers.load("sae_lens")
    registry = import_module("sae_lens.registry")
    make = registry.get_sae_training_class if training else registry.get_sae_class
    sae_class, config_class = make(architecture)
    if architecture in ("topk", "batchtopk", "matryoshka_batchtopk"):
        options["k"] = K
    if architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = [N // 2, N]
    sae = sae_class(config_class(d_in=D, d_sae=N, **options)).eval()
    randomize(sae)
    return sae


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_from_sae_lens(architecture: str, centred: bool, tmp_path: Path) -> None:
    theirs = sae_lens_sae(architecture, apply_b_dec_to_input=centred)
    theirs.save_model(tmp_path)
    assert_same(load_sae(tmp_path), *outputs(theirs))


@pytest.mark.parametrize("centred", [True, False])
def test_from_sae_lens_rescaled(centred: bool, tmp_path: Path) -> None:
    theirs = sae_lens_sae("topk", apply_b_dec_to_input=centred, rescale_acts_by_decoder_norm=True)
    theirs.save_model(tmp_path)
    assert_same(load_sae(tmp_path), *outputs(theirs))


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_from_a_sae_lens_batch_topk_in_training(architecture: str, rescaled: bool, tmp_path: Path) -> None:
    theirs = sae_lens_sae(architecture, training=True, rescale_acts_by_decoder_norm=rescaled)
    theirs.topk_threshold.fill_(1.5)
    theirs.save_model(tmp_path / "training")
    sae = load_sae(tmp_path / "training")
    with torch.no_grad():
        a = sae.train().encode(hidden_states()).dense()
        torch.testing.assert_close(a, theirs.encode(hidden_states()), rtol=1e-4, atol=1e-4)
    # Its own conversion for inference, a JumpReLU.
    theirs.save_inference_model(tmp_path / "inference")
    inference = peers.load("sae_lens").SAE.load_from_disk(tmp_path / "inference")
    assert inference.cfg.architecture() == "jumprelu"
    assert_same(sae.eval(), *outputs(inference))
    assert_same(load_sae(tmp_path / "inference"), *outputs(inference))


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_from_a_scaled_sae_lens(architecture: str, centred: bool, from_file: bool, tmp_path: Path) -> None:
    options = {"rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    theirs = sae_lens_sae(
        architecture,
        apply_b_dec_to_input=centred,
        normalize_activations="expected_average_only_in",
        **options,
    )
    theirs.save_model(tmp_path)
    if from_file:
        scaler = import_module("sae_lens.training.activation_scaler")
        scaler.ActivationScaler(scaling_factor=0.37).save(str(tmp_path / "activation_scaler.json"))
    sae = load_sae(tmp_path, scaling_factor=None if from_file else 0.37)
    theirs.fold_activation_norm_scaling_factor(0.37)
    assert_same(sae, *outputs(theirs))


@pytest.mark.parametrize("rescaled", [True, False])
def test_from_a_scaled_sae_lens_batch_topk(rescaled: bool, tmp_path: Path) -> None:
    theirs = sae_lens_sae(
        "batchtopk",
        training=True,
        rescale_acts_by_decoder_norm=rescaled,
        normalize_activations="expected_average_only_in",
    )
    theirs.topk_threshold.fill_(1.5)
    theirs.save_model(tmp_path / "training")
    theirs.fold_activation_norm_scaling_factor(0.37)
    theirs.save_inference_model(tmp_path / "inference")
    inference = peers.load("sae_lens").SAE.load_from_disk(tmp_path / "inference")
    assert_same(load_sae(tmp_path / "training", scaling_factor=0.37), *outputs(inference))


def test_from_an_old_sae_lens_config(tmp_path: Path) -> None:
    library = peers.load("sae_lens")
    sae_lens_sae("standard").save_model(tmp_path)
    config = {"d_in": D, "d_sae": N, "dtype": "torch.float32", "hook_name": "blocks.0.hook_mlp_out"}
    config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False}
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"sae_lens_version": "3.20.0"}))
    theirs = library.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == "topk"
    assert_same(load_sae(tmp_path), *outputs(theirs))


# sparsify.


def test_from_sparsify(tmp_path: Path) -> None:
    library = peers.load("sparsify")
    theirs = library.SparseCoder(D, library.SparseCoderConfig(num_latents=N, k=K))
    randomize(theirs)
    theirs.save_to_disk(tmp_path)
    assert_same(load_sae(tmp_path), *sparsify_outputs(theirs))


@pytest.mark.parametrize(
    "options", [{"activation": "groupmax"}, {"transcode": True}, {"skip_connection": True, "transcode": True}]
)
def test_what_sparsify_alone_can_do(options: dict[str, Any], tmp_path: Path) -> None:
    library = peers.load("sparsify")
    library.SparseCoder(D, library.SparseCoderConfig(num_latents=N, k=K, **options)).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=rf"cfg\.json: {'|'.join(options)}: expected"):
        load_sae(tmp_path)


@torch.no_grad()
def sparsify_outputs(theirs: Any) -> tuple[Tensor, Tensor]:
    values, indices, _ = theirs.encode(hidden_states())
    a = torch.zeros(ROWS, N).scatter(-1, indices, values)
    return a, theirs.decode(values, indices)


# dictionary_learning.


def dictionary_class(name: str) -> Any:
    peers.load("dictionary_learning")
    module = {
        "AutoEncoderTopK": "trainers.top_k",
        "BatchTopKSAE": "trainers.batch_top_k",
        "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k",
    }.get(name, "dictionary")
    return getattr(import_module(f"dictionary_learning.{module}"), name)


def dictionary(name: str) -> Any:
    arguments: list[Any] = [D, N]
    if "TopK" in name:
        arguments.append(K)
    if name == "MatryoshkaBatchTopKSAE":
        arguments.append([N // 2, N - N // 2])
    sae = dictionary_class(name)(*arguments)
    randomize(sae)
    return sae


def save_dictionary(theirs: Any, folder: Path) -> None:
    """As dictionary_learning.training.trainSAE does."""
    torch.save({name: tensor.cpu() for name, tensor in theirs.state_dict().items()}, folder / "ae.pt")
    trainer = {"dict_class": type(theirs).__name__, "activation_dim": D, "dict_size": N}
    if "TopK" in trainer["dict_class"]:
        trainer["k"] = int(theirs.k)
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


@pytest.mark.parametrize("threshold", [1.5, None])
@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_from_dictionary_learning(name: str, threshold: float | None, tmp_path: Path) -> None:
    theirs = dictionary(name)
    if threshold is not None and "TopK" in name:
        theirs.threshold.fill_(threshold)
    save_dictionary(theirs, tmp_path)
    again = dictionary_class(name).from_pretrained(tmp_path / "ae.pt")
    assert_same(load_sae(tmp_path), *outputs(again))


# Ours, loaded by them.

ACTIVATIONS: dict[str, Callable[[], Any]] = {
    "relu": lambda: ReLU(),
    "jump_relu": lambda: JumpReLU(0.8),
    "jump_relu_per_feature": lambda: JumpReLU(torch.linspace(0, 2, N)),
    "topk": lambda: TopK(K),
    "batch_topk": lambda: BatchTopK(K, 1.5),
}


def make(activation: str, normalized: bool, unit: bool = False) -> SparseAutoencoder:
    mean, std = (0.7, 2.5) if normalized else (0.0, 1.0)
    sae = SparseAutoencoder(D, N, ACTIVATIONS[activation](), mean=mean, std=std)
    randomize(sae)
    if unit:
        sae.normalize_decoder_()
    return sae.eval()


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_to_sae_lens(activation: str, normalized: bool, tmp_path: Path) -> None:
    library = peers.load("sae_lens")
    sae = make(activation, normalized)
    save_sae(sae, tmp_path, "saelens")
    theirs = library.SAE.load_from_disk(tmp_path)
    assert_same(sae, *outputs(theirs))
    theirs.save_model(tmp_path / "again")
    assert_same(load_sae(tmp_path / "again"), *outputs(theirs))


@pytest.mark.parametrize("normalized", [True, False])
def test_to_sparsify(normalized: bool, tmp_path: Path) -> None:
    library = peers.load("sparsify")
    sae = make("topk", normalized)
    save_sae(sae, tmp_path, "sparsify")
    theirs = library.SparseCoder.load_from_disk(tmp_path)
    assert_same(sae, *sparsify_outputs(theirs))


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_to_dictionary_learning(activation: str, normalized: bool, unit: bool, tmp_path: Path) -> None:
    sae = make(activation, normalized, unit)
    save_sae(sae, tmp_path, "dictionary_learning")
    name = json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"]
    theirs = dictionary_class(name).from_pretrained(tmp_path / "ae.pt")
    assert_same(sae, *outputs(theirs))
