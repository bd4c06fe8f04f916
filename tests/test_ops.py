"""The ops as PyTorch operators: opcheck, torch.compile, torch.export."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case, Inputs, make_inputs
from torch import Tensor

import saerec_fast as fast
from saerec_fast import ops

CASE = Case(8, 60, 7, 12)
OPS = torch.ops.saerec_fast


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def dynamic_output_shapes() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def _sparse() -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.tensor([0, 2, 2, 5])
    return offsets, torch.tensor([1, 59, 3, 0, 4], dtype=torch.int32), torch.randn(5)


def operator_calls() -> dict[str, tuple]:
    x, W_enc, b_enc, b_dec, W_dec = make_inputs(CASE)
    offsets, indices, values = _sparse()
    exclude = torch.arange(13) * 2, torch.arange(24)
    threshold, edits = torch.tensor([0.3]), ([3, 3, 9], [0, 2, 1], torch.tensor([1.0, 0.5, 2.0]))
    mask = torch.arange(12) % 2 == 0
    return {
        "linear_topk": (x, W_enc, b_enc, 7, None, None),
        "linear_topk exclude": (x, W_enc, None, 7, *exclude),
        "encode_topk": (x, W_enc, b_enc, b_dec, 7),
        "encode_threshold": (x, W_enc, b_enc, b_dec, threshold),
        "encode_threshold capacity": (x, W_enc, b_enc, b_dec, threshold, None, 50),
        "encode_features": (x, W_enc, b_enc, b_dec, threshold, torch.tensor([9, 0, 9])),
        "reconstruct topk": (x, W_enc, b_enc, b_dec, W_dec, None, 7),
        "reconstruct relu": (x, W_enc, b_enc, b_dec, W_dec, threshold, 0),
        "decode_sparse": (offsets, indices, values, W_dec, b_dec),
        "sparse_dot": (offsets, indices, x[:3], W_dec),
        "sparse_weight_gradient": (offsets, indices, values, x[:3], b_dec, 60),
        "sparse_training_step": (x[:3], offsets, indices, values, W_enc, W_dec, b_dec, 0.5, 0.1),
        "largest_entries": (offsets, values, 3),
        "steer delta relu": (x, W_enc, b_enc, b_dec, W_dec, threshold, 0, False, *edits, None),
        "steer delta topk": (x, W_enc, b_enc, b_dec, W_dec, None, 7, False, *edits, mask),
        "steer delta add": (x, W_enc, b_enc, b_dec, W_dec, None, 7, False, [3], [1], torch.ones(12, 1), mask),
        "steer delta empty": (x, W_enc, b_enc, b_dec, W_dec, None, 7, False, [], [], torch.zeros(0), None),
        "steer reconstruct relu": (x, W_enc, b_enc, b_dec, W_dec, threshold, 0, True, *edits, mask),
        "steer reconstruct topk": (x, W_enc, b_enc, b_dec, W_dec, None, 7, True, *edits, None),
    }


def cpu_operator_calls() -> dict[str, tuple]:
    """Of those that only the C++ kernels have."""
    x, W_enc, b_enc, b_dec, W_dec = make_inputs(CASE)
    edits, mask = ([3, 3, 9], [0, 2, 1], torch.tensor([1.0, 0.5, 2.0])), torch.arange(12) % 2 == 0
    scalars = torch.tensor(0.25), torch.tensor(1.5)
    return {
        "steer_normalized topk": (x, W_enc, b_enc, b_dec, W_dec, None, 7, False, *edits, mask, *scalars),
        "steer_normalized relu": (x, W_enc, b_enc, b_dec, W_dec, torch.tensor([0.3]), 0, True, *edits, *[None] * 3),
    }


def test_every_operator_is_checked() -> None:
    assert {name.split()[0] for name in operator_calls()} == set(ops._SCHEMAS)


# The sparse_ operators and largest_entries serve training only and have no gradient of their own.
OPCHECKS = [
    (name, requires_grad)
    for name in {**operator_calls(), **cpu_operator_calls()}
    for requires_grad in (False, True)
    if not (requires_grad and name.startswith(("sparse_", "largest_")))
]


@pytest.mark.parametrize(("name", "requires_grad"), OPCHECKS)
# From opcheck, about what steer_normalized makes of its weights for the operator that has a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(name: str, requires_grad: bool) -> None:
    args = {**operator_calls(), **cpu_operator_calls()}[name]
    if requires_grad:
        # The fifth of encode_threshold, the sixth of steer are thresholds, which have no gradient.
        leaves = {"decode_sparse": (2, 3, 4), "linear_topk": (0, 1, 2), "steer": (0, 1, 2, 3, 4, 10)}
        leaves["steer_normalized"] = (*leaves["steer"], 12, 13)
        chosen = leaves.get(name.split()[0], (0, 1, 2, 3))
        args = tuple(
            arg.requires_grad_() if i in chosen and isinstance(arg, Tensor) else arg for i, arg in enumerate(args)
        )
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if requires_grad and name.startswith("encode_threshold"):
        # opcheck adds the sums of all outputs in place to that of the first, here integers.
        # test_encode_threshold_compiles does in its stead.
        checks.pop()
    torch.library.opcheck(getattr(OPS, name.split()[0]).default, args, test_utils=checks)


class GraphCounter:
    """The backend aot_eager, counting the graphs it is given and those that call the kernel ``steer``."""

    def __init__(self) -> None:
        self.graphs = self.steer_kernels = 0

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        self.steer_kernels += _calls_steer(module.graph)
        return torch._dynamo.lookup_backend("aot_eager")(module, example_inputs)


def _calls_steer(graph: torch.fx.Graph) -> bool:
    return any("saerec_fast.steer" in str(node.target) for node in graph.nodes)


def _plan(mode: str) -> fast.SteeringPlan:
    return fast.SteeringPlan([fast.Edit(3, "set", 1.0), fast.Edit(3, "scale", 0.5), fast.Edit(9, "add", 2.0)], mode)


def _steer(activation, mode: str) -> Callable[[Inputs], Tensor]:
    return lambda t: fast.steer(*t, activation, _plan(mode))


ACTIVATIONS = {
    "relu": fast.ReLU(),
    "jumprelu": fast.JumpReLU(0.3),
    "jumprelu_per_feature": fast.JumpReLU(torch.linspace(0, 1, 60)),
    "topk": fast.TopK(7),
    "batch_topk": fast.BatchTopK(7, threshold=0.8),
}
COMPILED: dict[str, Callable[[Inputs], Tensor]] = {
    "linear_topk": lambda t: fast.linear_topk(*t[:3], k=7).values,
    "encode_decode": lambda t: fast.decode_sparse(fast.encode_topk(*t[:4], k=7), t.W_dec, t.b_dec),
    "reconstruct": lambda t: fast.reconstruct(*t, fast.TopK(7)),
    "steer_last": lambda t: fast.steer(
        *t, fast.ReLU(), fast.SteeringPlan([fast.Edit(3, "set", 1.0)], positions="last"), valid=t.x[..., 0] > 0
    ),
    **{
        f"steer_{mode}_{name}": _steer(activation, mode)
        for name, activation in ACTIVATIONS.items()
        for mode in ("delta", "reconstruct")
    },
}


# In a compiler these are PyTorch's own ops, whose sums round in another order than the kernel's.
BY_FEATURES = {"steer_last", *(f"steer_delta_{name}" for name in ACTIVATIONS if name != "topk")}


def leaves_of(rows: int, seed: int = 0) -> Inputs:
    inputs = make_inputs(Case(8, 60, 7, rows), seed)
    return Inputs(*(tensor.requires_grad_() for tensor in inputs))


def grads_of(out: Tensor, leaves: Inputs) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)


def assert_all_close(actual, expected) -> None:
    for a, e in zip(actual, expected, strict=True):
        # A compiled backward gives zeros where eager gives None.
        a, e = (torch.zeros(()) if t is None else t for t in (a, e))
        torch.testing.assert_close(*torch.broadcast_tensors(a, e), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph(name: str, dynamic_output_shapes: None) -> None:
    counter = GraphCounter()
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend=counter)
    inputs = make_inputs(CASE)
    with torch.no_grad():
        tolerance = 1e-6 if name in BY_FEATURES else 0
        torch.testing.assert_close(compiled(inputs), COMPILED[name](inputs), rtol=tolerance, atol=tolerance)
    assert counter.graphs == 1
    assert counter.steer_kernels == (name.startswith("steer") and name not in BY_FEATURES)
    leaves = leaves_of(12)
    out = compiled(leaves)
    assert_all_close([out], [COMPILED[name](leaves)])
    assert_all_close(grads_of(out, leaves), grads_of(COMPILED[name](leaves), leaves))


@pytest.mark.parametrize("name", ["linear_topk", "encode_decode", "steer_delta_relu", "steer_reconstruct_topk"])
def test_batch_sizes_do_not_recompile_forever(name: str) -> None:
    counter = GraphCounter()
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend=counter)
    for rows in (12, 5, 130, 7, 31):
        leaves = leaves_of(rows, seed=rows)
        out = compiled(leaves)
        torch.testing.assert_close(out, COMPILED[name](leaves), rtol=1e-5, atol=1e-5)
        assert_all_close(grads_of(out, leaves), grads_of(COMPILED[name](leaves), leaves))
    assert counter.graphs <= 2  # the first size, then any size


def test_a_capacity_compiles_to_static_shapes() -> None:
    def encode(t: Inputs) -> tuple[Tensor, ...]:
        features = fast.encode_threshold(*t[:4], 0.3, capacity=50)
        assert features.indices.shape == (50,)
        decoded = fast.decode_sparse(features, t.W_dec, t.b_dec)
        return features.offsets, features.indices, features.values, features.n_active, decoded

    counter = GraphCounter()
    compiled = torch.compile(encode, fullgraph=True, backend=counter)
    for seed in (0, 1):
        inputs = make_inputs(CASE, seed)
        for actual, expected in zip(compiled(inputs), encode(inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert counter.graphs == 1
    leaves = leaves_of(12, 2)
    assert_all_close(grads_of(compiled(leaves)[4], leaves), grads_of(encode(leaves)[4], leaves))


def test_encode_threshold_compiles(dynamic_output_shapes: None) -> None:
    def encode(t: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = fast.encode_threshold(*t[:4], 0.3)
        decoded = fast.decode_sparse(features, t.W_dec, t.b_dec)
        return features.offsets, features.indices, features.values * 2, decoded

    counter = GraphCounter()
    compiled = torch.compile(encode, fullgraph=True, backend=counter)
    for seed in (0, 1, 2):  # as many different numbers of entries
        inputs = make_inputs(CASE, seed)
        for actual, expected in zip(compiled(inputs), encode(inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert counter.graphs == 1
    for seed in (3, 4):
        leaves = leaves_of(12, seed)
        assert_all_close(grads_of(compiled(leaves)[3], leaves), grads_of(encode(leaves)[3], leaves))
    assert counter.graphs == 2


def test_encode_features_compiles_and_its_kernel_checks_ids() -> None:
    x, W_enc, b_enc, b_dec, _ = make_inputs(CASE)
    features = torch.tensor([9, 0, 59])
    compiled = torch.compile(fast.encode_features, fullgraph=True, backend="aot_eager")
    expected = fast.encode_features(x, W_enc, b_enc, b_dec, 0.3, features)
    torch.testing.assert_close(compiled(x, W_enc, b_enc, b_dec, 0.3, features), expected, rtol=0, atol=0)
    for bad in (60, -1):
        with pytest.raises(ValueError, match=f"features: ids go from 0 to 59, got .*{bad}"):
            OPS.encode_features(x, W_enc, b_enc, b_dec, torch.tensor([0.3]), torch.tensor([5, bad]))


def test_exclude_compiles() -> None:
    def search(x: Tensor, weight: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
        return fast.linear_topk(x, weight, k=7, exclude=fast.Ragged(offsets, ids)).indices

    x, weight = make_inputs(CASE)[:2]
    exclude = fast.Ragged.from_lists([range(r) for r in range(12)])
    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, *exclude), search(x, weight, *exclude))


def test_packed_weights_compile() -> None:
    t = make_inputs(Case(8, 300, 7, 12))
    packed = fast.pack_weights(t.W_enc, t.b_enc)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: fast.linear_topk(x, t.W_enc, t.b_enc, k=7, packed=packed).values,
        lambda x: fast.reconstruct(x, *t[1:], fast.TopK(7), packed=packed),
        lambda x: fast.steer(x, *t[1:], fast.TopK(7), _plan("delta"), packed=packed),
    ]
    for call in calls:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(t.x), call(t.x), rtol=0, atol=0)


def test_strengths_in_a_tensor_keep_one_graph() -> None:
    counter = GraphCounter()
    plan = _plan("delta")
    inputs = make_inputs(CASE)

    @torch.compile(fullgraph=True, backend=counter)
    def steer(strengths: Tensor) -> Tensor:
        return fast.steer(*inputs, fast.TopK(7), plan, strengths=strengths)

    for value in (0.0, 0.5, 3.0):
        strengths = torch.full((3,), value)
        expected = fast.steer(*inputs, fast.TopK(7), plan, strengths=strengths)
        torch.testing.assert_close(steer(strengths), expected, rtol=0, atol=0)
    assert counter.graphs == 1


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
def test_inductor() -> None:
    inputs = make_inputs(CASE)

    @torch.compile(fullgraph=True)
    def serve(x: Tensor) -> Tensor:
        steered = fast.steer(x.sin(), *inputs[1:], fast.TopK(7), _plan("delta"))
        return fast.linear_topk(steered * 2, inputs.W_dec, k=5).values

    with torch.inference_mode():
        steered = fast.steer(inputs.x.sin(), *inputs[1:], fast.TopK(7), _plan("delta"))
        expected = fast.linear_topk(steered * 2, inputs.W_dec, k=5).values
        torch.testing.assert_close(serve(inputs.x), expected)


class Steered(torch.nn.Module):
    def __init__(self, activation, mode: str) -> None:
        super().__init__()
        inputs = make_inputs(CASE)
        self.activation, self.plan = activation, _plan(mode)
        for name in Inputs._fields[1:]:
            self.register_buffer(name, getattr(inputs, name))

    def forward(self, x: Tensor) -> Tensor:
        return fast.steer(x, self.W_enc, self.b_enc, self.b_dec, self.W_dec, self.activation, self.plan)


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_export(activation: str, mode: str) -> None:
    module, x = Steered(ACTIVATIONS[activation], mode), make_inputs(CASE).x
    batch = torch.export.Dim("batch", min=2, max=1000)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}})
    by_features = f"steer_{mode}_{activation}" in BY_FEATURES
    assert _calls_steer(program.graph) != by_features
    for rows in (12, 5):
        x = make_inputs(Case(8, 60, 7, rows), seed=rows).x
        tolerance = 1e-6 if by_features else 0
        torch.testing.assert_close(program.module()(x), module(x), rtol=tolerance, atol=tolerance)


def test_uniform_offsets() -> None:
    assert ops.uniform_offsets(3, 4, torch.device("cpu")).tolist() == [0, 4, 8, 12]
    assert ops.uniform_offsets(0, 4, torch.device("cpu")).tolist() == [0]
