from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from saerec_fast.interpret import FeatureStatisticsResult
from saerec_fast.interpret.control import valid_positions
from saerec_fast.pipeline import ActivationSettings, Run
from saerec_fast.recommender import iterate_hidden, site_module
from saerec_fast.sae import SAETrainingConfig
from saerec_fast.steering import attach
from saerec_fast.study.browser import (
    BrowserSettings,
    activation_histograms,
    followed_attributes,
    item_pushes,
    measure,
    nearest_features,
)
from saerec_fast.types import Edit, SteeringPlan


def test_nearest_by_hand() -> None:
    decoder = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]])
    rows, cosines = nearest_features(decoder, 2)
    half = 0.5**0.5
    assert rows.tolist() == [[1, 4], [0, 4], [4, 0], [2, 4], [0, 1]]
    np.testing.assert_allclose(cosines, [[1, half], [1, half], [half, 0], [0, -half], [half, half]], atol=1e-12)


def test_nearest_of_more_rows_than_a_block() -> None:
    decoder = torch.randn(1030, 6, generator=torch.Generator().manual_seed(0))
    rows, cosines = nearest_features(decoder, 3)
    unit = decoder.double() / decoder.double().norm(dim=1, keepdim=True)
    for row in (0, 1023, 1024, 1029):
        expected = unit @ unit[row]
        expected[row] = -2
        assert rows[row].tolist() == expected.topk(3).indices.tolist()
        np.testing.assert_allclose(cosines[row], expected.topk(3).values)


def test_fewer_rows_than_are_asked_for() -> None:
    assert [one.shape for one in nearest_features(torch.ones(2, 3), 5)] == [(2, 1), (2, 1)]
    assert [one.shape for one in nearest_features(torch.ones(1, 3), 5)] == [(1, 0), (1, 0)]


def test_attributes_are_named_from_a_least_correlation_on(run: Run) -> None:
    statistics = run.saved_statistics("sae_train")
    feature = run.feature_of("attribute 0")
    named = followed_attributes(statistics, feature, 4, -1.0)
    values = [statistics.correlation[feature, column] for column, _ in named]
    assert values == sorted(statistics.correlation[feature].tolist(), reverse=True)
    assert [name for _, name in named] == [statistics.attribute_names[column] for column, _ in named]
    assert followed_attributes(statistics, feature, 4, values[0]) == named[:1]
    assert followed_attributes(statistics, feature, 2, -1.0) == named[:2]


def test_histograms_count_every_activation(run: Run) -> None:
    statistics = run.saved_statistics("sae")
    counts = activation_histograms(run, statistics.maximum, 5)
    assert counts.sum(axis=1).tolist() == statistics.fired_counts.tolist()
    feature = int(statistics.fired_counts.argmax())
    values = []
    for hidden, _, _ in iterate_hidden(run.model, run.split.test, run.site):
        with torch.inference_mode():
            values.append(run.sae.encode(hidden).dense()[:, feature].double().numpy())
    fired = np.concatenate(values)
    expected, _ = np.histogram(fired[fired > 0], bins=5, range=(0, statistics.maximum[feature]))
    assert counts[feature].tolist() == expected.tolist()


def test_a_feature_without_a_maximum_has_no_bins(run: Run) -> None:
    maximum = run.saved_statistics("sae").maximum.copy()
    expected = activation_histograms(run, maximum, 5)
    feature = int(expected.sum(axis=1).argmax())
    maximum[feature] = expected[feature] = 0
    np.testing.assert_array_equal(activation_histograms(run, maximum, 5), expected)


def test_pushes_are_exact_at_the_last_site(run: Run) -> None:
    """Turning a feature of the last hidden state up by 2 adds twice the push to every score."""
    # An SAE has to have seen the site for its statistics, not for its decoder: any of the right width will do.
    tokens = torch.tensor([[3, 5, 7]])
    assert float(run.sae.std) != 1.0
    with torch.inference_mode():
        before = run.model.scores(run.model(tokens))[0, -1]
        plan = SteeringPlan([Edit(9, "add", 2.0)])
        with attach(run.model, site_module(run.model, "last"), run.sae, plan, valid=valid_positions):
            after = run.model.scores(run.model(tokens))[0, -1]
    np.testing.assert_allclose((after - before).numpy(), 2 * item_pushes(run, 9), rtol=1e-3, atol=1e-4)


def test_the_section(run: Run, tmp_path: Path) -> None:
    settings = BrowserSettings(n_top=3, n_pushed=2, n_nearest=2, n_bins=4)
    result = measure(run, settings, tmp_path)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert measure(Run(run.folder, progress=False), settings, tmp_path) == result
    assert result["site"] == "block.0"
    assert result["push_is_exact"] is False

    statistics, titles = run.saved_statistics("sae"), run.split.test.item_table.titles
    living = np.flatnonzero(statistics.firing_rate > 0).tolist()
    assert [card["feature"] for card in result["features"]] == living
    decoder = torch.nn.functional.normalize(run.sae.W_dec.detach(), dim=1)
    embeddings = run.model.item_embeddings.detach()
    for card in result["features"]:
        feature = card["feature"]
        assert sum(card["histogram"]["counts"]) == statistics.fired_counts[feature]
        assert len(card["histogram"]["edges"]) == 5
        assert card["firing_rate"] == pytest.approx(statistics.firing_rate[feature], rel=0.006)
        assert card["top"][0]["value"] == pytest.approx(statistics.maximum[feature], rel=0.006)
        assert len(card["top"]) <= 3
        push = (embeddings @ run.sae.W_dec.detach()[feature]) * run.sae.std
        assert card["up"][0]["title"] == titles[int(push.argmax())]
        assert card["down"][0]["title"] == titles[int(push.argmin())]
        assert card["up"][0]["push"] == pytest.approx(float(push.max()), rel=0.006)
        cosine = decoder @ decoder[feature]
        assert {one["feature"] for one in card["nearest"]} <= set(living) - {feature}
        for one in card["nearest"]:
            assert one["cosine"] == pytest.approx(float(cosine[one["feature"]]), rel=0.006)
        for one in card["attributes"]:
            column = statistics.attribute_index(one["name"])
            assert one["correlation"] == pytest.approx(statistics.correlation[feature, column], rel=0.006)


def test_pushes_of_the_last_site_say_that_they_are_exact(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    run = Run(tmp_path / "run", progress=False)
    run.collect_activations(ActivationSettings("last", "non_test"))
    run.train_sae(SAETrainingConfig(n_features=16, activation="relu", steps=20, batch_size=256))
    run.interpret()
    assert measure(run, BrowserSettings(), tmp_path)["push_is_exact"] is True


def test_an_attribute_that_no_test_user_met_is_not_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = run.saved_statistics

    def without_first(name: str) -> FeatureStatisticsResult:
        statistics = saved(name)
        if name == "sae":
            statistics.correlation[:, 0] = np.nan
        return statistics

    monkeypatch.setattr(run, "saved_statistics", without_first)
    cards = measure(run, BrowserSettings(), run.folder)["features"]
    named = [one["name"] for card in cards for one in card["attributes"]]
    assert named
    assert saved("sae").attribute_names[0] not in named
