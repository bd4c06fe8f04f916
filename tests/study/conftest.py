"""A small run on generated data, finished up to its interpretation, for the sections of the study."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saerec_fast.data import synthetic_dataset
from saerec_fast.pipeline import ActivationSettings, DataSettings, RecommenderSettings, Run
from saerec_fast.sae import SAETrainingConfig

RECOMMENDER = RecommenderSettings(d_model=16, n_heads=1, max_length=20, epochs=6)
SAE = SAETrainingConfig(n_features=48, activation="topk", k=6, steps=200, batch_size=256)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run; copy it (``run``) to write into it."""
    folder = tmp_path_factory.mktemp("study")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    synthetic_dataset(160, 70, 4, seed=0, mean_length=30).save(folder / "data")
    run = Run(folder / "run", progress=False)
    run.prepare_data(DataSettings(str(folder / "data")))
    run.train_recommender(RECOMMENDER)
    run.collect_activations(ActivationSettings("block.0", "non_test"))
    run.train_sae(SAE)
    run.interpret()
    torch.set_num_threads(threads)
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    """A run of its own for one test."""
    shutil.copytree(finished, tmp_path / "a run of its own")
    return Run(tmp_path / "a run of its own", progress=False)
