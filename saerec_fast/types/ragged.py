"""Ragged lists of ids, one per row, in compressed form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
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
    def from_lists(cls, rows: Sequence[Sequence[int] | np.ndarray | Tensor]) -> Ragged:
        """Build from one sequence (or 1-D tensor or array) of integer ids per row.

        Raises:
            TypeError: ids that are no integers.
        """
        parts = [_ids_of(row) for row in rows]
        offsets = torch.tensor([0, *accumulate(part.numel() for part in parts)], dtype=torch.int64)
        ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        return cls(offsets, ids)

    def row_ids(self) -> Tensor:
        """The row number of every id, int64 ``(total,)``."""
        counts = self.offsets.diff()
        rows = torch.arange(counts.numel(), device=counts.device)
        return rows.repeat_interleave(counts)


def _ids_of(row: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    if not isinstance(row, Tensor):
        row = torch.tensor(row if isinstance(row, np.ndarray) else list(row))
    ids = row.to("cpu").reshape(-1)
    if ids.numel() == 0:
        return ids.to(torch.int64)
    # Conversion would cut 1.5 to 1.
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"ids: expected integers, got {ids.dtype}")
    return ids.to(torch.int64)
