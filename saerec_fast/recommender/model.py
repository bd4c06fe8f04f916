"""A causal transformer over item sequences, after SASRec (Kang & McAuley 2018) with GPT-2's pre-norm blocks."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saerec_fast.files import read_json, read_tensors, write_json, write_tensors

PADDING = 0
"""Token id of padding; item index ``i`` is token ``i + 1``."""


@dataclass(frozen=True)
class RecommenderConfig:
    """Shape of a :class:`SequenceRecommender`.

    Attributes:
        n_items: size of the catalogue.
        d_model: width of the hidden state; a multiple of ``n_heads``.
        n_layers: transformer blocks.
        n_heads: attention heads per block.
        max_length: longest sequence in tokens; longer histories are cut to their newest items.
        dropout: probability in [0, 1) on the embeddings and on the output of every attention and MLP layer.
        attention_dropout: probability in [0, 1) on the attention weights. Above 0 the fused attention of the CPU
            cannot be used in training, which makes an epoch noticeably slower.
        item_dropout: probability in [0, 1) that an input item's whole embedding is dropped in training (its position
            stays), so that no single item is relied on; it helps where users are few.
        initializer_range: standard deviation of the initial weights and embeddings.
        scale_embedding: multiply the item embedding by ``√d_model`` before the position is added, as SASRec does; the
            head stays tied to the embedding itself. The item then outweighs its position in the residual stream.

    Raises:
        ValueError: a value outside its range; the message names the field.
    """

    n_items: int
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 2
    max_length: int = 50
    dropout: float = 0.1
    attention_dropout: float = 0.0
    item_dropout: float = 0.2
    initializer_range: float = 0.1
    scale_embedding: bool = False

    def __post_init__(self) -> None:
        for name in ("n_items", "d_model", "n_layers", "n_heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model: {self.d_model} is not a multiple of n_heads {self.n_heads}")
        for name in ("dropout", "attention_dropout", "item_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must lie in [0, 1), got {getattr(self, name)}")
        if self.initializer_range <= 0:
            raise ValueError(f"initializer_range: must be positive, got {self.initializer_range}")


class SequenceRecommender(nn.Module):
    """Next-item model: item embedding → GPT-2 blocks → layer norm, with a head tied to the item embedding.

    Tokens are item indices + 1; 0 is padding and stands on the right. Attention is causal, so that padding after
    the last item cannot reach any valid position and no mask is needed.

    Args:
        config: shape of the model.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, config: RecommenderConfig) -> None:
        super().__init__()
        try:
            from transformers import GPT2Config, GPT2Model
        except ImportError as error:
            raise ImportError("the recommender needs transformers: pip install saerec-fast[study]") from error
        self.config = config
        self.transformer = GPT2Model(
            GPT2Config(  # type: ignore[call-arg]
                vocab_size=config.n_items + 1,
                n_positions=config.max_length,
                n_embd=config.d_model,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                embd_pdrop=config.dropout,
                resid_pdrop=config.dropout,
                attn_pdrop=config.attention_dropout,
                # The same function as GPT-2's "gelu_new", in one pass instead of eight.
                activation_function="gelu_pytorch_tanh",
                initializer_range=config.initializer_range,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
                attn_implementation="sdpa",
            )
        )
        self.item_embedding.padding_idx = PADDING
        with torch.no_grad():
            self.item_embedding.weight[PADDING].zero_()

    @property
    def item_embedding(self) -> nn.Embedding:
        """The token embedding; row 0 belongs to padding."""
        embedding = self.transformer.wte
        assert isinstance(embedding, nn.Embedding)
        return embedding

    @property
    def item_embeddings(self) -> Tensor:
        """The tied head without padding, ``(n_items, d_model)``: a view of the parameter."""
        return self.item_embedding.weight[PADDING + 1 :]

    @property
    def embedding_scale(self) -> float:
        """What the item embedding is multiplied by before the position is added."""
        return math.sqrt(self.config.d_model) if self.config.scale_embedding else 1.0

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.item_embedding.weight.device

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states after the final layer norm.

        Args:
            tokens: integers ``(B, L)``, ``1 ≤ L ≤ max_length``, padding 0 on the right.

        Returns:
            ``(B, L, d_model)``; values at padding are meaningless but finite.

        Raises:
            ValueError: not two dimensions, or an ``L`` outside its range.
        """
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.config.max_length:
            raise ValueError(
                f"tokens: expected (B, L) with 1 <= L <= {self.config.max_length}, got {tuple(tokens.shape)}"
            )
        embedded = self.item_embedding(tokens)
        if self.training and self.config.item_dropout:
            # Not rescaled: the layer norm ahead of the first block would undo it.
            kept = torch.rand(tokens.shape, device=tokens.device) >= self.config.item_dropout
            embedded = embedded * kept.unsqueeze(-1)
        if self.config.scale_embedding:
            embedded = embedded * self.embedding_scale
        hidden = self.transformer(inputs_embeds=embedded, use_cache=False).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits over the catalogue, ``(..., d_model) -> (..., n_items)``; no column for padding."""
        return hidden @ self.item_embeddings.T

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the folder ``path``, each atomically."""
        folder = Path(path)
        write_json(folder / "config.json", asdict(self.config))
        write_tensors(folder / "model.safetensors", self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SequenceRecommender:
        """Read a folder written by :meth:`save`; the model comes back in eval mode on the CPU. The global random
        state is left as it was.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is corrupt or the two do not fit each other; the message names the file.
        """
        folder = Path(path)
        config = config_from_json(read_json(folder / "config.json"), folder / "config.json")
        # Drawing weights only to replace them must not move the caller's random state.
        with torch.random.fork_rng(devices=[]):
            model = cls(config)
        load_state(model, read_tensors(folder / "model.safetensors"), folder / "model.safetensors")
        return model.eval()


def config_from_json(data: Any, path: Path) -> RecommenderConfig:
    """The config that ``data``, the content of ``path``, describes.

    Raises:
        ValueError: an unknown or missing field or a value out of range; the message names the file.
    """
    known = {field.name for field in fields(RecommenderConfig)}
    if not isinstance(data, dict) or not set(data) <= known:
        raise ValueError(f"{path}: not a recommender config with the fields {', '.join(sorted(known))}")
    try:
        return RecommenderConfig(**data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_state(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy ``tensors``, the content of ``path``, into ``model``.

    Raises:
        ValueError: names or shapes differ; the message names the file.
    """
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit the model's config ({error})") from None


def sites(model: SequenceRecommender) -> list[str]:
    """Names :func:`site_module` accepts, in the order of the forward pass."""
    names = ["embedding"]
    for layer in range(model.config.n_layers):
        names += [f"mlp.{layer}", f"block.{layer}"]
    return [*names, "last"]


def site_module(model: SequenceRecommender, site: str) -> nn.Module:
    """The submodule whose output is the hidden state ``(B, L, d_model)`` at ``site``.

    Sites: ``"embedding"`` (item embedding alone, before the position is added), ``"mlp.i"`` (what the MLP of block
    ``i`` adds to the residual stream), ``"block.i"`` (residual stream after block ``i``), ``"last"`` (after the final
    layer norm, what the head reads). The block of some transformers versions returns a tuple whose first entry is the
    hidden state; :func:`hidden_of` takes both.

    Raises:
        ValueError: no such site; the message lists those there are.
    """
    if site not in sites(model):
        raise ValueError(f"site: unknown {site!r}, this model has {', '.join(sites(model))}")
    if site == "embedding":
        return model.item_embedding
    if site == "last":
        return model.get_submodule("transformer.ln_f")
    kind, layer = site.split(".")
    return model.get_submodule(f"transformer.h.{layer}" + (".mlp" if kind == "mlp" else ""))


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a module returned: the tensor itself or the first entry of a tuple or list."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(hidden, Tensor)
    return hidden
