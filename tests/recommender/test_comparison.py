from __future__ import annotations

import numpy as np
import pytest

from saerec_fast.data import Split, cross_validation_splits, synthetic_dataset
from saerec_fast.recommender import PopularityRecommender, bootstrap_interval, cross_validate, evaluate, item_popularity
from saerec_fast.recommender.evaluation import Recommend


def splits(n_folds: int = 3) -> list[Split]:
    data = synthetic_dataset(n_users=40, n_items=30, n_attributes=2, seed=2, mean_length=12.0)
    return list(cross_validation_splits(data, n_folds=n_folds, seed=4))


class Backwards(PopularityRecommender):
    """The least popular items first."""

    def __init__(self, split: Split) -> None:
        super().__init__(split.train)
        self.ranking = self.ranking[::-1]


def fit(fold: int, split: Split) -> dict[str, Recommend]:
    return {"popularity": PopularityRecommender(split.train), "backwards": Backwards(split)}


def test_values_are_those_of_every_fold_in_turn() -> None:
    made = splits()
    found = cross_validate(made, fit, k=5, targets_per_user=3)
    expected = [
        evaluate(
            PopularityRecommender(split.train),
            split.test,
            popularity=item_popularity(split.train),
            k=5,
            targets_per_user=3,
        ).ndcg
        for split in made
    ]
    np.testing.assert_array_equal(found.ndcg["popularity"], np.concatenate(expected))
    np.testing.assert_array_equal(np.bincount(found.folds), [len(values) for values in expected])


def test_the_summary_pairs_users() -> None:
    found = cross_validate(splits(), fit)
    difference = found.ndcg["popularity"] - found.ndcg["backwards"]
    summary = found.summary("popularity")
    assert summary["leads"] == {"backwards": [difference.mean(), *bootstrap_interval(difference)]}
    assert summary["leads"]["backwards"][1] > 0
    assert summary["n_users"] == len(difference) == sum(split.test.n_users for split in splits())


def test_unsound_comparisons_are_refused() -> None:
    with pytest.raises(ValueError, match="there are none"):
        cross_validate([], fit)
    with pytest.raises(ValueError, match="fold 1"):
        cross_validate(splits(), lambda fold, split: {str(fold): PopularityRecommender(split.train)})
