"""The study as steps over one folder: data, recommender, hidden states, SAE, interpretation, control.

Every step lives in a sub-folder with ``settings.json`` (what it was asked for, and a digest of the steps before it),
its artefacts, and, once it is done, ``result.json``. A step whose settings still hold and whose result is there is
reused; one that was cut off goes on where its own checkpoints allow; one whose settings changed starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saerec_fast.data import (
    Dataset,
    Split,
    common_attributes,
    cross_validation_splits,
    describe,
    read_dataset,
    split_users,
)
from saerec_fast.files import read_json, write_json
from saerec_fast.interpret import FeatureStatistics, FeatureStatisticsResult, Summary, TopExamples, ratio
from saerec_fast.interpret.control import control_curve, control_figures, evaluate_steered, valid_positions
from saerec_fast.recommender import (
    ItemKNNRecommender,
    Metrics,
    PopularityRecommender,
    RecommenderConfig,
    SequenceRecommender,
    TransformerScorer,
    bootstrap_interval,
    collect,
    cross_validate,
    evaluate,
    item_popularity,
    iterate_hidden,
    site_module,
    train_recommender,
)
from saerec_fast.request import parse_edit
from saerec_fast.sae import ActivationStore, SAETrainingConfig, SparseAutoencoder, evaluate_sae, train_sae
from saerec_fast.steering import attach
from saerec_fast.types import SteeringPlan

if TYPE_CHECKING:
    from saerec_fast.recommender.evaluation import Recommend
    from saerec_fast.types.plan import Mode, Op

STEPS = ("data", "recommender", "activations", "sae", "interpretation", "control")

# What a study compares, in this order: the keys of its results, and how tables call them.
RECOMMENDERS = {
    "transformer": "transformer",
    "recent_item_knn": "recency-weighted item-kNN",
    "item_knn": "item-kNN",
    "popularity": "popularity",
}

# The command that makes a step, and what a Run keeps loaded of it.
_COMMANDS = {
    "data": "saerec train",
    "recommender": "saerec train",
    "activations": "saerec sae",
    "sae": "saerec sae",
    "interpretation": "saerec interpret",
    "control": "saerec steer",
}
_LOADED = {
    "data": ("split", "popularity"),
    "recommender": ("model",),
    "activations": ("site",),
    "sae": ("sae",),
    "interpretation": ("interpretation",),
}

# Edit, mode, positions: the paper's two, and what an error-preserving edit does beside them.
CONTROL_WAYS: tuple[tuple[Op, Mode, str], ...] = (
    ("set", "reconstruct", "all"),
    ("set", "reconstruct", "last"),
    ("add", "delta", "all"),
)


@dataclass(frozen=True)
class DataSettings:
    """Which data, and how its users are split; see :func:`saerec_fast.data.split_users`."""

    path: str
    test_share: float = 0.15
    sae_share: float = 0.2
    validation_share: float = 0.05
    min_item_count: int = 5
    min_attribute_share: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class RecommenderSettings:
    """Shape and training of the recommender; see :func:`saerec_fast.recommender.train_recommender`."""

    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 2
    max_length: int = 50
    dropout: float = 0.1
    item_dropout: float = 0.2
    scale_embedding: bool = False
    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 1e-3
    patience: int = 8
    seed: int = 0


@dataclass(frozen=True)
class ActivationSettings:
    """Where hidden states are taken, and of whom.

    Attributes:
        site: a name of :func:`saerec_fast.recommender.sites`.
        users: ``train_sae`` (the protocol: users the recommender was not trained on) or ``non_test`` (all but the test
            users, for small data).
    """

    site: str = "block.0"
    users: str = "train_sae"


@dataclass(frozen=True)
class ControlSettings:
    """The control experiment.

    Attributes:
        attributes: which; empty: the ``n_attributes`` whose best feature correlates most.
        n_attributes: how many, where none are named.
        multiples: values to set a feature to, in units of the 99th percentile of its activations.
    """

    attributes: tuple[str, ...] = ()
    n_attributes: int = 4
    multiples: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Interpretation:
    """What one pass over the hidden states found.

    Attributes:
        statistics: ``sae`` and ``raw`` on the test users, ``sae_train`` and ``raw_train`` on those of the SAE.
        examples: ``sae`` and ``raw``, on the test users.
    """

    statistics: dict[str, FeatureStatisticsResult]
    examples: dict[str, TopExamples]

    def summaries(self) -> dict[str, Summary]:
        """``sae`` and ``raw``: features chosen and measured on the test users, as in the paper; ``sae_elsewhere`` and
        ``raw_elsewhere``: chosen on the SAE's training users, measured on the test users."""
        found = {name: self.statistics[name].summary() for name in ("sae", "raw")}
        for name in ("sae", "raw"):
            chosen = self.statistics[f"{name}_train"].best_features()
            found[f"{name}_elsewhere"] = self.statistics[name].summary(features=chosen)
        return found


@dataclass
class StepTime:
    """How long a step took; ``reused`` steps were there already."""

    step: str
    seconds: float
    reused: bool


@dataclass
class Run:
    """A folder of artefacts and the steps that fill it.

    Args:
        folder: created if missing.
        progress: show progress bars.
        say: called with a line of text when a step starts, is reused or has something to say.

    Raises:
        FileNotFoundError: by the artefact properties, where the step before has not been run; the message names
            the command that makes it.
    """

    folder: Path
    progress: bool = True
    say: Callable[[str], None] = lambda line: None
    times: list[StepTime] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)

    @cached_property
    def split(self) -> Split:
        self._require("data")
        return Split.load(self.folder / "data" / "split")

    @cached_property
    def model(self) -> SequenceRecommender:
        self._require("recommender")
        return SequenceRecommender.load(self.folder / "recommender" / "model").eval()

    @cached_property
    def sae(self) -> SparseAutoencoder:
        self._require("sae")
        return SparseAutoencoder.load(self.folder / "sae" / "model").eval()

    @cached_property
    def site(self) -> str:
        self._require("activations")
        site: str = self._settings("activations")["site"]
        return site

    @cached_property
    def popularity(self) -> np.ndarray:
        """Share of training users per item."""
        return item_popularity(self.split.train)

    def result(self, step: str) -> dict[str, Any]:
        """The figures of a finished step."""
        self._require(step)
        result: dict[str, Any] = read_json(self.folder / step / "result.json")["result"]
        return result

    def seconds(self, step: str) -> float:
        """How long a finished step took when it ran; of one that was cut off, its last call."""
        self._require(step)
        return float(read_json(self.folder / step / "result.json")["seconds"])

    def prepare_data(self, settings: DataSettings) -> dict[str, Any]:
        """Read, describe and split the interactions."""

        def compute(folder: Path) -> dict[str, Any]:
            dataset = read_dataset(settings.path)
            split = split_users(
                dataset,
                test_share=settings.test_share,
                sae_share=settings.sae_share,
                validation_share=settings.validation_share,
                min_item_count=settings.min_item_count,
                seed=settings.seed,
            )
            split.save(folder / "split")
            common = common_attributes(split.train, settings.min_attribute_share)
            return {
                "dataset": describe(dataset),
                "name": dataset.name,
                "parts": {
                    name: {"users": part.n_users, "interactions": part.n_interactions}
                    for name, part in split.parts.items()
                },
                "n_items": split.n_items,
                "notes": split.notes,
                "attributes": [split.train.item_table.attribute_names[i] for i in common],
            }

        result = self._step("data", asdict(settings), compute)
        for note in result["notes"]:
            self.say(f"  {note}")
        return result

    def train_recommender(self, settings: RecommenderSettings) -> dict[str, Any]:
        """Train the transformer; compare it on the test users with the baselines of :func:`fit_recommenders`."""

        def compute(folder: Path) -> dict[str, Any]:
            recommenders = fit_recommenders(self.split, settings, folder / "model", progress=self.progress)
            measured = {name: self.evaluate(recommend) for name, recommend in recommenders.items()}
            ndcg = measured["transformer"].ndcg
            # Of the same users, so that the difference is known better than either of the two.
            leads = {name: ndcg - other.ndcg for name, other in measured.items() if name != "transformer"}
            return {
                **{name: _measured(metrics) for name, metrics in measured.items()},
                "leads": {name: [float(lead.mean()), *bootstrap_interval(lead)] for name, lead in leads.items()},
            }

        return self._step("recommender", asdict(settings), compute)

    def collect_activations(self, settings: ActivationSettings) -> dict[str, Any]:
        """Write the hidden states the SAE is trained on to disk."""
        if settings.users not in ("train_sae", "non_test"):
            raise ValueError(f"users: expected 'train_sae' or 'non_test', got {settings.users!r}")

        def compute(folder: Path) -> dict[str, Any]:
            split = self.split
            dataset = split.train_sae if settings.users == "train_sae" else split.non_test
            store = collect(self.model, dataset, settings.site, folder / "store", progress=self.progress)
            return {"n_rows": len(store), "users": dataset.n_users, "site": settings.site}

        return self._step("activations", asdict(settings), compute)

    def train_sae(self, config: SAETrainingConfig) -> dict[str, Any]:
        """Train the SAE; measure it on the test users, whom it has not seen."""

        def compute(folder: Path) -> dict[str, Any]:
            store = ActivationStore(self.folder / "activations" / "store")
            sae = train_sae(store, config, folder / "training", progress=self.progress).eval()
            sae.save(folder / "model")
            quality = self.sae_quality(sae, self.site)
            np.save(folder / "fired_fraction.npy", quality.pop("fired_fraction"))
            return quality

        return self._step("sae", config.to_dict(), compute)

    def sae_quality(self, sae: SparseAutoencoder, site: str) -> dict[str, Any]:
        """:func:`saerec_fast.sae.evaluate_sae` of an SAE of a site on the test users, and under ``reconstruction`` how
        well the recommender ranks with the reconstruction in place of the hidden state."""
        rows = (hidden for hidden, _, _ in iterate_hidden(self.model, self.split.test, site))
        quality = evaluate_sae(sae, rows)
        plan = SteeringPlan(mode="reconstruct")
        reconstructed = evaluate_steered(self.model, self.split.test, sae, site, plan, popularity=self.popularity)
        quality["reconstruction"] = _measured(reconstructed)
        return quality

    def interpret(self) -> dict[str, Any]:
        """Statistics of every (feature, attribute) and top examples, for SAE features and raw dimensions."""

        def compute(folder: Path) -> dict[str, Any]:
            found = self.interpretation
            for name, statistics in found.statistics.items():
                statistics.save(folder / name)
            table = self.split.test.item_table
            for name, top in found.examples.items():
                n_features = found.statistics[name].n_features
                listed = [
                    top.examples(
                        feature, titles=table.titles, attributes=table.attributes, attribute_names=table.attribute_names
                    )
                    for feature in range(n_features)
                ]
                write_json(folder / f"examples_{name}.json", [[asdict(one) for one in row] for row in listed])
            summaries = found.summaries()
            return {
                "summaries": {name: summary.as_dict() for name, summary in summaries.items()},
                "ratio": ratio(summaries["sae"], summaries["raw"]).as_dict(),
                "n_test_rows": found.statistics["sae"].n_rows,
                "n_test_users": found.statistics["sae"].n_users,
            }

        return self._step("interpretation", {"site": self.site}, compute)

    @cached_property
    def interpretation(self) -> Interpretation:
        """The statistics with all that intervals and distributions need, from one pass over each group of users."""
        attributes, names = self.attributes
        sae = self.sae
        statistics: dict[str, FeatureStatisticsResult] = {}
        examples = {"sae": TopExamples(sae.n_features), "raw": TopExamples(sae.d_model)}
        for suffix, dataset in (("", self.split.test), ("_train", self.sae_users)):
            features = FeatureStatistics(sae.n_features, attributes, names)
            raw = FeatureStatistics(sae.d_model, attributes, names, signed=False)
            for hidden, users, items in iterate_hidden(self.model, dataset, self.site):
                with torch.inference_mode():
                    encoded = sae.encode(hidden)
                features.update(encoded, items, users)
                raw.update_dense(hidden, items, users)
                if dataset is self.split.test:
                    examples["sae"].update(encoded, items, users)
                    examples["raw"].update_dense(hidden, items, users)
            statistics[f"sae{suffix}"], statistics[f"raw{suffix}"] = features.result(), raw.result()
        return Interpretation(statistics, examples)

    def saved_statistics(self, name: str) -> FeatureStatisticsResult:
        """``sae``, ``raw``, ``sae_train`` or ``raw_train`` of a finished interpretation, from disk."""
        self._require("interpretation")
        return FeatureStatisticsResult.load(self.folder / "interpretation" / name)

    def saved_examples(self, name: str) -> list[list[dict[str, Any]]]:
        """Top examples of every feature (``sae``) or raw dimension (``raw``), from disk."""
        self._require("interpretation")
        examples: list[list[dict[str, Any]]] = read_json(self.folder / "interpretation" / f"examples_{name}.json")
        return examples

    def control(self, settings: ControlSettings) -> dict[str, Any]:
        """Share of an attribute in the top 10 against NDCG@10, while its best feature is turned up."""

        def compute(folder: Path) -> dict[str, Any]:
            statistics = self.saved_statistics("sae_train")
            table = self.split.test.item_table
            points: list[dict[str, Any]] = []
            baseline: dict[str, dict[str, float]] = {}
            untouched = self.evaluate(TransformerScorer(self.model))
            chosen = settings.attributes or self.steerable_attributes(settings.n_attributes)
            for attribute in chosen:
                feature = self.feature_of(attribute)
                has_attribute = table.attributes[:, table.attribute_names.index(attribute)]
                baseline[attribute] = control_figures(untouched, has_attribute)
                top = float(statistics.quantiles[feature, -1])
                values = [round(top * multiple, 4) for multiple in settings.multiples]
                for op, mode, positions in CONTROL_WAYS:
                    self.say(f"  {attribute}: {op} feature #{feature}, {mode}, {positions} positions")
                    points += control_curve(
                        self.model,
                        self.split.test,
                        self.sae,
                        self.site,
                        attribute,
                        feature,
                        values,
                        op=op,
                        mode=mode,
                        positions=positions,
                        popularity=self.popularity,
                    )
            return {"points": points, "baseline": baseline}

        return self._step("control", asdict(settings), compute)

    def steerable_attributes(self, count: int) -> list[str]:
        """The attributes whose best feature, chosen on the SAE's training users, correlates most with them.

        Where two attributes share a feature ("Children's" and "Animation"), only the one it follows more counts.
        """
        statistics = self.saved_statistics("sae_train")
        strength = statistics.strength()
        best = {
            name: float(np.nanmax(strength[:, i]))
            for i, name in enumerate(statistics.attribute_names)
            if np.isfinite(strength[:, i]).any()
        }
        taken: dict[int, str] = {}
        for name in sorted(best, key=lambda name: -best[name]):
            taken.setdefault(self.feature_of(name), name)
        return list(taken.values())[:count]

    def feature_of(self, attribute: str) -> int:
        """The feature that correlates most with an attribute on the users the SAE was trained on.

        Raises:
            ValueError: no such attribute, or one too rare to have statistics.
        """
        statistics = self.saved_statistics("sae_train")
        lowered = {name.lower(): name for name in statistics.attribute_names}
        if attribute.lower() not in lowered:
            raise ValueError(f"attribute: expected one of {', '.join(statistics.attribute_names)}, got {attribute!r}")
        found = statistics.top_features(lowered[attribute.lower()], 1)
        if not found:
            raise ValueError(
                f"attribute: {attribute!r} is on every item or none of the SAE's users, so no feature follows it"
            )
        return found[0]

    def plan(self, specs: Sequence[str], mode: str, positions: str) -> SteeringPlan:
        """A plan from texts such as ``Horror=+2``; see :func:`saerec_fast.request.parse_edit`."""
        statistics = self.saved_statistics("sae_train")

        def unit(feature: int) -> float:
            if feature >= statistics.n_features:
                raise ValueError(f"steer: feature ids go from 0 to {statistics.n_features - 1}, got {feature}")
            strong = float(statistics.quantiles[feature, 1])
            if not np.isfinite(strong):
                raise ValueError(f"steer: feature #{feature} never fired, so it has no unit to add or set")
            return strong

        edits = [parse_edit(spec, self.feature_of, unit) for spec in specs]
        return SteeringPlan(edits, mode=mode, positions=positions)  # type: ignore[arg-type]

    def before_and_after(self, plan: SteeringPlan, history: np.ndarray, k: int = 10) -> tuple[list[int], list[int]]:
        """Recommended item indices for one history without and with a plan; seen items are left out."""
        scorer = TransformerScorer(self.model)
        before = scorer([history], k)[0].tolist()
        with attach(self.model, site_module(self.model, self.site), self.sae, plan, valid=valid_positions):
            after = scorer([history], k)[0].tolist()
        return before, after

    def evaluate(self, recommend: Recommend) -> Metrics:
        """Leave-last-out metrics on the test users."""
        return evaluate(recommend, self.split.test, popularity=self.popularity)

    @property
    def sae_users(self) -> Dataset:
        """The users the SAE is trained on."""
        users = self._settings("activations")["users"]
        return self.split.train_sae if users == "train_sae" else self.split.non_test

    @property
    def attributes(self) -> tuple[np.ndarray, list[str]]:
        """The attributes that are common enough for statistics: bool ``(n_items, A)``, and their A names."""
        table, names = self.split.test.item_table, self.result("data")["attributes"]
        return table.attributes[:, [table.attribute_names.index(name) for name in names]], names

    def section(
        self, name: str, settings: Mapping[str, Any], compute: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        """Run or reuse a further step that builds on all of :data:`STEPS` up to the interpretation.

        Args:
            name: its folder in the run's, with ``/`` between levels.
            settings: what it is asked for, as json holds it; where they differ from last time it starts afresh.
            compute: gets its folder, returns its figures as json holds them.
        """
        return self._step(name, dict(settings), compute, STEPS[: STEPS.index("interpretation") + 1])

    def settings(self) -> dict[str, dict[str, Any]]:
        """What every finished step was asked for."""
        return {step: self._settings(step) for step in STEPS if (self.folder / step / "result.json").exists()}

    def _settings(self, step: str) -> dict[str, Any]:
        settings: dict[str, Any] = read_json(self.folder / step / "settings.json")["settings"]
        return settings

    def _require(self, step: str) -> None:
        if not (self.folder / step / "result.json").exists():
            raise FileNotFoundError(
                f"{self.folder}: the step {step!r} has not been run; run "
                f"`{_COMMANDS.get(step, 'saerec study')} --run {self.folder}`"
            )

    def _step(
        self,
        name: str,
        settings: dict[str, Any],
        compute: Callable[[Path], dict[str, Any]],
        before: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Run a step, or reuse it; see the module's docstring. ``before``: default all of :data:`STEPS` before it."""
        before = STEPS[: STEPS.index(name)] if before is None else before
        for earlier in before:
            self._require(earlier)
        folder = self.folder / name
        identity = json.loads(
            json.dumps({"settings": settings, "before": {earlier: self.digest(earlier) for earlier in before}})
        )
        result_path, settings_path = folder / "result.json", folder / "settings.json"
        same = settings_path.exists() and read_json(settings_path) == identity
        if same and result_path.exists():
            self.say(f"{name}: as before")
            self.times.append(StepTime(name, 0.0, True))
            reused: dict[str, Any] = read_json(result_path)["result"]
            return reused
        self.say(f"{name} …" if not same or not folder.exists() else f"{name}: going on")
        if not same:
            if folder.exists() and not settings_path.exists():
                raise ValueError(f"{folder}: exists but was not made by saerec; choose another run folder")
            shutil.rmtree(folder, ignore_errors=True)
            write_json(settings_path, identity)
        self._forget(name)
        started = time.perf_counter()
        result = json.loads(json.dumps(compute(folder)))
        seconds = time.perf_counter() - started
        write_json(result_path, {"result": result, "seconds": seconds})
        self.times.append(StepTime(name, seconds, False))
        return dict(result)

    def digest(self, step: str) -> str:
        """What a finished step was asked for, and what the steps before it were, in 16 digits."""
        content = (self.folder / step / "settings.json").read_bytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def _forget(self, step: str) -> None:
        """Drop loaded artefacts of a step that is about to be replaced, and of those after it."""
        for later in STEPS[STEPS.index(step) :] if step in STEPS else ():
            for attribute in _LOADED.get(later, ()):
                self.__dict__.pop(attribute, None)


def fit_recommenders(
    split: Split, settings: RecommenderSettings, folder: Path, *, progress: bool = True
) -> dict[str, Recommend]:
    """The transformer, trained in ``folder`` or loaded from it, and the baselines, all from ``split.train``.

    The validation users stop the transformer's training; the baselines have no use for them. ``item_knn`` is the
    standard method, blind to the order of a history; ``recent_item_knn`` counts its newest 10 items, each half as much
    as the one after it.

    Returns:
        One per key of :data:`RECOMMENDERS`.
    """
    config = RecommenderConfig(
        n_items=split.n_items,
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        n_heads=settings.n_heads,
        max_length=settings.max_length,
        dropout=settings.dropout,
        item_dropout=settings.item_dropout,
        scale_embedding=settings.scale_embedding,
    )
    model = train_recommender(
        split,
        config,
        folder,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        patience=settings.patience,
        seed=settings.seed,
        progress=progress,
    ).eval()
    return {
        "transformer": TransformerScorer(model),
        "recent_item_knn": ItemKNNRecommender(
            split.train, n_neighbours=100, history_length=10, decay=0.5, shrinkage=3.0
        ),
        "item_knn": ItemKNNRecommender(split.train),
        "popularity": PopularityRecommender(split.train),
    }


def compare_recommenders(
    data: DataSettings,
    settings: RecommenderSettings,
    folder: Path,
    *,
    n_folds: int = 5,
    targets_per_user: int = 10,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The recommenders of :func:`fit_recommenders` by cross-validation over all users but the test users.

    Nothing here looks at the test users, so that settings may be chosen by it. A comparison that was cut off goes on
    with the fold and epoch it was at.

    Args:
        data: which data, and who the test users are.
        settings: of the transformer.
        folder: gets a sub-folder per fold, and ``comparison.json`` with what is returned.
        n_folds: see :func:`saerec_fast.data.cross_validation_splits`; seeded by ``data.seed``.
        targets_per_user: see :func:`saerec_fast.recommender.cross_validate`.
        progress: show progress bars.
        say: called with a line of text for every fold.

    Returns:
        :meth:`saerec_fast.recommender.Comparison.summary` of the transformer, with the settings.
    """
    users = split_users(
        read_dataset(data.path),
        test_share=data.test_share,
        sae_share=data.sae_share,
        validation_share=data.validation_share,
        min_item_count=data.min_item_count,
        seed=data.seed,
    ).non_test

    def fit(fold: int, split: Split) -> dict[str, Recommend]:
        say(f"fold {fold + 1} of {n_folds}: {split.train.n_users} users train, {split.test.n_users} are held out")
        return fit_recommenders(split, settings, folder / f"fold-{fold}", progress=progress)

    splits = cross_validation_splits(users, n_folds=n_folds, validation_share=data.validation_share, seed=data.seed)
    result = {
        **cross_validate(splits, fit, targets_per_user=targets_per_user).summary("transformer"),
        "n_folds": n_folds,
        "targets_per_user": targets_per_user,
        "data": asdict(data),
        "recommender": asdict(settings),
    }
    write_json(folder / "comparison.json", result)
    return result


def _measured(metrics: Metrics) -> dict[str, Any]:
    return {**metrics.summary(), "intervals": {name: list(span) for name, span in metrics.intervals().items()}}
