"""The study as one self-contained page: it holds its own style, figures, data and script, and fetches nothing.

Sections by name, each a mapping of plain JSON as its part of the study returns it: ``sweep``, ``interpretability``,
``control``, ``popularity``, ``pairs``, ``cases`` and ``browser``. One that is missing is left out.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saerec_fast.files import write_text
from saerec_fast.interpret.report import page_environment
from saerec_fast.interpret.statistics import Estimate
from saerec_fast.study.figures import Drawing, study_figures
from saerec_fast.study.goals import best_suppression
from saerec_fast.study.tables import ranked_methods, reached, relative, study_tables

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class StudyFacts:
    """What the page says beside the sections' results.

    Attributes:
        title: of the page.
        command: what was typed.
        data: the run's result ``data``: ``name``, ``dataset``, ``parts``, ``attributes``, ``notes``; or empty.
        recommender: the run's result ``recommender``: model → metrics with their ``intervals``; or empty.
        goals: each with ``goal``, ``wanted``, ``found`` (texts) and ``reached`` (True, False, or None where it was not
            measured).
        times: step → seconds.
        settings: heading → (name → value).
        notes: sentences about the study as a whole.
    """

    title: str
    command: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    recommender: Mapping[str, Any] = field(default_factory=dict)
    goals: Sequence[Mapping[str, Any]] = ()
    times: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write_study_report(path: str | os.PathLike[str], results: Mapping[str, Any], *, facts: StudyFacts) -> None:
    """Write the page to ``path``, replacing it in one step.

    Args:
        path: of the HTML file; its folder is made.
        results: sections by name.
        facts: all the rest.
    """
    write_text(path, render_study_report(results, facts=facts))


def render_study_report(results: Mapping[str, Any], *, facts: StudyFacts) -> str:
    """The page as text."""
    sections = {name: one for name, one in results.items() if one}
    sections |= {name: one for name, one in (("data", facts.data), ("recommender", facts.recommender)) if one}
    drawings: defaultdict[str, list[Drawing]] = defaultdict(list)
    for drawing in study_figures(sections):
        drawings[drawing.group].append(drawing)
    environment = page_environment(_HERE)
    environment.filters["as_estimate"] = lambda interval: Estimate(*interval)
    page: str = environment.get_template("report.html.j2").render(
        facts=facts,
        sections=sections,
        drawings=drawings,
        tables=study_tables(sections),
        headlines=_headlines(sections),
        shows=_summary(sections),
        reached=[goal for goal in facts.goals if goal["reached"]],
        missed=[goal for goal in facts.goals if goal["reached"] is False],
        markup=Markup,
        features=_embedded(sections["browser"]["features"]) if "browser" in sections else None,
    )
    return page


def _embedded(data: Any) -> Markup:
    """JSON that may stand inside a script element, whatever the titles hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _representation(sections: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    found = sections.get("interpretability", {}).get("representations", [])
    return next((one for one in found if one["name"] == name), None)


def _best_method(sections: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The method of control that was chosen on other users, or else the one that :func:`ranked_methods` puts first,
    with its label."""
    control = sections.get("control", {})
    known = [one for one in ranked_methods(control) if one["ndcg_kept"][0] is not None]
    chosen = (control.get("at_share") or {}).get("chosen")
    known.sort(key=lambda one: one["method"] != chosen)
    if not known:
        return None
    labels = {one["name"]: one["label"] for one in control.get("methods", [])}
    return labels.get(known[0]["method"], known[0]["method"]), known[0]


def _headlines(sections: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    tiles = []
    model = sections.get("recommender", {}).get("transformer")
    if model:
        tiles.append(("Recommender NDCG@10", f"{model['ndcg@10']:.3f}", "last item of each test user"))
    sae, raw = _representation(sections, "sae"), _representation(sections, "raw_absolute")
    if sae:
        for key, label in (("correlation", "Mean-max correlation"), ("roc_auc", "Mean-max ROC AUC")):
            beside = f"raw dimensions {raw[key][0]:.3f}" if raw else "SAE features"
            tiles.append((label, f"{sae[key][0]:.3f}", beside))
    best = _best_method(sections)
    if best:
        multiple = sections["control"]["at_share"].get("multiple", 1)
        tiles.append((f"NDCG kept at {multiple:g}× the share", f"{best[1]['ndcg_kept'][0]:.1%}", best[0]))
    return tiles


def _summary(sections: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences that only repeat the numbers."""
    texts = []
    recommender = sections.get("recommender", {})
    model = recommender.get("transformer")
    others = [one["ndcg@10"] for name, one in recommender.items() if name != "transformer" and "ndcg@10" in one]
    if model and others:
        relation = "above" if model["ndcg@10"] > max(others) else "not above"
        texts.append(
            f"The recommender's NDCG@10 is {model['ndcg@10']:.3f}, {relation} that of its best baseline, "
            f"{max(others):.3f}."
        )
    sae = _representation(sections, "sae")
    if sae:
        ends = [
            f"{one['label']} {one['correlation'][0]:.3f} / {one['roc_auc'][0]:.3f}"
            for one in sections["interpretability"]["representations"]
            if one["name"] != "sae"
        ]
        texts.append(
            f"Mean over attributes of the best SAE feature, correlation / ROC AUC: {sae['correlation'][0]:.3f} / "
            f"{sae['roc_auc'][0]:.3f}" + (f"; beside it: {', '.join(ends)}." if ends else ".")
        )
    best = _best_method(sections)
    if best:
        at_share = sections["control"]["at_share"]
        beside = relative(best[1])[0]
        text = (
            f"“{best[0]}” brings {reached(best[1])} of {len(best[1].get('attributes') or {})} attributes to "
            f"{at_share.get('multiple', 1):g} times their share and keeps {best[1]['ndcg_kept'][0]:.1%} of NDCG@10"
        )
        if beside is not None and best[1]["method"] != at_share.get("reference"):
            text += f", {beside:.2f} times what the reference method keeps where both reach it"
        texts.append(text + ".")
    one = best_suppression(sections.get("control", {}).get("suppression_summary", []))
    if one is not None:
        labels = {method["name"]: method["label"] for method in sections["control"].get("methods", [])}
        texts.append(
            f"The best suppression, “{labels.get(one['method'], one['method'])}”, leaves "
            f"{one['share_left']:.1%} of the share and {one['ndcg_kept']:.1%} of NDCG@10."
        )
    return texts
