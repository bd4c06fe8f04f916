"""Steering plans: which features to change, how, where, and how much at most."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from saerec_fast.types.activations import inference_threshold

Op = Literal["set", "add", "scale", "clamp_min", "clamp_max"]
Mode = Literal["delta", "reconstruct"]
OnExcess = Literal["clip", "warn", "reject"]

# In the order of EditOp in csrc/include/saerec/steer.h.
OPS: tuple[str, ...] = get_args(Op)
MODES: tuple[str, ...] = get_args(Mode)
ON_EXCESS: tuple[str, ...] = get_args(OnExcess)


@dataclass(frozen=True)
class Edit:
    """One change of one feature's activation ``a``.

    Attributes:
        feature: feature id, 0 ≤ feature < n_features.
        op: ``set`` (a' = value), ``add`` (a' = a + value), ``scale`` (a' = value · a), ``clamp_min``
            (a' = max(a, value)) or ``clamp_max`` (a' = min(a, value)).
        value: the strength, finite, in units of the activation (``scale``: a factor).

    Numbers of numpy are taken too, and kept as Python's.

    Raises:
        ValueError: a value outside its range, or of the wrong type.
    """

    feature: int
    op: Op
    value: float

    def __post_init__(self) -> None:
        feature = self.feature
        if not isinstance(feature, numbers.Integral) or isinstance(feature, bool) or feature < 0:
            raise ValueError(f"feature: expected an integer >= 0, got {feature!r}")
        if not isinstance(self.op, str) or self.op not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, got {self.op!r}")
        object.__setattr__(self, "feature", int(feature))
        object.__setattr__(self, "value", _finite("value", self.value))

    def to_dict(self) -> dict[str, Any]:
        """The attributes, ready for json."""
        return {"feature": self.feature, "op": self.op, "value": self.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Edit:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown or missing keys, or a value out of range.
            TypeError: not a mapping.
        """
        _check_keys("edit", data, required={"feature", "op", "value"})
        return cls(**data)


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction of the hidden states that is added to them, ``value`` times, whatever features are active.

    Such as the mean hidden state of items with an attribute less that of the others
    (:func:`saerec_fast.steering.contrastive_direction`).

    Attributes:
        vector: float32 ``(d,)`` on the CPU, finite, in units of the hidden states; a sequence of numbers is taken too.
        value: the strength, finite.
        name: what the direction stands for.

    Raises:
        ValueError: a value outside its range, or of the wrong type.
    """

    vector: Tensor
    value: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        try:
            vector = torch.as_tensor(self.vector).detach().to("cpu", torch.float32, copy=True)
        except (TypeError, ValueError, RuntimeError):
            vector = torch.empty(0)
        if vector.dim() != 1 or vector.numel() == 0 or not bool(torch.isfinite(vector).all()):
            raise ValueError(f"vector: expected finite numbers (d,), got {_shortened(self.vector)}")
        if not isinstance(self.name, str):
            raise ValueError(f"name: expected text, got {type(self.name).__name__}")
        object.__setattr__(self, "vector", vector)
        object.__setattr__(self, "value", _finite("value", self.value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Direction) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.value, self.name, tuple(self.vector.tolist())))

    def to_dict(self) -> dict[str, Any]:
        """The attributes, ready for json."""
        return {"vector": self.vector.tolist(), "value": self.value, "name": self.name}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Direction:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown or missing keys, or a value out of range.
            TypeError: not a mapping.
        """
        _check_keys("direction", data, required={"vector", "value"}, optional={"name"})
        return cls(**data)


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """A set of edits. Edits of the same feature apply one after the other, in the order given; directions are added
    last.

    Attributes:
        edits: :class:`Edit` and :class:`Direction` entries; empty means "change nothing".
        mode: ``delta`` adds ``Σ_j (a'_j − a_j) W_dec[j]`` to the hidden state, so that the error of the SAE stays in
            it and an empty plan changes no bit; ``reconstruct`` replaces the hidden state by ``a' W_dec + b_dec``.
        positions: ``all``, ``last`` (each sequence's last valid position), or a bool tensor with the
            leading shape of the hidden states.
        max_relative_norm: the dose: limit > 0 of ``‖x' − x‖ / ‖x‖`` for every hidden state ``x``; ``None`` for none.
        on_excess: what happens to a change above the limit: ``clip`` scales it down to the limit, ``warn`` issues a
            ``UserWarning`` and lets it be, ``reject`` raises ``ValueError`` in the forward pass.

    Raises:
        ValueError: an unknown mode, name of positions or ``on_excess``, or a limit that is not positive.
        TypeError: an entry that is neither :class:`Edit` nor :class:`Direction`, or a mask that is not bool.
    """

    edits: tuple[Edit | Direction, ...] = ()
    mode: Mode = "delta"
    positions: Literal["all", "last"] | Tensor = "all"
    max_relative_norm: float | None = None
    on_excess: OnExcess = "clip"

    def __init__(
        self,
        edits: Sequence[Edit | Direction] = (),
        mode: Mode = "delta",
        positions: Literal["all", "last"] | Tensor = "all",
        *,
        max_relative_norm: float | None = None,
        on_excess: OnExcess = "clip",
    ) -> None:
        edits = tuple(edits)
        for edit in edits:
            if not isinstance(edit, (Edit, Direction)):
                raise TypeError(f"edits: expected Edit or Direction objects, got {type(edit).__name__}")
        for name, choice, choices in (("mode", mode, MODES), ("on_excess", on_excess, ON_EXCESS)):
            if not isinstance(choice, str) or choice not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {choice!r}")
        if isinstance(positions, Tensor):
            if positions.dtype != torch.bool:
                raise TypeError(f"positions: expected a bool mask, got {positions.dtype}")
        elif not isinstance(positions, str) or positions not in ("all", "last"):
            raise ValueError(f"positions: expected 'all', 'last' or a bool mask, got {positions!r}")
        if max_relative_norm is not None:
            max_relative_norm = _finite("max_relative_norm", max_relative_norm)
            if max_relative_norm <= 0:
                raise ValueError(f"max_relative_norm: expected a number > 0 or None, got {max_relative_norm}")
        object.__setattr__(self, "edits", edits)
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "max_relative_norm", max_relative_norm)
        object.__setattr__(self, "on_excess", on_excess)
        widths = sorted({edit.vector.shape[0] for edit in edits if isinstance(edit, Direction)})
        if len(widths) > 1:
            raise ValueError(f"edits: expected directions of one width, got {' and '.join(map(str, widths))}")
        # For checks against a dictionary, which serving does for every request, and for compiled code, which compares
        # all that it was made from before every call.
        of_features = [edit for edit in edits if isinstance(edit, Edit)]
        features = tuple(edit.feature for edit in of_features)
        object.__setattr__(self, "_features", features)
        object.__setattr__(self, "_largest_feature", max([-1, *features]))
        object.__setattr__(self, "_ops", tuple(edit.op for edit in of_features))
        object.__setattr__(self, "_only_adds", mode == "delta" and all(edit.op == "add" for edit in of_features))
        object.__setattr__(self, "_direction_width", widths[0] if widths else None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SteeringPlan) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what kernels keep with a plan.
        return _make_plan, (self.edits, self.mode, self.positions, self.max_relative_norm, self.on_excess)

    @property
    def feature_edits(self) -> tuple[tuple[int, Edit], ...]:
        """The edits of features, each with its place among ``edits``."""
        return tuple((j, edit) for j, edit in enumerate(self.edits) if isinstance(edit, Edit))

    @property
    def directions(self) -> tuple[tuple[int, Direction], ...]:
        """The directions, each with its place among ``edits``."""
        return tuple((j, edit) for j, edit in enumerate(self.edits) if isinstance(edit, Direction))

    @property
    def only_adds(self) -> bool:
        """Whether it moves hidden states by the same vector whatever their activations are."""
        only_adds: bool = self.__dict__["_only_adds"]
        return only_adds

    @property
    def features(self) -> tuple[int, ...]:
        """The feature of each edit of one."""
        features: tuple[int, ...] = self.__dict__["_features"]
        return features

    @property
    def ops(self) -> tuple[Op, ...]:
        """What each edit of a feature does to it."""
        ops: tuple[Op, ...] = self.__dict__["_ops"]
        return ops

    @property
    def values(self) -> tuple[float, ...]:
        """The strengths, one per edit."""
        return tuple(edit.value for edit in self.edits)

    @property
    def largest_feature(self) -> int:
        """The largest feature id among the edits, -1 where there is none."""
        largest: int = self.__dict__["_largest_feature"]
        return largest

    @property
    def direction_width(self) -> int | None:
        """The width of the directions, ``None`` where there is none."""
        width: int | None = self.__dict__["_direction_width"]
        return width

    def scaled(self, factor: float) -> SteeringPlan:
        """The same plan ``factor`` times as strong: 0 leaves nothing of added values, 1 is this plan.

        Values are multiplied, except those of ``scale`` edits, whose distance from 1 is.

        Raises:
            ValueError: a factor that is not finite.
        """
        factor = _finite("factor", factor)

        def strengthen(edit: Edit | Direction) -> Edit | Direction:
            if isinstance(edit, Edit) and edit.op == "scale":
                return replace(edit, value=1.0 + factor * (edit.value - 1.0))
            return replace(edit, value=factor * edit.value)

        return self.with_edits([strengthen(edit) for edit in self.edits])

    def with_edits(self, edits: Sequence[Edit | Direction]) -> SteeringPlan:
        """The same plan with other edits."""
        return _make_plan(edits, self.mode, self.positions, self.max_relative_norm, self.on_excess)

    def at_positions(self, positions: Literal["all", "last"] | Tensor) -> SteeringPlan:
        """The same plan at other positions."""
        return _make_plan(self.edits, self.mode, positions, self.max_relative_norm, self.on_excess)

    def to_dict(self) -> dict[str, Any]:
        """The attributes, ready for json; a mask becomes nested lists of bools, no limit no keys."""
        positions = self.positions.tolist() if isinstance(self.positions, Tensor) else self.positions
        data: dict[str, Any] = {
            "edits": [edit.to_dict() for edit in self.edits],
            "mode": self.mode,
            "positions": positions,
        }
        if self.max_relative_norm is not None:
            data |= {"max_relative_norm": self.max_relative_norm, "on_excess": self.on_excess}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SteeringPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown or missing keys, or a value out of range.
            TypeError: an entry of the wrong type.
        """
        _check_keys("plan", data, required={"edits"}, optional={"mode", "positions", "max_relative_norm", "on_excess"})
        options = dict(data)
        edits, positions = options.pop("edits"), options.pop("positions", "all")
        if not isinstance(edits, (list, tuple)):
            raise TypeError(f"edits: expected a list, got {type(edits).__name__}")
        if not isinstance(positions, str):
            positions = _mask_from_lists(positions)
        return cls([_entry_from_dict(edit) for edit in edits], positions=positions, **options)

    def explain(self, sae: Any) -> PlanCost:
        """What steering by this plan computes with an autoencoder, and what that costs; print it to read it.

        Args:
            sae: a :class:`~saerec_fast.sae.SparseAutoencoder` (its sizes and its activation count).

        Raises:
            ValueError: a feature id or a direction that does not fit it, or a ``BatchTopK`` without a threshold.
        """
        n, d = sae.n_features, sae.d_model
        if self.largest_feature >= n or self.direction_width not in (None, d):
            raise ValueError(f"sae: expected one that fits the plan, got {n} features of width {d}")
        selects = inference_threshold(sae.activation) is None
        needed = {e.feature for _, e in self.feature_edits if self.mode == "reconstruct" or e.op != "add"}
        added = len({e.feature for _, e in self.feature_edits} - needed) + len(self.directions)
        positions = self.positions if isinstance(self.positions, str) else "masked"
        if self.mode == "reconstruct":
            active = f"{sae.activation.k} active features" if selects else "the active features"
            reason = f"reconstruct mode encodes all {n} features and decodes {active}"
            return PlanCost("encode", n * d, added * d, positions, reason)
        if needed and selects:
            ops = ", ".join(sorted({e.op for _, e in self.feature_edits} - {"add"}))
            reason = f"whether a feature is among the top k shows only beside the others ({ops} needs its activation)"
            return PlanCost("encode", n * d + len(needed) * d, added * d, positions, reason)
        if needed:
            reason = f"features are independent: one dot product for each of the {len(needed)} edited ones"
            return PlanCost("features", 2 * len(needed) * d, added * d, positions, reason)
        if added:
            return PlanCost("add", d, added * d, positions, "adding needs no activation: one vector for a sequence")
        return PlanCost("copy", 0, 0, positions, "the plan is empty")

    def to_json(self) -> str:
        """:meth:`to_dict` as json text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> SteeringPlan:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: no valid json, and as :meth:`from_dict`.
            TypeError: as :meth:`from_dict`.
        """
        try:
            data = json.loads(text)
        except RecursionError:
            raise ValueError("plan: expected json, got brackets nested too deeply") from None
        return cls.from_dict(data)


@dataclass(frozen=True)
class PlanCost:
    """What a plan makes the kernels do.

    Attributes:
        work: ``copy`` (nothing), ``add`` (a vector to every row), ``features`` (a dot product per edited feature and
            row), or ``encode`` (the whole encoder, where no cheaper bound tells that an edited feature is off).
        row_operations: multiply-adds for each steered row, at most; screening does most of an encoder's in int8.
        sequence_operations: multiply-adds once for each sequence, or once in all where sequences share strengths.
        positions: ``all``, ``last`` or ``masked``: rows at other positions cost a copy.
        reason: why, in a sentence.
    """

    work: Literal["copy", "add", "features", "encode"]
    row_operations: int
    sequence_operations: int
    positions: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.work}: {self.reason}. {self.row_operations:,} multiply-adds per steered row, "
            f"{self.sequence_operations:,} per sequence; positions: {self.positions}"
        )


def _make_plan(
    edits: Sequence[Edit | Direction], mode: Any, positions: Any, max_relative_norm: float | None, on_excess: Any
) -> SteeringPlan:
    return SteeringPlan(edits, mode, positions, max_relative_norm=max_relative_norm, on_excess=on_excess)


def _entry_from_dict(data: Mapping[str, Any]) -> Edit | Direction:
    is_direction = isinstance(data, Mapping) and "vector" in data
    return Direction.from_dict(data) if is_direction else Edit.from_dict(data)


def _finite(name: str, value: Any) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:  # an integer too large for a float
            pass
    raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _shortened(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"


def _mask_from_lists(lists: Any) -> Tensor:
    # Converted without a dtype: with one, any number would pass for a bool.
    try:
        mask = torch.tensor(lists)
    except (TypeError, ValueError, RuntimeError):
        mask = None
    if mask is None or (mask.dtype != torch.bool and mask.numel()):
        raise TypeError(f"positions: expected 'all', 'last' or nested lists of bools, got {lists!r}")
    return mask.bool()


def _check_keys(
    what: str, data: Mapping[str, Any], required: set[str], optional: set[str] | frozenset[str] = frozenset()
) -> None:
    if not isinstance(data, Mapping):
        raise TypeError(f"{what}: expected a mapping, got {type(data).__name__}")
    unknown = set(data) - required - optional
    missing = required - set(data)
    if unknown or missing:
        raise ValueError(
            f"{what}: expected keys {sorted(required | optional)}"
            + (f", got unknown {sorted(unknown, key=repr)}" if unknown else "")
            + (f", missing {sorted(missing)}" if missing else "")
        )
