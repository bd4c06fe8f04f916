"""Checkpoints of SAELens, sparsify and dictionary_learning, to and from :class:`SparseAutoencoder`.

Every architecture is brought to the one form ``a = act(W_enc (x − b_dec) + b_enc)``, ``x̂ = a W_dec + b_dec``:

- an encoder that does not take ``b_dec`` off: ``W x + b = W (x − b_dec) + (b + W b_dec)``;
- scores multiplied with the norms ``r`` of the decoder rows before the selection, and divided by them before decoding:
  ``r ∘ W_enc``, ``r ∘ b_enc``, ``W_dec / r``;
- a constant factor ``s`` on the hidden states: ``s W_enc``, ``W_dec / s``, ``b_dec / s``;
- separate gates ``g + W x > 0`` and magnitudes ``e^r (W x) + m`` (Rajamanoharan et al., arXiv 2404.16014, appendix G):
  a JumpReLU of ``e^r ∘ W`` and bias ``m`` with threshold ``m − e^r g``;
- thresholds below 0, which a ReLU beside them makes the same as 0.

All three libraries compare strictly, ``pre > threshold``, as :class:`~saerec_fast.types.JumpReLU` does. The ReLU of the
k largest and the k largest of the ReLU differ in which features of value 0 they name, and in nothing else.

What the checkpoints mean was read from sae-lens 6.54.12, eai-sparsify 1.3.3 and dictionary-learning 0.1.0;
``tests/integrations`` holds the conversions against these libraries.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saerec_fast.files import atomic_path, read_json, read_tensors, write_json, write_tensors
from saerec_fast.sae.gated import fold_gate
from saerec_fast.sae.model import SparseAutoencoder, ordinary_tensors
from saerec_fast.types import Activation, BatchTopK, JumpReLU, ReLU, TopK
from saerec_fast.validation import FLOAT_DTYPES

CheckpointFormat = Literal["saerec_fast", "saelens", "sparsify", "dictionary_learning"]

# What a folder of each format holds; the files that come with it only sometimes are left out.
_FILES: dict[str, tuple[str, ...]] = {
    "saerec_fast": ("config.json", "sae.safetensors"),
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("ae.pt",),
}
_ROWS_AT_ONCE = 4096


class _Weights(NamedTuple):
    W_enc: Tensor  # (n, d)
    b_enc: Tensor  # (n,)
    W_dec: Tensor  # (n, d)
    b_dec: Tensor  # (d,)


class _Checkpoint(NamedTuple):
    """A checkpoint brought to the form of :class:`SparseAutoencoder`, with the files that errors name."""

    config_path: Path
    weights_path: Path
    weights: _Weights
    activation: Activation


@ordinary_tensors()
def load_sae(
    path: str | os.PathLike[str],
    format: CheckpointFormat | Literal["auto"] = "auto",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    scaling_factor: float | None = None,
) -> SparseAutoencoder:
    """Read a sparse autoencoder of this or of another library; activations and reconstructions stay what they were.

    ======================= ============================================ ==============================================
    ``format``              files in the folder                          what is read
    ======================= ============================================ ==============================================
    ``saerec_fast``         ``config.json``, ``sae.safetensors``         what :meth:`SparseAutoencoder.save` wrote
    ``saelens``             ``cfg.json``, ``sae_weights.safetensors``    standard, topk, jumprelu, gated; batchtopk and
                                                                         matryoshka_batchtopk as saved during training
    ``sparsify``            ``cfg.json``, ``sae.safetensors``            activation topk
    ``dictionary_learning`` ``ae.pt``, mostly with ``config.json``       AutoEncoder, AutoEncoderNew, AutoEncoderTopK,
                                                                         BatchTopKSAE, MatryoshkaBatchTopKSAE,
                                                                         JumpReluAutoEncoder, GatedAutoEncoder
    ======================= ============================================ ==============================================

    Nothing is unpickled but tensors (``torch.load(weights_only=True)``).

    Args:
        path: the folder; for dictionary_learning also the ``.pt`` file itself.
        format: one of the above; ``"auto"`` goes by the files in the folder.
        dtype: of the parameters. By default the type in which the other library computes: SAELens' ``dtype``, that of
            sparsify's weights, float32 for dictionary_learning; but float32 in place of a 16-bit type where weights
            have to be combined, which 16 bits would round.
        device: where the parameters go.
        scaling_factor: the factor that hidden states of a SAELens checkpoint with ``normalize_activations``
            ``"expected_average_only_in"`` were multiplied with. By default it is read from ``activation_scaler.json``
            where SAELens has left that file in the folder.

    Returns:
        The autoencoder in evaluation mode.

    Raises:
        FileNotFoundError: no such path, or a file of the named format is missing.
        ValueError: the folder holds no known checkpoint or more than one; a file is truncated, corrupt or lacks a key,
            has an unknown one, another shape or a value that is not finite; an architecture or option that this form
            cannot hold exactly. The message names the file, the key and what was expected.
        TypeError: ``dtype`` is not a floating point dtype.
    """
    path = Path(path)
    _check_format(format, (*_FILES, "auto"))
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")
    chosen = _detect(path) if format == "auto" else format
    if scaling_factor is not None:
        if chosen != "saelens":
            raise ValueError(f"scaling_factor: expected None for format {chosen!r}, got {scaling_factor}")
        scaling_factor = _check_scaling_factor("scaling_factor", scaling_factor)
    if chosen == "saerec_fast":
        sae = SparseAutoencoder.load(path, device=device)
        return sae if dtype is None else sae.to(dtype)
    with torch.no_grad():
        if chosen == "saelens":
            checkpoint = _read_saelens(path, scaling_factor)
        elif chosen == "sparsify":
            checkpoint = _read_sparsify(path)
        else:
            checkpoint = _read_dictionary_learning(path)
        return _build(checkpoint, dtype, device)


def save_sae(sae: SparseAutoencoder, path: str | os.PathLike[str], format: CheckpointFormat = "saerec_fast") -> None:
    """Write a checkpoint that this or another library loads, with the same activations and reconstructions there.

    ======================= ========================================================================================
    ``format``              activations
    ======================= ========================================================================================
    ``saerec_fast``         all; as :meth:`SparseAutoencoder.save`
    ``saelens``             ReLU as standard, TopK as topk, JumpReLU as jumprelu; BatchTopK as jumprelu with its
                            threshold, as SAELens does itself
    ``sparsify``            TopK
    ``dictionary_learning`` ReLU as AutoEncoder where decoder rows have unit norm, else as AutoEncoderNew (loading
                            rescales an AutoEncoder to unit norm there); TopK as AutoEncoderTopK, BatchTopK as
                            BatchTopKSAE, JumpReLU as JumpReluAutoEncoder
    ======================= ========================================================================================

    The scalar normalisation is folded into the weights. 16-bit weights are written in float32 where values have to be
    combined, which 16 bits would round. Both files are complete before either gets its name; stopping between the two
    renames leaves a folder without a configuration, never one with that of other weights.

    Args:
        sae: the autoencoder.
        path: the folder; made where it does not exist.
        format: one of the above.

    Raises:
        ValueError: an activation the format cannot hold, a ``BatchTopK`` without a threshold, weights that are not
            finite, or a folder that holds a checkpoint of another format. Nothing is written then.
        TypeError: ``sae`` is not a :class:`SparseAutoencoder`.
    """
    folder = Path(path)
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae: expected a SparseAutoencoder, got {type(sae).__name__}")
    _check_format(format, tuple(_FILES))
    others = [name for name in _present(folder) if name != format]
    if others:
        raise ValueError(f"path: expected a folder without a checkpoint of another format, {folder} holds {others[0]}")
    if format == "saerec_fast":
        sae.save(folder)
        return
    with torch.no_grad():
        weights = _plain_weights(sae)
        if format == "saelens":
            config, tensors = _to_saelens(weights, sae.activation)
        elif format == "sparsify":
            config, tensors = _to_sparsify(weights, sae.activation)
        else:
            config, tensors = _to_dictionary_learning(weights, sae.activation)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: expected finite weights, got NaN or infinity; nothing was saved")
    if format == "dictionary_learning":
        _write_pair(folder / "config.json", config, folder / "ae.pt", tensors, _write_torch)
    else:
        config_name, weights_name = _FILES[format]
        _write_pair(folder / config_name, config, folder / weights_name, tensors, write_tensors)


_SAELENS_BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
_SAELENS_ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", *_SAELENS_BATCH_TOPK)


def _read_saelens(folder: Path, scaling_factor: float | None) -> _Checkpoint:
    config_path, weights_path = _files(folder, "saelens")
    config = _Config(config_path)
    before_6 = _saelens_major_version(config) < 6
    architecture = config.text("architecture", *(("standard",) if before_6 else ()))
    named_k = _old_activation(config).get("topk") if before_6 else None
    if named_k is not None:
        architecture = "topk"
    if architecture not in _SAELENS_ARCHITECTURES:
        raise config.error("architecture", f"one of {', '.join(_SAELENS_ARCHITECTURES)}", architecture)
    hook_name = config.data.get("hook_name", config.data.get("hook_point"))
    flattens = before_6 and isinstance(hook_name, str) and "hook_z" in hook_name
    config.expect("reshape_activations", "none", default="hook_z" if flattens else "none")
    scale = _saelens_scale(config, folder, scaling_factor)
    tensors = _saelens_tensors(config, weights_path, architecture)

    activation: Activation = ReLU()
    if architecture == "gated":
        W_enc, b_enc, threshold = fold_gate(tensors["W_enc"].T, tensors["b_gate"], tensors["r_mag"], tensors["b_mag"])
        activation = _jump_relu(threshold)
    else:
        W_enc, b_enc = tensors["W_enc"].T, tensors["b_enc"]
    if architecture == "jumprelu":
        activation = _jump_relu(tensors["threshold"])
    weights = _Weights(W_enc, b_enc, tensors["W_dec"], tensors["b_dec"])
    if scale is not None:
        weights = _scale_inputs(weights, scale)
    if not config.flag("apply_b_dec_to_input", True):
        weights = _center_encoder(weights)
    if architecture == "topk" or architecture in _SAELENS_BATCH_TOPK:
        rescaled = config.flag("rescale_acts_by_decoder_norm", architecture != "topk")
        if rescaled:
            weights = _normalize_decoder(weights, weights_path)
        k = config.whole("k", config.data.get("k") if named_k is None else named_k)
        activation = TopK(k)
        if architecture != "topk":
            least = max(float(tensors["topk_threshold"]), 0.0)
            # In units of the rescaled scores, which the smaller decoder has made smaller.
            least = least / scale if rescaled and scale is not None else least
            activation = BatchTopK(k, least)
    return _Checkpoint(config_path, weights_path, weights, activation)


def _saelens_tensors(config: _Config, path: Path, architecture: str) -> dict[str, Tensor]:
    d, n = config.size("d_in"), config.size("d_sae")
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
    dtype = config.text("dtype").removeprefix("torch.")
    if dtype not in dtypes:
        raise config.error("dtype", f"one of {', '.join(dtypes)}", dtype)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, n), "W_dec": (n, d), "b_dec": (d,)}
    biases = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    shapes |= dict.fromkeys(biases, (n,))
    if architecture == "jumprelu":
        shapes["threshold"] = (n,)
    if architecture in _SAELENS_BATCH_TOPK:
        shapes["topk_threshold"] = ()
    tensors = _read_safetensors(path)
    # Old checkpoints carry a factor per feature; SAELens drops it where all are 1, and cannot load it otherwise.
    factors = tensors.pop("scaling_factor", None)
    if factors is not None and not (factors.is_floating_point() and torch.allclose(factors, torch.ones_like(factors))):
        raise ValueError(f"{path}: scaling_factor: expected ones, got other factors per feature")
    _check_tensors(path, tensors, shapes)
    return {name: tensor.to(dtypes[dtype]) for name, tensor in tensors.items()}


def _saelens_major_version(config: _Config) -> int:
    """0 where the configuration does not say, which is how SAELens below 6 wrote it."""
    metadata = config.data.get("metadata")
    version = config.data.get("sae_lens_version")
    if not version and isinstance(metadata, dict):
        version = metadata.get("sae_lens_version")
    digits = re.match(r"\d{1,9}(?!\d)", version) if isinstance(version, str) else None
    return int(digits[0]) if digits else 0


def _old_activation(config: _Config) -> dict[str, Any]:
    """``{"topk": k}`` or ``{"relu": None}``: the activation function as SAELens below 6 names it."""
    name = config.data.get("activation_fn", config.data.get("activation_fn_str", "relu"))
    if name == "relu":
        return {"relu": None}
    arguments = config.data.get("activation_fn_kwargs")
    if name != "topk":
        raise config.error("activation_fn", "relu or topk", name)
    if not isinstance(arguments, dict) or "k" not in arguments:
        raise config.error("activation_fn_kwargs", "an object with k", arguments)
    return {"topk": arguments["k"]}


def _saelens_scale(config: _Config, folder: Path, scaling_factor: float | None) -> float | None:
    normalization = config.data.get("normalize_activations", "none")
    # Configurations of old hold a truth value or nothing.
    if normalization in (None, False):
        normalization = "none"
    if normalization is True:
        normalization = "expected_average_only_in"
    if normalization == "none":
        if scaling_factor is not None:
            raise ValueError(
                f"scaling_factor: expected None where {config.path} has normalize_activations 'none', "
                f"got {scaling_factor}"
            )
        return None
    if normalization != "expected_average_only_in":
        raise config.error(
            "normalize_activations",
            "'none' or 'expected_average_only_in' (any other depends on the hidden state, or is no scalar)",
            normalization,
        )
    if scaling_factor is not None:
        return scaling_factor
    scaler = folder / "activation_scaler.json"
    if not scaler.is_file():
        raise config.error(
            "normalize_activations",
            f"'none', the argument scaling_factor, or the file {scaler.name} beside it: the factor is not in the "
            "checkpoint",
            normalization,
        )
    factor = _Config(scaler).data.get("scaling_factor")
    return _check_scaling_factor(f"{scaler}: scaling_factor", factor)


def _to_saelens(weights: _Weights, activation: Activation) -> tuple[dict[str, Any], dict[str, Tensor]]:
    n, d = weights.W_enc.shape
    tensors = {"W_enc": weights.W_enc.T, "b_enc": weights.b_enc, "W_dec": weights.W_dec, "b_dec": weights.b_dec}
    match activation:
        case ReLU():
            kind: dict[str, Any] = {"architecture": "standard"}
        case TopK(k=k):
            kind = {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
        case JumpReLU() | BatchTopK():
            kind = {"architecture": "jumprelu"}
            tensors["threshold"] = _threshold_tensor(activation, weights)
    tensors = _of_one_dtype(tensors)
    config = kind | {
        "d_in": d,
        "d_sae": n,
        "dtype": str(tensors["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # Without a version it would be read as a configuration of before 6.
        "metadata": {"sae_lens_version": "6.0.0"},
    }
    return config, tensors


def _read_sparsify(folder: Path) -> _Checkpoint:
    config_path, weights_path = _files(folder, "sparsify")
    config = _Config(config_path)
    config.expect("activation", "topk", default="topk")
    for option in ("transcode", "skip_connection"):
        if config.flag(option, False):
            raise config.error(option, "false (the output of a transcoder is not its input)", True)
    d, k = config.size("d_in"), config.whole("k", config.data.get("k"))
    tensors = _read_safetensors(weights_path)
    n, _ = _matrix_shape(weights_path, tensors, "encoder.weight")
    latents = config.data.get("num_latents") or None
    if latents is None and "expansion_factor" in config.data:
        latents = d * config.size("expansion_factor")
    if latents is not None and latents != n:
        raise config.error("num_latents", f"{n} like encoder.weight in {weights_path.name}", latents)
    _check_tensors(
        weights_path, tensors, {"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)}
    )
    if len(dtypes := {tensor.dtype for tensor in tensors.values()}) > 1:
        raise ValueError(f"{weights_path}: expected tensors of one type, got {sorted(map(str, dtypes))}")
    weights = _Weights(tensors["encoder.weight"], tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"])
    return _Checkpoint(config_path, weights_path, weights, TopK(k))


def _to_sparsify(weights: _Weights, activation: Activation) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not isinstance(activation, TopK):
        raise ValueError(f"sae: sparsify holds TopK alone, expected that activation, got {type(activation).__name__}")
    n, d = weights.W_enc.shape
    config = {
        "activation": "topk",
        "expansion_factor": max(n // d, 1),
        # Whether training is to normalise; the rows stay as they are on loading.
        "normalize_decoder": False,
        "num_latents": n,
        "k": activation.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d,
    }
    tensors = {
        "encoder.weight": weights.W_enc,
        "encoder.bias": weights.b_enc,
        "W_dec": weights.W_dec,
        "b_dec": weights.b_dec,
    }
    return config, _of_one_dtype(tensors)


# The state dicts of dictionary_learning's classes.
_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_MATRICES = {"W_enc", "b_enc", "W_dec", "b_dec"}
_DICTIONARY_KEYS: dict[str, set[str]] = {
    "AutoEncoder": _LINEAR | {"bias"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias"},
    "AutoEncoderTopK": _LINEAR | {"b_dec", "k", "threshold"},
    "BatchTopKSAE": _LINEAR | {"b_dec", "k", "threshold"},
    "MatryoshkaBatchTopKSAE": _MATRICES | {"k", "threshold", "group_sizes"},
    "JumpReluAutoEncoder": _MATRICES | {"threshold"},
    "GatedAutoEncoder": {"encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"},
}


def _read_dictionary_learning(path: Path) -> _Checkpoint:
    weights_path = path if path.is_file() else _files(path, "dictionary_learning")[0]
    config_path = weights_path.with_name("config.json")
    if weights_path.parent.name == "checkpoints" and not config_path.is_file():
        # Training leaves them in a folder below that of the configuration.
        config_path = weights_path.parent.with_name("config.json")
    trainer: dict[str, Any] = {}
    if config_path.is_file():
        data = _Config(config_path).data.get("trainer")
        if not isinstance(data, dict):
            raise ValueError(f"{config_path}: trainer: expected an object, got {_shown(data)}")
        trainer = data
    config = _Config(config_path, trainer)
    tensors = _read_torch(weights_path)
    kind = _dictionary_class(config, weights_path, set(tensors))
    k = _dictionary_k(config, weights_path, tensors) if "k" in _DICTIONARY_KEYS[kind] else None
    tensors = _checked_dictionary(weights_path, kind, tensors)
    activation: Activation
    weights, activation = _dictionary_weights(weights_path, kind, tensors)
    if k is not None:
        # Below 0 until training has estimated one; everything positive exceeds it.
        activation = TopK(k) if kind == "AutoEncoderTopK" else BatchTopK(k, max(float(tensors["threshold"]), 0.0))
    for name, value in zip(("dict_size", "activation_dim"), weights.W_enc.shape, strict=True):
        config.expect(name, value, default=value)
    return _Checkpoint(config_path if trainer else weights_path, weights_path, weights, activation)


def _checked_dictionary(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point tensors, in the type that the library's modules have, whatever was saved."""
    by_column = "W_enc" in tensors
    shape = _matrix_shape(path, tensors, "W_enc" if by_column else "encoder.weight")
    n, d = reversed(shape) if by_column else shape
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (n, d),
        "decoder.weight": (d, n),
        "W_enc": (d, n),
        "W_dec": (n, d),
        "threshold": (n,) if kind == "JumpReluAutoEncoder" else (),
        **dict.fromkeys(("bias", "decoder.bias", "b_dec", "decoder_bias"), (d,)),
        **dict.fromkeys(("encoder.bias", "b_enc", "r_mag", "gate_bias", "mag_bias"), (n,)),
    }
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("k", "group_sizes")}
    _check_tensors(path, kept, {name: shapes[name] for name in kept})
    return {name: tensor.float() for name, tensor in kept.items()}


def _dictionary_weights(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> tuple[_Weights, ReLU | JumpReLU]:
    """Weights, and the activation of the classes without a ``k``."""
    if kind == "GatedAutoEncoder":
        W_enc, b_enc, threshold = fold_gate(
            tensors["encoder.weight"], tensors["gate_bias"], tensors["r_mag"], tensors["mag_bias"]
        )
        return _Weights(W_enc, b_enc, tensors["decoder.weight"].T, tensors["decoder_bias"]), _jump_relu(threshold)
    if "W_enc" in tensors:
        weights = _Weights(tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"], tensors["b_dec"])
    else:
        (b_dec,) = (tensors[name] for name in ("bias", "decoder.bias", "b_dec") if name in tensors)
        weights = _Weights(tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"].T, b_dec)
    if kind == "JumpReluAutoEncoder":
        return _center_encoder(weights), _jump_relu(tensors["threshold"])
    if kind == "AutoEncoderNew":
        weights = _center_encoder(weights)
    if kind == "AutoEncoder":
        norms = torch.linalg.vector_norm(weights.W_dec, dim=1)
        if not torch.allclose(norms, torch.ones_like(norms)):
            weights = _normalize_decoder(weights, path)
    return weights, ReLU()


def _dictionary_class(config: _Config, weights_path: Path, names: set[str]) -> str:
    """The class that wrote tensors of these names: one of ``_DICTIONARY_KEYS``."""
    # Early top-k autoencoders had no threshold, which their default encoding does not use.
    candidates = [
        kind
        for kind, keys in _DICTIONARY_KEYS.items()
        if names == keys or (kind == "AutoEncoderTopK" and names == keys - {"threshold"})
    ]
    if "dict_class" in config.data:
        named = config.text("dict_class")
        if named not in _DICTIONARY_KEYS:
            raise config.error("dict_class", f"one of {', '.join(_DICTIONARY_KEYS)}", named)
        if named not in candidates:
            raise ValueError(
                f"{weights_path}: expected the tensors {sorted(_DICTIONARY_KEYS[named])} of {named} "
                f"(dict_class in {config.path.name}), got {sorted(names)}"
            )
        return named
    if not candidates:
        known = "; ".join(f"{kind}: {', '.join(sorted(keys))}" for kind, keys in _DICTIONARY_KEYS.items())
        raise ValueError(f"{weights_path}: expected the tensors of one of {known}; got {sorted(names)}")
    if len(candidates) > 1:
        raise ValueError(
            f"{weights_path}: {' and '.join(candidates)} have the same tensors; expected {config.path.name} with it, "
            'holding {"trainer": {"dict_class": …}}'
        )
    return candidates[0]


def _dictionary_k(config: _Config, weights_path: Path, tensors: Mapping[str, Tensor]) -> int:
    stored = tensors["k"]
    if stored.dim() != 0 or stored.is_floating_point() or stored.is_complex() or stored.dtype == torch.bool:
        raise ValueError(f"{weights_path}: k: expected one integer, got {stored.dtype} {tuple(stored.shape)}")
    k = int(stored)
    if k < 1:
        raise ValueError(f"{weights_path}: k: expected an integer >= 1, got {k}")
    config.expect("k", k, default=k)
    return k


def _to_dictionary_learning(weights: _Weights, activation: Activation) -> tuple[dict[str, Any], dict[str, Tensor]]:
    n, d = weights.W_enc.shape
    trainer: dict[str, Any] = {"activation_dim": d, "dict_size": n}
    tensors = {"encoder.weight": weights.W_enc, "encoder.bias": weights.b_enc, "decoder.weight": weights.W_dec.T}
    match activation:
        case ReLU():
            norms = torch.linalg.vector_norm(weights.W_dec.float(), dim=1)
            if torch.allclose(norms, torch.ones_like(norms)):
                trainer["dict_class"] = "AutoEncoder"
                tensors["bias"] = weights.b_dec
            else:
                trainer["dict_class"] = "AutoEncoderNew"
                tensors |= {"encoder.bias": _center_encoder(weights, -1).b_enc, "decoder.bias": weights.b_dec}
        case JumpReLU():
            trainer["dict_class"] = "JumpReluAutoEncoder"
            tensors = {
                "W_enc": weights.W_enc.T,
                "b_enc": _center_encoder(weights, -1).b_enc,
                "W_dec": weights.W_dec,
                "b_dec": weights.b_dec,
                "threshold": _threshold_tensor(activation, weights),
            }
        case TopK(k=k):
            trainer |= {"dict_class": "AutoEncoderTopK", "k": k}
            # Below 0: none was estimated.
            tensors |= {"b_dec": weights.b_dec, "threshold": torch.tensor(-1.0, dtype=torch.float32)}
        case BatchTopK(k=k):
            trainer |= {"dict_class": "BatchTopKSAE", "k": k}
            tensors |= {
                "b_dec": weights.b_dec,
                "threshold": torch.tensor(_batch_threshold(activation), dtype=torch.float32),
            }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if "k" in trainer:
        tensors["k"] = torch.tensor(trainer["k"], dtype=torch.int32)
    return {"trainer": trainer}, tensors


def _center_encoder(weights: _Weights, sign: int = 1) -> _Weights:
    """An encoder of ``x`` as one of ``x − b_dec``; with ``sign`` −1 the other way round."""
    wide = torch.promote_types(weights.W_enc.dtype, torch.float32)
    centre = weights.b_dec.double()
    shift = torch.cat([rows.double() @ centre for rows in weights.W_enc.split(_ROWS_AT_ONCE)])
    return weights._replace(b_enc=(weights.b_enc.double() + sign * shift).to(wide))


def _normalize_decoder(weights: _Weights, path: Path) -> _Weights:
    """Norms of the decoder rows moved into the encoder: ``a`` is multiplied with them, ``x̂`` stays."""
    wide = torch.promote_types(weights.W_enc.dtype, torch.float32)
    norms = torch.linalg.vector_norm(weights.W_dec.to(wide), dim=1, keepdim=True)
    if not (norms > 0).all():
        row = int((norms.squeeze(1) > 0).logical_not().nonzero()[0])
        raise ValueError(
            f"{path}: the decoder's row of feature {row} is 0; expected rows that can be scaled to unit norm, as "
            "this checkpoint's are"
        )
    return _Weights(
        weights.W_enc * norms, weights.b_enc * norms.squeeze(1), weights.W_dec / norms, weights.b_dec.to(wide)
    )


def _scale_inputs(weights: _Weights, scale: float) -> _Weights:
    """Weights for ``x`` from weights for ``scale · x``."""
    wide = torch.promote_types(weights.W_enc.dtype, torch.float32)
    W_enc, b_enc, W_dec, b_dec = (part.to(wide) for part in weights)
    return _Weights(W_enc * scale, b_enc, W_dec / scale, b_dec / scale)


def _jump_relu(threshold: Tensor) -> JumpReLU:
    return JumpReLU(threshold.clamp(min=0))


def _batch_threshold(activation: BatchTopK) -> float:
    if activation.threshold is None:
        raise ValueError(
            "sae: expected a BatchTopK with a threshold, got None; train the SAE or give BatchTopK(k, threshold)"
        )
    return activation.threshold


def _threshold_tensor(activation: JumpReLU | BatchTopK, weights: _Weights) -> Tensor:
    """Thresholds ``(n,)``, in the type of the weights where that holds them exactly, else in float32."""
    threshold = _batch_threshold(activation) if isinstance(activation, BatchTopK) else activation.threshold
    if isinstance(threshold, Tensor):
        threshold = threshold.detach().cpu()
    else:
        # What the ops compare with.
        threshold = torch.tensor(threshold, dtype=torch.float32)
    narrow = threshold.to(weights.W_enc.dtype)
    exact = narrow if torch.equal(narrow.double(), threshold.double()) else threshold
    return exact.expand(weights.W_enc.shape[0])


def _plain_weights(sae: SparseAutoencoder) -> _Weights:
    """On the CPU, the scalar normalisation folded in."""
    weights = _Weights(*(part.detach().cpu() for part in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)))
    mean, std = float(sae.mean), float(sae.std)
    if mean == 0.0 and std == 1.0:
        return weights
    W_enc, b_enc, W_dec, b_dec = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in weights)
    return _Weights(W_enc / std, b_enc, W_dec * std, b_dec * std + mean)


def _of_one_dtype(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The widest type among them for all; both libraries keep one."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    # Copies, as no file may hold the same memory twice, which tied weights would.
    return {
        name: tensor.to(dtype, copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _build(checkpoint: _Checkpoint, dtype: torch.dtype | None, device: torch.device | str) -> SparseAutoencoder:
    weights = checkpoint.weights
    n, d = weights.W_enc.shape
    if dtype is None:
        dtype = reduce(torch.promote_types, (part.dtype for part in weights))
    try:
        sae = SparseAutoencoder(d, n, checkpoint.activation, device="meta", dtype=dtype)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint.config_path}: {error}") from None
    state = weights._asdict()
    threshold = getattr(checkpoint.activation, "threshold", None)
    if isinstance(threshold, Tensor):
        state["threshold"] = threshold
    # Copies in row order: what the files hold may be transposed, and lie at any address.
    state = {
        name: torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor) for name, tensor in state.items()
    }
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{checkpoint.weights_path}: {name}: the converted values are too large for {dtype}")
    state |= {
        "mean": torch.zeros((), dtype=torch.float32, device=device),
        "std": torch.ones((), dtype=torch.float32, device=device),
    }
    sae.load_state_dict(state, assign=True)
    return sae.eval()


class _Config:
    """A json object whose errors name the file and the key."""

    def __init__(self, path: Path, data: dict[str, Any] | None = None) -> None:
        self.path = path
        if data is None:
            try:
                data = read_json(path)
            except RecursionError:
                raise ValueError(f"{path}: not valid json (nested too deeply)") from None
            except ValueError as error:
                message = str(error)
                raise ValueError(message if str(path) in message else f"{path}: not valid json ({message})") from None
            if not isinstance(data, dict):
                raise ValueError(f"{path}: expected a json object, got {_shown(data)}")
        self.data = data

    def error(self, key: str, expected: str, value: Any) -> ValueError:
        came = _shown(value) if key in self.data or value is not None else "nothing"
        return ValueError(f"{self.path}: {key}: expected {expected}, got {came}")

    def text(self, key: str, *default: str) -> str:
        value = self.data.get(key, *default)
        if not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def size(self, key: str) -> int:
        return self.whole(key, self.data.get(key))

    def whole(self, key: str, value: Any) -> int:
        """A whole number ≥ 1, also where it is written with a point (SAELens' BatchTopK takes fractions)."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (isinstance(value, float) and value.is_integer())) or value < 1:
            raise self.error(key, "a whole number >= 1", value)
        return int(value)

    def expect(self, key: str, expected: Any, *, default: Any) -> None:
        value = self.data.get(key, default)
        if type(value) is not type(expected) or value != expected:
            raise self.error(key, json.dumps(expected), value)


def _shown(value: Any) -> str:
    """Of any json, however long or deep."""
    return reprlib.repr(value)


def _check_format(format: str, known: tuple[str, ...]) -> None:
    if format not in known:
        raise ValueError(f"format: expected one of {', '.join(known)}, got {format!r}")


def _check_scaling_factor(name: str, factor: Any) -> float:
    number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    if not number or not 0 < factor <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number > 0, got {_shown(factor)}")
    return float(factor)


def _present(folder: Path) -> list[str]:
    """The formats whose files lie in ``folder``."""
    return [name for name, files in _FILES.items() if all((folder / file).is_file() for file in files)]


def _detect(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix != ".pt":
            raise ValueError(f"{path}: expected a folder, or the .pt file of dictionary_learning")
        return "dictionary_learning"
    present = _present(path)
    if len(present) != 1:
        known = "; ".join(f"{name}: {', '.join(files)}" for name, files in _FILES.items())
        came = f"those of {' and '.join(present)}: give the format" if present else "none of them"
        raise ValueError(f"{path}: expected the files of one format ({known}), got {came}")
    return present[0]


def _files(folder: Path, format: str) -> list[Path]:
    paths = [folder / name for name in _FILES[format]]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a folder of format {format!r}")
    return paths


def _matrix_shape(path: Path, tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors:
        raise ValueError(f"{path}: expected a tensor {name}, got {sorted(tensors)}")
    shape = tuple(tensors[name].shape)
    if len(shape) != 2:
        raise ValueError(f"{path}: {name}: expected a matrix, got shape {shape}")
    return shape


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"{path}: expected tensors {sorted(expected)}, without {', '.join(missing)}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise ValueError(f"{path}: expected tensors {sorted(expected)}, also got {', '.join(unknown)}")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: {name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{path}: {name}: expected one of {', '.join(map(str, FLOAT_DTYPES))}, got {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name}: expected finite values, got NaN or infinity")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a sound header may still name a type that torch does not have
        raise ValueError(f"{path}: not a complete safetensors file ({error!r})") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler and the archive reader raise all sorts of things on damaged bytes
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: not a complete file of tensors alone ({reason or type(error).__name__})") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path}: expected a state dict, tensors by name, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name}: expected a dense tensor, got {_shown(type(tensor).__name__)}")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # By file, as the archive would carry the temporary name; cloned, as a view would bring its whole storage along.
    with path.open("wb") as file:
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, file)


def _write_pair(
    config_path: Path,
    config: dict[str, Any],
    weights_path: Path,
    tensors: Mapping[str, Tensor],
    write: Callable[[Path, Mapping[str, Tensor]], None],
) -> None:
    with atomic_path(config_path) as new_config:
        write_json(new_config, config)
        with atomic_path(weights_path) as new_weights:
            write(new_weights, tensors)
            # From here on until both are renamed there is no configuration, rather than that of other weights.
            config_path.unlink(missing_ok=True)
