"""Steering plans: which features to change, how, and where."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Op = Literal["set", "add", "scale", "clamp_min", "clamp_max"]
Mode = Literal["delta", "reconstruct"]

OPS: tuple[str, ...] = get_args(Op)
MODES: tuple[str, ...] = get_args(Mode)


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
        feature, value = self.feature, self.value
        if not isinstance(feature, numbers.Integral) or isinstance(feature, bool) or feature < 0:
            raise ValueError(f"feature: expected an integer >= 0, got {feature!r}")
        if self.op not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, got {self.op!r}")
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not _is_finite(value):
            raise ValueError(f"value: expected a finite number, got {value!r}")
        object.__setattr__(self, "feature", int(feature))
        object.__setattr__(self, "value", float(value))

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
class SteeringPlan:
    """A set of edits. Edits of the same feature apply one after the other, in the order given.

    Attributes:
        edits: the edits; empty means "change nothing".
        mode: ``delta`` adds ``Σ_j (a'_j − a_j) W_dec[j]`` to the hidden state, so that the error of the SAE stays in
            it and an empty plan changes no bit; ``reconstruct`` replaces the hidden state by ``a' W_dec + b_dec``.
        positions: ``all``, ``last`` (each sequence's last valid position), or a bool tensor with the
            leading shape of the hidden states.

    Raises:
        ValueError: an unknown mode or name of positions.
        TypeError: an entry that is no :class:`Edit`, or a mask that is not bool.
    """

    edits: tuple[Edit, ...] = ()
    mode: Mode = "delta"
    positions: Literal["all", "last"] | Tensor = "all"

    def __init__(
        self,
        edits: Sequence[Edit] = (),
        mode: Mode = "delta",
        positions: Literal["all", "last"] | Tensor = "all",
    ) -> None:
        edits = tuple(edits)
        for edit in edits:
            if not isinstance(edit, Edit):
                raise TypeError(f"edits: expected Edit objects, got {type(edit).__name__}")
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if isinstance(positions, Tensor):
            if positions.dtype != torch.bool:
                raise TypeError(f"positions: expected a bool mask, got {positions.dtype}")
        elif not isinstance(positions, str) or positions not in ("all", "last"):
            raise ValueError(f"positions: expected 'all', 'last' or a bool mask, got {positions!r}")
        object.__setattr__(self, "edits", edits)
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "positions", positions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SteeringPlan) and self.to_dict() == other.to_dict()

    @property
    def values(self) -> tuple[float, ...]:
        """The strengths, one per edit."""
        return tuple(edit.value for edit in self.edits)

    def to_dict(self) -> dict[str, Any]:
        """The attributes, ready for json; a mask becomes nested lists of bools."""
        positions = self.positions.tolist() if isinstance(self.positions, Tensor) else self.positions
        return {"edits": [edit.to_dict() for edit in self.edits], "mode": self.mode, "positions": positions}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SteeringPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown or missing keys, or a value out of range.
            TypeError: an entry of the wrong type.
        """
        _check_keys("plan", data, required={"edits"}, optional={"mode", "positions"})
        edits, positions = data["edits"], data.get("positions", "all")
        if not isinstance(edits, (list, tuple)):
            raise TypeError(f"edits: expected a list, got {type(edits).__name__}")
        if not isinstance(positions, str):
            positions = _mask_from_lists(positions)
        return cls([Edit.from_dict(edit) for edit in edits], mode=data.get("mode", "delta"), positions=positions)

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
        return cls.from_dict(json.loads(text))


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


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
            + (f", got unknown {sorted(unknown)}" if unknown else "")
            + (f", missing {sorted(missing)}" if missing else "")
        )
