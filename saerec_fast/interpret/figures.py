"""The report's figures as SVG text that stands inside an HTML page.

Text and axes take the page's text colour, so that the same figure reads on light and dark ground; data colours are
from Okabe & Ito's colour-blind-safe palette. Figures are narrow enough for a phone, or scroll sideways in their frame.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saerec_fast.interpret.statistics import FeatureStatisticsResult, Summary

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install saerec-fast[study]") from error

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
# Stands for "the page's text colour" until the SVG is written, which matplotlib has no word for.
INK = "#010203"
# Fewer than 50 levels keep the colour bar a drawing rather than an embedded picture.
DIVERGING = LinearSegmentedColormap.from_list(
    "blue-orange", ["#08519c", "#6baed6", "#f4f4f4", "#fd8d3c", "#a63603"], N=41
)

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.3,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        INK,
    ),
}


def new_figure(width: float, height: float) -> Figure:
    """A figure of a size in CSS pixels."""
    return Figure(figsize=(width / 96, height / 96), layout="constrained")


def mark_untouched(axes: Axes, x: float, y: float) -> None:
    """A star where the model stands without steering."""
    axes.plot([x], [y], marker="*", markersize=13, color=INK, linestyle="none", label="not steered")


def svg(figure: Figure, name: str, title: str, description: str) -> str:
    """One ``<svg>`` element with a title and a description for readers who do not see it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace("xlink:href", "href")
    # matplotlib numbers ids per figure; several figures in one page need them apart.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"'DejaVu Sans'", "system-ui, 'DejaVu Sans'", text)
    width = figure.get_figwidth() * 96
    opening = text[: text.index(">") + 1]
    view_box = re.search(r'viewBox="[^"]*"', opening)
    frame = view_box.group(0) if view_box else ""
    described = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {frame} role="img" aria-labelledby="{name}-title {name}-desc" '
        f'style="width:100%;max-width:{width:.0f}px;height:auto">'
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    return (described + text[len(opening) :]).strip()


def heat_map(
    result: FeatureStatisticsResult, summary: Summary, *, name: str = "heat-map", what: str = "Feature"
) -> str:
    """Attributes × the best feature of each: signed Pearson correlation.

    Args:
        result: statistics of all features.
        summary: names the attributes shown and their best features.
        name: prefix of the element's ids; one per page.
        what: the word for a column, such as "Feature" or "Dimension".

    Raises:
        ValueError: the summary has no attributes.
    """
    if not summary.attributes:
        raise ValueError("a heat map needs at least one attribute")
    rows = sorted(summary.attributes, key=lambda one: -one.correlation.value)
    features = list(dict.fromkeys(one.correlation_feature for one in rows))
    columns = [result.attribute_index(one.attribute) for one in rows]
    values = result.correlation[np.ix_(features, columns)].T
    return correlation_grid([one.attribute for one in rows], features, values, name=name, what=what)


def correlation_grid(
    attributes: Sequence[str],
    features: Sequence[int],
    values: np.ndarray,
    *,
    name: str,
    what: str = "Feature",
    cell_size: float = 7.5,
) -> str:
    """Correlations, ``(attributes, features)``, as coloured cells with numbers of ``cell_size`` points."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(190 + 38 * len(features), 110 + 27 * len(attributes))
        axes = figure.add_subplot()
        limit = max(float(np.abs(values).max()), 0.01)
        places = np.arange(len(features)), np.arange(len(attributes))
        image = axes.pcolormesh(
            *places, values, cmap=DIVERGING, vmin=-limit, vmax=limit, edgecolor="face", linewidth=0.3
        )
        axes.invert_yaxis()
        axes.set_yticks(range(len(attributes)), list(attributes))
        axes.set_xticks(range(len(features)), [str(feature) for feature in features], rotation=90)
        axes.set_xlabel(f"{what} (the one with the highest correlation for each attribute)")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for row in range(values.shape[0]):
            for column in range(values.shape[1]):
                value = values[row, column]
                if abs(value) >= 0.05:
                    colour = "white" if abs(value) > 0.65 * limit else "black"
                    shown = f"{value:.2f}".replace("0.", ".").replace("-", "−")
                    axes.text(column, row, shown, ha="center", va="center", fontsize=cell_size, color=colour)
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("Pearson correlation")
        row, column = divmod(int(values.argmax()), len(features))
        return svg(
            figure,
            name,
            "Correlation of attributes with their top features",
            f"{len(attributes)} attributes by {len(features)} features. The strongest pair is {attributes[row]} with "
            f"{what.lower()} {features[column]}, {values[row, column]:.2f}.",
        )


def comparison_bars(
    summaries: Mapping[str, Summary], *, statistic: str = "correlation", name: str = "comparison"
) -> str:
    """Per attribute the best SAE feature beside the best raw dimension, with intervals where there are any.

    Args:
        summaries: label → summary, drawn in this order; the first one orders the attributes.
        statistic: ``"correlation"`` or ``"roc_auc"``.
        name: prefix of the element's ids; one per page.

    Raises:
        ValueError: no attributes, or another statistic.
    """
    if statistic not in ("correlation", "roc_auc"):
        raise ValueError(f"statistic must be 'correlation' or 'roc_auc', got {statistic!r}")
    labels = list(summaries)
    first = summaries[labels[0]] if labels else None
    if first is None or not first.attributes:
        raise ValueError("a comparison needs at least one attribute")
    order = sorted(first.attributes, key=lambda one: getattr(one, statistic).value)
    names = [one.attribute for one in order]
    # A bar for the AUC starts at 1/2, which is what a score that knows nothing has.
    base = 0.0 if statistic == "correlation" else 0.5
    label = "Pearson correlation" if statistic == "correlation" else "ROC AUC"
    with matplotlib.rc_context(STYLE):
        figure = new_figure(410, 90 + (14 * len(labels) + 8) * len(names))
        axes = figure.add_subplot()
        thickness = 0.8 / len(labels)
        for number, one_label in enumerate(labels):
            found = {one.attribute: getattr(one, statistic) for one in summaries[one_label].attributes}
            for place, attribute in enumerate(names):
                estimate = found.get(attribute)
                if estimate is None:
                    continue
                height = place + 0.4 - thickness * (number + 0.5)
                axes.barh(
                    height,
                    estimate.value - base,
                    left=base,
                    height=thickness * 0.92,
                    color=SERIES[number] if number != 1 else GREY,
                    label=one_label if place == len(names) - 1 else None,
                )
                if estimate.low is not None and estimate.high is not None:
                    axes.plot([estimate.low, estimate.high], [height, height], color=INK, linewidth=1.1)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{label}, maximum over features")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.set_xlim(left=base)
        figure.legend(loc="outside upper center", ncols=len(labels))
        means = {one: getattr(summaries[one], f"mean_max_{statistic}").value for one in labels}
        return svg(
            figure,
            name,
            f"{label} of the best feature per attribute",
            "Mean over attributes: " + ", ".join(f"{one} {value:.3f}" for one, value in means.items()) + ".",
        )


def activation_distribution(
    result: FeatureStatisticsResult, feature: int, attribute: str, *, name: str | None = None
) -> str:
    """Histogram of one feature's activations where the attribute is present and where it is not.

    Rows in which the feature is silent are too many to draw; the legend gives the share that fired.

    Args:
        result: statistics with activations (not loaded from disk).
        feature: its index.
        attribute: its name.
        name: prefix of the element's ids; one per page.

    Raises:
        ValueError: the result holds no activations, or no such attribute.
    """
    present, absent = result.activations(feature, attribute)
    silent = result.signed
    shown = [values[values > result.threshold] if silent else values for values in (present, absent)]
    joined = np.concatenate(shown)
    low, high = (float(joined.min()), float(np.quantile(joined, 0.999))) if len(joined) else (0.0, 1.0)
    low = min(low, 0.0) if silent else low
    bins = np.linspace(low, max(high, low + 1e-6), 29)
    texts = []
    with matplotlib.rc_context(STYLE):
        figure = new_figure(350, 235)
        axes = figure.add_subplot()
        series = ((f"{attribute}", present, ORANGE, "-"), (f"not {attribute}", absent, BLUE, "--"))
        for (label, values, colour, line), drawn in zip(series, shown, strict=True):
            share = len(drawn) / len(values) if len(values) else 0.0
            text = f"{label}: {share:.1%} fire" if silent else label
            texts.append(text)
            if not len(drawn):
                axes.plot([], [], color=colour, linestyle=line, label=text)
                continue
            # Divided by all rows of the class, so that the areas show how often it fires as well as how strongly.
            heights, _ = np.histogram(np.minimum(drawn, bins[-1]), bins=bins)
            density = heights / len(values)
            axes.stairs(density, bins, color=colour, linewidth=1.6, linestyle=line, label=text)
            axes.stairs(density, bins, color=colour, alpha=0.18, fill=True)
        axes.set_xlabel("Activation" + (" (rows where it fires)" if silent else ""))
        axes.set_ylabel("Share of rows")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.legend(loc="upper right", handlelength=1.6)
        axes.set_title(f"{attribute}: {'feature' if silent else 'dimension'} {feature}")
        return svg(
            figure,
            name or f"distribution-{feature}-{result.attribute_index(attribute)}",
            f"Activations of feature {feature} with and without {attribute}",
            "; ".join(texts) + ".",
        )


_LABELS = {
    ("set", "all"): "set, all positions",
    ("set", "last"): "set, last position",
    ("add", "all"): "add, all positions",
    ("add", "last"): "add, last position",
    ("scale", "all"): "scale, all positions",
    ("scale", "last"): "scale, last position",
}


def _share(point: Mapping[str, Any]) -> float:
    return float(point["share"])


def control_curves(
    points: Sequence[Mapping[str, Any]],
    attribute: str,
    *,
    baseline: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> str:
    """The attribute's share of the top 10 against NDCG@10, one curve per mode and positions.

    Args:
        points: of :attr:`ReportContext.control <saerec_fast.interpret.report.ReportContext>`, each with
            ``attribute``, ``feature``, ``mode``, ``positions``, ``value``, ``share`` and ``ndcg@10``.
        attribute: which one to draw.
        baseline: the untouched model's ``share`` and ``ndcg@10``.
        name: prefix of the element's ids; one per page.

    Raises:
        ValueError: no point of this attribute.
    """
    curves: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for point in points:
        if point["attribute"] == attribute:
            curves.setdefault((point["mode"], point["positions"], point["feature"]), []).append(point)
    if not curves:
        raise ValueError(f"no control points for {attribute!r}")
    one_feature = len({feature for _, _, feature in curves}) == 1
    texts = []
    with matplotlib.rc_context(STYLE):
        figure = new_figure(400, 330)
        axes = figure.add_subplot()
        for number, ((mode, positions, feature), curve) in enumerate(curves.items()):
            ordered = sorted(curve, key=lambda point: point["value"])
            shares = [point["share"] for point in ordered]
            quality = [point["ndcg@10"] for point in ordered]
            label = _LABELS.get((mode, positions), f"{mode}, {positions}")
            label += "" if one_feature else f", feature {feature}"
            colour = SERIES[number % len(SERIES)]
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(shares, quality, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=label)
            texts.append(
                f"{label}: share {shares[0]:.1%} to {shares[-1]:.1%}, NDCG@10 {quality[0]:.3f} to {quality[-1]:.3f}"
            )
        furthest = max((max(curve, key=lambda point: point["value"]) for curve in curves.values()), key=_share)
        axes.annotate(
            f"{furthest['value']:.3g}",
            (furthest["share"], furthest["ndcg@10"]),
            textcoords="offset points",
            xytext=(5, 4),
            fontsize=8.5,
        )
        if baseline is not None:
            mark_untouched(axes, baseline["share"], baseline["ndcg@10"])
            axes.axvline(baseline["share"], color=INK, linewidth=0.6, alpha=0.4)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(f"Share of {attribute} in the top 10")
        axes.set_ylabel("NDCG@10")
        axes.grid()
        axes.set_title(f"{attribute}" + (f": feature {next(iter(curves))[2]}" if one_feature else ""))
        figure.legend(loc="outside lower center", ncols=2, handlelength=1.8, columnspacing=1.0)
        return svg(
            figure,
            name or "control-" + re.sub(r"\W+", "-", attribute.lower()),
            f"Share of {attribute} against NDCG@10",
            "; ".join(texts) + ".",
        )


def training_curve(
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str = "Step",
    x: Sequence[float] | None = None,
    name: str = "training",
) -> str:
    """One panel per series over training.

    Args:
        values: label → one number per step shown.
        title: of the figure.
        x_label: what the steps are.
        x: their positions; default 1, 2, ….
        name: prefix of the element's ids; one per page.

    Raises:
        ValueError: no series.
    """
    if not values:
        raise ValueError("a training curve needs at least one series")
    with matplotlib.rc_context(STYLE):
        figure = new_figure(460, 60 + 130 * len(values))
        panels: list[Axes] = list(np.atleast_1d(figure.subplots(len(values), 1, sharex=True)))
        for number, (axes, (label, series)) in enumerate(zip(panels, values.items(), strict=True)):
            positions = range(1, len(series) + 1) if x is None else x
            axes.plot(positions, series, color=SERIES[number % len(SERIES)], linewidth=1.6)
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.grid()
        panels[-1].set_xlabel(x_label)
        figure.align_ylabels(panels)
        figure.suptitle(title, fontsize=10.5, fontweight="bold")
        ends = ", ".join(f"{label} ends at {series[-1]:.4g}" for label, series in values.items() if len(series))
        return svg(figure, name, title, ends + ".")
