"""One row of a table of requests → what the model is asked for."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerec_fast.types import SteeringPlan
from saerec_fast.validation import check_plan


@dataclass(frozen=True, slots=True)
class Request:
    """A row that was understood.

    Attributes:
        items: int64 ``(n,)``, item indices, oldest first; all that are known, also those the model will not see.
        plan: ``None`` where nothing is steered; a mask of its positions is bool ``(n,)``.
        k: length of the list asked for.
    """

    items: np.ndarray
    plan: SteeringPlan | None
    k: int


@dataclass(frozen=True)
class RequestReader:
    """What rows are checked against; see :class:`~saerec_fast.serving.predictor.Predictor` for the fields."""

    n_items: int
    index_of: Mapping[str | int, int] | None
    n_features: int
    d_model: int
    k: int
    max_history: int
    max_edits: int
    skip_unknown: bool

    def read(self, history: Any, edits: Any, k: Any) -> Request:
        """One row.

        Raises:
            ValueError, TypeError: what is wrong with it.
            RecursionError: something in it is nested too deeply.
        """
        indices = self._indices(history)
        known = indices >= 0
        items = indices[known]
        if not len(items):
            raise ValueError("history: expected at least one known item, got none")
        plan = self._plan(edits)
        if plan is not None and isinstance(plan.positions, Tensor):
            if plan.positions.shape != (len(indices),):
                raise ValueError(
                    f"edits: expected a mask of positions ({len(indices)},) like the history, "
                    f"got {tuple(plan.positions.shape)}"
                )
            plan = plan.at_positions(plan.positions.cpu()[torch.from_numpy(known)])
        return Request(items, plan, self._k(k))

    def _indices(self, history: Any) -> np.ndarray:
        """Item indices, -1 for unknown items where these are skipped."""
        if isinstance(history, (str, bytes)):
            history = _parse_json("history", history)
        if isinstance(history, Tensor):
            history = history.numpy(force=True)
        is_flat = history.ndim == 1 if isinstance(history, np.ndarray) else isinstance(history, (list, tuple))
        if not is_flat:
            raise TypeError(f"history: expected a list of item ids, got {_describe(history)}")
        if not 1 <= len(history) <= self.max_history:
            raise ValueError(f"history: expected 1 to {self.max_history} items, got {len(history)}")
        if isinstance(history, np.ndarray) and history.dtype.kind in "iu" and self.index_of is None:
            inside = (history >= 0) & (history < self.n_items)
            indices = np.where(inside, np.where(inside, history, 0).astype(np.int64), -1)
        else:
            entries = history.tolist() if isinstance(history, np.ndarray) else history
            indices = np.array([self._index(entry) for entry in entries], dtype=np.int64)
        unknown = np.flatnonzero(indices < 0)
        if len(unknown) and not self.skip_unknown:
            named = ", ".join(f"{history[place]!r:.40}" for place in unknown[:3])
            raise ValueError(f"history: {len(unknown)} unknown items: {named}{', …' if len(unknown) > 3 else ''}")
        return indices

    def _index(self, entry: Any) -> int:
        if isinstance(entry, str):
            return -1 if self.index_of is None else self.index_of.get(entry, -1)
        # True would pass for item 1, and 1.0 as well. Most are plain integers, of which the abstract class takes ten
        # times as long to tell.
        if type(entry) is int or (isinstance(entry, numbers.Integral) and not isinstance(entry, (bool, np.bool_))):
            number = int(entry)
            if self.index_of is None:
                return number if 0 <= number < self.n_items else -1
            return self.index_of.get(number, -1)
        raise TypeError(f"history: expected item ids (integers or text), got {_describe(entry)}")

    def _plan(self, edits: Any) -> SteeringPlan | None:
        if _is_missing(edits):
            return None
        if isinstance(edits, (str, bytes)):
            edits = _parse_json("edits", edits)
        elif not isinstance(edits, (SteeringPlan, Mapping)):
            raise TypeError(f"edits: expected a SteeringPlan, its dict, its json or None, got {_describe(edits)}")
        if not isinstance(edits, SteeringPlan):
            edits = _without_arrays(edits)
            # Before the entries are looked at, each of which may be long.
            entries = edits.get("edits") if isinstance(edits, Mapping) else None
            self._check_number(entries if isinstance(entries, (list, tuple)) else ())
            edits = SteeringPlan.from_dict(edits)
        self._check_number(edits.edits)
        check_plan(edits, self.n_features, self.d_model)
        return None if edits.mode == "delta" and not edits.edits else edits

    def _check_number(self, entries: Sequence[Any]) -> None:
        if len(entries) > self.max_edits:
            raise ValueError(f"edits: expected at most {self.max_edits}, got {len(entries)}")

    def _k(self, k: Any) -> int:
        if _is_missing(k):
            return self.k
        is_integer = isinstance(k, numbers.Integral) and not isinstance(k, (bool, np.bool_))
        if not is_integer or not 1 <= int(k) <= self.n_items:
            raise ValueError(f"k: expected an integer from 1 to {self.n_items}, got {k!r:.80}")
        return int(k)


def _is_missing(value: Any) -> bool:
    # Frames of pandas hold NaN where a value is missing.
    return value is None or (isinstance(value, (float, np.floating)) and bool(np.isnan(value)))


def _parse_json(name: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: expected json, got {text[:40]!r}: {error}") from None


def _without_arrays(plan: Any) -> Any:
    """A plan's dict with lists where an engine put numpy's arrays, as it does with lists of structs."""
    if not isinstance(plan, Mapping):
        return plan
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in plan.items()}


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array {value.shape}"
    return f"{type(value).__name__} {value!r:.40}"
