"""The public ops."""

from saerec_fast.reference import (
    decode_sparse,
    encode_features,
    encode_threshold,
    encode_topk,
    linear_topk,
    reconstruct,
    steer,
)

__all__ = [
    "decode_sparse",
    "encode_features",
    "encode_threshold",
    "encode_topk",
    "linear_topk",
    "reconstruct",
    "steer",
]
