"""How mixed the attributes are among the items on which a feature is strongest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Monosemanticity:
    """Entropies of the measured features; those that fired on too few items are not among them.

    Attributes:
        features: int64 ``(m,)``, which features were measured.
        entropy: float64 ``(m,)``, bits.
        normalised: float64 ``(m,)``, entropy over that expected of as many items met by chance: 0 where all top items
            share their one attribute, about 1 where they are as mixed as any.
        left_out: how many features were not measured.
    """

    features: IntArray
    entropy: FloatArray
    normalised: FloatArray
    left_out: int


def attribute_entropy(
    top_items: Sequence[ArrayLike],
    attributes: ArrayLike,
    occurrences: ArrayLike,
    *,
    minimum_items: int = 10,
    draws: int = 200,
    seed: int = 0,
) -> Monosemanticity:
    """The entropy of the attributes among each feature's top items.

    Every item spreads a weight of 1 evenly over its attributes; with p the shares of the attributes among a feature's
    top items, the entropy is −Σ p log₂ p. Items without attributes say nothing and are left out. What chance would
    give depends on how common each attribute is and on the number of items (few items cannot be as mixed as many), so
    each entropy is compared with the mean of as many distinct items in the order in which a random row would meet them.

    Args:
        top_items: per feature, the distinct items on which it is strongest.
        attributes: bool ``(n_items, A)``.
        occurrences: ``(n_items,)``, rows of every item.
        minimum_items: features with fewer top items that have attributes are left out.
        draws: random orders of the items behind each expectation.
        seed: of those.

    Raises:
        ValueError: ``minimum_items`` below 2: one item has no mixture.
    """
    if minimum_items < 2:
        raise ValueError(f"minimum_items: expected at least 2, got {minimum_items}")
    table = np.asarray(attributes, dtype=np.bool_)
    weights = table / np.maximum(table.sum(1, keepdims=True), 1)
    labelled: NDArray[np.bool_] = np.asarray(table.any(axis=1))
    tops = [np.asarray(items, dtype=np.int64) for items in top_items]
    tops = [items[labelled[items]] for items in tops]
    counts = np.array([len(items) for items in tops], dtype=np.int64)
    met = np.where(labelled, np.asarray(occurrences), 0)
    expected = _expected_entropy(weights, met, int(counts.max(initial=0)), draws, seed)
    # Where all items share one attribute, there is nothing to mix.
    measured = np.flatnonzero((counts >= minimum_items) & (expected[counts] > 0))
    entropy = np.array([_entropy(weights[tops[feature]].sum(0)) for feature in measured], dtype=np.float64)
    return Monosemanticity(measured, entropy, entropy / expected[counts[measured]], len(tops) - len(measured))


def _entropy(weights: FloatArray) -> FloatArray:
    """Bits, over the last axis; weights need not sum to 1."""
    share = weights / weights.sum(-1, keepdims=True)
    return np.asarray(-(share * np.log2(np.where(share > 0, share, 1.0))).sum(-1))


def _expected_entropy(
    weights: FloatArray, occurrences: NDArray[np.int64], most: int, draws: int, seed: int
) -> FloatArray:
    """``(most + 1,)``: the mean entropy of the first 0, 1, … items that a random order of the rows meets."""
    items = np.flatnonzero(occurrences)
    most_met = min(most, len(items))
    total = np.zeros(most + 1)
    random = np.random.default_rng(seed)
    for _ in range(draws if most_met else 0):
        # The first of an item's rows comes after an exponential time with the number of its rows as rate.
        arrival = random.exponential(size=len(items)) / occurrences[items]
        first = items[np.argsort(arrival)[:most_met]]
        total[1 : most_met + 1] += _entropy(np.cumsum(weights[first], axis=0))
    return total / draws
