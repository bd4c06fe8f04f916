"""What follows the encoder in a training step, as a composition of the other kernels; no kernel of its own.

``r = a W_dec + b_dec − x``; the entries' gradients are ``<scale · r, W_dec[j]> + penalty`` where ``a > 0``
(``sparse_dot``), the weights' are sums grouped by feature (``sparse_weight_gradient``). Nothing of size R × n or R × k
× d is held. Residual and entries' gradients stay in float32 between the kernels; every sum has a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saerec_fast.kernels.triton.decode_sparse import decode_sparse
from saerec_fast.kernels.triton.sparse_dot import sparse_dot
from saerec_fast.kernels.triton.sparse_weight_gradient import sparse_weight_gradient


def sparse_training_step(
    x: Tensor,
    offsets: Tensor,
    indices: Tensor,
    values: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    scale: float,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`saerec_fast.reference.sparse_training_step`."""
    n = W_dec.shape[0]
    residual = decode_sparse(offsets, indices, values, W_dec, b_dec, torch.float32) - x
    scaled = residual * scale
    active = ~(values <= 0)
    dots = sparse_dot(offsets, indices, scaled, W_dec, torch.float32) + penalty
    gradients = torch.where(active, dots, 0)
    grad_W_enc, grad_b_enc = sparse_weight_gradient(offsets, indices, gradients, x, b_dec, n, torch.float32)
    grad_W_dec, _ = sparse_weight_gradient(offsets, indices, values, scaled, None, n)
    # b_dec is taken off before encoding too.
    grad_b_dec = scaled.sum(0) - grad_b_enc @ W_enc.float()
    sums = torch.stack([residual.double().square().sum(), values.double().sum()])
    # Integers: the order in which they are added does not show.
    counts = torch.zeros(n, dtype=torch.int64, device=x.device).index_add_(0, indices.long(), active.long())
    dtype = x.dtype
    encoder_gradients = grad_W_enc.to(dtype), grad_b_enc.to(dtype)
    return sums, counts, residual.to(dtype), *encoder_gradients, grad_W_dec.to(dtype), grad_b_dec.to(dtype)
