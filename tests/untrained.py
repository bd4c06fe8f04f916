"""A recommender that is not trained, for what does not depend on how good it is."""

import torch

from saerec_fast.recommender import RecommenderConfig, SequenceRecommender


def untrained_recommender(n_items: int, width: int) -> SequenceRecommender:
    """Two blocks, sequences of 8, with weights large enough that every position, head and layer matters."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        untrained = SequenceRecommender(
            RecommenderConfig(n_items=n_items, d_model=width, n_layers=2, n_heads=2, max_length=8)
        )
        with torch.no_grad():
            for parameter in untrained.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return untrained.eval()
