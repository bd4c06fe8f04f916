"""The whole study over one folder: the steps, the sections, and what is written of them."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from saerec_fast.files import write_json
from saerec_fast.pipeline import STEPS, Run
from saerec_fast.study.figures import write_figures
from saerec_fast.study.goals import goals
from saerec_fast.study.report import StudyFacts, write_study_report
from saerec_fast.study.settings import SECTIONS, StudySettings
from saerec_fast.study.tables import write_tables


def run_study(run: Run, settings: StudySettings, *, command: str = "") -> dict[str, Any]:
    """Run or resume everything, write ``study.json``, ``report.html``, ``tables/*.csv`` and ``figures/*.svg``.

    The sweep starts processes: a script that calls this needs the guard ``if __name__ == "__main__"``.

    Args:
        run: the run to fill.
        settings: of :func:`~saerec_fast.study.settings.study_settings`, or made by hand.
        command: what was typed, for the page.

    Returns:
        What ``study.json`` holds: the goals with what was found, the results of the steps and sections (but for the
        browser's, which the page holds), their settings, and how long each took.

    Raises:
        ValueError: a data set without attributes that are common enough for statistics.
    """
    described = run.prepare_data(settings.data)
    if not described["attributes"]:
        raise ValueError(
            f"{settings.data.path}: no attribute is common enough, and the study asks what features follow"
        )
    recommenders = run.train_recommender(settings.recommender)
    run.collect_activations(settings.activations)
    quality = run.train_sae(settings.sae)
    run.interpret()
    results = {
        name: run.section(f"study/{name}", asdict(chosen), partial(SECTIONS[name].measure, run, chosen))
        for name, chosen in settings.sections.items()
    }
    untouched = recommenders["transformer"]["ndcg@10"]
    kept = quality["reconstruction"]["ndcg@10"] / untouched if untouched else 0.0
    reached = goals(results, site=run.site, reconstruction_kept=kept)
    names = [*STEPS[: STEPS.index("interpretation") + 1], *(f"study/{name}" for name in results)]
    facts = StudyFacts(
        title=f"What a recommender has learned from {described['name']}",
        command=command,
        data=described,
        recommender=recommenders,
        goals=reached,
        times={name: run.seconds(name) for name in names},
        settings={**run.settings(), **{name: asdict(chosen) for name, chosen in settings.sections.items()}},
    )
    study = {
        "goals": reached,
        "data": described,
        "recommender": recommenders,
        "sae": quality,
        **{name: result for name, result in results.items() if name != "browser"},
        "settings": facts.settings,
        "seconds": facts.times,
        "command": command,
    }
    write_json(run.folder / "study.json", study)
    write_tables(run.folder / "tables", {**results, "data": described, "recommender": recommenders})
    write_figures(run.folder / "figures", results)
    write_study_report(run.folder / "report.html", results, facts=facts)
    return study
