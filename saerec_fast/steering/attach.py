"""Steering inside a model: a forward hook that edits the hidden state a module returns."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from saerec_fast.sae import SparseAutoencoder
from saerec_fast.types import SteeringPlan
from saerec_fast.validation import check_plan


def attach(
    model: nn.Module,
    site: str | nn.Module,
    sae: SparseAutoencoder,
    plan: SteeringPlan,
    valid: Callable[..., Tensor] | None = None,
    *,
    strengths: Tensor | None = None,
) -> SteeringHandle:
    """Steer the output of a module inside ``model`` until the handle is detached.

    Args:
        model: the recommender, not compiled yet: a compiled graph would silently ignore the hook.
        site: dotted path of a module inside ``model``, or the module. It returns hidden states ``(..., d_model)`` as a
            tensor, a tuple (the first tensor of that width is steered) or a list (the last one is).
        sae: trained on that site.
        plan: the edits. Several handles on one site act in the order they were attached.
        valid: maps the arguments of ``model.forward`` to a bool mask ``(B, L)`` of non-padding positions, for example
            ``lambda ids: ids != 0``. Padding stays untouched, and ``last`` means each row's last valid position. Without
            it every position is valid and ``last`` is ``[:, -1]``.
        strengths: replace the plan's values: ``(m,)``, or ``(B, m)`` for strengths per row of the batch. The tensor
            is used as it is, so that gradients flow to it and changes in place act at once, without recompiling.

    Returns:
        A handle, which is also a context manager.

    Raises:
        ValueError: no such module, an unknown feature, strengths of a wrong shape or not finite, or a model that
            is compiled already.
        TypeError: a wrong type.
    """
    return SteeringHandle(model, site, sae, plan, valid, strengths)


class SteeringHandle:
    """An attached plan; see :func:`attach`. Detaches at the end of a ``with`` block, or by :meth:`detach`."""

    def __init__(
        self,
        model: nn.Module,
        site: str | nn.Module,
        sae: SparseAutoencoder,
        plan: SteeringPlan,
        valid: Callable[..., Tensor] | None,
        strengths: Tensor | None,
    ) -> None:
        _check_not_compiled(model)
        module = _find_module(model, site)
        self._sae = sae
        self._valid = valid
        # One forward pass per thread: concurrent requests must not see each other's mask.
        self._local = threading.local()
        self._traced_mask: Tensor | None = None
        self._set(plan, strengths)
        self._hooks = []
        if valid is not None:
            self._hooks.append(model.register_forward_pre_hook(self._remember_mask, with_kwargs=True))
            self._hooks.append(model.register_forward_hook(self._forget_mask, always_call=True))
        self._hooks.append(module.register_forward_hook(self._steer_output))

    @property
    def plan(self) -> SteeringPlan:
        """The plan in force."""
        return self._plan

    @property
    def strengths(self) -> Tensor:
        """The strengths in force, ``(m,)`` or ``(B, m)``; changes in place act on the next forward pass."""
        return self._strengths

    def update(self, plan: SteeringPlan | None = None, strengths: Tensor | None = None) -> None:
        """Change the plan, or only its strengths: those of the same shape are copied in place, so that compiled
        code goes on with the same graph.

        Raises:
            ValueError, TypeError: as :func:`attach`; the plan in force then stays.
        """
        if plan is not None:
            self._set(plan, strengths)
        elif strengths is not None:
            strengths = self._checked_strengths(self._plan, strengths)
            if strengths.shape == self._strengths.shape and not strengths.requires_grad:
                with torch.no_grad():
                    self._strengths.copy_(strengths)
            else:
                self._strengths = strengths

    def detach(self) -> None:
        """Take the hooks off; a second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> SteeringHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _set(self, plan: SteeringPlan, strengths: Tensor | None) -> None:
        check_plan(plan, self._sae.n_features)
        if strengths is None:
            strengths = torch.tensor(plan.values, dtype=torch.float32, device=self._sae.W_dec.device)
        self._strengths = self._checked_strengths(plan, strengths)
        self._plan = plan

    @staticmethod
    def _checked_strengths(plan: SteeringPlan, strengths: Tensor) -> Tensor:
        if not isinstance(strengths, Tensor) or not strengths.is_floating_point():
            raise TypeError("strengths: expected a floating point tensor (m,) or (B, m)")
        m = len(plan.edits)
        if strengths.dim() not in (1, 2) or strengths.shape[-1] != m:
            raise ValueError(f"strengths: expected shape ({m},) or (B, {m}), got {tuple(strengths.shape)}")
        if not bool(strengths.detach().isfinite().all()):
            raise ValueError("strengths: expected finite numbers")
        return strengths

    def _remember_mask(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._valid is not None
        mask = self._valid(*args, **kwargs)
        if torch.compiler.is_compiling():
            self._traced_mask = mask
        else:
            self._local.mask = mask

    def _forget_mask(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self._traced_mask = None
        else:
            self._local.mask = None

    def _steer_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._steered(output)
        if isinstance(output, (tuple, list)):
            width = self._sae.d_model
            places = [i for i, one in enumerate(output) if isinstance(one, Tensor) and one.shape[-1:] == (width,)]
            if not places:
                raise ValueError(f"steering: the module's output holds no tensor of width {width} (the SAE's d_model)")
            chosen = places[0] if isinstance(output, tuple) else places[-1]
            parts = [self._steered(one) if i == chosen else one for i, one in enumerate(output)]
            if hasattr(output, "_fields"):
                return type(output)(*parts)
            return tuple(parts) if isinstance(output, tuple) else parts
        raise TypeError(f"steering: expected the module to return a tensor, tuple or list, got {type(output).__name__}")

    def _steered(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != self._sae.d_model:
            raise ValueError(
                f"steering: expected hidden states of width {self._sae.d_model} (the SAE's d_model), "
                f"got {tuple(hidden.shape)}"
            )
        mask = None
        if self._valid is not None:
            mask = self._traced_mask if torch.compiler.is_compiling() else getattr(self._local, "mask", None)
            if mask is None:
                raise RuntimeError(
                    "steering: `valid` was given, but the module ran outside the model's own forward, "
                    "so that the mask is unknown"
                )
        strengths = self._strengths
        if strengths.dim() == 2 and hidden.dim() > 2:
            strengths = strengths.reshape(strengths.shape[0], *[1] * (hidden.dim() - 2), strengths.shape[1])
        return self._sae.steer(hidden, self._plan, strengths=strengths, valid=mask)


def _find_module(model: nn.Module, site: str | nn.Module) -> nn.Module:
    modules = dict(model.named_modules())
    if isinstance(site, nn.Module):
        if not any(module is site for module in modules.values()):
            raise ValueError(f"site: expected a module inside the model, got another {type(site).__name__}")
        return site
    if site not in modules or site == "":
        near = difflib.get_close_matches(site, [name for name in modules if name], n=5, cutoff=0.3)
        raise ValueError(f"site: the model has no module {site!r}" + (f"; near: {', '.join(near)}" if near else ""))
    return modules[site]


def _check_not_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if (
            hasattr(module, "_orig_mod")
            or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(module.forward, "_torchdynamo_orig_callable")
        ):
            raise ValueError(
                f"model: {name or 'it'} is compiled already, and compiled code ignores hooks attached later; attach first"
            )
