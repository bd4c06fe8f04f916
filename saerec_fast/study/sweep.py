"""The sweep: many SAEs, each measured for faithfulness, sparsity and interpretability on the same users.

A trial is one SAE of one site. Every trial is trained on the users of the run's own SAE and measured on its test users,
in a process of its own with one thread, so that results do not depend on how many run at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saerec_fast.files import read_json, write_json
from saerec_fast.interpret import FeatureStatistics, FeatureStatisticsResult
from saerec_fast.pipeline import Run
from saerec_fast.recommender import collect, sites
from saerec_fast.recommender.training import progress_bar
from saerec_fast.sae import ActivationStore, SAETrainingConfig, train_sae
from saerec_fast.sae.activation_store import Batch

_READ_ROWS = 16384
_QUICK_STEPS = 1000

# How tables call the kinds of SAE, and the parameter that sets how sparse each is.
GROUPS = {
    "relu": ("ReLU", "l1_coefficient"),
    "topk": ("TopK", "k"),
    "batch_topk": ("BatchTopK", "k"),
    "jump_relu": ("JumpReLU", "l0_coefficient"),
    "gated": ("Gated", "l1_coefficient"),
}


@dataclass(frozen=True)
class SweepSettings:
    """Which SAEs are tried.

    Attributes:
        base: what all trials share; each changes its activation, its size and the parameter that sets its sparsity.
        n_features: sizes of the dictionary of the kinds in ``grid``.
        grid: kind → values of its parameter (see :data:`GROUPS`), each with every size.
        line: kind → values of its parameter, with the size of ``base`` alone.
        sites: whether the run's own SAE is also trained at every other site of the recommender.
    """

    base: SAETrainingConfig
    n_features: tuple[int, ...] = (512, 1024, 2048)
    grid: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("relu", (0.3, 0.5, 0.8, 1.2)),
        ("topk", (8, 16, 32, 64)),
        ("batch_topk", (8, 16, 32, 64)),
    )
    line: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("jump_relu", (0.02, 0.05, 0.15, 0.4)),
        ("gated", (0.6, 1.0, 2.0, 4.0)),
    )
    sites: bool = True

    def quick(self) -> SweepSettings:
        """A corner of the sweep, with fewer steps."""
        return SweepSettings(
            replace(self.base, steps=min(_QUICK_STEPS, self.base.steps)),
            n_features=(self.base.n_features,),
            grid=(("relu", (0.3, 1.0)), ("topk", (8, 32)), ("batch_topk", (8, 32))),
            line=(),
        )


@dataclass(frozen=True)
class Trial:
    """One SAE of the sweep."""

    name: str
    site: str
    parameter: str
    config: SAETrainingConfig


def trials(settings: SweepSettings, run: Run) -> list[Trial]:
    """The trials of a sweep, those of the run's site first."""
    found = []
    chosen = [(kind, value, n) for kind, values in settings.grid for n in settings.n_features for value in values]
    chosen += [(kind, value, settings.base.n_features) for kind, values in settings.line for value in values]
    for kind, value, n_features in chosen:
        parameter = GROUPS[kind][1]
        changed = {parameter: int(value) if parameter == "k" else float(value)}
        config = replace(settings.base, activation=kind, n_features=n_features, **changed)  # type: ignore[arg-type]
        found.append(Trial(f"{run.site}-{kind}-{value:g}-of-{n_features}", run.site, parameter, config))
    kind = settings.base.activation
    parameter = GROUPS[kind][1]
    for site in sites(run.model) if settings.sites else ():
        value = getattr(settings.base, parameter)
        trial = Trial(f"{site}-{kind}-{value:g}-of-{settings.base.n_features}", site, parameter, settings.base)
        if trial not in found:
            found.append(trial)
    return found


def measure(run: Run, settings: SweepSettings, folder: Path) -> dict[str, Any]:
    """Train and measure every trial; those that ``folder`` holds already are kept.

    Args:
        run: finished up to its interpretation.
        settings: which SAEs.
        folder: gets a sub-folder per trial, and the hidden states of every site.

    Returns:
        ``original_ndcg@10``, ``points``: per trial its group, site, size, parameter, quality
        (:meth:`saerec_fast.pipeline.Run.sae_quality`) and mean-max correlation and ROC AUC as ``[value, low, high]``,
        ``correlation_elsewhere`` with the features chosen on the SAE's training users; and ``raw``: site →
        ``correlation`` and ``roc_auc`` of the raw dimensions.
    """
    chosen = trials(settings, run)
    used = list(dict.fromkeys(trial.site for trial in chosen))
    with progress_bar(run.progress, "hidden states of every site", len(used)) as show:
        for done, site in enumerate(used, 1):
            _collect(run, site, folder / "sites" / site)
            show(done, site)
    raw = {site: _raw(run, folder / "sites" / site) for site in used}
    points: dict[str, dict[str, Any]] = {}
    missing = []
    for trial in chosen:
        path = folder / "trials" / trial.name / "point.json"
        if path.exists():
            points[trial.name] = read_json(path)
        else:
            missing.append(trial)
    with progress_bar(run.progress, "SAEs of the sweep", len(chosen)) as show:
        show(len(points), "")
        for point in _run_trials(run.folder, folder, missing):
            points[point["name"]] = point
            show(len(points), point["name"])
    return {
        "original_ndcg@10": run.result("recommender")["transformer"]["ndcg@10"],
        "points": [points[trial.name] for trial in chosen],
        "raw": raw,
    }


def _run_trials(run_folder: Path, folder: Path, missing: list[Trial]) -> Iterator[dict[str, Any]]:
    workers = min(torch.get_num_threads(), len(missing))
    if workers <= 1:
        threads = torch.get_num_threads()
        try:
            for trial in missing:
                yield _run_trial(run_folder, folder, trial)
        finally:
            torch.set_num_threads(threads)
        return
    # Not forked: a child of a process with running OpenMP threads may hang.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(_run_trial, run_folder, folder, trial) for trial in missing]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # What they have not finished is trained on from its checkpoint next time.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_trial(run_folder: Path, folder: Path, trial: Trial) -> dict[str, Any]:
    """Train and measure one trial, and keep its figures."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    run = Run(run_folder, progress=False)
    target = folder / "trials" / trial.name
    stores = folder / "sites" / trial.site
    sae = train_sae(ActivationStore(stores / "sae_users"), trial.config, target, progress=False).eval()
    seconds = time.perf_counter() - started
    quality = run.sae_quality(sae, trial.site)

    def statistics(part: str, groups: int) -> FeatureStatisticsResult:
        attributes, names = run.attributes
        found = FeatureStatistics(sae.n_features, attributes, names, max_groups=groups)
        for batch in _rows(stores / part):
            with torch.inference_mode():
                found.update(sae.encode(batch.hidden), batch.items, batch.users)
        return found.result()

    on_test = statistics("test", groups=256)
    summary = on_test.summary()
    elsewhere = on_test.summary(features=statistics("sae_users", groups=1).best_features(), resamples=0)
    point = {
        "name": trial.name,
        "group": GROUPS[trial.config.activation][0],
        "site": trial.site,
        "n_features": trial.config.n_features,
        "parameter": trial.parameter,
        "value": getattr(trial.config, trial.parameter),
        **{key: quality[key] for key in ("explained_variance", "l0", "dead_fraction", "mae", "rmse")},
        "ndcg@10": quality["reconstruction"]["ndcg@10"],
        "correlation": summary.mean_max_correlation.as_list(),
        "roc_auc": summary.mean_max_roc_auc.as_list(),
        "correlation_elsewhere": elsewhere.mean_max_correlation.as_list()[0],
        "roc_auc_elsewhere": elsewhere.mean_max_roc_auc.as_list()[0],
        "seconds": seconds,
    }
    write_json(target / "point.json", point)
    return point


def _collect(run: Run, site: str, folder: Path) -> None:
    """The hidden states of a site on disk, for the SAE's users and the test users; those that are whole are kept."""
    for part, dataset in (("sae_users", run.sae_users), ("test", run.split.test)):
        if not _is_whole(folder / part):
            collect(run.model, dataset, site, folder / part, progress=False)


def _is_whole(path: Path) -> bool:
    try:
        ActivationStore(path)
    except (ValueError, FileNotFoundError):
        return False
    return True


def _rows(path: Path) -> Iterator[Batch]:
    return ActivationStore(path).batches(_READ_ROWS)


def _raw(run: Run, folder: Path) -> dict[str, Any]:
    attributes, names = run.attributes
    statistics = FeatureStatistics(run.model.config.d_model, attributes, names, signed=False)
    for batch in _rows(folder / "test"):
        statistics.update_dense(batch.hidden, batch.items, batch.users)
    summary = statistics.result().summary()
    return {"correlation": summary.mean_max_correlation.as_list(), "roc_auc": summary.mean_max_roc_auc.as_list()}
