from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saerec_fast.data import Dataset, ItemTable, Split
from saerec_fast.recommender import (
    SequenceRecommender,
    TransformerScorer,
    bootstrap_interval,
    evaluate,
    item_popularity,
    last_hidden,
    pad_histories,
)
from saerec_fast.recommender.evaluation import inter_list_diversity, ranking_metrics


def dataset_of(sequences: list[list[int]], n_items: int) -> Dataset:
    offsets = np.cumsum([0, *map(len, sequences)])
    table = ItemTable(
        np.array([f"i{item}" for item in range(n_items)]), [""] * n_items, [], np.zeros((n_items, 0), bool)
    )
    users = np.array([f"u{user}" for user in range(len(sequences))])
    return Dataset("small", users, offsets, np.concatenate(sequences).astype(np.int32), None, table)


def test_metrics_of_a_case_worked_by_hand() -> None:
    # The user without a second item is skipped; the others have their target first, third, and not at all.
    data = dataset_of([[0, 1], [4], [2, 3, 0], [1, 2]], n_items=5)
    lists = {(0,): [1, 2, 3], (2, 3): [1, 4, 0], (1,): [0, 3, -1]}

    def recommend(histories: Sequence[np.ndarray], k: int) -> np.ndarray:
        assert k == 3
        return np.array([lists[tuple(history.tolist())] for history in histories])

    popularity = np.array([0.5, 0.25, 0.125, 1.0, 0.0])
    metrics = evaluate(recommend, data, popularity=popularity, k=3, batch_size=2)
    assert metrics.users.tolist() == [0, 2, 3]
    assert metrics.targets.tolist() == [1, 0, 2]
    assert metrics.recommended.tolist() == [[1, 2, 3], [1, 4, 0], [0, 3, -1]]
    np.testing.assert_allclose(metrics.ndcg, [1, 0.5, 0])
    np.testing.assert_allclose(metrics.hit_rate, [1, 1, 0])
    np.testing.assert_allclose(metrics.reciprocal_rank, [1, 1 / 3, 0])
    np.testing.assert_allclose(metrics.precision, [1 / 3, 1 / 3, 0])
    # Bits: item 0 → 1, 1 → 2, 2 → 3, 3 → 0; item 4, unseen in training, counts like the rarest one → 3.
    np.testing.assert_allclose(metrics.novelty, [5 / 3, 2, 0.5])
    assert metrics.coverage == 1
    # Overlaps of the pairs: 1 (item 1), 1 (item 3), 1 (item 0), each of 3.
    assert metrics.diversity == pytest.approx(2 / 3)
    assert metrics.summary() == pytest.approx(
        {
            "ndcg@3": 0.5,
            "hit_rate@3": 2 / 3,
            "mrr@3": 4 / 9,
            "precision@3": 2 / 9,
            "novelty@3": (5 / 3 + 2 + 0.5) / 3,
            "coverage@3": 1.0,
            "diversity@3": 2 / 3,
        }
    )
    assert set(metrics.intervals(n_resamples=20)) == set(metrics.per_user())


@st.composite
def ranked_lists(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    n_items = draw(st.integers(2, 12))
    k = draw(st.integers(1, 5))
    n_lists = draw(st.integers(1, 8))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lists = np.full((n_lists, k), -1)
    for row in lists:
        length = min(k, n_items, int(generator.integers(0, k + 1)))
        row[:length] = generator.permutation(n_items)[:length]
    users = np.sort(generator.integers(0, 4, n_lists))
    popularity = generator.integers(0, 3, n_items) / 4
    return lists, generator.integers(0, n_items, n_lists), users, popularity


@settings(max_examples=60, deadline=None)
@given(ranked_lists())
def test_metrics_equal_their_definitions(case: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> None:
    lists, targets, users, popularity = case
    k = lists.shape[1]
    metrics = ranking_metrics(lists, targets, users, popularity=popularity)
    floor = min((p for p in popularity if p > 0), default=1.0)
    for index, user in enumerate(metrics.users):
        rows = np.flatnonzero(users == user)
        ndcg, hits, reciprocal, novelty = [], [], [], []
        for row in rows:
            ranking = [int(item) for item in lists[row] if item >= 0]
            rank = ranking.index(targets[row]) + 1 if targets[row] in ranking else None
            ndcg.append(1 / math.log2(1 + rank) if rank else 0)
            hits.append(1 if rank else 0)
            reciprocal.append(1 / rank if rank else 0)
            bits = [-math.log2(max(popularity[item], floor)) for item in ranking]
            novelty.append(sum(bits) / len(bits) if bits else 0)
        assert metrics.ndcg[index] == pytest.approx(np.mean(ndcg))
        assert metrics.hit_rate[index] == pytest.approx(np.mean(hits))
        assert metrics.precision[index] == pytest.approx(np.mean(hits) / k)
        assert metrics.reciprocal_rank[index] == pytest.approx(np.mean(reciprocal))
        assert metrics.novelty[index] == pytest.approx(np.mean(novelty))
    shown = {int(item) for item in lists.reshape(-1)} - {-1}
    assert metrics.coverage == pytest.approx(len(shown) / len(popularity))
    overlaps = [len({*a} & {*b} - {-1}) / k for a, b in combinations(lists.tolist(), 2)]
    assert metrics.diversity == pytest.approx(1 - np.mean(overlaps) if overlaps else 0)


def test_identical_lists_have_no_diversity_and_disjoint_ones_full() -> None:
    assert inter_list_diversity(np.array([[0, 1], [1, 0]]), 4) == 0
    assert inter_list_diversity(np.array([[0, 1], [2, 3]]), 4) == 1
    assert inter_list_diversity(np.array([[0, 1]]), 4) == 0


def test_several_targets_per_user_are_each_predicted_from_what_came_before() -> None:
    data = dataset_of([[0, 1, 2, 3], [3, 2]], n_items=4)
    asked: list[list[int]] = []

    def recommend(histories: Sequence[np.ndarray], k: int) -> np.ndarray:
        asked.extend(history.tolist() for history in histories)
        return np.array([[2]] * len(histories))

    metrics = evaluate(recommend, data, popularity=np.ones(4), k=1, targets_per_user=2)
    assert asked == [[0, 1], [0, 1, 2], [3]]
    assert metrics.targets.tolist() == [2, 3, 2]
    assert metrics.list_users.tolist() == [0, 0, 1]
    assert metrics.ndcg.tolist() == [0.5, 1]


def test_popularity_counts_each_user_once() -> None:
    data = dataset_of([[0, 0, 1], [0], [2, 1]], n_items=4)
    np.testing.assert_allclose(item_popularity(data), [2 / 3, 2 / 3, 1 / 3, 0])


def test_nothing_to_evaluate_is_an_error() -> None:
    def unused(histories: Sequence[np.ndarray], k: int) -> np.ndarray:
        raise AssertionError

    with pytest.raises(ValueError, match="no user has 2 items"):
        evaluate(unused, dataset_of([[0], [1]], 2), popularity=np.ones(2))
    with pytest.raises(ValueError, match="popularity"):
        evaluate(unused, dataset_of([[0, 1]], 2), popularity=np.ones(3))


def test_transformer_lists_equal_a_dense_ranking_with_seen_items_left_out(
    model: SequenceRecommender, split: Split
) -> None:
    popularity = item_popularity(split.train)
    metrics = evaluate(TransformerScorer(model), split.test, popularity=popularity, batch_size=7)
    for row, user in enumerate(metrics.list_users):
        history = split.test.sequence(int(user))[:-1]
        tokens = torch.as_tensor(history[-model.config.max_length :].astype(np.int64))[None] + 1
        scores = model.scores(model(tokens)[0, -1]).detach()
        scores[torch.as_tensor(history.astype(np.int64))] = -math.inf
        expected = scores.sort(descending=True, stable=True).indices[:10]
        shown = metrics.recommended[row]
        candidates = model.config.n_items - len(np.unique(history))
        assert (shown >= 0).sum() == min(10, candidates)
        assert not np.isin(shown, history).any()
        np.testing.assert_array_equal(shown[shown >= 0], expected[: min(10, candidates)])


def test_seen_items_are_kept_on_request_and_lists_padded_beyond_the_catalogue(model: SequenceRecommender) -> None:
    history = np.arange(5)
    n_items = model.config.n_items
    everything = TransformerScorer(model, exclude_seen=False)([history], n_items + 3)
    assert sorted(everything[0].tolist()) == [-1, -1, -1, *range(n_items)]
    unseen = TransformerScorer(model)([history], n_items)
    assert sorted(unseen[0].tolist()) == [-1] * 5 + list(range(5, n_items))


def test_a_hook_on_the_model_acts_on_the_lists_and_learns_the_tokens(model: SequenceRecommender) -> None:
    seen: list[torch.Tensor] = []
    scorer = TransformerScorer(model, before_batch=seen.append)
    history = np.array([3, 1, 4])
    before = scorer([history], 5)
    handle = model.transformer.ln_f.register_forward_hook(lambda _module, _inputs, output: -output)
    after = scorer([history], 5)
    handle.remove()
    assert seen[0].tolist() == [[4, 2, 5]]
    assert not np.array_equal(before, after)


def test_an_empty_history_is_refused(model: SequenceRecommender) -> None:
    with pytest.raises(ValueError, match="empty"):
        TransformerScorer(model)([np.array([1]), np.array([], int)], 3)


def test_pad_histories_keeps_the_newest_items_on_the_left() -> None:
    tokens = pad_histories([np.array([5, 6, 7]), np.array([0])], max_length=2)
    assert tokens.tolist() == [[7, 8], [1, 0]]
    hidden = torch.arange(4.0).reshape(2, 2, 1)
    assert last_hidden(hidden, tokens).tolist() == [[1.0], [2.0]]


def test_bootstrap_interval_is_seeded_and_near_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    narrow = bootstrap_interval(values, seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(np.ones(3)) == (1, 1)
    with pytest.raises(ValueError, match="empty"):
        bootstrap_interval(np.zeros(0))
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(values, level=1.0)
