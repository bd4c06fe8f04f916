"""The whole path on generated data: every step, its reuse, its replacement, the command line and the report."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from small_run import RECOMMENDER, SAE
from typer.testing import CliRunner

from saerec_fast import demo as demo_module
from saerec_fast.cli import app
from saerec_fast.data import synthetic_dataset
from saerec_fast.demo import run_demo
from saerec_fast.files import read_json
from saerec_fast.interpret import FeatureStatisticsResult
from saerec_fast.pipeline import STEPS, ActivationSettings, ControlSettings, DataSettings, RecommenderSettings, Run
from saerec_fast.sae import SAETrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    synthetic_dataset(120, 60, 4, seed=0, mean_length=25).save(path)
    return path


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A demo run with settings small enough for a test."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "recommender_settings", lambda small, seed: RECOMMENDER)
        patch.setattr(demo_module, "sae_settings", lambda small, seed: SAE)
        metrics = run_demo(str(data), Run(folder, progress=False))
    return folder, metrics


@pytest.fixture
def copy(finished: tuple[Path, dict], tmp_path: Path) -> Path:
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_metrics_hold_what_is_promised(finished: tuple[Path, dict]) -> None:
    metrics = read_json(finished[0] / "metrics.json")
    assert {"ndcg@10", "hit_rate@10"} <= metrics["recommender"].keys()
    for baseline in ("recent_item_knn", "item_knn", "popularity"):
        lead, low, high = metrics["leads"][baseline]
        assert lead == pytest.approx(metrics["recommender"]["ndcg@10"] - metrics[baseline]["ndcg@10"])
        assert low <= lead <= high
    assert metrics["recent_item_knn"] != metrics["item_knn"]
    assert {"explained_variance", "l0", "dead_fraction"} <= metrics["sae"].keys()
    assert "ndcg@10" in metrics["reconstruction"]
    for kind in ("sae", "raw"):
        assert {"mean_max_correlation", "mean_max_roc_auc"} <= metrics["interpretability"][kind].keys()
    keys = {"attribute", "feature", "mode", "positions", "value", "share", "ndcg@10"}
    assert metrics["control"]
    assert all(keys <= point.keys() for point in metrics["control"])
    assert metrics["sae"]["l0"] <= SAE.k
    assert 0 < metrics["sae"]["explained_variance"] <= 1
    assert all(0 <= point["share"] <= 1 for point in metrics["control"])


def test_a_feature_turned_up_raises_its_attributes_share(finished: tuple[Path, dict]) -> None:
    """Of the attribute that has the best feature: this little data teaches a feature for one or two of them."""
    attribute, untouched = next(iter(finished[1]["control_baseline"].items()))
    points = [one for one in finished[1]["control"] if one["attribute"] == attribute]
    for way in (("set", "reconstruct", "all"), ("add", "delta", "all")):
        shares = [one["share"] for one in points if (one["op"], one["mode"], one["positions"]) == way]
        assert shares[-1] > max(shares[0], untouched["share"])


def test_the_report_stands_alone(finished: tuple[Path, dict]) -> None:
    loaded: list[str | None] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            loaded.extend(value for name, value in attributes if name in ("src", "srcset") or tag == "link")

    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    Links().feed(page)
    assert not loaded
    assert page.count("<svg") >= 4
    for name in ("Transformer", "Recency-weighted item-kNN", "Item-kNN", "Popularity"):
        assert f'<th scope="row">{name}</th>' in page


def test_a_second_run_reuses_every_step(copy: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "recommender_settings", lambda small, seed: RECOMMENDER)
    monkeypatch.setattr(demo_module, "sae_settings", lambda small, seed: SAE)
    before = read_json(copy / "metrics.json")
    run = Run(copy, progress=False)
    again = run_demo(str(data), run)
    assert [(one.step, one.reused) for one in run.times] == [(step, True) for step in STEPS]
    for key in ("recommender", "sae", "control", "interpretability"):
        assert again[key] == before[key]


def test_changed_settings_replace_a_step_and_those_after_it(copy: Path) -> None:
    run = Run(copy, progress=False)
    old = run.sae.W_dec.clone()
    smaller = SAETrainingConfig(n_features=32, activation="topk", k=4, steps=20, batch_size=256)
    run.train_sae(smaller)
    assert run.sae.n_features == 32
    assert old.shape[0] == SAE.n_features
    run.interpret()
    assert not run.times[-1].reused
    assert run.saved_statistics("sae").n_features == 32


def test_another_site_is_what_the_steps_after_it_use(copy: Path) -> None:
    run = Run(copy, progress=False)
    assert run.site == "embedding"
    run.collect_activations(ActivationSettings("block.0", "non_test"))
    assert run.site == "block.0"


def test_a_step_that_was_cut_off_is_run_again(copy: Path) -> None:
    (copy / "interpretation" / "result.json").unlink()
    run = Run(copy, progress=False)
    with pytest.raises(FileNotFoundError, match="saerec interpret"):
        run.control(ControlSettings())
    run.interpret()
    assert not run.times[-1].reused


def test_steps_name_the_one_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="saerec train"):
        Run(tmp_path / "nothing").train_recommender(RECOMMENDER)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, data: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not made by saerec"):
        Run(tmp_path).prepare_data(DataSettings(str(data)))
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"


def test_unknown_users_of_the_sae_are_an_error(copy: Path) -> None:
    with pytest.raises(ValueError, match="train_sae"):
        Run(copy).collect_activations(ActivationSettings(users="everyone"))


def test_an_empty_plan_changes_no_recommendation(copy: Path) -> None:
    run = Run(copy)
    plan = run.plan([], "delta", "all")
    before, after = run.before_and_after(plan, np.array([1, 2, 3]))
    assert before == after
    assert not set(before) & {1, 2, 3}


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_recommend_shows_titles_before_and_after(copy: Path) -> None:
    run = Run(copy)
    titles = run.split.test.item_table.titles
    attribute = run.steerable_attributes(1)[0]
    output = invoke("recommend", "--run", copy, "--history", f"{titles[0]}; {titles[1]}", "--steer", f"{attribute}=+50")
    assert "before" in output
    rows = [line for line in output.splitlines() if "Item" in line]
    assert len(rows) == 10
    assert any(len(set(line.replace("│", "|").split("|")[2:4])) == 2 for line in rows)


def test_each_command_works_on_the_artefacts_of_the_one_before(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert "transformer" in invoke(
        "train", "--data", data, "--run", folder, "--epochs", 1, "--d-model", 16, "--max-length", 20, "--quiet"
    )
    assert "explained variance" in invoke(
        "sae", "--run", folder, "--features", 32, "--activation", "topk", "--k", 4, "--steps", 20, "--quiet"
    )
    assert "mean-max correlation" in invoke("interpret", "--run", folder, "--quiet")
    attribute = Run(folder).steerable_attributes(1)[0]
    output = invoke("steer", "--run", folder, "--attribute", attribute, "--multiples", "0,1", "--quiet")
    rows = [line for line in output.splitlines() if line.count("│") == 6]
    assert len(rows) == 1 + 3 * 2
    assert sum("reconstruct, last" in row for row in rows) == 2
    assert sorted(p.name for p in folder.iterdir()) == sorted(STEPS)


def test_compare_holds_out_every_user_but_the_test_users(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = RecommenderSettings(d_model=16, n_heads=1, max_length=20, epochs=1)
    monkeypatch.setattr(demo_module, "recommender_settings", lambda small_data, seed: small)
    output = invoke("compare", "--data", data, "--out", tmp_path / "out", "--folds", 2, "--targets", 3, "--quiet")
    assert "recency-weighted" in output
    result = read_json(tmp_path / "out" / "comparison.json")
    run = Run(tmp_path / "run")
    run.prepare_data(demo_module.data_settings(str(data), True, 0))
    assert result["n_users"] == run.split.non_test.n_users
    assert result["ndcg"].keys() == {"transformer", "recent_item_knn", "item_knn", "popularity"}
    assert result["leads"].keys() == {"recent_item_knn", "item_knn", "popularity"}
    assert result["targets_per_user"] == 3


def test_data_show_lists_counts_and_shares(data: Path) -> None:
    output = invoke("data", "show", data)
    assert "120" in output
    assert "attribute 0" in output


@pytest.mark.parametrize("command", ["demo", "compare", "data", "train", "sae", "interpret", "steer", "recommend"])
def test_every_command_explains_itself(command: str) -> None:
    assert "--help" in invoke(command, "--help")


def test_metrics_are_plain_json(finished: tuple[Path, dict]) -> None:
    def numbers(value: object) -> Iterator[float]:
        if isinstance(value, dict):
            for one in value.values():
                yield from numbers(one)
        elif isinstance(value, list):
            for one in value:
                yield from numbers(one)
        elif isinstance(value, float):
            yield value

    parsed = json.loads((finished[0] / "metrics.json").read_text())
    assert all(math.isfinite(number) for number in numbers(parsed))


def test_an_attribute_that_no_feature_follows_is_not_steered(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(copy, progress=False)
    saved = run.saved_statistics

    def without_first(name: str) -> FeatureStatisticsResult:
        statistics = saved(name)
        statistics.correlation[:, 0] = np.nan
        return statistics

    monkeypatch.setattr(run, "saved_statistics", without_first)
    missing = saved("sae_train").attribute_names[0]
    chosen = run.steerable_attributes(10)
    assert chosen
    assert missing not in chosen
    with pytest.raises(ValueError, match="no feature follows it"):
        run.feature_of(missing)
