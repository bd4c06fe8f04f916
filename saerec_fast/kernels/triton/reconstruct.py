"""Encode and decode: ``act(W_enc (x − b_dec) + b_enc) W_dec + b_dec``.

Top-k up to d = 512: the program that selects a row's features also decodes them (``DECODES`` in linear_topk.py): one
launch less, and what it decodes from is still in its cache. It reads the k values and indices back after a barrier,
since a sorted register tile cannot be indexed. Activations are not rounded on the way. Wider states get a decode launch
of their own, with programs for blocks of columns.

Threshold activations: up to the same width, reconstruct_threshold.py. Wider states would have their scores computed
more than twice there; they get ``encode_threshold`` and ``decode_sparse``, which wait for the number of entries once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saerec_fast.kernels.triton.decode_sparse import decode_sparse, unit_columns
from saerec_fast.kernels.triton.encode_threshold import encode_threshold
from saerec_fast.kernels.triton.linear_topk import top_k
from saerec_fast.kernels.triton.reconstruct_threshold import reconstruct_threshold
from saerec_fast.kernels.triton.scores import prepare

MAX_FUSED_WIDTH = 512


def reconstruct(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    k: int,
    packed: Tensor | None = None,
) -> Tensor:
    """Reconstructed hidden states ``(R, d)``: top-k where k > 0, thresholds otherwise."""
    fused = x.shape[1] <= MAX_FUSED_WIDTH
    if k == 0:
        assert threshold is not None
        if fused:
            return reconstruct_threshold(x, W_enc, b_enc, b_dec, W_dec, threshold)
        entries = encode_threshold(x, W_enc, b_enc, b_dec, threshold, value_dtype=torch.float32)
        return decode_sparse(*entries, W_dec, b_dec)
    bias = None if b_dec is None else b_dec.contiguous()
    values, indices, out = top_k(
        x,
        prepare(W_enc, b_enc, b_dec),
        k,
        None,
        None,
        relu=True,
        index_dtype=torch.int32,
        value_dtype=torch.float32,
        decoder=(unit_columns(W_dec), bias) if fused else None,
    )
    if out is None:
        offsets = torch.arange(x.shape[0] + 1, device=x.device) * k
        out = decode_sparse(offsets, indices.view(-1), values.view(-1), W_dec, b_dec)
    return out
