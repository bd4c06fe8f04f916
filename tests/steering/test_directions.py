from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saerec_fast.sae import ActivationStore
from saerec_fast.steering import contrastive_direction, directions


@pytest.mark.parametrize("kind", ["tensor", "store"])
def test_is_the_difference_of_the_means(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 5, generator=generator)
    has = torch.rand(40, generator=generator) < 0.3
    rows: torch.Tensor | ActivationStore = hidden
    if kind == "store":
        with ActivationStore.create(tmp_path / "store", 40, 5) as writer:
            writer.append(hidden, torch.zeros(40, dtype=torch.int32), torch.zeros(40, dtype=torch.int32))
        rows = ActivationStore(tmp_path / "store")
    direction = contrastive_direction(rows, has, "drama")
    torch.testing.assert_close(direction.vector, hidden[has].mean(0) - hidden[~has].mean(0))
    assert (direction.value, direction.name) == (1.0, "drama")


def test_errors() -> None:
    hidden = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"has_attribute: expected shape \(3,\), got \(4,\)"):
        contrastive_direction(hidden, torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match="rows with the attribute and rows without it"):
        contrastive_direction(hidden, torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"expected a bool tensor \(N,\), got torch.int64"):
        contrastive_direction(hidden, torch.ones(3, dtype=torch.int64))
