from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saerec_fast.data import Dataset, ItemTable
from saerec_fast.interpret.control import evaluate_steered
from saerec_fast.pipeline import Run
from saerec_fast.recommender import iterate_hidden
from saerec_fast.study.cases import CaseSettings, choose_users, measure, rank_of
from saerec_fast.types import Edit, SteeringPlan

SMALL = CaseSettings(n_users=3, least_history=4, n_features=3, n_reasons=2, n_sample=20)


def test_ranks_count_ties_by_index_and_leave_seen_items_out() -> None:
    scores = np.array([2.0, 5.0, 2.0, -np.inf, 1.0])
    assert [rank_of(scores, item) for item in range(5)] == [2, 1, 3, None, 4]


def dataset_of(histories: list[list[int]], n_items: int) -> Dataset:
    return Dataset(
        name="by hand",
        user_ids=np.array([f"user {i}" for i in range(len(histories))]),
        offsets=np.concatenate([[0], np.cumsum([len(one) for one in histories])]),
        items=np.concatenate(histories),
        timestamps=None,
        item_table=ItemTable(
            np.array([str(i) for i in range(n_items)]),
            [str(i) for i in range(n_items)],
            [],
            np.empty((n_items, 0), bool),
        ),
    )


def test_users_spread_over_length_and_dominant_attribute() -> None:
    # Items 0 to 9 have the first attribute, 10 to 19 the second; the last item of a history does not count.
    attributes = np.zeros((20, 2), dtype=bool)
    attributes[:10, 0] = attributes[10:, 1] = True
    histories = [[0, 1, 2, 3, 10], [1, 2, 3, 4, 11], [4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 0], [0, 1]]
    dataset = dataset_of(histories, 20)
    settings = CaseSettings(n_users=2, least_history=4)
    for seed in range(6):
        chosen = choose_users(
            dataset, attributes, np.array([0.5, 0.5]), CaseSettings(**{**vars(settings), "seed": seed})
        )
        assert chosen[0][0] in (0, 1)
        assert chosen[0][1] == 0
        assert chosen[1] == (3, 1)
    drawn = {choose_users(dataset, attributes, np.ones(2), CaseSettings(2, 4, seed=seed))[0][0] for seed in range(6)}
    assert drawn == {0, 1}


def test_dominant_is_against_what_all_users_read() -> None:
    attributes = np.zeros((10, 3), dtype=bool)
    attributes[:, 0] = True
    attributes[:3, 1] = True
    attributes[:2, 2] = True
    dataset = dataset_of([[0, 1, 2, 3, 4, 5]], 10)
    settings = CaseSettings(n_users=1, least_history=4)
    # The third has the largest multiple, but only two items; the first is everywhere.
    assert choose_users(dataset, attributes, np.array([0.9, 0.1, 0.01]), settings) == [(0, 1)]
    assert choose_users(dataset, np.zeros((10, 3), bool), np.ones(3), settings) == [(0, None)]


def test_the_section(run: Run, tmp_path: Path) -> None:
    result = measure(run, SMALL, tmp_path)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert measure(Run(run.folder, progress=False), SMALL, tmp_path) == result

    test = run.split.test
    table = test.item_table
    assert len(result["users"]) == 3
    assert [one["history_length"] for one in result["users"]] == sorted(
        one["history_length"] for one in result["users"]
    )
    for one in result["users"]:
        user = test.user_ids.tolist().index(one["user"])
        history, target = test.sequence(user)[:-1], int(test.sequence(user)[-1])
        read = history[-run.model.config.max_length :]
        assert one["history"] == [table.titles[item] for item in read]
        assert one["history_length"] == len(history)
        assert one["target"] == table.titles[target]

        steered = one["steered"]
        plan = SteeringPlan([Edit(steered["feature"], "add", steered["value"])])
        before, after = run.before_and_after(plan, history)
        for listed, expected, rank in (("before", before, "target_rank_before"), ("after", after, "target_rank_after")):
            assert [item["title"] for item in one[listed]] == [table.titles[item] for item in expected]
            scores = [item["score"] for item in one[listed]]
            assert scores == sorted(scores, reverse=True)
            if target in expected:
                assert one[rank] == expected.index(target) + 1
            else:
                assert one[rank] is None or one[rank] > 10
            for item in one[listed]:
                assert item["marked"] == (steered["attribute"] in item["attributes"])


def test_features_are_those_that_fired_and_the_titles_where_they_did(run: Run, tmp_path: Path) -> None:
    result = measure(run, SMALL, tmp_path)
    test = run.split.test
    for one in result["users"]:
        user = test.user_ids.tolist().index(one["user"])
        history = test.sequence(user)[:-1][-run.model.config.max_length :]
        alone = dataset_of([history.tolist()], test.n_items)
        hidden = next(iterate_hidden(run.model, alone, run.site))[0]
        with torch.inference_mode():
            dense = run.sae.encode(hidden).dense().numpy()
        at_last = [shown for shown in one["features"] if shown["at_last"]]
        assert [shown["feature"] for shown in at_last] == np.argsort(-dense[-1], kind="stable")[:3].tolist()
        assert len({shown["feature"] for shown in one["features"]}) == len(one["features"])
        for shown in one["features"]:
            column = dense[:, shown["feature"]]
            assert shown["activation"] == pytest.approx(column[-1])
            assert shown["history_activation"] == pytest.approx(column.mean())
            assert shown["fired_share"] == (column > 0).mean() > 0
            strongest = int(column.argmax())
            assert shown["why"][0] == test.item_table.titles[history[strongest]]
            assert len(shown["why"]) == min(2, int((column > 0).sum()))


def test_plans_are_calibrated_on_the_users_of_the_sae(run: Run, tmp_path: Path) -> None:
    everyone = run.sae_users.n_users
    settings = CaseSettings(**{**vars(SMALL), "n_sample": everyone, "added_share": 0.1})
    result = measure(run, settings, tmp_path)
    calibrated = [one["steered"] for one in result["users"] if one["steered"]["calibrated"]]
    assert calibrated
    table = run.split.test.item_table
    for one in calibrated:
        marked = table.attributes[:, table.attribute_names.index(one["attribute"])]
        shares = []
        for value in (0.0, one["value"]):
            metrics = evaluate_steered(
                run.model,
                run.sae_users,
                run.sae,
                run.site,
                SteeringPlan([Edit(one["feature"], "add", value)]),
                popularity=run.popularity,
            )
            shares.append(marked[metrics.recommended].mean())
        assert shares[1] - shares[0] == pytest.approx(0.1, abs=0.02)


def test_a_share_out_of_reach_leaves_the_strong_plan(run: Run, tmp_path: Path) -> None:
    result = measure(run, CaseSettings(**{**vars(SMALL), "added_share": 1.0}), tmp_path)
    statistics = run.saved_statistics("sae_train")
    uncalibrated = [one["steered"] for one in result["users"] if not one["steered"]["calibrated"]]
    assert uncalibrated
    for one in uncalibrated:
        assert one["value"] == float(statistics.quantiles[one["feature"], -1])


def test_without_an_attribute_to_steer_there_are_no_cases(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "steerable_attributes", lambda self, count: [])
    assert measure(run, SMALL, run.folder / "study" / "cases")["users"] == []
