"""Every op in pure PyTorch. This package defines what is correct; speed is not its concern."""

from saerec_fast.reference.ops import (
    activate,
    decode_sparse,
    encode_features,
    encode_threshold,
    encode_topk,
    linear_topk,
    pre_activations,
    reconstruct,
    steer,
    steered_positions,
)
from saerec_fast.reference.training import adam_step, largest_entries, sparse_training_step

__all__ = [
    "activate",
    "adam_step",
    "decode_sparse",
    "encode_features",
    "encode_threshold",
    "encode_topk",
    "largest_entries",
    "linear_topk",
    "pre_activations",
    "reconstruct",
    "sparse_training_step",
    "steer",
    "steered_positions",
]
