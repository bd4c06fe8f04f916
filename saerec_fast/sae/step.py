"""One training step of a sparse autoencoder without autograd: loss and gradients in one pass after the encoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saerec_fast.api import encode_threshold, encode_topk
from saerec_fast.sae.model import FoldedWeights, SparseAutoencoder, encode_batch_topk
from saerec_fast.training_ops import sparse_training_step
from saerec_fast.types import BatchTopK, SparseFeatures, TopK, inference_threshold


class StepResult(NamedTuple):
    """The parts of a step's loss, and what it saw.

    Attributes:
        reconstruction_loss: ``mean ‖r‖²``, float64 scalar.
        l1: ``mean ‖a‖₁``, float64 scalar, without its coefficient.
        counts: in how many rows each feature is active, int64 ``(n,)``.
        residual: ``r = ẑ − z (B, d)``.
        features: the activations.
    """

    reconstruction_loss: Tensor
    l1: Tensor
    counts: Tensor
    residual: Tensor
    features: SparseFeatures


@torch.no_grad()
def training_step(sae: SparseAutoencoder, z: Tensor, *, l1_coefficient: float = 0.0) -> StepResult:
    """Loss ``mean ‖ẑ − z‖² + l1_coefficient · mean ‖a‖₁`` of a batch; its gradients go to ``parameter.grad``.

    The gradients are those that autograd gives, to rounding, and replace what ``grad`` holds. They are the same bits
    for any number of threads, and nothing of batch × dictionary or batch × k × width is held. Time and memory grow
    with the number of active features: a ReLU SAE early in training, of whose features half are active, is better
    served by dense products (see :func:`~saerec_fast.sae.train_sae`, which chooses by itself).

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
    parameters = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    W_enc, b_enc, W_dec, b_dec = (parameter.detach() for parameter in parameters)
    activation, size = sae.activation, max(z.shape[0], 1)
    if isinstance(activation, TopK):
        features = encode_topk(z, W_enc, b_enc, b_dec, k=activation.k)
    elif isinstance(activation, BatchTopK):
        features = encode_batch_topk(z, FoldedWeights(W_enc, b_enc, b_dec, W_dec), activation.k)
    else:
        threshold = inference_threshold(activation)
        assert threshold is not None  # only TopK has none
        features = encode_threshold(z, W_enc, b_enc, b_dec, threshold)
    for parameter in parameters:
        if parameter.grad is None or not parameter.grad.is_contiguous():
            parameter.grad = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    residual = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    sums, counts = sparse_training_step(
        z,
        features.offsets,
        features.indices,
        features.values,
        W_enc,
        W_dec,
        b_dec,
        2.0 / size,
        l1_coefficient / size,
        out=[residual, *gradients],
    )
    squared, activations = sums / size
    return StepResult(squared, activations, counts, residual, features)
