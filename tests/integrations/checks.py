"""What holds for steering in any library's model: checked against edits made by hand in a plain forward hook."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saerec_fast import Edit, SparseAutoencoder, SteeringPlan, attach, sites

PAGES = Path(__file__).parents[2] / "docs" / "integrations"
SET, ADD = 2, 5
EDITS = [Edit(SET, "set", 3.0), Edit(ADD, "add", -2.0)]


def make_sae(width: int) -> SparseAutoencoder:
    sae = SparseAutoencoder(width, 3 * width, generator=torch.Generator().manual_seed(3)).eval()
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
    return sae


def by_hand(hidden: Tensor, sae: SparseAutoencoder, positions: Tensor) -> Tensor:
    """``EDITS`` at some positions, in plain torch."""
    active = torch.relu((hidden - sae.b_dec) @ sae.W_enc[SET] + sae.b_enc[SET])
    edited = hidden + (3.0 - active)[..., None] * sae.W_dec[SET] - 2.0 * sae.W_dec[ADD]
    return torch.where(positions[..., None], edited, hidden)


def last_of(valid: Tensor) -> Tensor:
    """The last valid position of each row of a mask ``(B, L)``."""
    later = valid.flip(1).cumsum(1).flip(1)
    return valid & (later == 1)


@contextmanager
def replaced(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Every hidden state that ``module`` returns goes through ``change``; what comes out is in the list."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        index = len(parts) - 1 if isinstance(output, list) else 0
        parts[index] = change(parts[index].clone())
        seen.append(parts[index].clone())
        if isinstance(output, Tensor):
            return parts[0]
        return parts if isinstance(output, list) else tuple(parts)

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.int32), other.view(torch.int32))


@torch.no_grad()
def check_site(
    model: nn.Module, path: str, run: Callable[[], Tensor], valid: Tensor, last: Tensor | None = None
) -> None:
    """All of it at one site.

    Args:
        model: in evaluation mode.
        path: of the site.
        run: forward pass and scores ``(B, n_items)``, float32, of one batch of at least three sequences.
        valid: which positions of that batch are no padding, ``(B, L)``; for jagged rows all of them, ``(ΣL,)``.
        last: the ends of the jagged sequences, ``(ΣL,)``.
    """
    last = last_of(valid) if last is None else last
    width = next(site.width for site in sites(model) if site.path == path)
    assert width is not None
    sae = make_sae(width)
    module = model.get_submodule(path)
    with replaced(module, lambda hidden: hidden) as seen:
        plain = run()
    (hidden,) = seen
    assert hidden.shape == (*valid.shape, width)

    steered = {}
    for positions, mask in (("all", valid), ("last", last)):
        with replaced(module, lambda hidden, mask=mask: by_hand(hidden, sae, mask)):
            expected = run()
        plan = SteeringPlan(EDITS, positions=positions)
        with attach(model, path, sae, plan), replaced(module, lambda hidden: hidden) as seen:
            steered[positions] = run()
        torch.testing.assert_close(steered[positions], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(steered[positions], plain, rtol=1e-3, atol=1e-3)
        assert same_bits(seen[0][~mask], hidden[~mask])
        assert (seen[0][mask] != hidden[mask]).any(-1).all()

    with attach(model, path, sae, SteeringPlan()) as handle:
        assert same_bits(run(), plain)
        plans = [None if row == 1 else SteeringPlan(EDITS, positions="last") for row in range(len(plain))]
        plans[0] = SteeringPlan(EDITS)
        with handle.request(plans):
            mixed = run()
        assert same_bits(run(), plain)
    assert same_bits(mixed[1], plain[1])
    torch.testing.assert_close(mixed[0], steered["all"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[2:], steered["last"][2:], rtol=1e-5, atol=1e-5)
    assert same_bits(run(), plain)

    narrow = SparseAutoencoder(width - 1, 8)
    mismatch = pytest.raises((ValueError, TypeError), match=rf"expected .*{width - 1}|tensor \(\.\.\., {width - 1}\)")
    with attach(model, path, narrow, SteeringPlan([Edit(0, "add", 1.0)])), mismatch:
        run()
    with pytest.raises(ValueError, match=r"site: .* has no module"):
        attach(model, f"{path}.nowhere", sae, SteeringPlan())
    compiled = torch.compile(model, backend="eager")
    for target in (compiled, model):
        with pytest.raises(ValueError, match="not compiled yet"):
            attach(target, path, sae, SteeringPlan())
    del compiled, target
    assert same_bits(run(), plain)


def towards(model: nn.Module, path: str, direction: Tensor) -> Any:
    """A handle that pushes the hidden states at a site strongly along a direction."""
    sae = make_sae(direction.numel())
    with torch.no_grad():
        sae.W_dec[0] = torch.nn.functional.normalize(direction, dim=0)
    return attach(model, path, sae, SteeringPlan([Edit(0, "add", 200.0)], positions="last"))


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the example of a page of the documentation in a folder; what it defined."""
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= 15
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(blocks[0], f"{name}.md", "exec"), namespace)
    return namespace
