"""Settings of the steps by the size of the data set: those of the demo and of the study."""

from __future__ import annotations

from saerec_fast.data import read_dataset
from saerec_fast.pipeline import ActivationSettings, DataSettings, RecommenderSettings
from saerec_fast.sae import SAETrainingConfig

# Below this many interactions a data set is small (MovieLens 100K has 100,000, MovieLens 1M a million).
SMALL = 300_000


def is_small(data: str) -> bool:
    """Whether the data set at ``data`` has fewer interactions than :data:`SMALL`."""
    return read_dataset(data).n_interactions < SMALL


def data_settings(data: str, small: bool, seed: int) -> DataSettings:
    """Who is in which part: with few users, fewer are set aside for the SAE."""
    return DataSettings(data, sae_share=0.05 if small else 0.1, seed=seed)


def recommender_settings(small: bool, seed: int) -> RecommenderSettings:
    """Settings of the recommender: a larger data set needs fewer passes over itself.

    There the item embedding enters the blocks multiplied by ``√d_model``, as in SASRec: on MovieLens 1M that leaves
    more of the item in the hidden state after block 0, and features follow genres more closely (docs/results.md).
    """
    if small:
        return RecommenderSettings(seed=seed)
    return RecommenderSettings(epochs=20, batch_size=64, patience=5, scale_embedding=True, seed=seed)


def activation_settings(small: bool) -> ActivationSettings:
    """Where the hidden states come from.

    On a large data set, after block 0, of users the recommender has not been trained on: the paper's protocol. On a
    small one, the item embedding that enters the first block, of all but the test users: on MovieLens 100K features
    followed genres more closely there than after block 0 (docs/results.md).
    """
    return ActivationSettings("embedding", "non_test") if small else ActivationSettings("block.0", "train_sae")


def sae_settings(small: bool, seed: int) -> SAETrainingConfig:
    """Settings of the SAE for a small data set (MovieLens 100K) or a larger one (MovieLens 1M and above)."""
    if small:
        return SAETrainingConfig(
            n_features=1024, activation="relu", l1_coefficient=1.0, steps=2500, batch_size=1024, seed=seed
        )
    return SAETrainingConfig(n_features=1024, activation="topk", k=32, steps=6000, batch_size=2048, seed=seed)
