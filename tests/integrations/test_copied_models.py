"""gSASRec-pytorch, SASRec.pytorch by pmixer, and Meta's HSTU, as rebuilt in models.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from integrations.checks import check_site, run_page, towards
from integrations.models import HSTU, LENGTH, N_ITEMS, WIDTH, GSASRec, SASRec
from saerec_fast import sites

LENGTHS = [3, 8, 1, 6]
HISTORIES = [
    torch.randint(1, N_ITEMS, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS
]


def batch(padding: int, left: bool) -> Tensor:
    tokens = torch.full((len(LENGTHS), LENGTH), padding)
    for row, history in enumerate(HISTORIES):
        tokens[row, slice(-len(history), None) if left else slice(len(history))] = history
    return tokens


class TestGSASRec:
    paths = (
        *(f"transformer_blocks.{i}{end}" for i in range(2) for end in ("", ".dense2")),
        "seq_norm",
    )
    tokens = batch(N_ITEMS + 1, left=True)

    def test_sites(self) -> None:
        found = sites(GSASRec())
        assert tuple(site.path for site in found) == self.paths
        assert {(site.width, site.library) for site in found} == {(WIDTH, "gSASRec-pytorch")}

    @pytest.mark.parametrize("path", paths)
    def test_steering(self, path: str) -> None:
        model = GSASRec().eval()
        check_site(model, path, lambda: model.get_predictions(self.tokens), self.tokens != N_ITEMS + 1)

    @torch.no_grad()
    def test_recommendations(self) -> None:
        model = GSASRec().eval()
        with towards(model, "seq_norm", model.item_embedding.weight[17].detach()):
            assert (model.get_predictions(self.tokens).argmax(-1) == 17).all()

    def test_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(Path(__file__).parent)
        made = run_page("gsasrec", tmp_path, monkeypatch)
        assert not torch.equal(made["plain"], made["steered"])


PMIXER_VERSIONS = {
    "old": SimpleNamespace(),
    "norm_first": SimpleNamespace(norm_first=True),
    "norm_last": SimpleNamespace(norm_first=False),
}
FORWARD_LAYERS = ["forward_layers.0", "forward_layers.1"]
PMIXER_PATHS = {
    "old": [*FORWARD_LAYERS, "last_layernorm"],
    "norm_first": [*FORWARD_LAYERS, "last_layernorm"],
    "norm_last": ["forward_layernorms.0", "forward_layernorms.1", *FORWARD_LAYERS, "last_layernorm"],
}
PMIXER_WORDS = {"old": "output of block 0", "norm_first": "MLP of block 0", "norm_last": "MLP of block 0"}


class TestPmixer:
    tokens = batch(0, left=True)

    @pytest.mark.parametrize("version", PMIXER_VERSIONS)
    def test_sites(self, version: str) -> None:
        found = sites(SASRec(PMIXER_VERSIONS[version]))
        assert [site.path for site in found] == PMIXER_PATHS[version]
        assert next(site.what for site in found if site.path == "forward_layers.0") == PMIXER_WORDS[version]
        assert {(site.width, site.library) for site in found} == {(WIDTH, "SASRec.pytorch")}

    @pytest.mark.parametrize(
        ("version", "path"), [(key, path) for key, paths in PMIXER_PATHS.items() for path in paths]
    )
    def test_steering(self, version: str, path: str) -> None:
        model = SASRec(PMIXER_VERSIONS[version]).eval()
        items = torch.arange(1, N_ITEMS + 1).numpy()
        check_site(model, path, lambda: model.predict(self.tokens.numpy(), items), self.tokens != 0)

    @torch.no_grad()
    def test_recommendations(self) -> None:
        model = SASRec(PMIXER_VERSIONS["norm_last"]).eval()
        items = torch.arange(1, N_ITEMS + 1).numpy()
        with towards(model, "last_layernorm", model.item_emb.weight[17].detach()):
            assert (model.predict(self.tokens.numpy(), items).argmax(-1) == 16).all()

    def test_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(Path(__file__).parent)
        made = run_page("sasrec_pytorch", tmp_path, monkeypatch)
        assert not torch.equal(made["plain"], made["steered"])


class TestHSTU:
    paths = ("_hstu._attention_layers.0", "_hstu._attention_layers.1")
    tokens = batch(0, left=False)

    def scores(self, model: HSTU) -> Tensor:
        return model.encode(torch.tensor(LENGTHS), self.tokens) @ model._embedding_module.weight.T

    def test_sites(self) -> None:
        found = sites(HSTU())
        assert tuple(site.path for site in found) == self.paths
        assert {(site.width, site.library) for site in found} == {(WIDTH, "Meta HSTU")}

    @pytest.mark.parametrize("path", paths)
    def test_steering(self, path: str) -> None:
        model = HSTU().eval()
        last = torch.zeros(sum(LENGTHS), dtype=torch.bool)
        last[torch.tensor(LENGTHS).cumsum(0) - 1] = True
        check_site(model, path, lambda: self.scores(model), torch.ones_like(last), last)

    @torch.no_grad()
    def test_recommendations(self) -> None:
        model = HSTU().eval()
        with towards(model, self.paths[-1], model._embedding_module.weight[17].detach()):
            direction = torch.nn.functional.normalize(model._embedding_module.weight[17], dim=0)
            steered = model.encode(torch.tensor(LENGTHS), self.tokens)
        # The states are normalised before they are scored.
        assert (steered @ direction > 0.99).all()

    def test_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(Path(__file__).parent)
        made = run_page("hstu", tmp_path, monkeypatch)
        assert not torch.equal(made["plain"], made["steered"])
