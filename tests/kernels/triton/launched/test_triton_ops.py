"""The other ops: forward, backward, as operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, Case, Inputs, integer_inputs, make_inputs
from helpers import (
    LAYOUTS,
    assert_equal,
    assert_no_worse,
    assert_same_bits,
    assert_same_features,
    decided_rows,
    in_layout,
)
from test_ops import operator_calls
from triton_cases import DEVICE, LARGE_CASES, SMALL_CASES, device, integers, on_device, operators

import saerec_fast as fast
from saerec_fast import ops, reference
from saerec_fast.types.plan import OPS

INF, NAN = float("inf"), float("nan")
CASE = Case(9, 130, 16, 5)
ACTIVATIONS = {
    "relu": fast.ReLU(),
    "jumprelu": fast.JumpReLU(2.0),
    "jumprelu_per_feature": fast.JumpReLU(torch.arange(130) % 4.0),
    "topk": fast.TopK(16),
}


def test_the_backend_is_there_and_named() -> None:
    from saerec_fast.info import info

    assert info()["backends"]["triton"] == ("usable, interpreted on the CPU" if DEVICE == "cpu" else "usable")
    with pytest.raises(ValueError, match=r"'triton' takes float32, bfloat16 and float16, got torch\.float64"):
        device.linear_topk(torch.ones(2, 3).double(), torch.ones(4, 3).double(), k=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["relu", "negative", "per_feature"])
def test_encode_threshold(kind: str, dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(9, 130, 1, 5, dtype))
    threshold = {"relu": 0.0, "negative": -1.5, "per_feature": torch.arange(130) % 5.0 - 1}[kind]
    expected = reference.encode_threshold(*inputs.to(torch.float64)[:4], threshold)
    assert_same_features(device.encode_threshold(*inputs[:4], threshold), expected)
    assert_same_features(
        device.encode_threshold(inputs.x, inputs.W_enc, None, None, threshold),
        reference.encode_threshold(inputs.x.double(), inputs.W_enc.double(), None, None, threshold),
    )


@pytest.mark.parametrize(("d", "n", "rows"), [(1, 1, 1), (15, 17, 3), (16, 16, 2), (129, 65, 70), (3, 5, 0)])
def test_encode_threshold_on_odd_sizes(d: int, n: int, rows: int) -> None:
    inputs = integer_inputs(Case(d, n, 1, rows))
    expected = reference.encode_threshold(*inputs.to(torch.float64)[:4], 1.0)
    assert_same_features(device.encode_threshold(*inputs[:4], 1.0), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_encode_threshold_keeps_nan_visible() -> None:
    inputs = integer_inputs(CASE)
    inputs.x[1, 0], inputs.x[2, 3] = NAN, INF
    expected = reference.encode_threshold(*inputs.to(torch.float64)[:4], 0.5)
    assert_same_features(device.encode_threshold(*inputs[:4], 0.5), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encode_features(dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(9, 130, 1, 5, dtype))
    chosen = torch.tensor([129, 0, 7, 7, 64])
    for threshold in (0.0, torch.arange(130) % 5.0 - 1):
        out = device.encode_features(*inputs[:4], threshold, chosen)
        expected = reference.encode_features(*inputs.to(torch.float64)[:4], threshold, chosen)
        assert_equal(out, expected.to(dtype))
    assert device.encode_features(*inputs[:4], 0.0, chosen[:0]).shape == (5, 0)
    # Inside a graph nobody else looks.
    bad = operators.encode_features(*inputs[:4], torch.tensor([0.0]), torch.tensor([130, 3]))
    assert bad[:, 0].isnan().all()
    assert not bad[:, 1].isnan().any()


@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 17, 300])
def test_decode_sparse(d: int, dtype: torch.dtype, indices_dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, 3, 3, 40])
    indices = torch.cat([torch.tensor([5, 0, 2]), torch.arange(37)]).to(indices_dtype)
    features = fast.SparseFeatures(offsets, indices, integers(40, dtype=dtype), 37, (3,))
    W_dec, b_dec = integers(37, d, seed=1, dtype=dtype), integers(d, seed=2, dtype=dtype)
    exact = features._replace(values=features.values.double())
    expected = reference.decode_sparse(exact, W_dec.double(), b_dec.double())
    assert_equal(device.decode_sparse(features, W_dec, b_dec), expected.to(dtype))
    expected = reference.decode_sparse(exact, W_dec.double(), None)
    assert_equal(device.decode_sparse(features, W_dec, None), expected.to(dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_as_pytorch_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(40, generator=generator), torch.tensor([INF, -INF, NAN, 0.0, 1e-7, 65519.0])])
    values, factors = values.to(dtype), torch.linspace(-3, 3, 97).to(dtype)
    rows = len(values)
    features = fast.SparseFeatures(torch.arange(rows + 1), torch.zeros(rows, dtype=torch.int32), values, 1, (rows,))
    out = device.decode_sparse(features, factors[None], None)
    assert_equal(out, (values.float()[:, None] * factors.float()).to(dtype))


@pytest.mark.parametrize("name", ["topk", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reconstruct(dtype: torch.dtype, name: str) -> None:
    for d in (9, 513) if dtype == torch.float32 else (9,):  # fused, and too wide to be
        inputs = integer_inputs(Case(d, 130, 16, 4, dtype))
        out = device.reconstruct(*inputs, ACTIVATIONS[name])
        assert_equal(out, reference.reconstruct(*inputs.to(torch.float64), ACTIVATIONS[name]).to(dtype))


@pytest.mark.parametrize("name", ["topk", "relu"])
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_reconstruct(case: Case, name: str) -> None:
    inputs, activation = integer_inputs(case), {"topk": fast.TopK(case.k), "relu": fast.ReLU()}[name]
    out = device.reconstruct(*inputs, activation)
    truth = reference.reconstruct(*inputs.to(torch.float64), activation)
    if case.dtype == torch.float32:
        assert_equal(out, truth.float())
    else:  # activations beyond what 16 bits hold exactly
        assert_no_worse(out, reference.reconstruct(*inputs, activation), truth, 2.0)


@pytest.mark.parametrize("case", SMALL_CASES[::4] + LARGE_CASES, ids=str)
def test_reconstruct_is_no_worse_than_pytorch(case: Case) -> None:
    inputs, activation = make_inputs(case), fast.TopK(case.k)
    out = device.reconstruct(*inputs, activation)
    assert out.shape == inputs.x.shape
    assert out.dtype == case.dtype
    if case.rows:
        rows = decided_rows(inputs, activation)
        truth = reference.reconstruct(*inputs.to(torch.float64), activation)
        assert_no_worse(out[rows], reference.reconstruct(*inputs, activation)[rows], truth[rows], 2.0)


def all_edits(n: int) -> list[fast.Edit]:
    """Every op, on the first and the last feature too, one feature edited twice."""
    features = [0, n // 3, n // 2, n // 2, n - 1]
    return [fast.Edit(f, op, value) for f, op, value in zip(features, OPS, (1.5, -0.75, 2.0, 0.5, 0.25), strict=True)]


def check_steer(inputs: Inputs, activation, plan: fast.SteeringPlan, **options) -> torch.Tensor:
    """Equality with the float64 reference, rounded once."""
    out = device.steer(*inputs, activation, plan, **options)
    truth = reference.steer(*inputs.to(torch.float64), activation, plan, **options)
    assert_equal(out, truth.to(out.dtype))
    return out


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_steer(name: str, mode: str) -> None:
    for dtype in DTYPES:
        check_steer(
            integer_inputs(Case(9, 130, 16, 4, dtype)), ACTIVATIONS[name], fast.SteeringPlan(all_edits(130), mode)
        )
    inputs = integer_inputs(Case(9, 130, 16, 4))
    check_steer(inputs, ACTIVATIONS[name], fast.SteeringPlan([fast.Edit(129, "add", 2.0)], mode))
    check_steer(inputs, ACTIVATIONS[name], fast.SteeringPlan([], mode))


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_steer(case: Case) -> None:
    for activation in (fast.ReLU(), fast.TopK(case.k)):
        check_steer(integer_inputs(case), activation, fast.SteeringPlan(all_edits(case.n)))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("name", ["relu", "topk"])
def test_steer_non_finite_rows(name: str, mode: str) -> None:
    inputs = integer_inputs(CASE)
    inputs.x[0], inputs.x[1, 0], inputs.x[2, 3], inputs.x[3, 1] = NAN, NAN, INF, -INF
    for edits in ([fast.Edit(4, "add", 2.0)], [fast.Edit(0, "set", 1.0)], all_edits(130)[:3]):
        check_steer(inputs, ACTIVATIONS[name], fast.SteeringPlan(edits, mode))


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_steered_keep_their_bits(dtype: torch.dtype, mode: str) -> None:
    inputs = make_inputs(Case(9, 130, 16, 6, dtype))
    inputs.x[0], inputs.x[1], inputs.x[4, ::2] = -0.0, NAN, -0.0
    mask = torch.tensor([False, False, True, True, False, True])
    for name in ("relu", "topk"):
        plan = fast.SteeringPlan(all_edits(130), mode, mask)
        out = device.steer(*inputs, ACTIVATIONS[name], plan)
        assert_same_bits(out[~mask], inputs.x[~mask])
        assert (out[mask] != inputs.x[mask]).any()
    finite = inputs._replace(x=inputs.x[[0, 2, 3, 4, 5]])
    nothing = fast.SteeringPlan([fast.Edit(0, "scale", 1.0), fast.Edit(3, "add", 0.0)])
    for plan in (nothing, fast.SteeringPlan()):
        out = device.steer(*finite, ACTIVATIONS["topk"], plan)
        assert_same_bits(out, finite.x)
        assert out.data_ptr() != finite.x.data_ptr()


def test_strengths_per_row() -> None:
    inputs = integer_inputs(Case(8, 130, 16, 6))
    inputs = inputs._replace(x=inputs.x.reshape(2, 3, 8))
    edits = [fast.Edit(3, "add", 1.0), fast.Edit(3, "scale", 1.0), fast.Edit(7, "set", 1.0)]
    for shape in [(3,), (1, 3), (2, 3, 3)]:
        strengths = integers(*shape, low=-3, high=3).double()
        for mode in ("delta", "reconstruct"):
            check_steer(inputs, ACTIVATIONS["topk"], fast.SteeringPlan(edits, mode), strengths=strengths)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout: str) -> None:
    inputs = integer_inputs(CASE)
    moved = in_layout(inputs, layout)
    plan = fast.SteeringPlan(all_edits(130), "reconstruct")
    check_steer(moved, ACTIVATIONS["topk"], plan)
    expected = reference.encode_threshold(*inputs.to(torch.float64)[:4], 1.0)
    assert_same_features(device.encode_threshold(*moved[:4], 1.0), expected)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    inputs = integer_inputs(Case(6, 130, 16, torch.Size(shape).numel()))
    inputs = inputs._replace(x=inputs.x.reshape(*shape, 6))
    for name in ("relu", "topk"):
        for mode in ("delta", "reconstruct"):
            plan = fast.SteeringPlan([fast.Edit(1, "set", 1.0)], mode)
            assert check_steer(inputs, ACTIVATIONS[name], plan).shape == inputs.x.shape
        assert device.reconstruct(*inputs, ACTIVATIONS[name]).shape == inputs.x.shape


# On integers every sum is exact, so that gradients equal those of the float64 reference, rounded once.


def _steer(module, mode: str, name: str) -> Callable[[Inputs], torch.Tensor]:
    plan = fast.SteeringPlan(
        [fast.Edit(3, "scale", 2.0), fast.Edit(5, "add", 1.0), fast.Edit(9, "clamp_min", 1.0)], mode
    )
    return lambda t: module.steer(*t, ACTIVATIONS[name], plan)


def differentiable_ops(module) -> dict[str, Callable[[Inputs], torch.Tensor]]:
    exclude = fast.Ragged.from_lists([range(3 * r) for r in range(5)])

    def decode(t: Inputs) -> torch.Tensor:
        values = t.x.reshape(-1)[:20]
        features = fast.SparseFeatures(torch.tensor([0, 7, 7, 20]), torch.arange(20).int() * 3, values, 70, (3,))
        return module.decode_sparse(features, t.W_dec, t.b_dec)

    return {
        "linear_topk": lambda t: module.linear_topk(*t[:3], k=16, exclude=exclude).values,
        "encode_topk": lambda t: module.encode_topk(*t[:4], k=16).values,
        "encode_threshold": lambda t: module.encode_threshold(*t[:4], 1.0).values,
        "encode_features": lambda t: module.encode_features(*t[:4], 1.0, torch.tensor([9, 0, 69])),
        "decode_sparse": decode,
        "reconstruct_topk": lambda t: module.reconstruct(*t, ACTIVATIONS["topk"]),
        "reconstruct_relu": lambda t: module.reconstruct(*t, ACTIVATIONS["relu"]),
        **{
            f"steer_{mode}_{name}": _steer(module, mode, name)
            for mode in ("delta", "reconstruct")
            for name in ("relu", "topk")
        },
    }


def values_and_gradients(op: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> tuple[torch.Tensor | None, ...]:
    leaves = Inputs(*(tensor.clone().requires_grad_() for tensor in inputs))
    out = op(leaves)
    cotangent = integers(*out.shape, low=-1, high=1, seed=4).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent, allow_unused=True)


def check_gradients(name: str, module, dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(9, 70, 16, 5, dtype))
    actual = values_and_gradients(differentiable_ops(module)[name], inputs)
    expected = values_and_gradients(differentiable_ops(reference)[name], inputs.to(torch.float64))
    for field, a, e in zip(("out", *Inputs._fields), actual, expected, strict=True):
        if e is None or a is None:
            assert a is None or not a.any(), field
            assert e is None or not e.any(), field
            continue
        # In 16 bits what passes between two kernels is rounded there, on the way back as in eager PyTorch.
        tolerance = 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * float(e.abs().max())
        torch.testing.assert_close(a, e.to(dtype), rtol=0, atol=tolerance, msg=lambda text, f=field: f"{f}: {text}")


# In bfloat16 one of each kind of gradient.
GRADIENTS = [(name, torch.float32) for name in differentiable_ops(reference)]
GRADIENTS += [(name, torch.bfloat16) for name in ("linear_topk", "encode_features", "reconstruct_relu")]


@pytest.mark.parametrize(("name", "dtype"), GRADIENTS, ids=str)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    check_gradients(name, device, dtype)


def test_repeated_features_add_up_in_one_order() -> None:
    offsets = torch.arange(71) * 3
    indices = torch.tensor([4, -1, 4]).repeat(70)
    coefficients, rows = torch.randn(210), torch.randn(70, 150)
    out, sums = operators.sparse_weight_gradient(offsets, indices, coefficients, rows, None, 6)
    kept = coefficients.double().view(70, 3)[:, [0, 2]].sum(1)
    torch.testing.assert_close(out[4].double(), kept @ rows.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[4].double(), kept.sum(), rtol=1e-5, atol=1e-5)
    assert not out[[0, 1, 2, 3, 5]].any()
    dots = operators.sparse_dot(offsets, indices, rows, torch.randn(6, 150))
    assert not dots[1::3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step(dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(9, 40, 1, 6, dtype))
    features = device.encode_threshold(*inputs[:4], 1.0)
    args = (inputs.x, features.offsets, features.indices, features.values, inputs.W_enc, inputs.W_dec, inputs.b_dec)
    actual = operators.sparse_training_step(*args, 0.5, 0.25)
    exact = (arg.double() if arg.is_floating_point() else arg for arg in args)
    for a, e in zip(actual, reference.sparse_training_step(*exact, 0.5, 0.25), strict=True):
        assert_equal(a, e.to(a.dtype))
    for a, e in zip(
        operators.largest_entries(features.offsets, features.values, 11),
        reference.largest_entries(features.offsets, features.values, 11),
        strict=True,
    ):
        assert_equal(a, e)


def test_the_operators_of_all_backends_agree() -> None:
    assert {name.split()[0] for name in operator_calls()} == set(ops._SCHEMAS)
    for name in ops._SCHEMAS:
        schemas = {str(getattr(getattr(torch.ops, ns), name).default._schema) for ns in ops.NAMESPACES.values()}
        assert len({schema.partition("::")[2] for schema in schemas}) == 1


# One call of each operator.
@pytest.mark.parametrize("name", {name.split()[0]: name for name in operator_calls()}.values())
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the guarded outputs are no fakes
    operator = getattr(ops.operators_of("triton"), name.split()[0]).default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    on_device(lambda *args: torch.library.opcheck(operator, args, test_utils=checks), *operator_calls()[name])


def test_a_backward_pass_stays_on_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from saerec_fast.kernels import cpu

    monkeypatch.setattr(cpu._C, "decode_sparse", None)
    leaves = Inputs(*(tensor.requires_grad_() for tensor in integer_inputs(CASE)))
    device.reconstruct(*leaves, ACTIVATIONS["topk"]).sum().backward()
    assert leaves.x.grad is not None
