"""A small run on generated data, finished up to its interpretation, and a small study for its page."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from small_run import small_run
from untrained import untrained_recommender

from saerec_fast.data import Split, split_users, synthetic_dataset
from saerec_fast.pipeline import Run
from saerec_fast.recommender import SequenceRecommender
from saerec_fast.study.report import StudyFacts

NASTY = "A </script><script>alert(\"1\")</script> & 'film'"


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run; copy it (``run``) to write into it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = small_run(tmp_path_factory.mktemp("study"))
    torch.set_num_threads(threads)
    return run.folder


@pytest.fixture(scope="module")
def split() -> Split:
    return split_users(synthetic_dataset(n_users=120, n_items=60, n_attributes=4, seed=1, mean_length=9.0), seed=1)


@pytest.fixture(scope="module")
def model(split: Split) -> SequenceRecommender:
    """Untrained, of width 16."""
    return untrained_recommender(split.n_items, 16)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    """A run of its own for one test."""
    shutil.copytree(finished, tmp_path / "a run of its own")
    return Run(tmp_path / "a run of its own", progress=False)


@pytest.fixture
def results():
    """A small study, one or two entries of everything."""
    edges, counts = [0.0, 0.5, 1.0], [3, 1]
    attributes = [
        {
            "attribute": name,
            "share": 0.2,
            "feature": 3,
            "correlation": [value, value - 0.1, None],
            "roc_auc": [0.8, 0.7, 0.9],
        }
        for name, value in (("Horror", 0.61), ("Sci-Fi", 0.4))
    ]
    points = [{"strength": one, "share": 0.1 + one / 10, "ndcg@10": 0.13 - one / 50} for one in (0.5, 1.0)]
    browser = [
        {
            "feature": number,
            "attributes": [{"name": "Horror", "correlation": 0.5 - number / 10}] if number < 2 else [],
            "firing_rate": 0.04,
            "top": [{"title": NASTY if number == 0 else f"Title {number}", "value": 1.5}],
            "histogram": {"edges": edges, "counts": counts},
            "up": [{"title": "Up", "push": 0.2}],
            "down": [{"title": "Down", "push": -0.2}],
            "nearest": [{"feature": (number + 1) % 120, "cosine": 0.3}],
        }
        for number in range(120)
    ]
    return {
        "sweep": {
            "original_ndcg@10": 0.13,
            "points": [
                {
                    "name": f"{site}-{k}",
                    "group": "TopK",
                    "site": site,
                    "n_features": 64,
                    "parameter": "k",
                    "value": k,
                    "explained_variance": 0.9123456789,
                    "l0": float(k),
                    "dead_fraction": 0.0,
                    "mae": 0.1,
                    "rmse": 0.2,
                    "ndcg@10": 0.12,
                    "correlation": [0.3, 0.2, 0.4],
                    "roc_auc": [0.7, None, None],
                    "correlation_elsewhere": 0.29,
                    "seconds": 2.0,
                }
                for site, k in (("block.0", 8), ("block.0", 16), ("last", 8))
            ],
            "raw": {"block.0": {"correlation": [0.2, 0.1, 0.3], "roc_auc": [0.6, 0.5, 0.7]}},
        },
        "interpretability": {
            "representations": [
                {"name": "sae", "label": "SAE", "correlation": [0.5, 0.4, 0.6], "roc_auc": [0.8, 0.7, 0.9]}
                | {"attributes": attributes}
            ],
            "features": [
                {"attribute": "Horror", "feature": 3, "threshold": 0.0, "precision": None, "recall": 0.2, "f1": None}
                | {"correlation": 0.6, "roc_auc": 0.8}
            ],
            "distributions": [
                {"attribute": "Horror", "feature": 3, "edges": edges, "present": [1.0, 0.5], "absent": [0.2, 0.1]}
            ],
            "heatmap": {"attributes": ["Horror", "Sci-Fi"], "features": [3], "correlation": [[0.6], [None]]},
            "monosemanticity": {
                "sae": {"mean_entropy_bits": 2.0, "normalised": 0.8, "histogram": {"edges": edges, "counts": counts}},
                "explain": "Entropy.",
            },
            "stability": {
                "seeds": [1],
                "mean_matched_cosine": 0.4,
                "histogram": {"edges": edges, "counts": counts},
                "of_attribute_features": [{"attribute": "Horror", "feature": 3, "cosine": 0.8}],
                "random_baseline": 0.3,
            },
        },
        "control": {
            "attributes": ["Horror"],
            "baseline": {"Horror": {"share": 0.1, "ndcg@10": 0.13}},
            "methods": [{"name": "set", "label": "set one feature", "what": "Sets it."}],
            "curves": [{"attribute": "Horror", "method": "set", "points": points}],
            "at_share": {
                "multiple": 6.0,
                "reference": "set",
                "methods": [
                    {"method": "set", "ndcg_kept": [0.7, 0.6, 0.8], "relative_to_reference": 1.0}
                    | {"attributes": {"Horror": 0.7, "Sci-Fi": None}}
                ],
            },
            "calibrated": [
                {"attribute": "Horror", "target": 0.2, "strength": 1.0, "share_on_sample": 0.2, "share": 0.21}
                | {"ndcg@10": 0.11, "method": "set"}
            ],
            "suppression": [{"attribute": "Horror", "method": "set", "share_left": 0.2, "ndcg_kept": 0.9}],
            "suppression_summary": [{"method": "set", "share_left": 0.2, "ndcg_kept": 0.9, "attributes": 1}],
        },
        "popularity": {
            "profiles": {"how": "Drawn at random."},
            "features": [
                {"feature": 3, "effect_size": 0.7, "mean_popular": 0.2, "mean_unpopular": 0.0, "attributes": ["A", "B"]}
            ],
            "histogram": {"edges": edges, "counts": counts},
            "curves": [
                {"method": "down", "label": "down"}
                | {
                    "points": [
                        {"strength": 1.0, "ndcg@10": 0.12, "coverage@10": 0.4, "gini@10": 0.7, "novelty@10": 2.0}
                        | {"long_tail_share": 0.1}
                    ]
                }
            ],
        },
        "pairs": {
            "pairs": [
                {
                    "attributes": ["Horror", "Sci-Fi"],
                    "untouched": {"shares": [0.1, 0.2], "both": 0.02, "ndcg@10": 0.13},
                    "points": [{"strength": 1.0, "shares": [0.2, 0.3], "both": 0.1, "ndcg@10": 0.1}],
                    "single": [],
                }
            ]
        },
        "cases": {
            "users": [
                {
                    "user": "7",
                    "history": [NASTY],
                    "features": [{"feature": 3, "attributes": ["Horror"], "activation": 1.0, "why": [NASTY]}],
                    "steered": {"attribute": "Horror", "plan": "Horror: feature 3 set to 2"},
                    "before": [{"title": "B", "score": 1.0, "marked": False, "attributes": []}],
                    "after": [{"title": NASTY, "score": 1.0, "marked": True, "attributes": ["Horror"]}],
                    "target": "T",
                    "target_rank_before": 40,
                    "target_rank_after": 3,
                }
            ]
        },
        "browser": {"features": browser},
    }


@pytest.fixture
def facts():
    return StudyFacts(
        "A study <b>",
        "saerec study --data made-up",
        {
            "name": "made-up",
            "n_items": 40,
            "notes": [],
            "dataset": {
                "n_users": 5,
                "n_items": 50,
                "n_interactions": 99,
                "attributes": [{"name": "Horror", "item_share": 0.2, "interaction_share": 0.3}],
            },
            "parts": {"train": {"users": 3, "interactions": 60}},
        },
        {"transformer": {"ndcg@10": 0.2, "intervals": {"ndcg@10": [0.1, 0.3]}}, "popularity": {"ndcg@10": 0.1}},
        [
            {"goal": "Correlation", "wanted": "≥ 0.70", "found": "0.50", "reached": False},
            {"goal": "Quality", "wanted": "≥ 99 %", "found": "99.5 %", "reached": True},
        ],
        {"sweep": 12.0},
        {"SAE": {"k": 32}},
    )
