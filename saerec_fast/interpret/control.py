"""The control experiment: turn a feature up, watch an attribute's share of the top 10 and the ranking quality.

Protocol: Klenitskiy et al., arXiv 2507.12202, "flexible control": one feature is set to a constant, at all positions
or at each user's last one, and the rest of the network runs as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from saerec_fast.recommender import Metrics, SequenceRecommender, TransformerScorer, evaluate, site_module
from saerec_fast.sae import SparseAutoencoder
from saerec_fast.steering import attach
from saerec_fast.types import Edit, SteeringPlan

if TYPE_CHECKING:
    from saerec_fast.data import Dataset
    from saerec_fast.types.plan import Mode, Op


def valid_positions(tokens: Tensor) -> Tensor:
    """Non-padding positions of token ids ``(B, L)``: the ``valid`` of :func:`saerec_fast.steering.attach`."""
    return tokens != 0


def attribute_share(metrics: Metrics, has_attribute: np.ndarray) -> float:
    """Mean share of items with the attribute in the recommended lists. ``has_attribute`` is bool ``(n_items,)``."""
    present = metrics.recommended >= 0
    return float(has_attribute[metrics.recommended][present].mean())


def evaluate_steered(
    model: SequenceRecommender,
    dataset: Dataset,
    sae: SparseAutoencoder,
    site: str,
    plan: SteeringPlan,
    *,
    popularity: np.ndarray,
    batch_size: int = 256,
) -> Metrics:
    """Ranking metrics (leave-last-out, seen items filtered) with a plan attached at ``site``."""
    with attach(model, site_module(model, site), sae, plan, valid=valid_positions):
        return evaluate(TransformerScorer(model), dataset, popularity=popularity, batch_size=batch_size)


def share_measure(
    model: SequenceRecommender,
    dataset: Dataset,
    sae: SparseAutoencoder,
    site: str,
    attribute: str,
    *,
    popularity: np.ndarray,
    batch_size: int = 256,
) -> Callable[[SteeringPlan], float]:
    """The share of an attribute in the top 10 of a sample of users, as a function of a plan.

    It is what :func:`saerec_fast.steering.calibrate` asks for::

        calibrate(plan, 0.3, share_measure(model, sample, sae, site, "Horror", popularity=popularity))

    Args:
        model: in eval mode.
        dataset: the sample of users; none of their last items is needed.
        sae: trained on the model's hidden states at ``site``.
        site: name of the hidden state the SAE was trained on.
        attribute: name in the data set's item table.
        popularity: share of training users per item.
        batch_size: histories per forward pass; memory only.

    Raises:
        ValueError: no such attribute.
    """
    has_attribute = _has_attribute(dataset, attribute)

    def measure(plan: SteeringPlan) -> float:
        metrics = evaluate_steered(model, dataset, sae, site, plan, popularity=popularity, batch_size=batch_size)
        return attribute_share(metrics, has_attribute)

    return measure


def control_curve(
    model: SequenceRecommender,
    dataset: Dataset,
    sae: SparseAutoencoder,
    site: str,
    attribute: str,
    feature: int,
    values: Sequence[float],
    *,
    op: Op = "set",
    mode: Mode = "reconstruct",
    positions: str = "all",
    popularity: np.ndarray,
    batch_size: int = 256,
) -> list[dict[str, Any]]:
    """Share of an attribute against NDCG@10 over the values of one feature.

    Args:
        model: in eval mode.
        dataset: users to evaluate on.
        sae: trained on the model's hidden states at ``site``.
        site: name of the hidden state the SAE was trained on.
        attribute: name in the data set's item table.
        feature: feature to edit.
        values: strengths, in units of the activation.
        op: edit, ``set`` in the paper.
        mode: ``reconstruct`` (the paper's) or ``delta``.
        positions: ``all`` or ``last``.
        popularity: share of training users per item.
        batch_size: histories per forward pass; memory only.

    Returns:
        Per value ``{"attribute", "feature", "op", "mode", "positions", "value", "share", "ndcg@10", "hit_rate@10"}``.

    Raises:
        ValueError: no such attribute, site or feature, or a value that is not finite.
    """
    has_attribute = _has_attribute(dataset, attribute)
    plan = SteeringPlan([Edit(feature, op, 0.0)], mode=mode, positions=positions)  # type: ignore[arg-type]
    points = []
    with attach(model, site_module(model, site), sae, plan, valid=valid_positions) as handle:
        for value in values:
            handle.update(strengths=[value])
            metrics = evaluate(TransformerScorer(model), dataset, popularity=popularity, batch_size=batch_size)
            points.append(
                {
                    "attribute": attribute,
                    "feature": feature,
                    "op": op,
                    "mode": mode,
                    "positions": positions,
                    "value": float(value),
                    **control_figures(metrics, has_attribute),
                }
            )
    return points


def control_figures(metrics: Metrics, has_attribute: np.ndarray) -> dict[str, float]:
    """The figures of one point: the attribute's share of the lists, NDCG@10 and HitRate@10."""
    return {
        "share": attribute_share(metrics, has_attribute),
        "ndcg@10": float(metrics.ndcg.mean()),
        "hit_rate@10": float(metrics.hit_rate.mean()),
    }


def _has_attribute(dataset: Dataset, attribute: str) -> np.ndarray:
    """Which items have an attribute, bool ``(n_items,)``."""
    names = dataset.item_table.attribute_names
    if attribute not in names:
        raise ValueError(f"attribute: expected one of {', '.join(names)}, got {attribute!r}")
    column: np.ndarray = dataset.item_table.attributes[:, names.index(attribute)]
    return column
