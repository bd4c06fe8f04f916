"""The sparse autoencoder as a module: parameters, normalisation, saving; the arithmetic is the ops'."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from saerec_fast.api import (
    bind_reconstruct,
    bind_steer,
    decode_sparse,
    encode_features,
    encode_threshold,
    encode_topk,
    linear_topk,
    pack_weights,
    reconstruct,
    steer,
    steer_by_features,
    steer_normalized,
)
from saerec_fast.backend import KERNEL_DTYPES, choose, is_transformed, is_watched
from saerec_fast.files import read_json, read_tensors, write_json, write_tensors
from saerec_fast.reference import fold_decoder, fold_normalization, report_excess
from saerec_fast.sae.activation_store import ActivationStore
from saerec_fast.training_ops import largest_entries
from saerec_fast.types import (
    Activation,
    BatchTopK,
    JumpReLU,
    PackedWeights,
    ReLU,
    SparseFeatures,
    SteeringPlan,
    TopK,
    inference_threshold,
)
from saerec_fast.validation import check_features, check_plan, check_strengths, check_weight

if TYPE_CHECKING:
    from saerec_fast._C import PlainSteer
    from saerec_fast.kernels.cpu import BoundSteer

_FORMAT = "saerec_fast.sae"
_VERSION = 1
_WEIGHTS = "sae.safetensors"
_CONFIG = "config.json"
# BatchTopK encodes above a threshold that this many rows, by their largest pre-activations (a multiple of k each),
# let expect to leave a surplus of entries. The share above it varies between rows by about half, so a quarter more is
# four standard errors; where it still falls short, the next guess takes more.
_BATCH_TOPK_SAMPLE = 64
_BATCH_TOPK_SAMPLE_WIDTH = 4
_BATCH_TOPK_SURPLUS = (1.25, 2.5)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Around what makes parameters: no inference tensors, even where ``torch.inference_mode`` is on.

    Those do not count their versions, so nothing that is made from them could be kept, and they cannot be trained.
    Leaving inference mode turns gradients on, which stay off here.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class FoldedWeights(NamedTuple):
    """Weights that act on hidden states in their own units: the scalar normalisation is inside them.

    Attributes:
        W_enc: ``(n, d)``.
        b_enc: ``(n,)``.
        b_dec: ``(d,)``.
        W_dec: ``(n, d)``.
    """

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    W_dec: Tensor


class _Bound(NamedTuple):
    """Kernels with the weights fixed. The tensors are kept: no new one may get the address of an old one."""

    key: tuple[Any, ...]
    tensors: list[Tensor]
    reconstruct: Callable[[Tensor], Tensor]
    steer: BoundSteer


class SparseAutoencoder(nn.Module):
    """``a = act(W_enc (z − b_dec) + b_enc)``, ``x̂ = std · (a W_dec + b_dec) + mean`` with ``z = (x − mean) / std``.

    Hidden states ``x`` and reconstructions ``x̂`` are in the units of the model they come from; activations ``a`` and
    all parameters are in normalised units. ``mean`` and ``std`` are one number each (0 and 1 by default); they are
    folded into the weights, so that normalising costs no pass over the data.

    Decoder rows start as random directions of unit norm, and the encoder as a copy of the decoder (Gao et al.,
    arXiv 2406.04093, section 2.4); both biases start at 0.

    It may be made, loaded and moved under ``torch.inference_mode``: its tensors are ordinary ones all the same. Where
    they are not (a copy or an unpickled one made there, tensors assigned from outside), results are the same, but
    nothing that is made from the weights is kept between calls, which are several times slower then.

    Args:
        d_model: width ``d`` of the hidden states, ≥ 1.
        n_features: size ``n`` of the dictionary, ≥ 1.
        activation: :class:`~saerec_fast.types.ReLU` (default), ``JumpReLU``, ``TopK`` or ``BatchTopK``. A ``JumpReLU``
            with a tensor of thresholds keeps it as the buffer ``threshold``.
        mean: scalar that is subtracted from hidden states.
        std: scalar that divides them, > 0.
        generator: source of the initial directions; torch's global one by default.
        device: of the parameters.
        dtype: of the parameters; a floating type.

    Attributes:
        W_enc: parameter ``(n, d)``.
        b_enc: parameter ``(n,)``.
        W_dec: parameter ``(n, d)``.
        b_dec: parameter ``(d,)``.
        mean: buffer, float32 scalar whatever the type of the parameters.
        std: likewise.

    Raises:
        ValueError: a size < 1, ``k`` > ``n_features``, thresholds of another size, or a ``std`` that is not positive.
        TypeError: not an activation.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    mean: Tensor
    std: Tensor
    threshold: Tensor | None
    _folded: tuple[Any, FoldedWeights, list[Tensor]] | None
    _packed: tuple[Any, PackedWeights | None, list[Tensor]] | None
    _bound: _Bound | None

    @ordinary_tensors()
    def __init__(
        self,
        d_model: int,
        n_features: int,
        activation: Activation | None = None,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("n_features", n_features)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {size!r}")
        self.d_model = d_model
        self.n_features = n_features
        self._forget_derived()
        self._scalars_seen: tuple[Any, list[Tensor]] | None = None
        self.register_buffer("threshold", None)
        self.activation = ReLU() if activation is None else activation
        dtype = dtype or torch.get_default_dtype()
        if device is not None and torch.device(device).type == "meta":
            decoder = torch.empty(n_features, d_model, dtype=dtype, device=device)
        else:
            # Drawn in float32 on the CPU: one seed gives one dictionary on every device and in every type.
            directions = torch.empty(n_features, d_model, dtype=torch.float32).normal_(generator=generator)
            decoder = nn.functional.normalize(directions, dim=1).to(device=device, dtype=dtype)
        self.W_enc = nn.Parameter(decoder.clone())
        self.b_enc = nn.Parameter(decoder.new_zeros(n_features))
        self.W_dec = nn.Parameter(decoder.clone())
        self.b_dec = nn.Parameter(decoder.new_zeros(d_model))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("std", torch.ones((), dtype=torch.float32, device=device))
        if self.threshold is not None:
            self.threshold = self.threshold.to(decoder)
        self.set_normalization(mean, std)

    @property
    def activation(self) -> Activation:
        """The activation function; setting it checks that it fits the dictionary."""
        if self.threshold is not None:
            return JumpReLU(self.threshold)
        return self._activation

    @activation.setter
    def activation(self, activation: Activation) -> None:
        _check_activation(activation, self.n_features)
        self.threshold = None
        self._activation = activation
        if isinstance(activation, JumpReLU) and isinstance(activation.threshold, Tensor):
            self._activation = JumpReLU()
            with ordinary_tensors():
                self.threshold = activation.threshold.detach().clone()
                if "W_enc" in self._parameters:
                    self.threshold = self.threshold.to(self.W_enc)

    def set_normalization(self, mean: float, std: float) -> None:
        """Set the scalar normalisation; parameters keep their values, in normalised units.

        Raises:
            ValueError: ``mean`` is not finite, or ``std`` is not a finite number > 0.
        """
        if not math.isfinite(mean):
            raise ValueError(f"mean: expected a finite number, got {mean}")
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"std: expected a finite number > 0, got {std}")
        with torch.no_grad():
            self.mean.fill_(mean)
            self.std.fill_(std)
        self._refresh_normalization()

    def init_from(self, store: ActivationStore, *, normalize: bool = False) -> None:
        """Set ``b_dec`` to the mean row of ``store``, and with ``normalize`` the scalars to its mean and std.

        Args:
            store: hidden states of width ``d_model``.
            normalize: take the store's scalar mean and standard deviation; otherwise they stay as they are.

        Raises:
            ValueError: another width, an empty store, or one whose values are all equal while ``normalize`` is set.
        """
        if store.d_model != self.d_model:
            raise ValueError(f"store: expected hidden states of width {self.d_model} (d_model), got {store.d_model}")
        if normalize:
            self.set_normalization(*store.mean_std())
        centre = (store.column_mean() - self._mean) / self._std
        with torch.no_grad():
            self.b_dec.copy_(torch.from_numpy(np.asarray(centre)))

    def encode(self, x: Tensor) -> SparseFeatures:
        """Feature activations of hidden states.

        A :class:`~saerec_fast.types.BatchTopK` selects over the whole batch while the module is in training mode,
        and by its threshold otherwise.

        Args:
            x: ``(..., d_model)``.

        Returns:
            Sparse activations, in normalised units.

        Raises:
            ValueError: another width, or a ``BatchTopK`` without a threshold outside training.
        """
        self._check_width(x)
        weights = self.folded_weights()
        activation = self.activation
        packed = self._packed_weights(weights)
        if isinstance(activation, TopK):
            return encode_topk(x, weights.W_enc, weights.b_enc, weights.b_dec, k=activation.k, packed=packed)
        if isinstance(activation, BatchTopK) and self.training:
            return encode_batch_topk(x, weights, activation.k)
        threshold = inference_threshold(activation)
        assert threshold is not None  # only TopK has none
        return encode_threshold(x, weights.W_enc, weights.b_enc, weights.b_dec, threshold, packed=packed)

    def encode_features(self, x: Tensor, features: Tensor) -> Tensor:
        """Activations of chosen features only.

        Threshold activations cost one dot product a feature; a ``TopK`` has to encode the whole dictionary to know
        which of them are selected. A :class:`~saerec_fast.types.BatchTopK` goes by its threshold, also in training.

        Args:
            x: ``(..., d_model)``.
            features: integer ids ``(m,)``.

        Returns:
            ``(..., m)``, in normalised units.

        Raises:
            ValueError: another width, an id out of range, or a ``BatchTopK`` without a threshold.
        """
        self._check_width(x)
        weights = self.folded_weights()
        activation = self.activation
        threshold = inference_threshold(activation)
        if threshold is not None:
            return encode_features(x, weights.W_enc, weights.b_enc, weights.b_dec, threshold, features)
        check_features(features, self.n_features)
        encoded = self.encode(x)
        # One column per distinct id asked for, and one for all the others.
        distinct, column = features.long().unique(return_inverse=True)
        columns = torch.full((self.n_features,), distinct.numel(), device=x.device).index_put(
            (distinct,), torch.arange(distinct.numel(), device=x.device)
        )
        wanted = columns[encoded.indices.long()]
        dense = encoded.values.new_zeros(encoded.n_rows, distinct.numel() + 1)
        dense = dense.index_put((encoded.row_ids(), wanted), encoded.values, accumulate=True)
        return dense[:, column].reshape(*x.shape[:-1], features.numel())

    def decode(self, features: SparseFeatures) -> Tensor:
        """Hidden states ``(*batch_shape, d_model)`` from feature activations.

        Raises:
            ValueError: features of a dictionary of another size.
        """
        if features.n_features != self.n_features:
            raise ValueError(
                f"features: expected a dictionary of {self.n_features} features, got one of {features.n_features}"
            )
        weights = self.folded_weights()
        return decode_sparse(features, weights.W_dec, weights.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction ``x̂`` of hidden states ``x (..., d_model)``, same shape and units.

        Raises:
            ValueError: as :meth:`encode`.
        """
        if self.training or self._needs_grad() or (torch.is_grad_enabled() and x.requires_grad):
            return self.decode(self.encode(x))
        self._check_width(x)
        # A subclass may be a stand-in without memory, as compilers pass.
        if type(x) is Tensor and not torch.compiler.is_compiling():
            bound = self._bound_kernels(x.dtype)
            if bound is not None and x.is_cpu:
                return bound.reconstruct(x)
        weights = self.folded_weights()
        return reconstruct(x, weights.W_enc, weights.b_enc, weights.b_dec, weights.W_dec, self._inference_activation())

    def steer(
        self,
        x: Tensor,
        plan: SteeringPlan | Sequence[SteeringPlan | None],
        strengths: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Hidden states with the plan's edits made to their features; a new tensor in the shape and units of ``x``.

        Args:
            x: ``(..., d_model)``; for positions ``"last"``, ``(..., length, d_model)``.
            plan: the edits, in units of the (normalised) activations. Or one plan for each entry of the first dimension
                of ``x``, ``None`` for those that stay as they are; a mask of positions then has the shape
                ``x.shape[1:-1]``.
            strengths: ``(m,)`` or ``(..., m)``, replacing the values of the one plan's ``m`` edits.
            valid: bool, the leading shape of ``x``; rows that are not valid come back unchanged.

        Raises:
            ValueError: another width, a feature id ≥ ``n_features``, a mask of another shape, another number of plans,
                strengths for more than one plan, or a change that a plan rejects.
            TypeError: an argument of the wrong type.
        """
        self._check_width(x)
        plans = None if isinstance(plan, SteeringPlan) else self._plans_of(x, plan, strengths)
        for one in (plan,) if plans is None else plans:
            if one is not None:
                check_plan(cast(SteeringPlan, one), self.n_features, self.d_model)
        steered = self._steer_bound(x, plan, strengths, valid)
        if steered is not None:
            return steered
        if plans is not None:
            return self._steer_each(x, plans, valid)
        assert isinstance(plan, SteeringPlan)
        if plan.only_adds and torch.compiler.is_compiling():
            # Compiled code looks, before every call, at each tensor that it was made with.
            W_dec = self._folded_decoder()
            check_weight("W_dec", W_dec, x)
            check_strengths(strengths, plan, x.shape[:-1], x)
            return steer_by_features(x, None, None, None, W_dec, None, plan, strengths=strengths, valid=valid)
        if torch.compiler.is_compiling() and not self.training:
            scalars = (self.mean, self.std) if self._is_normalized else None
            activation = self._inference_activation()
            steered = steer_normalized(
                x, self._plain_weights(), scalars, activation, plan, strengths=strengths, valid=valid
            )
            if steered is not None:
                return steered
        weights = self.folded_weights()
        return steer(
            x,
            weights.W_enc,
            weights.b_enc,
            weights.b_dec,
            weights.W_dec,
            self._inference_activation(),
            plan,
            strengths=strengths,
            valid=valid,
            packed=self._packed_weights(weights),
        )

    def _plans_of(self, x: Tensor, plans: Any, strengths: Tensor | None) -> Sequence[SteeringPlan | None]:
        if not isinstance(plans, (list, tuple)):
            raise TypeError(f"plan: expected a SteeringPlan or a list of them, got {type(plans).__name__}")
        if x.dim() < 2 or len(plans) != x.shape[0]:
            raise ValueError(f"plan: expected a plan or None for each of {tuple(x.shape[:1])}, got {len(plans)}")
        if strengths is not None:
            raise ValueError("strengths: belong to one plan; plans of their own have their own values")
        return plans

    def _steer_bound(
        self,
        x: Tensor,
        plan: SteeringPlan | Sequence[SteeringPlan | None],
        strengths: Tensor | None,
        valid: Tensor | None,
    ) -> Tensor | None:
        """:meth:`steer` in one kernel call, or ``None`` where it does not do all of what is asked for."""
        if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu or x.is_neg() or self.training:
            return None
        if is_transformed() or is_watched():
            return None
        if x.dim() not in (2, 3) or (torch.is_grad_enabled() and (x.requires_grad or self._needs_grad())):
            return None
        if valid is not None and not _is_mask(valid, x):
            return None
        if isinstance(plan, SteeringPlan):
            positions = plan.positions
            if isinstance(positions, Tensor):
                if not _is_mask(positions, x):
                    return None
                valid = positions if valid is None else positions & valid
            elif positions == "last" and x.dim() == 2:
                return None
            if strengths is not None:
                if not isinstance(strengths, Tensor):
                    return None
                shape = tuple(strengths.shape)
                if shape == (*[x.shape[0], 1][: x.dim() - 1], len(plan.edits)):
                    strengths = strengths.reshape(x.shape[0], len(plan.edits))
                elif shape != (len(plan.edits),):
                    return None
                if strengths.dtype != torch.float32 or not strengths.is_cpu or not strengths.is_contiguous():
                    return None
                if strengths.requires_grad and torch.is_grad_enabled():
                    return None
        elif any(one is not None and not _is_simple(one, x) for one in plan):
            return None
        bound = self._bound_kernels(x.dtype)
        if bound is None:
            return None
        steered, relative = bound.steer(x, plan, strengths, valid)
        if relative and isinstance(plan, SteeringPlan):
            report_excess(relative, plan)
        return steered

    def bind_steer(self) -> PlainSteer | None:
        """:meth:`steer` with the autoencoder fixed: a forward pass then pays for little beside the kernel.

        Returns:
            An object whose ``run(x, valid, plans)`` takes ``x (B, length, d_model)`` or ``(B, d_model)``, a bool mask
            or ``None``, and what ``steer_plans`` made of plans that fit this autoencoder. It returns ``None`` wherever
            it is not certain to do what :meth:`steer` does, such as with gradients on, or after a parameter has changed
            (``is_current()`` is then false; changes through ``.data`` are not seen until ``train()`` or ``eval()``).
            ``None`` where no kernel can do it.
        """
        if self.training or is_watched():
            return None
        bound = self._bound_kernels(self.W_enc.dtype)
        if bound is None:
            return None
        attributes = self.__dict__
        # The kept kernels are there only as long as nobody asked for new ones, and train() and eval() drop them. Plans
        # that only add read the decoder and what it is folded with.
        seen = [
            *((attributes, name, attributes[name], True) for name in ("_bound", "_activation")),
            (attributes, "training", attributes["training"], False),
            *((self._parameters, name, self._parameters[name], False) for name in ("W_enc", "b_enc", "b_dec")),
            (self._parameters, "W_dec", self._parameters["W_dec"], True),
            *((self._buffers, name, self._buffers[name], name == "std") for name in ("threshold", "mean", "std")),
            # Forward-mode derivatives; tensors of other transforms do not tell their address.
            (forward_ad.__dict__, "_current_level", -1, True),
        ]
        try:
            plain = bound.steer.plain(seen)
        except RuntimeError:  # a tensor of inference mode does not tell whether it was written to
            return None
        # What was seen belongs to these kernels only if they are still the ones to use.
        return plain if self._bound_kernels(self.W_enc.dtype) is bound else None

    def _steer_each(self, x: Tensor, plans: Sequence[SteeringPlan | None], valid: Tensor | None) -> Tensor:
        """:meth:`steer` plan by plan."""
        rows_of: dict[int, list[int]] = {}
        for row, plan in enumerate(plans):
            if plan is not None:
                rows_of.setdefault(id(plan), []).append(row)
        steered = x.clone()
        for rows in rows_of.values():
            plan = plans[rows[0]]
            assert plan is not None
            index = torch.tensor(rows, device=x.device)
            part = x.index_select(0, index)
            if isinstance(plan.positions, Tensor):
                if plan.positions.shape != x.shape[1:-1]:
                    raise ValueError(
                        f"positions: expected a mask of shape {tuple(x.shape[1:-1])} in a plan of one sequence, "
                        f"got {tuple(plan.positions.shape)}"
                    )
                plan = plan.at_positions(plan.positions.expand(part.shape[:-1]))
            own_valid = None if valid is None else valid.index_select(0, index)
            steered = steered.index_copy(0, index, self.steer(part, plan, valid=own_valid))
        return steered

    def folded_weights(self) -> FoldedWeights:
        """The weights to give to the ops: ``W_enc / std``, ``b_enc``, ``std · b_dec + mean``, ``std · W_dec``.

        Without normalisation these are the parameters themselves. With it they are kept until a parameter changes
        (seen by its version counter, which changes through ``.data`` do not move; ``train()`` and ``eval()`` drop what
        is kept), except where gradients with respect to the parameters are needed.
        """
        if torch.compiler.is_compiling():
            return self._fold() if self._is_normalized else self._plain_weights()
        scalars_key = _version_key(self.mean, self.std)
        if scalars_key is None or self._scalars_seen is None or self._scalars_seen[0] != scalars_key:
            self._refresh_normalization()
            self._scalars_seen = scalars_key, _aliases(self.mean, self.std)
        if not self._is_normalized:
            return self._plain_weights()
        if self._needs_grad():
            return self._fold()
        key = _version_key(self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.mean, self.std)
        if key is None:
            return self._fold()
        folded = self._folded
        if folded is None or folded[0] != key:
            # Not as inference tensors, even where inference_mode is on: a later call may need them in a graph.
            with torch.inference_mode(False), torch.no_grad():
                kept = _aliases(self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.mean, self.std)
                self._folded = folded = (key, self._fold(), kept)
        return folded[1]

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale every decoder row to unit norm, in place; a row of zeros stays as it is."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_dec.div_(norms.masked_fill_(norms == 0, 1.0))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take out of ``W_dec.grad`` the part along each (unit-norm) decoder row, in place.

        The optimiser then does not work against the normalisation (Bricken et al. 2023, Towards Monosemanticity; Gao
        et al., arXiv 2406.04093, section 2.4). Does nothing without a gradient.
        """
        gradient = self.W_dec.grad
        if gradient is not None:
            along = torch.linalg.vecdot(gradient, self.W_dec).unsqueeze_(1)
            gradient.addcmul_(along, self.W_dec, value=-1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder ``path`` with ``sae.safetensors`` and ``config.json``, each atomically.

        Raises:
            ValueError: weights that are not finite.
        """
        folder = Path(path)
        tensors = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: expected finite weights, got NaN or infinity; nothing was saved")
        config = {
            "format": _FORMAT,
            "version": _VERSION,
            "d_model": self.d_model,
            "n_features": self.n_features,
            "activation": activation_to_dict(self.activation),
        }
        write_tensors(folder / _WEIGHTS, tensors)
        # Ties the two files together: stopping between the writes must not pair new weights with an old config.
        config["weights_sha256"] = _sha256(folder / _WEIGHTS)
        write_json(folder / _CONFIG, config)

    @classmethod
    @ordinary_tensors()
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> SparseAutoencoder:
        """Read what :meth:`save` wrote; the parameters keep the type they were saved in.

        Args:
            path: the folder.
            device: where the parameters go.

        Returns:
            The autoencoder in evaluation mode.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is truncated, corrupt, of another version, or does not fit the other one: keys, shapes,
                types, values that are not finite. The message names the file and what was expected.
        """
        folder = Path(path)
        config_path, weights_path = folder / _CONFIG, folder / _WEIGHTS
        for file in (config_path, weights_path):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file; expected a folder written by SparseAutoencoder.save")
        config = read_json(config_path)
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            raise ValueError(f'{config_path}: expected a json object with "format": "{_FORMAT}"')
        if config.get("version") != _VERSION:
            raise ValueError(f"{config_path}: expected version {_VERSION}, got {config.get('version')!r}")
        required = {"format", "version", "d_model", "n_features", "activation"}
        if set(config) - {"weights_sha256"} != required:
            raise ValueError(f"{config_path}: expected keys {sorted(required)}, got {sorted(config)}")
        tensors = read_tensors(weights_path)
        try:
            activation = activation_from_dict(config["activation"], tensors.get("threshold"))
            sae = cls(config["d_model"], config["n_features"], activation, device="meta")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{config_path}: {error}") from None
        expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
        _check_tensors(weights_path, tensors, expected)
        if config.get("weights_sha256") not in (None, _sha256(weights_path)):
            raise ValueError(f"{weights_path}: not the weights that {config_path} was saved with (weights_sha256)")
        # Copies: what safetensors returns may lie at any address, and vector loads like aligned rows.
        sae.load_state_dict({name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, assign=True)
        return sae.eval()

    def extra_repr(self) -> str:
        activation = self._activation if self.threshold is None else "JumpReLU(threshold=<buffer>)"
        return f"d_model={self.d_model}, n_features={self.n_features}, activation={activation}"

    def train(self, mode: bool = True) -> SparseAutoencoder:
        """Switch between training and evaluation; drops folded weights that were kept."""
        self._forget_derived()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseAutoencoder:
        def moved_tensor(tensor: Tensor) -> Tensor:
            # Parameters stay the same objects with other data; an inference tensor with ordinary data would be neither,
            # and could not even be transposed.
            with nullcontext() if _version_key(tensor) is None else ordinary_tensors():
                return fn(tensor)

        # The two scalars follow a change of device but not of type: bfloat16 would round them before they are folded.
        scalars = {"mean": self.mean, "std": self.std}
        super()._apply(moved_tensor, recurse)
        for name, scalar in scalars.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != scalar.dtype:
                with ordinary_tensors():
                    setattr(self, name, scalar.to(moved.device))
        self._forget_derived()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget_derived()
        if not self.mean.is_meta:
            self._refresh_normalization()

    def _forget_derived(self) -> None:
        # What is made from the parameters and kept until they change, each with the key it was made for, and with the
        # memory that the key names, so that no other tensor gets its address.
        self._folded = None
        self._packed = None
        self._bound = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scalars_seen": None, "_folded": None, "_packed": None, "_bound": None}

    def _packed_weights(self, weights: FoldedWeights) -> PackedWeights | None:
        """Packed weights of the evaluation mode; in training they change too often to be kept."""
        if self.training or torch.compiler.is_compiling() or choose(weights.W_enc.device.type) != "cpu":
            return None
        key = _version_key(weights.W_enc, weights.b_enc)
        if key is None:
            return None
        kept = self._packed
        if kept is None or kept[0] != key:
            try:
                packed = pack_weights(weights.W_enc, weights.b_enc)
            except ValueError:
                # Not finite, or float64: the ops know what to do.
                packed = None
            # Another thread may keep its own meanwhile, made from weights it has folded itself.
            self._packed = kept = key, packed, _aliases(weights.W_enc, weights.b_enc)
        return kept[1]

    def _bound_kernels(self, dtype: torch.dtype) -> _Bound | None:
        """The kernels of evaluation mode with the weights checked and fixed, or ``None`` where none can run."""
        # Straight from the dictionaries: module attributes cost more than all the rest of a call.
        parameters, buffers = cast(dict[str, Tensor], self._parameters), cast(dict[str, Tensor], self._buffers)
        try:
            W_enc, b_enc = parameters["W_enc"], parameters["b_enc"]
            W_dec, b_dec = parameters["W_dec"], parameters["b_dec"]
            threshold, mean, std = buffers["threshold"], buffers["mean"], buffers["std"]
            if W_enc.dtype != dtype:
                return None
            key = (
                self._activation,
                W_enc.data_ptr(),
                W_enc._version,
                b_enc.data_ptr(),
                b_enc._version,
                W_dec.data_ptr(),
                W_dec._version,
                b_dec.data_ptr(),
                b_dec._version,
                mean.data_ptr(),
                mean._version,
                std.data_ptr(),
                std._version,
                *((threshold.data_ptr(), threshold._version) if threshold is not None else ()),
            )
        except (RuntimeError, KeyError):
            # Tensors made under inference_mode do not count their versions; a parametrized weight is computed anew.
            return None
        bound = self._bound
        if bound is not None and bound.key == key:
            return bound
        bound = None
        if W_enc.device.type == "cpu" and W_enc.dtype in KERNEL_DTYPES:
            weights = self.folded_weights()
            arguments = (
                weights.W_enc,
                weights.b_enc,
                weights.b_dec,
                weights.W_dec,
                self._inference_activation(),
                self._packed_weights(weights),
            )
            run, steer_rows = bind_reconstruct(*arguments), bind_steer(*arguments)
            if run is not None and steer_rows is not None:
                kept = _aliases(W_enc, b_enc, W_dec, b_dec, threshold, mean, std)
                bound = _Bound(key, kept, run, steer_rows)
        # Another thread may do the same meanwhile.
        self._bound = bound
        return bound

    def _refresh_normalization(self) -> None:
        if self.mean.is_meta:
            self._mean, self._std = 0.0, 1.0
        else:
            self._mean, self._std = float(self.mean), float(self.std)
        self._is_normalized = self._mean != 0.0 or self._std != 1.0

    def _needs_grad(self) -> bool:
        parameters = cast(list[Tensor], self._parameters.values())
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)

    def _plain_weights(self) -> FoldedWeights:
        return FoldedWeights(self.W_enc, self.b_enc, self.b_dec, self.W_dec)

    def _fold(self) -> FoldedWeights:
        W_enc, b_dec, W_dec = fold_normalization(self.W_enc, self.b_dec, self.W_dec, self.mean, self.std)
        return FoldedWeights(W_enc, self.b_enc, b_dec, W_dec)

    def _folded_decoder(self) -> Tensor:
        return fold_decoder(self.W_dec, self.std) if self._is_normalized else self.W_dec

    def _inference_activation(self) -> Activation:
        activation = self.activation
        inference_threshold(activation)
        return activation

    def _check_width(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.d_model:
            raise ValueError(f"x: expected shape (..., {self.d_model}) (d_model), got {tuple(x.shape)}")


def _is_mask(mask: Tensor, x: Tensor) -> bool:
    """Whether this is a mask of rows of ``x`` as the kernel reads one."""
    return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.is_cpu and mask.shape == x.shape[:-1]


def _is_simple(plan: SteeringPlan, x: Tensor) -> bool:
    """Whether the kernel can take this plan among others."""
    if isinstance(plan.positions, Tensor) or (plan.positions == "last" and x.dim() == 2):
        return False
    return plan.max_relative_norm is None or plan.on_excess == "clip"


def activation_to_dict(activation: Activation) -> dict[str, Any]:
    """A json-ready description of an activation; a tensor of thresholds becomes ``{"threshold": "tensor"}``.

    Raises:
        TypeError: not an activation.
    """
    match activation:
        case ReLU():
            return {"kind": "relu"}
        case JumpReLU(threshold=threshold):
            return {"kind": "jump_relu", "threshold": "tensor" if isinstance(threshold, Tensor) else float(threshold)}
        case TopK(k=k):
            return {"kind": "topk", "k": k}
        case BatchTopK(k=k, threshold=threshold):
            return {"kind": "batch_topk", "k": k, "threshold": threshold}
    raise TypeError(f"activation: expected ReLU, JumpReLU, TopK or BatchTopK, got {type(activation).__name__}")


def activation_from_dict(data: Any, threshold: Tensor | None = None) -> Activation:
    """Inverse of :func:`activation_to_dict`.

    Args:
        data: the description.
        threshold: the tensor that ``{"threshold": "tensor"}`` stands for.

    Raises:
        ValueError: an unknown kind, missing or unknown keys, or a value out of range.
    """
    expected = {
        "relu": {"kind"},
        "jump_relu": {"kind", "threshold"},
        "topk": {"kind", "k"},
        "batch_topk": {"kind", "k", "threshold"},
    }
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in expected:
        raise ValueError(f"activation: expected an object whose kind is one of {', '.join(expected)}, got {data!r}")
    if set(data) != expected[kind]:
        raise ValueError(f"activation: expected keys {sorted(expected[kind])} for {kind}, got {sorted(data)}")
    if kind == "relu":
        return ReLU()
    if kind == "topk":
        return TopK(data["k"])
    value = data["threshold"]
    if kind == "jump_relu" and value == "tensor":
        if threshold is None:
            raise ValueError("activation: expected a tensor 'threshold' among the weights, got none")
        return JumpReLU(threshold)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number and not (kind == "batch_topk" and value is None):
        raise ValueError(f"activation: expected a number as threshold, got {value!r}")
    return (
        JumpReLU(float(value)) if kind == "jump_relu" else BatchTopK(data["k"], None if value is None else float(value))
    )


def encode_batch_topk(x: Tensor, weights: FoldedWeights, k: int) -> SparseFeatures:
    """The ``k`` × rows largest pre-activations of the batch that are positive, exact and differentiable.

    Ties: smallest position (row by row) first. NaN counts as the largest value.
    """
    flat = x.reshape(-1, x.shape[-1])
    count = k * flat.shape[0]
    for threshold in _batch_topk_thresholds(flat, weights, k):
        features = encode_threshold(flat, weights.W_enc, weights.b_enc, weights.b_dec, threshold)
        values = features.values.detach()
        offsets, kept = largest_entries(features.offsets, values, count)
        # At the threshold itself, entries may have been left out. Only a 16-bit value can round to it.
        if kept.shape[0] == count and not (values[kept] <= threshold).any():
            break
    return SparseFeatures(
        offsets, features.indices[kept], features.values[kept], features.n_features, tuple(x.shape[:-1])
    )


@torch.no_grad()
def _batch_topk_thresholds(x: Tensor, weights: FoldedWeights, k: int) -> Iterator[float]:
    """Guesses, from some of the rows, of a number that about ``k`` × rows pre-activations exceed; 0 at last."""
    rows = x.shape[0]
    if rows > 0:
        sample = x.detach()[:: max(rows // _BATCH_TOPK_SAMPLE, 1)]
        width = min(_BATCH_TOPK_SAMPLE_WIDTH * k, weights.W_enc.shape[0])
        scores = linear_topk(sample - weights.b_dec, weights.W_enc, weights.b_enc, k=width).values.flatten()
        for surplus in _BATCH_TOPK_SURPLUS:
            wanted = int(surplus * k * sample.shape[0])
            if wanted > scores.numel():
                break
            guess = float(scores.kthvalue(scores.numel() - wanted + 1).values)
            if not guess > 0:
                break
            yield guess
    yield 0.0


def _check_activation(activation: Activation, n_features: int) -> None:
    if not isinstance(activation, (ReLU, JumpReLU, TopK, BatchTopK)):
        raise TypeError(f"activation: expected ReLU, JumpReLU, TopK or BatchTopK, got {type(activation).__name__}")
    if isinstance(activation, (TopK, BatchTopK)) and activation.k > n_features:
        raise ValueError(f"k: expected at most {n_features} (n_features), got {activation.k}")
    if isinstance(activation, JumpReLU) and isinstance(activation.threshold, Tensor):
        shape = tuple(activation.threshold.shape)
        if shape not in ((), (n_features,)):
            raise ValueError(f"threshold: expected a scalar or ({n_features},), got shape {shape}")


def _check_tensors(path: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    if set(tensors) != set(expected):
        raise ValueError(f"{path}: expected tensors {sorted(expected)}, got {sorted(tensors)}")
    dtype = tensors["W_enc"].dtype
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: {name}: expected shape {shape}, got {tuple(tensor.shape)}")
        wanted = torch.float32 if name in ("mean", "std") else dtype
        if tensor.dtype != wanted or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name}: expected a floating type, {wanted}, got {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name}: expected finite values, got NaN or infinity")
    if not tensors["std"] > 0:
        raise ValueError(f"{path}: std: expected a number > 0, got {float(tensors['std'])}")
    if "threshold" in tensors and not (tensors["threshold"] >= 0).all():
        raise ValueError(f"{path}: threshold: expected numbers >= 0")


def _version_key(*tensors: Tensor) -> tuple[Any, ...] | None:
    """Changes whenever one of the tensors does; ``None`` where that cannot be seen (made under inference_mode)."""
    try:
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    except RuntimeError:  # is_inference() would not do: it is false after such a tensor's type has changed
        return None


def _aliases(*tensors: Tensor | None) -> list[Tensor]:
    """The same memory under other names: a parameter whose ``.data`` is replaced lets go of its own."""
    return [tensor.detach() for tensor in tensors if tensor is not None]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
