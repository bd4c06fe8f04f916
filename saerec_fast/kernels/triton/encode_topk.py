"""Top-k SAE encoder: ``linear_topk`` of the centred states, with ReLU after the selection. Kernels: linear_topk.py."""

from __future__ import annotations

import torch
from torch import Tensor

from saerec_fast.kernels.triton.linear_topk import top_k
from saerec_fast.kernels.triton.scores import prepare


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    packed: Tensor | None = None,
    *,
    value_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Values ``(R, k)`` after the ReLU, in the dtype of x unless told; indices int32 ``(R, k)``."""
    values, indices, _ = top_k(
        x,
        prepare(W_enc, b_enc, b_dec),
        k,
        None,
        None,
        relu=True,
        index_dtype=torch.int32,
        value_dtype=value_dtype or x.dtype,
    )
    return values, indices
