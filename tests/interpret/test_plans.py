import numpy as np
import pytest
import torch

from saerec_fast.interpret import FeatureStatistics, FeatureStatisticsResult, attribute_plan

NAMES = ("loud", "quiet", "everywhere")


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    """Activations of 6 features in 300 rows, each an item of its own; items of the first half are loud, the others
    quiet. Features 1, 4 and 3 follow the loud ones, less and less; 0 the quiet ones; 2 chance; 5 never fires."""
    random = np.random.default_rng(0)
    values = random.exponential(1.0, (300, 6))
    loud = np.arange(300) < 150
    for feature, lift in ((1, 4.0), (4, 2.0), (3, 1.0)):
        values[:, feature] += lift * loud
    values[:, 0] += 3.0 * ~loud
    values[:, 5] = 0.0
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def statistics(dense: np.ndarray) -> FeatureStatisticsResult:
    loud = np.arange(300) < 150
    made = FeatureStatistics(6, np.stack([loud, ~loud, np.ones(300, dtype=bool)], axis=1), NAMES)
    made.update_dense(torch.from_numpy(dense), np.arange(300), np.arange(300) % 20)
    return made.result()


def test_the_features_that_follow_an_attribute_are_added_by_what_is_much_for_them(
    dense: np.ndarray, statistics: FeatureStatisticsResult
) -> None:
    plan = attribute_plan(statistics, "loud", count=3, positions="last")
    assert [(edit.feature, edit.op) for edit in plan.edits] == [(1, "add"), (4, "add"), (3, "add")]
    assert (plan.mode, plan.positions) == ("delta", "last")
    label = np.arange(300) < 150
    correlations = [np.corrcoef(dense[:, feature], label)[0, 1] for feature in (1, 4, 3)]
    for edit, correlation in zip(plan.edits, correlations, strict=True):
        expected = np.quantile(dense[:, edit.feature], 0.99) * correlation / correlations[0]
        assert edit.value == pytest.approx(expected, rel=1e-5)


def test_set_moves_the_same_features_to_the_same_amounts(statistics: FeatureStatisticsResult) -> None:
    added = attribute_plan(statistics, 0, count=2)
    fixed = attribute_plan(statistics, 0, count=2, op="set", mode="reconstruct")
    assert [(edit.feature, edit.value) for edit in fixed.edits] == [(edit.feature, edit.value) for edit in added.edits]
    assert {edit.op for edit in fixed.edits} == {"set"}
    assert fixed.mode == "reconstruct"


def test_suppression_subtracts_or_sets_to_zero(statistics: FeatureStatisticsResult) -> None:
    added = attribute_plan(statistics, "loud", count=3)
    subtracted = attribute_plan(statistics, "loud", count=3, suppress=True)
    assert [edit.value for edit in subtracted.edits] == [-edit.value for edit in added.edits]
    silenced = attribute_plan(statistics, "loud", count=3, suppress=True, op="set")
    assert [(edit.feature, edit.op, edit.value) for edit in silenced.edits] == [
        (1, "set", 0.0),
        (4, "set", 0.0),
        (3, "set", 0.0),
    ]


def test_features_that_follow_the_opposite_are_left_out(statistics: FeatureStatisticsResult) -> None:
    chosen = [edit.feature for edit in attribute_plan(statistics, "quiet", count=6).edits]
    assert chosen[0] == 0
    assert not {1, 3, 4, 5} & set(chosen)


def test_what_does_not_fit_is_refused(statistics: FeatureStatisticsResult) -> None:
    with pytest.raises(ValueError, match="none does"):
        attribute_plan(statistics, "everywhere")
    with pytest.raises(ValueError, match="silent"):
        attribute_plan(statistics, "silent")
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        attribute_plan(statistics, "loud", count=0)
    with pytest.raises(ValueError, match="op: expected 'add' or 'set', got 'scale'"):
        attribute_plan(statistics, "loud", op="scale")  # type: ignore[arg-type]
