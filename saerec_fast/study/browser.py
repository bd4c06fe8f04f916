"""What every feature stands for, on one card: its attributes, items, activations, pushes and neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerec_fast.interpret import FeatureStatisticsResult
from saerec_fast.pipeline import Run
from saerec_fast.recommender import iterate_hidden
from saerec_fast.recommender.training import progress_bar


@dataclass(frozen=True)
class BrowserSettings:
    """How much a card holds. The cards are embedded in a page, so that every entry counts a thousandfold.

    Attributes:
        n_attributes: attributes a feature follows, at most.
        least_correlation: attributes that correlate less with a feature are not named.
        n_top: titles on which the feature is strongest.
        n_pushed: titles pushed up, and as many pushed down.
        n_nearest: nearest features.
        n_bins: of the histogram.
    """

    n_attributes: int = 3
    least_correlation: float = 0.1
    n_top: int = 4
    n_pushed: int = 3
    n_nearest: int = 3
    n_bins: int = 10

    @classmethod
    def quick(cls) -> BrowserSettings:
        """The same: nothing here takes long."""
        return cls()


def measure(run: Run, settings: BrowserSettings, folder: Path) -> dict[str, Any]:
    """A card for every feature that fired for the test users.

    Attributes are chosen by their correlation on the users the SAE was trained on; the correlation shown is that on the
    test users. Pushes are what one unit of activation adds to the scores of items, see :func:`item_pushes`. Numbers
    are rounded to three significant digits: they are for display.

    Args:
        run: interpreted.
        settings: how much a card holds.
        folder: not used, nothing here is worth keeping apart from the result.

    Returns:
        ``{"site", "push_is_exact", "features": [{"feature", "attributes": [{"name", "correlation"}], "firing_rate",
        "top": [{"title", "value"}], "histogram": {"edges", "counts"}, "up": [{"title", "push"}], "down": [..],
        "nearest": [{"feature", "cosine"}]}]}``; ``push_is_exact`` is false where layers follow the site.
    """
    statistics, chosen_on = run.saved_statistics("sae"), run.saved_statistics("sae_train")
    examples = run.saved_examples("sae")
    titles = run.split.test.item_table.titles
    living = np.flatnonzero(statistics.fired_counts > 0)
    decoder = run.sae.W_dec.detach()[torch.from_numpy(living)]
    counts = activation_histograms(run, statistics.maximum, settings.n_bins)
    neighbours, cosines = nearest_features(decoder, settings.n_nearest)

    cards = []
    for place, feature in enumerate(living.tolist()):
        push = item_pushes(run, feature)
        order = np.argsort(-push, kind="stable")
        edges = np.linspace(0, statistics.maximum[feature], settings.n_bins + 1)
        cards.append(
            {
                "feature": feature,
                "attributes": [
                    {"name": name, "correlation": _short(statistics.correlation[feature, column])}
                    for column, name in followed_attributes(
                        chosen_on, feature, settings.n_attributes, settings.least_correlation
                    )
                    if np.isfinite(statistics.correlation[feature, column])
                ],
                "firing_rate": _short(statistics.firing_rate[feature]),
                "top": [
                    {"title": one["title"], "value": _short(one["value"])}
                    for one in examples[feature][: settings.n_top]
                ],
                "histogram": {"edges": [_short(edge) for edge in edges], "counts": counts[feature].tolist()},
                "up": [{"title": titles[item], "push": _short(push[item])} for item in order[: settings.n_pushed]],
                "down": [
                    {"title": titles[item], "push": _short(push[item])} for item in order[::-1][: settings.n_pushed]
                ],
                "nearest": [
                    {"feature": int(living[other]), "cosine": _short(cosine)}
                    for other, cosine in zip(neighbours[place], cosines[place], strict=True)
                ],
            }
        )
    return {"site": run.site, "push_is_exact": run.site == "last", "features": cards}


def followed_attributes(
    statistics: FeatureStatisticsResult, feature: int, count: int = 3, least_correlation: float = 0.1
) -> list[tuple[int, str]]:
    """Column and name of the attributes that correlate most with a feature, most first."""
    correlation = np.nan_to_num(statistics.correlation[feature], nan=-1.0)
    order = np.argsort(-correlation, kind="stable")[:count]
    return [(int(i), statistics.attribute_names[i]) for i in order if correlation[i] >= least_correlation]


def activation_histograms(run: Run, maximum: np.ndarray, n_bins: int) -> np.ndarray:
    """How often each feature was how active for the test users, where it fired.

    Args:
        run: its model, SAE and test users.
        maximum: ``(n_features,)``, the largest activation of each, where the last bin ends; bins start at 0. Features
            whose maximum is 0 are not counted.
        n_bins: of equal width.

    Returns:
        int64 ``(n_features, n_bins)``.
    """
    dataset, sae = run.split.test, run.sae
    counts = np.zeros(sae.n_features * n_bins, dtype=np.int64)
    awake = torch.from_numpy(maximum > 0)
    done = 0
    with progress_bar(run.progress, "activation histograms", dataset.n_interactions) as show:
        for hidden, _, _ in iterate_hidden(run.model, dataset, run.site):
            with torch.inference_mode():
                encoded = sae.encode(hidden)
            # Rounding may wake a feature here that slept when the maxima were taken: it has no card and no bins.
            fired = ((encoded.values > 0) & awake[encoded.indices.long()]).numpy()
            features = encoded.indices.numpy()[fired].astype(np.int64)
            share = encoded.values.numpy()[fired].astype(np.float64) / maximum[features]
            bins = np.minimum((share * n_bins).astype(np.int64), n_bins - 1)
            counts += np.bincount(features * n_bins + bins, minlength=len(counts))
            done += len(hidden)
            show(done, "")
    return counts.reshape(sae.n_features, n_bins)


def item_pushes(run: Run, feature: int) -> np.ndarray:
    """What one unit of a feature's activation adds to the score of every item, ``W_dec[feature] · item embedding``.

    Exact where the SAE reads the last hidden state (site ``last``), which the head multiplies with the item
    embeddings. At an earlier site it is a first-order reading: what the residual stream carries straight to the head,
    without the final layer norm and without what the layers in between make of it.

    Returns:
        float64 ``(n_items,)``, in units of the scores.
    """
    with torch.inference_mode():
        direction = run.sae.W_dec[feature] * run.sae.std
        push: np.ndarray = (run.model.item_embeddings @ direction).double().numpy()
    return push


def nearest_features(decoder: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a decoder with the largest cosine to each row, itself left out.

    Args:
        decoder: ``(n, d)``.
        count: how many; fewer come back where there are fewer rows.

    Returns:
        int64 and float64 ``(n, min(count, n - 1))``: the rows, nearest first, ties by smallest row, and the cosines.
    """
    unit = torch.nn.functional.normalize(decoder.detach().double(), dim=1)
    count = max(min(count, len(unit) - 1), 0)
    rows, cosines = [np.empty((0, count), np.int64)], [np.empty((0, count))]
    # Block by block: all pairs of a large dictionary would not fit the memory.
    for start in range(0, len(unit), 1024):
        block = (unit[start : start + 1024] @ unit.T).numpy()
        own = np.arange(len(block))
        block[own, start + own] = -np.inf
        order = np.argsort(-block, axis=1, kind="stable")[:, :count]
        rows.append(order)
        cosines.append(np.take_along_axis(block, order, axis=1))
    return np.concatenate(rows), np.concatenate(cosines)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
