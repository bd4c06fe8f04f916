"""What the ops return."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor


class TopKResult(NamedTuple):
    """The k largest scores of each row, in descending order, ties by smallest index.

    Attributes:
        values: ``(..., k)`` in the dtype of the input; ``-inf`` where a row had fewer than k candidates.
        indices: int64 ``(..., k)``; ``-1`` where a row had fewer than k candidates.
    """

    values: Tensor
    indices: Tensor


class SparseFeatures(NamedTuple):
    """Sparse feature activations of a batch, one compressed row per hidden state.

    Row ``r`` (over the flattened batch) holds entries ``offsets[r]:offsets[r + 1]``. Within a row each
    feature stands at most once. Top-k encoders give exactly k entries a row in descending order of value, where
    a value of 0 means "selected, but not positive"; threshold encoders give the active features in ascending
    order of index. ``indices`` and ``values`` may be longer than ``offsets[-1]``: places behind the last entry, of
    index -1 and value 0, belong to no row.

    Attributes:
        offsets: int64 ``(n_rows + 1,)``.
        indices: int32 or int64 ``(n_entries,)``, feature ids.
        values: ``(n_entries,)``, activations.
        n_features: size of the dictionary.
        batch_shape: leading shape of the hidden states, ``n_rows == prod(batch_shape)``.
        n_active: int64 scalar tensor of an encoder that was given a capacity: how many entries there are without it.
            ``n_active > n_entries`` says that the last ones are missing. ``None`` where nothing can be.
    """

    offsets: Tensor
    indices: Tensor
    values: Tensor
    n_features: int
    batch_shape: tuple[int, ...]
    n_active: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return math.prod(self.batch_shape)

    def row_ids(self) -> Tensor:
        """The row number of every entry, int64 ``(n_entries,)``; ``n_rows`` behind the last entry."""
        if self.n_active is not None:
            places = torch.arange(self.indices.shape[0], device=self.offsets.device)
            return torch.searchsorted(self.offsets[1:].contiguous(), places, right=True)
        rows = torch.arange(self.n_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.indices.shape[0])

    def dense(self) -> Tensor:
        """Activations as a dense tensor ``(*batch_shape, n_features)``; differentiable in ``values``."""
        # One row more takes the places behind the last entry.
        rest = 0 if self.n_active is None else 1
        flat = self.values.new_zeros((self.n_rows + rest, self.n_features))
        flat = flat.index_put((self.row_ids(), self.indices.long()), self.values)[: self.n_rows]
        return flat.reshape(*self.batch_shape, self.n_features)

    def to_sparse_csr(self) -> Tensor:
        """A ``torch.sparse_csr`` tensor ``(n_rows, n_features)`` with sorted columns and no stored zeros."""
        keep = self.values != 0
        rows = self.row_ids()[keep]
        columns, values = self.indices[keep].long(), self.values[keep]
        order = torch.argsort(rows * self.n_features + columns)
        counts = torch.bincount(rows, minlength=self.n_rows)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        with warnings.catch_warnings():
            # torch says once per process that its CSR support is in beta; who asked for CSR has decided that already.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                crow, columns[order], values[order], size=(self.n_rows, self.n_features), check_invariants=True
            )
