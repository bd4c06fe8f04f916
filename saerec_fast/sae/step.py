"""One training step of a sparse autoencoder without autograd: loss and gradients in one pass after the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saerec_fast.api import encode_threshold, encode_topk
from saerec_fast.sae.model import FoldedWeights, SparseAutoencoder, encode_batch_topk
from saerec_fast.training_ops import sparse_training_step
from saerec_fast.types import Activation, BatchTopK, SparseFeatures, TopK, inference_threshold

# A step of a ReLU or JumpReLU is dense where more than this share of the features is active in some of the rows
# (docs/design.md has the measurement).
_DENSE_ABOVE = 0.15
_DENSITY_ROWS = 16
# Activations a dense step holds at a time (1 MiB), so that its passes over them stay in the second-level cache.
_CHUNK_ELEMENTS = 1 << 18


class StepResult(NamedTuple):
    """The parts of a step's loss, and what it saw.

    Attributes:
        loss: all of it, with the coefficients; float64 scalar.
        reconstruction_loss: ``mean ‖r‖²``, float64 scalar.
        l1: ``mean ‖a‖₁``, float64 scalar, without its coefficient.
        counts: in how many rows each feature is active, int64 ``(n,)``.
        residual: ``r = ẑ − z (B, d)``.
        features: the activations; ``None`` where the step was dense.
    """

    loss: Tensor
    reconstruction_loss: Tensor
    l1: Tensor
    counts: Tensor
    residual: Tensor
    features: SparseFeatures | None


@torch.no_grad()
def training_step(sae: SparseAutoencoder, z: Tensor, *, l1_coefficient: float = 0.0) -> StepResult:
    """Loss ``mean ‖ẑ − z‖² + l1_coefficient · mean ‖a‖₁`` of a batch; its gradients go to ``parameter.grad``.

    The gradients are those that autograd gives, to rounding, and replace what ``grad`` holds. Nothing of batch ×
    dictionary or batch × k × width is held. A sparse step is the same bits for any number of threads; a ReLU or
    JumpReLU of whose features many are active, as early in training, goes through dense products over chunks of rows.

    Args:
        sae: any activation; a ``BatchTopK`` selects over the batch. Its normalisation is not applied.
        z: ``(B, d_model)`` in normalised units, ``(x − mean) / std``, in the dtype of the parameters. Every row counts
            in the means; an empty batch has loss 0.
        l1_coefficient: weight of the L1 penalty.

    Raises:
        ValueError, TypeError: ``z`` of another shape, dtype or device than the parameters need.
    """
    if z.dim() != 2:
        raise ValueError(f"z: expected shape (B, {sae.d_model}), got {tuple(z.shape)}")
    return backpropagate(z, plain_weights(sae), sae.activation, gradient_buffers(sae), l1_coefficient)


def plain_weights(sae: SparseAutoencoder) -> FoldedWeights:
    """The parameters, detached, in normalised units."""
    return FoldedWeights(sae.W_enc.detach(), sae.b_enc.detach(), sae.b_dec.detach(), sae.W_dec.detach())


def gradient_buffers(sae: SparseAutoencoder) -> list[Tensor]:
    """What ``grad`` of W_enc, b_enc, W_dec and b_dec holds, made where it is missing; the values are left over."""
    parameters = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    for parameter in parameters:
        if parameter.grad is None or not parameter.grad.is_contiguous():
            parameter.grad = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def backpropagate(
    z: Tensor, weights: FoldedWeights, activation: Activation, gradients: Sequence[Tensor], l1_coefficient: float
) -> StepResult:
    """:func:`training_step` for any weights: the gradients of W_enc, b_enc, W_dec and b_dec go to ``gradients``."""
    W_enc, b_enc, b_dec, _ = weights
    if isinstance(activation, TopK):
        features = encode_topk(z, W_enc, b_enc, b_dec, k=activation.k)
    elif isinstance(activation, BatchTopK):
        features = encode_batch_topk(z, weights, activation.k)
    else:
        threshold = inference_threshold(activation)
        assert threshold is not None  # only TopK has none
        if _is_dense(z, weights, threshold):
            return dense_step(z, weights, threshold, gradients, l1_coefficient)
        features = encode_threshold(z, W_enc, b_enc, b_dec, threshold)
    return sparse_step(z, weights, features, gradients, l1_coefficient)


def sparse_step(
    z: Tensor, weights: FoldedWeights, features: SparseFeatures, gradients: Sequence[Tensor], l1_coefficient: float
) -> StepResult:
    """:func:`backpropagate` of activations that are known; those ≤ 0 pass no gradient to the encoder."""
    size = max(z.shape[0], 1)
    residual = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    sums, counts = sparse_training_step(
        z,
        features.offsets,
        features.indices,
        features.values,
        weights.W_enc,
        weights.W_dec,
        weights.b_dec,
        2.0 / size,
        l1_coefficient / size,
        out=[residual, *gradients],
    )
    squared, l1 = sums / size
    return StepResult(squared + l1_coefficient * l1, squared, l1, counts, residual, features)


class Window(NamedTuple):
    """What a step sums over the pre-activations near their thresholds: ``|pre − θ| < bandwidth / 2``.

    Attributes:
        bandwidth: its width.
        slope: ``Σ ∂(loss)/∂a`` over the rows where a feature is in it, ``(n,)``; added to.
        entries: how many rows these are, ``(n,)``; added to.
    """

    bandwidth: float
    slope: Tensor
    entries: Tensor


def _is_dense(z: Tensor, weights: FoldedWeights, threshold: float | Tensor) -> bool:
    # In 16 bits the sums over chunks would be rounded after each.
    if z.shape[0] == 0 or z.dtype not in (torch.float32, torch.float64):
        return False
    sample = z[:: max(z.shape[0] // _DENSITY_ROWS, 1)]
    features = encode_threshold(sample, weights.W_enc, weights.b_enc, weights.b_dec, threshold)
    return len(features.values) > _DENSE_ABOVE * len(sample) * features.n_features


def dense_step(
    z: Tensor,
    weights: FoldedWeights,
    threshold: float | Tensor,
    gradients: Sequence[Tensor],
    l1_coefficient: float,
    window: Window | None = None,
) -> StepResult:
    """The step of a threshold ≥ 0 in dense products; autograd makes twice as many passes, in fresh memory each."""
    size, n = z.shape[0], weights.W_enc.shape[0]
    is_relu = not isinstance(threshold, Tensor) and threshold == 0
    W_enc, b_enc, b_dec, W_dec = weights
    W_enc_grad, b_enc_grad, W_dec_grad, b_dec_grad = (gradient.zero_() for gradient in gradients)
    length = min(max(_CHUNK_ELEMENTS // n, 32), size)
    activations, dots = z.new_empty(length, n), z.new_empty(length, n)
    residual, ones, counts = torch.empty_like(z), z.new_ones(length), z.new_zeros(n)
    near = None if window is None else z.new_empty(length, n)
    penalty, l1 = z.new_full((1,), l1_coefficient / size), z.new_zeros((), dtype=torch.float64)
    for rows, error in zip(z.split(length), residual.split(length), strict=True):
        a, dot, one = activations[: len(rows)], dots[: len(rows)], ones[: len(rows)]
        centred = rows - b_dec
        torch.addmm(b_enc, centred, W_enc.T, out=a)
        if window is not None and near is not None:
            inside = torch.sub(a, threshold, out=near[: len(rows)]).abs_().lt_(window.bandwidth / 2)
            window.entries.addmv_(inside.T, one)
        if is_relu:
            a.relu_()
        else:
            a.mul_(torch.gt(a, threshold, out=dot))
        torch.addmm(centred, a, W_dec, beta=-1, out=error)
        scaled = error * (2 / size)
        W_dec_grad.addmm_(a.T, scaled)
        b_dec_grad.addmv_(scaled.T, one)
        torch.addmm(penalty, scaled, W_dec.T, out=dot)
        if window is not None:
            window.slope.addmv_(inside.mul_(dot).T, one)
        torch.ops.aten.threshold_backward.grad_input(dot, a, 0, grad_input=dot)
        W_enc_grad.addmm_(dot.T, centred)
        b_enc_grad.addmv_(dot.T, one)
        l1 += a.sum()
        counts.addmv_(torch.sign(a, out=dot).T, one)
    # b_dec is also subtracted before encoding: Σ_rows (∂/∂pre) W_enc, and the sum over rows is b_enc's gradient.
    b_dec_grad.addmv_(W_enc.T, b_enc_grad, alpha=-1)
    squared = residual.double().square().sum() / size
    l1 = l1 / size
    return StepResult(squared + l1_coefficient * l1, squared, l1, counts.long(), residual, None)
