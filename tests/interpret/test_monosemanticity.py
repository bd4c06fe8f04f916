"""The entropy of attributes among top items, on cases worked out by hand."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import entropy

from saerec_fast.interpret.monosemanticity import attribute_entropy

# Items 0..3 have attribute 0, 4..7 attribute 1, 8 has both, 9 has none.
ATTRIBUTES = np.zeros((10, 2), dtype=bool)
ATTRIBUTES[[0, 1, 2, 3, 8], 0] = ATTRIBUTES[[4, 5, 6, 7, 8], 1] = True
EVENLY = np.ones(10, dtype=int)


def measure(top_items, attributes=ATTRIBUTES, occurrences=EVENLY, **options):
    return attribute_entropy(top_items, attributes, occurrences, **{"minimum_items": 2, **options})


@pytest.mark.parametrize(
    ("items", "shares"),
    [
        ([0, 1, 2, 3], [1, 0]),
        ([0, 1, 4, 5], [2, 2]),
        ([0, 1, 2, 4], [3, 1]),
        ([0, 1, 8], [2.5, 0.5]),
        ([0, 1, 2, 3, 9], [1, 0]),
    ],
    ids=["pure", "even", "three to one", "an item of both", "an item of none"],
)
def test_by_hand(items, shares):
    found = measure([items])
    assert found.entropy[0] == pytest.approx(entropy(shares, base=2))


def test_features_with_few_labelled_items_are_left_out():
    found = measure([[0, 1, 2], [0, 1, 9], [0], []], minimum_items=3)
    assert found.features.tolist() == [0]
    assert found.left_out == 3


def test_normalised_by_what_chance_gives():
    random = np.random.default_rng(0)
    by_chance = [random.permutation(9)[:4] for _ in range(400)]
    found = measure([*by_chance, [0, 1, 2, 3], [0, 1, 4, 5]], draws=2000)
    assert found.normalised[:400].mean() == pytest.approx(1, abs=0.03)
    assert found.normalised[400] == 0
    assert found.normalised[401] > 1


def test_the_expectation_follows_the_base_rates():
    """Two items, the first drawn by occurrences: exact, over all ordered pairs."""
    occurrences = np.array([50, 1, 1, 1, 20, 1, 1, 1, 5, 30])
    weights = ATTRIBUTES / np.maximum(ATTRIBUTES.sum(1, keepdims=True), 1)
    share = occurrences[:9] / occurrences[:9].sum()
    exact = sum(
        share[a] * share[b] / (1 - share[a]) * entropy(weights[a] + weights[b], base=2)
        for a, b in permutations(range(9), 2)
    )
    found = measure([[0, 4]], occurrences=occurrences, draws=20_000)
    assert found.entropy[0] == pytest.approx(1)
    assert found.entropy[0] / found.normalised[0] == pytest.approx(exact, abs=0.01)


def test_seeded():
    first, second, other = (measure([[0, 1, 4]], seed=seed).normalised[0] for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_nothing_to_mix_or_to_measure():
    assert measure([[0, 1, 2]], attributes=np.ones((10, 1), dtype=bool)).left_out == 1
    assert len(measure([]).entropy) == 0
    with pytest.raises(ValueError, match="minimum_items: expected at least 2, got 1"):
        measure([[0, 1]], minimum_items=1)
