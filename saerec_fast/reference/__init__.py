"""Every op in pure PyTorch. This package defines what is correct; speed is not its concern."""

from saerec_fast.reference.ops import (
    activate,
    add_change,
    along_directions,
    decode_sparse,
    encode_features,
    encode_threshold,
    encode_topk,
    fold_decoder,
    fold_normalization,
    limit_change,
    linear_topk,
    pre_activations,
    reconstruct,
    report_excess,
    steer,
    steered_positions,
)
from saerec_fast.reference.training import adam_step, largest_entries, sparse_training_step

__all__ = [
    "activate",
    "adam_step",
    "add_change",
    "along_directions",
    "decode_sparse",
    "encode_features",
    "encode_threshold",
    "encode_topk",
    "fold_decoder",
    "fold_normalization",
    "largest_entries",
    "limit_change",
    "linear_topk",
    "pre_activations",
    "reconstruct",
    "report_excess",
    "sparse_training_step",
    "steer",
    "steered_positions",
]
