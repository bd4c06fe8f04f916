"""Sparse autoencoders: the module, hidden states on disk, training."""

from saerec_fast.sae.activation_store import ActivationStore, ActivationStoreWriter, Batch
from saerec_fast.sae.adam import Adam
from saerec_fast.sae.conversion import CheckpointFormat, load_sae, save_sae
from saerec_fast.sae.model import FoldedWeights, SparseAutoencoder
from saerec_fast.sae.step import StepResult, training_step
from saerec_fast.sae.training import SAETrainingConfig, evaluate_sae, train_sae

__all__ = [
    "ActivationStore",
    "ActivationStoreWriter",
    "Adam",
    "Batch",
    "CheckpointFormat",
    "FoldedWeights",
    "SAETrainingConfig",
    "SparseAutoencoder",
    "StepResult",
    "evaluate_sae",
    "load_sae",
    "save_sae",
    "train_sae",
    "training_step",
]
