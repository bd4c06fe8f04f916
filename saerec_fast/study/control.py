"""Control: how much ranking quality each way of steering keeps, for every attribute, up and down.

After "flexible control" of Klenitskiy et al., arXiv 2507.12202, whose way is the reference: one feature is set to a
constant at all positions and the hidden state replaced by what is decoded. Methods, features and strengths are chosen
on users whom the SAE was trained on; all figures are measured on the test users.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saerec_fast.files import read_json, write_json
from saerec_fast.interpret.control import attribute_share
from saerec_fast.recommender.training import progress_bar
from saerec_fast.steering import calibrate
from saerec_fast.study.control_methods import DOWN, REFERENCE, UP, Method, PlanMaker
from saerec_fast.study.doses import DosedLists
from saerec_fast.study.steered_ranking import SteeredRanking
from saerec_fast.types import SteeringPlan

if TYPE_CHECKING:
    from saerec_fast.data import Dataset
    from saerec_fast.pipeline import Run


@dataclass(frozen=True)
class StudyControlSettings:
    """The control section of the study.

    Attributes:
        attributes: which; empty: all whose share of the untouched lists of SAE users is at least ``minimum_share``.
        minimum_share: between 0 and 1.
        multiples: of the original share that the curves go through, above 1 and ascending.
        multiple: of the original share at which methods are compared.
        largest_share: shares above it are not aimed at. An attribute that would need more at ``multiple`` is named, and
            left out of the comparison.
        calibrated_multiples: of the original share that the calibrated plan aims at.
        share_left: of the original share that suppression aims at.
        doses: strengths, in units of a plan, among which a method with a strength of its own for every user chooses.
        methods: names among :data:`~saerec_fast.study.control_methods.UP` and ``DOWN``; empty: all. The reference
            is always there.
        n_several: features that methods with several of them take.
        ridge: see :class:`~saerec_fast.study.control_methods.PlanMaker`.
        sample_users: SAE users that strengths are chosen on, at most.
        test_users: users that are measured, at most.
        seed: of the users drawn and of the bootstrap.
    """

    attributes: tuple[str, ...] = ()
    minimum_share: float = 0.02
    multiples: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    multiple: float = 6.0
    largest_share: float = 0.9
    calibrated_multiples: tuple[float, ...] = (2.0, 4.0)
    share_left: float = 0.2
    doses: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 11.0)
    methods: tuple[str, ...] = ()
    n_several: int = 8
    ridge: float = 0.1
    sample_users: int = 400
    test_users: int = 2000
    seed: int = 0

    @classmethod
    def quick(cls) -> StudyControlSettings:
        """A few methods on a coarse grid."""
        return cls(
            multiples=(2.0, 4.0, 8.0),
            calibrated_multiples=(2.0,),
            methods=(
                "set_reconstruct_last",
                "add_delta_all",
                "contrastive_last",
                "even_push_last",
                "even_push_last_per_user",
                "zero_reconstruct_all",
                "several_zero_all",
                "subtract_even_push_last",
                "subtract_even_push_last_per_user",
            ),
            sample_users=150,
            test_users=500,
        )


@dataclass(frozen=True)
class _Point:
    """One plan, measured: ``ndcg (n_users,)`` per user."""

    strength: float
    share: float
    ndcg: np.ndarray

    def as_dict(self) -> dict[str, float]:
        return {"strength": self.strength, "share": self.share, "ndcg@10": float(self.ndcg.mean())}


def measure(run: Run, settings: StudyControlSettings, folder: Path) -> dict[str, Any]:
    """The section ``control``: curves, methods compared at one share, calibrated plans, suppression.

    Every attribute is kept in ``folder`` once it is done, and reused by a later call with the same settings.

    Args:
        run: with a finished interpretation.
        settings: what is measured.
        folder: of this section.

    Raises:
        ValueError: an attribute or a method that there is not.
    """
    up, down = _chosen(UP, settings.methods), _chosen(DOWN, settings.methods)
    known = {method.name for method in (*UP, *DOWN)}
    if unknown := set(settings.methods) - known:
        raise ValueError(f"methods: expected names among {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    names = run.result("data")["attributes"]
    if unknown := set(settings.attributes) - set(names):
        raise ValueError(f"attributes: expected names among {', '.join(names)}, got {', '.join(sorted(unknown))}")
    sample = _ranking(run, run.sae_users, settings.sample_users, settings.seed)
    test = _ranking(run, run.split.test, settings.test_users, settings.seed)
    maker = PlanMaker(run, sample, n_several=settings.n_several, ridge=settings.ridge)
    attributes = list(settings.attributes) or _common_attributes(run, maker, settings.minimum_share)
    # What one attribute's figures depend on, which other attributes there are is not among it.
    identity = json.loads(
        json.dumps({"settings": asdict(replace(settings, attributes=())), "run": run.digest("interpretation")})
    )
    parts = []
    with progress_bar(run.progress, "control", len(attributes)) as show:
        for done, attribute in enumerate(attributes):
            show(done, attribute)
            path = folder / f"attribute-{run.split.test.item_table.attribute_names.index(attribute)}.json"
            if not path.exists() or read_json(path)["identity"] != identity:
                experiment = _Experiment(maker, sample, test, attribute, settings)
                write_json(path, {"identity": identity, "part": experiment.run(up, down)})
            parts.append(read_json(path)["part"])
            show(done + 1, attribute)
    return _assemble(parts, up, down, settings)


class _Experiment:
    """All that is measured of one attribute."""

    def __init__(
        self,
        maker: PlanMaker,
        sample: SteeredRanking,
        test: SteeredRanking,
        attribute: str,
        settings: StudyControlSettings,
    ) -> None:
        self.maker, self.sample, self.test = maker, sample, test
        self.attribute, self.settings = attribute, settings
        self.has_attribute = maker.has_attribute(attribute)
        self.untouched = self._measured(test, SteeringPlan(), 0.0)
        self.on_sample = self._measured(sample, SteeringPlan(), 0.0)

    def run(self, up: Sequence[Method], down: Sequence[Method]) -> dict[str, Any]:
        """Plain JSON, with the NDCG of every user where the comparison needs it."""
        curves, per_user, sample_kept = [], {}, {}
        for method in up:
            tried, points = self._curve(method)
            curves.append({"attribute": self.attribute, "method": method.name, "points": [p.as_dict() for p in points]})
            at_share = ndcg_at_share([self.untouched, *points], self.settings.multiple * self.untouched.share)
            per_user[method.name] = None if at_share is None else at_share.tolist()
            at_share = ndcg_at_share(tried, self.settings.multiple * self.on_sample.share)
            sample_kept[method.name] = None if at_share is None else _ratio(at_share.mean(), self.on_sample.ndcg.mean())
        return {
            "attribute": self.attribute,
            "share": self.untouched.share,
            "ndcg": self.untouched.ndcg.tolist(),
            "curves": curves,
            "at_share": per_user,
            "kept_on_sample": sample_kept,
            "calibrated": [one for method in up for one in self._calibrated(method)],
            "suppression": [self._suppressed(method) for method in down],
        }

    def _curve(self, method: Method) -> tuple[list[_Point], list[_Point]]:
        """What was tried on the sample, from strength 0 on, and the curve on the test users.

        A dose is a strength for all users, or the price of each user's own.
        """
        plan, settings = self.maker.plan(method, self.attribute), self.settings
        start = self.on_sample.share
        wanted = [one * start for one in settings.multiples if one * start <= settings.largest_share]
        # At least as far as methods are compared, whatever the curve goes through.
        compared = min(settings.multiple * start, settings.largest_share)
        if method.per_user:
            on_sample, on_test = self._dosed(method, plan)
            doses = [on_sample.price(share) for share in sorted({*wanted, compared})]
            tried = [self.on_sample, *(_Point(*on_sample.at(price)) for price in doses)]
        else:
            tried = self._tried(plan, max([*wanted, compared]) if start else settings.largest_share)
            doses = strengths_for(wanted or [settings.largest_share], tried)

        def on_test_users(dose: float) -> _Point:
            if method.per_user:
                return _Point(*on_test.at(dose))
            return self._measured(self.test, plan.scaled(dose), dose)

        points, dose = [on_test_users(dose) for dose in doses], doses[-1]
        # The sample's share may be below that of the test users: the curve has to reach what is compared.
        target = settings.multiple * self.untouched.share
        while target <= settings.largest_share and points[-1].share < target and points[-1].strength < 2 * LARGEST:
            dose *= 1.3
            points.append(on_test_users(dose))
            if points[-1].share <= points[-2].share:
                break
        return tried, points

    def _dosed(self, method: Method, plan: SteeringPlan) -> tuple[DosedLists, DosedLists]:
        """Of the sample, where prices are found, and of the test users."""
        on_sample, on_test = (
            DosedLists.measure(ranking, plan, self.settings.doses, self.has_attribute, sign=method.sign)
            for ranking in (self.sample, self.test)
        )
        return on_sample, on_test

    def _tried(self, plan: SteeringPlan, share: float) -> list[_Point]:
        """Points of the sample at growing strengths, until the share is passed."""
        points = [self.on_sample]
        rises = share > self.on_sample.share
        strength = SMALLEST
        while strength <= LARGEST and (
            len(points) < 2 or (points[-1].share < share if rises else points[-1].share > share)
        ):
            points.append(self._measured(self.sample, plan.scaled(strength), strength))
            strength *= GROWTH
        return points

    def _calibrated(self, method: Method) -> list[dict[str, Any]]:
        """The plan calibrated on the sample and measured on the test users."""
        if method.name not in CALIBRATED:
            return []
        found = []
        for multiple in self.settings.calibrated_multiples:
            target = multiple * self.on_sample.share
            if target > self.settings.largest_share:
                continue
            try:
                calibration = calibrate(
                    self.maker.plan(method, self.attribute),
                    target,
                    lambda plan: self._measured(self.sample, plan, 1.0).share,
                )
            except ValueError:  # no strength reaches the share; the curve shows how far the method gets
                continue
            point = self._measured(self.test, calibration.plan, calibration.factor)
            found.append(
                {
                    "attribute": self.attribute,
                    "method": method.name,
                    "target": target,
                    "share_on_sample": calibration.share,
                    **point.as_dict(),
                }
            )
        return found

    def _suppressed(self, method: Method) -> dict[str, Any]:
        """What leaves ``share_left`` on the sample, or as near to it as the method gets: a strength, or a price."""
        plan = self.maker.plan(method, self.attribute)
        wanted = [left * self.on_sample.share for left in (0.75, 0.5, self.settings.share_left)]
        if method.per_user:
            on_sample, on_test = self._dosed(method, plan)
            points = [_Point(*on_test.at(on_sample.price(share))) for share in wanted]
        else:
            strengths = strengths_for(wanted, self._tried(plan, wanted[-1])) if method.op == "add" else [1.0]
            points = [self._measured(self.test, plan.scaled(strength), strength) for strength in strengths]
        kept = [suppression(point.share, point.ndcg, self.untouched.share, self.untouched.ndcg) for point in points]
        return {
            "attribute": self.attribute,
            "method": method.name,
            **kept[-1],
            "points": [{**point.as_dict(), **figures} for point, figures in zip(points, kept, strict=True)],
        }

    def _measured(self, ranking: SteeredRanking, plan: SteeringPlan, strength: float) -> _Point:
        metrics = ranking.metrics(plan)
        return _Point(float(strength), attribute_share(metrics, self.has_attribute), metrics.ndcg)


CALIBRATED = (REFERENCE, "contrastive_last", "even_push_last")
"""Methods whose calibration is shown."""


# Strengths tried on the sample, in units of a plan: geometric, so that few measurements cover any plan.
SMALLEST, GROWTH, LARGEST = 0.125, 1.5, 64.0


def strengths_for(wanted: Sequence[float], tried: Sequence[_Point]) -> list[float]:
    """Strengths at which the share passes each of ``wanted`` for the first time, linear between what was tried.

    The strength that came nearest to the last of them stands for those that were not reached.

    Args:
        wanted: shares, ever further above, or ever further below, the first one tried.
        tried: by ascending strength from 0 on, at least two.

    Returns:
        Ascending, distinct, at least one.
    """
    direction = 1.0 if wanted[-1] > tried[0].share else -1.0
    strengths, shares = [point.strength for point in tried], [direction * point.share for point in tried]
    found = {crossing(strengths, shares, direction * share) for share in wanted}
    if None in found:
        found.add(strengths[1 + int(np.argmax(shares[1:]))])
    return sorted(one for one in found if one)


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Where ``y`` over ``x`` first rises through ``level``, linear in between; ``None`` where it never does."""
    for i in range(len(y) - 1):
        if y[i] < level <= y[i + 1]:
            return float(x[i] + (x[i + 1] - x[i]) * (level - y[i]) / (y[i + 1] - y[i]))
    return None


def ndcg_at_share(points: Sequence[_Point], share: float) -> np.ndarray | None:
    """NDCG of every user where the share first rises to ``share``; ``points`` by ascending strength."""
    place = crossing(list(range(len(points))), [point.share for point in points], share)
    if place is None:
        return None
    before = min(int(place), len(points) - 2)
    weight = place - before
    found: np.ndarray = (1 - weight) * points[before].ndcg + weight * points[before + 1].ndcg
    return found


def suppression(
    share: float, ndcg: np.ndarray, untouched_share: float, untouched_ndcg: np.ndarray
) -> dict[str, float | None]:
    """What is left of the share, ``None`` where there was none, and of NDCG."""
    return {
        "share_left": share / untouched_share if untouched_share else None,
        "ndcg_kept": _ratio(ndcg.mean(), untouched_ndcg.mean()),
    }


def _chosen(methods: Sequence[Method], names: Sequence[str]) -> list[Method]:
    return [method for method in methods if not names or method.name in names or method.name == REFERENCE]


def _ranking(run: Run, dataset: Dataset, n_users: int, seed: int) -> SteeredRanking:
    """Of at most so many users, drawn among those who have a target."""
    users = np.flatnonzero(np.diff(dataset.offsets) >= 2)
    if len(users) > n_users:
        users = np.sort(np.random.default_rng(seed).choice(users, n_users, replace=False))
    return SteeredRanking(run.model, dataset.select_users(users), run.sae, run.site, popularity=run.popularity)


def _common_attributes(run: Run, maker: PlanMaker, minimum_share: float) -> list[str]:
    """Attributes with enough of a share in the untouched lists of the sample, most common first."""
    metrics = maker.sample.metrics(SteeringPlan())
    shares = {
        name: attribute_share(metrics, maker.has_attribute(name))
        for name in run.result("data")["attributes"]
        if maker.statistics.top_features(name, 1)
    }
    return sorted((name for name, share in shares.items() if share >= minimum_share), key=lambda name: -shares[name])


def _assemble(
    parts: Sequence[dict[str, Any]], up: Sequence[Method], down: Sequence[Method], settings: StudyControlSettings
) -> dict[str, Any]:
    suppressed = [one for part in parts for one in part["suppression"]]
    return {
        "attributes": [part["attribute"] for part in parts],
        "baseline": {
            part["attribute"]: {"share": part["share"], "ndcg@10": float(np.mean(part["ndcg"]))} for part in parts
        },
        "methods": [method.as_dict() for method in (*up, *down)],
        "curves": [curve for part in parts for curve in part["curves"]],
        "at_share": compare_at_share(parts, [method.name for method in up], settings),
        "calibrated": [one for part in parts for one in part["calibrated"]],
        "suppression": suppressed,
        "suppression_summary": [
            _suppression_summary(method.name, [one for one in suppressed if one["method"] == method.name])
            for method in down
        ],
    }


def _suppression_summary(method: str, suppressed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over attributes: of the strongest point, and of every one where all attributes have as many."""
    counts = {len(one["points"]) for one in suppressed}
    places = range(min(counts)) if len(counts) == 1 else [-1]
    means = [
        {key: _mean([one["points"][place][key] for one in suppressed]) for key in ("share_left", "ndcg_kept")}
        for place in places
    ]
    strongest = means[-1] if suppressed else {"share_left": None, "ndcg_kept": None}
    return {"method": method, **strongest, "attributes": len(suppressed), "points": means if suppressed else []}


def compare_at_share(
    parts: Sequence[dict[str, Any]], methods: Sequence[str], settings: StudyControlSettings, *, n_resamples: int = 1000
) -> dict[str, Any]:
    """NDCG kept at a multiple of the original share: its mean over attributes, with an interval over users.

    Users are drawn with replacement, the same ones for every attribute and method; the strengths stay as they are.
    A method is compared with the reference over the attributes in which both reach the share. ``chosen`` is the method
    that keeps most on the sample, where a share that is not reached keeps nothing.

    Args:
        parts: ``attribute``, ``share``, ``ndcg`` (per user), ``at_share`` (per method and user, or ``None``) and
            ``kept_on_sample`` (per method).
        methods: names.
        settings: ``multiple`` and ``largest_share``.
        n_resamples: of the bootstrap (percentile, 95 %).
    """
    compared = [part for part in parts if settings.multiple * part["share"] <= settings.largest_share]
    draws = np.random.default_rng(settings.seed)
    n_users = len(parts[0]["ndcg"]) if parts else 0
    # How often each user was drawn: a resampled mean is then a product. The first row is the users as they are.
    counts = np.ones((1 + n_resamples, n_users))
    if n_users:
        counts[1:] = draws.multinomial(n_users, np.full(n_users, 1 / n_users), size=n_resamples)
    kept: dict[str, dict[str, np.ndarray]] = {method: {} for method in methods}
    for part in compared:
        untouched = counts @ np.asarray(part["ndcg"])
        for method in methods:
            if part["at_share"][method] is not None and untouched[0] > 0:
                steered = counts @ np.asarray(part["at_share"][method])
                # Of few users, a draw may hold none whose item was found.
                kept[method][part["attribute"]] = np.divide(
                    steered, untouched, out=np.full_like(steered, np.nan), where=untouched > 0
                )
    rows: list[dict[str, Any]] = []
    for method in methods:
        both = [name for name in kept[method] if name in kept[REFERENCE]]
        relative: np.ndarray | None = None
        if both:
            reference = _over(kept[REFERENCE], both)
            relative = np.divide(
                _over(kept[method], both), reference, out=np.full_like(reference, np.nan), where=reference > 0
            )
        on_sample = [part["kept_on_sample"][method] or 0.0 for part in compared]
        rows.append(
            {
                "method": method,
                "ndcg_kept_on_sample": _mean(on_sample),
                "ndcg_kept": _interval(_over(kept[method], list(kept[method])) if kept[method] else None),
                "relative_to_reference": _interval(relative)[0],
                "relative_interval": _interval(relative),
                "attributes": {
                    part["attribute"]: float(kept[method][part["attribute"]][0])
                    if part["attribute"] in kept[method]
                    else None
                    for part in compared
                },
            }
        )
    best = max(rows, key=lambda row: row["ndcg_kept_on_sample"] or 0.0)
    return {
        "chosen": best["method"],
        "multiple": settings.multiple,
        "reference": REFERENCE,
        "methods": rows,
        "left_out": [part["attribute"] for part in parts if part not in compared],
    }


def _over(kept: dict[str, np.ndarray], attributes: Sequence[str]) -> np.ndarray:
    mean: np.ndarray = np.mean([kept[name] for name in attributes], axis=0)
    return mean


def _interval(values: np.ndarray | None) -> list[float | None]:
    """The first value, and the middle 95 % of the others."""
    if values is None or not np.isfinite(values[0]):
        return [None, None, None]
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (None, None)
    return [float(values[0]), None if low is None else float(low), None if high is None else float(high)]


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
