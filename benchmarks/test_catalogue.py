"""The best items of a catalogue for a batch of users, without what each has seen."""

from __future__ import annotations

from typing import Any

import pytest
from ways import CATALOGUE
from workloads import MAX_THREADS, catalogue_cases


@pytest.mark.parametrize("way", CATALOGUE)
@pytest.mark.parametrize("case", catalogue_cases(), ids=str)
def test_catalogue(measure: Any, case: Any, way: str) -> None:
    measure("catalogue", case, MAX_THREADS, way)
