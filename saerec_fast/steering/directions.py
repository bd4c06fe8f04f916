"""Directions of the hidden states that stand for an attribute."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saerec_fast.sae import ActivationStore
from saerec_fast.types import Direction

_ROWS = 1 << 16


def contrastive_direction(hidden: Tensor | ActivationStore, has_attribute: Tensor, name: str = "") -> Direction:
    """The mean hidden state with an attribute less the mean without it, as an entry of a plan.

    Adding it once (``value`` 1) carries the mean of the rows without the attribute onto that of the rows with it.
    Contrast of means: Rimsky et al., arXiv 2312.06681.

    Args:
        hidden: hidden states of one site ``(N, d)``, or a store of them, which is read block by block.
        has_attribute: bool ``(N,)``.
        name: what the direction stands for.

    Raises:
        ValueError: another number of labels than of hidden states, or labels that are all the same.
        TypeError: labels that are not bool.
    """
    if not isinstance(has_attribute, Tensor) or has_attribute.dtype != torch.bool:
        came = has_attribute.dtype if isinstance(has_attribute, Tensor) else type(has_attribute).__name__
        raise TypeError(f"has_attribute: expected a bool tensor (N,), got {came}")
    # A store's hidden states lie on disk and are read slice by slice.
    states = hidden.hidden if isinstance(hidden, ActivationStore) else hidden
    n_rows = len(states)
    if has_attribute.shape != (n_rows,):
        raise ValueError(f"has_attribute: expected shape ({n_rows},), got {tuple(has_attribute.shape)}")
    counts = [int((~has_attribute).sum()), int(has_attribute.sum())]
    if 0 in counts:
        raise ValueError("has_attribute: expected rows with the attribute and rows without it")
    sums = [torch.zeros((), dtype=torch.float64)] * 2
    for begin in range(0, n_rows, _ROWS):
        block = states[begin : begin + _ROWS]
        rows = (block.detach() if isinstance(block, Tensor) else torch.from_numpy(np.array(block))).double().cpu()
        labels = has_attribute[begin : begin + _ROWS].cpu()
        sums = [sums[0] + rows[~labels].sum(0), sums[1] + rows[labels].sum(0)]
    return Direction(sums[1] / counts[1] - sums[0] / counts[0], name=name)
