"""Models and autoencoders small enough for thousands of requests; a module of its own, so that other processes can
import it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saerec_fast import Predictor, SparseAutoencoder
from saerec_fast.types import TopK

WIDTH = 8
N_ITEMS = 40
N_FEATURES = 24
MAX_LENGTH = 12
TITLES = [f"Item {index}" for index in range(N_ITEMS)]


class Mix(nn.Module):
    """A residual layer that returns a tuple, as blocks of many libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden + torch.tanh(self.linear(hidden)), None


class Model(nn.Module):
    """Sums of the items so far, mixed twice. Padding is the zero vector, so that its side does not matter."""

    def __init__(self, n_items: int = N_ITEMS) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items + 1, WIDTH, padding_idx=0)
        self.first, self.second = Mix(), Mix()
        self.norm = nn.LayerNorm(WIDTH)

    @property
    def item_embeddings(self) -> Tensor:
        return self.items.weight[1:]

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.items(tokens).cumsum(dim=1)
        return self.norm(self.second(self.first(hidden)[0])[0])


class OtherModel(Model):
    """The same, whose hidden states come from another method, and in one more dimension than the embeddings have."""

    def forward(self, tokens: Tensor) -> Tensor:
        raise AssertionError("nobody calls this")

    def encode(self, tokens: Tensor) -> Tensor:
        return Model.forward(self, tokens)


class SizeDependent(Model):
    """Its sums follow the number of rows."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * (1.0 + 1e-6 * (len(tokens) < 4))


class CompanyDependent(Model):
    """Its rows see each other."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = super().forward(tokens)
        return hidden + 1e-6 * hidden.mean(dim=0)


def encode(model: Any, tokens: Tensor) -> Tensor:
    return model.encode(tokens)


def encode_last(model: Any, tokens: Tensor) -> Tensor:
    return model.encode(tokens)[torch.arange(len(tokens)), (tokens != 0).sum(dim=1) - 1]


def item_weights(model: Any) -> Tensor:
    return model.items.weight[1:]


def score(model: Any, tokens: Tensor) -> Tensor:
    return Model.forward(model, tokens) @ model.items.weight[1:].T


def make_model(kind: type[Model] = Model, n_items: int = N_ITEMS) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return kind(n_items).eval()


def make_sae(activation: Any = None, width: int = WIDTH) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(7)
    sae = SparseAutoencoder(width, N_FEATURES, activation or TopK(4), generator=generator, mean=0.1, std=1.3).eval()
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(N_FEATURES, generator=generator))
        sae.b_dec.copy_(0.1 * torch.randn(width, generator=generator))
    return sae


def make_predictor(model: Model | None = None, activation: Any = None, **options: Any) -> Predictor:
    options = {"max_length": MAX_LENGTH, **options}
    return Predictor(model or make_model(), TITLES, make_sae(activation), "first", **options)


def digest(answers: Any) -> list[Any]:
    """All of the answers, bit for bit, row by row."""
    columns = [
        [value.tolist() if value.dtype == object else value.tobytes() for value in column]
        if name != "error"
        else column.tolist()
        for name, column in answers.items()
    ]
    return list(zip(*columns, strict=True))


def work_in_another_process(predictor: Predictor, columns: dict[str, Any], answers: Any) -> None:
    """Put the digest of the answers into a queue."""
    answers.put((digest(predictor(columns)), predictor.pass_sizes, torch.get_num_threads()))


def random_histories(count: int, seed: int = 0, longest: int = 30, n_items: int = N_ITEMS) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, n_items, generator.integers(1, longest + 1)).tolist() for _ in range(count)]
