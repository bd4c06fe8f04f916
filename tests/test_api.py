"""Arguments, backends and what comes back; numbers are compared in tests/kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, Case, make_inputs
from torch import Tensor

import saerec_fast as fast
from saerec_fast import backend as backends
from saerec_fast import ops, reference
from saerec_fast.kernels import cuda

CASE = Case(8, 20, 5, 6)
X, W_ENC, B_ENC, B_DEC, W_DEC = make_inputs(CASE)
PLAN = fast.SteeringPlan([fast.Edit(3, "add", 1.0), fast.Edit(4, "set", 2.0)])
FEATURES = fast.encode_topk(X, W_ENC, B_ENC, B_DEC, k=5)
RELU = fast.ReLU()


def topk(x: Any = X, weight: Any = W_ENC, bias: Any = B_ENC, **options: Any) -> Any:
    return fast.linear_topk(x, weight, bias, **{"k": 5, **options})


def encode(x: Any = X, W_enc: Any = W_ENC, b_enc: Any = B_ENC, b_dec: Any = B_DEC, **options: Any) -> Any:
    return fast.encode_topk(x, W_enc, b_enc, b_dec, **{"k": 5, **options})


def threshold(x: Any = X, value: Any = 0.0, W_enc: Any = W_ENC) -> Any:
    return fast.encode_threshold(x, W_enc, B_ENC, B_DEC, value)


def chosen(features: Any, value: Any = 0.0) -> Any:
    return fast.encode_features(X, W_ENC, B_ENC, B_DEC, value, features)


def decode(features: Any = FEATURES, W_dec: Any = W_DEC, b_dec: Any = B_DEC) -> Any:
    return fast.decode_sparse(features, W_dec, b_dec)


def steer(plan: Any = PLAN, activation: Any = RELU, x: Any = X, W_dec: Any = W_DEC, **options: Any) -> Any:
    return fast.steer(x, W_ENC, B_ENC, B_DEC, W_dec, activation, plan, **options)


META = torch.empty(20, 8, device="meta")
OTHER, UNBIASED = fast.pack_weights(W_ENC[:19]), fast.pack_weights(W_ENC)
LAST = fast.SteeringPlan([fast.Edit(0, "add", 1.0)], positions="last")

# Each entry: the call, the type of the error, what its message must say (argument, expected, got).
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "x list": (lambda: topk([1.0]), TypeError, ["x:", "tensor", "list"]),
    "x integers": (lambda: topk(torch.ones(2, 8, dtype=torch.int64)), TypeError, ["x:", "floating", "int64"]),
    "x scalar": (lambda: topk(torch.tensor(1.0)), ValueError, ["x:", "(..., d)", "scalar"]),
    "weight list": (lambda: topk(weight=[[1.0]]), TypeError, ["weight:", "tensor", "list"]),
    "weight width": (lambda: topk(weight=torch.ones(20, 7)), ValueError, ["weight:", "(n, 8)", "(20, 7)"]),
    "weight vector": (lambda: topk(weight=torch.ones(8)), ValueError, ["weight:", "(n, 8)", "(8,)"]),
    "weight empty": (lambda: topk(weight=torch.ones(0, 8)), ValueError, ["weight:", "empty", "(0, 8)"]),
    "weight dtype": (lambda: topk(weight=W_ENC.double()), TypeError, ["weight:", "float32", "float64"]),
    "weight device": (lambda: topk(weight=META), ValueError, ["weight:", "cpu", "meta"]),
    "bias type": (lambda: topk(bias=0.5), TypeError, ["bias:", "(20,)", "float"]),
    "bias shape": (lambda: topk(bias=torch.ones(8)), ValueError, ["bias:", "(20,)", "(8,)"]),
    "bias dtype": (lambda: topk(bias=B_ENC.half()), TypeError, ["bias:", "float32", "float16"]),
    "k zero": (lambda: topk(k=0), ValueError, ["k:", "1 <= k <= 20", "got 0"]),
    "k negative": (lambda: encode(k=-3), ValueError, ["k:", "1 <= k <= 20", "got -3"]),
    "k large": (lambda: encode(k=21), ValueError, ["k:", "1 <= k <= 20", "got 21"]),
    "k float": (lambda: topk(k=5.0), TypeError, ["k:", "integer", "float"]),
    "k bool": (lambda: topk(k=True), TypeError, ["k:", "integer", "bool"]),
    "k of an activation": (lambda: steer(activation=fast.TopK(21)), ValueError, ["k:", "1 <= k <= 20", "21"]),
    "exclude rows": (lambda: topk(exclude=[[1]]), ValueError, ["exclude:", "6 rows", "got 1"]),
    "exclude high": (lambda: topk(exclude=[[20]] * 6), ValueError, ["exclude:", "0 to 19", "20"]),
    "exclude low": (lambda: topk(exclude=[[-1]] * 6), ValueError, ["exclude:", "0 to 19", "-1"]),
    "exclude floats": (lambda: topk(exclude=[[1.5]] * 6), TypeError, ["ids:", "integer"]),
    "exclude float tensor": (
        lambda: topk(exclude=[torch.tensor([1.5])] * 6),
        TypeError,
        ["ids:", "integer", "float32"],
    ),
    "exclude falls": (
        lambda: topk(exclude=fast.Ragged(torch.tensor([0, 2, 1, 2, 2, 2, 2]), torch.tensor([1, 2]))),
        ValueError,
        ["exclude:", "rise"],
    ),
    "exclude short": (
        lambda: topk(exclude=fast.Ragged(torch.tensor([0, 1, 1, 1, 1, 1, 1]), torch.tensor([1, 2]))),
        ValueError,
        ["exclude:", "from 0 to 2"],
    ),
    "W_enc width": (lambda: encode(W_enc=torch.ones(20, 9)), ValueError, ["W_enc:", "(n, 8)", "(20, 9)"]),
    "b_enc shape": (lambda: encode(b_enc=torch.ones(19)), ValueError, ["b_enc:", "(20,)", "(19,)"]),
    "b_dec shape": (lambda: encode(b_dec=torch.ones(20)), ValueError, ["b_dec:", "(8,)", "(20,)"]),
    "b_dec dtype": (lambda: encode(b_dec=B_DEC.double()), TypeError, ["b_dec:", "float32", "float64"]),
    "threshold shape": (lambda: threshold(value=torch.ones(8)), ValueError, ["threshold:", "(20,)", "(8,)"]),
    "threshold matrix": (lambda: threshold(value=torch.ones(2, 20)), ValueError, ["threshold:", "(20,)", "(2, 20)"]),
    "threshold device": (lambda: threshold(value=META[:, 0]), ValueError, ["threshold:", "cpu", "meta"]),
    "threshold text": (lambda: threshold(value="high"), TypeError, ["threshold:", "number", "str"]),
    "features floats": (lambda: chosen(torch.ones(2)), ValueError, ["features:", "integer", "float32"]),
    "features matrix": (lambda: chosen(torch.ones(2, 2).int()), ValueError, ["features:", "(m,)", "(2, 2)"]),
    "features high": (lambda: chosen(torch.tensor([20])), ValueError, ["features:", "0 to 19", "20"]),
    "features low": (lambda: chosen(torch.tensor([3, -1])), ValueError, ["features:", "0 to 19", "-1"]),
    "features list": (lambda: chosen([1]), TypeError, ["features:", "tensor", "list"]),
    "packed type": (lambda: topk(packed=W_ENC), TypeError, ["packed:", "PackedWeights", "Tensor"]),
    "packed shape": (lambda: topk(packed=OTHER), ValueError, ["packed:", "(20, 8)", "(19, 8)"]),
    "packed tensor": (lambda: encode(packed=UNBIASED), ValueError, ["packed:", "bias", "pack them again"]),
    "sparse type": (lambda: decode(features=X), TypeError, ["features:", "SparseFeatures", "Tensor"]),
    "sparse dtype": (lambda: decode(W_dec=W_DEC.half(), b_dec=None), TypeError, ["features:", "float16", "float32"]),
    "W_dec rows": (lambda: decode(W_dec=torch.ones(21, 8)), ValueError, ["W_dec:", "(20, d)", "(21, 8)"]),
    "W_dec vector": (lambda: decode(W_dec=torch.ones(20)), ValueError, ["W_dec:", "(20, d)", "(20,)"]),
    "W_dec b_dec": (lambda: decode(b_dec=torch.ones(20)), ValueError, ["b_dec:", "(8,)", "(20,)"]),
    "W_dec not like W_enc": (lambda: steer(W_dec=torch.ones(19, 8)), ValueError, ["W_dec:", "(20, 8)", "(19, 8)"]),
    "plan type": (lambda: steer([PLAN]), TypeError, ["plan:", "SteeringPlan", "list"]),
    "plan feature": (
        lambda: steer(fast.SteeringPlan([fast.Edit(20, "add", 1.0)])),
        ValueError,
        ["plan:", "0 to 19", "20"],
    ),
    "activation type": (lambda: steer(activation="relu"), TypeError, ["activation:", "ReLU", "str"]),
    "activation untrained": (lambda: steer(activation=fast.BatchTopK(3)), ValueError, ["activation:", "threshold"]),
    "activation threshold": (
        lambda: steer(activation=fast.JumpReLU(torch.ones(19))),
        ValueError,
        ["threshold:", "(20,)", "(19,)"],
    ),
    "strengths type": (lambda: steer(strengths=[1.0, 2.0]), TypeError, ["strengths:", "tensor", "list"]),
    "strengths integers": (
        lambda: steer(strengths=torch.ones(2).int()),
        TypeError,
        ["strengths:", "floating", "int32"],
    ),
    "strengths number": (lambda: steer(strengths=torch.ones(3)), ValueError, ["strengths:", "(..., 2)", "(3,)"]),
    "strengths scalar": (lambda: steer(strengths=torch.tensor(1.0)), ValueError, ["strengths:", "(..., 2)", "()"]),
    "strengths rows": (lambda: steer(strengths=torch.ones(5, 2)), ValueError, ["strengths:", "(6, 2)", "(5, 2)"]),
    "strengths batch": (
        lambda: steer(strengths=torch.ones(3, 6, 2)),
        ValueError,
        ["strengths:", "(6, 2)", "(3, 6, 2)"],
    ),
    "strengths device": (lambda: steer(strengths=META[:2, 0]), ValueError, ["strengths:", "cpu", "meta"]),
    "valid shape": (lambda: steer(valid=torch.ones(5, dtype=torch.bool)), ValueError, ["valid:", "(6,)", "(5,)"]),
    "valid dtype": (lambda: steer(valid=torch.ones(6)), TypeError, ["valid:", "bool", "float32"]),
    "valid type": (lambda: steer(valid=[True] * 6), TypeError, ["valid:", "bool", "list"]),
    "positions shape": (
        lambda: steer(fast.SteeringPlan(positions=torch.ones(5, dtype=torch.bool))),
        ValueError,
        ["positions:", "(6,)", "(5,)"],
    ),
    "positions last": (lambda: steer(LAST, x=X[0]), ValueError, ["positions:", "length", "(d,)"]),
    "backend unknown": (lambda: topk(backend="gpu"), ValueError, ["backend:", "cpu", "reference", "'gpu'"]),
    "backend absent": (lambda: topk(backend="triton"), ValueError, ["backend:", "'triton'", "usable:", "reference"]),
    "backend float64": (
        lambda: fast.linear_topk(X.double(), W_ENC.double(), k=2, backend="cpu"),
        ValueError,
        ["backend:", "'cpu'", "float64", "reference"],
    ),
    "backend device": (
        lambda: fast.linear_topk(META, META, k=2, backend="cpu"),
        ValueError,
        ["backend:", "'cpu'", "meta"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str) -> None:
    call, error, words = MISTAKES[mistake]
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("name", ["valid dtype", "valid shape", "positions last", "plan feature"])
def test_the_reference_backend_checks_alike(name: str) -> None:
    if name == "positions last":
        options: dict[str, Any] = {"plan": LAST, "x": X[0]}
    elif name == "plan feature":
        options = {"plan": fast.SteeringPlan([fast.Edit(20, "add", 1.0)])}
    else:
        options = {"valid": torch.ones(6) if name == "valid dtype" else torch.ones(5, dtype=torch.bool)}
    with pytest.raises(MISTAKES[name][1]):
        steer(backend="reference", **options)


def test_backends() -> None:
    assert set(backends.available_backends()) == set(backends.BACKENDS) - {"auto"}
    assert backends.available_backends()["reference"] == ""
    assert backends.resolve("auto", X) == "cpu"
    assert backends.resolve("auto", X.double()) == "reference"
    assert backends.resolve("auto", META) == "reference"
    for name in ("cpu", "reference"):
        assert backends.resolve(name, X) == name
    assert backends.choose("cuda") == "reference"


@pytest.mark.parametrize(
    ("rows", "problem", "taken"), [(6, "", "cuda"), (6, "k: too large", "triton"), (300, "", "triton")]
)
def test_small_batches_go_to_the_cuda_kernel_if_it_takes_them(
    rows: int, problem: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(cuda, "supports", lambda *args: asked.append(args) or problem)
    monkeypatch.setattr(cuda, "steer", lambda *args: "cuda")
    monkeypatch.setattr(ops, "_triton", lambda name: lambda *args: "triton")
    arguments = (torch.zeros(rows, 8), W_ENC, B_ENC, B_DEC, W_DEC, None, 3, False, [1], [0])
    assert ops._cuda_steer(*arguments, torch.zeros(1), None, None) == taken
    assert asked in ([], [arguments])


def test_without_the_extension_auto_falls_back_and_cpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_extension_problem", "it is gone")
    assert topk().indices.shape == (6, 5)
    with pytest.raises(ValueError, match="it is gone"):
        topk(backend="cpu")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_results(backend: str, dtype: torch.dtype) -> None:
    x, W_enc, b_enc, b_dec, W_dec = (tensor.to(dtype) for tensor in (X.view(2, 3, 8), W_ENC, B_ENC, B_DEC, W_DEC))
    top = fast.linear_topk(x, W_enc, b_enc, k=5, exclude=[[0]] * 6, backend=backend)
    assert isinstance(top, fast.TopKResult)
    assert (top.values.shape, top.values.dtype) == ((2, 3, 5), dtype)
    assert (top.indices.shape, top.indices.dtype) == ((2, 3, 5), torch.int64)
    for features in (
        fast.encode_topk(x, W_enc, b_enc, b_dec, k=5, backend=backend),
        fast.encode_threshold(x, W_enc, b_enc, b_dec, 0.5, backend=backend),
    ):
        assert isinstance(features, fast.SparseFeatures)
        assert (features.n_features, features.batch_shape, features.n_rows) == (20, (2, 3), 6)
        assert (features.offsets.shape, features.offsets.dtype) == ((7,), torch.int64)
        assert (features.indices.dtype, features.values.dtype) == (torch.int32, dtype)
        assert features.indices.shape == features.values.shape == (int(features.offsets[-1]),)
        dense = features.dense()
        assert (dense.shape, dense.dtype) == ((2, 3, 20), dtype)
        torch.testing.assert_close(features.to_sparse_csr().to_dense(), dense.view(6, 20))
        decoded = fast.decode_sparse(features, W_dec, b_dec, backend=backend)
        assert (decoded.shape, decoded.dtype) == ((2, 3, 8), dtype)
    columns = fast.encode_features(x, W_enc, b_enc, b_dec, 0.5, torch.tensor([19, 0]), backend=backend)
    assert (columns.shape, columns.dtype) == ((2, 3, 2), dtype)
    for activation in (fast.ReLU(), fast.TopK(5), fast.BatchTopK(5, 0.3)):
        steered = fast.steer(x, W_enc, b_enc, b_dec, W_dec, activation, PLAN, backend=backend)
        assert (steered.shape, steered.dtype) == ((2, 3, 8), dtype)
        rebuilt = fast.reconstruct(x, W_enc, b_enc, b_dec, W_dec, activation, backend=backend)
        assert (rebuilt.shape, rebuilt.dtype) == ((2, 3, 8), dtype)


def test_float64_is_the_reference_to_the_bit() -> None:
    inputs = [tensor.double() for tensor in (X, W_ENC, B_ENC, B_DEC, W_DEC)]
    assert torch.equal(fast.steer(*inputs, RELU, PLAN), reference.steer(*inputs, RELU, PLAN))
    top, expected = fast.linear_topk(*inputs[:3], k=5), reference.linear_topk(*inputs[:3], k=5)
    assert torch.equal(top.values, expected.values)
    assert torch.equal(top.indices, expected.indices)


CALLS: dict[str, Callable[[], Any]] = {
    "linear_topk": topk,
    "linear_topk_exclude": lambda: topk(exclude=[[1, 2]] * 6),
    "encode_topk": encode,
    "encode_threshold": threshold,
    "decode_sparse": decode,
    "steer_delta": steer,
    "steer_topk": lambda: steer(activation=fast.TopK(5)),
    "encode_features": lambda: chosen(torch.tensor([3, 0, 3])),
    "reconstruct": lambda: fast.reconstruct(X, W_ENC, B_ENC, B_DEC, W_DEC, RELU),
}


@pytest.mark.parametrize("name", CALLS)
def test_inference_mode_gives_the_same(name: str) -> None:
    normal = CALLS[name]()
    with torch.inference_mode():
        direct = CALLS[name]()
    if isinstance(normal, Tensor):
        normal, direct = (normal,), (direct,)
    for a, b in zip(normal, direct, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        if isinstance(b, Tensor) and b.is_floating_point():
            assert b.is_inference()


def test_exclude_takes_ragged_lists_ranges_and_tensors() -> None:
    rows = [[3, 1], [], [0], [5, 5], [19], [7]]
    expected = topk(exclude=rows).indices
    for form in (
        fast.Ragged.from_lists(rows),
        fast.Ragged(*(part.int() for part in fast.Ragged.from_lists(rows))),
        [torch.tensor(row, dtype=torch.int32) for row in rows],
        tuple(map(tuple, rows)),
    ):
        assert torch.equal(topk(exclude=form).indices, expected)
    assert topk(X[:0], exclude=[]).indices.shape == (0, 5)


def test_public_names() -> None:
    assert all(hasattr(fast, name) for name in fast.__all__)
    for name in ("linear_topk", "encode_topk", "encode_threshold", "decode_sparse", "reconstruct", "steer"):
        assert hasattr(reference, name)
