"""The control experiment against lists that are made one user at a time, without padding, with a dense ranking."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from untrained import untrained_recommender

from saerec_fast.data import Dataset, Split, split_users, synthetic_dataset
from saerec_fast.interpret.control import (
    attribute_share,
    control_curve,
    control_figures,
    evaluate_steered,
    share_measure,
    valid_positions,
)
from saerec_fast.recommender import (
    Metrics,
    SequenceRecommender,
    TransformerScorer,
    evaluate,
    item_popularity,
    site_module,
)
from saerec_fast.recommender.evaluation import ranking_metrics
from saerec_fast.sae import SparseAutoencoder
from saerec_fast.steering import calibrate
from saerec_fast.types import Direction, Edit, ReLU, SteeringPlan, TopK

WIDTH = 16
ATTRIBUTE = "attribute 1"


@pytest.fixture(scope="module")
def split() -> Split:
    return split_users(synthetic_dataset(n_users=150, n_items=70, n_attributes=4, seed=1, mean_length=20.0), seed=1)


@pytest.fixture(scope="module")
def model(split: Split) -> SequenceRecommender:
    return untrained_recommender(split.n_items, WIDTH)


@pytest.fixture(scope="module")
def popularity(split: Split) -> np.ndarray:
    return item_popularity(split.train)


def make_sae(activation: Any) -> SparseAutoencoder:
    return SparseAutoencoder(
        WIDTH, 40, activation, mean=0.1, std=1.3, generator=torch.Generator().manual_seed(2)
    ).eval()


def has_attribute(dataset: Dataset, attribute: str = ATTRIBUTE) -> np.ndarray:
    table = dataset.item_table
    return table.attributes[:, table.attribute_names.index(attribute)]


def n_hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def by_hand(
    model: SequenceRecommender, dataset: Dataset, sae: SparseAutoencoder, site: str, plan: SteeringPlan
) -> tuple[float, float, float]:
    """Share, NDCG@10 and HitRate@10, one user at a time."""

    def steer(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return sae.steer(output[0], plan), *output[1:]
        return sae.steer(output, plan)

    hook = site_module(model, site).register_forward_hook(steer)
    flags = has_attribute(dataset)
    shares, gains = [], []
    for user in range(dataset.n_users):
        items = dataset.sequence(user).astype(np.int64)
        if len(items) < 2:
            continue
        history, target = items[:-1], items[-1]
        tokens = torch.from_numpy(history[-model.config.max_length :] + 1)[None]
        scores: Tensor = model.scores(model(tokens)[0, -1])
        scores[torch.from_numpy(history)] = -math.inf
        top = scores.argsort(descending=True)[:10].tolist()
        shares += flags[top].tolist()
        gains.append(1 / math.log2(2 + top.index(target)) if target in top else 0.0)
    hook.remove()
    return float(np.mean(shares)), float(np.mean(gains)), float(np.mean(np.array(gains) > 0))


@pytest.mark.parametrize("site", ["block.0", "last"])
@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize(("op", "activation"), [("set", ReLU()), ("add", TopK(6)), ("scale", ReLU())])
def test_curve(
    model: SequenceRecommender, split: Split, popularity: np.ndarray, site: str, mode: Any, positions: Any, op: Any,
    activation: Any,
) -> None:  # fmt: skip
    sae, dataset, values = make_sae(activation), split.test, [0.0, 1.5, 4]
    points = control_curve(
        model, dataset, sae, site, ATTRIBUTE, 7, values,
        op=op, mode=mode, positions=positions, popularity=popularity, batch_size=7,
    )  # fmt: skip
    assert [point["value"] for point in points] == values
    for point in points:
        plan = SteeringPlan([Edit(7, op, point["value"])], mode=mode, positions=positions)
        share, ndcg, hit_rate = by_hand(model, dataset, sae, site, plan)
        assert point == {
            "attribute": ATTRIBUTE,
            "feature": 7,
            "op": op,
            "mode": mode,
            "positions": positions,
            "value": point["value"],
            "share": pytest.approx(share),
            "ndcg@10": pytest.approx(ndcg),
            "hit_rate@10": pytest.approx(hit_rate),
        }
    assert n_hooks(model) == 0


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
def test_a_feature_along_the_attribute_raises_its_share(
    model: SequenceRecommender, split: Split, popularity: np.ndarray, mode: Any
) -> None:
    """At the last site scores are linear in the hidden state, so that the effect of a direction is known."""
    sae, flags = make_sae(ReLU()), torch.from_numpy(has_attribute(split.test))
    items = model.item_embeddings.detach()
    with torch.no_grad():
        sae.W_dec[5] = items[flags].mean(0) - items[~flags].mean(0)
    points = control_curve(
        model, split.test, sae, "last", ATTRIBUTE, 5, [0.0, 5.0, 20.0, 100.0], mode=mode, popularity=popularity
    )
    shares = [point["share"] for point in points]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0] + 0.1
    assert all(0 <= point["ndcg@10"] <= point["hit_rate@10"] <= 1 for point in points)


def test_a_wanted_share_is_reached(model: SequenceRecommender, split: Split, popularity: np.ndarray) -> None:
    sae, flags = make_sae(ReLU()), torch.from_numpy(has_attribute(split.test))
    items = model.item_embeddings.detach()
    plan = SteeringPlan([Direction(items[flags].mean(0) - items[~flags].mean(0), 10.0)], positions="last")
    measure = share_measure(model, split.test, sae, "last", ATTRIBUTE, popularity=popularity)
    before, strong = measure(SteeringPlan()), measure(plan)
    for share in (before + 0.25 * (strong - before), before + 0.75 * (strong - before)):
        found = calibrate(plan, share, measure, tolerance=0.01)
        assert found.share == pytest.approx(share, abs=0.01)
        steered = evaluate_steered(model, split.test, sae, "last", found.plan, popularity=popularity)
        assert attribute_share(steered, has_attribute(split.test)) == found.share
    with pytest.raises(ValueError, match=r"attribute: expected one of attribute 0, .*got 'attribute 9'"):
        share_measure(model, split.test, sae, "last", "attribute 9", popularity=popularity)


def test_nothing_to_change_is_the_untouched_model(
    model: SequenceRecommender, split: Split, popularity: np.ndarray
) -> None:
    untouched = evaluate(TransformerScorer(model), split.test, popularity=popularity)
    empty = evaluate_steered(model, split.test, make_sae(ReLU()), "block.0", SteeringPlan(), popularity=popularity)
    assert np.array_equal(empty.recommended, untouched.recommended)
    (neutral,) = control_curve(
        model, split.test, make_sae(ReLU()), "block.0", ATTRIBUTE, 3, [1.0],
        op="scale", mode="delta", popularity=popularity,
    )  # fmt: skip
    figures = control_figures(untouched, has_attribute(split.test))
    assert {name: neutral[name] for name in figures} == figures
    assert set(figures) == {"share", "ndcg@10", "hit_rate@10"}


def test_reconstruction_alone(model: SequenceRecommender, split: Split, popularity: np.ndarray) -> None:
    sae, plan = make_sae(TopK(6)), SteeringPlan(mode="reconstruct")
    metrics = evaluate_steered(model, split.test, sae, "block.1", plan, popularity=popularity, batch_size=5)
    share, ndcg, _ = by_hand(model, split.test, sae, "block.1", plan)
    assert attribute_share(metrics, has_attribute(split.test)) == pytest.approx(share)
    assert metrics.ndcg.mean() == pytest.approx(ndcg)


def test_errors_leave_the_model_as_it_was(model: SequenceRecommender, split: Split, popularity: np.ndarray) -> None:
    def curve(attribute: str = ATTRIBUTE, feature: int = 1, value: float = 1.0, **options: Any) -> Any:
        site = options.pop("site", "block.0")
        return control_curve(
            model, split.test, make_sae(ReLU()), site, attribute, feature, [value], popularity=popularity, **options
        )

    for arguments, message in (
        ({"attribute": "Horror"}, r"attribute: expected one of attribute 0, .*, got 'Horror'"),
        ({"feature": 40}, r"feature.* 39, got 40"),
        ({"value": float("nan")}, r"strengths: expected finite"),
        ({"site": "block.7"}, r"site: unknown 'block.7'"),
        ({"op": "multiply"}, r"op: expected one of"),
        ({"positions": "first"}, r"positions: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            curve(**arguments)  # type: ignore[arg-type]
        assert n_hooks(model) == 0


def test_share_counts_what_was_recommended() -> None:
    lists = np.array([[0, 1, 2], [3, -1, -1], [1, 3, -1]])
    metrics: Metrics = ranking_metrics(lists, np.array([1, 0, 3]), np.arange(3), popularity=np.full(4, 0.5))
    assert attribute_share(metrics, np.array([True, False, False, True])) == pytest.approx(3 / 6)
    assert attribute_share(metrics, np.zeros(4, dtype=bool)) == 0.0


def test_valid_positions() -> None:
    assert valid_positions(torch.tensor([[3, 1, 0]])).tolist() == [[True, True, False]]
