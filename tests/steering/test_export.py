"""A steered model as a graph: compiled, exported, and as an AOTInductor package, with strengths among its inputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from saerec_fast import Edit, JumpReLU, ReLU, SparseAutoencoder, SteeringPlan, TopK, attach

WIDTH = 16
TOKENS = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0]])
EDITS = [Edit(3, "set", 2.0), Edit(5, "add", 1.0), Edit(7, "scale", 0.5)]
STRENGTHS = torch.tensor([-1.0, 3.0, 2.0])
ROWS = torch.tensor([[2.0, 1.0, 0.5], [0.0, -4.0, 1.0], [5.0, 0.0, 0.0]])

# transformers, about its own masks; torch, about its own internals.
pytestmark = [
    pytest.mark.filterwarnings("ignore:We strongly recommend passing in an `attention_mask`"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Steered(nn.Module):
    """What is exported: the strengths of the plan are an argument of the forward pass."""

    def __init__(self, activation: Any, positions: Any = "last") -> None:
        super().__init__()
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=20, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=2, pad_token_id=0, use_cache=False
        )
        self.transformer = GPT2Model(config)
        self.sae = SparseAutoencoder(WIDTH, 64, activation, mean=0.1, std=1.3)
        self.eval()
        self.handle = attach(self.transformer, "h.0", self.sae, SteeringPlan(EDITS, positions=positions))

    def forward(self, tokens: Tensor, strengths: Tensor) -> Tensor:
        with self.handle.request(strengths=strengths):
            return self.transformer(tokens).last_hidden_state


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_strengths_of_a_request_are_those_of_a_plan() -> None:
    model = Steered(ReLU())
    edits = [Edit(edit.feature, edit.op, value) for edit, value in zip(EDITS, STRENGTHS.tolist(), strict=True)]
    with model.handle.request(SteeringPlan(edits, positions="last")):
        expected = model.transformer(TOKENS).last_hidden_state
    torch.testing.assert_close(model(TOKENS, STRENGTHS), expected)
    own = model.transformer(TOKENS).last_hidden_state
    assert not torch.allclose(own, expected)
    per_row = model(TOKENS, ROWS)
    for row in range(3):
        torch.testing.assert_close(per_row[row], model(TOKENS, ROWS[row])[row])
    with pytest.raises(ValueError, match="strengths: expected finite"):
        model(TOKENS, STRENGTHS / 0)
    with pytest.raises(ValueError, match=r"strengths: expected shape \(3,\)"):
        model(TOKENS, STRENGTHS[:2])
    with pytest.raises(ValueError, match="belong to one plan"), model.handle.request([None] * 3, strengths=STRENGTHS):
        pass
    with pytest.raises(ValueError, match="got neither"), model.handle.request():
        pass


@pytest.mark.parametrize("strengths", [STRENGTHS, ROWS], ids=["one", "per_row"])
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(0.2), TopK(4)], ids=repr)
@torch.no_grad()
def test_compile(activation: Any, positions: Any, strengths: Tensor) -> None:
    model = Steered(activation, positions)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for values in (strengths, -strengths):
        torch.testing.assert_close(compiled(TOKENS, values), model(TOKENS, values))
    assert not torch.allclose(compiled(TOKENS, strengths), compiled(TOKENS, -strengths))


def exported(model: Steered, strengths: Tensor) -> Any:
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"tokens": {0: batch}, "strengths": {0: batch} if strengths.dim() == 2 else None}
    return torch.export.export(model, (TOKENS, strengths), dynamic_shapes=shapes)


@pytest.mark.parametrize("strengths", [STRENGTHS, ROWS], ids=["one", "per_row"])
@pytest.mark.parametrize("activation", [ReLU(), TopK(4)], ids=repr)
@torch.no_grad()
def test_export(activation: Any, strengths: Tensor) -> None:
    model = Steered(activation)
    graph = exported(model, strengths).module()
    for tokens, values in ((TOKENS, -strengths), (TOKENS[:2], -strengths[:2] if strengths.dim() == 2 else strengths)):
        torch.testing.assert_close(graph(tokens, values), model(tokens, values))


@pytest.mark.parametrize("strengths", [STRENGTHS, ROWS], ids=["one", "per_row"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@torch.no_grad()
def test_export_of_what_ran_before(strict: bool, strengths: Tensor) -> None:
    """The call that was bound by then is not for graphs."""
    model = Steered(ReLU())
    for _ in range(3):
        model(TOKENS, strengths)
    assert model.handle._state.plain is not None
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, {0: batch} if strengths.dim() == 2 else None)
    graph = torch.export.export(model, (TOKENS, strengths), dynamic_shapes=shapes, strict=strict).module()
    torch.testing.assert_close(graph(TOKENS, -strengths), model(TOKENS, -strengths))
    larger = TOKENS.repeat(2, 1), strengths.repeat(2, 1) if strengths.dim() == 2 else strengths
    torch.testing.assert_close(graph(*larger), model(*larger))


LOAD = """
import sys
import torch

graph, package, inputs, outputs, needs_kernels = sys.argv[1:]
if needs_kernels == "True":
    try:
        torch.export.load(graph)
    except Exception:  # torch logs which operator is missing
        pass
    else:
        raise AssertionError("the ops are not registered yet")
    import saerec_fast

arguments = torch.load(inputs)
with torch.no_grad():
    results = [torch.export.load(graph).module()(*arguments), torch._inductor.aoti_load_package(package)(*arguments)]
assert needs_kernels == "True" or not any(name.startswith("saerec_fast") for name in sys.modules)
torch.save(results, outputs)
"""


@pytest.mark.parametrize(
    ("activation", "needs_kernels"), [(TopK(4), True), (ReLU(), False)], ids=["kernel", "by_features"]
)
@torch.no_grad()
def test_in_a_fresh_process(activation: Any, needs_kernels: bool, tmp_path: Path) -> None:
    model = Steered(activation)
    program = exported(model, STRENGTHS)
    graph, package, inputs, outputs = (str(tmp_path / name) for name in ("graph.pt2", "aoti.pt2", "in.pt", "out.pt"))
    torch.export.save(program, graph)
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    torch.save((TOKENS, -STRENGTHS), inputs)
    command = [sys.executable, "-c", LOAD, graph, package, inputs, outputs, str(needs_kernels)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("saerec_fast" in done.stderr and "steer_normalized" in done.stderr) == needs_kernels
    for result in torch.load(outputs):
        torch.testing.assert_close(result, model(TOKENS, -STRENGTHS))
