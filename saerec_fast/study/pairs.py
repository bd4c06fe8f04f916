"""Two attributes turned up at once, beside each of them alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from saerec_fast.interpret.control import attribute_share, evaluate_steered
from saerec_fast.pipeline import Run
from saerec_fast.recommender import Metrics, TransformerScorer
from saerec_fast.recommender.training import progress_bar
from saerec_fast.types import Edit, SteeringPlan


@dataclass(frozen=True)
class PairSettings:
    """Which pairs, and how strongly.

    Attributes:
        n_pairs: at most.
        n_attributes: the pairs are made of this many attributes, the best steerable ones.
        least_both: pairs that at least this many items of the catalogue belong to come first: a list can hold no
            items with both where there are hardly any.
        strengths: what is added to each feature, in units of the 99th percentile of its activations.
    """

    n_pairs: int = 3
    n_attributes: int = 6
    least_both: int = 20
    strengths: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75, 1.0)

    @classmethod
    def quick(cls) -> PairSettings:
        """One pair, two strengths."""
        return cls(n_pairs=1, strengths=(0.25, 0.5))


def measure(run: Run, settings: PairSettings, folder: Path) -> dict[str, Any]:
    """Shares and NDCG@10 with two features turned up by one plan, and with each alone, on the test users.

    Attributes, features and the unit of the strengths are chosen on the users the SAE was trained on. Plans add to
    the activations (``delta``, all positions).

    Args:
        run: interpreted.
        settings: see there.
        folder: not used, a pair takes seconds.

    Returns:
        ``{"pairs": [{"attributes": [a, b], "features": [i, j], "items_with_both", "untouched": figures, "points":
        [{"strength", **figures}], "single": [{"attribute", "feature", "points"}, ..]}]}`` where figures are
        ``{"shares": [of a, of b], "both": share of items with both, "ndcg@10"}``. No pairs where fewer than two
        attributes have features of their own.
    """
    statistics = run.saved_statistics("sae_train")
    table = run.split.test.item_table
    column = {name: table.attributes[:, i] for i, name in enumerate(table.attribute_names)}
    attributes = run.steerable_attributes(settings.n_attributes)
    chosen = choose_pairs(attributes, column, settings.n_pairs, settings.least_both)
    untouched = run.evaluate(TransformerScorer(run.model))
    features = {name: run.feature_of(name) for pair in chosen for name in pair}
    edits = {name: Edit(j, "add", float(statistics.quantiles[j, -1])) for name, j in features.items()}

    pairs: list[dict[str, Any]] = []
    done = 0
    with progress_bar(run.progress, "pairs", len(chosen) * 3 * len(settings.strengths)) as show:
        for pair in chosen:
            present = np.stack([column[name] for name in pair])
            curves = []
            for names in (pair, pair[:1], pair[1:]):
                plan = SteeringPlan([edits[name] for name in names])
                points = []
                for strength in settings.strengths:
                    metrics = evaluate_steered(
                        run.model, run.split.test, run.sae, run.site, plan.scaled(strength), popularity=run.popularity
                    )
                    points.append({"strength": strength, **pair_figures(metrics, present)})
                    done += 1
                    show(done, " and ".join(names))
                curves.append(points)
            pairs.append(
                {
                    "attributes": list(pair),
                    "features": [features[name] for name in pair],
                    "items_with_both": int(present.all(axis=0).sum()),
                    "untouched": pair_figures(untouched, present),
                    "points": curves[0],
                    "single": [
                        {"attribute": name, "feature": features[name], "points": points}
                        for name, points in zip(pair, curves[1:], strict=True)
                    ],
                }
            )
    return {"pairs": pairs}


def choose_pairs(
    attributes: list[str], column: dict[str, np.ndarray], count: int, least_both: int
) -> list[tuple[str, str]]:
    """The first pairs of ranked attributes: those that enough items belong to, then the others.

    Args:
        attributes: best first.
        column: bool ``(n_items,)`` for each, which items have it.
        count: how many pairs.
        least_both: see :class:`PairSettings`.
    """
    # By the rank of the worse of the two, so that every pair of the best three comes before any with the fourth.
    ranked = sorted(combinations(range(len(attributes)), 2), key=lambda pair: (pair[1], pair[0]))
    pairs = [(attributes[i], attributes[j]) for i, j in ranked]
    return sorted(pairs, key=lambda pair: bool((column[pair[0]] & column[pair[1]]).sum() < least_both))[:count]


def pair_figures(metrics: Metrics, present: np.ndarray) -> dict[str, Any]:
    """The share of each attribute and of both in the lists, and NDCG. ``present`` is bool ``(2, n_items)``."""
    return {
        "shares": [attribute_share(metrics, one) for one in present],
        "both": attribute_share(metrics, present[0] & present[1]),
        f"ndcg@{metrics.k}": float(metrics.ndcg.mean()),
    }
