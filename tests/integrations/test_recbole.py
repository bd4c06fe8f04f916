"""RecBole's SASRec, over the copy of MovieLens 100K that its wheel carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec
from torch import Tensor

from integrations.checks import check_site, run_page, towards
from saerec_fast import sites

WIDTH, LENGTH = 16, 10
TOKENS = torch.zeros(4, LENGTH, dtype=torch.long)
LENGTHS = torch.tensor([3, 10, 1, 7])
for row, length in enumerate(LENGTHS.tolist()):
    TOKENS[row, :length] = torch.randint(1, 100, (length,), generator=torch.Generator().manual_seed(row))
BATCH = Interaction({"item_id_list": TOKENS, "item_length": LENGTHS})
PATHS = [
    *(f"trm_encoder.layer.{i}{end}" for i in range(2) for end in ("", ".feed_forward.dense_2")),
    "trm_encoder",
]


@pytest.fixture(scope="module")
def model() -> Any:
    options = {"n_layers": 2, "hidden_size": WIDTH, "inner_size": 32, "train_neg_sample_args": None}
    options |= {"state": "ERROR", "MAX_ITEM_LIST_LENGTH": LENGTH, "use_gpu": False}
    config = Config(model="SASRec", dataset="ml-100k", config_dict=options)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - RecBole's
    return SASRec(config, create_dataset(config)).eval()


def test_sites(model: Any) -> None:
    assert [site.path for site in sites(model)] == PATHS
    assert {(site.width, site.library) for site in sites(model)} == {(WIDTH, "RecBole")}


@pytest.mark.parametrize("path", PATHS)
def test_steering(model: Any, path: str) -> None:
    def run() -> Tensor:
        # Calls forward as a method.
        return model.full_sort_predict(BATCH)

    check_site(model, path, run, TOKENS != 0)


@torch.no_grad()
def test_recommendations(model: Any) -> None:
    before = model.full_sort_predict(BATCH).argmax(-1)
    with towards(model, "trm_encoder", model.item_embedding.weight[17].detach()):
        assert (model.full_sort_predict(BATCH).argmax(-1) == 17).all()
    assert torch.equal(model.full_sort_predict(BATCH).argmax(-1), before)
    assert not (before == 17).all()


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_page("recbole", tmp_path, monkeypatch)
    assert not torch.equal(made["plain"], made["steered"])
