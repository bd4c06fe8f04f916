"""A few test users from close by: their history, what fires on it, and what a plan changes for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saerec_fast.data import Dataset, attribute_shares
from saerec_fast.interpret.control import share_measure, valid_positions
from saerec_fast.pipeline import Run
from saerec_fast.recommender import iterate_hidden, site_module
from saerec_fast.recommender.evaluation import last_hidden, pad_histories
from saerec_fast.steering import attach, calibrate
from saerec_fast.study.browser import followed_attributes
from saerec_fast.types import Edit, SteeringPlan


@dataclass(frozen=True)
class CaseSettings:
    """Which users, and what is done to them.

    Attributes:
        n_users: how many.
        least_history: users with fewer items before their last one are not drawn from.
        n_recommended: length of the lists.
        n_features: features shown that are strongest at the last position, and as many over the history.
        n_reasons: titles of the history shown for each feature.
        added_share: a plan is as strong as gives its attribute this much more of the lists of a sample of users.
        n_sample: users in that sample, drawn from those the SAE was trained on.
        seed: of the draws.
    """

    n_users: int = 5
    least_history: int = 10
    n_recommended: int = 10
    n_features: int = 5
    n_reasons: int = 5
    added_share: float = 0.3
    n_sample: int = 200
    seed: int = 0

    @classmethod
    def quick(cls) -> CaseSettings:
        """Fewer users to calibrate on."""
        return cls(n_sample=50)


RULE = (
    "Test users with at least {least} items before their last one, ordered by the length of that history and cut into "
    "{count} groups of equal size; from each group one user drawn at random (seed {seed}), drawn again while the "
    "attribute that the history favours most against the training users' has been drawn already. Recommendations play "
    "no part in it. The plans go round the attributes with the best features on the users the SAE was trained on; each "
    "adds to its feature what raises the attribute's share of the top 10 by {added:.0%} of the list for a "
    "sample of {sample} of those users, or the 99th percentile of the feature's activations where nothing does."
)


def measure(run: Run, settings: CaseSettings, folder: Path) -> dict[str, Any]:
    """Users chosen by :func:`choose_users`, before and after a plan that turns one attribute up.

    Args:
        run: interpreted.
        settings: see there.
        folder: not used, it is a matter of seconds.

    Returns:
        ``{"rule", "users": [{"user", "history_length", "dominant_attribute", "history": [title], "features":
        [{"feature", "attributes", "activation", "at_last", "history_activation", "fired_share", "why": [title]}],
        "steered": {"attribute", "feature", "value", "calibrated", "plan"}, "before": [{"title", "score", "marked",
        "attributes"}], "after", "target", "target_rank_before", "target_rank_after"}]}``.
        The history is what the model reads of it, oldest first. ``activation`` is that at the last position,
        ``history_activation`` the mean over the history; ``at_last`` tells the features shown for the former from
        those for the latter. ``why`` are the titles where the feature fired, strongest first. ``marked`` items have
        the attribute of the plan. Ranks count from 1 among the items not in the history, and are None for a target
        that is in it.
    """
    dataset = run.split.test
    table = dataset.item_table
    names = run.result("data")["attributes"]
    columns = [table.attribute_names.index(name) for name in names]
    chosen = choose_users(dataset, table.attributes[:, columns], attribute_shares(run.split.train)[columns], settings)
    steered = _plans(run, settings)
    users = []
    for place, (user, dominant) in enumerate(chosen if steered else ()):
        sequence = dataset.sequence(user)
        history, target = sequence[:-1], int(sequence[-1])
        attribute, feature, value, calibrated = steered[place % len(steered)]
        plan = SteeringPlan([Edit(feature, "add", value)])
        before = case_scores(run, history)
        with attach(run.model, site_module(run.model, run.site), run.sae, plan, valid=valid_positions):
            after = case_scores(run, history)
        marked = table.attributes[:, table.attribute_names.index(attribute)]

        def listed(scores: np.ndarray, marked: np.ndarray = marked) -> list[dict[str, Any]]:
            best = np.argsort(-scores, kind="stable")[: settings.n_recommended]
            return [
                {
                    "title": table.titles[item],
                    "score": float(scores[item]),
                    "marked": bool(marked[item]),
                    "attributes": [table.attribute_names[i] for i in np.flatnonzero(table.attributes[item])],
                }
                for item in best
                if np.isfinite(scores[item])
            ]

        users.append(
            {
                "user": str(dataset.user_ids[user]),
                "history_length": len(history),
                "dominant_attribute": None if dominant is None else names[dominant],
                "history": [table.titles[item] for item in history[-run.model.config.max_length :]],
                "features": _features(run, dataset, user, settings),
                "steered": {
                    "attribute": attribute,
                    "feature": feature,
                    "value": value,
                    "calibrated": calibrated,
                    "plan": f"{attribute}: feature #{feature} {value:+.3g} (delta, all positions)",
                },
                "before": listed(before),
                "after": listed(after),
                "target": table.titles[target],
                "target_rank_before": rank_of(before, target),
                "target_rank_after": rank_of(after, target),
            }
        )
    rule = RULE.format(
        least=settings.least_history,
        count=settings.n_users,
        seed=settings.seed,
        added=settings.added_share,
        sample=settings.n_sample,
    )
    return {"rule": rule, "users": users}


def _plans(run: Run, settings: CaseSettings) -> list[tuple[str, int, float, bool]]:
    """Attribute, feature, what is added to it, and whether that was calibrated, for as many as there are users."""
    users = run.sae_users
    n_sample = min(settings.n_sample, users.n_users)
    chosen = np.random.default_rng(settings.seed).choice(users.n_users, n_sample, replace=False)
    sample = users.select_users(np.sort(chosen))
    statistics = run.saved_statistics("sae_train")
    found = []
    for attribute in run.steerable_attributes(settings.n_users):
        feature = run.feature_of(attribute)
        strong = float(statistics.quantiles[feature, -1])
        unit = SteeringPlan([Edit(feature, "add", strong)])
        measure = share_measure(run.model, sample, run.sae, run.site, attribute, popularity=run.popularity)
        share = min(measure(SteeringPlan()) + settings.added_share, 1.0)
        try:
            strength, calibrated = calibrate(unit, share, measure, tolerance=0.01, largest_factor=4.0).factor, True
        except ValueError:  # a feature that does not reach it, as those of little data
            strength, calibrated = 1.0, False
        found.append((attribute, feature, strength * strong, calibrated))
    return found


def choose_users(
    dataset: Dataset, attributes: np.ndarray, shares: np.ndarray, settings: CaseSettings
) -> list[tuple[int, int | None]]:
    """Users spread over history length and dominant attribute; see :data:`RULE`.

    An attribute dominates a history where its share there is the largest multiple of its share among the training
    interactions, of those that at least 3 of the history's items have.

    Args:
        dataset: to choose from.
        attributes: bool ``(n_items, A)``.
        shares: ``(A,)``, of the training interactions.
        settings: see there.

    Returns:
        For each, by rising length: the position in ``dataset``, and the dominant attribute, None where there is none.
        Fewer than ``n_users`` where there are fewer.
    """
    lengths = np.asarray(dataset.lengths) - 1
    able = np.flatnonzero(lengths >= settings.least_history)
    able = able[np.argsort(lengths[able], kind="stable")]
    generator = np.random.default_rng(settings.seed)
    chosen: list[tuple[int, int | None]] = []
    for group in np.array_split(able, settings.n_users):
        candidates = [
            (int(user), _dominant(attributes[dataset.sequence(int(user))[:-1]], shares))
            for user in generator.permutation(group)
        ]
        taken = {attribute for _, attribute in chosen}
        fresh = [one for one in candidates if one[1] is not None and one[1] not in taken]
        chosen += (fresh or candidates)[:1]
    return chosen


def _dominant(present: np.ndarray, shares: np.ndarray) -> int | None:
    """The attribute of a history ``(n, A)`` that is most frequent against ``shares``, None without one."""
    counts = present.sum(axis=0)
    multiple = np.where((counts >= 3) & (shares > 0), counts / np.maximum(shares, 1e-12), 0.0)
    return int(multiple.argmax()) if multiple.any() else None


@torch.inference_mode()
def case_scores(run: Run, history: np.ndarray) -> np.ndarray:
    """Scores of the catalogue for one history, float64 ``(n_items,)``, -inf for the items in it."""
    tokens = pad_histories([history], run.model.config.max_length)
    scores: np.ndarray = run.model.scores(last_hidden(run.model(tokens), tokens))[0].double().numpy()
    scores[history] = -np.inf
    return scores


def rank_of(scores: np.ndarray, item: int) -> int | None:
    """The place of an item from 1, ties by smallest index; None for one that is left out (``-inf``)."""
    if not np.isfinite(scores[item]):
        return None
    return 1 + int((scores > scores[item]).sum()) + int((scores[:item] == scores[item]).sum())


def _features(run: Run, dataset: Dataset, user: int, settings: CaseSettings) -> list[dict[str, Any]]:
    """The features strongest at the last position, then those strongest over the history that are not among them.

    Activations of different features compare as they are: decoder rows have unit norm, so that an activation is the
    length of what the feature adds to the hidden state.
    """
    history = dataset.sequence(user)[:-1][-run.model.config.max_length :]
    alone = Dataset(
        name=dataset.name,
        user_ids=dataset.user_ids[[user]],
        offsets=np.array([0, len(history)]),
        items=history,
        timestamps=None,
        item_table=dataset.item_table,
    )
    hidden, _, _ = next(iterate_hidden(run.model, alone, run.site))
    with torch.inference_mode():
        activations = run.sae.encode(hidden).dense().double().numpy()
    last, mean = activations[-1], activations.mean(axis=0)

    def strongest(values: np.ndarray) -> list[int]:
        order = np.argsort(-values, kind="stable")
        return [int(j) for j in order if values[j] > 0]

    at_last = strongest(last)[: settings.n_features]
    over_history = [j for j in strongest(mean) if j not in at_last][: settings.n_features]
    statistics = run.saved_statistics("sae_train")
    titles = dataset.item_table.titles
    return [
        {
            "feature": feature,
            "attributes": [name for _, name in followed_attributes(statistics, feature)],
            "activation": float(last[feature]),
            "at_last": feature in at_last,
            "history_activation": float(mean[feature]),
            "fired_share": float((activations[:, feature] > 0).mean()),
            "why": [titles[history[p]] for p in strongest(activations[:, feature])[: settings.n_reasons]],
        }
        for feature in [*at_last, *over_history]
    ]
