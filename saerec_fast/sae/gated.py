"""Training of gated autoencoders, and the JumpReLU autoencoder that one equals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saerec_fast.sae.model import SparseAutoencoder
from saerec_fast.sae.step import StepResult, backpropagate, gradient_buffers, plain_weights
from saerec_fast.types import JumpReLU, ReLU


class Gate(nn.Module):
    """The gate of a gated SAE, learned beside the parameters of a :class:`SparseAutoencoder`.

    ``a = H(π) · ReLU(exp(r_mag) · W (z − b_dec) + b_mag)`` with ``π = W (z − b_dec) + b_gate`` (Rajamanoharan et al.,
    arXiv 2404.16014, section 3), where ``W`` and ``b_mag`` are ``W_enc`` and ``b_enc`` of the autoencoder. The loss
    is ``mean ‖r‖² + l1_coefficient · mean ‖ReLU(π)‖₁ + mean ‖r_gate‖²``: the reconstruction from ``a``, the
    penalty, and the reconstruction from ``ReLU(π)`` by a decoder that does not learn from it; the gate learns from the
    last two only.

    Args:
        n_features: size of the dictionary.
        device: of the parameters.

    Attributes:
        r_mag: parameter ``(n,)``, 0 at first.
        b_gate: parameter ``(n,)``, 0 at first.
    """

    def __init__(self, n_features: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.r_mag = nn.Parameter(torch.zeros(n_features, device=device))
        self.b_gate = nn.Parameter(torch.zeros(n_features, device=device))

    @torch.no_grad()
    def training_step(self, sae: SparseAutoencoder, z: Tensor, l1_coefficient: float) -> StepResult:
        """Loss of a batch; its gradients go to ``grad`` of the parameters of ``sae`` and of the gate.

        Args:
            sae: its own activation is not used.
            z: ``(B, d_model)`` in normalised units.
            l1_coefficient: weight of ``mean ‖ReLU(π)‖₁``.

        Returns:
            Reconstruction, counts and residual are those of ``a``; ``l1`` is ``mean ‖ReLU(π)‖₁``.
        """
        weights, gradients = plain_weights(sae), gradient_buffers(sae)
        W_enc, _, threshold = fold_gate(weights.W_enc, self.b_gate, self.r_mag, weights.b_enc)
        folded = weights._replace(W_enc=W_enc)
        main = backpropagate(z, folded, JumpReLU(threshold), gradients, 0.0)
        W_enc_grad, _, _, b_dec_grad = gradients
        # ∂/∂r = Σ_rows ∂/∂pre · exp(r) W (z − b_dec), and Σ_rows ∂/∂pre (z − b_dec) is the gradient of the weights.
        self.r_mag.grad = (W_enc_grad * W_enc).sum(1)

        gate_gradients = [torch.empty_like(gradient) for gradient in gradients]
        gate = backpropagate(z, weights._replace(b_enc=self.b_gate.detach()), ReLU(), gate_gradients, l1_coefficient)
        W_gate_grad, self.b_gate.grad, _, _ = gate_gradients
        torch.addcmul(W_gate_grad, W_enc_grad, self.r_mag.exp().unsqueeze(1), out=W_enc_grad)
        # The decoder is constant there, but b_dec is also taken off before encoding.
        b_dec_grad.addmv_(weights.W_enc.T, self.b_gate.grad, alpha=-1)
        return main._replace(loss=main.loss + gate.loss, l1=gate.l1)

    @torch.no_grad()
    def finish(self, sae: SparseAutoencoder) -> None:
        """Fold the gate into the weights of ``sae`` and its thresholds: the same function of hidden states."""
        W_enc, _, threshold = fold_gate(sae.W_enc, self.b_gate, self.r_mag, sae.b_enc)
        sae.W_enc.copy_(W_enc)
        sae.activation = JumpReLU(threshold)


def fold_gate(W_enc: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder weights, bias and threshold of the JumpReLU encoder that equals a gated one.

    The gate is open where ``W x + b_gate > 0``, so where ``exp(r_mag) W x + b_mag > b_mag − exp(r_mag) b_gate``; with
    the ReLU of the magnitude the threshold is that or 0.

    Args:
        W_enc: ``(n, d)``, shared by gate and magnitude.
        b_gate: ``(n,)``.
        r_mag: ``(n,)``, logarithm of the magnitude's scale.
        b_mag: ``(n,)``.

    Returns:
        In the type of ``W_enc``, but float32 in place of a 16-bit type.
    """
    wide = torch.promote_types(W_enc.dtype, torch.float32)
    scale = r_mag.double().exp()
    threshold = (b_mag.double() - scale * b_gate.double()).clamp_(min=0)
    return W_enc * scale.to(wide).unsqueeze(1), b_mag.to(wide), threshold.to(wide)
