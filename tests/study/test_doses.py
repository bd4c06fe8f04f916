"""A strength of its own for every user, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from saerec_fast.data import Split
from saerec_fast.recommender import SequenceRecommender, item_popularity
from saerec_fast.sae import SparseAutoencoder
from saerec_fast.study.doses import DosedLists
from saerec_fast.study.steered_ranking import SteeredRanking
from saerec_fast.types import Direction, ReLU, SteeringPlan

WIDTH = 16
UNIT = st.integers(0, 10).map(lambda tenths: tenths / 10)


@pytest.fixture(scope="module")
def ranking(model: SequenceRecommender, split: Split) -> SteeredRanking:
    sae = SparseAutoencoder(WIDTH, 40, ReLU(), generator=torch.Generator().manual_seed(2)).eval()
    return SteeredRanking(model, split.test, sae, "block.0", popularity=item_popularity(split.train), batch_size=7)


def lists(shares: np.ndarray, expected: np.ndarray, sign: int) -> DosedLists:
    return DosedLists(np.arange(len(shares), dtype=float), shares, expected, expected, sign)


def test_expected_ndcg_is_by_the_recommenders_own_probabilities(
    ranking: SteeredRanking, model: SequenceRecommender, split: Split
) -> None:
    found = ranking.expected_ndcg(ranking.lists(SteeringPlan()))
    for row, user in enumerate(ranking.users):
        history = split.test.sequence(user)[:-1]
        tokens = torch.from_numpy(history[-8:].astype(np.int64) + 1)[None]
        scores = model.scores(model(tokens))[0, -1].detach().double().numpy()
        scores[history] = -np.inf
        best = np.argsort(-scores)[:10]
        chances = np.exp(scores) / np.exp(scores).sum()
        assert found[row] == pytest.approx(sum(chances[item] / np.log2(place + 2) for place, item in enumerate(best)))
    nothing = np.full((len(ranking.users), 10), -1)
    assert ranking.expected_ndcg(nothing).tolist() == [0.0] * len(ranking.users)


def test_measured_lists_are_those_of_the_plan(ranking: SteeredRanking, split: Split) -> None:
    plan = SteeringPlan([Direction(torch.linspace(-1, 1, WIDTH))], positions="last")
    has_attribute = np.arange(split.n_items) % 9 == 0
    found = DosedLists.measure(ranking, plan, (0.5, 2.0), has_attribute, sign=-1)
    assert found.strengths.tolist() == [0.0, 0.5, 2.0]
    for place, strength in enumerate(found.strengths):
        metrics = ranking.metrics(plan.scaled(float(strength)))
        np.testing.assert_array_equal(found.ndcg[place], metrics.ndcg)
        np.testing.assert_allclose(found.shares[place], has_attribute[metrics.recommended].mean(axis=1))
    # No list is expected to be better than the untouched one; free of charge, everybody keeps it.
    assert (found.expected <= found.expected[0] + 1e-9).all()
    assert found.doses(0.0).tolist() == [0] * len(ranking.users)
    without = found.shares[0] == 0
    assert without.any()
    assert (found.doses(1e3)[without] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
@given(data=st.data())
def test_no_other_choice_expects_more_at_the_same_share(sign: int, data: st.DataObject) -> None:
    shape = (3, data.draw(st.integers(1, 4)))
    table = lists(*(data.draw(arrays.arrays(np.float64, shape, elements=UNIT)) for _ in range(2)), sign)
    price = data.draw(st.floats(0.001, 10))
    users = np.arange(shape[1])
    doses = table.doses(price)
    share, expected = table.shares[doses, users].mean(), table.expected[doses, users].mean()
    for other in itertools.product(range(3), repeat=shape[1]):
        if sign * table.shares[other, users].mean() >= sign * share:
            assert table.expected[other, users].mean() <= expected + 1e-9


@pytest.mark.parametrize("sign", [1, -1])
@given(data=st.data())
def test_the_price_is_the_least_that_is_enough(sign: int, data: st.DataObject) -> None:
    shape = (3, data.draw(st.integers(1, 4)))
    table = lists(*(data.draw(arrays.arrays(np.float64, shape, elements=UNIT)) for _ in range(2)), sign)
    wanted = data.draw(UNIT)
    price = table.price(wanted)
    _, share, ndcg = table.at(price)
    assert ndcg.shape == (shape[1],)
    if sign * share < sign * wanted:
        furthest = table.shares.max(axis=0) if sign > 0 else table.shares.min(axis=0)
        assert share == pytest.approx(furthest.mean())  # out of reach
    elif price > 1e-5:
        assert sign * table.at(price * 0.999)[1] < sign * wanted


def test_the_least_of_equal_strengths_is_taken() -> None:
    table = lists(np.full((3, 1), 0.5), np.full((3, 1), 0.2), 1)
    assert table.doses(1.0).tolist() == [0]
    assert table.at(1.0)[0] == 0.0
