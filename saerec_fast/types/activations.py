"""Activation functions of sparse autoencoders, as plain descriptions that every layer can read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ReLU:
    """``a = max(pre, 0)``."""


@dataclass(frozen=True, eq=False)
class JumpReLU:
    """``a = pre`` where ``pre > threshold``, else 0 (Rajamanoharan et al., arXiv 2407.14435, eq. 3).

    Attributes:
        threshold: one number, or a tensor ``(n_features,)``; every value ≥ 0.
    """

    threshold: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.threshold, Tensor):
            if self.threshold.dim() > 1:
                raise ValueError(
                    f"threshold: expected a scalar or (n_features,), got shape {tuple(self.threshold.shape)}"
                )
        elif not self.threshold >= 0:
            raise ValueError(f"threshold: expected a number >= 0, got {self.threshold}")


@dataclass(frozen=True)
class TopK:
    """ReLU of the k largest pre-activations of a row (Gao et al., arXiv 2406.04093, section 2.3)."""

    k: int

    def __post_init__(self) -> None:
        _check_k(self.k)


@dataclass(frozen=True)
class BatchTopK:
    """ReLU of the ``k * n_rows`` largest pre-activations of a batch (Bussmann et al., arXiv 2412.06410).

    Attributes:
        k: active features per row on average.
        threshold: the fixed threshold used at inference; ``None`` until training has estimated one.
    """

    k: int
    threshold: float | None = None

    def __post_init__(self) -> None:
        _check_k(self.k)
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"threshold: expected a number >= 0 or None, got {self.threshold}")


Activation = ReLU | JumpReLU | TopK | BatchTopK


def inference_threshold(activation: Activation) -> float | Tensor | None:
    """The threshold a pre-activation must exceed, or ``None`` for :class:`TopK`, whose threshold varies by row.

    Raises:
        ValueError: a :class:`BatchTopK` without an estimated threshold.
        TypeError: not an activation.
    """
    match activation:
        case ReLU():
            return 0.0
        case JumpReLU(threshold=threshold):
            return threshold
        case TopK():
            return None
        case BatchTopK(threshold=None):
            raise ValueError(
                "activation: BatchTopK needs a threshold at inference; train the SAE or give BatchTopK(k, threshold)"
            )
        case BatchTopK(threshold=threshold):
            return threshold
    raise TypeError(f"activation: expected ReLU, JumpReLU, TopK or BatchTopK, got {type(activation).__name__}")


def _check_k(k: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k: expected an integer >= 1, got {k!r}")
