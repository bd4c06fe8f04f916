"""Training and evaluation of sparse autoencoders on stored hidden states."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from saerec_fast.api import decode_sparse, encode_topk
from saerec_fast.files import read_json, read_tensors, write_json, write_tensors
from saerec_fast.sae.activation_store import ActivationStore, Batch
from saerec_fast.sae.adam import Adam
from saerec_fast.sae.gated import Gate
from saerec_fast.sae.jump_relu import TrainedThresholds
from saerec_fast.sae.model import SparseAutoencoder
from saerec_fast.sae.step import training_step
from saerec_fast.types import Activation, BatchTopK, ReLU, TopK

ActivationKind = Literal["relu", "topk", "batch_topk", "jump_relu", "gated"]

FIRED_THRESHOLDS = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0)

_LOG = "training.json"
_CHECKPOINT = "checkpoint.safetensors"
_CHECKPOINT_CONFIG = "checkpoint.json"
# Left out of the settings of other kinds, so that runs of those from before these existed can be taken up again.
_JUMP_RELU_FIELDS = ("l0_coefficient", "bandwidth", "initial_threshold")
_DECAY_SHARE = 0.2
_THRESHOLD_MEMORY = 0.95


@dataclass(frozen=True)
class SAETrainingConfig:
    """What decides the result of a training run.

    Losses are in normalised units and sum over the width: a row that is all error costs about ``d_model``.

    Attributes:
        n_features: size of the dictionary.
        activation: ``relu`` (with an L1 penalty), ``topk``, ``batch_topk``, ``jump_relu`` (with an L0 penalty) or
            ``gated`` (with an L1 penalty on its gate).
        k: active features per row; ``topk`` and ``batch_topk`` only.
        l1_coefficient: weight of ``mean ‖a‖₁`` (``relu``) or ``mean ‖ReLU(gate)‖₁`` (``gated``).
        l1_warmup_steps: steps over which the weight of the penalty, L1 or L0, grows linearly from 0; default a tenth
            of ``steps``.
        l0_coefficient: weight of ``mean ‖a‖₀``; ``jump_relu`` only.
        bandwidth: width of the window around a threshold whose pre-activations move it; ``jump_relu`` only.
        initial_threshold: of every feature; thresholds move slowly, so that from a large one few features are active in
            the end too. ``jump_relu`` only.
        learning_rate: of Adam; constant, then falling linearly to 0 over the last fifth of the steps.
        steps: optimiser steps.
        batch_size: rows a step; the whole store where that is smaller.
        auxiliary_k: dead features that reconstruct the error of a row; default half of ``d_model``. 0 switches the
            auxiliary loss off. ``topk`` and ``batch_topk`` only.
        auxiliary_coefficient: weight of the auxiliary loss.
        dead_after: rows without firing after which a feature counts as dead.
        normalize: subtract the store's scalar mean and divide by its scalar standard deviation.
        seed: of the initial dictionary and the order of the rows.

    Raises:
        ValueError: a value out of range.
    """

    n_features: int = 1024
    activation: ActivationKind = "relu"
    k: int = 32
    l1_coefficient: float = 0.5
    l1_warmup_steps: int | None = None
    l0_coefficient: float = 0.1
    bandwidth: float = 0.3
    initial_threshold: float = 0.3
    learning_rate: float = 1e-3
    steps: int = 6000
    batch_size: int = 2048
    auxiliary_k: int | None = None
    auxiliary_coefficient: float = 1 / 32
    dead_after: int = 200_000
    normalize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.activation not in get_args(ActivationKind):
            kinds = ", ".join(get_args(ActivationKind))
            raise ValueError(f"activation: expected one of {kinds}, got {self.activation!r}")
        for name, least in (
            ("n_features", 1),
            ("k", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("dead_after", 1),
            ("seed", 0),
        ):
            _check_integer(name, getattr(self, name), least)
        for name in ("l1_warmup_steps", "auxiliary_k"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 0)
        for name in ("l1_coefficient", "l0_coefficient", "auxiliary_coefficient", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        for name in ("bandwidth", "initial_threshold"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
        if self.activation in ("topk", "batch_topk") and self.k > self.n_features:
            raise ValueError(f"k: expected at most {self.n_features} (n_features), got {self.k}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        return self.learning_rate * min(1.0, (self.steps - step) / (_DECAY_SHARE * self.steps))

    def penalty_at(self, step: int) -> float:
        """The weight of the penalty, L1 or L0, at a step (from 0); 0 where there is none."""
        warmup = self.steps // 10 if self.l1_warmup_steps is None else self.l1_warmup_steps
        weights = {"relu": self.l1_coefficient, "gated": self.l1_coefficient, "jump_relu": self.l0_coefficient}
        return weights.get(self.activation, 0.0) * (min(1.0, step / warmup) if warmup else 1.0)

    def to_dict(self) -> dict[str, Any]:
        """A json-ready description; what only ``jump_relu`` has is missing from those of other kinds."""
        unused = () if self.activation == "jump_relu" else _JUMP_RELU_FIELDS
        return {name: value for name, value in asdict(self).items() if name not in unused}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SAETrainingConfig:
        """Inverse of :meth:`to_dict`; keys that are missing take their defaults.

        Raises:
            ValueError: an unknown key or a value out of range.
        """
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"config: unknown keys {sorted(unknown)}")
        return cls(**data)


def train_sae(
    store: ActivationStore,
    config: SAETrainingConfig,
    out_dir: str | os.PathLike[str],
    *,
    resume: bool = True,
    progress: bool = True,
    checkpoint_every: int = 1000,
    log_every: int = 50,
    device: torch.device | str = "cpu",
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> SparseAutoencoder:
    """Train an SAE on a store and save it as ``out_dir``.

    Losses, with ``r = ẑ − z`` in normalised units and means over rows: ``relu``: ``mean ‖r‖² + l1 · warmup · mean
    ‖a‖₁``. ``topk`` and ``batch_topk``: ``mean ‖r‖² + auxiliary_coefficient · mean ‖r + ê‖²``, where ``ê``
    reconstructs the error ``−r`` from the ``auxiliary_k`` largest dead features of a row (Gao et al., arXiv 2406.04093,
    section A.2).
    ``jump_relu`` learns a threshold per feature (:class:`~saerec_fast.sae.jump_relu.TrainedThresholds`), ``gated`` a
    gate (:class:`~saerec_fast.sae.gated.Gate`), which is folded into weights and thresholds in the end: of both comes
    an SAE with a ``JumpReLU``.
    Decoder rows have unit norm after every step. ``batch_topk`` (Bussmann et al., arXiv 2412.06410) selects the exact
    ``k · B`` largest activations of a batch; its threshold at inference is the running mean of the smallest
    one selected.

    ``out_dir`` receives the SAE (see :meth:`SparseAutoencoder.save`), ``training.json`` (config, and a curve of loss,
    reconstruction loss, L0, explained variance and dead share of the batch at every ``log_every``-th step), and while
    it runs ``checkpoint.safetensors`` with ``checkpoint.json``. A run that was interrupted continues from its last
    checkpoint and ends with the same bits as one that was not; a finished one is loaded.

    Args:
        store: hidden states, at least one row.
        config: what to train.
        out_dir: a folder, made where it is missing.
        resume: continue or load what lies in ``out_dir``; otherwise start again and overwrite it.
        progress: show a progress bar, if ``rich`` is installed.
        checkpoint_every: steps between checkpoints.
        log_every: steps between points of the curve.
        device: where to train.
        on_log: called with each point of the curve.

    Returns:
        The trained SAE in evaluation mode.

    Raises:
        ValueError: an empty store, ``out_dir`` holds a run of another config or store (and ``resume`` is set), or a
            corrupt checkpoint.
        FloatingPointError: the loss is no longer finite.
    """
    _check_integer("checkpoint_every", checkpoint_every, 1)
    _check_integer("log_every", log_every, 1)
    folder = Path(out_dir)
    mean, std = store.mean_std()
    identity = {
        "config": config.to_dict(),
        "store": {"n_rows": len(store), "d_model": store.d_model, "mean": mean, "std": std},
    }
    if resume and _is_finished(folder, identity):
        return SparseAutoencoder.load(folder, device=device)

    trainer = _Trainer(store, config, torch.device(device))
    curve: list[dict[str, float]] = []
    if resume and (folder / _CHECKPOINT).is_file():
        _check_identity(folder / _CHECKPOINT_CONFIG, read_json(folder / _CHECKPOINT_CONFIG), identity)
        trainer.restore(folder / _CHECKPOINT)
        curve = [point for point in _read_curve(folder) if point["step"] <= trainer.step]
    else:
        # In this order: a checkpoint must never lie beside another run's description.
        (folder / _CHECKPOINT).unlink(missing_ok=True)
        (folder / _LOG).unlink(missing_ok=True)
        write_json(folder / _CHECKPOINT_CONFIG, identity)

    with _progress_bar(progress, config.steps) as show:
        for hidden in trainer.rows():
            logging = (trainer.step + 1) % log_every == 0 or trainer.step + 1 == config.steps
            point = trainer.train_step(hidden, logging)
            if point is not None:
                curve.append(point)
                show(trainer.step, point)
                if on_log is not None:
                    on_log(point)
            if trainer.step % checkpoint_every == 0 and trainer.step < config.steps:
                write_json(folder / _LOG, {**identity, "complete": False, "curve": curve})
                trainer.save(folder / _CHECKPOINT)

    sae = trainer.finish()
    sae.save(folder)
    write_json(folder / _LOG, {**identity, "complete": True, "curve": curve})
    (folder / _CHECKPOINT).unlink(missing_ok=True)
    (folder / _CHECKPOINT_CONFIG).unlink(missing_ok=True)
    return sae


@torch.no_grad()
def evaluate_sae(sae: SparseAutoencoder, batches: Iterable[Batch | Tensor]) -> dict[str, Any]:
    """Quality of reconstruction and sparsity, in one pass over batches of hidden states.

    Args:
        sae: evaluated as in inference, whatever its mode.
        batches: tensors ``(..., d_model)``, or batches of a store.

    Returns:
        ``n_rows``; ``explained_variance``, ``1 − Σ_d Var(x − x̂) / Σ_d Var(x)``, each dimension centred by itself;
        ``mae`` and ``rmse`` over all numbers, in the units of the hidden states; ``l0``, mean number of activations
        > 0; ``dead_fraction``, share of features that never fired; ``thresholds`` (0, .1, .5, 1, 2, 3, in units of the
        activations); ``l0_above``, for each threshold the mean number of activations above it; and ``fired_fraction``,
        float64 array ``(len(thresholds), n_features)``, share of rows in which a feature is above it.

    Raises:
        ValueError: no rows.
    """
    was_training = sae.training
    sae.eval()
    n_rows = 0
    shift: Tensor | None = None
    sums = torch.zeros(4, sae.d_model, dtype=torch.float64)
    absolute = 0.0
    fired = torch.zeros(len(FIRED_THRESHOLDS), sae.n_features, dtype=torch.int64)
    try:
        for batch in batches:
            x = batch if isinstance(batch, Tensor) else batch.hidden
            x = x.reshape(-1, sae.d_model).to(sae.W_enc)
            if x.shape[0] == 0:
                continue
            features = sae.encode(x)
            error = x.double().sub_(sae.decode(features))
            centred = x.double()
            # Variances from sums of squares are safe once a typical row is taken off.
            shift = centred.mean(0) if shift is None else shift
            centred -= shift
            sums += torch.stack([centred.sum(0), centred.square().sum(0), error.sum(0), error.square().sum(0)]).cpu()
            absolute += float(error.abs().sum())
            n_rows += x.shape[0]
            for index, threshold in enumerate(FIRED_THRESHOLDS):
                active = features.indices[features.values > threshold]
                fired[index] += torch.bincount(active, minlength=sae.n_features).cpu()
    finally:
        sae.train(was_training)
    if n_rows == 0:
        raise ValueError("batches: expected at least one row")
    x_sum, x_square, error_sum, error_square = sums
    total = float((x_square - x_sum.square() / n_rows).sum())
    residual = float((error_square - error_sum.square() / n_rows).sum())
    above = (fired.sum(1).double() / n_rows).tolist()
    return {
        "n_rows": n_rows,
        "explained_variance": 1 - residual / total if total > 0 else float("nan"),
        "mae": absolute / (n_rows * sae.d_model),
        "rmse": math.sqrt(float(error_square.sum()) / (n_rows * sae.d_model)),
        "l0": above[0],
        "dead_fraction": float((fired[0] == 0).double().mean()),
        "thresholds": list(FIRED_THRESHOLDS),
        "l0_above": above,
        "fired_fraction": (fired.double() / n_rows).numpy(),
    }


class _Trainer:
    """Parameters, optimiser and counters of a run; all that a checkpoint holds.

    No random state is among it: the dictionary is drawn before the first step, and the order of the rows follows from
    the seed and the step alone.
    """

    def __init__(self, store: ActivationStore, config: SAETrainingConfig, device: torch.device) -> None:
        self.store = store
        self.config = config
        self.device = device
        self.step = 0
        self.batch_size = min(config.batch_size, len(store))
        generator = torch.Generator().manual_seed(config.seed)
        self.sae = SparseAutoencoder(
            store.d_model, config.n_features, _activation(config, None), generator=generator, dtype=torch.float32
        )
        self.sae.init_from(store, normalize=config.normalize)
        self.sae.to(device).train()
        self.mean, self.std = float(self.sae.mean), float(self.sae.std)
        self.encoder = _trained_encoder(config, device)
        further = dict(self.encoder.named_parameters()) if self.encoder else {}
        self.parameters = {**dict(self.sae.named_parameters()), **further}
        self.optimizer = Adam(self.sae, lr=config.learning_rate, further=further.values())
        self.rows_since_fired = torch.zeros(config.n_features, dtype=torch.int64, device=device)
        self.threshold = math.nan
        auxiliary_k = max(store.d_model // 2, 1) if config.auxiliary_k is None else config.auxiliary_k
        self.auxiliary_k = auxiliary_k if config.activation in ("topk", "batch_topk") else 0

    def rows(self) -> Iterator[Tensor]:
        """The remaining steps' rows ``(B, d)``, each epoch in an order of its own."""
        per_epoch = len(self.store) // self.batch_size
        while self.step < self.config.steps:
            epoch, start = divmod(self.step, per_epoch)
            for batch in self.store.batches(self.batch_size, (self.config.seed, epoch), True, start=start):
                yield batch.hidden
                if self.step == self.config.steps:
                    return

    def train_step(self, hidden: Tensor, logging: bool) -> dict[str, float] | None:
        """One optimiser step; returns a point of the curve if ``logging``. Overwrites ``hidden``."""
        config = self.config
        z = hidden.to(self.device)
        if config.normalize:
            z.sub_(self.mean).mul_(1 / self.std)
        penalty = config.penalty_at(self.step)
        if self.encoder is None:
            result = training_step(self.sae, z, l1_coefficient=penalty)
        else:
            result = self.encoder.training_step(self.sae, z, penalty)
        if config.activation == "batch_topk" and result.features is not None:
            self._follow_threshold(result.features.values)
        dead = (self.rows_since_fired > config.dead_after).nonzero().squeeze(1)
        auxiliary = 0.0 if dead.numel() == 0 or self.auxiliary_k == 0 else self._add_auxiliary(z, result.residual, dead)
        self.rows_since_fired += z.shape[0]
        self.rows_since_fired.masked_fill_(result.counts > 0, 0)

        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        self.optimizer.step()
        self.step += 1
        if not logging:
            return None
        reconstruction = float(result.reconstruction_loss)
        loss = float(result.loss) + float(auxiliary)
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.step}: the loss is {loss}; a smaller learning rate may help")
        variance = float((z - z.mean(0)).square_().sum())
        return {
            "step": self.step,
            "loss": loss,
            "reconstruction_loss": reconstruction,
            "l0": float(result.counts.sum()) / z.shape[0],
            "explained_variance": 1 - reconstruction * z.shape[0] / variance if variance > 0 else 0.0,
            "dead_fraction": float((self.rows_since_fired > config.dead_after).float().mean()),
        }

    def _follow_threshold(self, selected: Tensor) -> None:
        if selected.numel() == 0:
            return
        smallest = float(selected.min())
        if math.isnan(self.threshold):
            self.threshold = smallest
        else:
            self.threshold = _THRESHOLD_MEMORY * self.threshold + (1 - _THRESHOLD_MEMORY) * smallest

    def _add_auxiliary(self, z: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """Add the auxiliary loss' gradients of the dead features; returns the loss, weighted.

        The error of the reconstruction is a constant here, and so is ``b_dec``: only dead features learn from it.
        """
        sae = self.sae
        W_enc, b_enc, W_dec = (
            parameter.detach()[dead].requires_grad_() for parameter in (sae.W_enc, sae.b_enc, sae.W_dec)
        )
        k = min(self.auxiliary_k, dead.numel())
        features = encode_topk(z, W_enc, b_enc, sae.b_dec.detach(), k=k)
        error = decode_sparse(features, W_dec, None) + residual
        loss = error.square().sum() * (self.config.auxiliary_coefficient / z.shape[0])
        gradients = torch.autograd.grad(loss, (W_enc, b_enc, W_dec))
        for parameter, gradient in zip((sae.W_enc, sae.b_enc, sae.W_dec), gradients, strict=True):
            assert parameter.grad is not None  # the backward pass ran before
            parameter.grad.index_add_(0, dead, gradient)
        return loss.detach()

    def finish(self) -> SparseAutoencoder:
        """The trained SAE with its activation for inference."""
        threshold = None if math.isnan(self.threshold) else self.threshold
        self.sae.activation = _activation(self.config, threshold)
        if self.encoder is not None:
            self.encoder.finish(self.sae)
        for parameter in self.sae.parameters():
            parameter.grad = None
        return self.sae.eval()

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically."""
        tensors = self._state()
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        tensors["rows_since_fired"] = self.rows_since_fired
        tensors["step"] = torch.tensor(self.step)
        tensors["threshold"] = torch.tensor(self.threshold, dtype=torch.float64)
        write_tensors(path, {name: tensor.cpu() for name, tensor in tensors.items()})

    def restore(self, path: Path) -> None:
        """Read what :meth:`save` wrote for the same config.

        Raises:
            ValueError: truncated, corrupt, or tensors of another run.
        """
        tensors = read_tensors(path)
        expected = {name: tensor.shape for name, tensor in self._state().items()}
        for name, parameter in self.parameters.items():
            expected |= {f"adam.{name}.exp_avg": parameter.shape, f"adam.{name}.exp_avg_sq": parameter.shape}
            expected[f"adam.{name}.step"] = torch.Size()
        expected |= {
            "rows_since_fired": self.rows_since_fired.shape,
            "step": torch.Size(),
            "threshold": torch.Size(),
        }
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != expected:
            differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise ValueError(f"{path}: missing, unknown or of another shape: {', '.join(differing)}")
        for prefix, module in self._modules():
            module.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in module.state_dict()})
        for name, parameter in self.parameters.items():
            # Copies: a file's tensors may lie at any address, and results may depend on alignment.
            self.optimizer.state[parameter] = {
                key: tensors[f"adam.{name}.{key}"].to(self.device, copy=True)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.rows_since_fired.copy_(tensors["rows_since_fired"])
        self.step = int(tensors["step"])
        self.threshold = float(tensors["threshold"])

    def _modules(self) -> list[tuple[str, nn.Module]]:
        return [("sae", self.sae), *([] if self.encoder is None else [("encoder", self.encoder)])]

    def _state(self) -> dict[str, Tensor]:
        return {
            f"{prefix}.{name}": tensor
            for prefix, module in self._modules()
            for name, tensor in module.state_dict().items()
        }


def _activation(config: SAETrainingConfig, threshold: float | None) -> Activation:
    if config.activation == "topk":
        return TopK(config.k)
    return BatchTopK(config.k, threshold) if config.activation == "batch_topk" else ReLU()


def _trained_encoder(config: SAETrainingConfig, device: torch.device) -> TrainedThresholds | Gate | None:
    """What is learned beside the parameters of the autoencoder."""
    if config.activation == "jump_relu":
        return TrainedThresholds(
            config.n_features, initial=config.initial_threshold, bandwidth=config.bandwidth, device=device
        )
    return Gate(config.n_features, device=device) if config.activation == "gated" else None


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def _is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    if not (folder / _LOG).is_file():
        return False
    log = read_json(folder / _LOG)
    if not isinstance(log, dict) or log.get("complete") is not True:
        return False
    _check_identity(folder / _LOG, log, identity)
    return True


def _check_identity(path: Path, found: Any, identity: dict[str, Any]) -> None:
    differing = []
    for part, expected in identity.items():
        got = found.get(part) if isinstance(found, dict) else None
        got = got if isinstance(got, dict) else {}
        differing += [name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name)]
    if differing:
        raise ValueError(
            f"{path}: a run of another configuration or store (it differs in {', '.join(sorted(differing))}); "
            "choose another folder, or start again with resume=False"
        )


def _read_curve(folder: Path) -> list[dict[str, float]]:
    if not (folder / _LOG).is_file():
        return []
    log = read_json(folder / _LOG)
    return log["curve"] if isinstance(log, dict) and isinstance(log.get("curve"), list) else []


@contextmanager
def _progress_bar(enabled: bool, steps: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        enabled = False
    if not enabled:
        yield lambda step, point: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    with Progress(*columns, refresh_per_second=4) as bar:
        task = bar.add_task("SAE", total=steps, shown="")

        def show(step: int, point: dict[str, float]) -> None:
            shown = (
                f"loss {point['loss']:.3f}  L0 {point['l0']:.1f}  "
                f"explained {point['explained_variance']:.3f}  dead {point['dead_fraction']:.1%}"
            )
            bar.update(task, completed=step, shown=shown)

        yield show
