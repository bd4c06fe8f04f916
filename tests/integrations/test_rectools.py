"""RecTools: SASRec, BERT4Rec and HSTU, fitted and asked by its own interface."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rectools.models
import torch
from rectools.dataset import Dataset
from torch import Tensor

from integrations.checks import check_site, run_page, towards
from saerec_fast import sites

WIDTH, LENGTH, N_ITEMS = 16, 10, 40
MODELS = ("SASRecModel", "BERT4RecModel", "HSTUModel")
TOKENS = torch.zeros(4, LENGTH, dtype=torch.long)
for row, length in enumerate((3, 10, 1, 7)):
    TOKENS[row, -length:] = torch.randint(2, N_ITEMS, (length,), generator=torch.Generator().manual_seed(row))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    times = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(400), "h")
    users, items = rng.integers(0, 20, 400), rng.permutation(np.arange(400) % N_ITEMS)
    return Dataset.construct(pd.DataFrame({"user_id": users, "item_id": items, "weight": 1, "datetime": times}))


@pytest.fixture(scope="module", params=MODELS)
def fitted(request: pytest.FixtureRequest, dataset: Dataset) -> Any:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    model = getattr(rectools.models, request.param)(
        n_blocks=2, n_heads=2, n_factors=WIDTH, session_max_len=LENGTH, epochs=1, batch_size=32
    )
    model.fit(dataset)
    model.torch_model.eval()
    return model


@pytest.fixture
def paths(fitted: Any) -> list[str]:
    return [site.path for site in sites(fitted.torch_model)]


def test_sites(fitted: Any, paths: list[str]) -> None:
    blocks = "stu_blocks" if "HSTU" in type(fitted).__name__ else "transformer_blocks"
    mlp = "output_mlp" if "HSTU" in type(fitted).__name__ else "feed_forward"
    layers = "transformer_layers"
    expected = [f"{layers}.{blocks}.{i}{end}" for i in range(2) for end in ("", f".{mlp}")]
    assert paths == [*expected, layers]
    assert {(site.width, site.library) for site in sites(fitted.torch_model)} == {(WIDTH, "RecTools")}
    assert [site.path for site in sites(fitted.lightning_model)] == [f"torch_model.{path}" for path in paths]


@pytest.mark.parametrize("number", range(5))
def test_steering(fitted: Any, paths: list[str], number: int) -> None:
    model = fitted.torch_model
    batch = {"x": TOKENS, "unix_ts": torch.arange(LENGTH + 1).expand(len(TOKENS), -1) * 3600}

    def run() -> Tensor:
        # As recommend does: the forward of torch_model itself never runs.
        items = model.item_model.get_all_embeddings()
        return model.encode_sessions(batch, items)[:, -1] @ items.T

    check_site(model, paths[number], run, TOKENS != 0)


def test_recommendations(fitted: Any, dataset: Dataset, paths: list[str]) -> None:
    users = np.arange(6)
    options: dict[str, Any] = {}
    if fitted.require_recommend_context:
        options["context"] = pd.DataFrame({"user_id": users, "datetime": pd.Timestamp("2024-03-01")})

    def recommend() -> pd.DataFrame:
        return fitted.recommend(users, dataset, k=5, filter_viewed=False, **options)

    before = recommend()
    wanted = 17
    token = fitted.data_preparator.item_id_map.convert_to_internal([wanted])[0]
    direction = fitted.torch_model.item_model.get_all_embeddings()[token].detach()
    with towards(fitted.torch_model, paths[-1], direction):
        after = recommend()
    assert (after[after["rank"] == 1]["item_id"] == wanted).all()
    assert not (before[before["rank"] == 1]["item_id"] == wanted).all()
    pd.testing.assert_frame_equal(recommend(), before)


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_page("rectools", tmp_path, monkeypatch)
    assert not made["plain"].equals(made["steered"])
    assert (made["plain"]["rank"] == made["steered"]["rank"]).all()
