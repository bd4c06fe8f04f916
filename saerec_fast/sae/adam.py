"""Adam for sparse autoencoders, in one pass over parameters, gradients and moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from saerec_fast.sae.model import SparseAutoencoder
from saerec_fast.training_ops import adam_step


class Adam(torch.optim.Optimizer):
    """The updates of ``torch.optim.Adam``, which keep decoder rows at unit norm.

    In the same pass over ``W_dec`` the gradient's part along each row is taken out and the row scaled back to unit
    norm, as ``sae.remove_parallel_gradient_()`` does before a step and ``sae.normalize_decoder_()`` after it. Rows
    whose gradient and moments are all zero, those of features that never fired, are skipped: their update is exactly
    zero. Arithmetic and state are those of ``torch.optim.Adam(fused=True)``.

    Args:
        sae: whose parameters to update; decoder rows of unit norm.
        lr: learning rate.
        betas: decay of the running means of the gradient and its square.
        eps: added to the denominator.
        further: parameters that are learned beside those of ``sae``.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        further: Iterable[nn.Parameter] = (),
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr: expected a number >= 0, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        if not eps >= 0:
            raise ValueError(f"eps: expected a number >= 0, got {eps}")
        self._unit_rows = sae.W_dec
        super().__init__([*sae.parameters(), *further], {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the loss again, as for every optimiser of torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                adam_step(
                    parameter,
                    parameter.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    int(state["step"]),
                    group["lr"],
                    group["betas"],
                    group["eps"],
                    parameter is self._unit_rows,
                )
        return loss
