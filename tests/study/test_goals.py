"""Goals are judged by the figures, and by the right ones."""

from __future__ import annotations

import pytest

from saerec_fast.study.goals import goals


def point(name: str, explained: float, l0: float, correlation: float, auc: float, ndcg: float = 0.1) -> dict:
    return {
        "name": name,
        "site": "block.0",
        "explained_variance": explained,
        "l0": l0,
        "correlation": [correlation, None, None],
        "roc_auc": [auc, None, None],
        "ndcg@10": ndcg,
    }


def sweep(*points: dict) -> dict:
    return {"sweep": {"original_ndcg@10": 0.2, "points": list(points)}}


def control(chosen: str, relative: dict[str, float | None], suppression: dict[str, tuple[float, float]]) -> dict:
    return {
        "at_share": {
            "multiple": 6.0,
            "chosen": chosen,
            "methods": [
                {
                    "method": name,
                    "relative_to_reference": value,
                    "relative_interval": [value, None, None],
                    "attributes": {"Horror": value},
                }
                for name, value in relative.items()
            ],
        },
        "suppression_summary": [
            {"method": name, "share_left": left, "ndcg_kept": kept} for name, (left, kept) in suppression.items()
        ],
    }


@pytest.mark.parametrize(("kept", "reached"), [(0.99, True), (0.9899, False), (1.01, True)])
def test_reconstruction(kept: float, reached: bool) -> None:
    (goal,) = goals({}, site="block.0", reconstruction_kept=kept)
    assert goal["reached"] is reached


def test_the_sae_that_follows_attributes_best_has_to_keep_the_ranking_too() -> None:
    near, far = point("near", 0.96, 30, 0.75, 0.9, ndcg=0.199), point("far", 0.96, 30, 0.5, 0.9, ndcg=0.2)
    first, second = goals(sweep(near, far), site="block.0", reconstruction_kept=0.97)
    assert first["reached"]
    assert first["found"] == "97.0% (the run's SAE); 99.5% (near, which follows attributes best)"
    assert "near" in second["found"]
    assert not goals(sweep({**near, "ndcg@10": 0.19}, far), site="block.0", reconstruction_kept=1.0)[0]["reached"]


def test_only_saes_that_are_faithful_and_sparse_count_for_interpretability() -> None:
    dense = point("dense", 0.99, 35.1, 0.9, 0.95)
    unfaithful = point("unfaithful", 0.949, 10, 0.9, 0.95)
    goal = goals(sweep(dense, unfaithful), site="block.0", reconstruction_kept=1)[1]
    assert not goal["reached"]
    assert "no SAE" in goal["found"]
    elsewhere = {**point("elsewhere", 0.95, 35, 0.9, 0.95), "site": "embedding"}
    near = point("near", 0.95, 35, 0.69, 0.95)
    lopsided = point("lopsided", 0.96, 20, 0.71, 0.5)
    all_of_them = sweep(dense, unfaithful, elsewhere, near, lopsided)
    goal = goals(all_of_them, site="block.0", reconstruction_kept=1)[1]
    assert not goal["reached"]
    assert "near" in goal["found"]
    both = point("both", 0.95, 35, 0.70, 0.88)
    goal = goals(sweep(near, both, lopsided), site="block.0", reconstruction_kept=1)[1]
    assert goal["reached"]
    assert "both" in goal["found"]


def test_control_takes_the_method_that_other_users_chose() -> None:
    result = control("several", {"reference": 1.0, "several": 1.12, "best here": 1.3}, {"zero": (0.89, 1.0)})
    share, suppression = goals({"control": result}, site="block.0", reconstruction_kept=1)[1:]
    assert share["reached"]
    assert "several" in share["found"]
    assert not suppression["reached"]
    assert "89%" in suppression["found"]
    result = control("unmeasured", {"reference": 1.0, "unmeasured": None}, {})
    assert len(goals({"control": result}, site="block.0", reconstruction_kept=1)) == 1


def test_of_methods_that_suppress_enough_the_gentlest_counts() -> None:
    result = control("", {}, {"zero": (0.89, 1.0), "harsh": (0.0, 0.8), "gentle": (0.25, 0.97)})
    (suppression,) = goals({"control": result}, site="block.0", reconstruction_kept=1)[1:]
    assert suppression["reached"]
    assert "gentle" in suppression["found"]
    result = control("", {}, {"zero": (0.89, 1.0), "harsh": (0.0, 0.8)})
    (suppression,) = goals({"control": result}, site="block.0", reconstruction_kept=1)[1:]
    assert not suppression["reached"]
    assert "harsh" in suppression["found"]
