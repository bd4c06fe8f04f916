"""What can be steered in a model, and its padding: stand-ins with the names and structures of libraries.

The libraries themselves are in tests/integrations.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integrations.models import HSTU, N_ITEMS, WIDTH, GSASRec
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from saerec_fast import Edit, SparseAutoencoder, SteeringPlan, attach, sites
from saerec_fast.recommender import RecommenderConfig, SequenceRecommender
from saerec_fast.steering.sites import known_padding

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [0, 0, 9, 2, 6], [0, 0, 0, 0, 5]])
PLAN = SteeringPlan([Edit(0, "add", 2.0)])
LAST = SteeringPlan([Edit(0, "add", 2.0)], positions="last")


def named(name: str, module: str) -> Callable[[type], type]:
    """Give a stand-in the name and the module of the class it stands in for."""

    def rename(kind: type) -> type:
        kind.__name__ = kind.__qualname__ = name
        kind.__module__ = module
        return kind

    return rename


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        return hidden + self.feed_forward(self.norm(hidden))


@named("TransformerLayersBase", "rectools.models.nn.transformers.net_blocks")
class RecToolsLayers(nn.Module):
    pass


class MyRecToolsLayers(RecToolsLayers):
    """Written by a user of RecTools, which lets one do so."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, seqs: Tensor, timeline_mask: Tensor, *, batch: Any = None) -> Tensor:
        for block in self.transformer_blocks:
            seqs *= timeline_mask
            seqs = block(seqs)
        return seqs


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(N_ITEMS + 1, WIDTH)
        self.transformer_layers = MyRecToolsLayers()

    def encode_sessions(self, tokens: Tensor) -> Tensor:
        return self.transformer_layers(self.items(tokens), (tokens != 0).unsqueeze(-1), batch={"x": tokens})


@named("SasRecBody", "replay.nn.sequential.sasrec.model")
class RePlayBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Embedding(N_ITEMS + 1, WIDTH)
        self.encoder = nn.Module()
        self.encoder.forward_layers = nn.ModuleList([Block(), Block()])
        self.output_normalization = nn.LayerNorm(WIDTH)

    def forward(self, feature_tensors: Any, padding_mask: Tensor) -> Tensor:
        hidden = self.embedder(feature_tensors["item_id"])
        for layer in self.encoder.forward_layers:
            hidden = layer(hidden)
        return self.output_normalization(hidden)


@named("TransformerEncoder", "recbole.model.layers")
class RecBoleEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> list[Tensor]:
        states = []
        for layer in self.layer:
            hidden_states = layer(hidden_states)
            states.append(hidden_states)
        return states


class RecBoleModel(nn.Module):
    """Its encoder sees (B, 1, L, L), or (B, 1, 1, L) where attention goes both ways."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.items = nn.Embedding(N_ITEMS + 1, WIDTH)
        self.trm_encoder = RecBoleEncoder()
        self.causal = causal

    def forward(self, tokens: Tensor) -> Tensor:
        allowed = (tokens != 0)[:, None, None]
        if self.causal:
            allowed = allowed.expand(-1, -1, tokens.shape[1], -1).tril()
        return self.trm_encoder(self.items(tokens), torch.where(allowed, 0.0, -10000.0))[-1]


def body_of_replay(tokens: Tensor) -> dict[str, Any]:
    return {"feature_tensors": {"item_id": tokens}, "padding_mask": tokens != 0}


def gpt2(padding: int | None = 0) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=2, pad_token_id=padding)
    return GPT2LMHeadModel(config)


def bert() -> BertModel:
    return BertModel(
        BertConfig(vocab_size=20, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )


# Model, the forward pass of a batch, the sites in order.
LIBRARIES: dict[str, tuple[Any, Callable[[Any, Tensor], Any], list[str]]] = {
    "RecTools": (
        Backbone,
        lambda model, tokens: model.encode_sessions(tokens),
        [
            *(f"transformer_layers.transformer_blocks.{i}{end}" for i in range(2) for end in ("", ".feed_forward")),
            "transformer_layers",
        ],
    ),
    "RePlay": (
        RePlayBody,
        lambda model, tokens: model(**body_of_replay(tokens)),
        ["encoder.forward_layers.0", "encoder.forward_layers.1", "output_normalization"],
    ),
    "RecBole": (
        lambda: RecBoleModel(causal=True),
        lambda model, tokens: model.forward(tokens),
        ["trm_encoder.layer.0", "trm_encoder.layer.1", "trm_encoder"],
    ),
    "RecBole both ways": (
        lambda: RecBoleModel(causal=False),
        lambda model, tokens: model.forward(tokens),
        ["trm_encoder.layer.0", "trm_encoder.layer.1", "trm_encoder"],
    ),
    "Hugging Face GPT-2": (
        gpt2,
        lambda model, tokens: model(tokens, attention_mask=(tokens != 0).long()),
        [
            "transformer.wte",
            *(f"transformer.h.{i}{end}" for i in range(2) for end in ("", ".mlp")),
            "transformer.ln_f",
        ],
    ),
    "Hugging Face BERT": (
        bert,
        lambda model, tokens: model(tokens, (tokens != 0).long()),
        ["embeddings", *(f"encoder.layer.{i}{end}" for i in range(2) for end in ("", ".output.dense"))],
    ),
    "saerec_fast": (
        lambda: SequenceRecommender(RecommenderConfig(n_items=19, max_length=8, d_model=WIDTH, n_heads=2)),
        lambda model, tokens: model(tokens),
        [
            "transformer.wte",
            *(f"transformer.h.{i}{end}" for i in range(2) for end in ("", ".mlp")),
            "transformer.ln_f",
        ],
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_sites_of_libraries(name: str) -> None:
    make, _, paths = LIBRARIES[name]
    for prefix, model in (("", make()), ("0.", nn.Sequential(make()))):
        found = sites(model)
        assert [site.path for site in found] == [prefix + path for path in paths]
        assert {site.width for site in found} == {WIDTH}
        assert {site.library for site in found} == {name.partition(" both")[0]}
        assert any(site.what == "output of block 1" for site in found)


@pytest.mark.filterwarnings("ignore:.*strongly recommend passing in an `attention_mask`")
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", LIBRARIES)
@torch.no_grad()
def test_their_padding(name: str, left: bool) -> None:
    make, run, _ = LIBRARIES[name]
    model = make().eval()
    tokens = TOKENS if left else TOKENS.flip(1)
    path = next(site.path for site in sites(model) if site.what == "output of block 1")
    sae = SparseAutoencoder(WIDTH, 32).eval()
    seen: list[Tensor] = []
    kept = model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    run(model, tokens)
    kept.remove()
    for plan in (PLAN, LAST):
        with attach(model, path, sae, plan):
            kept = model.get_submodule(path).register_forward_hook(
                lambda module, args, output: seen.append(output.clone())
            )
            run(model, tokens)
            kept.remove()
    plain, everywhere, last = seen
    valid = tokens != 0
    later = valid.flip(1).cumsum(1).flip(1)
    assert torch.equal((everywhere != plain).any(-1), valid)
    assert torch.equal((last != plain).any(-1), valid & (later == 1))


@pytest.mark.parametrize("name", ["Hugging Face GPT-2", "saerec_fast"])
def test_known_padding_can_be_pickled(name: str) -> None:
    model = LIBRARIES[name][0]().eval()
    padding = pickle.loads(pickle.dumps(known_padding(model, "transformer.h.0")))
    assert torch.equal(padding.valid(TOKENS), TOKENS != 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_of_rectools_is_a_mask_whatever_its_type(dtype: torch.dtype) -> None:
    padding = known_padding(Backbone(), "transformer_layers.transformer_blocks.0")
    assert padding is not None
    mask = padding.valid(torch.zeros(3, 5, WIDTH), (2 * (TOKENS != 0)).unsqueeze(-1).to(dtype))
    assert mask.dtype == torch.bool
    assert torch.equal(mask, (TOKENS != 0)[..., None])


@torch.no_grad()
def test_own_valid_replaces_the_librarys() -> None:
    model, sae = gpt2().eval(), SparseAutoencoder(WIDTH, 32).eval()
    before = model(TOKENS, attention_mask=(TOKENS != 0).long()).logits
    with attach(model, "transformer.h.1", sae, LAST, valid=lambda tokens, **_: tokens == 1):
        changed = (model(TOKENS, attention_mask=(TOKENS != 0).long()).logits != before).any(-1)
    assert changed.nonzero().tolist() == [[0, 3]]


class TestOtherModels:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleList([nn.ModuleList([Block(), Block()])])
            self.blocks = nn.ModuleList([Block(), nn.Linear(WIDTH, 3), nn.Identity()])
            self.heads = nn.ModuleDict({"one": nn.Linear(WIDTH, WIDTH)})

    def test_blocks_that_keep_the_width(self) -> None:
        found = sites(self.Model())
        assert [(site.path, site.width, site.library) for site in found] == [
            ("blocks.0", WIDTH, None),
            ("blocks.2", None, None),
        ]
        assert found[0].what == "output of block 0, a Block of blocks"
        assert "valid" in found[0].padding

    def test_encoder_of_torch(self) -> None:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        assert [(site.path, site.width) for site in sites(model)] == [("layers.0", WIDTH), ("layers.1", WIDTH)]

    def test_nothing_to_steer(self) -> None:
        assert sites(nn.Linear(3, 3)) == []

    def test_names_alone_are_not_enough(self) -> None:
        @named("GSASRec", "somewhere")
        class Impostor(nn.Module):
            pass

        assert sites(Impostor()) == []

        @named("TransformerLayersBase", "rectools_like.models")
        class Elsewhere(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.transformer_blocks = nn.ModuleList([Block()])

        assert [site.library for site in sites(Elsewhere())] == [None]

    def test_errors(self) -> None:
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
            sites("gpt2")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not compiled yet"):
            sites(torch.compile(Block(), backend="eager"))


class TestValidFrom:
    @torch.no_grad()
    def test_module_around_the_site(self) -> None:
        model, sae = Backbone().eval(), SparseAutoencoder(WIDTH, 32).eval()
        site = "transformer_layers.transformer_blocks.0"
        with attach(model, site, sae, LAST):
            expected = model.encode_sessions(TOKENS)

        def valid(seqs: Tensor, timeline_mask: Tensor, **_: Any) -> Tensor:
            return timeline_mask[..., 0]

        for source in ("transformer_layers", model.transformer_layers):
            with attach(model, site, sae, LAST, valid=valid, valid_from=source):
                assert torch.equal(model.encode_sessions(TOKENS), expected)
        with attach(model, site, sae, LAST, valid=valid), pytest.raises(RuntimeError, match="ran outside"):
            model.encode_sessions(TOKENS)

    @torch.no_grad()
    def test_module_before_the_site(self) -> None:
        from saerec_fast.steering.attach import _running

        model, sae = GSASRec().eval(), SparseAutoencoder(WIDTH, 32).eval()
        tokens = torch.where(TOKENS == 0, N_ITEMS + 1, TOKENS)
        masks = _running.__dict__.get("lasting", ())
        with attach(model, "seq_norm", sae, LAST) as handle:
            with pytest.raises(RuntimeError, match="'item_embedding'"):
                model.seq_norm(torch.zeros(3, 5, WIDTH))
            whole = model(tokens)[0]
            for row in range(3):  # each call by its own mask
                torch.testing.assert_close(model(tokens[row : row + 1])[0], whole[row : row + 1])
            assert len(_running.lasting) == len(masks) + 1
            handle.detach()
        assert _running.lasting == masks

    def test_errors(self) -> None:
        model, sae = Backbone(), SparseAutoencoder(WIDTH, 32)
        with pytest.raises(ValueError, match="valid_from: expected only together with valid"):
            attach(model, "transformer_layers", sae, PLAN, valid_from="transformer_layers")
        with pytest.raises(ValueError, match=r"valid_from: .* has no module 'layers'"):
            attach(model, "transformer_layers", sae, PLAN, valid=lambda tokens: tokens, valid_from="layers")


class TestJagged:
    lengths = torch.tensor([3, 0, 1, 4])
    offsets = torch.tensor([0, 3, 3, 4, 8])
    rows = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Identity()

        def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
            return self.block(rows)

    def attach(self, model: nn.Module, plan: SteeringPlan, **options: Any) -> Any:
        sae = SparseAutoencoder(WIDTH, 32, generator=torch.Generator().manual_seed(0)).eval()
        return attach(model, "block", sae, plan, valid=lambda rows, offsets: offsets, **options)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    @torch.no_grad()
    def test_positions(self, dtype: torch.dtype) -> None:
        model = self.Model()
        mask = torch.arange(8) % 3 == 0
        for positions, expected in (("last", [2, 3, 7]), ("all", list(range(8))), (mask, [0, 3, 6])):
            with self.attach(model, SteeringPlan([Edit(0, "add", 2.0)], positions=positions)):
                changed = (model(self.rows, self.offsets.to(dtype)) != self.rows).any(-1)
            assert changed.nonzero().flatten().tolist() == expected

    @torch.no_grad()
    def test_strengths_and_plans_of_sequences(self) -> None:
        model = self.Model()
        strengths = torch.tensor([[1.0], [9.0], [0.0], [-2.0]])
        with self.attach(model, PLAN, strengths=strengths) as handle:
            direction = handle._sae.W_dec[0]
            per_row = strengths.repeat_interleave(self.lengths, 0)
            torch.testing.assert_close(model(self.rows, self.offsets), self.rows + per_row * direction)
            middle = SteeringPlan([Edit(0, "add", 2.0)], positions=torch.tensor([False, True, False]))
            with handle.request([middle, LAST, None, LAST]):
                changed = (model(self.rows, self.offsets) != self.rows).any(-1)
            assert changed.nonzero().flatten().tolist() == [1, 7]
            with handle.request([PLAN, None, None]), pytest.raises(ValueError, match="each of 4 sequences, got 3"):
                model(self.rows, self.offsets)
            with handle.request([None, None, None, middle]), pytest.raises(ValueError, match=r"mask of shape \(4,\)"):
                model(self.rows, self.offsets)
            handle.update(strengths=strengths[:2])
            with pytest.raises(ValueError, match=r"strengths: expected \(4, 1\)"):
                model(self.rows, self.offsets)

    @pytest.mark.parametrize("offsets", [[0, 3, 7], [1, 3, 8], [0, 5, 3, 8], []])
    def test_wrong_offsets(self, offsets: list[int]) -> None:
        model = self.Model()
        with (
            self.attach(model, LAST),
            pytest.raises(ValueError, match=r"valid: expected offsets that rise from 0 to 8"),
        ):
            model(self.rows, torch.tensor(offsets, dtype=torch.int64))

    @torch.no_grad()
    def test_compiles(self) -> None:
        model = self.Model()
        with self.attach(model, LAST):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(self.rows, self.offsets), model(self.rows, self.offsets))
        torch.compiler.reset()

    @torch.no_grad()
    def test_hstu(self) -> None:
        model, sae = HSTU().eval(), SparseAutoencoder(WIDTH, 32).eval()
        ids, lengths = TOKENS.flip(1), torch.tensor([5, 3, 1])
        plain = model.encode(lengths, ids)
        with attach(model, sites(model)[1].path, sae, PLAN):
            everywhere = model.encode(lengths, ids)
        with attach(model, sites(model)[1].path, sae, LAST):
            torch.testing.assert_close(model.encode(lengths, ids), everywhere)  # of other rows nothing is read
        assert not torch.allclose(everywhere, plain)
