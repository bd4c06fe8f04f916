from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saerec_fast.types import Ragged


@given(st.lists(st.lists(st.integers(0, 2**40), max_size=5), max_size=6))
def test_rows_come_back(rows: list[list[int]]) -> None:
    ragged = Ragged.from_lists(rows)
    assert ragged.offsets.dtype == ragged.ids.dtype == torch.int64
    bounds = ragged.offsets.tolist()
    assert len(bounds) == len(rows) + 1
    assert [ragged.ids[a:b].tolist() for a, b in pairwise(bounds)] == rows
    assert ragged.row_ids().tolist() == [number for number, row in enumerate(rows) for _ in row]


def test_kinds_of_rows() -> None:
    array = np.array([1, 2], dtype=np.uint16)
    array.flags.writeable = False
    rows: list[Any] = [array, torch.tensor([3], dtype=torch.int32), (4, 5), range(2), [], torch.empty(0), np.int64([6])]
    ragged = Ragged.from_lists(rows)
    assert ragged.ids.tolist() == [1, 2, 3, 4, 5, 0, 1, 6]
    assert ragged.offsets.tolist() == [0, 2, 3, 5, 7, 7, 7, 8]


@pytest.mark.parametrize("row", [[1.0], [1, 2.5], torch.tensor([1.0]), [True], np.array([0.5]), ["a"]])
def test_ids_are_integers(row: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"ids: expected integers, got torch|'str'"):
        Ragged.from_lists([[1], row])
