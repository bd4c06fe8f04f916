"""From a wanted share of an attribute to the strength that yields it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from saerec_fast.types import SteeringPlan


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found.

    Attributes:
        plan: the plan at the strength found.
        factor: how many times as strong as the plan given.
        share: what was measured with it.
        tried: every (factor, share) measured, in the order of trying.
    """

    plan: SteeringPlan
    factor: float
    share: float
    tried: tuple[tuple[float, float], ...]


def calibrate(
    plan: SteeringPlan,
    share: float,
    measure: Callable[[SteeringPlan], float],
    *,
    tolerance: float = 0.005,
    largest_factor: float = 64.0,
    max_steps: int = 24,
) -> Calibration:
    """The strength of a plan at which a share is what it should be, by bisection.

    The share has to rise, or to fall, with the strength: :meth:`SteeringPlan.scaled` from 0 to ``largest_factor``.

    Args:
        plan: its values are scaled.
        share: the wanted share, between 0 and 1.
        measure: the share that a plan yields on a sample, such as
            :func:`saerec_fast.interpret.control.share_measure` gives.
        tolerance: a share this close will do.
        largest_factor: strengths above it are not tried.
        max_steps: shares of small samples move in steps; after so many measurements the closest one is taken.

    Raises:
        ValueError: a share outside [0, 1], a plan without edits, or a share that no strength tried reaches.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share}")
    if not plan.edits:
        raise ValueError("plan: expected edits whose strength can change, got an empty plan")
    if not (largest_factor > 0 and math.isfinite(largest_factor)) or tolerance < 0 or max_steps < 2:
        raise ValueError("calibrate: expected largest_factor > 0, tolerance >= 0 and max_steps >= 2")
    tried: list[tuple[float, float]] = []

    def missed(factor: float) -> float:
        tried.append((factor, float(measure(plan.scaled(factor)))))
        return tried[-1][1] - share

    low, high = 0.0, min(1.0, largest_factor)
    below = missed(low)
    above = missed(high)
    while below * above > 0 and abs(above) > tolerance and high < largest_factor and len(tried) < max_steps:
        low, below, high = high, above, min(2.0 * high, largest_factor)
        above = missed(high)
    closest = min(tried, key=lambda one: abs(one[1] - share))
    if below * above > 0 and abs(closest[1] - share) > tolerance:
        reached = [measured for _, measured in tried]
        raise ValueError(
            f"share: strengths up to {high:g} times the plan's reach {min(reached):.3g} to {max(reached):.3g}, "
            f"not {share:.3g}; give a stronger plan or another share"
        )
    while abs(closest[1] - share) > tolerance and len(tried) < max_steps:
        middle = 0.5 * (low + high)
        miss = missed(middle)
        if miss * below > 0:
            low, below = middle, miss
        else:
            high = middle
        closest = min(tried, key=lambda one: abs(one[1] - share))
    return Calibration(plan.scaled(closest[0]), *closest, tuple(tried))
