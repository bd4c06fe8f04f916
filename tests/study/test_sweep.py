"""The sweep: the same figures as the SAE's own step, going on where it was cut off, whatever the number of threads."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import SAE

from saerec_fast.pipeline import Run
from saerec_fast.study import sweep
from saerec_fast.study.sweep import SweepSettings, measure, trials

SETTINGS = SweepSettings(
    replace(SAE, steps=20), n_features=(16, 48), grid=(("topk", (2, 6)),), line=(("relu", (0.5,)),), sites=True
)


def without_seconds(result: dict) -> dict:
    points = [{key: value for key, value in point.items() if key != "seconds"} for point in result["points"]]
    return {**result, "points": points}


def test_trials_are_the_grid_the_line_and_every_site_once(run: Run) -> None:
    chosen = trials(SETTINGS, run)
    assert [(trial.site, trial.config.activation, trial.config.n_features) for trial in chosen] == [
        ("block.0", "topk", 16),
        ("block.0", "topk", 16),
        ("block.0", "topk", 48),
        ("block.0", "topk", 48),
        ("block.0", "relu", 48),
        *((site, "topk", 48) for site in ("embedding", "mlp.0", "mlp.1", "block.1", "last")),
    ]
    assert len({trial.name for trial in chosen}) == len(chosen)
    assert chosen[4].config.l1_coefficient == 0.5
    assert {trial.config.k for trial in chosen[:4]} == {2, 6}
    assert len(trials(replace(SETTINGS, sites=False), run)) == 5


def test_the_runs_own_sae_is_measured_as_the_run_measures_it(run: Run) -> None:
    settings = SweepSettings(SAE, n_features=(48,), grid=(("topk", (6,)),), line=(), sites=False)
    result = measure(run, settings, run.folder / "study" / "sweep")
    (point,) = result["points"]
    quality, summaries = run.result("sae"), run.result("interpretation")["summaries"]
    for name in ("explained_variance", "l0", "dead_fraction", "mae", "rmse"):
        assert point[name] == pytest.approx(quality[name], rel=1e-6)
    assert point["ndcg@10"] == quality["reconstruction"]["ndcg@10"]
    assert point["correlation"][0] == pytest.approx(summaries["sae"]["mean_max_correlation"], rel=1e-6)
    assert point["correlation"][1:] == pytest.approx(summaries["sae"]["mean_max_correlation_interval"], rel=1e-6)
    assert point["roc_auc"][0] == pytest.approx(summaries["sae"]["mean_max_roc_auc"], rel=1e-6)
    assert point["correlation_elsewhere"] == pytest.approx(summaries["sae_elsewhere"]["mean_max_correlation"], rel=1e-6)
    raw = result["raw"]["block.0"]
    assert raw["correlation"][0] == pytest.approx(summaries["raw"]["mean_max_correlation"], rel=1e-6)
    assert result["original_ndcg@10"] == run.result("recommender")["transformer"]["ndcg@10"]


def test_a_sweep_that_was_cut_off_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.folder / "study" / "sweep"
    settings = replace(SETTINGS, sites=False)
    trained: list[str] = []
    run_trial = sweep._run_trial

    def stop_after_two(*arguments: object) -> dict:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(arguments[-1].name)  # type: ignore[attr-defined]
        return run_trial(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "_run_trial", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        measure(run, settings, folder)
    monkeypatch.setattr(sweep, "_run_trial", lambda *rest: trained.append(rest[-1].name) or run_trial(*rest))
    result = measure(run, settings, folder)
    assert sorted(trained) == sorted(point["name"] for point in result["points"])
    assert len(trained) == len(set(trained)) == 5
    assert json.loads(json.dumps(result)) == result


def test_processes_give_the_same_figures_as_one_alone(run: Run) -> None:
    settings = replace(SETTINGS, sites=False)
    alone = measure(run, settings, run.folder / "alone")
    torch.set_num_threads(2)
    try:
        together = measure(run, settings, run.folder / "together")
    finally:
        torch.set_num_threads(1)
    assert without_seconds(together) == without_seconds(alone)


def test_sparser_saes_explain_less(run: Run) -> None:
    settings = SweepSettings(SAE, n_features=(48,), grid=(("topk", (1, 12)),), line=(), sites=False)
    few, many = measure(run, settings, run.folder / "study" / "sweep")["points"]
    assert few["l0"] == 1.0
    assert 11 < many["l0"] <= 12  # a score below 0 among the 12 is no activation
    assert few["explained_variance"] < many["explained_variance"]
    assert np.isfinite([few["correlation"][0], many["correlation"][0]]).all()
