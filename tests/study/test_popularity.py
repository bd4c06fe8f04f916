from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from saerec_fast.data import synthetic_dataset
from saerec_fast.interpret.control import evaluate_steered
from saerec_fast.pipeline import Run
from saerec_fast.recommender import TransformerScorer, hidden_of, site_module
from saerec_fast.recommender.evaluation import ranking_metrics
from saerec_fast.study.popularity import (
    LABELS,
    LogitAdjusted,
    PopularitySettings,
    _last_hidden,
    cohens_d,
    exposure_figures,
    gini,
    measure,
    popularity_deciles,
    profiles,
)
from saerec_fast.types import Edit, SteeringPlan

SMALL = PopularitySettings(n_profiles=60, popular_deciles=2, n_listed=3, n_steered=4, strengths=(0.5, 2.0), n_bins=8)


def test_effect_size_by_hand() -> None:
    first = np.array([[0.0, 5.0, 1.0], [2.0, 5.0, 3.0]])
    second = np.array([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0], [1.0, 5.0, 2.0], [5.0, 5.0, 2.0]])
    # First column: variances 2 and 4, pooled (1 · 2 + 3 · 4) / 4; third: equal means.
    np.testing.assert_allclose(cohens_d(first, second), [-1 / math.sqrt(3.5), 0.0, 0.0])
    assert cohens_d(second, first)[0] == pytest.approx(1 / math.sqrt(3.5))


def test_a_column_without_spread_has_no_effect_size() -> None:
    assert cohens_d(np.full((3, 1), 2.0), np.full((4, 1), 1.0)).tolist() == [0.0]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([1, 1, 1, 1], 0.0), ([0, 0, 0, 4], 0.75), ([3, 1, 1, 3], 0.25), ([7], 0.0), ([2, 0, 2, 0, 2], 0.4)],
)
def test_gini_by_hand(counts: list[int], expected: float) -> None:
    assert gini(np.array(counts)) == expected
    assert gini(np.array(counts[::-1])) == expected


def test_gini_is_half_the_relative_mean_difference_of_all_pairs() -> None:
    counts = np.random.default_rng(0).integers(0, 5, 40)
    expected = np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())
    assert gini(counts) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counts", [[], [0, 0], [-1, 2]])
def test_gini_refuses_what_has_none(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="counts"):
        gini(np.array(counts, dtype=np.int64))


def test_deciles_go_by_popularity_then_by_index() -> None:
    popularity = np.array([0.1] * 10 + [0.9, 0.9] + [0.5] * 8)
    deciles = popularity_deciles(popularity)
    assert deciles[10] == deciles[11] == 0
    assert sorted(deciles[12:]) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert deciles[:10].tolist() == [5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    with pytest.raises(ValueError, match="10 items"):
        popularity_deciles(np.ones(9))


def test_profiles_hold_only_their_items_each_once() -> None:
    users = synthetic_dataset(20, 30, 2, seed=0)
    lengths = np.array([1, 3, 5, 4])
    made = profiles(users, np.array([2, 4, 6, 8, 10]), lengths, "even", np.random.default_rng(0))
    assert made.lengths.tolist() == lengths.tolist()
    for user in range(made.n_users):
        sequence = made.sequence(user).tolist()
        assert len(set(sequence)) == len(sequence)
        assert set(sequence) <= {2, 4, 6, 8, 10}
    assert sorted(made.sequence(2).tolist()) == [2, 4, 6, 8, 10]


def test_profiles_are_read_at_their_last_position(run: Run) -> None:
    lengths = np.array([4, 1, 7])
    made = profiles(run.split.train, np.arange(20), lengths, "some", np.random.default_rng(1))
    hidden = _last_hidden(run, made)
    seen: list[torch.Tensor] = []
    module = site_module(run.model, run.site)
    with module.register_forward_hook(lambda _m, _i, output: seen.append(hidden_of(output))), torch.inference_mode():
        for user in range(3):
            run.model(torch.from_numpy(made.sequence(user).astype(np.int64) + 1)[None])
    torch.testing.assert_close(hidden, torch.stack([one[0, -1] for one in seen]), rtol=1e-4, atol=1e-5)


def test_exposure_by_hand() -> None:
    popularity = np.array([0.5, 0.25, 0.25, 0.125])
    lists = np.array([[0, 1], [0, 3], [0, -1]])
    metrics = ranking_metrics(lists, np.array([0, 3, 2]), np.arange(3), popularity=popularity)
    figures = exposure_figures(metrics, np.array([False, False, True, True]))
    # Items stand in 3, 1, 0 and 1 lists: ascending 0, 1, 1, 3, weights -3, -1, 1, 3.
    assert figures["gini@2"] == 9 / 20
    assert figures["coverage@2"] == 0.75
    assert figures["long_tail_share"] == 1 / 5
    assert figures["ndcg@2"] == pytest.approx((1 + 1 / math.log2(3)) / 3)
    assert figures["novelty@2"] == pytest.approx((1.5 + 2 + 1) / 3)


def test_adjusted_lists_are_those_of_the_adjusted_scores(run: Run) -> None:
    model, popularity = run.model, run.popularity
    histories = [run.split.test.sequence(user)[:5] for user in range(4)]
    untouched = LogitAdjusted(model, popularity, 0.0)(histories, 10)
    np.testing.assert_array_equal(untouched, TransformerScorer(model)(histories, 10))
    adjusted = LogitAdjusted(model, popularity, 0.7)(histories, 10)
    with torch.inference_mode():
        for history, found in zip(histories, adjusted, strict=True):
            scores = model.scores(model(torch.from_numpy(history.astype(np.int64) + 1)[None]))[0, -1].numpy()
            scores = scores - 0.7 * np.log(popularity)
            scores[history] = -np.inf
            np.testing.assert_allclose(scores[found], np.sort(scores)[::-1][:10], rtol=1e-4, atol=1e-5)


def test_an_item_without_users_is_adjusted_like_the_rarest(run: Run) -> None:
    popularity = run.popularity.copy()
    popularity[0] = 0
    bias = LogitAdjusted(run.model, popularity, 1.0).bias
    assert bias[0] == bias.max()
    assert bool(torch.isfinite(bias).all())


def test_the_section(run: Run, tmp_path: Path) -> None:
    result = measure(run, SMALL, tmp_path)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert measure(Run(run.folder, progress=False), SMALL, tmp_path / "again") == result

    effect = np.load(tmp_path / "effect_sizes.npy")
    assert effect.shape == (run.sae.n_features,)
    popular = [one for one in result["features"] if one["kind"] == "popular"]
    unpopular = [one for one in result["features"] if one["kind"] == "unpopular"]
    assert popular[0]["effect_size"] == effect.max() > 0
    assert unpopular[0]["effect_size"] == effect.min() < 0
    for one in result["features"]:
        assert (one["mean_popular"] > one["mean_unpopular"]) == (one["effect_size"] > 0)
    histogram = result["histogram"]
    assert len(histogram["edges"]) == SMALL.n_bins + 1
    assert SMALL.n_listed < sum(histogram["counts"]) <= run.sae.n_features

    assert [curve["method"] for curve in result["curves"]] == list(LABELS)
    assert all(point.keys() == {"strength", *result["baseline"]} for c in result["curves"] for point in c["points"])
    contrastive = {point["strength"]: point for point in result["curves"][3]["points"]}
    assert contrastive[2.0]["long_tail_share"] > result["baseline"]["long_tail_share"]
    assert contrastive[2.0]["novelty@10"] > result["baseline"]["novelty@10"]


def test_a_point_is_what_its_plan_does(run: Run, tmp_path: Path) -> None:
    settings = PopularitySettings(**{**vars(SMALL), "n_steered": SMALL.n_listed})
    result = measure(run, settings, tmp_path)
    for method, kind in (("popular_down", "popular"), ("long_tail_up", "unpopular")):
        curve = next(curve for curve in result["curves"] if curve["method"] == method)
        features = [one for one in result["features"] if one["kind"] == kind]
        assert curve["features"] == [one["feature"] for one in features]
        edits = [Edit(one["feature"], "add", 0.5 * (one["mean_unpopular"] - one["mean_popular"])) for one in features]
        metrics = evaluate_steered(
            run.model,
            run.split.test,
            run.sae,
            run.site,
            SteeringPlan(edits),
            popularity=run.popularity,
        )
        in_long_tail = popularity_deciles(run.popularity) >= 5
        assert curve["points"][0] == {"strength": 0.5, **exposure_figures(metrics, in_long_tail)}


def test_the_test_users_choose_nothing(run: Run, tmp_path: Path) -> None:
    """Half of them less changes what is measured, not the features or profiles."""
    whole = measure(run, SMALL, tmp_path)
    run = Run(run.folder, progress=False)
    test = run.split.test
    run.split = type(run.split)(**{**vars(run.split), "test": test.select_users(np.arange(test.n_users // 2))})
    half = measure(run, SMALL, tmp_path)
    assert half["features"] == whole["features"]
    assert half["profiles"] == whole["profiles"]
    assert half["baseline"] != whole["baseline"]
