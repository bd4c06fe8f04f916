"""One self-contained HTML page about a trained recommender, its SAE and what steering does.

The page holds its own style, figures and script and fetches nothing. Parts without data are left out of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from saerec_fast.files import write_text
from saerec_fast.interpret import figures
from saerec_fast.interpret.examples import Example, TopExamples
from saerec_fast.interpret.statistics import Estimate, FeatureStatisticsResult, Summary

try:
    import jinja2
    from markupsafe import Markup
except ImportError as error:
    raise ImportError("reports need jinja2: pip install saerec-fast[study]") from error

_METRIC_LABELS = {
    "ndcg@10": "NDCG@10",
    "hit_rate@10": "HitRate@10",
    "mrr@10": "MRR@10",
    "precision@10": "Precision@10",
    "coverage@10": "Coverage@10",
    "novelty@10": "Novelty@10",
    "diversity@10": "Diversity@10",
}


@dataclass(frozen=True)
class DataDescription:
    """What the data is.

    Attributes:
        name: of the data set.
        counts: label → number, such as ``{"Users": 943, "Items": 1349}``.
        parts: part of the split → number of users, such as ``{"train": 500, "test": 142}``.
        attribute_shares: attribute → share of interactions, drawn in this order.
        notes: what was dropped, which fall-back was taken.
    """

    name: str
    counts: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    attribute_shares: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ModelMetrics:
    """One row of a table of recommendation quality.

    Attributes:
        name: such as "Transformer", "Popularity", "Item-kNN".
        metrics: metric (``"ndcg@10"``, ``"hit_rate@10"``, …) → value with its interval over users.
        note: shown beside the name.
        lead: for a baseline, NDCG@10 of the recommender minus the baseline's, user by user, with its interval. It
            decides the comparison where it is given; two intervals that overlap do not.
    """

    name: str
    metrics: Mapping[str, Estimate]
    note: str = ""
    lead: Estimate | None = None


@dataclass(frozen=True)
class SaeQuality:
    """How faithful and how sparse the SAE is, on test users.

    Attributes:
        explained_variance: 1 is perfect.
        l0: mean number of active features per row.
        dead_fraction: share of features that never fire.
        n_features: size of the dictionary.
        d_model: size of the hidden state.
        variant: such as "ReLU + L1" or "BatchTopK, k = 32".
        site: where the hidden state is taken, such as "block.0".
        others: further label → number or text.
        quality: recommendation with the original hidden state and with its reconstruction, in this order.
    """

    explained_variance: float
    l0: float
    dead_fraction: float
    n_features: int | None = None
    d_model: int | None = None
    variant: str = ""
    site: str = ""
    others: Mapping[str, float | str] = field(default_factory=dict)
    quality: Sequence[ModelMetrics] = ()


@dataclass(frozen=True)
class Interpretability:
    """How well single features follow single attributes.

    Attributes:
        sae: summary of the SAE's features.
        raw: summary of the raw hidden dimensions on the same rows.
        ratio: of the two mean-max correlations (:func:`saerec_fast.interpret.statistics.ratio`).
        sae_elsewhere: features chosen on other users, measured on these (``summary(features=…)``).
        raw_elsewhere: the same for raw dimensions.
        sae_result: gives the heat map and, unless it was loaded from disk, the activation distributions.
        distributions: for how many attributes to draw distributions.
        measured_on: the rows, in words, such as "all positions of the 142 test users".
    """

    sae: Summary
    raw: Summary | None = None
    ratio: Estimate | None = None
    sae_elsewhere: Summary | None = None
    raw_elsewhere: Summary | None = None
    sae_result: FeatureStatisticsResult | None = None
    distributions: int = 6
    measured_on: str = ""


@dataclass(frozen=True)
class Control:
    """Share of an attribute in the top 10 against NDCG@10.

    Attributes:
        points: each with ``attribute``, ``feature``, ``mode`` ("set", "add", "scale"), ``positions`` ("all", "last"),
            ``value``, ``share`` (of the top 10, 0 to 1) and ``ndcg@10``.
        baseline: attribute → ``share`` and ``ndcg@10`` of the untouched model.
        notes: shown under the curves.
    """

    points: Sequence[Mapping[str, Any]]
    baseline: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Recommended:
    """One recommended item; ``marked`` where it has the attribute that was steered."""

    title: str
    marked: bool = False
    attributes: Sequence[str] = ()


@dataclass(frozen=True)
class RecommendationExample:
    """One user's recommendations before and after an edit.

    Attributes:
        steering: the edit in words, such as "Horror: feature 812 set to 2.1".
        history: titles, latest last.
        before: the list of the untouched model, best first.
        after: the list with the edit.
    """

    steering: str
    history: Sequence[str]
    before: Sequence[Recommended]
    after: Sequence[Recommended]


@dataclass(frozen=True)
class CardAttribute:
    """How a feature relates to one attribute."""

    name: str
    correlation: float
    roc_auc: float
    recall: float
    precision: float


@dataclass(frozen=True)
class FeatureCard:
    """One feature: what it fires on, and how strongly.

    Attributes:
        feature: its index.
        attributes: those it correlates with most, strongest first.
        examples: its strongest items, strongest first.
        firing_rate: share of rows.
        numbers: label → activation, such as the mean when fired and quantiles.
    """

    feature: int
    attributes: Sequence[CardAttribute]
    examples: Sequence[Example]
    firing_rate: float
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LargerSet:
    """How to run a larger data set: its name, the command, and what to expect."""

    name: str
    command: str
    note: str = ""


@dataclass(frozen=True)
class TrainingCurve:
    """Numbers over a training.

    Attributes:
        title: such as "Recommender".
        series: label → one number per point.
        x_label: "Epoch" or "Step".
        x: positions of the points; default 1, 2, ….
    """

    title: str
    series: Mapping[str, Sequence[float]]
    x_label: str = "Epoch"
    x: Sequence[float] | None = None


LARGER_SETS = (
    LargerSet(
        "MovieLens 1M",
        "saerec data download ml-1m\nsaerec demo --data <the folder it names>",
        "6,040 users, 1 million ratings.",
    ),
    LargerSet(
        "MovieLens 20M",
        "saerec data download ml-20m\nsaerec demo --data <the folder it names>",
        "138,493 users, 20 million ratings; one of the paper's two data sets.",
    ),
    LargerSet(
        "Your own",
        "saerec demo --data path/to/folder",
        "CSV or Parquet with user, item and timestamp columns, and a table of item attributes.",
    ),
)


@dataclass(frozen=True)
class ReportContext:
    """All a report can show; only the title is required, every part that is missing or empty is left out.

    Attributes:
        title: of the page.
        subtitle: one line below it.
        data: the data set and its split.
        recommenders: the recommender first, then the baselines it is measured against.
        sae: quality of the SAE.
        interpretability: SAE features beside raw dimensions.
        control: steering curves.
        recommendations: lists before and after an edit.
        cards: features to look through (:func:`feature_cards`).
        larger_sets: how to run more data; default :data:`LARGER_SETS`.
        training: curves of the recommender's and the SAE's training.
        settings: heading → (name → value).
        times: step → seconds.
        findings: added to what the data can show.
        limits: added to what the data cannot show.
    """

    title: str
    subtitle: str = ""
    data: DataDescription | None = None
    recommenders: Sequence[ModelMetrics] = ()
    sae: SaeQuality | None = None
    interpretability: Interpretability | None = None
    control: Control | None = None
    recommendations: Sequence[RecommendationExample] = ()
    cards: Sequence[FeatureCard] = ()
    larger_sets: Sequence[LargerSet] = LARGER_SETS
    training: Sequence[TrainingCurve] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    findings: Sequence[str] = ()
    limits: Sequence[str] = ()


def feature_cards(
    result: FeatureStatisticsResult,
    examples: TopExamples,
    *,
    summary: Summary | None = None,
    features: Sequence[int] | None = None,
    per_attribute: int = 2,
    titles: Sequence[str] | None = None,
    item_attributes: Any = None,
    top_attributes: int = 3,
) -> list[FeatureCard]:
    """Cards of the features that follow attributes best.

    Args:
        result: statistics of all features.
        examples: top examples of all features.
        summary: its attributes, strongest first, choose the features; default: all of the result's.
        features: show these instead.
        per_attribute: features per attribute, where they are not given.
        titles: one per item.
        item_attributes: bool ``(n_items, A)`` in the order of the result's attributes.
        top_attributes: attributes named per card.
    """
    if features is None:
        if summary is None:
            summary = result.summary(resamples=0)
        ordered = sorted(summary.attributes, key=lambda one: -one.correlation.value)
        best = [result.top_features(one.attribute, per_attribute) for one in ordered]
        # The best feature of every attribute comes before any second one.
        ranked = [row[place] for place in range(per_attribute) for row in best if place < len(row)]
        features = list(dict.fromkeys(ranked))
    strength = result.strength()
    cards = []
    for feature in features:
        columns = [int(one) for one in (-strength[feature]).argsort() if math.isfinite(strength[feature, one])]
        attributes = [
            CardAttribute(
                result.attribute_names[column],
                float(result.correlation[feature, column]),
                float(result.roc_auc[feature, column]),
                float(result.recall[feature, column]),
                float(result.precision[feature, column]),
            )
            for column in columns[:top_attributes]
        ]
        median, _, high = (float(value) for value in result.quantiles[feature])
        numbers = {
            "mean when fired": float(result.mean_when_fired[feature]),
            "median": median,
            "q99": high,
            "largest": float(result.maximum[feature]),
        }
        cards.append(
            FeatureCard(
                int(feature),
                attributes,
                examples.examples(
                    feature, titles=titles, attributes=item_attributes, attribute_names=result.attribute_names
                ),
                float(result.firing_rate[feature]),
                {label: value for label, value in numbers.items() if math.isfinite(value)},
            )
        )
    return cards


def write_report(path: str | os.PathLike[str], context: ReportContext) -> None:
    """Write the page to ``path``, replacing it in one step.

    Args:
        path: of the HTML file; its folder is made.
        context: what to show.
    """
    write_text(path, render_report(context))


def render_report(context: ReportContext) -> str:
    """The page as text."""
    environment = page_environment()
    shows, limits = findings(context)
    page: str = environment.get_template("report.html.j2").render(
        context=context,
        headlines=_headlines(context),
        shows=shows,
        limits=limits,
        figures=_figures(context),
        metrics=_metric_names(context.recommenders),
        quality_metrics=_metric_names(context.sae.quality if context.sae else ()),
        attribute_rows=_attribute_rows(context.interpretability),
        control_attributes=_control_attributes(context.control),
    )
    return page


def page_environment(*folders: Path) -> jinja2.Environment:
    """Templates and number filters of the reports; ``folders`` are searched before this package's own."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number, estimate=_estimate, interval=_interval_text, percent=_percent, seconds=_seconds, label=_label
    )
    return environment


def findings(context: ReportContext) -> tuple[list[str], list[str]]:
    """What the numbers of a report show, and what they leave open, one sentence or two each.

    Returns:
        Two lists: what this data can show, and what it cannot.
    """
    shows: list[str] = []
    limits: list[str] = []
    _judge_recommender(context, shows, limits)
    _judge_sae(context, shows, limits)
    if context.interpretability is not None:
        _judge_interpretability(context.interpretability, shows, limits)
    if context.control is not None and context.control.points:
        _judge_control(context.control, shows, limits)
    return shows + list(context.findings), limits + list(context.limits)


def _judge_recommender(context: ReportContext, shows: list[str], limits: list[str]) -> None:
    rows = [row for row in context.recommenders if "ndcg@10" in row.metrics]
    if not rows:
        return
    model, baselines = rows[0], rows[1:]
    ours = model.metrics["ndcg@10"]
    for baseline in baselines:
        theirs = baseline.metrics["ndcg@10"]
        lead = baseline.lead
        if lead is not None and lead.low is not None and lead.high is not None:
            figures = f"NDCG@10 {_estimate(ours)} against {_estimate(theirs)}, on the same users a lead of"
            if lead.low > 0:
                shows.append(
                    f"{model.name} ranks held-out items better than {baseline.name}: {figures} {_estimate(lead)}."
                )
            elif lead.high < 0:
                limits.append(f"{model.name} ranks worse than {baseline.name}: {figures} {_estimate(lead)}.")
            else:
                limits.append(
                    f"Whether {model.name} ranks better than {baseline.name} is not established: {figures} "
                    f"{_estimate(lead)}."
                )
        elif ours.low is None or theirs.low is None:
            limits.append(f"{model.name} and {baseline.name} are compared without intervals.")
        elif ours.overlaps(theirs):
            limits.append(
                f"Whether {model.name} (NDCG@10 {_estimate(ours)}) ranks better than {baseline.name} "
                f"({_estimate(theirs)}): the intervals overlap."
            )
        elif ours.value > theirs.value:
            times = f", {ours.value / theirs.value:.1f} times as much" if theirs.value > 0 else ""
            shows.append(
                f"{model.name} ranks held-out items better than {baseline.name}: NDCG@10 {_estimate(ours)} against "
                f"{_estimate(theirs)}{times}. The intervals do not overlap."
            )
        else:
            limits.append(
                f"{model.name} ranks worse than {baseline.name}: NDCG@10 {_estimate(ours)} against "
                f"{_estimate(theirs)}. Features of a weak recommender say little about strong ones."
            )
    if ours.low is not None and ours.high is not None:
        users = context.data.parts.get("test") if context.data else None
        among = f"With {users:,} test users, differences" if users else "Differences"
        limits.append(
            f"{among} in NDCG@10 smaller than about ±{(ours.high - ours.low) / 2:.3f} are within the noise between "
            "users (runs on the same users can be compared more closely)."
        )


def _judge_sae(context: ReportContext, shows: list[str], limits: list[str]) -> None:
    sae = context.sae
    if sae is None:
        return
    if len(sae.quality) >= 2 and all("ndcg@10" in row.metrics for row in sae.quality[:2]):
        before, after = (row.metrics["ndcg@10"] for row in sae.quality[:2])
        kept = after.value / before.value if before.value > 0 else math.nan
        shows.append(
            f"The SAE explains {_percent(sae.explained_variance)} of the hidden state's variance with {sae.l0:.1f} "
            f"active features a row; recommending from its reconstruction keeps {_percent(kept)} of NDCG@10 "
            f"({_number(before.value)} → {_number(after.value)})."
        )
    if sae.explained_variance < 0.9:
        limits.append(
            f"The SAE explains only {_percent(sae.explained_variance)} of the variance; what it leaves out may carry "
            "meaning that its features do not show."
        )
    if sae.dead_fraction > 0.5:
        limits.append(
            f"{_percent(sae.dead_fraction)} of the features never fire: the dictionary is larger than this data fills."
        )


def _judge_interpretability(part: Interpretability, shows: list[str], limits: list[str]) -> None:
    sae, raw = part.sae.mean_max_correlation, part.raw.mean_max_correlation if part.raw else None
    if raw is not None and math.isfinite(sae.value) and math.isfinite(raw.value):
        comparison = f"mean-max correlation {_estimate(sae)} against {_estimate(raw)}"
        if part.ratio is not None:
            comparison += f", a ratio of {_estimate(part.ratio, 2)}"
        if sae.low is None or raw.low is None:
            limits.append(f"SAE features and raw dimensions are compared without intervals: {comparison}.")
        elif sae.value > raw.value and not sae.overlaps(raw):
            shows.append(f"Single SAE features follow attributes more closely than raw dimensions do: {comparison}.")
        else:
            limits.append(f"Whether SAE features follow attributes more closely than raw dimensions: {comparison}.")
        sae_auc, raw_auc = part.sae.mean_max_roc_auc, part.raw.mean_max_roc_auc if part.raw else Estimate(math.nan)
        if sae_auc.value <= raw_auc.value:
            limits.append(
                f"By ROC AUC single SAE features do not lead: {_estimate(sae_auc)} against {_estimate(raw_auc)}. A "
                "sparse feature is silent on most rows, and AUC counts silent rows with the attribute as half wrong."
            )
    if part.sae_elsewhere is not None:
        chosen = part.sae_elsewhere.mean_max_correlation
        if math.isfinite(chosen.value) and math.isfinite(sae.value):
            against = ""
            if part.raw_elsewhere is not None:
                against = f" (raw dimensions: {_estimate(part.raw_elsewhere.mean_max_correlation)})"
            holds = (chosen.low if chosen.low is not None else chosen.value) > 0
            text = (
                f"Features chosen on other users reach {_estimate(chosen)} on these{against}; chosen and measured on "
                f"the same users it is {_number(sae.value)}."
            )
            if holds:
                shows.append(f"What features mean carries over to users they were not chosen on. {text}")
            else:
                limits.append(f"Whether what features mean carries over to other users. {text}")
    elif part.sae.bootstrap_bias is not None and sae.value > 0:
        limits.append(
            "The best of many features is partly the luckiest: on this much data the maximum over features adds about "
            f"{part.sae.bootstrap_bias:.3f} to the mean correlation; the intervals reach downwards for it."
        )
    rare = [name for name, share in part.sae.left_out if share > 0]
    if rare:
        limits.append(f"Anything about {', '.join(rare)}: too few rows have {'it' if len(rare) == 1 else 'them'}.")
    limits.append(
        "A correlation names what a feature goes along with, not what it does; the steering curves test that. "
        "Concepts that no attribute describes are not measured at all."
    )


def _judge_control(control: Control, shows: list[str], limits: list[str]) -> None:
    curves: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for point in control.points:
        key = (point["attribute"], point["feature"], point["mode"], point["positions"])
        curves.setdefault(key, []).append(point)
    rising: list[tuple[str, list[Mapping[str, Any]]]] = []
    other: list[tuple[str, list[Mapping[str, Any]]]] = []
    for (attribute, _, mode, positions), points in curves.items():
        ordered = sorted(points, key=lambda point: point["value"])
        shares = [point["share"] for point in ordered]
        name = f"{attribute} ({mode}, {positions})"
        monotone = len(shares) > 1 and all(late >= early for early, late in pairwise(shares))
        (rising if monotone else other).append((name, ordered))
    if rising:
        name, ordered = max(rising, key=lambda pair: pair[1][-1]["share"] - pair[1][0]["share"])
        shows.append(
            f"Steering works in doses: in {len(rising)} of {len(curves)} curves the attribute's share never falls as "
            f"the value grows. The widest is {name}: {_percent(ordered[0]['share'])} → "
            f"{_percent(ordered[-1]['share'])} of the top 10, while NDCG@10 goes "
            f"{_number(ordered[0]['ndcg@10'])} → {_number(ordered[-1]['ndcg@10'])}."
        )
    if other:
        limits.append(
            f"A steady dose for {', '.join(name for name, _ in other)}: the share does not rise with every step there."
        )


def _headlines(context: ReportContext) -> list[tuple[str, str, str]]:
    """Label, number and one line of context for the tiles at the top."""
    tiles = []
    rows = [row for row in context.recommenders if "ndcg@10" in row.metrics]
    if rows:
        against = ", ".join(f"{row.name} {_number(row.metrics['ndcg@10'].value)}" for row in rows[1:])
        tiles.append(("Recommender NDCG@10", _number(rows[0].metrics["ndcg@10"].value), against))
    if context.interpretability is not None:
        sae, raw = context.interpretability.sae, context.interpretability.raw
        against = f"raw dimensions {_number(raw.mean_max_correlation.value)}" if raw else ""
        if context.interpretability.ratio is not None:
            against += f", {context.interpretability.ratio.value:.2f} times"
        tiles.append(("SAE mean-max correlation", _number(sae.mean_max_correlation.value), against))
        against = f"raw dimensions {_number(raw.mean_max_roc_auc.value)}" if raw else ""
        tiles.append(("SAE mean-max ROC AUC", _number(sae.mean_max_roc_auc.value), against))
    if context.sae is not None:
        against = f"{context.sae.l0:.1f} features active, {_percent(context.sae.dead_fraction)} dead"
        tiles.append(("Explained variance", _number(context.sae.explained_variance), against))
    if context.control is not None and context.control.points:
        last = max(context.control.points, key=lambda point: point["share"] - _baseline_share(context.control, point))
        start = context.control.baseline.get(last["attribute"])
        text = f"{last['attribute']}, NDCG@10 {_number(last['ndcg@10'])}"
        share = _percent(last["share"], 0)
        number = f"{_percent(start['share'], 0)} → {share}" if start else share
        tiles.append(("Largest steered share", number, text))
    return tiles


def _baseline_share(control: Control | None, point: Mapping[str, Any]) -> float:
    baseline = control.baseline.get(point["attribute"]) if control is not None else None
    return float(baseline["share"]) if baseline else 0.0


def _figures(context: ReportContext) -> dict[str, Any]:
    drawn: dict[str, Any] = {"control": [], "distributions": [], "training": []}
    part = context.interpretability
    if part is not None and part.sae.attributes:
        summaries = {"SAE features": part.sae}
        if part.raw is not None:
            summaries["Raw dimensions"] = part.raw
        for statistic in ("correlation", "roc_auc"):
            drawn[statistic] = Markup(
                figures.comparison_bars(summaries, statistic=statistic, name=f"comparison-{statistic}")
            )
        if part.sae_result is not None:
            drawn["heat_map"] = Markup(figures.heat_map(part.sae_result, part.sae))
            if part.sae_result.has_activations:
                ordered = sorted(part.sae.attributes, key=lambda one: -one.correlation.value)
                drawn["distributions"] = [
                    Markup(figures.activation_distribution(part.sae_result, one.correlation_feature, one.attribute))
                    for one in ordered[: part.distributions]
                ]
    if context.control is not None:
        drawn["control"] = [
            Markup(
                figures.control_curves(
                    context.control.points,
                    attribute,
                    baseline=context.control.baseline.get(attribute),
                    name=f"control-{number}",
                )
            )
            for number, attribute in enumerate(_control_attributes(context.control))
        ]
    drawn["training"] = [
        Markup(
            figures.training_curve(
                curve.series, title=curve.title, x_label=curve.x_label, x=curve.x, name=f"training-{number}"
            )
        )
        for number, curve in enumerate(context.training)
        if curve.series
    ]
    return drawn


def _control_attributes(control: Control | None) -> list[str]:
    return list(dict.fromkeys(point["attribute"] for point in control.points)) if control is not None else []


def _metric_names(rows: Sequence[ModelMetrics]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def _attribute_rows(part: Interpretability | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    raw = {one.attribute: one for one in part.raw.attributes} if part.raw is not None else {}
    elsewhere = {one.attribute: one for one in part.sae_elsewhere.attributes} if part.sae_elsewhere is not None else {}
    ordered = sorted(part.sae.attributes, key=lambda one: -one.correlation.value)
    return [{"sae": one, "raw": raw.get(one.attribute), "elsewhere": elsewhere.get(one.attribute)} for one in ordered]


def _number(value: Any, digits: int = 3) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}"


def _interval_text(estimate: Estimate, digits: int = 3) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{_number(estimate.low, digits)} to {_number(estimate.high, digits)}"


def _estimate(estimate: Estimate, digits: int = 3) -> str:
    interval = _interval_text(estimate, digits)
    return _number(estimate.value, digits) + (f" ({interval})" if interval else "")


def _percent(share: float | None, digits: int = 1) -> str:
    return f"{share:.{digits}%}" if share is not None and math.isfinite(share) else "–"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _label(name: str) -> str:
    return _METRIC_LABELS.get(name, name)
