from __future__ import annotations

import numpy as np
import pytest

from saerec_fast.data import Split
from saerec_fast.recommender import ItemKNNRecommender, PopularityRecommender, baselines, evaluate, item_popularity

from .test_evaluation import dataset_of


def test_popularity_skips_what_was_seen_and_breaks_ties_by_index() -> None:
    recommend = PopularityRecommender(dataset_of([[2, 1], [2, 3], [2, 3], [1, 0]], n_items=5))
    assert recommend([np.array([4]), np.array([2, 3])], 3).tolist() == [[2, 1, 3], [1, 0, 4]]
    assert recommend([np.array([0, 1, 2, 3])], 3).tolist() == [[4, -1, -1]]
    keeping = PopularityRecommender(dataset_of([[2, 1], [2, 3]], n_items=4), exclude_seen=False)
    assert keeping([np.array([2])], 2).tolist() == [[2, 1]]


def dense_similarity(sequences: list[list[int]], n_items: int, shrinkage: float) -> np.ndarray:
    users = np.zeros((len(sequences), n_items))
    for row, sequence in zip(users, sequences, strict=True):
        row[sequence] = 1
    counts = users.sum(0)
    similarity: np.ndarray = users.T @ users / np.maximum(np.sqrt(np.outer(counts, counts)) + shrinkage, 1e-12)
    np.fill_diagonal(similarity, 0)
    return similarity


@pytest.mark.parametrize("pairs_per_block", [1, 50, 1 << 24])
@pytest.mark.parametrize("shrinkage", [0.0, 3.0])
def test_neighbours_equal_a_dense_computation(
    monkeypatch: pytest.MonkeyPatch, pairs_per_block: int, shrinkage: float
) -> None:
    monkeypatch.setattr(baselines, "_PAIRS_PER_BLOCK", pairs_per_block)
    generator = np.random.default_rng(0)
    n_items = 15
    sequences = [generator.integers(0, 13, generator.integers(1, 9)).tolist() for _ in range(30)]
    recommend = ItemKNNRecommender(dataset_of(sequences, n_items), n_neighbours=n_items, decay=0.5, shrinkage=shrinkage)
    table = np.zeros((n_items, n_items))
    np.put_along_axis(table, recommend.neighbours, recommend.similarities, axis=1)
    np.testing.assert_allclose(table, dense_similarity(sequences, n_items, shrinkage))

    history = np.array([3, 7, 5])
    scores = sum(0.5**age * table[item] for age, item in enumerate([5, 7, 3]))
    assert isinstance(scores, np.ndarray)
    scores = scores + 1e-9 * recommend.popularity
    scores[history] = -np.inf
    expected = np.argsort(-scores, kind="stable")[:6]
    assert recommend([history], 6).tolist() == [expected.tolist()]


def test_by_default_the_whole_history_counts_in_any_order() -> None:
    generator = np.random.default_rng(1)
    n_items = 40
    sequences = [generator.permutation(n_items)[: generator.integers(2, 30)].tolist() for _ in range(50)]
    data = dataset_of(sequences, n_items)
    history = generator.permutation(n_items)[:25]
    recommend = ItemKNNRecommender(data)
    lists = recommend([history, history[::-1]], 10)
    assert lists[0].tolist() == lists[1].tolist()
    scores = dense_similarity(sequences, n_items, shrinkage=0.0)[history].sum(0) + 1e-9 * recommend.popularity
    scores[history] = -np.inf
    assert lists[0].tolist() == np.argsort(-scores, kind="stable")[:10].tolist()
    assert ItemKNNRecommender(data, decay=0.5)([history], 10).tolist() != lists[:1].tolist()
    assert ItemKNNRecommender(data, history_length=3)([history], 10).tolist() != lists[:1].tolist()


def test_only_the_nearest_neighbours_and_the_newest_items_vote() -> None:
    # Item 0 goes with 1 (three users) and with 2 (one user).
    data = dataset_of([[0, 1], [0, 1], [0, 1], [0, 2], [3, 4]], n_items=5)
    recommend = ItemKNNRecommender(data, n_neighbours=1, history_length=1, shrinkage=0)
    assert recommend.neighbours[0].tolist() == [1]
    # The older item 3 has no vote, so 4 ranks by popularity alone.
    assert recommend([np.array([3, 0])], 3).tolist() == [[1, 2, 4]]
    assert recommend([np.array([0, 1, 2, 3])], 2).tolist() == [[4, -1]]


@pytest.mark.parametrize("setting", [{"n_neighbours": 0}, {"history_length": 0}, {"decay": 0.0}, {"shrinkage": -1.0}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        ItemKNNRecommender(dataset_of([[0, 1]], 2), **setting)  # type: ignore[arg-type]


def test_neighbours_beat_popularity_where_users_have_tastes(split: Split) -> None:
    popularity = item_popularity(split.train)
    scores = {
        type(recommend).__name__: evaluate(recommend, split.test, popularity=popularity, targets_per_user=5).ndcg.mean()
        for recommend in (PopularityRecommender(split.train), ItemKNNRecommender(split.train))
    }
    assert scores["ItemKNNRecommender"] > scores["PopularityRecommender"]
