"""RePlay: replay.nn.sequential.SasRec with both of its encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.sequential import DiffTransformerLayer, SasRec

from integrations.checks import check_site, run_page, towards
from saerec_fast import sites

WIDTH, LENGTH, N_ITEMS = 16, 8, 40
PADDING = N_ITEMS
TOKENS = torch.full((4, LENGTH), PADDING)
for row, length in enumerate((3, 8, 1, 6)):
    TOKENS[row, -length:] = torch.randint(0, N_ITEMS, (length,), generator=torch.Generator().manual_seed(row))
BATCH = {"feature_tensors": {"item_id": TOKENS}, "padding_mask": TOKENS != PADDING}
PATHS = {
    "vanilla": ["body.encoder.forward_layers.0", "body.encoder.forward_layers.1", "body.output_normalization"],
    "differential": [
        *(f"body.encoder.layers.{i}{end}" for i in range(2) for end in ("", ".ff")),
        "body.output_normalization",
    ],
}


def make_model(encoder: str) -> Any:
    source = TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")
    schema = TensorSchema(
        [
            TensorFeatureInfo(
                "item_id",
                is_seq=True,
                feature_type=FeatureType.CATEGORICAL,
                embedding_dim=WIDTH,
                padding_value=PADDING,
                cardinality=N_ITEMS,
                feature_hint=FeatureHint.ITEM_ID,
                feature_sources=[source],
            )
        ]
    )
    torch.manual_seed(0)
    model = SasRec.from_params(schema, embedding_dim=WIDTH, num_heads=2, max_sequence_length=LENGTH)
    if encoder == "differential":
        model.body.encoder = DiffTransformerLayer(embedding_dim=WIDTH, num_heads=2, num_blocks=2)
    return model.eval()


@pytest.mark.parametrize("encoder", PATHS)
def test_sites(encoder: str) -> None:
    model = make_model(encoder)
    assert [site.path for site in sites(model)] == PATHS[encoder]
    assert {(site.width, site.library) for site in sites(model)} == {(WIDTH, "RePlay")}
    # The module that RePlay trains and predicts with is a wrapper.
    assert [site.path for site in sites(LightningModule(model))] == [f"model.{path}" for path in PATHS[encoder]]


@pytest.mark.parametrize(("encoder", "path"), [(encoder, path) for encoder in PATHS for path in PATHS[encoder]])
def test_steering(encoder: str, path: str) -> None:
    model = make_model(encoder)
    check_site(model, path, lambda: model(**BATCH)["logits"], TOKENS != PADDING)


@torch.no_grad()
def test_recommendations_of_the_lightning_module() -> None:
    module = LightningModule(make_model("vanilla")).eval()
    before = module.predict_step(dict(BATCH), 0)["logits"].argmax(-1)
    direction = module.model.body.embedder.get_item_weights(None)[17].detach()
    with towards(module, "model.body.output_normalization", direction):
        assert (module.predict_step(dict(BATCH), 0)["logits"].argmax(-1) == 17).all()
    assert torch.equal(module.predict_step(dict(BATCH), 0)["logits"].argmax(-1), before)
    assert not (before == 17).all()


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_page("replay", tmp_path, monkeypatch)
    assert not torch.equal(made["plain"], made["steered"])
