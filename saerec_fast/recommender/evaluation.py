"""Leave-last-out ranking metrics over the full catalogue, with values per user for bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saerec_fast.api import linear_topk
from saerec_fast.types import Ragged

if TYPE_CHECKING:
    from saerec_fast.data import Dataset
    from saerec_fast.recommender.model import SequenceRecommender

Recommend = Callable[[Sequence[np.ndarray], int], np.ndarray]
"""``recommend(histories, k)``: item indices in time order, one non-empty array per row → int64 ``(B, k)``, best first,
-1 where a row has fewer than k candidates."""


@dataclass(frozen=True)
class Metrics:
    """What :func:`evaluate` measured. Users have one value each; lists may be several per user.

    With one relevant item at rank ``r`` (from 1) of the list, or outside it (every value then 0): NDCG@k is
    ``1 / log2(1 + r)`` (Järvelin & Kekäläinen 2002), the reciprocal rank ``1 / r``, HitRate 1, Precision ``1 / k``.

    Attributes:
        k: length of the lists.
        users: int64 ``(n_users,)``, positions in the evaluated data set; users without enough items are left out.
        ndcg, hit_rate, reciprocal_rank, precision: float64 ``(n_users,)``, in [0, 1].
        novelty: float64 ``(n_users,)``, bits: mean over the list of ``−log2 p(item)`` with ``p`` the share of
            training users who have the item (Zhou et al. 2010; Vargas & Castells 2011). An item no training user
            has counts as if one had it.
        coverage: share of the catalogue that stands in at least one list.
        diversity: inter-list diversity, mean over all pairs of lists of ``1 − |overlap| / k`` (Zhou et al. 2010);
            0 where there is one list only.
        recommended: int64 ``(n_lists, k)``, item indices, best first, -1 where there were fewer candidates.
        list_users: int64 ``(n_lists,)``, the user of each list, ascending.
        targets: int64 ``(n_lists,)``, the held-out item of each list.
    """

    k: int
    users: np.ndarray
    ndcg: np.ndarray
    hit_rate: np.ndarray
    reciprocal_rank: np.ndarray
    precision: np.ndarray
    novelty: np.ndarray
    coverage: float
    diversity: float
    recommended: np.ndarray
    list_users: np.ndarray
    targets: np.ndarray

    def per_user(self) -> dict[str, np.ndarray]:
        """The values per user under the names of :meth:`summary`."""
        return {
            f"ndcg@{self.k}": self.ndcg,
            f"hit_rate@{self.k}": self.hit_rate,
            f"mrr@{self.k}": self.reciprocal_rank,
            f"precision@{self.k}": self.precision,
            f"novelty@{self.k}": self.novelty,
        }

    def summary(self) -> dict[str, float]:
        """Means over users, with ``coverage@k`` and ``diversity@k``."""
        means = {name: float(values.mean()) for name, values in self.per_user().items()}
        return {**means, f"coverage@{self.k}": self.coverage, f"diversity@{self.k}": self.diversity}

    def intervals(
        self, *, n_resamples: int = 1000, seed: int = 0, level: float = 0.95
    ) -> dict[str, tuple[float, float]]:
        """:func:`bootstrap_interval` of every mean over users."""
        return {
            name: bootstrap_interval(values, n_resamples=n_resamples, seed=seed, level=level)
            for name, values in self.per_user().items()
        }


def evaluate(
    recommend: Recommend,
    dataset: Dataset,
    *,
    popularity: np.ndarray,
    k: int = 10,
    batch_size: int = 256,
    targets_per_user: int = 1,
) -> Metrics:
    """Leave-last-out: each user's last item is to be found among all items from the items before it.

    Args:
        recommend: a list of k items per history, such as :class:`TransformerScorer` or a baseline.
        dataset: users to evaluate on; those with fewer than 2 items are skipped.
        popularity: share of training users per item, from :func:`item_popularity`; used for novelty only.
        k: length of the lists.
        batch_size: histories per call of ``recommend``; memory only.
        targets_per_user: how many of a user's last items are targets, each predicted from everything before it.
            A user's value is the mean over them. More than 1 gives early stopping a steadier signal.

    Raises:
        ValueError: no user has 2 items, or ``popularity`` has another length than the catalogue.
    """
    n_items = dataset.n_items
    if popularity.shape != (n_items,):
        raise ValueError(f"popularity: expected shape ({n_items},), got {popularity.shape}")
    list_users, ends = _cases(dataset.offsets, targets_per_user)
    if not len(list_users):
        raise ValueError(f"{dataset.name}: no user has 2 items, nothing to evaluate")
    targets = dataset.items[ends].astype(np.int64)
    recommended = np.empty((len(list_users), k), dtype=np.int64)
    for start in range(0, len(list_users), batch_size):
        rows = slice(start, start + batch_size)
        histories = [
            dataset.items[dataset.offsets[user] : end] for user, end in zip(list_users[rows], ends[rows], strict=True)
        ]
        recommended[rows] = recommend(histories, k)
    return ranking_metrics(recommended, targets, list_users, popularity=popularity)


def ranking_metrics(
    recommended: np.ndarray, targets: np.ndarray, list_users: np.ndarray, *, popularity: np.ndarray
) -> Metrics:
    """Metrics of ready lists; arguments as the attributes of :class:`Metrics`, ``popularity`` ``(n_items,)``."""
    k = recommended.shape[1]
    match = recommended == targets[:, None]
    hit = match.any(axis=1)
    rank = np.where(hit, match.argmax(axis=1) + 1, 0)
    gain = np.where(hit, 1 / np.log2(1 + np.maximum(rank, 1)), 0.0)
    reciprocal = np.where(hit, 1 / np.maximum(rank, 1), 0.0)

    # The smallest positive share is what one user makes; an unseen item would otherwise be infinitely novel.
    positive = popularity[popularity > 0]
    information = -np.log2(np.maximum(popularity, positive.min() if len(positive) else 1.0))
    present = recommended >= 0
    length = np.maximum(present.sum(axis=1), 1)
    novelty = np.where(present, information[recommended], 0.0).sum(axis=1) / length

    users, first = np.unique(list_users, return_index=True)
    lists_of_user = np.diff(np.append(first, len(list_users)))

    def user_mean(values: np.ndarray) -> np.ndarray:
        mean: np.ndarray = np.add.reduceat(values.astype(np.float64), first) / lists_of_user
        return mean

    hit_rate = user_mean(hit)
    return Metrics(
        k=k,
        users=users,
        ndcg=user_mean(gain),
        hit_rate=hit_rate,
        reciprocal_rank=user_mean(reciprocal),
        precision=hit_rate / k,
        novelty=user_mean(novelty),
        coverage=float((_list_counts(recommended, len(popularity)) > 0).mean()),
        diversity=inter_list_diversity(recommended, len(popularity)),
        recommended=recommended,
        list_users=list_users,
        targets=targets,
    )


def inter_list_diversity(recommended: np.ndarray, n_items: int) -> float:
    """Mean over all pairs of lists ``(n_lists, k)`` of ``1 − |overlap| / k``; exact.

    An item that stands in ``c`` lists is shared by ``c (c − 1) / 2`` pairs, so no pair has to be visited.
    """
    n_lists, k = recommended.shape
    if n_lists < 2:
        return 0.0
    counts = _list_counts(recommended, n_items).astype(np.float64)
    shared = (counts * (counts - 1) / 2).sum()
    return float(1 - shared / (n_lists * (n_lists - 1) / 2) / k)


def _list_counts(recommended: np.ndarray, n_items: int) -> np.ndarray:
    return np.bincount(recommended[recommended >= 0], minlength=n_items)


def _cases(offsets: np.ndarray, targets_per_user: int) -> tuple[np.ndarray, np.ndarray]:
    """User and position in ``items`` of every target: the last ``targets_per_user`` of a user, never the first item."""
    n_targets = np.minimum(targets_per_user, np.maximum(np.diff(offsets) - 1, 0))
    users = np.repeat(np.arange(len(n_targets)), n_targets)
    steps = np.arange(len(users)) - np.repeat(np.cumsum(n_targets) - n_targets, n_targets)
    return users, (offsets[1:][users] - n_targets[users] + steps).astype(np.int64)


def item_popularity(dataset: Dataset) -> np.ndarray:
    """Share of users who have each item at least once, float64 ``(n_items,)``."""
    n_items = dataset.n_items
    user_of = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    pairs = np.unique(user_of * n_items + dataset.items)
    counts = np.bincount(pairs % n_items, minlength=n_items)
    return counts / max(dataset.n_users, 1)


def bootstrap_interval(
    values: np.ndarray, *, n_resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` ``(n,)`` (Efron 1979), resampling entries.

    Raises:
        ValueError: no values, or ``level`` outside (0, 1).
    """
    if not len(values):
        raise ValueError("values: empty, there is no mean to resample")
    if not 0 < level < 1:
        raise ValueError(f"level: must lie between 0 and 1, got {level}")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(n_resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pad_histories(histories: Sequence[np.ndarray], max_length: int) -> Tensor:
    """The newest ``max_length`` items of each history as tokens, int64 ``(B, L)``, padding 0 on the right.

    ``L`` is the longest that is left, at least 1.
    """
    lengths = [min(len(history), max_length) for history in histories]
    tokens = np.zeros((len(histories), max(lengths, default=1) or 1), dtype=np.int64)
    for row, (history, length) in enumerate(zip(histories, lengths, strict=True)):
        if length:
            tokens[row, :length] = np.asarray(history[-length:], dtype=np.int64) + 1
    return torch.from_numpy(tokens)


class TransformerScorer:
    """Lists from a :class:`~saerec_fast.recommender.model.SequenceRecommender`.

    Scores and top-k are fused, so that no (B, n_items) matrix is written. The model is simply called, so that hooks on
    it (steering) act as in any other forward pass.

    Args:
        model: in eval mode; it is not switched.
        exclude_seen: leave the items of a row's whole history out of its list, also those older than the model sees.
        before_batch: called with the tokens ``(B, L)`` of every batch ahead of the forward pass, for hooks that
            need to know which positions are valid (``tokens != 0``).
    """

    def __init__(
        self,
        model: SequenceRecommender,
        *,
        exclude_seen: bool = True,
        before_batch: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.model = model
        self.exclude_seen = exclude_seen
        self.before_batch = before_batch

    @torch.inference_mode()
    def __call__(self, histories: Sequence[np.ndarray], k: int) -> np.ndarray:
        """int64 ``(B, k)``, best first, ties by smallest item index, -1 where there are fewer candidates.

        Raises:
            ValueError: an empty history.
        """
        if any(len(history) == 0 for history in histories):
            raise ValueError("histories: a row is empty, the model needs at least one item")
        model = self.model
        tokens = pad_histories(histories, model.config.max_length).to(model.device)
        if self.before_batch is not None:
            self.before_batch(tokens)
        last = last_hidden(model(tokens), tokens)
        exclude = None
        if self.exclude_seen:
            ragged = Ragged.from_lists([torch.from_numpy(np.asarray(history, np.int64)) for history in histories])
            exclude = Ragged(ragged.offsets.to(model.device), ragged.ids.to(model.device))
        n_items = model.config.n_items
        top = linear_topk(last, model.item_embeddings, k=min(k, n_items), exclude=exclude).indices.cpu().numpy()
        return np.pad(top, ((0, 0), (0, k - top.shape[1])), constant_values=-1)


def last_hidden(hidden: Tensor, tokens: Tensor) -> Tensor:
    """The hidden state at each row's last token, ``(B, d)``.

    Args:
        hidden: ``(B, L, d)``.
        tokens: ``(B, L)``, padding 0 on the right, at least one token per row.
    """
    last = (tokens != 0).sum(dim=1) - 1
    return hidden[torch.arange(len(tokens), device=hidden.device), last]
