"""Which features carry popularity, and what turning them does to coverage, fairness of exposure and ranking quality.

Effect sizes between synthetic profiles of popular and of unpopular items, and steering by the features they single
out: Ahmadov & Mansoury, "Opening the Black Box: Interpretable Remedies for Popularity Bias in Recommender Systems",
arXiv 2508.17297.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerec_fast.api import linear_topk
from saerec_fast.data import Dataset
from saerec_fast.interpret.control import attribute_share, evaluate_steered
from saerec_fast.pipeline import Run
from saerec_fast.recommender import Metrics, SequenceRecommender, TransformerScorer, iterate_hidden
from saerec_fast.recommender.evaluation import last_hidden, pad_histories
from saerec_fast.recommender.training import progress_bar
from saerec_fast.steering.directions import contrastive_direction
from saerec_fast.study.browser import followed_attributes
from saerec_fast.types import Edit, Ragged, SteeringPlan


@dataclass(frozen=True)
class PopularitySettings:
    """The synthetic profiles, and the steering by what they tell apart.

    Attributes:
        n_profiles: of each kind.
        popular_deciles: the popular items are this many tenths of the catalogue, the most popular ones.
        long_tail_deciles: the long tail is this many tenths, the least popular ones.
        n_listed: features of each kind in the table.
        n_steered: features of each kind in a plan, at most.
        strengths: 1 carries what is edited from its mean over popular profiles to its mean over unpopular ones, and
            takes the whole logarithm of the popularity off the scores.
        n_bins: of the histogram of effect sizes.
        seed: of the profiles.
    """

    n_profiles: int = 1000
    popular_deciles: int = 1
    long_tail_deciles: int = 5
    n_listed: int = 10
    n_steered: int = 16
    strengths: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5)
    n_bins: int = 40
    seed: int = 0

    @classmethod
    def quick(cls) -> PopularitySettings:
        """Fewer profiles and strengths."""
        return cls(n_profiles=300, strengths=(0.25, 0.5, 1.0))


LABELS = {
    "popular_down": "popular features down",
    "long_tail_up": "long-tail features up",
    "both": "popular features down, long-tail features up",
    "contrastive": "contrastive direction (popular − unpopular profiles)",
    "logit_adjustment": "no steering: scores − strength · ln popularity",
}


def measure(run: Run, settings: PopularitySettings, folder: Path) -> dict[str, Any]:
    """Features of popularity, and the curves of steering by them on the test users.

    Popularity comes from the users the recommender was trained on, lengths of profiles from those of the SAE, so that
    nothing is chosen on the test users.
    Plans add to activations (``delta``, all positions): ``-strength`` times the difference of a feature's means over
    popular and unpopular profiles, which is its effect size times its pooled standard deviation. Beside them stands
    what needs no features, :class:`LogitAdjusted`.

    Args:
        run: interpreted.
        settings: see there.
        folder: gets ``effect_sizes.npy``, float64 ``(n_features,)``.

    Returns:
        ``{"profiles": {...}, "features": [{"feature", "kind": "popular" | "unpopular", "effect_size", "mean_popular",
        "mean_unpopular", "attributes": [name]}], "histogram": {"edges", "counts"} of the effect sizes of the features
        that fired, "baseline": {...}, "curves": [{"method", "label", "features": [id], "points": [{"strength",
        "ndcg@10", "coverage@10", "gini@10", "novelty@10", "long_tail_share"}]}]}``.

    Raises:
        ValueError: a catalogue of fewer than 10 items.
    """
    deciles = popularity_deciles(run.popularity)
    popular = np.flatnonzero(deciles < settings.popular_deciles)
    long_tail = np.flatnonzero(deciles >= 10 - settings.long_tail_deciles)
    users = run.sae_users
    generator = np.random.default_rng(settings.seed)
    longest = min(run.model.config.max_length, len(popular), len(long_tail))
    # The same lengths for both kinds, so that a difference between them is not one of length.
    lengths = np.minimum(generator.choice(users.lengths, settings.n_profiles), longest)
    hidden = [
        _last_hidden(run, profiles(users, items, lengths, name, generator))
        for name, items in (("popular", popular), ("unpopular", long_tail))
    ]
    with torch.inference_mode():
        activations = [run.sae.encode(states).dense().double().numpy() for states in hidden]
    effect = cohens_d(*activations)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "effect_sizes.npy", effect)
    means = [values.mean(axis=0) for values in activations]

    order = np.argsort(-effect, kind="stable")
    down = [int(j) for j in order[: settings.n_steered] if effect[j] > 0]
    up = [int(j) for j in order[::-1][: settings.n_steered] if effect[j] < 0]
    is_popular = torch.arange(2 * settings.n_profiles) < settings.n_profiles
    direction = contrastive_direction(torch.cat(hidden), is_popular, name="popularity")
    plans = {
        name: SteeringPlan([Edit(j, "add", float(means[1][j] - means[0][j])) for j in features])
        for name, features in (("popular_down", down), ("long_tail_up", up), ("both", [*down, *up]))
    }
    plans["contrastive"] = SteeringPlan([direction]).scaled(-1.0)

    in_long_tail = np.isin(np.arange(len(deciles)), long_tail)
    statistics = run.saved_statistics("sae_train")
    fired = (activations[0] > 0).any(axis=0) | (activations[1] > 0).any(axis=0)
    counts, edges = np.histogram(effect[fired], bins=settings.n_bins)

    def listed(feature: int, kind: str) -> dict[str, Any]:
        return {
            "feature": feature,
            "kind": kind,
            "effect_size": float(effect[feature]),
            "mean_popular": float(means[0][feature]),
            "mean_unpopular": float(means[1][feature]),
            "attributes": [name for _, name in followed_attributes(statistics, feature)],
        }

    return {
        "profiles": {
            "how": (
                f"{settings.n_profiles} profiles of each kind. Popular: items drawn uniformly, without repetition, "
                f"from the {len(popular)} most popular items of the training users "
                f"({settings.popular_deciles} of 10 deciles of the catalogue); unpopular: from the {len(long_tail)} "
                f"least popular ones, the long tail ({settings.long_tail_deciles} deciles). Lengths are drawn from "
                f"those of the SAE's training users, cut at {longest}, the same for both kinds. Read at the last "
                "position of a profile."
            ),
            "n_profiles": settings.n_profiles,
            "n_popular_items": len(popular),
            "n_long_tail_items": len(long_tail),
            "least_popularity_of_popular": float(run.popularity[popular].min()),
            "largest_popularity_of_long_tail": float(run.popularity[long_tail].max()),
            "mean_length": float(lengths.mean()),
            "seed": settings.seed,
        },
        "features": [
            *(listed(feature, "popular") for feature in down[: settings.n_listed]),
            *(listed(feature, "unpopular") for feature in up[: settings.n_listed]),
        ],
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "baseline": exposure_figures(run.evaluate(TransformerScorer(run.model)), in_long_tail),
        "curves": _curves(run, plans, settings.strengths, in_long_tail),
    }


def _curves(
    run: Run, plans: dict[str, SteeringPlan], strengths: tuple[float, ...], in_long_tail: np.ndarray
) -> list[dict[str, Any]]:
    def at(method: str, strength: float) -> Metrics:
        if method not in plans:
            return run.evaluate(LogitAdjusted(run.model, run.popularity, strength))
        plan = plans[method].scaled(strength)
        return evaluate_steered(run.model, run.split.test, run.sae, run.site, plan, popularity=run.popularity)

    curves: list[dict[str, Any]] = []
    with progress_bar(run.progress, "popularity", len(LABELS) * len(strengths)) as show:
        for method, label in LABELS.items():
            points: list[dict[str, float]] = []
            for strength in strengths:
                points.append({"strength": strength, **exposure_figures(at(method, strength), in_long_tail)})
                show(len(curves) * len(strengths) + len(points), method)
            features = [edit.feature for _, edit in plans[method].feature_edits] if method in plans else []
            curves.append({"method": method, "label": label, "features": features, "points": points})
    return curves


class LogitAdjusted:
    """Lists by ``score − strength · ln popularity``, seen items left out.

    The scores are those of a softmax trained on interactions, in which popularity is a prior: strength 1 takes it out
    (Menon et al., "Long-tail learning via logit adjustment", arXiv 2007.07314).

    Args:
        model: in eval mode.
        popularity: ``(n_items,)``, share of training users per item; 0 counts as the smallest share above 0.
        strength: of the adjustment; 0 leaves the model's own lists.
    """

    def __init__(self, model: SequenceRecommender, popularity: np.ndarray, strength: float) -> None:
        self.model = model
        known = np.maximum(popularity, popularity[popularity > 0].min())
        self.bias = torch.from_numpy(-strength * np.log(known)).float()

    @torch.inference_mode()
    def __call__(self, histories: Sequence[np.ndarray], k: int) -> np.ndarray:
        """int64 ``(B, k)``, as :class:`~saerec_fast.recommender.TransformerScorer`."""
        tokens = pad_histories(histories, self.model.config.max_length)
        last = last_hidden(self.model(tokens), tokens)
        seen = Ragged.from_lists([torch.from_numpy(np.asarray(history, np.int64)) for history in histories])
        found = linear_topk(last, self.model.item_embeddings, self.bias, k=min(k, len(self.bias)), exclude=seen)
        return np.pad(found.indices.numpy(), ((0, 0), (0, k - found.indices.shape[1])), constant_values=-1)


def popularity_deciles(popularity: np.ndarray) -> np.ndarray:
    """The tenth of the catalogue each item stands in by popularity: 0 for the most popular, 9 for the least.

    Equally popular items stand in the order of their indices, so that every tenth has its size.

    Args:
        popularity: ``(n_items,)``.

    Returns:
        int64 ``(n_items,)``.

    Raises:
        ValueError: fewer than 10 items.
    """
    n_items = len(popularity)
    if n_items < 10:
        raise ValueError(f"popularity: expected at least 10 items for deciles, got {n_items}")
    rank = np.empty(n_items, dtype=np.int64)
    rank[np.argsort(-popularity, kind="stable")] = np.arange(n_items)
    return rank * 10 // n_items


def profiles(
    users: Dataset, items: np.ndarray, lengths: np.ndarray, name: str, generator: np.random.Generator
) -> Dataset:
    """Synthetic histories: each draws its items uniformly, without repetition, from ``items``.

    Args:
        users: gives the item table.
        items: ``(m,)``, the item indices to draw from.
        lengths: ``(n_profiles,)``, from 1 to m.
        name: of the data set.
        generator: of the draws.
    """
    drawn = [generator.choice(items, length, replace=False) for length in lengths]
    return Dataset(
        name=name,
        user_ids=np.array([f"{name} {i}" for i in range(len(lengths))]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=np.concatenate(drawn),
        timestamps=None,
        item_table=users.item_table,
    )


def _last_hidden(run: Run, dataset: Dataset) -> Tensor:
    """Hidden states at the run's site and each history's last position, ``(n_users, d)``."""
    states = torch.cat([hidden for hidden, _, _ in iterate_hidden(run.model, dataset, run.site)])
    return states[torch.from_numpy(dataset.offsets[1:] - 1)]


def cohens_d(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cohen's d of every column: the difference of the means by the pooled standard deviation.

    Cohen, *Statistical Power Analysis for the Behavioral Sciences* (1988), 2.5, with unbiased variances.

    Args:
        first, second: ``(n_1, n)`` and ``(n_2, n)``, with at least 2 rows each.

    Returns:
        float64 ``(n,)``; 0 where a column varies within neither group, which leaves nothing to compare with.
    """
    freedom = len(first) + len(second) - 2
    pooled = ((len(first) - 1) * first.var(axis=0, ddof=1) + (len(second) - 1) * second.var(axis=0, ddof=1)) / freedom
    difference = first.mean(axis=0) - second.mean(axis=0)
    return np.divide(difference, np.sqrt(pooled), out=np.zeros(len(difference)), where=pooled > 0)


def gini(counts: np.ndarray) -> float:
    """The Gini coefficient of non-negative whole numbers: 0 where all are equal, (n − 1) / n where one has all.

    ``Σ_i (2i − n − 1) x_(i) / (n Σ x)`` over the ascending order (Sen 1973); exact up to the last division, and
    equal numbers may stand in any order.

    Args:
        counts: integers ``(n,)``, for instance how many lists each item of the catalogue stands in.

    Raises:
        ValueError: no numbers, negative ones, or all 0.
    """
    if not len(counts) or counts.min() < 0 or not counts.any():
        raise ValueError("counts: expected non-negative whole numbers that are not all 0")
    ordered = np.sort(counts.astype(np.int64))
    n = len(ordered)
    weights = 2 * np.arange(1, n + 1) - n - 1
    return int((weights * ordered).sum()) / (n * int(ordered.sum()))


def exposure_figures(metrics: Metrics, in_long_tail: np.ndarray) -> dict[str, float]:
    """NDCG, coverage, Gini of the items' exposure, novelty, and the share of long-tail items in the lists.

    Args:
        metrics: of lists of k items.
        in_long_tail: bool ``(n_items,)``.
    """
    k = metrics.k
    summary = metrics.summary()
    exposure = np.bincount(metrics.recommended[metrics.recommended >= 0], minlength=len(in_long_tail))
    return {
        f"ndcg@{k}": summary[f"ndcg@{k}"],
        f"coverage@{k}": summary[f"coverage@{k}"],
        f"gini@{k}": gini(exposure),
        f"novelty@{k}": summary[f"novelty@{k}"],
        "long_tail_share": attribute_share(metrics, in_long_tail),
    }
