"""The section on generated data: all that is promised, equal on a second run, honest about what was chosen where."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score
from small_run import SAE, small_run

from saerec_fast.interpret import FeatureStatistics
from saerec_fast.pipeline import Run
from saerec_fast.recommender import iterate_hidden
from saerec_fast.study import interpretability
from saerec_fast.study.interpretability import InterpretabilitySettings, measure, precision_recall

SETTINGS = InterpretabilitySettings(ica_rows=500, probe_rows=800, seed_steps=60, more_seeds=2, minimum_items=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_run(tmp_path_factory.mktemp("study"), "embedding")


@pytest.fixture(scope="module")
def measured(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("section")
    return folder, measure(run, SETTINGS, folder)


@pytest.fixture(scope="module")
def rows_of_test_users(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Dense activations of the test users ``(rows, n)`` and which attributes their items have ``(rows, A)``."""
    table, names = run.split.test.item_table, run.result("data")["attributes"]
    dense, items = [], []
    for hidden, _, item in iterate_hidden(run.model, run.split.test, run.site):
        with torch.inference_mode():
            dense.append(run.sae.encode(hidden).dense().numpy())
        items.append(item.numpy())
    columns = [table.attribute_names.index(name) for name in names]
    return np.concatenate(dense), table.attributes[np.concatenate(items)][:, columns]


def by_name(result: dict) -> dict:
    return {one["name"]: one for one in result["representations"]}


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)
    elif isinstance(value, int | float):
        yield value


def test_plain_json_and_the_same_on_a_second_run(run: Run, measured: tuple[Path, dict], tmp_path: Path) -> None:
    result = measured[1]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert all(math.isfinite(number) for number in numbers(result))
    assert measure(Run(run.folder, progress=False), SETTINGS, tmp_path) == result


def test_what_is_there_is_kept(
    run: Run, measured: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(measured[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "features.json").unlink()

    def fail(*arguments: object) -> None:
        raise AssertionError("computed again")

    for part in ("_representations", "_monosemanticity", "_stability"):
        monkeypatch.setattr(interpretability, part, fail)
    assert measure(run, SETTINGS, tmp_path) == measured[1]


def test_every_representation_is_measured_on_the_same_attributes(measured: tuple[Path, dict]) -> None:
    found = by_name(measured[1])
    assert list(found) == ["sae", "raw_signed", "raw_absolute", "pca", "ica", "random", "probe"]
    shares = [[(one["attribute"], one["share"]) for one in each["attributes"]] for each in found.values()]
    assert all(one == shares[0] for one in shares)
    for each in found.values():
        for statistic in ("correlation", "roc_auc"):
            value, low, high = each[statistic]
            assert low <= value <= high
            values = [one[statistic][0] for one in each["attributes"]]
            assert value == pytest.approx(np.mean(values))
            assert each[f"{statistic}_elsewhere"] <= value + 1e-12
    assert all(one["feature"] is None for one in found["probe"]["attributes"])
    assert all(one["feature"] is not None for one in found["pca"]["attributes"])


def test_the_probe_is_the_ceiling_and_signs_cost(measured: tuple[Path, dict]) -> None:
    found = {name: one["correlation"][0] for name, one in by_name(measured[1]).items()}
    assert found["probe"] > max(value for name, value in found.items() if name != "probe")
    assert found["raw_signed"] <= found["raw_absolute"]
    aucs = {name: one["roc_auc"][0] for name, one in by_name(measured[1]).items()}
    assert aucs["probe"] > max(value for name, value in aucs.items() if name != "probe")


def test_the_sae_row_is_what_the_pipeline_found(run: Run, measured: tuple[Path, dict]) -> None:
    summaries = run.result("interpretation")["summaries"]
    found = by_name(measured[1])
    for name, expected in (("sae", "sae"), ("raw_absolute", "raw")):
        assert found[name]["correlation"][0] == summaries[expected]["mean_max_correlation"]
        assert found[name]["correlation_elsewhere"] == summaries[f"{expected}_elsewhere"]["mean_max_correlation"]
        assert found[name]["roc_auc_elsewhere"] == summaries[f"{expected}_elsewhere"]["mean_max_roc_auc"]


def test_features_against_scikit_learn(
    run: Run, measured: tuple[Path, dict], rows_of_test_users: tuple[np.ndarray, np.ndarray]
) -> None:
    dense, labels = rows_of_test_users
    names = run.result("data")["attributes"]
    assert measured[1]["features"]
    for one in measured[1]["features"]:
        label, score = labels[:, names.index(one["attribute"])], dense[:, one["feature"]]
        predicted = score > one["threshold"]
        assert one["recall"] == pytest.approx(recall_score(label, predicted))
        assert one["f1"] == pytest.approx(f1_score(label, predicted, zero_division=0))
        if predicted.any():
            assert one["precision"] == pytest.approx(precision_score(label, predicted))
        else:
            assert one["precision"] is None
        assert one["roc_auc"] == pytest.approx(roc_auc_score(label, score))


def test_features_and_thresholds_are_chosen_on_the_users_of_the_sae(run: Run, measured: tuple[Path, dict]) -> None:
    train = run.interpretation.statistics["sae_train"]
    for attribute in {one["attribute"] for one in measured[1]["features"]}:
        rows = [one for one in measured[1]["features"] if one["attribute"] == attribute]
        chosen = train.top_features(attribute, SETTINGS.features_per_attribute)
        assert list(dict.fromkeys(one["feature"] for one in rows)) == chosen
        for feature in chosen:
            present, absent = train.activations(feature, attribute)
            best = next(one for one in rows if one["feature"] == feature and one["rule"] == "best_f1")["threshold"]
            reached = precision_recall(present, absent, best)["f1"]
            others = [precision_recall(present, absent, float(t))["f1"] for t in np.concatenate([present, absent])]
            assert reached == pytest.approx(max(others))


def test_precision_and_recall_by_hand() -> None:
    present, absent = np.array([0.0, 1.0, 2.0, 2.0]), np.array([0.0, 0.0, 2.0])
    assert precision_recall(present, absent, 0.0) == {"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4}
    assert precision_recall(present, absent, 1.0) == {"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7}
    assert precision_recall(present, absent, 2.0) == {"precision": None, "recall": 0.0, "f1": 0.0}


def test_distributions_hold_every_row(
    measured: tuple[Path, dict], rows_of_test_users: tuple[np.ndarray, np.ndarray]
) -> None:
    assert measured[1]["distributions"]
    for one in measured[1]["distributions"]:
        widths = np.diff(one["edges"])
        for part in ("present", "absent"):
            assert (one[part] * widths).sum() + one[f"silent_{part}"] == pytest.approx(1)
    first = measured[1]["distributions"][0]
    dense, _ = rows_of_test_users
    fired = dense[:, first["feature"]]
    assert first["edges"][-1] == pytest.approx(np.quantile(fired[fired > 0], 0.995))


def test_the_heat_map_is_the_correlation_on_test_users(
    run: Run, measured: tuple[Path, dict], rows_of_test_users: tuple[np.ndarray, np.ndarray]
) -> None:
    heatmap, names = measured[1]["heatmap"], run.result("data")["attributes"]
    dense, labels = rows_of_test_users
    assert len(set(heatmap["features"])) == len(heatmap["features"])
    for attribute, row in zip(heatmap["attributes"], heatmap["correlation"], strict=True):
        for feature, value in zip(heatmap["features"], row, strict=True):
            label, score = labels[:, names.index(attribute)], dense[:, feature].astype(float)
            expected = np.corrcoef(score, label)[0, 1] if np.ptp(score) else 0
            assert value == pytest.approx(expected, abs=1e-9)


def test_entropies_are_there_for_all_three(run: Run, measured: tuple[Path, dict]) -> None:
    found = measured[1]["monosemanticity"]
    assert "20 distinct items" in found["explain"]
    for name, n_features in (("sae", SAE.n_features), ("raw", 2 * run.sae.d_model), ("random", SAE.n_features)):
        one = found[name]
        assert one["features"] + one["left_out"] == n_features
        assert sum(one["histogram"]["counts"]) == one["features"]
        assert 0 < one["mean_entropy_bits"] <= math.log2(4)
        assert SETTINGS.top_items <= one["distinct_items"] <= run.split.n_items
    # The tastes of generated users show in random directions less than in features that were learned.
    assert found["random"]["left_out"] == 0
    assert found["sae"]["normalised"] < found["random"]["normalised"]


def test_stability_beats_chance(measured: tuple[Path, dict]) -> None:
    found = measured[1]["stability"]
    assert found["seeds"] == [1, 2]
    assert [one["seed"] for one in found["of_seeds"]] == [1, 2]
    assert found["steps"] == 60
    assert found["random_baseline"]["mean_matched_cosine"] < found["mean_matched_cosine"] < 1
    assert found["mean_matched_cosine"] <= found["mean_nearest_cosine"]
    assert all(-1 <= one["cosine"] <= 1 for one in found["of_attribute_features"])
    assert (measured[0] / "seed-1").is_dir()


def test_an_sae_of_the_same_seed_and_steps_is_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared is the run's SAE: trained again as it was, every feature finds itself."""
    again = InterpretabilitySettings(more_seeds=1)
    monkeypatch.setattr(interpretability, "replace", lambda config, **changes: config)
    found = interpretability._stability(run, again, tmp_path)
    assert found is not None
    assert found["mean_matched_cosine"] == pytest.approx(1)
    for one in found["of_attribute_features"]:
        assert one["matched_correlation"] == pytest.approx(one["correlation"])


def test_without_more_seeds_there_is_no_stability(run: Run, measured: tuple[Path, dict], tmp_path: Path) -> None:
    for part in ("representations", "features", "monosemanticity"):
        shutil.copy(measured[0] / f"{part}.json", tmp_path)
    assert measure(run, InterpretabilitySettings(more_seeds=0), tmp_path)["stability"] is None


def test_one_pass_in_batches_equals_all_rows_at_once(run: Run) -> None:
    """Of dense readings, whose statistics the section streams; those of SAE features have tests of their own."""
    attributes, names = run.attributes
    batches = list(iterate_hidden(run.model, run.split.test, run.site, batch_size=3))
    assert len(batches) > 5
    linear = interpretability.random_directions(20, np.zeros(run.sae.d_model))
    streamed = interpretability._linear_statistics(run, linear, iter(batches), signed=True)
    whole = FeatureStatistics(20, attributes, names)
    hidden, users, items = (torch.cat([batch[part] for batch in batches]) for part in range(3))
    whole.update_dense(linear(hidden), items, users)
    expected = whole.result()
    np.testing.assert_allclose(streamed.correlation, expected.correlation, atol=1e-12)
    np.testing.assert_allclose(streamed.roc_auc, expected.roc_auc, atol=1e-12)


def test_a_quick_study_does_less() -> None:
    quick, full = InterpretabilitySettings.quick(), InterpretabilitySettings()
    assert quick.more_seeds < full.more_seeds
    assert quick.probe_rows < full.probe_rows
