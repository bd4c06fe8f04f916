"""Ways to turn one attribute up or down, each a plan of unit strength made from the users the SAE was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from saerec_fast.interpret import attribute_plan
from saerec_fast.sae import ActivationStore
from saerec_fast.steering import contrastive_direction
from saerec_fast.types import Direction, Edit, SteeringPlan

if TYPE_CHECKING:
    from saerec_fast.pipeline import Run
    from saerec_fast.study.steered_ranking import SteeredRanking
    from saerec_fast.types.plan import Mode

Source = Literal["single", "several", "several_push", "contrastive", "even_push"]
Op = Literal["set", "add", "scale"]
Positions = Literal["all", "last"]

_SOURCES: dict[Source, str] = {
    "single": "the feature that correlates most with the attribute",
    "several": "the features that correlate most with the attribute, weighted by correlation",
    "several_push": "features whose decoder rows together raise the scores of the attribute's items evenly",
    "contrastive": "the mean hidden state of items with the attribute less that of the others",
    "even_push": "the direction that raises the scores of the attribute's items evenly and leaves the others",
}
_LABELS: dict[Source, str] = {
    "single": "one feature",
    "several": "several features, by correlation",
    "several_push": "several features, by what they push",
    "contrastive": "contrast of means",
    "even_push": "even push",
}


@dataclass(frozen=True)
class Method:
    """A way to steer.

    Attributes:
        name: short, for tables.
        source: which features or direction; one of the keys that :meth:`sentence` explains.
        op: what is done to a feature; directions are added.
        mode: of the plan.
        positions: of the plan.
        sign: 1 turns the attribute up, -1 down.
        per_user: every user gets a strength of its own (:mod:`saerec_fast.study.doses`).
    """

    name: str
    source: Source
    op: Op
    mode: Mode
    positions: Positions
    sign: int = 1
    per_user: bool = False

    @property
    def label(self) -> str:
        done = {"set": "set", "add": "add" if self.sign > 0 else "subtract", "scale": "scale"}[self.op]
        if self.op == "set" and self.sign < 0:
            done = "set to 0"
        suffix = ", reconstructed" if self.mode == "reconstruct" else ""
        suffix += ", per user" if self.per_user else ""
        return f"{_LABELS[self.source]}: {done}, {self.positions} positions{suffix}"

    @property
    def sentence(self) -> str:
        kept = "the SAE's error is kept" if self.mode == "delta" else "the hidden state is replaced by the decoded one"
        where = "at every position" if self.positions == "all" else "at the last position only"
        dose = " Each user's strength is the one that loses least expected NDCG for the share." if self.per_user else ""
        return f"{self.label.split(': ')[1].split(',')[0].capitalize()} {_SOURCES[self.source]}, {where}; {kept}.{dose}"

    def as_dict(self) -> dict[str, Any]:
        """For the page."""
        return {
            "name": self.name,
            "label": self.label,
            "what": self.sentence,
            "source": self.source,
            "op": self.op,
            "mode": self.mode,
            "positions": self.positions,
        }


REFERENCE = "set_reconstruct_all"

UP: tuple[Method, ...] = (
    Method(REFERENCE, "single", "set", "reconstruct", "all"),
    Method("set_reconstruct_last", "single", "set", "reconstruct", "last"),
    Method("set_delta_all", "single", "set", "delta", "all"),
    Method("set_delta_last", "single", "set", "delta", "last"),
    Method("add_delta_all", "single", "add", "delta", "all"),
    Method("add_delta_last", "single", "add", "delta", "last"),
    Method("scale_delta_all", "single", "scale", "delta", "all"),
    Method("several_add_all", "several", "add", "delta", "all"),
    Method("several_add_last", "several", "add", "delta", "last"),
    Method("several_push_last", "several_push", "add", "delta", "last"),
    Method("contrastive_all", "contrastive", "add", "delta", "all"),
    Method("contrastive_last", "contrastive", "add", "delta", "last"),
    Method("even_push_all", "even_push", "add", "delta", "all"),
    Method("even_push_last", "even_push", "add", "delta", "last"),
    Method("add_delta_all_per_user", "single", "add", "delta", "all", per_user=True),
    Method("even_push_all_per_user", "even_push", "add", "delta", "all", per_user=True),
    Method("even_push_last_per_user", "even_push", "add", "delta", "last", per_user=True),
)
DOWN: tuple[Method, ...] = (
    Method("zero_reconstruct_all", "single", "set", "reconstruct", "all", -1),
    Method("zero_delta_all", "single", "set", "delta", "all", -1),
    Method("several_zero_all", "several", "set", "delta", "all", -1),
    Method("several_zero_last", "several", "set", "delta", "last", -1),
    Method("subtract_feature_last", "single", "add", "delta", "last", -1),
    Method("subtract_several_push_last", "several_push", "add", "delta", "last", -1),
    Method("subtract_contrastive_all", "contrastive", "add", "delta", "all", -1),
    Method("subtract_contrastive_last", "contrastive", "add", "delta", "last", -1),
    Method("subtract_even_push_all", "even_push", "add", "delta", "all", -1),
    Method("subtract_even_push_last", "even_push", "add", "delta", "last", -1),
    Method("subtract_feature_last_per_user", "single", "add", "delta", "last", -1, per_user=True),
    Method("subtract_even_push_last_per_user", "even_push", "add", "delta", "last", -1, per_user=True),
)


class PlanMaker:
    """Plans of unit strength for any method and attribute.

    Everything is taken from users whom the SAE was trained on.

    Args:
        run: with a finished interpretation.
        sample: those users, or some of them.
        n_several: features that a method with several of them takes.
        ridge: penalty of the even push, in units of the mean variance of what a unit of a dimension pushes.
    """

    def __init__(self, run: Run, sample: SteeredRanking, *, n_several: int, ridge: float) -> None:
        self.run, self.sample = run, sample
        self.n_several, self.ridge = n_several, ridge
        self.statistics = run.saved_statistics("sae_train")
        self._pushes: dict[Positions, Tensor] = {}

    def plan(self, method: Method, attribute: str) -> SteeringPlan:
        """The plan whose :meth:`~saerec_fast.types.SteeringPlan.scaled` strengths make a method's curve.

        A feature is set, or added to, by the 99th percentile of its activations (times its weight, where there are
        several); ``scale`` doubles it; a contrast is added once; an even push raises the attribute's items by 1 logit
        over the others. A feature that is turned down by ``set`` is set to 0 at any strength.

        Raises:
            ValueError: no such attribute, or one too rare to have statistics.
        """
        if method.source == "several":
            assert method.op != "scale"
            return attribute_plan(
                self.statistics,
                attribute,
                count=self.n_several,
                suppress=method.sign < 0,
                op=method.op,
                mode=method.mode,
                positions=method.positions,
            )
        edits: list[Edit | Direction]
        if method.source == "contrastive":
            edits = [self._contrast(attribute)]
        elif method.source == "even_push":
            edits = [self._even_push(attribute, method.positions)]
        else:
            weights = self._features(method, attribute)
            if method.op == "set" and method.sign < 0:
                weights = dict.fromkeys(weights, 0.0)
            elif method.op == "scale":
                weights = dict.fromkeys(weights, 2.0)
            edits = [Edit(feature, method.op, value) for feature, value in weights.items()]
        plan = SteeringPlan(edits, mode=method.mode, positions=method.positions)
        return plan.scaled(-1.0) if method.sign < 0 and method.op == "add" else plan

    def has_attribute(self, attribute: str) -> np.ndarray:
        """Which items have an attribute, bool ``(n_items,)``."""
        table = self.run.split.test.item_table
        column: np.ndarray = table.attributes[:, table.attribute_names.index(attribute)]
        return column

    def _features(self, method: Method, attribute: str) -> dict[int, float]:
        """Features and how much of each, at unit strength."""
        if method.source == "single":
            feature = self.run.feature_of(attribute)
            return {feature: float(np.nan_to_num(self.statistics.quantiles[feature, -1]))}
        return self._pushing_features(attribute, method.positions)

    def _contrast(self, attribute: str) -> Direction:
        labels = torch.from_numpy(self.has_attribute(attribute)[self._store.items])
        return contrastive_direction(self._store, labels, attribute)

    def _even_push(self, attribute: str, positions: Positions) -> Direction:
        """Weighted ridge regression of the attribute on what every dimension of the site pushes."""
        pushes, label, roots = self._regression(attribute, positions)
        gram = pushes.T @ pushes
        penalty = self.ridge * float(np.trace(gram)) / len(gram)
        vector = np.linalg.solve(gram + penalty * np.eye(len(gram)), pushes.T @ label)
        return Direction(torch.from_numpy(vector / self._lift(pushes @ vector, label, roots)), name=attribute)

    def _pushing_features(self, attribute: str, positions: Positions) -> dict[int, float]:
        """Features to add: non-negative least squares of the attribute on what every feature pushes, the largest
        weights kept and fitted anew."""
        pushes, label, roots = self._regression(attribute, positions)
        decoder = self.run.sae.folded_weights().W_dec.detach().double().numpy()
        alive = np.flatnonzero(self.statistics.fired_counts)
        design = pushes @ decoder[alive].T
        weights, _ = nnls(design, label, maxiter=10 * design.shape[1])
        chosen = np.argsort(-weights, kind="stable")[: self.n_several]
        weights, _ = nnls(design[:, chosen], label, maxiter=10 * design.shape[1])
        unit = self._lift(design[:, chosen] @ weights, label, roots)
        return {int(alive[one]): float(w / unit) for one, w in zip(chosen, weights, strict=True) if w > 0}

    @staticmethod
    def _lift(pushed: np.ndarray, label: np.ndarray, roots: np.ndarray) -> float:
        """By how much the scores of items with the attribute rise over those of the others, in weighted means."""
        present = label > 0
        weights = roots**2
        return float(
            np.average(pushed[present] / roots[present], weights=weights[present])
            - np.average(pushed[~present] / roots[~present], weights=weights[~present])
        )

    def _regression(self, attribute: str, positions: Positions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pushes ``(n_items, d)`` and label ``(n_items,)``, both centred and times the root of each item's weight
        ``(n_items,)``: how likely the recommender finds it, since only such items move in and out of lists."""
        embeddings = self.run.model.item_embeddings.detach().double()
        pushes = (embeddings @ self._push(positions).T).numpy()
        weights = self._likelihood
        label = self.has_attribute(attribute).astype(np.float64)
        roots = np.sqrt(weights)
        centred = pushes - weights @ pushes
        return centred * roots[:, None], (label - weights @ label) * roots, roots

    def _push(self, positions: Positions) -> Tensor:
        """How much the head's input moves, on average, per unit of every dimension of the site: ``(d, d)`` float64,
        by central differences of half a standard deviation."""
        if positions not in self._pushes:
            step = 0.5 * self._store.mean_std()[1]
            rows = []
            for unit in torch.eye(self._store.d_model) * step:
                moved = [
                    self.sample.final_hidden(SteeringPlan([Direction(sign * unit)], positions=positions)).double()
                    for sign in (1, -1)
                ]
                rows.append((moved[0] - moved[1]).mean(0) / (2 * step))
            self._pushes[positions] = torch.stack(rows)
        return self._pushes[positions]

    @cached_property
    def _store(self) -> ActivationStore:
        """The hidden states that the SAE was trained on."""
        return ActivationStore(self.run.folder / "activations" / "store")

    @cached_property
    def _likelihood(self) -> np.ndarray:
        """Mean probability of every item over the sample, untouched; float64 ``(n_items,)``, sum 1."""
        with torch.inference_mode():
            final = self.sample.final_hidden(SteeringPlan())
            scores = self.run.model.scores(final).double()
            found: np.ndarray = torch.softmax(scores, dim=1).mean(0).numpy()
        return found
