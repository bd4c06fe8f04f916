"""What SAE features mean, beside other readings of the same hidden states.

Features and directions are chosen both on the test users, as in the paper, and on the users the SAE was trained on;
every figure is measured on the test users. Those are other users, but not other items: what tells an item apart can be
used to tell its attributes, by a probe most of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saerec_fast.files import read_json, write_json
from saerec_fast.interpret import (
    BestFeatures,
    FeatureStatistics,
    FeatureStatisticsResult,
    Summary,
    TopExamples,
)
from saerec_fast.interpret.monosemanticity import attribute_entropy
from saerec_fast.interpret.representations import (
    LinearMap,
    independent_components,
    linear_probe,
    principal_components,
    random_directions,
    sample_rows,
)
from saerec_fast.interpret.stability import Matching, match_directions, match_random
from saerec_fast.pipeline import Run
from saerec_fast.recommender import iterate_hidden
from saerec_fast.recommender.training import progress_bar
from saerec_fast.sae import ActivationStore, SAETrainingConfig, SparseAutoencoder, train_sae

# Activations of a dense representation that its ROC AUC rests on (262,144 rows of 64 directions, 16,384 of 1,024), and
# that directions are chosen on among the SAE's users: all of them would take minutes and say hardly more.
_AUC_ENTRIES = 1 << 24
_CHOICE_ENTRIES = 1 << 26
_READ_ROWS = 16384
_ENTROPY_EDGES = np.linspace(0, 1.5, 31)
_COSINE_EDGES = np.linspace(-0.2, 1, 25)
_STABLE = (0.7, 0.9)


@dataclass(frozen=True)
class InterpretabilitySettings:
    """How much is measured.

    Attributes:
        features_per_attribute: features listed per attribute with precision, recall and F1.
        distribution_bins: of the histograms of activations.
        top_items: distinct items per feature behind the entropy of attributes.
        minimum_items: features that fired on fewer are left out of it.
        ica_rows, ica_iterations: of the fit of independent components.
        probe_rows: of the fit of the probes.
        more_seeds: SAEs trained again with the seeds after the run's own.
        seed_steps: their training steps, at most; None: as many as the run's SAE.
        seed: of samples, random directions and expectations.
    """

    features_per_attribute: int = 3
    distribution_bins: int = 40
    top_items: int = 20
    minimum_items: int = 10
    ica_rows: int = 50_000
    ica_iterations: int = 400
    probe_rows: int = 200_000
    more_seeds: int = 2
    seed_steps: int | None = None
    seed: int = 0

    @classmethod
    def quick(cls) -> InterpretabilitySettings:
        return cls(ica_rows=10_000, ica_iterations=200, probe_rows=20_000, more_seeds=1, seed_steps=1000)


def measure(run: Run, settings: InterpretabilitySettings, folder: Path) -> dict[str, Any]:
    """The section "interpretability".

    Args:
        run: finished up to its interpretation.
        settings: how much is measured.
        folder: gets a file per part, and a sub-folder per SAE trained again; what is there is kept, so the caller
            empties it when the run or the settings change.

    Returns:
        Plain json. ``representations``: mean-max correlation and ROC AUC of SAE features, raw dimensions, principal and
        independent components, random directions (as many as the SAE has features: a maximum grows with the number
        of candidates, so that fewer would be a weaker opponent) and a probe per attribute, in all and per attribute;
        ``features``: precision, recall and F1 of each attribute's features, chosen with their thresholds on the SAE's
        users; ``distributions`` of the activations of each attribute's feature; ``heatmap``; ``monosemanticity``; and
        ``stability`` over seeds, None for no further seeds.
    """
    result: dict[str, Any] = {}
    result |= _kept(folder / "representations.json", lambda: _representations(run, settings))
    result |= _kept(folder / "features.json", lambda: _features(run, settings))
    result["monosemanticity"] = _kept(folder / "monosemanticity.json", lambda: _monosemanticity(run, settings))
    result["stability"] = _kept(folder / "stability.json", lambda: _stability(run, settings, folder))
    return result


def _kept(path: Path, compute: Callable[[], Any]) -> Any:
    if not path.exists():
        write_json(path, _plain(compute()))
    return read_json(path)


def _plain(value: Any) -> Any:
    """Json values, with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measured_attributes(test: FeatureStatisticsResult) -> list[str]:
    """Those common enough on the test users to take part in a summary."""
    return [one.attribute for one in test.summary(resamples=0).attributes]


def _store(run: Run) -> ActivationStore:
    """The hidden states of the users the SAE was trained on."""
    return ActivationStore(run.folder / "activations" / "store")


def _test_rows(run: Run) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return iterate_hidden(run.model, run.split.test, run.site)


def _representations(run: Run, settings: InterpretabilitySettings) -> dict[str, Any]:
    statistics = run.interpretation.statistics
    rows = []

    def add(name: str, label: str, test: FeatureStatisticsResult, train: FeatureStatisticsResult) -> None:
        rows.append(_representation(name, label, test.summary(), test.summary(features=train.best_features())))

    add("sae", f"{statistics['sae'].n_features:,} SAE features", statistics["sae"], statistics["sae_train"])
    for name, signed in (("raw_signed", True), ("raw_absolute", False)):
        test, train = (replace(statistics[part], signed=signed) for part in ("raw", "raw_train"))
        add(name, "raw dimensions, " + ("signed" if signed else "absolute"), test, train)

    run.say("  fitting principal and independent components and probes")
    store = _store(run)
    maps, probe = _linear_maps(run, store, settings)
    total = 2 * len(maps) + 1
    with progress_bar(run.progress, "representations", total) as show:
        for done, (name, (linear, label, signed)) in enumerate(maps.items()):
            show(2 * done, label)
            test = _linear_statistics(run, linear, _test_rows(run), signed=signed)
            show(2 * done + 1, label)
            train = _linear_statistics(
                run, linear, _sampled_rows(store, linear, settings.seed), signed=signed, groups=1
            )
            add(name, label, test, train)
        show(total - 1, "linear probe")
        test = _linear_statistics(run, probe, _test_rows(run), signed=True)
        show(total, "")
    every, ones = np.arange(len(test.attribute_names)), np.ones(len(test.attribute_names))
    own = BestFeatures(test.attribute_names, every, every, ones, ones)
    summary = test.summary(features=own)
    rows.append(_representation("probe", "linear probe (logistic regression)", summary, summary))
    for one in rows[-1]["attributes"]:
        one["feature"] = one["roc_auc_feature"] = None
    return {"representations": rows}


def _linear_maps(
    run: Run, store: ActivationStore, settings: InterpretabilitySettings
) -> tuple[dict[str, tuple[LinearMap, str, bool]], LinearMap]:
    """Name → map, label, and whether signs count; and the probe."""
    components = principal_components(store)
    whitening = components.whitening()
    independent, converged = independent_components(
        store, whitening, rows=settings.ica_rows, iterations=settings.ica_iterations, seed=settings.seed
    )
    directions = random_directions(run.sae.n_features, store.column_mean(), seed=settings.seed)
    # Neither kind of component has a sign of its own; a random direction is as likely as its opposite.
    maps = {
        "pca": (components.directions, "principal components", False),
        "ica": (independent, "independent components" + ("" if converged else " (not converged)"), False),
        "random": (directions, f"{directions.n_outputs:,} random directions", True),
    }
    return maps, linear_probe(store, whitening, run.attributes[0], rows=settings.probe_rows, seed=settings.seed)


def _sampled_rows(store: ActivationStore, linear: LinearMap, seed: int) -> Iterator[tuple[Tensor, Any, Any]]:
    chosen = sample_rows(len(store), max(_CHOICE_ENTRIES // linear.n_outputs, 1), seed)
    for start in range(0, len(chosen), _READ_ROWS):
        rows = chosen[start : start + _READ_ROWS]
        yield torch.from_numpy(store.hidden[rows]), store.users[rows], store.items[rows]


def _linear_statistics(
    run: Run, linear: LinearMap, rows: Iterator[tuple[Tensor, Any, Any]], *, signed: bool, groups: int = 256
) -> FeatureStatisticsResult:
    attributes, names = run.attributes
    found = FeatureStatistics(
        linear.n_outputs,
        attributes,
        names,
        signed=signed,
        auc_rows=max(_AUC_ENTRIES // linear.n_outputs, 1),
        max_groups=groups,
    )
    for hidden, users, items in rows:
        found.update_dense(linear(hidden), items, users)
    return found.result()


def _representation(name: str, label: str, here: Summary, elsewhere: Summary) -> dict[str, Any]:
    """``here``: chosen on the test users; ``elsewhere``: chosen on the SAE's users. Both measured on the test users."""
    others = {one.attribute: one for one in elsewhere.attributes}
    return {
        "name": name,
        "label": label,
        "correlation": here.mean_max_correlation.as_list(),
        "roc_auc": here.mean_max_roc_auc.as_list(),
        "correlation_elsewhere": elsewhere.mean_max_correlation.as_list()[0],
        "roc_auc_elsewhere": elsewhere.mean_max_roc_auc.as_list()[0],
        "correlation_elsewhere_interval": elsewhere.mean_max_correlation.as_list(),
        "roc_auc_elsewhere_interval": elsewhere.mean_max_roc_auc.as_list(),
        "attributes": [
            {
                "attribute": one.attribute,
                "share": one.share,
                "feature": one.correlation_feature,
                "correlation": one.correlation.as_list(),
                "roc_auc_feature": one.roc_auc_feature,
                "roc_auc": one.roc_auc.as_list(),
                "correlation_elsewhere": others[one.attribute].correlation.value if one.attribute in others else None,
                "roc_auc_elsewhere": others[one.attribute].roc_auc.value if one.attribute in others else None,
            }
            for one in here.attributes
        ],
        "notes": here.notes,
    }


def _features(run: Run, settings: InterpretabilitySettings) -> dict[str, Any]:
    """Precision, recall and F1, distributions and the heat map, of features chosen on the SAE's users."""
    test, train = run.interpretation.statistics["sae"], run.interpretation.statistics["sae_train"]
    listed: list[dict[str, Any]] = []
    distributions = []
    best: dict[str, int] = {}
    for attribute in _measured_attributes(test):
        column = test.attribute_index(attribute)
        features = train.top_features(attribute, settings.features_per_attribute)
        for feature in features:
            present, absent = test.activations(feature, attribute)
            for rule, threshold in _thresholds(train, feature, attribute).items():
                listed.append(
                    {
                        "attribute": attribute,
                        "feature": feature,
                        "rule": rule,
                        "threshold": threshold,
                        **precision_recall(present, absent, threshold),
                        "correlation": test.correlation[feature, column],
                        "roc_auc": test.roc_auc[feature, column],
                    }
                )
        if features:
            best[attribute] = features[0]
            present, absent = test.activations(features[0], attribute)
            distributions.append(
                {
                    "attribute": attribute,
                    "feature": features[0],
                    **_distribution(present, absent, settings.distribution_bins),
                }
            )
    shown = list(dict.fromkeys(best.values()))
    columns = [test.attribute_index(attribute) for attribute in best]
    return {
        "features": listed,
        "distributions": distributions,
        "heatmap": {
            "attributes": list(best),
            "features": shown,
            "correlation": test.correlation[np.ix_(shown, columns)].T,
        },
    }


def precision_recall(
    present: NDArray[np.float64], absent: NDArray[np.float64], threshold: float
) -> dict[str, float | None]:
    """How well "the activation exceeds ``threshold``" says that an item has the attribute.

    Args:
        present: ``(p,)``, activations at items with the attribute.
        absent: ``(q,)``, at the others.
        threshold: exceeded, not only reached.

    Returns:
        ``precision`` (None where nothing exceeds the threshold), ``recall`` (None without such items) and ``f1``, their
        harmonic mean as 2 · hits / (2 · hits + misses + false alarms), so that it is 0 where nothing exceeds.
    """
    hits, false_alarms = int((present > threshold).sum()), int((absent > threshold).sum())
    fired, counted = hits + false_alarms, hits + false_alarms + len(present)
    return {
        "precision": hits / fired if fired else None,
        "recall": hits / len(present) if len(present) else None,
        "f1": 2 * hits / counted if counted else None,
    }


def _thresholds(train: FeatureStatisticsResult, feature: int, attribute: str) -> dict[str, float]:
    """Thresholds by the SAE's users: any activation, the median of those, and what gives the best F1 there."""
    from sklearn.metrics import precision_recall_curve

    thresholds = {"fired": 0.0}
    if np.isfinite(train.quantiles[feature, 0]):
        thresholds["median"] = float(train.quantiles[feature, 0])
    present, absent = train.activations(feature, attribute)
    if len(present) and len(absent):
        labels = np.repeat([True, False], [len(present), len(absent)])
        precision, recall, reached = precision_recall_curve(labels, np.concatenate([present, absent]))
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        # The curve counts a threshold that is reached; above the value before it is the same. Reached by all: no rule.
        if len(reached) > 1:
            thresholds["best_f1"] = float(reached[np.argmax(f1[1:-1])])
    return thresholds


def _distribution(present: NDArray[np.float64], absent: NDArray[np.float64], bins: int) -> dict[str, Any]:
    """Histograms of the activations above 0, whose areas are the shares of the rows in which the feature fired."""
    fired = np.concatenate([present, absent])
    fired = fired[fired > 0]
    # The few strongest rows would squeeze all others into a few bins; they count in the last one.
    edges = np.linspace(0, float(np.quantile(fired, 0.995)) if len(fired) else 1.0, bins + 1)

    def density(values: NDArray[np.float64]) -> NDArray[np.float64]:
        counts, _ = np.histogram(np.minimum(values[values > 0], edges[-1]), edges)
        return counts / (max(len(values), 1) * np.diff(edges))

    return {
        "edges": edges,
        "present": density(present),
        "absent": density(absent),
        "silent_present": float((present <= 0).mean()) if len(present) else None,
        "silent_absent": float((absent <= 0).mean()) if len(absent) else None,
    }


def _monosemanticity(run: Run, settings: InterpretabilitySettings) -> dict[str, Any]:
    attributes, _ = run.attributes
    test, sae = run.split.test, run.sae
    mean = _store(run).column_mean()
    # Both ends of a raw dimension may mean something.
    both = np.concatenate([np.eye(sae.d_model), -np.eye(sae.d_model)])
    maps = {
        "raw": LinearMap(both, -both @ mean),
        "random": random_directions(sae.n_features, mean, seed=settings.seed),
    }
    tops = {"sae": TopExamples(sae.n_features, settings.top_items)}
    tops |= {name: TopExamples(linear.n_outputs, settings.top_items) for name, linear in maps.items()}
    with progress_bar(run.progress, "top items of features and directions", test.n_interactions) as show:
        done = 0
        for hidden, users, items in _test_rows(run):
            with torch.inference_mode():
                tops["sae"].update(sae.encode(hidden), items, users)
            for name, linear in maps.items():
                tops[name].update_dense(linear(hidden), items, users)
            done += len(hidden)
            show(done, "")
    occurrences = np.bincount(test.items, minlength=test.n_items)
    result: dict[str, Any] = {
        "explain": (
            f"Entropy in bits of the attributes among the {settings.top_items} distinct items of the test users on "
            "which a feature is strongest; an item spreads its weight evenly over its attributes. Normalised: divided "
            "by what as many items, met by chance, have on average; 0 is one attribute only, 1 is as mixed as the data."
            f" Features that fired on fewer than {settings.minimum_items} items are left out. Both ends of a raw "
            "dimension count."
        )
    }
    for name, top in tops.items():
        items_of = [[example.item for example in top.examples(feature)] for feature in range(top.n_features)]
        found = attribute_entropy(
            items_of,
            attributes,
            occurrences,
            minimum_items=settings.minimum_items,
            seed=settings.seed,
        )
        result[name] = {
            "mean_entropy_bits": found.entropy.mean() if len(found.entropy) else None,
            "normalised": found.normalised.mean() if len(found.entropy) else None,
            "median_normalised": np.median(found.normalised) if len(found.entropy) else None,
            "share_below_0.5": (found.normalised < 0.5).mean() if len(found.entropy) else None,
            "features": len(found.entropy),
            "left_out": found.left_out,
            # Directions that share their strongest items, as those of outlying rows do, share their entropy too.
            "distinct_items": len({item for items in items_of for item in items}),
            "histogram": _histogram(found.normalised, _ENTROPY_EDGES),
        }
    return result


def _histogram(values: NDArray[np.float64], edges: NDArray[np.float64]) -> dict[str, Any]:
    """Counts; values beyond an edge go into the bin at it."""
    return {"edges": edges, "counts": np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]}


@dataclass(frozen=True)
class _Again:
    """An SAE of another seed: its statistics on the test users, its living features, and how they match."""

    seed: int
    statistics: FeatureStatisticsResult
    living: NDArray[np.int64]
    match: Matching


def _stability(run: Run, settings: InterpretabilitySettings, folder: Path) -> dict[str, Any] | None:
    """How well the living features of the run's SAE are found again by SAEs of other seeds."""
    config = SAETrainingConfig.from_dict(run.settings()["sae"])
    seeds = [config.seed + 1 + more for more in range(settings.more_seeds)]
    if not seeds:
        return None
    steps = min(settings.seed_steps or config.steps, config.steps)
    living = np.flatnonzero(run.interpretation.statistics["sae"].fired_counts)
    dictionary = _directions(run.sae, living)
    found = []
    for seed in seeds:
        run.say(f"  SAE of seed {seed}")
        again = replace(config, seed=seed, steps=steps)
        sae = train_sae(_store(run), again, folder / f"seed-{seed}", progress=run.progress).eval()
        statistics = _sae_statistics(run, sae)
        others = np.flatnonzero(statistics.fired_counts)
        found.append(_Again(seed, statistics, others, match_directions(dictionary, _directions(sae, others))))
    summaries = [one.statistics.summary(resamples=0) for one in found]
    baseline = [match_random(dictionary, len(living), seed=settings.seed + index) for index in range(len(seeds))]
    return {
        "seeds": seeds,
        "steps": steps,
        "living": len(living),
        **_cosines([one.match for one in found]),
        "of_attribute_features": _attribute_stability(run, living, found),
        "of_seeds": [
            {
                "seed": one.seed,
                "correlation": summary.mean_max_correlation.value,
                "roc_auc": summary.mean_max_roc_auc.value,
                "living": len(one.living),
            }
            for one, summary in zip(found, summaries, strict=True)
        ],
        "random_baseline": _cosines(baseline),
    }


def _attribute_stability(run: Run, living: NDArray[np.int64], found: list[_Again]) -> list[dict[str, Any]]:
    """Of each attribute's feature, chosen on the SAE's users: the cosine with its partners, and the correlation of
    those with the attribute; means over the seeds."""
    test, train = run.interpretation.statistics["sae"], run.interpretation.statistics["sae_train"]
    position = {int(feature): index for index, feature in enumerate(living)}
    result = []
    for attribute in _measured_attributes(test):
        column = test.attribute_index(attribute)
        feature = next(iter(train.top_features(attribute, 1)), -1)
        if feature not in position:
            continue
        at = position[feature]
        matched = [
            float(one.statistics.correlation[one.living[one.match.partner[at]], column])
            for one in found
            if one.match.partner[at] >= 0
        ]
        result.append(
            {
                "attribute": attribute,
                "feature": feature,
                "cosine": _mean([float(one.match.cosine[at]) for one in found]),
                "nearest_cosine": _mean([float(one.match.nearest_cosine[at]) for one in found]),
                "correlation": test.correlation[feature, column],
                "matched_correlation": _mean(matched),
            }
        )
    return result


def _directions(sae: SparseAutoencoder, features: NDArray[np.int64]) -> NDArray[np.float64]:
    return sae.W_dec.detach().double().numpy()[features]


def _sae_statistics(run: Run, sae: SparseAutoencoder) -> FeatureStatisticsResult:
    attributes, names = run.attributes
    found = FeatureStatistics(sae.n_features, attributes, names, max_groups=1)
    for hidden, users, items in _test_rows(run):
        with torch.inference_mode():
            found.update(sae.encode(hidden), items, users)
    return found.result()


def _cosines(found: list[Matching]) -> dict[str, Any]:
    """Over all seeds; features without a partner (the other dictionary has fewer living ones) count in no mean."""
    cosine = np.concatenate([match.cosine for match in found])
    cosine = cosine[np.isfinite(cosine)]
    return {
        "mean_matched_cosine": cosine.mean(),
        "median_matched_cosine": np.median(cosine),
        "mean_nearest_cosine": np.concatenate([match.nearest_cosine for match in found]).mean(),
        **{f"share_above_{least}": (cosine > least).mean() for least in _STABLE},
        "histogram": _histogram(cosine, _COSINE_EDGES),
    }


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
