"""The items on which each feature is strongest, kept while activations stream by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from saerec_fast.types import SparseFeatures

_CHUNK_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Example:
    """One row on which a feature is strong.

    Attributes:
        value: the activation, in the units it was given in.
        item: item index at the row's position.
        user: the user of the row.
        title: the item's title, or its index as text where no titles were given.
        attributes: names of the item's attributes.
    """

    value: float
    item: int
    user: int
    title: str
    attributes: tuple[str, ...]


class TopExamples:
    """The ``count`` strongest distinct items of every feature, each with its strongest row.

    Memory: 24 bytes × n_features × count. What is kept does not depend on how the rows are cut into batches: larger
    activations first, then smaller item index, then the row that came first.

    Args:
        n_features: size of the dictionary, or the number of hidden dimensions.
        count: items kept per feature.
        direction: 1 for the largest activations above 0; -1 for the most negative ones (for raw dimensions, whose two
            ends may both mean something).

    Raises:
        ValueError: a count below 1, or another direction.
    """

    def __init__(self, n_features: int, count: int = 10, *, direction: int = 1) -> None:
        if n_features < 1 or count < 1:
            raise ValueError(f"n_features and count must be at least 1, got {n_features} and {count}")
        if direction not in (1, -1):
            raise ValueError(f"direction must be 1 or -1, got {direction}")
        self.n_features = n_features
        self.count = count
        self.direction = direction
        self._values = np.full((n_features, count), -np.inf)
        self._items = np.full((n_features, count), -1, dtype=np.int64)
        self._users = np.full((n_features, count), -1, dtype=np.int64)

    def update(self, features: SparseFeatures, items: Tensor | ArrayLike, users: Tensor | ArrayLike) -> None:
        """Add rows of sparse activations.

        Args:
            features: over ``rows`` hidden states.
            items: ``(rows,)``, item index at each row's position.
            users: ``(rows,)``, any integer per user.

        Raises:
            ValueError: shapes that do not fit.
        """
        if features.n_features != self.n_features:
            raise ValueError(f"expected activations of {self.n_features} features, got {features.n_features}")
        item_array, user_array = _checked(features.n_rows, items, users)
        rows = _numpy(features.row_ids())
        first, last = int(features.offsets[0]), int(features.offsets[-1])
        indices, values = _numpy(features.indices)[first:last], _numpy(features.values)[first:last]
        for start in range(0, len(rows), _CHUNK_ENTRIES):
            part = slice(start, start + _CHUNK_ENTRIES)
            self._merge(indices[part], values[part], item_array[rows[part]], user_array[rows[part]])

    def update_dense(self, hidden: Tensor | ArrayLike, items: Tensor | ArrayLike, users: Tensor | ArrayLike) -> None:
        """Add rows given densely ``(rows, n_features)``, such as raw hidden states.

        Raises:
            ValueError: shapes that do not fit.
        """
        dense = _numpy(hidden)
        if dense.ndim != 2 or dense.shape[1] != self.n_features:
            raise ValueError(f"expected rows of {self.n_features} dimensions, got shape {dense.shape}")
        item_array, user_array = _checked(len(dense), items, users)
        step = max(1, _CHUNK_ENTRIES // self.n_features)
        for start in range(0, len(dense), step):
            part = dense[start : start + step]
            self._merge(
                np.tile(np.arange(self.n_features), len(part)),
                part.reshape(-1),
                np.repeat(item_array[start : start + step], self.n_features),
                np.repeat(user_array[start : start + step], self.n_features),
            )

    def _merge(
        self, indices: NDArray[Any], values: NDArray[Any], items: NDArray[np.int64], users: NDArray[np.int64]
    ) -> None:
        scores = values.astype(np.float64) * self.direction
        # Most entries of a long stream fall short of the weakest item kept and need no sorting. Equal ones stay: a
        # smaller item index may displace.
        candidates = np.flatnonzero((scores > 0) & (scores >= self._values[indices, -1]))
        if not len(candidates):
            return
        touched = np.unique(indices[candidates])
        kept = self._items[touched] >= 0
        # What is kept goes first, so that of equal rows of one item the earlier one wins.
        feature = np.concatenate([np.repeat(touched, kept.sum(1)), indices[candidates]]).astype(np.int64)
        score = np.concatenate([self._values[touched][kept], scores[candidates]])
        item = np.concatenate([self._items[touched][kept], items[candidates]])
        user = np.concatenate([self._users[touched][kept], users[candidates]])

        order = np.lexsort((-score, item, feature))
        feature, score, item, user = feature[order], score[order], item[order], user[order]
        best_of_item = np.ones(len(feature), dtype=np.bool_)
        best_of_item[1:] = (feature[1:] != feature[:-1]) | (item[1:] != item[:-1])
        feature, score, item, user = (column[best_of_item] for column in (feature, score, item, user))

        order = np.lexsort((item, -score, feature))
        feature, score, item, user = feature[order], score[order], item[order], user[order]
        place = np.arange(len(feature)) - np.searchsorted(feature, feature, side="left")
        within = place < self.count
        slots = feature[within], place[within]
        self._values[slots], self._items[slots], self._users[slots] = score[within], item[within], user[within]

    def examples(
        self,
        feature: int,
        *,
        titles: Sequence[str] | None = None,
        attributes: ArrayLike | None = None,
        attribute_names: Sequence[str] = (),
    ) -> list[Example]:
        """The strongest items of one feature, strongest first; fewer than ``count`` where it fired on fewer.

        Args:
            feature: its index.
            titles: one per item.
            attributes: bool ``(n_items, A)``.
            attribute_names: A names.
        """
        table = None if attributes is None else np.asarray(attributes, dtype=np.bool_)
        found = []
        for value, item, user in zip(self._values[feature], self._items[feature], self._users[feature], strict=True):
            if item < 0:
                break
            names = () if table is None else tuple(attribute_names[int(one)] for one in np.flatnonzero(table[item]))
            title = str(item) if titles is None else titles[int(item)]
            found.append(Example(float(value) * self.direction, int(item), int(user), title, names))
        return found


def _checked(
    n_rows: int, items: Tensor | ArrayLike, users: Tensor | ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    item_array, user_array = _numpy(items).astype(np.int64), _numpy(users).astype(np.int64)
    if item_array.shape != (n_rows,) or user_array.shape != (n_rows,):
        raise ValueError(f"{n_rows} rows, but items of shape {item_array.shape} and users of {user_array.shape}")
    return item_array, user_array


def _numpy(values: Tensor | ArrayLike) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)
