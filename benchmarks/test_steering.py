"""What steering adds to forward pass and scoring of a recommender, beside what a user would write instead."""

from __future__ import annotations

from typing import Any

import pytest
from steering import steering_cells


@pytest.mark.parametrize(("case", "threads", "way"), steering_cells())
def test_steering(measure_added: Any, case: Any, threads: int, way: str) -> None:
    measure_added(case, threads, way)
