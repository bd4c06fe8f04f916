"""What training does beside the ops of :mod:`saerec_fast.reference.ops`, in pure PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saerec_fast.types import SparseFeatures


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
    """Everything of a training step that follows the encoder, for the loss ``scale / 2 · Σ ‖r‖² + penalty · Σ a``.

    Args:
        x: hidden states ``(R, d)``.
        offsets: int64 ``(R + 1,)``; row ``r`` holds entries ``offsets[r]:offsets[r + 1]``.
        indices: feature ids ``(entries,)``.
        values: activations ``(entries,)``, encoded from ``x − b_dec``. Those ≤ 0 have no gradient.
        W_enc: ``(n, d)``.
        W_dec: ``(n, d)``.
        b_dec: ``(d,)``.
        scale: twice the weight of the squared error.
        penalty: weight of the sum of the activations.

    Returns:
        float64 ``(2,)``, ``Σ ‖r‖²`` and ``Σ a``; int64 ``(n,)``, how often each feature is active (not ≤ 0); the
        residual ``r = a W_dec + b_dec − x (R, d)``; and the gradients of W_enc, b_enc, W_dec and b_dec, the last of
        which counts that ``b_dec`` is taken off before encoding.
    """
    n = W_dec.shape[0]
    features = SparseFeatures(offsets, indices, values, n, (x.shape[0],))
    rows, columns = features.row_ids(), indices.long()
    reconstruction = features.dense() @ W_dec
    residual = (reconstruction if b_dec is None else reconstruction + b_dec) - x
    scaled = residual * scale
    dots = (scaled @ W_dec.T)[rows, columns]
    gradients = SparseFeatures(offsets, indices, torch.where(values <= 0, 0, dots + penalty), n, (x.shape[0],)).dense()
    sums = torch.stack([residual.double().square().sum(), values.double().sum()])
    counts = torch.bincount(columns[~(values <= 0)], minlength=n)
    grad_b_enc = gradients.sum(0)
    grad_W_enc = gradients.T @ (x if b_dec is None else x - b_dec)
    grad_W_dec = features.dense().T @ scaled
    return sums, counts, residual, grad_W_enc, grad_b_enc, grad_W_dec, scaled.sum(0) - grad_b_enc @ W_enc


def largest_entries(offsets: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest values of sparse rows, over all rows; NaN is largest, ties go by position.

    Args:
        offsets: int64 ``(R + 1,)``.
        values: ``(entries,)``.
        count: how many; all where there are fewer.

    Returns:
        The rows' offsets among what is kept, int64 ``(R + 1,)``, and the ascending positions of what is kept, int64
        ``(min(count, entries),)``.
    """
    kept = values.detach().sort(descending=True, stable=True).indices[:count].sort().values
    return torch.searchsorted(kept, offsets), kept


@torch.no_grad()
def adam_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    unit_rows: bool,
) -> None:
    """One step of Adam on a parameter ``(n, d)`` or ``(n,)`` and its moments, in place.

    With ``unit_rows`` the gradient's part along each (unit-norm) row is taken out before, and the row scaled to unit
    norm after. A row whose gradient and moments are all zero is left as it is: its update is exactly zero.

    Args:
        step: number of this step, from 1.
    """
    touched = (gradient != 0) | (exp_avg != 0) | (exp_avg_sq != 0)
    touched = touched.any(-1, keepdim=True)
    if unit_rows:
        gradient = gradient - torch.linalg.vecdot(gradient, parameter).unsqueeze(-1) * parameter
    beta1, beta2 = betas
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    updated = parameter.addcdiv(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if unit_rows:
        norms = torch.linalg.vector_norm(updated, dim=-1, keepdim=True)
        updated = updated / norms.masked_fill_(norms == 0, 1.0)
    parameter.copy_(torch.where(touched, updated, parameter))
