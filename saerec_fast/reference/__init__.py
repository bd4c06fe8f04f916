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

__all__ = [
    "activate",
    "decode_sparse",
    "encode_features",
    "encode_threshold",
    "encode_topk",
    "linear_topk",
    "pre_activations",
    "reconstruct",
    "steer",
    "steered_positions",
]
