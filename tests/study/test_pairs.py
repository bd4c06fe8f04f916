from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from saerec_fast.interpret.control import evaluate_steered
from saerec_fast.pipeline import Run
from saerec_fast.recommender.evaluation import ranking_metrics
from saerec_fast.study.pairs import PairSettings, choose_pairs, measure, pair_figures
from saerec_fast.types import Edit, SteeringPlan

SMALL = PairSettings(n_pairs=2, n_attributes=4, least_both=1, strengths=(0.5, 2.0))


def test_pairs_that_items_belong_to_come_first() -> None:
    column = {
        "a": np.array([1, 1, 0, 0], dtype=bool),
        "b": np.array([0, 0, 1, 1], dtype=bool),
        "c": np.array([0, 1, 1, 1], dtype=bool),
    }
    assert choose_pairs(["a", "b", "c"], column, 3, 1) == [("a", "c"), ("b", "c"), ("a", "b")]
    assert choose_pairs(["a", "b", "c"], column, 2, 0) == [("a", "b"), ("a", "c")]
    assert choose_pairs(["a", "b", "c"], column, 1, 2) == [("b", "c")]
    assert choose_pairs(["a"], column, 3, 1) == []


def test_figures_by_hand() -> None:
    lists = np.array([[0, 1], [2, -1]])
    metrics = ranking_metrics(lists, np.array([1, 0]), np.arange(2), popularity=np.full(3, 0.5))
    present = np.array([[True, True, False], [False, True, True]])
    figures = pair_figures(metrics, present)
    assert figures == {"shares": [2 / 3, 2 / 3], "both": 1 / 3, "ndcg@2": pytest.approx(0.5 / math.log2(3))}


def test_the_section(run: Run, tmp_path: Path) -> None:
    result = measure(run, SMALL, tmp_path)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert measure(Run(run.folder, progress=False), SMALL, tmp_path) == result
    assert len(result["pairs"]) >= 1

    table, statistics = run.split.test.item_table, run.saved_statistics("sae_train")
    for pair in result["pairs"]:
        assert len(set(pair["features"])) == 2
        present = table.attributes[:, [table.attribute_names.index(name) for name in pair["attributes"]]].T
        assert pair["items_with_both"] == sum(a and b for a, b in present.T)
        ways = [pair["features"], pair["features"][:1], pair["features"][1:]]
        curves = [pair["points"], *(one["points"] for one in pair["single"])]
        for features, points in zip(ways, curves, strict=True):
            plan = SteeringPlan([Edit(j, "add", 0.5 * float(statistics.quantiles[j, -1])) for j in features])
            metrics = evaluate_steered(run.model, run.split.test, run.sae, run.site, plan, popularity=run.popularity)
            assert [point["strength"] for point in points] == [0.5, 2.0]
            assert points[0] == {"strength": 0.5, **pair_figures(metrics, present)}
            assert all(point["both"] <= min(point["shares"]) for point in points)


def test_one_attribute_makes_no_pair(run: Run, tmp_path: Path) -> None:
    assert measure(run, PairSettings(n_attributes=1), tmp_path) == {"pairs": []}
