"""Whether SAEs that differ in their seed alone find the same features: decoder directions matched by cosine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Matching:
    """The counterpart of every direction of one dictionary in another.

    Attributes:
        partner: int64 ``(n,)``, one to one, with the largest sum of cosines; -1 where the other dictionary is smaller
            and none is left.
        cosine: float64 ``(n,)``, with the partner; NaN without one.
        nearest: int64 ``(n,)``, the direction of the other dictionary with the largest cosine, which several may share.
        nearest_cosine: float64 ``(n,)``.
    """

    partner: IntArray
    cosine: FloatArray
    nearest: IntArray
    nearest_cosine: FloatArray


def match_directions(first: ArrayLike, second: ArrayLike) -> Matching:
    """Match the rows of two dictionaries ``(n, d)`` and ``(m, d)`` by cosine.

    Opposite directions are no match: an activation is never negative, so a feature and its mirror image say different
    things. Memory 8 · n · m bytes.

    Raises:
        ValueError: no rows, another width, or a row of zeros.
    """
    from scipy.optimize import linear_sum_assignment

    left, right = _unit_rows("first", first), _unit_rows("second", second)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"expected two dictionaries of one width, got {left.shape[1]} and {right.shape[1]}")
    cosines = left @ right.T
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    partner = np.full(len(left), -1, dtype=np.int64)
    cosine = np.full(len(left), np.nan)
    partner[rows] = columns
    cosine[rows] = cosines[rows, columns]
    nearest = cosines.argmax(1).astype(np.int64)
    return Matching(partner, cosine, nearest, cosines[np.arange(len(left)), nearest])


def match_random(dictionary: ArrayLike, n_directions: int, *, seed: int = 0) -> Matching:
    """The baseline: a dictionary ``(n, d)`` matched with directions drawn uniformly from the sphere."""
    width = np.asarray(dictionary).shape[1]
    return match_directions(dictionary, np.random.default_rng(seed).normal(size=(n_directions, width)))


def _unit_rows(name: str, rows: ArrayLike) -> FloatArray:
    array = np.asarray(rows, dtype=np.float64)
    if array.ndim != 2 or not len(array):
        raise ValueError(f"{name}: expected shape (n, d) with at least one row, got {array.shape}")
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise ValueError(f"{name}: expected directions, got {int((norms == 0).sum())} rows of zeros")
    return np.asarray(array / norms)
