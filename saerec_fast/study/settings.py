"""What a study runs: the steps' settings and every section's, whole or quick."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from saerec_fast.pipeline import ActivationSettings, DataSettings, RecommenderSettings
from saerec_fast.presets import activation_settings, data_settings, is_small, recommender_settings, sae_settings
from saerec_fast.sae import SAETrainingConfig
from saerec_fast.study import browser, cases, control, interpretability, pairs, popularity, sweep

# The module of every section, in the order in which they run; each has `measure(run, settings, folder)`.
SECTIONS = {
    "sweep": sweep,
    "interpretability": interpretability,
    "browser": browser,
    "control": control,
    "popularity": popularity,
    "pairs": pairs,
    "cases": cases,
}

_QUICK_EPOCHS = 5
_QUICK_STEPS = 1000
_SWEEP_STEPS = 3000


@dataclass(frozen=True)
class StudySettings:
    """Settings of the steps, and of every section by its name."""

    data: DataSettings
    recommender: RecommenderSettings
    activations: ActivationSettings
    sae: SAETrainingConfig
    sections: dict[str, Any]


def study_settings(data: str, *, quick: bool = False, seed: int = 0) -> StudySettings:
    """Settings by the size of the data set (see :mod:`saerec_fast.presets`).

    Args:
        data: folder or file that :func:`saerec_fast.data.read_dataset` reads.
        quick: fewer epochs, steps and SAEs, coarser curves: to look at, not to quote.
        seed: of the split, the recommender and every SAE.
    """
    small = is_small(data)
    recommender, sae = recommender_settings(small, seed), sae_settings(small, seed)
    base = replace(sae, steps=min(_SWEEP_STEPS, sae.steps))
    sections: dict[str, Any] = {
        "sweep": sweep.SweepSettings(base),
        "interpretability": interpretability.InterpretabilitySettings(),
        "browser": browser.BrowserSettings(),
        "control": control.StudyControlSettings(),
        "popularity": popularity.PopularitySettings(),
        "pairs": pairs.PairSettings(),
        "cases": cases.CaseSettings(),
    }
    if quick:
        recommender = replace(recommender, epochs=min(_QUICK_EPOCHS, recommender.epochs))
        sae = replace(sae, steps=min(_QUICK_STEPS, sae.steps))
        sections = {name: settings.quick() for name, settings in sections.items()}
    return StudySettings(data_settings(data, small, seed), recommender, activation_settings(small), sae, sections)
