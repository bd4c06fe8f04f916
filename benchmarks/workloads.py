"""What is computed: the cases, their inputs (random, or of a trained recommender), and what float64 makes of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import Case, Inputs, make_inputs
from torch import Tensor

import saerec_fast as sf
from saerec_fast.files import read_json
from saerec_fast.sae import ActivationStore

SHAPES = [(64, 2048, 32), (128, 4096, 32), (256, 8192, 64), (64, 16384, 32), (512, 32768, 64)]
ROWS = (1, 64, 4096)
TRAINING_ROWS = 4096
CATALOGUE_ITEMS = (3_700, 60_000, 1_000_000)
CATALOGUE_WIDTHS = (64, 128)
CATALOGUE_ROWS = (1, 64, 1024)
CATALOGUE_TOP = (10, 100)
MAX_SEEN = 50
THREADS = (1, 2)
MAX_THREADS = max(THREADS)

# Memory is measured at the largest batch of each task, with all threads.
MEMORY_ROWS = {"topk": 4096, "relu": 4096, "step_topk": 4096, "step_relu": 4096, "catalogue": 1024}

# Scores of random data have a standard deviation of 1.01: about 2 % exceed this.
RELU_BIAS = -2.05
L1_COEFFICIENT = 0.01

# Rows that are compared with float64.
CHECKED_ROWS = 64

RUN = Path(os.environ.get("SAEREC_BENCH_RUN", "runs/demo"))
_NO_RUN = "no finished run: `make demo` makes runs/demo; SAEREC_BENCH_RUN names another"


@dataclass(frozen=True)
class SaeCase:
    """``rows`` hidden states of an SAE; ``k`` is 0 for a ReLU.

    Attributes:
        source: ``random``, or ``run-`` and the folder of the SAE in the run.
    """

    source: str
    d: int
    n: int
    k: int
    rows: int

    def __str__(self) -> str:
        width = f"d{self.d}-n{self.n}" + (f"-k{self.k}" if self.k else "")
        return f"{self.source}-{width}-rows{self.rows}"


@dataclass(frozen=True)
class CatalogueCase:
    """The ``k`` best of ``n`` items for ``rows`` users, without what each has seen."""

    source: str
    d: int
    n: int
    k: int
    rows: int

    def __str__(self) -> str:
        return f"{self.source}-items{self.n}-d{self.d}-top{self.k}-rows{self.rows}"


class Catalogue(NamedTuple):
    x: Tensor  # (rows, d)
    items: Tensor  # (n, d)
    seen: sf.Ragged


def sae_cases(activation: str) -> list[Any]:
    """Random cases of the ``topk`` or ``relu`` forward pass, then those of the run's SAEs of that kind."""
    shapes = [("random", d, n, k if activation == "topk" else 0) for d, n, k in SHAPES]
    reason = _NO_RUN
    for config_path in sorted(RUN.glob("sae*/model/config.json")):
        config = read_json(config_path)
        kind = config["activation"]["kind"]
        if kind == activation:
            source = f"run-{config_path.parts[-3]}"
            shapes.append((source, config["d_model"], config["n_features"], config["activation"].get("k", 0)))
        else:
            reason = f"the run's SAE is of kind {kind}; SAEREC_BENCH_RUN names a run with a {activation} SAE"
    cases: list[Any] = [SaeCase(*shape, rows) for shape in shapes for rows in ROWS]
    return cases if shapes[-1][0] != "random" else [*cases, _skipped(reason)]


def training_cases(activation: str) -> list[Any]:
    """Those of ``sae_cases`` with the rows of a training step, each with all thread counts."""
    return [
        pytest.param(case, threads, id=f"{case}-threads{threads}")
        for case in sae_cases(activation)
        if isinstance(case, SaeCase) and case.rows == TRAINING_ROWS
        for threads in THREADS
    ]


def catalogue_cases() -> list[Any]:
    """Random catalogues, then the run's."""
    shapes = [("random", d, n) for n in CATALOGUE_ITEMS for d in CATALOGUE_WIDTHS]
    config_path = RUN / "recommender" / "model" / "config.json"
    if config_path.exists():
        config = read_json(config_path)
        shapes.append(("run", config["d_model"], config["n_items"]))
    cases: list[Any] = [
        CatalogueCase(*shape, k, rows) for shape in shapes for rows in CATALOGUE_ROWS for k in CATALOGUE_TOP
    ]
    return cases if shapes[-1][0] != "random" else [*cases, _skipped(_NO_RUN)]


def run_name() -> str | None:
    """The data set of the run, where there is one."""
    path = RUN / "activations" / "store" / "meta.json"
    return str(read_json(path)["dataset"]) if path.exists() else None


@lru_cache(maxsize=1)
def sae_inputs(case: SaeCase) -> Inputs:
    """Hidden states and weights in their units."""
    if case.source == "random":
        # A single row may be one of those that cannot be checked: the first of a few that can.
        inputs = make_inputs(Case(case.d, case.n, case.k, max(case.rows, 8)))
        if case.rows < 8:
            inputs = inputs._replace(x=inputs.x[decided_rows(inputs, case.k)[: case.rows]].clone())
        return inputs if case.k else inputs._replace(b_enc=inputs.b_enc + RELU_BIAS)
    sae = sf.SparseAutoencoder.load(RUN / case.source.removeprefix("run-") / "model").eval()
    hidden = ActivationStore(RUN / "activations" / "store").hidden
    x = torch.from_numpy(hidden[np.linspace(0, len(hidden) - 1, case.rows).astype(np.int64)])
    weights = (weight.detach().clone() for weight in sae.folded_weights())
    return Inputs(x, *weights)


def catalogue_inputs(case: CatalogueCase) -> Catalogue:
    return _catalogue(case.source, case.d, case.n, case.rows)


@lru_cache(maxsize=1)
def _catalogue(source: str, d: int, n: int, rows: int) -> Catalogue:
    if source == "random":
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, d, generator=generator)
        items = torch.randn(n, d, generator=generator) * d**-0.5
        seen = torch.randint(n, (rows, MAX_SEEN), generator=generator)
        return Catalogue(x, items, sf.Ragged.from_lists(list(seen)))
    x, items, histories = _run_catalogue()
    users = np.linspace(0, len(x) - 1, rows).astype(np.int64)
    return Catalogue(x[torch.from_numpy(users)], items, sf.Ragged.from_lists([histories[user] for user in users]))


@lru_cache(maxsize=1)
def _run_catalogue() -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """Of every test user of the run: what the model reads the next item from, and the newest items of the history."""
    from saerec_fast.pipeline import Run
    from saerec_fast.recommender import iterate_hidden

    run = Run(RUN, progress=False)
    test = run.split.test
    hidden = torch.cat([rows for rows, _, _ in iterate_hidden(run.model, test, "last")])
    used = [user for user in range(test.n_users) if len(test.sequence(user))]
    histories = [np.unique(test.sequence(user)[-MAX_SEEN:]) for user in used]
    ends = torch.from_numpy(test.offsets[1:][used] - 1)
    return hidden[ends].clone(), run.model.item_embeddings.detach().clone(), histories


def decided_rows(inputs: Inputs, k: int) -> Tensor:
    """Up to ``CHECKED_ROWS`` rows whose top-k selection does not hang on rounding, which float32 may do otherwise."""
    x = inputs.x[: 4 * CHECKED_ROWS]
    if not k or k == inputs.W_enc.shape[0]:
        return torch.arange(len(x))[:CHECKED_ROWS]
    top = _scores64(inputs._replace(x=x)).topk(k + 1).values
    gap = top[:, k - 1] - top[:, k]
    rows = (gap > 1e-5 * top[:, 0].abs()).nonzero().squeeze(1)[:CHECKED_ROWS]
    assert 2 * len(rows) >= min(len(x), CHECKED_ROWS), "too many rows whose selection hangs on rounding"
    return rows


@lru_cache(maxsize=1)
def reconstruction_truth(case: SaeCase) -> tuple[Tensor, Tensor]:
    """Some row numbers and their reconstructions in float64."""
    inputs = sae_inputs(case)
    rows = decided_rows(inputs, case.k)
    wide = [tensor.double() for tensor in inputs._replace(x=inputs.x[rows])]
    return rows, sf.reference.reconstruct(*wide, sf.TopK(case.k) if case.k else sf.ReLU())


@lru_cache(maxsize=1)
def gradient_truth(case: SaeCase) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Some rows, the loss of an SAE on them, and its gradients for W_enc, b_enc, b_dec, W_dec, in float64."""
    inputs = sae_inputs(case)
    x = inputs.x[decided_rows(inputs, case.k)]
    leaves = [tensor.double().requires_grad_() for tensor in inputs[1:]]
    W_enc, b_enc, b_dec, W_dec = leaves
    wide = x.double()
    pre = (wide - b_dec) @ W_enc.T + b_enc
    if case.k:
        top = pre.topk(case.k)
        features = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        penalty = torch.zeros(())
    else:
        features = pre.relu()
        penalty = L1_COEFFICIENT * features.sum(-1).mean()
    loss = (features @ W_dec + b_dec - wide).square().sum(-1).mean() + penalty
    return x, loss.detach(), list(torch.autograd.grad(loss, leaves))


@lru_cache(maxsize=1)
def catalogue_truth(case: CatalogueCase) -> tuple[Tensor, Tensor]:
    """Scores ``(m, n)`` of the first users in float64, minus infinity where seen, and the ``k`` largest of each."""
    inputs = catalogue_inputs(case)
    m = min(len(inputs.x), 8)  # 64 MB at a million items
    scores = inputs.x[:m].double() @ inputs.items.double().T
    stop = int(inputs.seen.offsets[m])
    scores[inputs.seen.row_ids()[:stop], inputs.seen.ids[:stop]] = -torch.inf
    return scores, scores.topk(case.k).values


def active_share(case: SaeCase) -> float:
    """Share of the features that fire on the checked rows of a ReLU case."""
    inputs = sae_inputs(case)
    return float((_scores64(inputs._replace(x=inputs.x[:CHECKED_ROWS])) > 0).double().mean())


def _scores64(inputs: Inputs) -> Tensor:
    x, W_enc, b_enc, b_dec = (tensor.double() for tensor in inputs[:4])
    return (x - b_dec) @ W_enc.T + b_enc


def _skipped(reason: str) -> Any:
    return pytest.param(None, marks=pytest.mark.skip(reason=reason), id="run")
