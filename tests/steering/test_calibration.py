from __future__ import annotations

import math

import pytest

from saerec_fast.steering import calibrate
from saerec_fast.types import Edit, SteeringPlan

PLAN = SteeringPlan([Edit(3, "add", 2.0), Edit(4, "scale", 3.0)])


def rising(plan: SteeringPlan) -> float:
    """A share of .1 without the plan, near 1 with a strong one."""
    return 0.1 + 0.9 * math.tanh(0.2 * plan.values[0])


def falling(plan: SteeringPlan) -> float:
    return 0.5 * math.exp(-plan.values[0])


@pytest.mark.parametrize(("measure", "share"), [(rising, 0.11), (rising, 0.5), (rising, 0.99), (falling, 0.02)])
def test_finds_the_strength(measure: object, share: float) -> None:
    found = calibrate(PLAN, share, measure, tolerance=1e-4)  # type: ignore[arg-type]
    assert abs(found.share - share) <= 1e-4
    assert found.plan == PLAN.scaled(found.factor)
    assert measure(found.plan) == found.share  # type: ignore[operator]
    assert (found.factor, found.share) in found.tried


def test_takes_the_closest_step() -> None:
    found = calibrate(PLAN, 0.52, lambda plan: round(rising(plan), 1), tolerance=0.0, max_steps=30)
    assert found.share == 0.5
    assert len(found.tried) == 30


def test_a_strength_that_will_do_at_once() -> None:
    assert len(calibrate(PLAN, rising(PLAN), rising).tried) == 2


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"strengths up to 4 times the plan's reach 0\.1 to 0\.9.*, not 0\.05"):
        calibrate(PLAN, 0.05, rising, largest_factor=4.0)
    with pytest.raises(ValueError, match="share: expected a number from 0 to 1, got 50"):
        calibrate(PLAN, 50, rising)
    with pytest.raises(ValueError, match="plan: expected edits"):
        calibrate(SteeringPlan(), 0.5, rising)
    for option in ({"tolerance": -1.0}, {"largest_factor": 0.0}, {"max_steps": 1}):
        with pytest.raises(ValueError, match="calibrate: expected"):
            calibrate(PLAN, 0.5, rising, **option)  # type: ignore[arg-type]
