"""Checks of what callers pass: every error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from saerec_fast.types import PackedWeights, Ragged, SteeringPlan
from saerec_fast.types.packed import source_of

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_hidden(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor (..., d), got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected a floating point dtype, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{name}: expected shape (..., d), got a scalar")
    if x.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape (..., d) with d >= 1, got {tuple(x.shape)}")


def check_weight(name: str, weight: Tensor, x: Tensor) -> None:
    """``weight (n, d)`` must fit hidden states ``x (..., d)``."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor (n, d), got {type(weight).__name__}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{name}: expected shape (n, {x.shape[-1]}) to fit the input, got {tuple(weight.shape)}")
    if weight.shape[0] < 1:
        raise ValueError(f"{name}: the dictionary is empty, got shape {tuple(weight.shape)}")
    _check_like(name, weight, x)


def check_bias(name: str, bias: Tensor | None, size: int, x: Tensor) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name}: expected a tensor ({size},) or None, got {type(bias).__name__}")
    if bias.shape != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(bias.shape)}")
    _check_like(name, bias, x)


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> None:
    check_hidden("x", x)
    check_weight("W_enc", W_enc, x)
    check_bias("b_enc", b_enc, W_enc.shape[0], x)
    check_bias("b_dec", b_dec, x.shape[-1], x)


def check_k(k: int, n: int) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k: expected an integer, got {type(k).__name__}")
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 <= k <= {n} (the number of features), got {k}")


def check_capacity(capacity: int | None) -> None:
    if capacity is None:
        return
    if isinstance(capacity, bool) or not isinstance(capacity, (int, torch.SymInt)):
        raise TypeError(f"capacity: expected an integer or None, got {type(capacity).__name__}")
    if capacity < 0:
        raise ValueError(f"capacity: expected at least 0, got {capacity}")


def check_features(features: Tensor, n: int) -> None:
    """``features`` are integer ids ``(m,)`` of a dictionary of ``n``."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features: expected a tensor of integer ids (m,), got {type(features).__name__}")
    if features.dim() != 1 or features.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"features: expected integer ids (m,), got {features.dtype} {tuple(features.shape)}")
    # Values cannot be looked at while a graph is traced; the kernel does so again.
    if torch.compiler.is_compiling():
        return
    low, high = (int(features.min()), int(features.max())) if features.numel() else (0, 0)
    if low < 0 or high >= n:
        raise ValueError(f"features: ids go from 0 to {n - 1}, got {low} to {high}")


def check_packed(packed: PackedWeights | None, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bytes of packed weights, which must have been made from ``weight`` and ``bias`` as they are now."""
    if packed is None:
        return None
    if not isinstance(packed, PackedWeights):
        raise TypeError(f"packed: expected PackedWeights from pack_weights, got {type(packed).__name__}")
    if packed.shape != tuple(weight.shape):
        raise ValueError(f"packed: expected weights of shape {tuple(weight.shape)}, got {packed.shape}")
    data = packed.data
    if data.dtype != torch.uint8 or data.dim() != 1 or data.shape[0] == 0 or not data.is_contiguous():
        raise ValueError(f"packed: expected data uint8 (bytes,), contiguous, got {data.dtype} {tuple(data.shape)}")
    if data.device != weight.device:
        raise ValueError(f"packed: expected device {weight.device} like the weights, got {data.device}")
    if packed.source is not None and not torch.compiler.is_compiling() and packed.source != source_of(weight, bias):
        raise ValueError("packed: the weights or the bias are other ones, or have changed since; pack them again")
    return data


def check_threshold(threshold: float | Tensor, n: int, x: Tensor) -> Tensor:
    """The threshold as a float tensor ``(1,)`` or ``(n,)`` on the device of ``x``."""
    if not isinstance(threshold, Tensor):
        if not isinstance(threshold, Real):
            raise TypeError(f"threshold: expected a number or a tensor ({n},), got {type(threshold).__name__}")
        # Filled on the device: a copy from the host cannot be captured in a CUDA graph.
        return torch.full((1,), float(threshold), dtype=torch.float32, device=x.device)
    if threshold.dim() == 0:
        threshold = threshold.reshape(1)
    elif threshold.shape != (n,):
        raise ValueError(f"threshold: expected a number or shape ({n},), got {tuple(threshold.shape)}")
    if threshold.device != x.device:
        raise ValueError(f"threshold: expected device {x.device} like the input, got {threshold.device}")
    return threshold


def check_exclude(exclude: Ragged | Sequence[Sequence[int] | Tensor] | None, rows: int, x: Tensor) -> Ragged | None:
    """Normalise ``exclude`` to compressed rows of int64 on the device of ``x``."""
    if exclude is None:
        return None
    if not isinstance(exclude, Ragged):
        exclude = Ragged.from_lists(exclude)
    offsets, ids = (part.to(device=x.device, dtype=torch.int64).contiguous() for part in exclude)
    if offsets.shape != (rows + 1,):
        raise ValueError(f"exclude: expected one list of ids per row ({rows} rows), got {offsets.numel() - 1}")
    return Ragged(offsets, ids)


def check_exclude_values(exclude: Ragged | None, n: int) -> None:
    """What the kernels check for themselves."""
    if exclude is None:
        return
    offsets, ids = exclude
    if int(offsets[0]) != 0 or int(offsets[-1]) != ids.numel() or bool((offsets.diff() < 0).any()):
        raise ValueError(f"exclude: offsets must rise from 0 to {ids.numel()}, the number of ids")
    if ids.numel():
        low, high = exclude.ids.aminmax()
        if int(low) < 0 or int(high) >= n:
            raise ValueError(f"exclude: expected ids from 0 to {n - 1}, got {int(low)} to {int(high)}")


def check_plan(plan: SteeringPlan, n: int, d: int) -> None:
    """``plan`` must fit a dictionary of ``n`` features of hidden states of width ``d``."""
    if not isinstance(plan, SteeringPlan):
        raise TypeError(f"plan: expected a SteeringPlan, got {type(plan).__name__}")
    if plan.largest_feature >= n:
        raise ValueError(f"plan: feature ids go from 0 to {n - 1}, got {plan.largest_feature}")
    if plan.direction_width not in (None, d):
        raise ValueError(f"plan: expected directions of width {d} (d_model), got {plan.direction_width}")


def check_strengths(strengths: Tensor | None, plan: SteeringPlan, batch_shape: torch.Size, x: Tensor) -> None:
    if strengths is None:
        return
    if not isinstance(strengths, Tensor) or not strengths.is_floating_point():
        came = strengths.dtype if isinstance(strengths, Tensor) else type(strengths).__name__
        raise TypeError(f"strengths: expected a floating point tensor (m,) or (..., m), got {came}")
    m = len(plan.edits)
    if strengths.device != x.device:
        raise ValueError(f"strengths: expected device {x.device} like the input, got {strengths.device}")
    if strengths.dim() < 1 or strengths.shape[-1] != m:
        raise ValueError(f"strengths: expected one value per edit, shape (..., {m}), got {tuple(strengths.shape)}")
    try:
        broadcast = torch.broadcast_shapes(strengths.shape[:-1], batch_shape)
    except RuntimeError:
        broadcast = None
    if broadcast != batch_shape:
        raise ValueError(
            f"strengths: expected a shape that broadcasts to {(*batch_shape, m)}, got {tuple(strengths.shape)}"
        )


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype} like the input, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like the input, got {tensor.device}")
