"""Popularity and item-kNN: what any sequence model has to beat. Both are called like a scorer of ``evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from saerec_fast.recommender.evaluation import item_popularity

if TYPE_CHECKING:
    from saerec_fast.data import Dataset

_PAIRS_PER_BLOCK = 1 << 24


class PopularityRecommender:
    """The items most training users have, ties by smallest index.

    Args:
        train: training users.
        exclude_seen: leave a history's items out of its list.
    """

    def __init__(self, train: Dataset, *, exclude_seen: bool = True) -> None:
        self.exclude_seen = exclude_seen
        self.ranking = np.argsort(-item_popularity(train), kind="stable")

    def __call__(self, histories: Sequence[np.ndarray], k: int) -> np.ndarray:
        """int64 ``(B, k)``, best first, -1 where there are fewer than k candidates."""
        lists = np.full((len(histories), k), -1, dtype=np.int64)
        for row, history in enumerate(histories):
            if self.exclude_seen:
                # k items are left in the first k + len(history), whatever the history holds.
                head = self.ranking[: k + len(history)]
                chosen = head[~np.isin(head, history)][:k]
            else:
                chosen = self.ranking[:k]
            lists[row, : len(chosen)] = chosen
        return lists


class ItemKNNRecommender:
    """Item-to-item neighbours by cosine over users who have both (Sarwar et al. 2001; Deshpande & Karypis 2004).

    ``similarity(i, j) = c_ij / (√(c_i c_j) + shrinkage)`` with ``c`` the number of training users. An item's score is
    the sum of its similarities to those items of the history that count it among their ``n_neighbours`` nearest. Items
    no neighbour reaches follow in order of popularity.

    By default the whole history counts, and all of it the same: the method of these papers, to which the order of a
    history means nothing. A ``history_length`` or a ``decay`` below 1 lets recent items say more, which on MovieLens
    makes a much stronger baseline of it. Other values of ``n_neighbours`` and ``shrinkage`` than the defaults are
    compared in docs/results.md.

    Args:
        train: training users.
        n_neighbours: neighbours kept per item.
        history_length: newest items of a history that count; ``None``: all.
        decay: weight of an item per step into the past (1 for the newest), in (0, 1].
        shrinkage: pulls the similarity of rare pairs towards 0, in users.
        exclude_seen: leave a history's items out of its list.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        train: Dataset,
        *,
        n_neighbours: int = 300,
        history_length: int | None = None,
        decay: float = 1.0,
        shrinkage: float = 0.0,
        exclude_seen: bool = True,
    ) -> None:
        if n_neighbours < 1:
            raise ValueError(f"n_neighbours: must be at least 1, got {n_neighbours}")
        if history_length is not None and history_length < 1:
            raise ValueError(f"history_length: must be at least 1, or None for all, got {history_length}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay: must lie in (0, 1], got {decay}")
        if shrinkage < 0:
            raise ValueError(f"shrinkage: must not be negative, got {shrinkage}")
        self.history_length = history_length
        self.decay = decay
        self.exclude_seen = exclude_seen
        self.popularity = item_popularity(train)
        n_items = len(self.popularity)
        self.neighbours, self.similarities = _nearest(
            *_user_item_pairs(train), n_items=n_items, n_neighbours=min(n_neighbours, n_items), shrinkage=shrinkage
        )

    def __call__(self, histories: Sequence[np.ndarray], k: int) -> np.ndarray:
        """int64 ``(B, k)``, best first, ties by smallest index, -1 where there are fewer than k candidates."""
        lists = np.full((len(histories), k), -1, dtype=np.int64)
        for row, history in enumerate(histories):
            newest_first = np.asarray(history)[::-1][: self.history_length].astype(np.int64)
            weights = self.decay ** np.arange(len(newest_first))
            votes = (weights[:, None] * self.similarities[newest_first]).reshape(-1)
            score: np.ndarray = np.bincount(
                self.neighbours[newest_first].reshape(-1), weights=votes, minlength=len(self.popularity)
            )
            # Far below any similarity: decides only among items without votes.
            score = score + 1e-9 * self.popularity
            if self.exclude_seen:
                score[history] = -np.inf
            chosen = _top(score, k)
            lists[row, : len(chosen)] = chosen
        return lists


def _user_item_pairs(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (user, item) pairs, sorted by user."""
    n_items = dataset.n_items
    user_of = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    pairs = np.unique(user_of * n_items + dataset.items)
    return pairs // n_items, pairs % n_items


def _nearest(
    users: np.ndarray, items: np.ndarray, *, n_items: int, n_neighbours: int, shrinkage: float
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours int64 and similarities float64, both ``(n_items, n_neighbours)``, similarity 0 where there are fewer.

    Co-occurrences are counted for a block of items at a time, from the histories of the users who have them: the full
    items × items table is never held, and the work is that of the pairs there are.
    """
    counts = np.bincount(items, minlength=n_items)
    norms = np.sqrt(counts)
    by_item = np.argsort(items, kind="stable")
    item_offsets = np.concatenate([[0], np.cumsum(counts)])
    lengths = np.bincount(users, minlength=int(users.max(initial=-1)) + 1)
    user_offsets = np.concatenate([[0], np.cumsum(lengths)])
    pairs_up_to = np.concatenate([[0], np.cumsum(lengths[users[by_item]])])[item_offsets]

    neighbours = np.zeros((n_items, n_neighbours), dtype=np.int64)
    similarities = np.zeros((n_items, n_neighbours))
    start = 0
    while start < n_items:
        within = int(np.searchsorted(pairs_up_to, pairs_up_to[start] + _PAIRS_PER_BLOCK, side="right")) - 1
        stop = min(max(within, start + 1), start + max(1, _PAIRS_PER_BLOCK // n_items), n_items)
        entries = by_item[item_offsets[start] : item_offsets[stop]]
        owners = users[entries]
        repeats = lengths[owners]
        offsets_in_user = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        partners = items[np.repeat(user_offsets[owners], repeats) + offsets_in_user]
        table = np.bincount(
            np.repeat(items[entries] - start, repeats) * n_items + partners, minlength=(stop - start) * n_items
        ).reshape(stop - start, n_items)
        similarity = table / np.maximum(norms[start:stop, None] * norms + shrinkage, 1e-12)
        similarity[np.arange(stop - start), np.arange(start, stop)] = 0.0
        for row, values in enumerate(similarity, start):
            nearest = _top(values, n_neighbours)
            neighbours[row] = nearest
            similarities[row] = values[nearest]
        start = stop
    return neighbours, similarities


def _top(score: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest finite scores, descending, ties by smallest index."""
    candidates = np.flatnonzero(np.isfinite(score))
    if len(candidates) > k:
        limit = np.partition(score[candidates], len(candidates) - k)[len(candidates) - k]
        candidates = candidates[score[candidates] >= limit]
    return candidates[np.argsort(-score[candidates], kind="stable")][:k]
