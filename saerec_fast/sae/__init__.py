"""Sparse autoencoders: the module, hidden states on disk, training."""

from saerec_fast.sae.activation_store import ActivationStore, ActivationStoreWriter, Batch
from saerec_fast.sae.model import FoldedWeights, SparseAutoencoder

__all__ = ["ActivationStore", "ActivationStoreWriter", "Batch", "FoldedWeights", "SparseAutoencoder"]
