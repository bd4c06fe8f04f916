"""GPT-2 and BERT of Hugging Face, with padding told in every way they know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from integrations.checks import check_site, last_of, run_page, towards
from saerec_fast import Edit, SparseAutoencoder, SteeringPlan, attach, sites

pytestmark = pytest.mark.filterwarnings("ignore:.*strongly recommend passing in an `attention_mask`")

WIDTH, LENGTH, N_ITEMS = 16, 8, 40
RIGHT, LEFT = (torch.zeros(4, LENGTH, dtype=torch.long) for _ in range(2))
for row, length in enumerate((3, 8, 1, 6)):
    RIGHT[row, :length] = torch.randint(1, N_ITEMS, (length,), generator=torch.Generator().manual_seed(row))
    LEFT[row, -length:] = RIGHT[row, :length]
GPT2_PATHS = [
    "transformer.wte",
    *(f"transformer.h.{i}{end}" for i in range(2) for end in ("", ".mlp")),
    "transformer.ln_f",
]
BERT_PATHS = [
    "bert.embeddings",
    *(f"bert.encoder.layer.{i}{end}" for i in range(2) for end in ("", ".output.dense")),
]


def make_gpt2(padding: int | None = 0) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": padding}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=N_ITEMS, n_positions=LENGTH, n_embd=WIDTH, n_layer=2, n_head=2, **options)
    ).eval()


def make_bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=N_ITEMS,
        max_position_embeddings=LENGTH,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return BertForMaskedLM(config).eval()


def last_scores(model: nn.Module, tokens: Tensor, **options: Any) -> Tensor:
    return model(tokens, **options).logits[last_of(tokens != 0)]


def test_sites() -> None:
    for model, paths, library in ((make_gpt2(), GPT2_PATHS, "GPT-2"), (make_bert(), BERT_PATHS, "BERT")):
        assert [site.path for site in sites(model)] == paths
        assert {(site.width, site.library) for site in sites(model)} == {(WIDTH, f"Hugging Face {library}")}
    assert sites(make_gpt2())[1].what == "output of block 0"


@pytest.mark.parametrize("tokens", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("path", GPT2_PATHS[1:])
def test_gpt2(path: str, masked: bool, tokens: Tensor) -> None:
    model = make_gpt2(None if masked else 0)
    options = {"attention_mask": (tokens != 0).long()} if masked else {}
    check_site(model, path, lambda: last_scores(model, tokens, **options), tokens != 0)


@pytest.mark.parametrize("path", BERT_PATHS)
def test_bert(path: str) -> None:
    model = make_bert()
    mask = (RIGHT != 0).long()
    check_site(model, path, lambda: last_scores(model, RIGHT, attention_mask=mask), RIGHT != 0)


@torch.no_grad()
def test_without_any_word_on_padding_all_positions_count() -> None:
    model = make_gpt2(None)
    sae = SparseAutoencoder(WIDTH, 32).eval()
    plan = SteeringPlan([Edit(0, "add", 3.0)], positions="last")
    before = model(RIGHT).logits
    with attach(model, "transformer.h.1", sae, plan):
        changed = (model(RIGHT).logits != before).any(-1)
    assert torch.equal(changed.nonzero(), torch.tensor([[row, LENGTH - 1] for row in range(4)]))


@torch.no_grad()
def test_cache_and_embeddings() -> None:
    model = make_gpt2()
    sae = SparseAutoencoder(WIDTH, 32).eval()
    tokens = RIGHT[1:2]
    with attach(model, "transformer.h.1", sae, SteeringPlan([Edit(0, "add", 3.0)])):
        whole = model(tokens).logits
        first = model(tokens[:, :5], use_cache=True)
        mask = torch.ones(1, LENGTH, dtype=torch.long)
        rest = model(tokens[:, 5:], past_key_values=first.past_key_values, attention_mask=mask).logits
        embedded = model(inputs_embeds=model.transformer.wte(tokens)).logits
    torch.testing.assert_close(rest, whole[:, 5:])
    torch.testing.assert_close(embedded, whole)


class Recommender(nn.Module):
    """Blocks that return tuples, as in transformers before 5, inside a model of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = make_gpt2().transformer
        for block in self.encoder.h:
            block.register_forward_hook(lambda module, args, output: (output,))

    def forward(self, tokens: Tensor) -> Tensor:
        assert isinstance(self.encoder, GPT2Model)
        hidden = self.encoder.wte(tokens) + self.encoder.wpe.weight[: tokens.shape[1]]
        for block in self.encoder.h:
            hidden = block(hidden)[0]
        return hidden


@torch.no_grad()
def test_tuples() -> None:
    model, sae = Recommender(), SparseAutoencoder(WIDTH, 32).eval()
    plan = SteeringPlan([Edit(0, "add", 3.0)], positions="last")
    valid = RIGHT != 0
    before = model(RIGHT)
    # Its own forward goes around that of GPT2Model, from which the padding would come.
    with attach(model, "encoder.h.1", sae, plan), pytest.raises(RuntimeError, match=r"valid: .*'encoder'"):
        model(RIGHT)
    with attach(model, "encoder.h.1", sae, plan, valid=lambda tokens: tokens != 0):
        steered = model(RIGHT)
    torch.testing.assert_close(steered, sae.steer(before, plan, valid=valid))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_recommendations(name: str) -> None:
    model, path = (make_gpt2(), GPT2_PATHS[-1]) if name == "gpt2" else (make_bert(), BERT_PATHS[-2])
    options = {"attention_mask": (RIGHT != 0).long()}
    before = last_scores(model, RIGHT, **options)[:, 17]
    with towards(model, path, model.get_output_embeddings().weight[17].detach()):
        steered = last_scores(model, RIGHT, **options)
    if name == "gpt2":  # BERT puts a layer between hidden state and scores
        assert (steered.argmax(-1) == 17).all()
    assert not torch.equal(steered[:, 17], before)


@pytest.mark.parametrize("page", ["gpt2", "bert"])
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_page(page, tmp_path, monkeypatch)
    assert not torch.equal(made["plain"], made["steered"])
