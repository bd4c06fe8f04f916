"""The study's tables: once as numbers, for the CSV files and for the page alike."""

from __future__ import annotations

import csv
import io
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saerec_fast.files import write_text


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the rows; a dotted key looks into nested mappings.
        heading: shown on the page.
        kind: ``"text"``, ``"number"``, ``"percent"``, ``"feature"`` (an index that the page links to the browser) or
            ``"interval"`` (value, low, high: three columns of the CSV).
    """

    key: str
    heading: str
    kind: str = "text"

    def of(self, row: Mapping[str, Any]) -> Any:
        """The row's value, or None where it has none."""
        if self.key in row:
            return row[self.key]
        value: Any = row
        for part in self.key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    Attributes:
        name: of the CSV file, without its ending.
        caption: one sentence.
        columns: left to right.
        rows: mappings that the columns' keys look into.
        on_page: False for tables that are too long to be read there.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[Mapping[str, Any]]
    on_page: bool = True


def study_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """All tables that the sections in ``results`` give, by name; sections are described in ``study/report.py``."""
    tables: list[Table] = []
    for section, build in _SECTIONS.items():
        if results.get(section):
            tables.extend(table for table in build(results[section]) if table.rows)
    return {table.name: table for table in tables}


def write_tables(folder: str | os.PathLike[str], results: Mapping[str, Any]) -> list[Path]:
    """Write one CSV file per table: UTF-8, a header row, numbers unrounded, nothing where a value is missing.
    Tables of an earlier study that are not among them go.

    Args:
        folder: made where it is missing.
        results: sections by name.

    Returns:
        The files written.
    """
    paths = []
    for table in study_tables(results).values():
        path = Path(folder) / f"{table.name}.csv"
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(_header(table))
        writer.writerows(_cells(table, row) for row in table.rows)
        write_text(path, buffer.getvalue())
        paths.append(path)
    for left in set(Path(folder).glob("*.csv")) - set(paths):
        left.unlink()
    return paths


def slug(text: str) -> str:
    """Fit for a file name and an element's id; what had to be changed is told apart by a checksum ("C", "C++")."""
    plain = re.sub(r"\W+", "-", text.lower()).strip("-")
    return plain if plain == text.lower() else f"{plain or 'x'}-{zlib.crc32(text.encode()):08x}"


def reached(method: Mapping[str, Any]) -> int:
    """How many attributes a method of ``at_share`` brings to the share asked for."""
    return sum(kept is not None for kept in (method.get("attributes") or {}).values())


def relative(method: Mapping[str, Any]) -> Sequence[Any]:
    """What a method of ``at_share`` keeps beside the reference: value, low, high."""
    return method.get("relative_interval") or [method.get("relative_to_reference"), None, None]


def ranked_methods(control: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The methods of ``at_share``, best first: by the attributes they reach, then beside the reference.

    Their means alone cannot be compared: a method that only brings easy attributes to the share has a higher one.
    """
    methods = (control.get("at_share") or {}).get("methods", [])
    return sorted(methods, key=lambda one: (-reached(one), -(relative(one)[0] or 0.0)))


def _header(table: Table) -> list[str]:
    names: list[str] = []
    for column in table.columns:
        names.append(column.key)
        if column.kind == "interval":
            names += [f"{column.key}_low", f"{column.key}_high"]
    return names


def _cells(table: Table, row: Mapping[str, Any]) -> list[Any]:
    cells: list[Any] = []
    for column in table.columns:
        value = column.of(row)
        if column.kind == "interval":
            cells += [None] * 3 if value is None else value
        elif isinstance(value, (list, tuple)):
            cells.append("; ".join(map(str, value)))
        else:
            cells.append(value)
    return cells


def _columns(*columns: tuple[str, ...]) -> tuple[Column, ...]:
    return tuple(Column(*column) for column in columns)


def _data(data: Mapping[str, Any]) -> Iterable[Table]:
    yield Table(
        "data_attributes",
        "Attributes of the items; an item may have several.",
        _columns(
            ("name", "Attribute"),
            ("item_share", "Share of items", "percent"),
            ("interaction_share", "Share of interactions", "percent"),
        ),
        data.get("dataset", {}).get("attributes", []),
    )
    yield Table(
        "data_parts",
        "The split, by users.",
        _columns(("part", "Part"), ("users", "Users", "number"), ("interactions", "Interactions", "number")),
        [{"part": name, **part} for name, part in data.get("parts", {}).items()],
    )


RECOMMENDERS = {
    "transformer": "Transformer",
    "recent_item_knn": "Item-kNN, recent items",
    "item_knn": "Item-kNN",
    "popularity": "Popularity",
}


def _recommender(recommender: Mapping[str, Any]) -> Iterable[Table]:
    metrics = ("ndcg@10", "hit_rate@10", "mrr@10", "coverage@10", "novelty@10", "diversity@10")
    rows: list[Mapping[str, Any]] = []
    for name, one in recommender.items():
        # The same mapping may hold settings and curves beside the models.
        if isinstance(one, Mapping) and "ndcg@10" in one:
            ends = one.get("intervals", {})
            values = {key: [one.get(key), *ends.get(key, (None, None))] for key in metrics if one.get(key) is not None}
            rows.append({"model": RECOMMENDERS.get(name, name), **values})
    headings = ("NDCG@10", "HitRate@10", "MRR@10", "Coverage@10", "Novelty@10", "Diversity@10")
    yield Table(
        "recommenders",
        "Last item of each test user, ranked against the full catalogue, seen items filtered.",
        _columns(("model", "Model"), *((key, text, "interval") for key, text in zip(metrics, headings, strict=True))),
        rows,
    )


def _sweep(sweep: Mapping[str, Any]) -> Iterable[Table]:
    yield Table(
        "sweep",
        "Every SAE of the sweep, measured on the test users.",
        _columns(
            ("group", "Kind"),
            ("site", "Site"),
            ("n_features", "Features", "number"),
            ("parameter", "Setting"),
            ("value", "Value", "number"),
            ("explained_variance", "Explained variance", "number"),
            ("l0", "L0", "number"),
            ("dead_fraction", "Dead", "percent"),
            ("mae", "MAE", "number"),
            ("rmse", "RMSE", "number"),
            ("ndcg@10", "NDCG@10", "number"),
            ("correlation", "Correlation", "interval"),
            ("correlation_elsewhere", "Chosen on others", "number"),
            ("roc_auc", "ROC AUC", "interval"),
            ("roc_auc_elsewhere", "AUC, chosen on others", "number"),
            ("seconds", "Seconds", "number"),
        ),
        sweep.get("points", []),
    )
    yield Table(
        "sweep_raw",
        "Raw dimensions of the hidden state, by site.",
        _columns(("site", "Site"), ("correlation", "Correlation", "interval"), ("roc_auc", "ROC AUC", "interval")),
        [{"site": site, **one} for site, one in sweep.get("raw", {}).items()],
    )


def _interpretability(part: Mapping[str, Any]) -> Iterable[Table]:
    representations = part.get("representations", [])
    scores = (("correlation", "Correlation", "interval"), ("roc_auc", "ROC AUC", "interval"))
    elsewhere = (
        ("correlation_elsewhere", "Correlation, chosen on others", "number"),
        ("roc_auc_elsewhere", "AUC, chosen on others", "number"),
    )
    yield Table(
        "representations",
        "Mean over attributes of the best direction for each; chosen on others: on the SAE's training users.",
        _columns(("label", "Representation"), *scores, *elsewhere),
        representations,
    )
    yield Table(
        "attributes",
        "The best direction of every representation for every attribute.",
        _columns(
            ("attribute", "Attribute"),
            ("label", "Representation"),
            ("share", "Share of rows", "percent"),
            ("feature", "Dimension", "number"),
            *scores,
            *elsewhere,
        ),
        [
            {**attribute, "label": one.get("label", one["name"])}
            for one in representations
            for attribute in one.get("attributes", [])
        ],
        on_page=False,
    )
    yield Table(
        "features",
        "The best SAE features of every attribute as detectors: the feature is above its threshold.",
        _columns(
            ("attribute", "Attribute"),
            ("feature", "Feature", "feature"),
            ("rule", "Rule"),
            ("threshold", "Threshold", "number"),
            ("precision", "Precision", "percent"),
            ("recall", "Recall", "percent"),
            ("f1", "F1", "number"),
            ("correlation", "Correlation", "number"),
            ("roc_auc", "ROC AUC", "number"),
        ),
        part.get("features", []),
    )
    heat = part.get("heatmap") or {"attributes": [], "features": [], "correlation": []}
    yield Table(
        "heat_map",
        "Pearson correlation of attributes with the best feature of each.",
        _columns(
            ("attribute", "Attribute"), ("feature", "Feature", "feature"), ("correlation", "Correlation", "number")
        ),
        [
            {"attribute": attribute, "feature": feature, "correlation": value}
            for attribute, values in zip(heat["attributes"], heat["correlation"], strict=True)
            for feature, value in zip(heat["features"], values, strict=True)
        ],
        on_page=False,
    )
    mono = part.get("monosemanticity") or {}
    names = {"sae": "SAE features", "raw": "Raw dimensions", "random": "Random directions"}
    yield Table(
        "monosemanticity",
        "Entropy of the attributes among a feature's strongest items; normalised: 1 is chance, 0 a single attribute.",
        _columns(
            ("representation", "Representation"),
            ("features", "Features", "number"),
            ("mean_entropy_bits", "Mean entropy (bits)", "number"),
            ("normalised", "Normalised", "number"),
            ("median_normalised", "Median", "number"),
            ("share_below_0.5", "Share below one half", "percent"),
        ),
        [{"representation": text, **mono[name]} for name, text in names.items() if name in mono],
    )
    stability = part.get("stability") or {}
    baseline = stability.get("random_baseline")
    rows = [{"representation": "SAE features", **stability}] if stability else []
    if isinstance(baseline, Mapping):
        rows.append({"representation": "Random directions", **baseline})
    yield Table(
        "stability",
        "Features of SAEs trained from other seeds, matched one to one by the cosine of their decoder directions.",
        _columns(
            ("representation", "Representation"),
            ("mean_matched_cosine", "Mean matched cosine", "number"),
            ("median_matched_cosine", "Median", "number"),
            ("share_above_0.7", "Above 0.7", "percent"),
            ("share_above_0.9", "Above 0.9", "percent"),
        ),
        rows,
    )
    yield Table(
        "stability_attributes",
        "Does the best feature of an attribute come back from another seed?",
        _columns(
            ("attribute", "Attribute"),
            ("feature", "Feature", "feature"),
            ("cosine", "Matched cosine", "number"),
            ("correlation", "Correlation", "number"),
            ("matched_correlation", "Correlation of the match", "number"),
        ),
        stability.get("of_attribute_features", []),
    )


def _control(control: Mapping[str, Any]) -> Iterable[Table]:
    labels = {one["name"]: one["label"] for one in control.get("methods", [])}

    def named(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [{**row, "label": labels.get(row["method"], row["method"])} for row in rows]

    yield Table(
        "control_methods",
        "The methods.",
        _columns(("label", "Method"), ("what", "What it does"), ("name", "Name")),
        control.get("methods", []),
    )
    yield Table(
        "control_curves",
        "Every strength of every method.",
        _columns(
            ("attribute", "Attribute"),
            ("label", "Method"),
            ("method", "Name"),
            ("strength", "Strength", "number"),
            ("share", "Share", "percent"),
            ("ndcg@10", "NDCG@10", "number"),
        ),
        named(
            {"attribute": curve["attribute"], "method": curve["method"], **point}
            for curve in control.get("curves", [])
            for point in curve["points"]
        ),
        on_page=False,
    )
    at_share = control.get("at_share") or {"methods": []}
    yield Table(
        "control_at_share",
        "NDCG@10 kept at the same share: mean over the attributes that a method brings there, which are not the same "
        "for all; relative to the reference: over the attributes that both do.",
        _columns(
            ("label", "Method"),
            ("reached", "Attributes reached", "number"),
            ("ndcg_kept", "NDCG kept, where reached", "interval"),
            ("relative_interval", "Relative to the reference", "interval"),
        ),
        named({**one, "reached": reached(one), "relative_interval": relative(one)} for one in ranked_methods(control)),
    )
    yield Table(
        "control_at_share_attributes",
        "NDCG@10 kept at that share, by attribute; nothing where a method does not reach it.",
        _columns(("label", "Method"), ("attribute", "Attribute"), ("ndcg_kept", "NDCG kept", "percent")),
        named(
            {"method": one["method"], "attribute": attribute, "ndcg_kept": value}
            for one in at_share["methods"]
            for attribute, value in (one.get("attributes") or {}).items()
        ),
        on_page=False,
    )
    yield Table(
        "calibrated",
        "The strength is looked for on the users the SAE was trained on, then measured on the test users.",
        _columns(
            ("attribute", "Attribute"),
            ("label", "Method"),
            ("target", "Wanted share", "percent"),
            ("share_on_sample", "On the sample", "percent"),
            ("share", "On test users", "percent"),
            ("strength", "Strength", "number"),
            ("ndcg@10", "NDCG@10", "number"),
        ),
        named(control.get("calibrated", [])),
    )
    yield Table(
        "suppression_summary",
        "How much of an attribute's share is left, mean over attributes.",
        _columns(
            ("label", "Method"),
            ("share_left", "Share left", "percent"),
            ("ndcg_kept", "NDCG kept", "percent"),
            ("attributes", "Attributes", "number"),
        ),
        named(control.get("suppression_summary", [])),
    )
    yield Table(
        "suppression",
        "Suppression, by attribute.",
        _columns(
            ("attribute", "Attribute"),
            ("label", "Method"),
            ("share_left", "Share left", "percent"),
            ("ndcg_kept", "NDCG kept", "percent"),
        ),
        named(control.get("suppression", [])),
    )


def _popularity(part: Mapping[str, Any]) -> Iterable[Table]:
    measures = (
        ("ndcg@10", "NDCG@10", "number"),
        ("coverage@10", "Coverage@10", "percent"),
        ("gini@10", "Gini@10", "number"),
        ("novelty@10", "Novelty@10", "number"),
        ("long_tail_share", "Long tail", "percent"),
    )
    rows = [{"label": "not steered", **part["baseline"]}] if part.get("baseline") else []
    for curve in part.get("curves", []):
        rows += [{"label": curve["label"], **point} for point in curve["points"]]
    yield Table(
        "popularity_features",
        "Features that tell profiles of popular items from profiles of the long tail.",
        _columns(
            ("feature", "Feature", "feature"),
            ("kind", "Follows"),
            ("effect_size", "Effect size", "number"),
            ("mean_popular", "Mean, popular", "number"),
            ("mean_unpopular", "Mean, unpopular", "number"),
            ("attributes", "Attributes"),
        ),
        part.get("features", []),
    )
    yield Table(
        "popularity_curves",
        "What is recommended when popularity is steered.",
        _columns(("label", "Method"), ("strength", "Strength", "number"), *measures),
        rows,
    )


def _pairs(part: Mapping[str, Any]) -> Iterable[Table]:
    def row(pair: Mapping[str, Any], steered: str, point: Mapping[str, Any]) -> Mapping[str, Any]:
        first, second = point["shares"]
        return {"pair": pair["attributes"], "steered": steered, "first": first, "second": second, **point}

    rows: list[Mapping[str, Any]] = []
    for pair in part.get("pairs", []):
        rows.append(row(pair, "neither", pair["untouched"]))
        rows += [row(pair, "both", point) for point in pair["points"]]
        for single in pair.get("single", []):
            rows += [row(pair, single["attribute"], point) for point in single["points"]]
    yield Table(
        "pairs",
        "Two attributes at once, and each alone at the same strengths.",
        _columns(
            ("pair", "Attributes"),
            ("steered", "Steered"),
            ("strength", "Strength", "number"),
            ("first", "Share of the first", "percent"),
            ("second", "Share of the second", "percent"),
            ("both", "Items with both", "percent"),
            ("ndcg@10", "NDCG@10", "number"),
        ),
        rows,
    )


_SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], Iterable[Table]]] = {
    "data": _data,
    "recommender": _recommender,
    "sweep": _sweep,
    "interpretability": _interpretability,
    "control": _control,
    "popularity": _popularity,
    "pairs": _pairs,
}
