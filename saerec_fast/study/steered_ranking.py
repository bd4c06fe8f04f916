"""Many plans on the same users: hidden states are computed once, only what follows the site runs for every plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saerec_fast.api import linear_topk
from saerec_fast.recommender import Metrics, SequenceRecommender, site_module
from saerec_fast.recommender.evaluation import pad_histories, ranking_metrics
from saerec_fast.recommender.model import hidden_of
from saerec_fast.types import Ragged, SteeringPlan

if TYPE_CHECKING:
    from saerec_fast.data import Dataset
    from saerec_fast.sae import SparseAutoencoder


@dataclass(frozen=True)
class _Batch:
    """What does not depend on the plan, for B histories of at most L items.

    ``hidden (B, L, d)`` at the site; ``added``, what the model adds to it (to the scaled item embedding) before the
    next block (broadcasts to it); ``valid (B, L)``; ``last (B,)``, each row's last position; ``untouched``, keys and
    values ``(B, heads, L, d/heads)`` of every later block; ``seen``, the items to leave out.
    """

    hidden: Tensor
    added: Tensor
    valid: Tensor
    last: Tensor
    untouched: tuple[tuple[Tensor, Tensor], ...]
    seen: Ragged

    def at_last(self, rows: Tensor) -> Tensor:
        """``(B, L, d) -> (B, 1, d)``."""
        return rows[torch.arange(len(rows)), self.last].unsqueeze(1)


class SteeredRanking:
    """Leave-last-out lists of the same users under one plan after the other.

    The same lists as :func:`saerec_fast.interpret.control.evaluate_steered`, but for rounding. Two things make it
    faster: whatever lies before the site runs once; and of the last block (of every block, where only the last position
    is steered: attention is causal, so that earlier positions stay as they were) only the last position is computed.

    Args:
        model: in eval mode, on the CPU.
        dataset: users to evaluate on; those with fewer than 2 items are skipped.
        sae: trained on the model's hidden states at ``site``.
        site: a name of :func:`saerec_fast.recommender.sites`.
        popularity: share of training users per item, for novelty.
        k: length of the lists.
        batch_size: histories per forward pass; memory only. About ``4 (1 + 2 later blocks) L d`` bytes a user are kept.

    Raises:
        ValueError: no such site, or no user has 2 items.
    """

    def __init__(
        self,
        model: SequenceRecommender,
        dataset: Dataset,
        sae: SparseAutoencoder,
        site: str,
        *,
        popularity: np.ndarray,
        k: int = 10,
        batch_size: int = 256,
    ) -> None:
        self.model, self.sae, self.site, self.k = model, sae, site, k
        self.popularity = popularity
        self._normalise = site != "last"
        self._scale = model.embedding_scale if site == "embedding" else 1.0
        self._blocks = _later_blocks(model, site)
        self._heads = model.config.n_heads
        users = np.flatnonzero(np.diff(dataset.offsets) >= 2)
        if not len(users):
            raise ValueError(f"{dataset.name}: no user has 2 items, nothing to evaluate")
        self.users = users
        self.targets = dataset.items[dataset.offsets[1:][users] - 1].astype(np.int64)
        self._batches = [
            self._prepare([dataset.sequence(user)[:-1] for user in users[start : start + batch_size]])
            for start in range(0, len(users), batch_size)
        ]

    def metrics(self, plan: SteeringPlan) -> Metrics:
        """Ranking metrics with a plan at the site.

        Raises:
            ValueError: a plan whose positions are a mask, or that does not fit the SAE.
        """
        return ranking_metrics(self.lists(plan), self.targets, self.users, popularity=self.popularity)

    @torch.inference_mode()
    def lists(self, plan: SteeringPlan) -> np.ndarray:
        """int64 ``(n_users, k)``: item indices, best first, -1 where there are fewer candidates; raises as
        :meth:`metrics`."""
        items = self.model.item_embeddings
        k = min(self.k, len(items))
        lists = [
            linear_topk(self._final(batch, plan), items, k=k, exclude=batch.seen).indices for batch in self._batches
        ]
        return np.pad(torch.cat(lists).numpy(), ((0, 0), (0, self.k - k)), constant_values=-1)

    @torch.inference_mode()
    def final_hidden(self, plan: SteeringPlan) -> Tensor:
        """What the head reads at each user's last position, ``(n_users, d)``; raises as :meth:`metrics`."""
        return torch.cat([self._final(batch, plan) for batch in self._batches])

    def expected_ndcg(self, lists: np.ndarray) -> np.ndarray:
        """The NDCG that the untouched recommender expects of lists: the sum of an item's probability (softmax over
        all items its user has not seen) over ``log2(1 + place)``.

        Args:
            lists: int64 ``(n_users, k)`` of unseen items, -1 where there is none.

        Returns:
            float64 ``(n_users,)``.
        """
        final, log_total = self._untouched
        embeddings = self.model.item_embeddings.detach().double()
        places = torch.from_numpy(np.maximum(lists, 0))
        scores = torch.einsum("ukd,ud->uk", embeddings[places], final)
        gains = torch.exp(scores - log_total[:, None]).numpy() / np.log2(np.arange(lists.shape[1]) + 2)
        expected: np.ndarray = np.where(lists >= 0, gains, 0.0).sum(axis=1)
        return expected

    @cached_property
    @torch.inference_mode()
    def _untouched(self) -> tuple[Tensor, Tensor]:
        """Without a plan, float64: the head's input at the last positions ``(n_users, d)``, and the logarithm of the
        summed exponentials of the scores of unseen items ``(n_users,)``."""
        embeddings = self.model.item_embeddings.double()
        finals, totals = [], []
        for batch in self._batches:
            final = self._final(batch, SteeringPlan()).double()
            scores = final @ embeddings.T
            rows = torch.repeat_interleave(torch.arange(len(final)), batch.seen.offsets.diff())
            scores[rows, batch.seen.ids] = -torch.inf
            finals.append(final)
            totals.append(scores.logsumexp(dim=1))
        return torch.cat(finals), torch.cat(totals)

    @torch.inference_mode()
    def _prepare(self, histories: Sequence[np.ndarray]) -> _Batch:
        tokens = pad_histories(histories, self.model.config.max_length)
        found: dict[str, Tensor] = {}

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found["hidden"] = hidden_of(output)

        def keep_residual(_module: nn.Module, inputs: Any) -> None:
            found["residual"] = inputs[0]

        hooks = [site_module(self.model, self.site).register_forward_hook(keep)]
        if self.site.startswith("mlp."):
            before_mlp = self.model.get_submodule(f"transformer.h.{self.site.split('.')[1]}.ln_2")
            hooks.append(before_mlp.register_forward_pre_hook(keep_residual))
        try:
            self.model(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        hidden, added = found["hidden"], torch.zeros(())
        if self.site == "embedding":
            added = self.model.get_submodule("transformer.wpe").weight[: tokens.shape[1]]  # type: ignore[index]
        elif "residual" in found:
            added = found["residual"]
        untouched, stream = [], self._scale * hidden + added
        for block in self._blocks:
            queries, keys, values = self._project(block, stream)
            untouched.append((keys, values))
            stream = self._finish(block, stream, F.scaled_dot_product_attention(queries, keys, values, is_causal=True))
        valid = tokens != 0
        seen = Ragged.from_lists([torch.from_numpy(history.astype(np.int64)) for history in histories])
        return _Batch(hidden, added, valid, valid.sum(dim=1) - 1, tuple(untouched), seen)

    def _final(self, batch: _Batch, plan: SteeringPlan) -> Tensor:
        """The head's input at the last position, ``(B, d)``."""
        if isinstance(plan.positions, Tensor):
            raise ValueError("plan: expected positions 'all' or 'last', got a mask")
        everywhere = plan.at_positions("all")
        if plan.positions == "last" or not self._blocks:
            rows = self.sae.steer(batch.at_last(batch.hidden), everywhere)
            rows = self._scale * rows + batch.at_last(batch.added.expand_as(batch.hidden))
            for block, (keys, values) in zip(self._blocks, batch.untouched, strict=True):
                rows = self._at_last(block, batch, rows, keys, values)
        else:
            stream = self._scale * self.sae.steer(batch.hidden, everywhere, valid=batch.valid) + batch.added
            for block in self._blocks[:-1]:
                attended = F.scaled_dot_product_attention(*self._project(block, stream), is_causal=True)
                stream = self._finish(block, stream, attended)
            keys, values = self._keys_values(self._blocks[-1], stream)
            rows = self._at_last(self._blocks[-1], batch, batch.at_last(stream), keys, values)
        if self._normalise:
            rows = self.model.get_submodule("transformer.ln_f")(rows)
        return rows.squeeze(1)

    def _at_last(self, block: Any, batch: _Batch, rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A block at the last positions ``rows (B, 1, d)``, given the keys and values of those before them."""
        query, own_key, own_value = self._project(block, rows)
        keys, values = keys.clone(), values.clone()
        every = torch.arange(len(rows))
        keys[every, :, batch.last], values[every, :, batch.last] = own_key.squeeze(2), own_value.squeeze(2)
        mask = batch.valid[:, None, None]
        return self._finish(block, rows, F.scaled_dot_product_attention(query, keys, values, attn_mask=mask))

    def _project(self, block: Any, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, ``(B, heads, L, d/heads)`` each."""
        queries, keys, values = block.attn.c_attn(block.ln_1(stream)).split(stream.shape[-1], dim=-1)
        return self._split_heads(queries), self._split_heads(keys), self._split_heads(values)

    def _keys_values(self, block: Any, stream: Tensor) -> tuple[Tensor, Tensor]:
        width = stream.shape[-1]
        weight, bias = block.attn.c_attn.weight[:, width:], block.attn.c_attn.bias[width:]
        keys, values = (block.ln_1(stream) @ weight + bias).split(width, dim=-1)
        return self._split_heads(keys), self._split_heads(values)

    def _split_heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self._heads, -1)).transpose(1, 2)

    @staticmethod
    def _finish(block: Any, stream: Tensor, attended: Tensor) -> Tensor:
        """What a block does after its attention ``(B, heads, L, d/heads)``."""
        stream = stream + block.attn.c_proj(attended.transpose(1, 2).flatten(2))
        mlp: Tensor = block.mlp(block.ln_2(stream))
        return stream + mlp


def _later_blocks(model: SequenceRecommender, site: str) -> list[Any]:
    """The blocks that run after a site."""
    site_module(model, site)  # refuses a site that there is not
    if site == "last":
        return []
    first = 0 if site == "embedding" else int(site.split(".")[1]) + 1
    return list(model.get_submodule("transformer.h").children())[first:]
