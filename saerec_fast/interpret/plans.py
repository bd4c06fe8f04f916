"""From statistics of features to a plan that turns an attribute up or down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from saerec_fast.interpret.statistics import FeatureStatisticsResult
from saerec_fast.types import Edit, SteeringPlan

if TYPE_CHECKING:
    from saerec_fast.types.plan import Mode


def attribute_plan(
    statistics: FeatureStatisticsResult,
    attribute: int | str,
    *,
    count: int = 8,
    suppress: bool = False,
    op: Literal["add", "set"] = "add",
    mode: Mode = "delta",
    positions: Literal["all", "last"] | Tensor = "all",
) -> SteeringPlan:
    """Edits of the features that follow an attribute most, all at once::

        down = attribute_plan(statistics, "Horror", suppress=True)
        found = calibrate(down, 0.02, share_measure(model, dataset, sae, site, "Horror", popularity=popularity))

    The features with the largest (positive) correlation are taken. Each is moved by the 99th percentile of its non-zero
    activations, weighted by its correlation over the largest one: a unit strength, from which
    :meth:`~saerec_fast.SteeringPlan.scaled` and :func:`~saerec_fast.calibrate` go on.

    Args:
        statistics: of SAE features, with ``quantiles``; from other users than those the plan is judged by.
        attribute: its name or position.
        count: features at most; fewer where fewer correlate positively.
        suppress: turn the attribute down: ``add`` subtracts, ``set`` sets to 0, which no strength can increase.
        op: ``add`` moves an activation, and needs no encoding; ``set`` replaces it.
        mode: of the plan.
        positions: of the plan.

    Raises:
        ValueError: no such attribute, ``count`` below 1, another ``op``, or no feature that follows the attribute.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if op not in ("add", "set"):
        raise ValueError(f"op: expected 'add' or 'set', got {op!r}")
    column = np.nan_to_num(statistics.correlation[:, statistics.attribute_index(attribute)])
    chosen = [int(feature) for feature in np.argsort(-column, kind="stable")[:count] if column[feature] > 0]
    if not chosen:
        raise ValueError(f"attribute: expected one that some feature follows, got {attribute!r}, which none does")
    largest = np.nan_to_num(statistics.quantiles[chosen, -1])
    amounts = largest * column[chosen] / column[chosen[0]]
    if suppress:
        amounts = -amounts if op == "add" else np.zeros(len(chosen))
    edits = [Edit(feature, op, float(amount)) for feature, amount in zip(chosen, amounts, strict=True)]
    return SteeringPlan(edits, mode=mode, positions=positions)
