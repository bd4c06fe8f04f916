"""Recommenders compared by cross-validation over users: far more held-out users than one test part has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from saerec_fast.recommender.evaluation import bootstrap_interval, evaluate, item_popularity

if TYPE_CHECKING:
    from saerec_fast.data import Split
    from saerec_fast.recommender.evaluation import Recommend


@dataclass(frozen=True)
class Comparison:
    """What :func:`cross_validate` measured.

    Attributes:
        ndcg: float64 ``(n_users,)`` per recommender: NDCG@k of each held-out user, a mean over the user's targets. The
            users of all folds, in the same order for every recommender.
        folds: int64 ``(n_users,)``, the fold in which each of them was held out.
    """

    ndcg: Mapping[str, np.ndarray]
    folds: np.ndarray

    def leads(self, name: str) -> dict[str, np.ndarray]:
        """Difference in NDCG of ``name`` to every other recommender, per user, ``(n_users,)``."""
        return {other: self.ndcg[name] - values for other, values in self.ndcg.items() if other != name}

    def summary(self, name: str) -> dict[str, Any]:
        """Means with 95 % intervals over users: of each recommender, and of the leads of ``name`` over the others.

        The intervals resample users. They say how well the mean over such users is known for these trainings, not how
        much another seed would change it.
        """

        def estimate(values: np.ndarray) -> list[float]:
            return [float(values.mean()), *bootstrap_interval(values)]

        return {
            "n_users": len(self.folds),
            "ndcg": {one: estimate(values) for one, values in self.ndcg.items()},
            "leads": {other: estimate(values) for other, values in self.leads(name).items()},
        }


def cross_validate(
    splits: Iterable[Split],
    fit: Callable[[int, Split], Mapping[str, Recommend]],
    *,
    k: int = 10,
    targets_per_user: int = 10,
) -> Comparison:
    """Fit recommenders on every split and measure them on its test users.

    Args:
        splits: such as those of :func:`saerec_fast.data.cross_validation_splits`.
        fit: recommenders by name from the fold's number (from 0) and its split, the same names for every fold. It must
            not look at ``split.test``.
        k: length of the lists.
        targets_per_user: how many of a user's last items are to be found, each from all items before it. Several make
            a user's value, and with it the comparison, steadier.

    Raises:
        ValueError: there are no splits, or ``fit`` gives other names for one fold than for another.
    """
    measured: list[dict[str, np.ndarray]] = []
    for fold, split in enumerate(splits):
        popularity = item_popularity(split.train)
        values = {
            name: evaluate(recommend, split.test, popularity=popularity, k=k, targets_per_user=targets_per_user).ndcg
            for name, recommend in fit(fold, split).items()
        }
        if measured and values.keys() != measured[0].keys():
            raise ValueError(f"fit: fold {fold} has {sorted(values)}, fold 0 has {sorted(measured[0])}")
        measured.append(values)
    if not measured:
        raise ValueError("splits: there are none")
    sizes = [len(next(iter(values.values()))) for values in measured]
    return Comparison(
        {name: np.concatenate([values[name] for values in measured]) for name in measured[0]},
        np.repeat(np.arange(len(sizes)), sizes),
    )
