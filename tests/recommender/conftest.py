from __future__ import annotations

import pytest
import torch

from saerec_fast.data import Split, split_users, synthetic_dataset
from saerec_fast.recommender import RecommenderConfig, SequenceRecommender

MAX_LENGTH = 8


@pytest.fixture(scope="session")
def split() -> Split:
    """Users with 5 to 160 items, so that some sequences fit into a window and some need many."""
    return split_users(synthetic_dataset(n_users=150, n_items=70, n_attributes=4, seed=1, mean_length=20.0), seed=1)


@pytest.fixture(scope="session")
def config(split: Split) -> RecommenderConfig:
    return RecommenderConfig(n_items=split.train.n_items, d_model=16, n_layers=2, n_heads=2, max_length=MAX_LENGTH)


@pytest.fixture
def model(config: RecommenderConfig) -> SequenceRecommender:
    """Untrained, with weights large enough that every position and layer matters."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        untrained = SequenceRecommender(config)
        with torch.no_grad():
            for parameter in untrained.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return untrained.eval()
