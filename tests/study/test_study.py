"""The whole study on generated data: every section, the page, the tables and figures, resuming, the command."""

from __future__ import annotations

import csv
import html
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from small_run import RECOMMENDER, SAE
from typer.testing import CliRunner

from saerec_fast.cli import app
from saerec_fast.data import synthetic_dataset
from saerec_fast.files import read_json
from saerec_fast.pipeline import ActivationSettings, DataSettings, Run
from saerec_fast.study import settings as settings_module
from saerec_fast.study import study as study_module
from saerec_fast.study.settings import SECTIONS, StudySettings, study_settings
from saerec_fast.study.study import run_study


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study-data") / "set"
    synthetic_dataset(160, 70, 4, seed=0, mean_length=30).save(folder)
    return folder


def small(data: Path) -> StudySettings:
    chosen = study_settings(str(data), quick=True)
    sections = dict(chosen.sections)
    sections["sweep"] = replace(
        sections["sweep"],
        base=replace(SAE, steps=20),
        n_features=(16, 48),
        grid=(("topk", (2, 6)),),
        line=(("gated", (0.5,)),),
    )
    activations = ActivationSettings("block.0", "non_test")
    return StudySettings(DataSettings(str(data)), RECOMMENDER, activations, SAE, sections)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("study-run") / "run"
    return folder, run_study(Run(folder, progress=False), small(data), command="saerec study --quick")


def test_every_section_is_there_and_plain_json(finished: tuple[Path, dict]) -> None:
    folder, result = finished
    assert read_json(folder / "study.json") == json.loads(json.dumps(result, allow_nan=False))
    assert set(SECTIONS) - {"browser"} <= set(result)
    for name in SECTIONS:
        assert (folder / "study" / name / "result.json").exists()
        assert result["seconds"][f"study/{name}"] > 0
    assert {goal["goal"] for goal in result["goals"]} >= {"Features follow attributes"}


def test_the_page_holds_what_was_found_and_fetches_nothing(finished: tuple[Path, dict]) -> None:
    folder, result = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    for goal in result["goals"]:
        assert html.escape(goal["goal"]).replace("&#x27;", "&#39;") in page
    assert "saerec study --quick" in page
    assert all(marker not in page for marker in ('src="http', 'href="http', "@import", "url(http"))


def test_tables_and_figures_are_files_of_their_own(finished: tuple[Path, dict]) -> None:
    folder, result = finished
    tables = {path.stem: path for path in (folder / "tables").glob("*.csv")}
    assert len(tables) >= 10
    for path in tables.values():
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) >= 2, path
        assert {len(row) for row in rows} == {len(rows[0])}, path
    with tables["sweep"].open(encoding="utf-8", newline="") as file:
        found = [(row["site"], float(row["explained_variance"])) for row in csv.DictReader(file)]
    assert sorted(found) == sorted((point["site"], point["explained_variance"]) for point in result["sweep"]["points"])
    figures = list((folder / "figures").glob("*.svg"))
    assert len(figures) >= 8
    for path in figures:
        ElementTree.fromstring(path.read_text(encoding="utf-8"))


def test_a_second_run_reuses_everything_and_another_folder_finds_the_same(
    finished: tuple[Path, dict], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = finished
    again = Run(folder, progress=False)
    page = (folder / "report.html").read_bytes()
    assert run_study(again, small(data), command="saerec study --quick") == result
    assert all(time.reused for time in again.times)
    assert (folder / "report.html").read_bytes() == page


def test_a_section_whose_settings_changed_runs_alone(finished: tuple[Path, dict], data: Path) -> None:
    folder, _ = finished
    chosen = small(data)
    changed = replace(chosen.sections["cases"], seed=chosen.sections["cases"].seed + 1)
    run = Run(folder, progress=False)
    run_study(run, replace(chosen, sections={**chosen.sections, "cases": changed}))
    assert [time.step for time in run.times if not time.reused] == ["study/cases"]


def test_files_of_an_earlier_study_go(finished: tuple[Path, dict], data: Path) -> None:
    folder, _ = finished
    left = folder / "tables" / "left.csv", folder / "figures" / "left.svg"
    for path in left:
        path.write_text("of an earlier study")
    run_study(Run(folder, progress=False), small(data))
    assert not any(path.exists() for path in left)
    assert len(list((folder / "figures").glob("*.svg"))) >= 8


def test_data_without_attributes_are_refused_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    chosen = small(data)
    settings = replace(chosen, data=replace(chosen.data, min_attribute_share=1.0))
    run = Run(tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="no attribute is common enough"):
        run_study(run, settings)
    assert not (run.folder / "recommender").exists()


def test_the_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = small(data)
    few = {name: chosen.sections[name] for name in ("sweep", "cases")}
    monkeypatch.setattr(settings_module, "study_settings", lambda path, quick, seed: replace(chosen, sections=few))
    answer = CliRunner().invoke(
        app, ["study", "--data", str(data), "--run", str(tmp_path / "run"), "--quick", "--quiet"]
    )
    assert answer.exit_code == 0, answer.output
    assert "Features follow" in answer.output
    assert "study/sweep" in answer.output
    assert (tmp_path / "run" / "report.html").exists()
    assert "popularity" not in read_json(tmp_path / "run" / "study.json")


@pytest.mark.parametrize("quick", [False, True])
def test_settings_follow_the_size_of_the_data(data: Path, quick: bool) -> None:
    chosen = study_settings(str(data), quick=quick, seed=3)
    assert chosen.activations.site == "embedding"
    assert chosen.recommender.seed == chosen.sae.seed == chosen.data.seed == 3
    assert set(chosen.sections) == set(SECTIONS) == set(study_module.SECTIONS)
    assert (chosen.sae.steps <= 1000) is quick
