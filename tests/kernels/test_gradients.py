"""Gradients against autograd through the float64 reference: at most three times the error of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, Case, Inputs, make_inputs
from helpers import assert_no_worse, assert_same_bits, decided_rows, in_layout, torch_threads

import saerec_fast as fast
from saerec_fast import reference
from saerec_fast.types.plan import OPS

pytestmark = pytest.mark.usefixtures("isa")

K = 9
EXCLUDE = fast.Ragged.from_lists([range(r % 40) for r in range(140)])


def _plan(mode: str, *ops: str) -> fast.SteeringPlan:
    features = {"set": 0, "add": 3, "scale": 7, "clamp_min": 40, "clamp_max": 41}
    values = {"set": 0.8, "add": -0.5, "scale": 2.0, "clamp_min": 0.3, "clamp_max": 0.6}
    return fast.SteeringPlan([fast.Edit(features[op], op, values[op]) for op in ops], mode=mode)


def _steer(module, activation, plan, **options) -> Callable[[Inputs, torch.Tensor], torch.Tensor]:
    def op(t: Inputs, strengths: torch.Tensor) -> torch.Tensor:
        return module.steer(*t, activation, plan, strengths=strengths, **options)

    return op


def _decode(module, t: Inputs, values: torch.Tensor) -> torch.Tensor:
    features = fast.SparseFeatures(_OFFSETS, _INDICES, values.reshape(-1), t.W_dec.shape[0], (t.x.shape[0],))
    return module.decode_sparse(features, t.W_dec, t.b_dec)


_COUNTS = torch.arange(140) % 7
_OFFSETS = torch.cat([torch.zeros(1, dtype=torch.int64), _COUNTS.cumsum(0)])
_INDICES = torch.cat([(torch.arange(count) * 11 + row) % 70 for row, count in enumerate(_COUNTS.tolist())]).int()

CHOSEN = torch.tensor([69, 0, 7, 7, 33])  # one feature twice
MASK = torch.arange(140) % 3 != 0


def ops(module) -> dict[str, Callable[[Inputs, torch.Tensor], torch.Tensor]]:
    """Every op as a function of the inputs and one more tensor (strengths, or values to decode)."""
    table = {
        "linear_topk": lambda t, _: _dense(module.linear_topk(*t[:3], k=K), 70),
        "linear_topk_exclude": lambda t, _: _dense(module.linear_topk(*t[:3], k=K, exclude=EXCLUDE), 70),
        "encode_topk": lambda t, _: module.encode_topk(*t[:4], k=K).dense(),
        "encode_topk_all": lambda t, _: module.encode_topk(*t[:4], k=70).dense(),
        "encode_threshold": lambda t, _: module.encode_threshold(*t[:4], 0.4).dense(),
        "decode_sparse": lambda t, values: _decode(module, t, values),
        "encode_features": lambda t, _: module.encode_features(*t[:4], 0.4, CHOSEN),
        "reconstruct": lambda t, _: module.reconstruct(*t, fast.TopK(K)),
        "reconstruct_relu": lambda t, _: module.reconstruct(*t, fast.ReLU()),
        "reconstruct_jumprelu": lambda t, _: module.reconstruct(*t, fast.JumpReLU(0.4)),
        "autoencoder": lambda t, _: module.decode_sparse(module.encode_topk(*t[:4], k=K), t.W_dec, t.b_dec),
    }
    for mode in ("delta", "reconstruct"):
        for name, activation in ACTIVATIONS.items():
            table[f"steer_{mode}_{name}"] = _steer(module, activation, _plan(mode, *OPS))
        table[f"steer_{mode}_add"] = _steer(module, fast.TopK(K), _plan(mode, "add"))
        table[f"steer_{mode}_masked"] = _steer(module, fast.ReLU(), _plan(mode, "set", "scale"), valid=MASK)
    return table


ACTIVATIONS = {"relu": fast.ReLU(), "jumprelu": fast.JumpReLU(0.4), "topk": fast.TopK(K)}


def _dense(top: fast.TopKResult, n: int) -> torch.Tensor:
    # Padding (-inf, -1) takes no part in anything that is differentiated.
    values = top.values.masked_fill(top.indices < 0, 0)
    return values.new_zeros(*values.shape[:-1], n).scatter_add(-1, top.indices.clamp(min=0), values)


def extra_tensor(name: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if name == "decode_sparse":
        return torch.randn(len(_INDICES), generator=generator).to(dtype)
    edits = {"add": 1, "masked": 2}.get(name.rsplit("_", 1)[-1], len(OPS))
    return torch.rand(140, edits, generator=generator).to(dtype)


def gradients(op, inputs: Inputs, extra: torch.Tensor) -> dict[str, torch.Tensor | None]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*inputs, extra)]
    out = op(Inputs(*leaves[:5]), leaves[5])
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(out.shape, generator=generator).to(inputs.x.dtype).to(out.dtype)
    out.backward(cotangent)
    return dict(zip((*Inputs._fields, "extra"), (leaf.grad for leaf in leaves), strict=True))


def decided_inputs(dtype: torch.dtype) -> Inputs:
    """140 rows (two chunks) whose active sets no rounding of scores can change, so that all have one gradient."""
    inputs = make_inputs(Case(17, 70, K, 400, dtype), seed=1)
    no_shift = inputs._replace(b_dec=torch.zeros_like(inputs.b_dec))
    decided = decided_rows(no_shift, fast.TopK(K))
    for activation in ACTIVATIONS.values():
        decided &= decided_rows(inputs, activation)
    assert decided.sum() >= 140
    return inputs._replace(x=inputs.x[decided][:140])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ops(fast))
def test_gradients(name: str, dtype: torch.dtype) -> None:
    inputs, extra = decided_inputs(dtype), extra_tensor(name, dtype)
    actual = gradients(ops(fast)[name], inputs, extra)
    plain = gradients(ops(reference)[name], inputs, extra)
    truth = gradients(ops(reference)[name], inputs.to(torch.float64), extra.double())
    assert any(grad is not None for grad in truth.values())
    for leaf, expected in truth.items():
        if expected is None or not expected.any():
            assert actual[leaf] is None or not actual[leaf].any(), leaf
            continue
        assert actual[leaf] is not None, leaf
        assert actual[leaf].dtype == dtype
        assert_no_worse(actual[leaf], plain[leaf], expected, factor=3)


@pytest.mark.parametrize("name", ops(fast))
def test_threads_do_not_change_bits(name: str) -> None:
    inputs, extra = decided_inputs(torch.float32), extra_tensor(name, torch.float32)
    alone = gradients(ops(fast)[name], inputs, extra)
    with torch_threads(3):
        together = gradients(ops(fast)[name], inputs, extra)
    for leaf, grad in alone.items():
        if grad is not None and leaf != "b_dec":  # summed over rows by PyTorch
            assert_same_bits(together[leaf], grad)


SCREENED: dict[str, Callable[..., torch.Tensor]] = {
    "linear_topk": lambda module, t, **o: _dense(module.linear_topk(*t[:3], k=K, **o), 300),
    "encode_topk": lambda module, t, **o: module.encode_topk(*t[:4], k=K, **o).dense(),
    "encode_threshold": lambda module, t, **o: module.encode_threshold(*t[:4], 0.4, **o).dense(),
    "reconstruct_topk": lambda module, t, **o: module.reconstruct(*t, fast.TopK(K), **o),
    "reconstruct_jumprelu": lambda module, t, **o: module.reconstruct(*t, fast.JumpReLU(0.4), **o),
    "steer_topk": lambda module, t, **o: module.steer(*t, fast.TopK(K), _plan("delta", "set", "scale"), **o),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCREENED)
def test_gradients_where_scores_are_screened(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(17, 300, K, 200, dtype), seed=1)
    no_shift = inputs._replace(b_dec=torch.zeros_like(inputs.b_dec))
    decided = decided_rows(no_shift, fast.TopK(K)) & decided_rows(inputs, fast.TopK(K))
    decided &= decided_rows(inputs, fast.JumpReLU(0.4))
    assert decided.sum() >= 40
    inputs, extra = inputs._replace(x=inputs.x[decided][:40]), torch.zeros(1)

    def packed(t: Inputs, _: torch.Tensor) -> torch.Tensor:
        return SCREENED[name](fast, t, packed=fast.pack_weights(t.W_enc, t.b_enc))

    actual = gradients(packed, inputs, extra)
    on_the_fly = gradients(lambda t, _: SCREENED[name](fast, t), inputs, extra)
    plain = gradients(lambda t, _: SCREENED[name](reference, t), inputs, extra)
    truth = gradients(lambda t, _: SCREENED[name](reference, t), inputs.to(torch.float64), extra)
    for leaf, expected in truth.items():
        if expected is None:
            assert actual[leaf] is None, leaf
            continue
        assert_no_worse(actual[leaf], plain[leaf], expected, factor=3)
        assert_same_bits(on_the_fly[leaf], actual[leaf])


def test_large_batches_sum_in_row_order_on_every_number_of_threads() -> None:
    inputs = make_inputs(Case(64, 300, 32, 1500))
    results = []
    for threads in (1, 3):
        with torch_threads(threads):
            results.append(gradients(ops(fast)["autoencoder"], inputs._replace(W_dec=inputs.W_dec), inputs.b_dec))
    for leaf in ("x", "W_enc", "b_enc", "W_dec"):
        assert_same_bits(results[1][leaf], results[0][leaf])


def test_long_sums_are_no_worse_than_a_matmul() -> None:
    # One feature that every row uses: its gradient is a sum over all rows.
    inputs = make_inputs(Case(33, 20, 20, 4000))

    def autoencoder(module):
        return lambda t, _: module.decode_sparse(module.encode_topk(*t[:4], k=20), t.W_dec, t.b_dec)

    actual = gradients(autoencoder(fast), inputs, inputs.b_dec)
    plain = gradients(autoencoder(reference), inputs, inputs.b_dec)
    truth = gradients(autoencoder(reference), inputs.to(torch.float64), inputs.b_dec.double())
    for leaf in Inputs._fields:
        assert_no_worse(actual[leaf], plain[leaf], truth[leaf], factor=3)


@pytest.mark.parametrize("layout", ["transposed", "strided_rows", "strided_columns", "unaligned"])
def test_memory_layouts(layout: str) -> None:
    inputs = decided_inputs(torch.float32)
    for name in ("linear_topk", "autoencoder", "encode_threshold", "steer_delta_topk", "steer_reconstruct_relu"):
        op, extra = ops(fast)[name], extra_tensor(name, torch.float32)
        expected = gradients(op, inputs, extra)
        leaves = [tensor.requires_grad_() for tensor in in_layout(inputs, layout)]
        out = op(Inputs(*leaves), extra)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        grads = torch.autograd.grad(out, leaves, cotangent.T.contiguous().T, allow_unused=True)
        for leaf, grad in zip(Inputs._fields, grads, strict=True):
            if grad is not None:
                torch.testing.assert_close(grad, expected[leaf], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["linear_topk", "encode_topk", "encode_threshold", "encode_features", "reconstruct", "steer_reconstruct_relu"],
)
@pytest.mark.parametrize("shape", [(), (3, 5), (2, 0, 3)])
def test_leading_shapes_and_expanded_gradients(shape: tuple[int, ...], name: str) -> None:
    inputs = make_inputs(Case(6, 70, K, torch.Size(shape).numel()))
    x = inputs.x.reshape(*shape, 6)

    def grads(module, dtype):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, *inputs[1:])]
        strengths = torch.ones(len(OPS), dtype=dtype)
        # .sum() hands an expanded scalar to the backward.
        ops(module)[name](Inputs(*leaves), strengths).sum().backward()
        return [leaf.grad for leaf in leaves]

    for grad, expected in zip(grads(fast, torch.float32), grads(reference, torch.float64), strict=True):
        if expected is None:
            assert grad is None
        else:
            torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leaf", range(5))
@pytest.mark.parametrize(
    "name",
    [
        "linear_topk",
        "encode_topk",
        "encode_threshold",
        "encode_features",
        "autoencoder",
        "reconstruct",
        "steer_reconstruct_topk",
    ],
)
def test_each_input_alone(name: str, leaf: int) -> None:
    inputs, extra = decided_inputs(torch.float32), extra_tensor(name, torch.float32)
    expected = gradients(ops(fast)[name], inputs, extra)[Inputs._fields[leaf]]
    tensors = [tensor.detach().clone().requires_grad_(i == leaf) for i, tensor in enumerate(inputs)]
    out = ops(fast)[name](Inputs(*tensors), extra)
    assert out.requires_grad == (expected is not None)
    if expected is not None:
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
        torch.testing.assert_close(tensors[leaf].grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["linear_topk", "encode_topk", "encode_threshold", "steer_reconstruct_topk", "steer_delta_relu"]
)
def test_non_finite_rows(name: str) -> None:
    inputs = decided_inputs(torch.float32)
    inputs.x[3], inputs.x[5, 0] = float("nan"), float("inf")
    extra = extra_tensor(name, torch.float32)
    actual = gradients(ops(fast)[name], inputs, extra)
    expected = gradients(ops(reference)[name], inputs.to(torch.float64), extra.double())
    for leaf in ("x", "b_enc", "extra"):
        if expected[leaf] is not None:
            torch.testing.assert_close(
                actual[leaf].double(),
                expected[leaf],
                rtol=1e-4,
                atol=1e-4,
                equal_nan=True,
            )


def test_no_gradient_is_recorded_without_need() -> None:
    inputs = make_inputs(Case(8, 30, 5, 4))
    assert not fast.linear_topk(*inputs[:3], k=5).values.requires_grad
    x = inputs.x.clone().requires_grad_()
    with torch.no_grad():
        assert not fast.linear_topk(x, *inputs[1:3], k=5).values.requires_grad
    result = fast.linear_topk(x, *inputs[1:3], k=5)
    assert result.values.requires_grad
    assert not result.indices.requires_grad


@pytest.mark.parametrize("name", ops(fast))
def test_second_derivatives_are_refused(name: str) -> None:
    inputs, extra = decided_inputs(torch.float32), extra_tensor(name, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (*inputs, extra)]
    out = ops(fast)[name](Inputs(*leaves[:5]), leaves[5])
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True, allow_unused=True)
    if name != "steer_delta_add":  # an addition: its second derivative is 0
        with pytest.raises(RuntimeError, match="differentiate twice"):
            sum(grad.square().sum() for grad in grads if grad is not None).backward()


@pytest.mark.parametrize(("op", "neutral"), [("add", 0.0), ("scale", 1.0)])
@pytest.mark.parametrize("activation", [fast.ReLU(), fast.TopK(20)], ids=["relu", "topk"])
def test_strengths_learn_from_neutral_values(op: str, neutral: float, activation: fast.ReLU | fast.TopK) -> None:
    """At strengths that change nothing the state is the same bits, but its gradient is that of any other strength."""
    inputs = make_inputs(Case(d=16, n=40, k=5, rows=20))
    plan = fast.SteeringPlan([fast.Edit(3, op, neutral)])
    grads = []
    for steer, dtype in ((fast.steer, torch.float32), (reference.steer, torch.float64)):
        strengths = torch.tensor([neutral], dtype=dtype, requires_grad=True)
        steered = steer(*inputs.to(dtype), activation, plan, strengths=strengths)
        steered.square().sum().backward()
        grads.append(strengths.grad.double())
    assert grads[1].abs() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
