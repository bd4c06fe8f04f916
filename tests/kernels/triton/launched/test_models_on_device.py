"""What a user does on a GPU beside calling the ops: autoencoders, their training, steered models, CUDA graphs.

A test's function runs on the device and, in float64, by the reference on the CPU. Numbers are integers or halves of
them, so that both agree to the last bit in whatever order they add.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from capacity_checks import without_waiting
from cases import Case, integer_inputs
from helpers import assert_equal, assert_no_worse, assert_same_bits
from test_triton_ops import check_gradients, differentiable_ops
from torch import Tensor, nn
from triton_cases import DEVICE, OPS, integers, on_device

import saerec_fast as fast
from saerec_fast import backend as backends
from saerec_fast import reference
from saerec_fast.sae import Adam, SparseAutoencoder, training_step

WIDTH, N_FEATURES = 8, 40
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
ACTIVATIONS = {
    "relu": fast.ReLU(),
    "jump_relu": fast.JumpReLU(2.0),
    "jump_relu_per_feature": fast.JumpReLU(torch.arange(N_FEATURES) % 4.0),
    "topk": fast.TopK(5),
    "batch_topk": fast.BatchTopK(5, threshold=1.5),
}
EDITS = [
    fast.Edit(0, "set", 3.0),
    fast.Edit(7, "add", 1.5),
    fast.Edit(7, "scale", 0.5),
    fast.Edit(39, "clamp_min", 2.0),
]
OTHER = fast.SteeringPlan([fast.Edit(2, "add", -2.0), fast.Direction([1.0] * WIDTH, 0.5)], positions="last")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
KERNELS = ["triton"] if DEVICE == "cpu" else ["triton", "cuda"]
# On a GPU ``auto`` takes the reference.
BACKENDS = ["auto", *KERNELS, *(["reference"] if DEVICE == "cpu" else [])]


@pytest.fixture
def guarded_outputs() -> None:
    """None here: compilers and files allocate as well. The ops' own tests have them."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``auto``, which modules go by, takes on the device: what it takes now, and what it may take one day."""
    name: str = request.param
    if name != "auto":
        problem = backends.available_backends()[name]
        if problem:
            (pytest.fail if os.environ.get("SAEREC_REQUIRE_GPU") == "1" else pytest.skip)(problem)
        choose = backends.choose
        monkeypatch.setattr(backends, "choose", lambda kind: name if kind == DEVICE else choose(kind))
    return name


on_kernels = pytest.mark.parametrize("backend", KERNELS, indirect=True)


@pytest.fixture(params=ACTIVATIONS)
def sae(request: pytest.FixtureRequest) -> SparseAutoencoder:
    return make_sae(ACTIVATIONS[request.param])


def make_sae(activation: fast.types.Activation) -> SparseAutoencoder:
    sae = SparseAutoencoder(WIDTH, N_FEATURES, activation, mean=1.0, std=2.0).eval()
    return with_integers(sae)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(hidden).relu()


class Model(nn.Module):
    """Two residual layers between an embedding and the scores of 9 items, token 1 and up; token 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def make_model() -> Model:
    return with_integers(Model().eval())


def is_item(tokens: Tensor) -> Tensor:
    return tokens != 0


def with_integers(module: Any) -> Any:
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(integers(*parameter.shape, low=-1, high=1, seed=seed))
    return module


def exact(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(function: Callable[..., list[Tensor]], *args: Any) -> list[Tensor]:
    """On the device what the reference gives in float64, rounded once."""
    found, expected = on_device(function, *args), function(*map(exact, args))
    for actual, wanted in zip(found, expected, strict=True):
        assert_equal(actual, wanted.to(actual.dtype))
    return found


AS_CALLED = SimpleNamespace(**{name: partial(on_device, getattr(fast, name)) for name in OPS})


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"], indirect=True)
@pytest.mark.parametrize("name", differentiable_ops(reference))
def test_ops_and_their_gradients(backend: str, name: str) -> None:
    check_gradients(name, AS_CALLED, torch.float32)


def test_forward_encode_and_decode(backend: str, sae: SparseAutoencoder) -> None:
    @torch.no_grad()
    def run(sae: SparseAutoencoder, x: Tensor, chosen: Tensor) -> list[Tensor]:
        features = sae.encode(x)
        assert features.values.device == x.device
        return [sae(x), features.dense(), sae.decode(features), sae.encode_features(x, chosen)]

    for shape in ((70,), (2, 3), (), (0,)):
        check(run, sae, integers(*shape, WIDTH, high=3), torch.tensor([39, 0, 7, 7]))


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
def test_steer(backend: str, sae: SparseAutoencoder, mode: Any) -> None:
    @torch.no_grad()
    def run(sae: SparseAutoencoder, x: Tensor, valid: Tensor, *strengths: Tensor) -> list[Tensor]:
        plans = [fast.SteeringPlan(EDITS, mode, positions) for positions in ("all", "last", mask)]
        out = [sae.steer(x, plan, valid=valid) for plan in plans]
        out += [sae.steer(x, plans[0], strengths=own) for own in strengths]
        return [*out, sae.steer(x, [plans[0], None, OTHER]), sae.steer(x, fast.SteeringPlan())]

    x, valid = integers(3, 4, WIDTH), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    mask = valid.roll(1, 1)  # of a plan: it stays on the CPU
    x[0, 2], x[1, 0, 0] = -0.0, -0.0
    found = check(run, sae, x, valid, *(integers(*shape, 4) for shape in ((), (3, 1), (3, 4))))
    assert_same_bits(found[0][~valid], x[~valid])
    assert_same_bits(found[2][~(valid & mask)], x[~(valid & mask)])
    assert_same_bits(found[-2][1], x[1])
    assert_same_bits(found[-1], x)


def test_gradients(backend: str, sae: SparseAutoencoder) -> None:
    def run(sae: SparseAutoencoder, x: Tensor, weight: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_(), *sae.train().parameters()]
        return list(torch.autograd.grad((sae(leaves[0]) * weight).sum(), leaves))

    check(run, sae, integers(6, 5, WIDTH), integers(6, 5, WIDTH, low=-1, high=1, seed=1))


@pytest.mark.parametrize("bias", [0.0, -6.0])  # a dense step of a threshold SAE, and a sparse one
def test_training_step(backend: str, sae: SparseAutoencoder, bias: float) -> None:
    def run(sae: SparseAutoencoder, z: Tensor) -> list[Tensor]:
        result = training_step(sae.train(), z, l1_coefficient=0.5)
        parts = [result.loss, result.reconstruction_loss, result.l1, result.counts, result.residual]
        return [*parts, *(parameter.grad for parameter in sae.parameters())]

    with torch.no_grad():
        sae.b_enc.add_(bias)
    check(run, sae, integers(32, WIDTH))


def test_training_learns(backend: str) -> None:
    sae = SparseAutoencoder(WIDTH, N_FEATURES, fast.TopK(5))

    def run(sae: SparseAutoencoder, z: Tensor) -> list[Tensor]:
        optimizer = Adam(sae.train(), lr=0.01)
        losses = []
        for _ in range(20):
            losses.append(training_step(sae, z).loss)
            optimizer.step()
        assert {tensor.device.type for tensor in (*losses, *sae.parameters())} == {z.device.type}
        return [torch.stack(losses), sae.W_dec.detach()]

    losses, W_dec = on_device(run, sae, torch.randn(256, WIDTH))
    assert losses[-1] < 0.7 * losses[0]
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(N_FEATURES))


def test_save_and_load(tmp_path: Path) -> None:
    sae = make_sae(fast.TopK(5))

    def run(sae: SparseAutoencoder) -> list[Tensor]:
        sae.save(tmp_path)
        loaded = SparseAutoencoder.load(tmp_path, device=sae.W_enc.device)
        assert loaded.W_enc.device == sae.W_enc.device
        return list(loaded.state_dict().values())

    for actual, expected in zip(on_device(run, sae), sae.state_dict().values(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_attached_plan(backend: str, sae: SparseAutoencoder, mode: Any, positions: Any) -> None:
    @torch.no_grad()
    def run(model: Model, sae: SparseAutoencoder, tokens: Tensor) -> list[Tensor]:
        plain = model.blocks[0](model.embedding(tokens))
        plan = fast.SteeringPlan(EDITS, mode, positions)
        with fast.attach(model, "blocks.0", sae, plan, valid=is_item):
            seen: list[Tensor] = []
            model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
            scores = [model(tokens), model(tokens)]
        return [plain, seen[0], *scores, model(tokens)]

    plain, seen, *_ = check(run, make_model(), sae, TOKENS)
    steered = is_item(TOKENS)
    if positions == "last":
        steered &= steered.sum(1, keepdim=True) == torch.arange(1, 6)
    assert_same_bits(seen[~steered], plain[~steered])
    assert (seen[steered] != plain[steered]).any()


def test_what_a_handle_can_do(backend: str, sae: SparseAutoencoder) -> None:
    @torch.no_grad()
    def run(model: Model, sae: SparseAutoencoder, tokens: Tensor) -> list[Tensor]:
        out = [model(tokens)]
        with fast.attach(model, "blocks.0", sae, fast.SteeringPlan(), valid=is_item) as handle:
            out.append(model(tokens))
            handle.update(fast.SteeringPlan(EDITS))
            out.append(model(tokens))
            assert handle.strengths.device == tokens.device
            handle.update(strengths=[1.0, -1.0, 2.0, 0.5])
            out.append(model(tokens))
            with handle.request([fast.SteeringPlan(EDITS), None, OTHER, fast.SteeringPlan(EDITS, "reconstruct")]):
                out.append(model(tokens))
            with handle.request(strengths=[[float(row + column) for column in range(4)] for row in range(4)]):
                out.append(model(tokens))
            handle.update(OTHER)
            out.append(model(tokens))
            handle.update(fast.SteeringPlan(EDITS, positions=TOKENS % 2 == 1))
            out.append(model(tokens))
        rows = torch.arange(16.0).reshape(4, 4).remainder(3)
        with fast.attach(model, "blocks.0", sae, fast.SteeringPlan(EDITS), strengths=rows):
            out.append(model(tokens))
        return [*out, model(tokens)]

    plain, empty, *steered, after = check(run, make_model(), sae, TOKENS)
    assert_same_bits(empty, plain)
    assert_same_bits(after, plain)
    assert_same_bits(steered[2][1], plain[1])  # no plan for that row
    assert not any(map(torch.equal, steered, [plain, *steered]))


def test_sequences_one_after_the_other(backend: str) -> None:
    @torch.no_grad()
    def run(model: nn.Module, sae: SparseAutoencoder, x: Tensor, offsets: Tensor) -> list[Tensor]:
        out = []
        for plan in (fast.SteeringPlan(EDITS), fast.SteeringPlan(EDITS, positions="last")):
            with fast.attach(model, "", sae, plan, valid=lambda rows: offsets) as handle:
                out.append(model(x))
                handle.update(strengths=[[1.0] * 4, [2.0] * 4, [3.0] * 4])
                out.append(model(x))
                with handle.request([plan, None, OTHER]):
                    out.append(model(x))
        return out

    check(run, nn.Sequential(nn.Identity()), make_sae(fast.TopK(5)), integers(9, WIDTH), torch.tensor([0, 4, 4, 9]))


def test_a_limited_change(backend: str) -> None:
    plan = fast.SteeringPlan(EDITS, max_relative_norm=0.25, on_excess="clip")

    @torch.no_grad()
    def run(sae: SparseAutoencoder, x: Tensor) -> Tensor:
        return sae.steer(x, plan)

    sae, x = make_sae(fast.ReLU()), integers(30, WIDTH)
    plain = reference.steer(x, *sae.folded_weights(), sae.activation, plan).detach()
    assert_no_worse(on_device(run, sae, x), plain, run(exact(sae), exact(x)), 2.0)


def test_gradients_reach_the_strengths(backend: str, sae: SparseAutoencoder) -> None:
    def run(model: Model, sae: SparseAutoencoder, tokens: Tensor, strengths: Tensor) -> list[Tensor]:
        strengths = strengths.clone().requires_grad_()
        plan = fast.SteeringPlan(EDITS, positions="last")
        with fast.attach(model, "blocks.0", sae, plan, valid=is_item, strengths=strengths):
            out = model(tokens)
        out.sum().backward()
        assert strengths.grad is not None
        return [out.detach(), strengths.grad]

    check(run, make_model(), sae, TOKENS, torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 4))


def test_answers_of_a_predictor(backend: str, sae: SparseAutoencoder) -> None:
    histories = [[3, 1, 4], [8], [1, 5, 8, 2, 6, 5], [0, 7]]
    plans = [fast.SteeringPlan(EDITS), None, OTHER, fast.SteeringPlan(EDITS, "reconstruct")]

    def run(model: Model, sae: SparseAutoencoder) -> dict[str, Any]:
        options: dict[str, Any] = {"score": Model.__call__, "max_length": 5, "k": 4}
        with fast.Predictor(model, [str(item) for item in range(9)], sae, "blocks.0", **options) as predictor:
            return predictor({"history": histories, "edits": plans})

    model = make_model()
    found, expected = on_device(run, model, sae), run(exact(model), exact(sae))
    assert found["error"].tolist() == [None] * 4
    for name in ("items", "scores", "features", "feature_values"):
        for actual, wanted in zip(found[name], expected[name], strict=True):
            assert actual.tolist() == wanted.tolist(), name


@pytest.mark.parametrize("activation", ["relu", "topk", "batch_topk", "jump_relu", "gated"])
def test_training_run(backend: str, tmp_path: Path, activation: Any) -> None:
    """With checkpoints, and with features that die."""
    hidden, ids = torch.randn(600, WIDTH), torch.zeros(600).numpy()
    with fast.ActivationStore.create(tmp_path / "store", 600, WIDTH) as writer:
        writer.append(hidden, ids, ids)
    store = fast.ActivationStore(tmp_path / "store")
    sizes: dict[str, Any] = {"k": 5, "batch_size": 100, "steps": 40, "dead_after": 500}
    config = fast.SAETrainingConfig(N_FEATURES, activation, learning_rate=0.01, **sizes)
    explained: list[float] = []
    options: dict[str, Any] = {"progress": False, "checkpoint_every": 15, "log_every": 10}

    def run() -> list[Tensor]:
        options["on_log"] = lambda point: explained.append(point["explained_variance"])
        sae = fast.train_sae(store, config, tmp_path / "run", device=DEVICE, **options)
        assert {tensor.device.type for tensor in sae.state_dict().values()} == {DEVICE}
        return [sae.W_dec.detach()]

    (W_dec,) = on_device(run)
    assert explained[-1] > max(explained[0], 0.5)
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(N_FEATURES))


@on_kernels
def test_nothing_waits_for_the_device(backend: str, sae: SparseAutoencoder) -> None:
    """Of a plan and weights that were met before; strengths on the device, not the plan's own values."""

    @torch.no_grad()
    def run(model: Model, sae: SparseAutoencoder, tokens: Tensor, x: Tensor, strengths: Tensor) -> list[Tensor]:
        plans = [fast.SteeringPlan(EDITS, mode, "last") for mode in ("delta", "reconstruct")]
        fast.attach(model, "blocks.0", sae, plans[0], valid=is_item, strengths=strengths)

        def serve() -> list[Tensor]:
            out = [sae(x), model(tokens), *(sae.steer(x, plan, strengths=strengths[:, None]) for plan in plans)]
            return [*out, sae.decode(sae.encode(x))] if isinstance(sae.activation, fast.TopK) else out

        first = serve()
        for one, other in zip(without_waiting(serve)(), first, strict=True):
            assert_same_bits(one, other)
        return first

    on_device(run, make_model(), sae, TOKENS, integers(4, 5, WIDTH), integers(4, 4))


@on_kernels
def test_compiled(backend: str) -> None:
    @torch.no_grad()
    def run(model: Model, sae: SparseAutoencoder, tokens: Tensor) -> list[Tensor]:
        # Of a graph that holds the kernels Inductor makes code; the interpreter's are opaque to it.
        compiler = "aot_eager" if DEVICE == "cpu" else "inductor"
        with fast.attach(model, "blocks.0", sae, fast.SteeringPlan(EDITS), valid=is_item) as handle:
            compiled = torch.compile(model, fullgraph=True, backend=compiler) if tokens.device.type == DEVICE else model
            out = [compiled(tokens)]
            handle.update(strengths=[1.0, -1.0, 2.0, 0.5])
            return [*out, compiled(tokens)]

    check(run, make_model(), make_sae(fast.TopK(5)), TOKENS)


@needs_gpu
@on_kernels
def test_replays_of_a_cuda_graph(backend: str, sae: SparseAutoencoder) -> None:
    """They read what the tensors hold by then, strengths that were updated among them."""

    @torch.no_grad()
    def run(model: Model, sae: SparseAutoencoder, tokens: Tensor, x: Tensor, strengths: Tensor) -> None:
        handle = fast.attach(model, "blocks.0", sae, fast.SteeringPlan(EDITS), valid=is_item, strengths=strengths)
        rebuild = fast.SteeringPlan(EDITS, "reconstruct", "last")

        def serve() -> list[Tensor]:
            return [model(tokens), sae(x), sae.steer(x, rebuild, strengths=handle.strengths[:, None])]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            serve()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = serve()
        for factor in range(3):
            tokens.copy_(tokens.roll(1, 0))
            x.mul_(-1)
            handle.update(strengths=factor * strengths)
            graph.replay()
            for one, other in zip(captured, serve(), strict=True):
                assert_same_bits(one, other)

    on_device(run, make_model(), sae, TOKENS, integers(4, 5, WIDTH), integers(4, 4))


@needs_gpu
def test_launches_are_on_the_current_stream() -> None:
    inputs = [tensor.cuda() for tensor in integer_inputs(Case(64, 2048, 32, 1000))]
    expected = fast.reconstruct(*inputs, fast.TopK(32), backend="triton")
    x = torch.zeros_like(inputs[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        x.copy_(inputs[0])
        out = fast.reconstruct(x, *inputs[1:], fast.TopK(32), backend="triton").cpu()
    assert_same_bits(out, expected.cpu())


@needs_gpu
def test_tensors_left_on_the_host_are_named(backend: str) -> None:
    x, W_enc, b_enc, b_dec, W_dec = (tensor.cuda() for tensor in integer_inputs(Case(8, 40, 5, 3)))
    options: dict[str, Any] = {"backend": backend}
    plan = fast.SteeringPlan(EDITS)
    calls: dict[str, Callable[[], object]] = {
        "W_enc": lambda: fast.encode_topk(x, W_enc.cpu(), b_enc, b_dec, k=5, **options),
        "b_dec": lambda: fast.encode_threshold(x, W_enc, b_enc, b_dec.cpu(), **options),
        "W_dec": lambda: fast.reconstruct(x, W_enc, b_enc, b_dec, W_dec.cpu(), fast.TopK(5), **options),
        "threshold": lambda: fast.encode_threshold(x, W_enc, b_enc, b_dec, torch.ones(40), **options),
        "strengths": lambda: fast.steer(
            x, W_enc, b_enc, b_dec, W_dec, fast.TopK(5), plan, strengths=torch.ones(4), **options
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name}: expected device cuda:0 like the input, got cpu"):
            call()
    if backend != "auto":
        with pytest.raises(ValueError, match=f"backend: '{backend}' needs tensors on a CUDA device, got cpu"):
            fast.linear_topk(x.cpu(), W_enc.cpu(), k=5, **options)
