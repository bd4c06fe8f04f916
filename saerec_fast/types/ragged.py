"""Ragged lists of ids, one per row, in compressed form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """One list of ids per row: row ``r`` holds ``ids[offsets[r]:offsets[r + 1]]``.

    Attributes:
        offsets: int64 ``(n_rows + 1,)``, non-decreasing, from 0 to ``len(ids)``.
        ids: int64 ``(total,)``; within a row the order does not matter and repeats are allowed.
    """

    offsets: Tensor
    ids: Tensor

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int] | Tensor]) -> Ragged:
        """Build from one sequence (or 1-D integer tensor) of ids per row."""
        parts = [
            row.to("cpu", torch.int64).reshape(-1)
            if isinstance(row, Tensor)
            else torch.as_tensor(list(row), dtype=torch.int64)
            for row in rows
        ]
        offsets = torch.tensor([0, *accumulate(part.numel() for part in parts)], dtype=torch.int64)
        ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        return cls(offsets, ids)

    def row_ids(self) -> Tensor:
        """The row number of every id, int64 ``(total,)``."""
        counts = self.offsets.diff()
        rows = torch.arange(counts.numel(), device=counts.device)
        return rows.repeat_interleave(counts)
