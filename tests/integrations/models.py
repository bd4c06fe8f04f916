"""Models that people copy instead of installing, rebuilt with the names, layouts and calls of the originals.

What matters for steering is kept: names of classes and modules, what is called as a module and what as a method, what
is written in place, on which side the padding is and what it looks like.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH, LENGTH, N_ITEMS = 16, 8, 40


# gSASRec-pytorch: padding N_ITEMS + 1 on the left; blocks return (states, attention).


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm = nn.LayerNorm(WIDTH)
        self.second_norm = nn.LayerNorm(WIDTH)
        self.query_proj = nn.Linear(WIDTH, WIDTH)
        self.dense1 = nn.Linear(WIDTH, WIDTH)
        self.dense2 = nn.Linear(WIDTH, WIDTH)

    def forward(self, seq: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.first_norm(seq)
        scores = self.query_proj(queries) @ seq.mT / WIDTH**0.5
        # Keys that are all zeros are padding.
        allowed = (seq.abs().sum(-1) != 0)[:, None] & torch.ones_like(scores, dtype=torch.bool).tril()
        attention = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
        x = self.second_norm(attention @ seq + queries)
        x = self.dense2(torch.relu(self.dense1(x))) + x
        x *= mask
        return x, attention


class GSASRec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_items = N_ITEMS
        self.item_embedding = nn.Embedding(N_ITEMS + 2, WIDTH)
        self.position_embedding = nn.Embedding(LENGTH, WIDTH)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(), TransformerBlock()])
        self.seq_norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        mask = (tokens != self.num_items + 1).float().unsqueeze(-1)
        seq = self.item_embedding(tokens) + self.position_embedding(torch.arange(tokens.shape[1]))
        seq *= mask
        attentions = []
        for block in self.transformer_blocks:
            seq, attention = block(seq, mask)
            attentions.append(attention)
        return self.seq_norm(seq), attentions

    def get_predictions(self, tokens: Tensor) -> Tensor:
        """Scores; the original goes on to take the best of them."""
        states, _ = self.forward(tokens)  # as a method
        return states[:, -1] @ self.item_embedding.weight[:-1].T


# SASRec.pytorch by pmixer: padding 0 on the left, NumPy in, all of it in methods; attention works on (L, B, d).


class PointWiseFeedForward(nn.Module):
    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(WIDTH, WIDTH, kernel_size=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, kernel_size=1)
        self.residual = residual

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.conv2(torch.relu(self.conv1(inputs.mT))).mT
        return outputs + inputs if self.residual else outputs


class SASRec(nn.Module):
    def __init__(self, args: SimpleNamespace) -> None:
        super().__init__()
        self.old = not hasattr(args, "norm_first")
        if not self.old:
            self.norm_first = args.norm_first
        self.item_emb = nn.Embedding(N_ITEMS + 1, WIDTH, padding_idx=0)
        self.pos_emb = nn.Embedding(LENGTH + 1, WIDTH, padding_idx=0)
        self.attention_layernorms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention_layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2) for _ in range(2))
        self.forward_layernorms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.forward_layers = nn.ModuleList(PointWiseFeedForward(self.old) for _ in range(2))
        self.last_layernorm = nn.LayerNorm(WIDTH)

    def log2feats(self, log_seqs: np.ndarray[Any, Any]) -> Tensor:
        tokens = torch.from_numpy(log_seqs)
        seqs = self.item_emb(tokens)
        seqs *= WIDTH**0.5
        seqs += self.pos_emb(torch.arange(1, tokens.shape[1] + 1) * (tokens != 0))
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        for i in range(2):
            seqs = seqs.transpose(0, 1)
            normed = self.attention_layernorms[i](seqs) if self.old or self.norm_first else seqs
            keys = seqs if self.old else normed
            attended, _ = self.attention_layers[i](normed, keys, keys, attn_mask=future)
            if self.old:
                seqs = (normed + attended).transpose(0, 1)
                seqs = self.forward_layers[i](self.forward_layernorms[i](seqs))
                seqs *= (tokens != 0).unsqueeze(-1)
            elif self.norm_first:
                seqs = (seqs + attended).transpose(0, 1)
                seqs = seqs + self.forward_layers[i](self.forward_layernorms[i](seqs))
            else:
                seqs = self.attention_layernorms[i](seqs + attended).transpose(0, 1)
                seqs = self.forward_layernorms[i](seqs + self.forward_layers[i](seqs))
        return self.last_layernorm(seqs)

    def predict(self, log_seqs: np.ndarray[Any, Any], item_indices: np.ndarray[Any, Any]) -> Tensor:
        states = self.log2feats(log_seqs)[:, -1]
        return states @ self.item_emb(torch.from_numpy(item_indices)).T


# Meta's generative-recommenders: sequences one after the other; layers are called by keyword and return their caches.


class SequentialTransductionUnitJagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._uvqk = nn.Parameter(0.2 * torch.randn(WIDTH, 4 * WIDTH))
        self._o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, x_offsets: Tensor, invalid_attn_mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        mixed = nn.functional.silu(nn.functional.layer_norm(x, [WIDTH]) @ self._uvqk)
        u, v, q, k = mixed.split(WIDTH, dim=1)
        sequence = torch.searchsorted(x_offsets[1:], torch.arange(len(x)), right=True)
        allowed = (sequence[:, None] == sequence) & torch.ones(len(x), len(x), dtype=torch.bool).tril()
        attended = (nn.functional.silu(q @ k.T) / invalid_attn_mask.shape[-1] * allowed) @ v
        outputs = self._o(u * nn.functional.layer_norm(attended, [WIDTH])) + x
        return outputs, (v, q, k, outputs)


class HSTUJagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._attention_layers = nn.ModuleList(SequentialTransductionUnitJagged() for _ in range(2))

    def forward(self, x: Tensor, x_offsets: Tensor, invalid_attn_mask: Tensor) -> tuple[Tensor, list[Any]]:
        """Padded ``(B, L, d)`` in and out; jagged ``(ΣL, d)`` inside."""
        present = torch.arange(x.shape[1]) < x_offsets.diff()[:, None]
        rows = x[present]
        states = []
        for layer in self._attention_layers:
            rows, cached = layer(x=rows, x_offsets=x_offsets, invalid_attn_mask=invalid_attn_mask)
            states.append(cached)
        return x.new_zeros(x.shape).masked_scatter(present[..., None], rows), states


class HSTU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._embedding_module = nn.Embedding(N_ITEMS + 1, WIDTH, padding_idx=0)
        self._hstu = HSTUJagged()

    def encode(self, past_lengths: Tensor, past_ids: Tensor) -> Tensor:
        """States ``(B, d)`` of the latest items; padding is on the right."""
        offsets = nn.functional.pad(past_lengths.cumsum(0), (1, 0))
        length = past_ids.shape[1]
        states, _ = self._hstu(
            x=self._embedding_module(past_ids), x_offsets=offsets, invalid_attn_mask=torch.ones(length, length).tril()
        )
        return nn.functional.normalize(states, dim=-1)[torch.arange(len(states)), past_lengths - 1]
