"""Steering plans: which features to change, how, and where."""

from __future__ import annotations

import json
import math
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
    """

    feature: int
    op: Op
    value: float

    def __post_init__(self) -> None:
        if not isinstance(self.feature, int) or isinstance(self.feature, bool) or self.feature < 0:
            raise ValueError(f"feature: expected an integer >= 0, got {self.feature!r}")
        if self.op not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, got {self.op!r}")
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not math.isfinite(self.value):
            raise ValueError(f"value: expected a finite number, got {self.value!r}")

    def to_dict(self) -> dict[str, Any]:
        return {"feature": self.feature, "op": self.op, "value": self.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Edit:
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
        elif positions not in ("all", "last"):
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
        positions = self.positions.tolist() if isinstance(self.positions, Tensor) else self.positions
        return {"edits": [edit.to_dict() for edit in self.edits], "mode": self.mode, "positions": positions}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SteeringPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown or missing keys, or a value out of range.
        """
        _check_keys("plan", data, required={"edits"}, optional={"mode", "positions"})
        positions = data.get("positions", "all")
        if not isinstance(positions, str):
            positions = torch.tensor(positions, dtype=torch.bool)
        edits = [Edit.from_dict(edit) for edit in data["edits"]]
        return cls(edits, mode=data.get("mode", "delta"), positions=positions)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> SteeringPlan:
        return cls.from_dict(json.loads(text))


def _check_keys(what: str, data: Mapping[str, Any], required: set[str], optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
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
