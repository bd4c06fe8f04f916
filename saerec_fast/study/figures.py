"""The study's figures, drawn from the sections' results alone.

None is wider than 410 px, so that on a phone, where it shrinks to the screen, its text stays above 11 px; the heat map
is as wide as its features ask and scrolls in its frame.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

from saerec_fast.files import write_text
from saerec_fast.interpret import figures as shared
from saerec_fast.interpret.figures import GREY, INK, MARKERS, SERIES, mark_untouched, new_figure, svg
from saerec_fast.study.goals import NDCG_KEPT_BY_SUPPRESSION, SHARE_LEFT
from saerec_fast.study.tables import ranked_methods, reached, relative, slug

WIDTH = 410
_SMALLEST = 9.5  # points, 12.7 px
STYLE = {
    **shared.STYLE,
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), _SMALLEST),
}
_COLOURS = (*SERIES, GREY)
_POINTS = (*MARKERS, "X")


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        name: of its file, without the ending, and the prefix of its ids.
        group: where on the page it stands.
        caption: one or two sentences.
        svg: the element.
        wide: it keeps its width and scrolls on a narrow screen.
    """

    name: str
    group: str
    caption: str
    svg: str
    wide: bool = False


def study_figures(results: Mapping[str, Any]) -> list[Drawing]:
    """All figures that the sections in ``results`` give; sections are described in ``study/report.py``."""
    drawings: list[Drawing] = []
    with matplotlib.rc_context(STYLE):
        for section, draw in _SECTIONS.items():
            if results.get(section):
                drawings.extend(draw(results[section]))
    return drawings


def write_figures(folder: str | os.PathLike[str], results: Mapping[str, Any]) -> list[Path]:
    """Write every figure of the page as a file of its own, ``<name>.svg``, and return the paths; figures of an earlier
    study that are not among them go."""
    paths = []
    for drawing in study_figures(results):
        path = Path(folder) / f"{drawing.name}.svg"
        write_text(path, '<?xml version="1.0" encoding="UTF-8"?>\n' + drawing.svg + "\n")
        paths.append(path)
    for left in set(Path(folder).glob("*.svg")) - set(paths):
        left.unlink()
    return paths


def _panel(height: float = 330) -> tuple[Figure, Axes]:
    figure = new_figure(WIDTH, height)
    axes = figure.add_subplot()
    axes.grid()
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure, columns: int = 2) -> None:
    figure.legend(loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.0)


def _intervals(
    rows: Sequence[tuple[str, Sequence[Any]]],
    label: str,
    name: str,
    title: str,
    *,
    base: float = 0.0,
    percent: bool = False,
) -> str:
    """One bar per row from ``base``, its interval as a line, its name above it: long names fit a phone that way."""
    shown = [
        textwrap.fill(f"{text}: " + (f"{values[0]:.1%}" if percent else f"{values[0]:.3f}"), 56)
        for text, values in rows
    ]
    lines = max(text.count("\n") + 1 for text in shown)
    figure, axes = _panel(64 + (16 + 20 * lines) * len(rows))
    axes.grid(visible=False, axis="y")
    for place, (text, (_, (value, low, high))) in enumerate(zip(shown, rows, strict=True)):
        height = len(rows) - 1 - place
        axes.barh(height, value - base, left=base, height=0.3, color=SERIES[0] if place == 0 else "#7aa6c2")
        if low is not None and high is not None:
            axes.plot([low, high], [height, height], color=INK, linewidth=1.4)
        label_above = axes.text(0.0, height + 0.18, text, transform=axes.get_yaxis_transform(), va="bottom")
        # The layout would narrow the panel for a long name.
        label_above.set_in_layout(False)
    axes.set_ylim(-0.4, len(rows) - 0.25)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
    if percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    described = "; ".join(f"{text}: {values[0]:.3f}" for text, values in rows)
    return svg(figure, name, title, described + ".")


def _sweep(sweep: Mapping[str, Any]) -> Iterable[Drawing]:
    points = sweep.get("points", [])
    if not points:
        return
    sites = [point["site"] for point in points]
    main = max(dict.fromkeys(sites), key=sites.count)
    for key, label in (("explained_variance", "Explained variance"), ("correlation", "Mean-max correlation")):
        name = f"sweep-l0-{slug(key)}"
        yield Drawing(
            name,
            "sweep",
            f"Site {main}; larger markers are larger dictionaries. "
            + ("Up and left is better." if key == "explained_variance" else "Lines are 95 % intervals over users."),
            _frontier([point for point in points if point["site"] == main], key, label, name),
        )
    if len(set(sites)) > 1:
        yield Drawing(
            "sweep-sites",
            "sites",
            "The same SAE trained at every site, beside the raw dimensions there.",
            _sites(sweep, "sweep-sites"),
        )


def _frontier(points: Sequence[Mapping[str, Any]], key: str, label: str, name: str) -> str:
    figure, axes = _panel(360)
    sizes = sorted({point["n_features"] for point in points})
    area = {size: 26 + 60 * place for place, size in enumerate(sizes)}
    groups = list(dict.fromkeys(point["group"] for point in points))
    for number, group in enumerate(groups):
        colour, marker = _COLOURS[number % 7], _POINTS[number % 7]
        for size in sizes:
            chosen = [one for one in points if one["group"] == group and one["n_features"] == size]
            chosen = sorted((one for one in chosen if one["l0"] > 0), key=lambda one: one["l0"])
            x = [one["l0"] for one in chosen]
            y = [one[key][0] if isinstance(one[key], list) else one[key] for one in chosen]
            axes.plot(x, y, color=colour, linewidth=1, alpha=0.5)
            axes.scatter(x, y, s=area[size], color=colour, marker=marker, alpha=0.85, linewidths=0)
            for place, one in zip(x, chosen, strict=True):
                if isinstance(one[key], list) and one[key][1] is not None:
                    axes.plot([place, place], one[key][1:], color=colour, linewidth=0.9)
        axes.scatter([], [], color=colour, marker=marker, label=group)
    for size in sizes:
        axes.scatter([], [], s=area[size], facecolors="none", edgecolors=INK, label=f"{size:,} features")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("L0: active features per row (log scale)")
    axes.set_ylabel(label)
    _legend(figure, 3)
    return svg(figure, name, f"L0 against {label.lower()}", f"{len(points)} SAEs of the kinds {', '.join(groups)}.")


def _sites(sweep: Mapping[str, Any], name: str) -> str:
    points = sweep["points"]
    settings = [(one["group"], one["n_features"], one["value"]) for one in points]
    # The setting that was trained at the most sites is the one to compare them by.
    reach = {one: len({p["site"] for p, s in zip(points, settings, strict=True) if s == one}) for one in settings}
    chosen = max(reach, key=lambda one: reach[one])
    found = {p["site"]: p["correlation"] for p, s in zip(points, settings, strict=True) if s == chosen}
    raw = {site: one["correlation"] for site, one in sweep.get("raw", {}).items() if site in found}
    sites = list(found)
    figure, axes = _panel(110 + 36 * len(sites))
    for number, (label, values) in enumerate((("SAE", found), ("raw dimensions", raw))):
        colour = (SERIES[0], GREY)[number]
        for place, site in enumerate(sites):
            if site in values:
                value, low, high = values[site]
                height = len(sites) - 1 - place + (0.12, -0.12)[number]
                axes.plot([value], [height], marker=MARKERS[number], color=colour, linestyle="none")
                if low is not None and high is not None:
                    axes.plot([low, high], [height, height], color=colour, linewidth=1.4)
        axes.plot([], [], marker=MARKERS[number], color=colour, linestyle="none", label=label)
    axes.set_yticks(range(len(sites) - 1, -1, -1), sites)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"Mean-max correlation ({chosen[0]}, {chosen[1]:,} features)")
    _legend(figure)
    return svg(
        figure,
        name,
        "Correlation by site",
        "; ".join(f"{site}: {values[0]:.3f}" for site, values in found.items()) + ".",
    )


def _interpretability(part: Mapping[str, Any]) -> Iterable[Drawing]:
    representations = part.get("representations", [])
    for key, label, base in (("correlation", "Mean-max correlation", 0.0), ("roc_auc", "Mean-max ROC AUC", 0.5)):
        if not representations:
            break
        rows = [(one.get("label", one["name"]), one[key]) for one in representations]
        name = f"representations-{slug(key)}"
        caption = "Lines: 95 % intervals over users." + (" Bars start at chance." if base else "")
        yield Drawing(name, "representations", caption, _intervals(rows, label, name, label, base=base))
        if any(one.get("attributes") for one in representations):
            name = f"attributes-{slug(key)}"
            yield Drawing(name, "attributes", "The best direction of each for each attribute.", _dots(part, key, name))
    heat = part.get("heatmap")
    if heat and heat["attributes"]:
        # A constant feature has no correlation; it counts as 0, as it does in the means.
        values = np.array([[one or 0.0 for one in row] for row in heat["correlation"]])
        order = np.argsort(-values.max(axis=1), kind="stable")
        columns = list(dict.fromkeys(int(values[row].argmax()) for row in order))
        columns += [column for column in range(values.shape[1]) if column not in columns]
        yield Drawing(
            "heat-map",
            "heat-map",
            "Rows: attributes, strongest first. Columns: best features. Values below 0.05 are left blank.",
            shared.correlation_grid(
                [heat["attributes"][row] for row in order],
                [heat["features"][column] for column in columns],
                values[order][:, columns],
                name="heat-map",
                cell_size=8.5,
            ),
            wide=True,
        )
    for one in part.get("distributions", []):
        name = f"distribution-{slug(one['attribute'])}-{one['feature']}"
        yield Drawing(name, "distributions", "", _distribution(one, name))
    mono = part.get("monosemanticity") or {}
    histograms = {
        label: mono[key]["histogram"]
        for key, label in (("sae", "SAE features"), ("raw", "raw dimensions"), ("random", "random directions"))
        if mono.get(key, {}).get("histogram")
    }
    if histograms:
        text = "Entropy of attributes, as a share of what chance gives"
        yield Drawing("monosemanticity", "monosemanticity", "", _histograms(histograms, text, "monosemanticity"))
    stability = part.get("stability") or {}
    if stability.get("histogram"):
        histograms = {"SAE features": stability["histogram"]}
        if isinstance(stability.get("random_baseline"), Mapping) and stability["random_baseline"].get("histogram"):
            histograms["random directions"] = stability["random_baseline"]["histogram"]
        text = "Cosine with the matched feature of another seed"
        yield Drawing("stability", "stability", "", _histograms(histograms, text, "stability"))


def _dots(part: Mapping[str, Any], key: str, name: str) -> str:
    representations = [one for one in part["representations"] if one.get("attributes")]
    first = sorted(representations[0]["attributes"], key=lambda one: one[key][0])
    places = {one["attribute"]: place for place, one in enumerate(first)}
    figure, axes = _panel(150 + 25 * len(places))
    # The first one is what the study is about: drawn last, above the others, and with its interval.
    for number, representation in reversed(list(enumerate(representations))):
        known = [one for one in representation["attributes"] if one["attribute"] in places]
        axes.plot(
            [one[key][0] for one in known],
            [places[one["attribute"]] for one in known],
            linestyle="none",
            marker=_POINTS[number % 7],
            color=_COLOURS[number % 7],
            markersize=7 if number == 0 else 5.5,
            label=representation.get("label", representation["name"]),
        )
        for one in known if number == 0 else ():
            if one[key][1] is not None:
                axes.plot(one[key][1:], [places[one["attribute"]]] * 2, color=_COLOURS[0], linewidth=1.4)
    axes.set_yticks(range(len(places)), list(places))
    axes.set_xlabel("Pearson correlation" if key == "correlation" else "ROC AUC")
    _legend(figure, 1)
    strongest = first[-1]
    return svg(
        figure,
        name,
        f"{'Correlation' if key == 'correlation' else 'ROC AUC'} by attribute",
        f"{len(places)} attributes; the highest is {strongest['attribute']}, {strongest[key][0]:.3f}.",
    )


def _distribution(one: Mapping[str, Any], name: str) -> str:
    figure, axes = _panel(280)
    texts = []
    for key, label, colour, line in (
        ("present", one["attribute"], SERIES[1], "-"),
        ("absent", f"not {one['attribute']}", SERIES[0], "--"),
    ):
        silent = one.get(f"silent_{key}")
        text = label if silent is None else f"{label}: {1 - silent:.1%} fire"
        texts.append(text)
        axes.stairs(one[key], one["edges"], color=colour, linestyle=line, linewidth=1.6, label=text)
        axes.stairs(one[key], one["edges"], color=colour, alpha=0.18, fill=True)
    axes.set_title(f"{one['attribute']}: feature {one['feature']}")
    axes.set_xlabel("Activation, where it fires")
    axes.set_ylabel("Density")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _legend(figure)
    title = f"Activations of feature {one['feature']} with and without {one['attribute']}"
    return svg(figure, name, title, "; ".join(texts) + ".")


def _histograms(histograms: Mapping[str, Mapping[str, Any]], label: str, name: str) -> str:
    figure, axes = _panel(300)
    for number, (text, one) in enumerate(histograms.items()):
        counts = np.asarray(one["counts"], dtype=float)
        shares = counts / max(counts.sum(), 1)
        colour = (SERIES[0], SERIES[1], GREY)[number % 3]
        axes.stairs(
            shares, one["edges"], color=colour, linewidth=1.6, linestyle=("-", "--", ":")[number % 3], label=text
        )
        axes.stairs(shares, one["edges"], color=colour, alpha=0.14, fill=True)
    axes.set_xlabel(label)
    axes.set_ylabel("Share")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(figure)
    return svg(figure, name, label, f"Histograms of {', '.join(histograms)}.")


def _control(control: Mapping[str, Any]) -> Iterable[Drawing]:
    labels = {one["name"]: one["label"] for one in control.get("methods", [])}
    at_share = control.get("at_share") or {}
    reference = at_share.get("reference")
    ranked = [one for one in ranked_methods(control) if relative(one)[0] is not None]
    drawn = list(dict.fromkeys([*([reference] if reference else []), *(one["method"] for one in ranked)]))[:5]
    if ranked:
        rows = [(f"{labels.get(one['method'], one['method'])} ({reached(one)})", relative(one)) for one in ranked]
        text = f"NDCG@10 kept at {at_share.get('multiple', 1):g} times the share, reference = 1"
        yield Drawing(
            "control-at-share",
            "at-share",
            "In brackets: how many attributes the method brings to that share; those that bring most come first. Mean "
            "over the attributes that the reference reaches too, 95 % intervals over users.",
            _intervals(rows, text, "control-at-share", text),
        )
    curves = control.get("curves", [])
    for attribute in dict.fromkeys(curve["attribute"] for curve in curves):
        name = f"control-{slug(attribute)}"
        own = [curve for curve in curves if curve["attribute"] == attribute]
        baseline = control.get("baseline", {}).get(attribute)
        chosen = drawn or [curve["method"] for curve in own][:5]
        yield Drawing(name, "control", "", _curves(own, attribute, baseline, labels, chosen, name))
    summary = [one for one in control.get("suppression_summary", []) if one["share_left"] is not None]
    if summary:
        yield Drawing(
            "suppression",
            "suppression",
            "Means over attributes; the table has the left end of every curve. The green corner is the goal. Named are "
            "the paper's method and those that keep most of NDCG@10 with little of the share left.",
            _suppression(summary, labels, "suppression"),
        )


def _suppression(summary: Sequence[Mapping[str, Any]], labels: Mapping[str, str], name: str) -> str:
    """What is left of the share against what is kept of NDCG."""
    strong = [one for one in summary if one["share_left"] <= SHARE_LEFT + 0.05]
    best = sorted(strong, key=lambda one: -one["ndcg_kept"])[: len(SERIES) - 1]
    drawn = list(dict.fromkeys([summary[0]["method"], *(one["method"] for one in best)]))[: len(SERIES)]
    figure, axes = _panel(320 + 19 * (len(drawn) + 3))
    axes.add_patch(Rectangle((0, NDCG_KEPT_BY_SUPPRESSION), SHARE_LEFT, 1, color=SERIES[2], alpha=0.18, linewidth=0))
    lines = []
    for one in summary:
        points = [*one.get("points", [one]), {"share_left": 1.0, "ndcg_kept": 1.0}]
        points.sort(key=lambda point: point["share_left"])
        lines.append(
            (one["method"], [point["share_left"] for point in points], [point["ndcg_kept"] for point in points])
        )
    _method_lines(axes, lines, drawn, labels)
    mark_untouched(axes, 1.0, 1.0)
    axes.set_xlim(left=0)
    axes.set_ylim(top=1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("Share of the attribute left in the top 10")
    axes.set_ylabel("NDCG@10 kept")
    _legend(figure, 1)
    return svg(figure, name, "Suppression", "Share left against NDCG@10 kept: " + ", ".join(drawn))


def _method_lines(
    axes: Axes,
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    drawn: Sequence[str],
    labels: Mapping[str, str],
) -> None:
    """A line per method, given as its name, x and y: in colour if it is among ``drawn``, else pale and unnamed."""
    others = False
    for method, x, y in lines:
        if method not in drawn:
            axes.plot(x, y, color=GREY, linewidth=0.8, alpha=0.5, label=None if others else "other methods", zorder=1)
            others = True
            continue
        number = drawn.index(method)
        label = labels.get(method, method)
        axes.plot(x, y, color=SERIES[number], marker=MARKERS[number], markersize=4.5, linewidth=1.7, label=label)


def _curves(
    curves: Sequence[Mapping[str, Any]],
    attribute: str,
    baseline: Mapping[str, Any] | None,
    labels: Mapping[str, str],
    drawn: Sequence[str],
    name: str,
) -> str:
    figure, axes = _panel(300 + 19 * (len(drawn) + 2))
    lines = []
    for curve in curves:
        points = sorted(curve["points"], key=lambda one: one["strength"])
        lines.append((curve["method"], [one["share"] for one in points], [one["ndcg@10"] for one in points]))
    _method_lines(axes, lines, drawn, labels)
    if baseline is not None:
        mark_untouched(axes, baseline["share"], baseline["ndcg@10"])
    axes.set_title(attribute)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"Share of {attribute} in the top 10")
    axes.set_ylabel("NDCG@10")
    _legend(figure, 1)
    return svg(figure, name, f"Share of {attribute} against NDCG@10", f"{len(curves)} methods.")


def _popularity(part: Mapping[str, Any]) -> Iterable[Drawing]:
    if part.get("histogram"):
        yield Drawing(
            "popularity-effect",
            "popularity",
            "Features right of 0 follow popular items, left of it the long tail.",
            _histograms({"SAE features": part["histogram"]}, "Effect size (Cohen's d)", "popularity-effect"),
        )
    curves = part.get("curves", [])
    for key, label in (
        ("coverage@10", "Coverage@10"),
        ("gini@10", "Gini@10"),
        ("novelty@10", "Novelty@10"),
        ("long_tail_share", "Share of the long tail"),
    ):
        if curves and all(key in point for curve in curves for point in curve["points"]):
            name = f"popularity-{slug(key)}"
            yield Drawing(name, "popularity", "", _tail(curves, part.get("baseline"), key, label, name))


def _tail(
    curves: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any] | None, key: str, label: str, name: str
) -> str:
    figure, axes = _panel(290 + 19 * (len(curves) + 1))
    for number, curve in enumerate(curves):
        points = ([baseline] if baseline else []) + sorted(curve["points"], key=lambda one: one["strength"])
        axes.plot(
            [point[key] for point in points],
            [point["ndcg@10"] for point in points],
            color=_COLOURS[number % 7],
            marker=_POINTS[number % 7],
            markersize=4.5,
            linewidth=1.6,
            label=curve["label"],
        )
    if baseline:
        mark_untouched(axes, baseline[key], baseline["ndcg@10"])
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(label)
    axes.set_ylabel("NDCG@10")
    _legend(figure, 1)
    return svg(figure, name, f"{label} against NDCG@10", f"{len(curves)} methods.")


def _pairs(part: Mapping[str, Any]) -> Iterable[Drawing]:
    for pair in part.get("pairs", []):
        name = "pair-" + "-".join(map(slug, pair["attributes"]))
        figure, axes = _panel(380)
        series = [(" and ".join(pair["attributes"]), pair["points"])]
        series += [(f"only {one['attribute']}", one["points"]) for one in pair.get("single", [])]
        for number, (label, points) in enumerate(series):
            joined = [pair["untouched"], *points]
            axes.plot(
                [point["both"] for point in joined],
                [point["ndcg@10"] for point in joined],
                color=SERIES[number],
                marker=MARKERS[number],
                markersize=5,
                label=label,
            )
        start = pair["untouched"]
        mark_untouched(axes, start["both"], start["ndcg@10"])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(" and ".join(pair["attributes"]))
        axes.set_xlabel("Share of items with both in the top 10")
        axes.set_ylabel("NDCG@10")
        _legend(figure, 1)
        title = f"{' and '.join(pair['attributes'])} together"
        yield Drawing(name, "pairs", "", svg(figure, name, title, "Share of items with both against NDCG@10."))


_SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], Iterable[Drawing]]] = {
    "sweep": _sweep,
    "interpretability": _interpretability,
    "control": _control,
    "popularity": _popularity,
    "pairs": _pairs,
}
