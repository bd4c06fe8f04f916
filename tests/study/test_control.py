"""The control section: fast evaluation against the plain one, arithmetic by hand, all of it on made-up data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import small_run

from saerec_fast.data import Split
from saerec_fast.files import read_json
from saerec_fast.interpret.control import evaluate_steered
from saerec_fast.pipeline import Run
from saerec_fast.recommender import SequenceRecommender, item_popularity
from saerec_fast.sae import SparseAutoencoder
from saerec_fast.study import control as control_module
from saerec_fast.study.control import (
    StudyControlSettings,
    _Point,
    compare_at_share,
    crossing,
    measure,
    ndcg_at_share,
    strengths_for,
    suppression,
)
from saerec_fast.study.control_methods import DOWN, REFERENCE, UP, Method, PlanMaker
from saerec_fast.study.doses import DosedLists
from saerec_fast.study.steered_ranking import SteeredRanking
from saerec_fast.types import Direction, Edit, ReLU, SteeringPlan, TopK

WIDTH = 16


def make_sae(activation: Any) -> SparseAutoencoder:
    return SparseAutoencoder(
        WIDTH, 40, activation, mean=0.1, std=1.3, generator=torch.Generator().manual_seed(2)
    ).eval()


DIRECTION = Direction(torch.linspace(-1, 1, WIDTH))
PLANS = {
    "empty": SteeringPlan(),
    "reconstruction": SteeringPlan(mode="reconstruct"),
    "set, reconstructed": SteeringPlan([Edit(3, "set", 2.0)], mode="reconstruct"),
    "set at last, reconstructed": SteeringPlan([Edit(3, "set", 2.0)], mode="reconstruct", positions="last"),
    "scale and add": SteeringPlan([Edit(3, "scale", 3.0), Edit(7, "add", 1.0)]),
    "add at last": SteeringPlan([Edit(7, "add", 2.0)], positions="last"),
    "direction": SteeringPlan([DIRECTION]),
    "direction at last": SteeringPlan([DIRECTION, Edit(1, "set", 1.0)], positions="last"),
    "limited": SteeringPlan([DIRECTION], max_relative_norm=0.1),
}


@pytest.mark.parametrize("site", ["embedding", "mlp.0", "block.0", "block.1", "last"])
@pytest.mark.parametrize("activation", [ReLU(), TopK(6)])
def test_lists_equal_those_of_the_attached_plan(
    model: SequenceRecommender, split: Split, site: str, activation: Any
) -> None:
    popularity, sae = item_popularity(split.train), make_sae(activation)
    ranking = SteeredRanking(model, split.test, sae, site, popularity=popularity, batch_size=7)
    for name, plan in PLANS.items():
        expected = evaluate_steered(model, split.test, sae, site, plan, popularity=popularity)
        found = ranking.metrics(plan)
        assert (found.recommended == expected.recommended).mean() > 0.995, name  # a tie may fall the other way
        assert found.summary() == pytest.approx(expected.summary(), abs=0.01), name
        assert found.users.tolist() == expected.users.tolist()


def test_the_same_lists_where_the_embedding_is_scaled(model: SequenceRecommender, split: Split) -> None:
    scaled = SequenceRecommender(replace(model.config, scale_embedding=True)).eval()
    scaled.load_state_dict(model.state_dict())
    popularity, sae = item_popularity(split.train), make_sae(ReLU())
    for site in ("embedding", "block.0"):
        ranking = SteeredRanking(scaled, split.test, sae, site, popularity=popularity)
        for name, plan in PLANS.items():
            expected = evaluate_steered(scaled, split.test, sae, site, plan, popularity=popularity)
            assert (ranking.lists(plan) == expected.recommended).mean() > 0.995, (site, name)


def test_plans_do_not_leave_anything_behind(model: SequenceRecommender, split: Split) -> None:
    ranking = SteeredRanking(model, split.test, make_sae(ReLU()), "block.0", popularity=item_popularity(split.train))
    before = ranking.final_hidden(SteeringPlan())
    for plan in PLANS.values():
        ranking.lists(plan)
    assert torch.equal(ranking.final_hidden(SteeringPlan()), before)
    assert not torch.equal(ranking.final_hidden(PLANS["direction at last"]), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_mask_and_users_without_a_target_are_refused(model: SequenceRecommender, split: Split) -> None:
    popularity = item_popularity(split.train)
    ranking = SteeredRanking(model, split.test, make_sae(ReLU()), "block.0", popularity=popularity)
    with pytest.raises(ValueError, match="positions 'all' or 'last', got a mask"):
        ranking.lists(SteeringPlan([DIRECTION], positions=torch.ones(3, 8, dtype=torch.bool)))
    nobody = split.test.select_users(np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="no user has 2 items"):
        SteeredRanking(model, nobody, make_sae(ReLU()), "block.0", popularity=popularity)


def points(*shares: float) -> list[_Point]:
    return [_Point(float(i), share, np.array([1.0 - 0.1 * i, 0.5])) for i, share in enumerate(shares)]


def test_crossing_is_the_first_one_and_linear() -> None:
    assert crossing([0, 1, 2], [0.0, 1.0, 3.0], 2.0) == pytest.approx(1.5)
    assert crossing([0, 1, 2, 3], [0.0, 1.0, 0.0, 1.0], 0.5) == pytest.approx(0.5)
    assert crossing([0, 2], [0.0, 1.0], 1.0) == pytest.approx(2.0)
    assert crossing([0, 1], [0.0, 1.0], 1.1) is None
    assert crossing([0, 1], [0.5, 1.0], 0.4) is None


def test_ndcg_at_a_share_is_interpolated_per_user() -> None:
    curve = points(0.1, 0.2, 0.6, 0.5, 0.9)
    found = ndcg_at_share(curve, 0.4)
    assert found is not None
    np.testing.assert_allclose(found, [0.85, 0.5])
    exact = ndcg_at_share(curve, 0.9)
    assert exact is not None
    np.testing.assert_allclose(exact, [0.6, 0.5])
    assert ndcg_at_share(curve, 0.95) is None


def test_strengths_up_and_down() -> None:
    rising, falling = points(0.1, 0.2, 0.6, 0.9), points(0.4, 0.2, 0.0)
    assert strengths_for([0.15, 0.4], rising) == pytest.approx([0.5, 1.5])
    assert strengths_for([0.3, 0.1], falling) == pytest.approx([0.5, 1.5])
    # What is out of reach: the strength that came nearest.
    assert strengths_for([0.15, 0.95], rising) == pytest.approx([0.5, 3.0])
    assert strengths_for([0.5], points(0.1, 0.3, 0.2)) == [1.0]


def test_suppression_is_what_is_left() -> None:
    figures = suppression(0.05, np.array([0.2, 0.4]), 0.2, np.array([0.5, 0.5]))
    assert figures == pytest.approx({"share_left": 0.25, "ndcg_kept": 0.6})


def test_an_attribute_that_nobody_recommends_counts_in_no_mean() -> None:
    figures = suppression(0.0, np.array([0.4]), 0.0, np.array([0.5]))
    assert figures == {"share_left": None, "ndcg_kept": pytest.approx(0.8)}
    assert control_module._mean([0.2, None, 0.4]) == pytest.approx(0.3)
    assert control_module._mean([None]) is None


def test_the_sample_is_tried_as_far_as_methods_are_compared(run: Run, tmp_path: Path) -> None:
    """Also where the curve itself stops before."""
    attribute = run.result("data")["attributes"][2]  # the others have so large a share that it cannot double
    settings = replace(QUICK, attributes=(attribute,), methods=("even_push_last",), multiples=(1.1,), multiple=2.0)
    found = measure(run, settings, tmp_path)
    by_name = {row["method"]: row for row in found["at_share"]["methods"]}
    assert by_name["even_push_last"]["ndcg_kept_on_sample"] > 0


def part(attribute: str, share: float, at_share: dict[str, list[float] | None]) -> dict[str, Any]:
    on_sample = {name: None if values is None else float(np.mean(values)) for name, values in at_share.items()}
    return {
        "attribute": attribute,
        "share": share,
        "ndcg": [1.0, 0.5, 0.0, 0.5],
        "at_share": at_share,
        "kept_on_sample": on_sample,
    }


def test_methods_are_compared_where_both_reach_the_share() -> None:
    reference, other = [0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.5]
    parts = [
        part("a", 0.1, {REFERENCE: reference, "other": other}),
        part("b", 0.1, {REFERENCE: None, "other": [0.25, 0.25, 0.0, 0.0]}),
        part("common", 0.3, {REFERENCE: reference, "other": reference}),
    ]
    found = compare_at_share(parts, [REFERENCE, "other"], StudyControlSettings(), n_resamples=200)
    by_name = {row["method"]: row for row in found["methods"]}
    assert found["left_out"] == ["common"]
    assert found["chosen"] == "other"
    assert by_name[REFERENCE]["attributes"] == {"a": pytest.approx(0.5), "b": None}
    assert by_name["other"]["attributes"] == {"a": pytest.approx(0.75), "b": pytest.approx(0.25)}
    value, low, high = by_name["other"]["ndcg_kept"]
    assert value == pytest.approx(0.5)
    assert low <= value <= high
    assert by_name["other"]["relative_to_reference"] == pytest.approx(1.5)
    assert by_name[REFERENCE]["relative_interval"] == [1.0, 1.0, 1.0]


QUICK = replace(
    StudyControlSettings.quick(), multiples=(1.5, 2.0), multiple=1.5, sample_users=30, test_users=15, n_several=3
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_run(tmp_path_factory.mktemp("run"))


def test_section(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(run, QUICK, tmp_path)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["attributes"]
    chosen = [method.name for method in (*UP, *DOWN) if method.name in (*QUICK.methods, REFERENCE)]
    assert [method["name"] for method in found["methods"]] == chosen
    for attribute in found["attributes"]:
        assert 0 < found["baseline"][attribute]["share"] <= 1
    steered = [one for one in found["curves"] if one["method"] == "even_push_last"]
    for curve in steered:
        assert curve["points"][-1]["share"] > found["baseline"][curve["attribute"]]["share"]
        strengths = [point["strength"] for point in curve["points"]]
        assert strengths == sorted(strengths)
    lowered = [one for one in found["suppression"] if one["method"] == "subtract_even_push_last"]
    assert all(one["share_left"] < 1 for one in lowered)
    assert len(lowered) == len(found["attributes"])

    # The same on a second run, elsewhere; and nothing is measured again where it is there.
    assert measure(run, QUICK, tmp_path / "again") == found

    def refuse(*_: Any) -> None:
        raise AssertionError("an attribute was measured again")

    monkeypatch.setattr(control_module._Experiment, "run", refuse)
    assert measure(run, QUICK, tmp_path) == found
    one = measure(run, replace(QUICK, attributes=(found["attributes"][0],)), tmp_path)
    assert one["attributes"] == found["attributes"][:1]
    with pytest.raises(AssertionError, match="measured again"):
        measure(run, replace(QUICK, share_left=0.5), tmp_path)


def test_prices_of_a_strength_per_user_are_found_on_the_sample(run: Run, tmp_path: Path) -> None:
    names = ("even_push_last_per_user", "subtract_even_push_last_per_user")
    attributes = run.result("data")["attributes"]
    settings = replace(QUICK, attributes=tuple(attributes), methods=names, multiples=(1.1, 1.2, 1.3), test_users=2000)
    found = measure(run, settings, tmp_path)
    sample = control_module._ranking(run, run.sae_users, settings.sample_users, settings.seed)
    test = control_module._ranking(run, run.split.test, settings.test_users, settings.seed)
    maker = PlanMaker(run, sample, n_several=settings.n_several, ridge=settings.ridge)
    up, down = (next(one for one in (*UP, *DOWN) if one.name == name) for name in names)

    def expected(method: Method, attribute: str, multiple: float) -> list[float]:
        plan, has_attribute = maker.plan(method, attribute), maker.has_attribute(attribute)
        tables = [
            DosedLists.measure(ranking, plan, settings.doses, has_attribute, sign=method.sign)
            for ranking in (sample, test)
        ]
        strength, share, ndcg = tables[1].at(tables[0].price(multiple * tables[0].shares[0].mean()))
        return [strength, share, float(ndcg.mean())]

    for attribute in attributes:
        own = [one for one in (*found["curves"], *found["suppression"]) if one["attribute"] == attribute]
        (curve,) = (one for one in own if one["method"] == up.name)
        for multiple, point in zip(settings.multiples, curve["points"], strict=False):
            values = [point["strength"], point["share"], point["ndcg@10"]]
            assert values == pytest.approx(expected(up, attribute, multiple))
        (lowered,) = (one for one in own if one["method"] == down.name)
        for left, point in zip((0.75, 0.5, settings.share_left), lowered["points"], strict=True):
            values = [point["strength"], point["share"], point["ndcg@10"]]
            assert values == pytest.approx(expected(down, attribute, left))


def test_suppression_of_attributes_with_unlike_numbers_of_points_is_compared_at_the_last() -> None:
    one = {"points": [{"share_left": 0.5, "ndcg_kept": 0.9}, {"share_left": 0.2, "ndcg_kept": 0.8}]}
    other = {"points": [{"share_left": 0.4, "ndcg_kept": 0.6}]}
    summary = control_module._suppression_summary("zero", [one, other])
    assert summary["points"] == [{"share_left": pytest.approx(0.3), "ndcg_kept": pytest.approx(0.7)}]
    assert (summary["share_left"], summary["attributes"]) == (pytest.approx(0.3), 2)
    assert len(control_module._suppression_summary("zero", [one, one])["points"]) == 2


def test_what_is_cut_off_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = control_module._Experiment.run
    names = run.result("data")["attributes"][:2]
    settings = replace(QUICK, attributes=tuple(names), methods=("even_push_last",))

    def stop_at_second(self: Any, *methods: Any) -> dict[str, Any]:
        if self.attribute == names[1]:
            raise KeyboardInterrupt
        return real(self, *methods)

    with monkeypatch.context() as patch:
        patch.setattr(control_module._Experiment, "run", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            measure(run, settings, tmp_path)
    kept = list(tmp_path.glob("*.json"))
    assert len(kept) == 1
    first = read_json(kept[0])
    found = measure(run, settings, tmp_path)
    assert found["attributes"] == names
    assert read_json(kept[0]) == first


def test_unknown_names_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"methods: expected names among .*, got nothing_known"):
        measure(run, replace(QUICK, methods=("nothing_known",)), tmp_path)
    with pytest.raises(ValueError, match=r"attributes: expected names among .*, got nothing"):
        measure(run, replace(QUICK, attributes=("nothing",)), tmp_path)


def test_every_method_has_a_plan(run: Run) -> None:
    sample = SteeredRanking(run.model, run.split.train_sae, run.sae, run.site, popularity=run.popularity)
    maker = PlanMaker(run, sample, n_several=3, ridge=0.1)
    for method in (*UP, *DOWN):
        plan = maker.plan(method, run.result("data")["attributes"][0])
        assert plan.edits, method
        assert (plan.mode, plan.positions) == (method.mode, method.positions)
        assert all(edit.value > 0 if method.sign > 0 else edit.value <= 0 for edit in plan.edits), method


def test_an_even_push_raises_the_attribute_by_a_logit(run: Run) -> None:
    """At the last site the push is exact: nothing comes after it but the head."""
    sae = SparseAutoencoder(16, 20, ReLU(), generator=torch.Generator().manual_seed(0)).eval()
    sample = SteeredRanking(run.model, run.split.train_sae, sae, "last", popularity=run.popularity)
    maker = PlanMaker(run, sample, n_several=3, ridge=0.0)
    attribute = run.result("data")["attributes"][0]
    method = next(one for one in UP if one.name == "even_push_last")
    vector = maker.plan(method, attribute).edits[0].vector
    pushed = run.model.scores(vector).detach().double().numpy()
    present, weights = maker.has_attribute(attribute), maker._likelihood
    lift = np.average(pushed[present], weights=weights[present])
    lift -= np.average(pushed[~present], weights=weights[~present])
    assert lift == pytest.approx(1.0, abs=0.02)
