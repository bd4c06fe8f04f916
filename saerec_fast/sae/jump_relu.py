"""Training of JumpReLU autoencoders: gradients for thresholds, with which neither loss nor output is continuous."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from saerec_fast.sae.model import SparseAutoencoder
from saerec_fast.sae.step import StepResult, Window, dense_step, gradient_buffers, plain_weights
from saerec_fast.types import JumpReLU


class TrainedThresholds(nn.Module):
    """A threshold ``θ`` for each feature that is learned beside the parameters of a :class:`SparseAutoencoder`.

    The loss is ``mean ‖r‖² + l0_coefficient · mean ‖a‖₀`` with ``a = pre · H(pre − θ)`` (Rajamanoharan et al.,
    arXiv 2407.14435, section 3). Its derivative with respect to ``θ`` is 0 almost everywhere, so that of its
    expectation is estimated ("straight-through"): with the rectangle kernel ``K(u) = 1`` for ``|u| < 1/2``,

        ``∂a/∂θ = −(θ / ε) K((pre − θ) / ε)`` and ``∂H/∂θ = −(1 / ε) K((pre − θ) / ε)``.

    All other gradients are exact; the penalty has none but for ``θ``.

    Args:
        n_features: size of the dictionary.
        initial: threshold of every feature at first, > 0.
        bandwidth: ``ε``, the width of the window around a threshold in which pre-activations move it, > 0.
        device: of the parameter.

    Attributes:
        log_threshold: parameter ``(n,)``, ``log θ``: a threshold stays positive.
    """

    def __init__(
        self, n_features: int, *, initial: float, bandwidth: float, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.bandwidth = bandwidth
        self.log_threshold = nn.Parameter(torch.full((n_features,), math.log(initial), device=device))

    @torch.no_grad()
    def training_step(self, sae: SparseAutoencoder, z: Tensor, l0_coefficient: float) -> StepResult:
        """Loss of a batch; its gradients go to ``grad`` of the parameters of ``sae`` and of ``log_threshold``.

        Args:
            sae: its own activation is not used.
            z: ``(B, d_model)`` in normalised units, at least one row.
            l0_coefficient: weight of ``mean ‖a‖₀``.
        """
        weights, gradients, threshold = plain_weights(sae), gradient_buffers(sae), self.log_threshold.exp()
        window = Window(self.bandwidth, torch.zeros_like(threshold), torch.zeros_like(threshold))
        # Dense at any density: a sparse step would have to encode what is near a threshold too (docs/design.md).
        result = dense_step(z, weights, threshold, gradients, 0.0, window)
        gradient = -(threshold * window.slope + window.entries * (l0_coefficient / len(z))) / self.bandwidth
        self.log_threshold.grad = gradient * threshold
        l0 = result.counts.sum().double() / len(z)
        return result._replace(loss=result.reconstruction_loss + l0_coefficient * l0)

    @torch.no_grad()
    def finish(self, sae: SparseAutoencoder) -> None:
        """Give ``sae`` the activation that was trained."""
        sae.activation = JumpReLU(self.log_threshold.exp())
