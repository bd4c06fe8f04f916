"""The demonstration: every step of the study with settings for its size, metrics.json and report.html."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from saerec_fast.files import read_json, write_json
from saerec_fast.interpret import Estimate, ratio
from saerec_fast.interpret.report import (
    LARGER_SETS,
    Control,
    DataDescription,
    Interpretability,
    ModelMetrics,
    RecommendationExample,
    Recommended,
    ReportContext,
    SaeQuality,
    TrainingCurve,
    feature_cards,
    write_report,
)
from saerec_fast.pipeline import (
    RECOMMENDERS,
    ControlSettings,
    Run,
    compare_recommenders,
)
from saerec_fast.presets import activation_settings, data_settings, is_small, recommender_settings, sae_settings

_EMBEDDING_LIMIT = (
    "The hidden state taken apart here is the item embedding that enters the first block: the same wherever an item "
    "stands. What attention adds about the items before it is not in it; larger data are taken apart after block 0."
)


def run_demo(data: str, run: Run, *, seed: int = 0) -> dict[str, Any]:
    """Run or resume all steps, write ``metrics.json`` and ``report.html`` into the run's folder.

    Args:
        data: folder or file that :func:`saerec_fast.data.read_dataset` reads.
        run: the run to fill.
        seed: of the split, the recommender and the SAE.

    Returns:
        What ``metrics.json`` holds.
    """
    started = time.perf_counter()
    small = is_small(data)
    described = run.prepare_data(data_settings(data, small, seed))
    recommenders = run.train_recommender(recommender_settings(small, seed))
    run.collect_activations(activation_settings(small))
    quality = run.train_sae(sae_settings(small, seed))
    interpretation = run.interpret()
    control = run.control(ControlSettings())
    examples = _examples(run)
    metrics = {
        "data": {"name": described["name"], **{k: described["dataset"][k] for k in ("n_users", "n_items")}},
        "recommender": recommenders["transformer"],
        **{name: recommenders[name] for name in RECOMMENDERS if name != "transformer"},
        "leads": recommenders["leads"],
        "sae": {key: quality[key] for key in ("explained_variance", "l0", "dead_fraction", "mae", "rmse")},
        "reconstruction": quality["reconstruction"],
        "interpretability": {
            **interpretation["summaries"],
            "ratio": interpretation["ratio"],
        },
        "control": control["points"],
        "control_baseline": control["baseline"],
        "seconds": time.perf_counter() - started,
        "steps": [asdict(one) for one in run.times],
        "try": _try(run, examples),
    }
    write_json(run.folder / "metrics.json", metrics)
    write_report(run.folder / "report.html", _context(run, metrics, small, examples))
    return metrics


def run_comparison(
    data: str,
    folder: Path,
    *,
    n_folds: int = 5,
    targets_per_user: int = 10,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """:func:`saerec_fast.pipeline.compare_recommenders` with the demo's test users and recommender."""
    small = is_small(data)
    return compare_recommenders(
        data_settings(data, small, seed),
        recommender_settings(small, seed),
        folder,
        n_folds=n_folds,
        targets_per_user=targets_per_user,
        progress=progress,
        say=say,
    )


def _examples(run: Run) -> list[RecommendationExample]:
    """Two test users per steered attribute with the least of it in their list: where an edit shows best."""
    table = run.split.test.item_table
    examples = []
    for attribute in run.steerable_attributes(3):
        column = table.attribute_names.index(attribute)
        plan = run.plan([f"{attribute}=+2"], "delta", "all")
        user = _plain_user(run, column)
        history = run.split.test.sequence(user)[:-1]
        before, after = run.before_and_after(plan, history)

        def listed(items: Sequence[int], column: int = column) -> list[Recommended]:
            return [
                Recommended(
                    table.titles[item],
                    bool(table.attributes[item, column]),
                    [name for name, has in zip(table.attribute_names, table.attributes[item], strict=True) if has],
                )
                for item in items
                if item >= 0
            ]

        examples.append(
            RecommendationExample(
                f"{attribute}: feature {plan.feature_edits[0][1].feature}, plus twice a strong activation",
                [table.titles[item] for item in history[-8:]],
                listed(before),
                listed(after),
            )
        )
    return examples


def _plain_user(run: Run, column: int) -> int:
    """The test user whose history holds the attribute as often as the average user's does."""
    test = run.split.test
    shares = np.array([test.item_table.attributes[test.sequence(u)[:-1], column].mean() for u in range(test.n_users)])
    return int(np.argmin(np.abs(shares - shares.mean())))


def _try(run: Run, examples: Sequence[RecommendationExample]) -> dict[str, str]:
    attribute = run.steerable_attributes(1)[0]
    return {"history": "; ".join(examples[0].history[-3:]), "steer": f"{attribute}=+2"}


def _context(run: Run, metrics: Mapping[str, Any], small: bool, examples: Sequence[RecommendationExample]) -> Any:
    described = run.result("data")
    facts = described["dataset"]
    found = run.interpretation
    summaries = found.summaries()
    table = run.split.test.item_table
    names = list(found.statistics["sae"].attribute_names)
    columns = [table.attribute_names.index(name) for name in names]
    sae = run.sae
    curve = read_json(run.folder / "sae" / "training" / "training.json")
    epochs = read_json(run.folder / "recommender" / "model" / "training.json")
    return ReportContext(
        title=f"What a recommender has learned from {described['name']}",
        subtitle="A transformer that recommends the next item, taken apart into features, and steered by them",
        data=DataDescription(
            described["name"],
            {
                "Users": facts["n_users"],
                "Items": facts["n_items"],
                "Interactions": facts["n_interactions"],
                "Items kept": described["n_items"],
            },
            {name: part["users"] for name, part in described["parts"].items()},
            {
                one["name"]: one["interaction_share"]
                for one in sorted(facts["attributes"], key=lambda one: -one["interaction_share"])
            },
            described["notes"],
        ),
        recommenders=[
            _row(
                label[0].upper() + label[1:],
                metrics["recommender" if name == "transformer" else name],
                _lead(metrics, name),
            )
            for name, label in RECOMMENDERS.items()
        ],
        sae=SaeQuality(
            metrics["sae"]["explained_variance"],
            metrics["sae"]["l0"],
            metrics["sae"]["dead_fraction"],
            sae.n_features,
            sae.d_model,
            type(sae.activation).__name__,
            run.site,
            {"MAE": metrics["sae"]["mae"], "RMSE": metrics["sae"]["rmse"]},
            [_row("Original hidden state", metrics["recommender"]), _row("Reconstruction", metrics["reconstruction"])],
        ),
        interpretability=Interpretability(
            summaries["sae"],
            summaries["raw"],
            ratio(summaries["sae"], summaries["raw"]),
            summaries["sae_elsewhere"],
            summaries["raw_elsewhere"],
            found.statistics["sae"],
            measured_on=f"all positions of the {described['parts']['test']['users']} test users",
        ),
        control=Control(
            [{**point, "mode": f"{point['op']} ({point['mode']})"} for point in metrics["control"]],
            metrics["control_baseline"],
            [
                "set, all or last: the paper's edit, which replaces the hidden state by its edited reconstruction. "
                "add: the same amount added to the hidden state as it is, so that the SAE's error stays in it."
            ],
        ),
        recommendations=examples,
        cards=feature_cards(
            found.statistics["sae"],
            found.examples["sae"],
            summary=summaries["sae"],
            titles=table.titles,
            item_attributes=table.attributes[:, columns],
        ),
        larger_sets=LARGER_SETS if small else (),
        training=[
            TrainingCurve(
                "Recommender: validation NDCG@10", {"NDCG@10": [one["validation_ndcg"] for one in epochs["epochs"]]}
            ),
            TrainingCurve(
                "SAE: explained variance",
                {"explained variance": [one["explained_variance"] for one in curve["curve"]]},
                "Step",
                [one["step"] for one in curve["curve"]],
            ),
        ],
        settings=run.settings(),
        limits=[_EMBEDDING_LIMIT] if run.site == "embedding" else (),
        times={one.step: one.seconds for one in run.times if not one.reused},
    )


def _lead(metrics: Mapping[str, Any], name: str) -> Estimate | None:
    lead = metrics["leads"].get(name)
    return None if lead is None else Estimate(*lead)


def _row(name: str, measured: Mapping[str, Any], lead: Estimate | None = None) -> ModelMetrics:
    intervals = measured["intervals"]
    return ModelMetrics(
        name,
        {
            metric: Estimate(value, *intervals.get(metric, (None, None)))
            for metric, value in measured.items()
            if metric != "intervals"
        },
        lead=lead,
    )
