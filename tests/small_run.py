"""A run on generated data that is small enough for a test."""

from pathlib import Path

from saerec_fast.data import synthetic_dataset
from saerec_fast.pipeline import ActivationSettings, DataSettings, RecommenderSettings, Run
from saerec_fast.sae import SAETrainingConfig

RECOMMENDER = RecommenderSettings(d_model=16, n_heads=1, max_length=20, epochs=6)
SAE = SAETrainingConfig(n_features=48, activation="topk", k=6, steps=200, batch_size=256)


def small_run(folder: Path, site: str = "block.0") -> Run:
    """Made in ``folder`` and finished up to its interpretation."""
    synthetic_dataset(160, 70, 4, seed=0, mean_length=30).save(folder / "data")
    run = Run(folder / "run", progress=False)
    run.prepare_data(DataSettings(str(folder / "data")))
    run.train_recommender(RECOMMENDER)
    run.collect_activations(ActivationSettings(site, "non_test"))
    run.train_sae(SAE)
    run.interpret()
    return run
