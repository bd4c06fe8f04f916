"""Hidden states at a site of the recommender, streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from saerec_fast.recommender.evaluation import pad_histories
from saerec_fast.recommender.model import SequenceRecommender, hidden_of, site_module
from saerec_fast.recommender.training import progress_bar
from saerec_fast.sae.activation_store import ActivationStore

if TYPE_CHECKING:
    from saerec_fast.data import Dataset


def iterate_hidden(
    model: SequenceRecommender, dataset: Dataset, site: str, *, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One row per interaction of ``dataset``, in its order.

    A history longer than ``max_length`` is cut into windows that do not overlap, from its end backwards: the last
    one is what the model reads when it recommends, and no interaction is left out. The first items of an earlier
    window therefore have less context than they would have had online.

    The model runs in eval mode and is put back into the mode it was in; hooks already on it act as usual.

    Args:
        model: recommender.
        dataset: users whose histories are run.
        site: a name of :func:`~saerec_fast.recommender.model.sites`.
        batch_size: windows per forward pass; memory only.

    Yields:
        ``hidden (N, d_model)`` in the model's dtype, ``users`` int64 ``(N,)`` (positions in ``dataset``) and
        ``items`` int64 ``(N,)`` (item indices), all on the CPU. Strung together, row r belongs to ``dataset.items[r]``.

    Raises:
        ValueError: no such site; the message lists those there are.
    """
    module = site_module(model, site)
    starts, stops, users = inference_windows(dataset.offsets, model.config.max_length)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for begin in range(0, len(starts), batch_size):
            chosen = slice(begin, begin + batch_size)
            windows = [dataset.items[a:b] for a, b in zip(starts[chosen], stops[chosen], strict=True)]
            tokens = pad_histories(windows, model.config.max_length)
            valid = tokens != 0
            hidden = _hidden_at(model, module, tokens.to(model.device)).cpu()
            owners = np.repeat(users[chosen], (stops - starts)[chosen])
            yield hidden[valid], torch.from_numpy(owners), tokens[valid] - 1

    return batches()


def collect(
    model: SequenceRecommender,
    dataset: Dataset,
    site: str,
    store_path: str | os.PathLike[str],
    *,
    batch_size: int = 256,
    progress: bool = True,
) -> ActivationStore:
    """Write the rows of :func:`iterate_hidden` to an :class:`~saerec_fast.sae.activation_store.ActivationStore`.

    Memory holds one batch at a time, whatever the size of the data set. The store's meta names the ``site`` and the
    ``dataset``; a store that is at ``store_path`` already is replaced.

    Raises:
        ImportError: ``progress`` is on and rich is not installed.
        ValueError: no such site, or the data set has no interactions.
    """
    n_rows = len(dataset.items)
    if not n_rows:
        raise ValueError(f"{dataset.name}: no interactions, there is nothing to collect")
    rows = iterate_hidden(model, dataset, site, batch_size=batch_size)
    written = 0
    with (
        ActivationStore.create(store_path, n_rows, model.config.d_model, site=site, dataset=dataset.name) as writer,
        progress_bar(progress, f"hidden states at {site}", n_rows) as show,
    ):
        for hidden, users, items in rows:
            writer.append(hidden, users, items)
            written += len(hidden)
            show(written, "")
    return ActivationStore(store_path)


def inference_windows(offsets: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows of at most ``max_length`` that cover every sequence once, counted from its end.

    Args:
        offsets: int64 ``(n_users + 1,)``.
        max_length: items per window.

    Returns:
        int64 ``(n_windows,)`` each: start and stop in the items, and the user, in the order of the data.
    """
    n_windows = -(-np.diff(offsets) // max_length)
    users = np.repeat(np.arange(len(n_windows)), n_windows)
    left = n_windows[users] - 1 - (np.arange(len(users)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows))
    stops = offsets[1:][users] - left * max_length
    return np.maximum(stops - max_length, offsets[users]), stops, users


@torch.inference_mode()
def _hidden_at(model: SequenceRecommender, module: nn.Module, tokens: Tensor) -> Tensor:
    """What ``module`` returns while ``model`` reads ``tokens``, ``(B, L, d)``."""
    captured: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        captured.append(hidden_of(output))

    was_training = model.training
    handle = module.register_forward_hook(keep)
    try:
        model.eval()
        model(tokens)
    finally:
        handle.remove()
        model.train(was_training)
    return captured[0]
