"""Triton kernels for CUDA devices; with ``TRITON_INTERPRET=1`` set before triton is imported, for CPU tensors too.

The same functions as :mod:`saerec_fast.kernels.cpu`, one file per op. Arguments are trusted: the public ops in
:mod:`saerec_fast.api` have checked them.
"""

from saerec_fast.kernels.triton.decode_sparse import decode_sparse
from saerec_fast.kernels.triton.encode_features import encode_features
from saerec_fast.kernels.triton.encode_threshold import encode_threshold
from saerec_fast.kernels.triton.encode_topk import encode_topk
from saerec_fast.kernels.triton.largest_entries import largest_entries
from saerec_fast.kernels.triton.launch import INTERPRETED
from saerec_fast.kernels.triton.linear_topk import linear_topk
from saerec_fast.kernels.triton.reconstruct import reconstruct
from saerec_fast.kernels.triton.sparse_dot import sparse_dot
from saerec_fast.kernels.triton.sparse_training_step import sparse_training_step
from saerec_fast.kernels.triton.sparse_weight_gradient import sparse_weight_gradient
from saerec_fast.kernels.triton.steer import steer

__all__ = [
    "INTERPRETED",
    "decode_sparse",
    "encode_features",
    "encode_threshold",
    "encode_topk",
    "largest_entries",
    "linear_topk",
    "reconstruct",
    "sparse_dot",
    "sparse_training_step",
    "sparse_weight_gradient",
    "steer",
]
