"""Steering with a strength of its own for every user, instead of one for all.

At strength s let a(u, s) be the share of an attribute's items in user u's list, and g(u, s) the NDCG that the untouched
recommender expects of that list, by its own probabilities: no target is looked at. At a price λ of a whole list's
share, u gets the strength that maximises ``g(u, s) − λ a(u, s)`` where the attribute is turned down, and
``g(u, s) + λ a(u, s)`` where it is turned up. One price serves all users; the least one at which the mean share of a
sample reaches the level asked for is taken (the Lagrangian of maximising the mean expected NDCG under a bound on the
mean share). In service, a request evaluates the strengths as rows of one batch; λ is a constant.

The strengths go where they displace least: a list that holds none of an attribute that is turned down stays as it is.
The bound holds in the mean, not in every user's list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saerec_fast.study.steered_ranking import SteeredRanking
from saerec_fast.types import SteeringPlan

# Of a price, in NDCG per list: below the least difference that could matter, and above any.
_LOWEST, _HIGHEST, _HALVINGS = 1e-6, 1e3, 60


@dataclass(frozen=True)
class DosedLists:
    """What every strength makes of every user's list; tables are ``(n_strengths, n_users)`` float64.

    Attributes:
        strengths: ``(n_strengths,)``, ascending from 0.
        shares: table, of the attribute.
        expected: table, NDCG by the untouched recommender's own probabilities.
        ndcg: table, by the users' targets.
        sign: 1 where the attribute is turned up, -1 where it is turned down.
    """

    strengths: np.ndarray
    shares: np.ndarray
    expected: np.ndarray
    ndcg: np.ndarray
    sign: int

    @classmethod
    def measure(
        cls,
        ranking: SteeredRanking,
        plan: SteeringPlan,
        strengths: Sequence[float],
        has_attribute: np.ndarray,
        *,
        sign: int,
    ) -> DosedLists:
        """The lists of a ranking's users under ``plan`` times 0 and each of ``strengths``.

        Args:
            ranking: the users.
            plan: of unit strength.
            strengths: positive, ascending.
            has_attribute: bool ``(n_items,)``.
            sign: 1 for a plan that turns the attribute up, -1 for one that turns it down.
        """
        rows = []
        for strength in (0.0, *strengths):
            metrics = ranking.metrics(plan.scaled(strength) if strength else SteeringPlan())
            lists = metrics.recommended
            listed = lists >= 0
            shares = (has_attribute[lists] & listed).sum(axis=1) / np.maximum(listed.sum(axis=1), 1)
            rows.append((shares, ranking.expected_ndcg(lists), metrics.ndcg))
        shares, expected, ndcg = (np.stack(column) for column in zip(*rows, strict=True))
        return cls(np.array([0.0, *strengths]), shares, expected, ndcg, sign)

    def doses(self, price: float) -> np.ndarray:
        """Which strength each user gets at a price: int64 ``(n_users,)``, the least among equals."""
        chosen: np.ndarray = np.argmax(self.expected + self.sign * price * self.shares, axis=0)
        return chosen

    def price(self, share: float) -> float:
        """The least price, to 12 digits, at which the mean share gets as far as ``share``; the highest where none
        does."""
        low, high = _LOWEST, _HIGHEST
        for _ in range(_HALVINGS):
            middle = float(np.sqrt(low * high))
            if self.sign * _of_users(self.shares, self.doses(middle)).mean() < self.sign * share:
                low = middle
            else:
                high = middle
        return high

    def at(self, price: float) -> tuple[float, float, np.ndarray]:
        """Mean strength, mean share, and the NDCG of every user at a price."""
        doses = self.doses(price)
        strength, share = self.strengths[doses].mean(), _of_users(self.shares, doses).mean()
        return float(strength), float(share), _of_users(self.ndcg, doses)


def _of_users(values: np.ndarray, doses: np.ndarray) -> np.ndarray:
    found: np.ndarray = values[doses, np.arange(values.shape[1])]
    return found
