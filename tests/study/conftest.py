from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saerec_fast.data import synthetic_dataset
from saerec_fast.pipeline import ActivationSettings, DataSettings, RecommenderSettings, Run
from saerec_fast.sae import SAETrainingConfig


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is interpreted, small enough for a test, with an SAE between two blocks."""
    folder = tmp_path_factory.mktemp("study")
    synthetic_dataset(160, 70, 4, seed=0, mean_length=30).save(folder / "data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = Run(folder / "run", progress=False)
    run.prepare_data(DataSettings(str(folder / "data")))
    run.train_recommender(RecommenderSettings(d_model=16, n_heads=1, max_length=20, epochs=6))
    run.collect_activations(ActivationSettings("block.0", "non_test"))
    run.train_sae(SAETrainingConfig(n_features=48, activation="topk", k=6, steps=200, batch_size=256))
    run.interpret()
    torch.set_num_threads(threads)
    return run.folder


@pytest.fixture
def tiny_run(tiny_folder: Path) -> Iterator[Run]:
    """The run, freshly opened: nothing is kept loaded from one test to the next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Run(tiny_folder, progress=False)
    torch.set_num_threads(threads)
