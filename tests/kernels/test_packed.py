"""Packed weights: what is refused, what goes stale, where they can be taken."""

from __future__ import annotations

import io
import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import DTYPES, Case, Inputs, make_inputs
from helpers import LAYOUTS, assert_equal, assert_same_bits, in_layout, torch_threads
from torch import Tensor

import saerec_fast as fast
from saerec_fast import _C, reference
from saerec_fast.types import PackedWeights

CASE = Case(24, 300, 9, 7)
_EMPTY = torch.empty


def calls(t: Inputs) -> dict[str, Callable[..., Tensor]]:
    """Every op that takes packed weights."""
    plan = fast.SteeringPlan([fast.Edit(0, "set", 1.5)], "reconstruct")
    return {
        "linear_topk": lambda **o: fast.linear_topk(*t[:3], k=9, **o).values,
        "encode_topk": lambda **o: fast.encode_topk(*t[:4], k=9, **o).dense(),
        "encode_threshold": lambda **o: fast.encode_threshold(*t[:4], 0.3, **o).dense(),
        "reconstruct": lambda **o: fast.reconstruct(*t, fast.TopK(9), **o),
        "steer": lambda **o: fast.steer(*t, fast.TopK(9), plan, **o),
    }


NAMES = list(calls(make_inputs(CASE)))


def unchecked(data: Tensor, shape: tuple[int, int] = (CASE.n, CASE.d)) -> PackedWeights:
    return PackedWeights(data, shape)


def with_byte(data: Tensor, place: int, value: int) -> Tensor:
    changed = data.clone()
    changed[place] = value
    return changed


# What is wrong with the bytes, and what the message must say.
DAMAGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "one byte short": (lambda data: data[:-1].clone(), r"expected \d+ bytes, got \d+"),
    "only a header": (lambda data: data[:64].clone(), r"expected \d+ bytes, got 64"),
    "half a header": (lambda data: data[:10].clone(), "expected at least 64 bytes, got 10"),
    "nothing": (lambda data: data[:0].clone(), "expected"),
    "another version": (lambda data: with_byte(data, 8, 9), "expected version 1, got 9"),
    "another kind of file": (lambda data: with_byte(data, 0, 0), "not packed weights"),
    "another number of features": (lambda data: with_byte(data, 16, 45), r"expected weights of shape \(300, 24\)"),
    "another width": (lambda data: with_byte(data, 24, 25), r"expected weights of shape \(300, 24\)"),
    "zeros": (torch.zeros_like, "not packed weights"),
    "another dtype": (lambda data: data.float(), "uint8"),
    "a scalar": (lambda data: data[0].clone(), "uint8"),
    "two dimensions": (lambda data: data.view(1, -1), "uint8"),
    "one byte expanded": (lambda data: data[:1].clone().expand(len(data)), "uint8"),
    "every other byte": (lambda data: torch.stack([data, data], 1)[:, 0], "uint8"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bytes_are_refused(damage: str, name: str) -> None:
    t = make_inputs(CASE)
    change, message = DAMAGES[damage]
    packed = unchecked(change(fast.pack_weights(t.W_enc, t.b_enc).data))
    with pytest.raises(ValueError, match=f"packed: .*{message}"):
        calls(t)[name](packed=packed, backend="cpu")


def test_weights_too_small_to_be_screened_check_their_bytes_too() -> None:
    t = make_inputs(Case(24, 20, 3, 5))
    packed = fast.pack_weights(t.W_enc, t.b_enc)
    assert_same_bits(
        fast.linear_topk(*t[:3], k=3, packed=packed).values, fast.linear_topk(*t[:3], k=3, backend="cpu").values
    )
    with pytest.raises(ValueError, match="packed: expected at least 64 bytes"):
        fast.linear_topk(*t[:3], k=3, packed=unchecked(packed.data[:10], (20, 24)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_other_weights_are_refused(name: str, backend: str) -> None:
    t = make_inputs(CASE)
    packed = fast.pack_weights(t.W_enc, t.b_enc)
    refused = {
        "shape": (t._replace(W_enc=t.W_enc[:299], b_enc=t.b_enc[:299], W_dec=t.W_dec[:299]), r"shape \(299, 24\)"),
        "another tensor": (t._replace(W_enc=t.W_enc.clone()), "pack them again"),
        "another bias": (t._replace(b_enc=t.b_enc.clone()), "pack them again"),
        "no bias": (t._replace(b_enc=None), "pack them again"),
    }
    for other, message in refused.values():
        with pytest.raises(ValueError, match=f"packed: .*{message}"):
            calls(other)[name](packed=packed, backend=backend)
    with pytest.raises(TypeError, match="packed: expected PackedWeights from pack_weights, got Tensor"):
        calls(t)[name](packed=packed.data, backend=backend)


@pytest.mark.parametrize("changed", ["W_enc", "b_enc"])
def test_weights_changed_in_place_are_noticed(changed: str) -> None:
    t = make_inputs(CASE)
    packed = fast.pack_weights(t.W_enc, t.b_enc)
    getattr(t, changed)[7] += 1
    for call in calls(t).values():
        with pytest.raises(ValueError, match=r"packed: .*have changed since; pack them again"):
            call(packed=packed)
    again = fast.pack_weights(t.W_enc, t.b_enc)
    for call in calls(t).values():
        assert_same_bits(call(packed=again), call(backend="cpu"))


@pytest.mark.parametrize("place", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_packed(value: float, place: str) -> None:
    t = make_inputs(Case(24, 300, 9, 20))
    (t.W_enc if place == "weight" else t.b_enc)[-1] = value
    with pytest.raises(ValueError, match=f"{place}: expected finite numbers"):
        fast.pack_weights(t.W_enc, t.b_enc)
    # What is packed on the fly is not used then.
    result = fast.linear_topk(*t[:3], k=9, backend="cpu")
    expected = reference.linear_topk(*t[:3], k=9)
    assert_equal(result.indices, expected.indices)


@pytest.mark.parametrize(
    ("weight", "bias", "error", "message"),
    [
        (torch.ones(4), None, ValueError, r"weight: expected a tensor \(n, d\), got \(4,\)"),
        (torch.ones(4, 3).int(), None, TypeError, "weight: expected a floating point dtype, got torch.int32"),
        (torch.ones(4, 3).double(), None, ValueError, "'cpu' takes float32, bfloat16 and float16, got torch.float64"),
        (torch.ones(4, 3, device="meta"), None, ValueError, "'cpu' needs tensors on the CPU"),
        (torch.ones(4, 3), [1.0], TypeError, r"bias: expected a tensor \(4,\) or None, got list"),
        (torch.ones(4, 3), torch.ones(3), ValueError, r"bias: expected shape \(4,\), got \(3,\)"),
        (torch.ones(4, 3), torch.ones(4).half(), TypeError, "bias: expected torch.float32 .* got torch.float16"),
    ],
)
def test_what_cannot_be_packed(weight: Tensor, bias: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fast.pack_weights(weight, bias)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_writes_all_of_its_bytes_and_always_the_same(dtype: torch.dtype) -> None:
    # Outputs start out poisoned between sentinels, see conftest.py.
    for d, n in [(1, 1), (3, 31), (4, 32), (63, 33), (65, 257), (300, 1000)]:
        t = make_inputs(Case(d, n, 1, 1, dtype))
        data = fast.pack_weights(t.W_enc, t.b_enc).data
        assert data.dtype == torch.uint8
        assert data.shape == (_C.packed_size(n, d),)
        with torch_threads(3):
            assert torch.equal(fast.pack_weights(t.W_enc.clone(), t.b_enc.clone()).data, data)
        for layout in LAYOUTS:
            moved = in_layout(t, layout)
            assert torch.equal(fast.pack_weights(moved.W_enc, moved.b_enc).data, data), layout


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_views_of_weights(layout: str) -> None:
    t = make_inputs(Case(65, 700, 9, 7))
    moved = in_layout(t, layout)
    moved = t._replace(W_enc=moved.W_enc, b_enc=moved.b_enc)
    packed = fast.pack_weights(moved.W_enc, moved.b_enc)
    for name, call in calls(moved).items():
        assert_same_bits(call(packed=packed), calls(t)[name](backend="cpu"))


@pytest.mark.usefixtures("isa")
def test_saved_and_loaded_they_give_the_same() -> None:
    t = make_inputs(CASE)
    expected = {name: call(backend="cpu") for name, call in calls(t).items()}
    data = fast.pack_weights(t.W_enc, t.b_enc).data
    file = io.BytesIO()
    torch.save(data, file)
    file.seek(0)
    array = io.BytesIO()
    np.save(array, data.numpy())
    array.seek(0)
    unaligned = torch.cat([torch.zeros(1, dtype=torch.uint8), data])[1:]
    longer = torch.cat([data, torch.zeros(100, dtype=torch.uint8)])  # a page of a mapped file
    for loaded in (torch.load(file), torch.from_numpy(np.load(array)), unaligned, longer):
        copies = Inputs(*(tensor.clone() for tensor in t))
        for name, call in calls(copies).items():
            assert_same_bits(call(packed=unchecked(loaded)), expected[name])


def test_packed_in_one_tier_they_serve_another() -> None:
    t = make_inputs(CASE)
    tiers, active = _C.supported_isas(), _C.active_isa()
    try:
        for writer in tiers:
            _C.set_isa(writer)
            packed = fast.pack_weights(t.W_enc, t.b_enc)
            for reader in tiers:
                _C.set_isa(reader)
                for call in calls(t).values():
                    assert_same_bits(call(packed=packed), call(backend="cpu"))
    finally:
        _C.set_isa(active)


def test_made_in_inference_mode_they_serve_a_backward_pass() -> None:
    t = make_inputs(CASE)
    with torch.inference_mode():
        packed = fast.pack_weights(t.W_enc, t.b_enc)
        inside = {name: call(packed=packed) for name, call in calls(t).items()}
    assert not packed.data.is_inference()
    for name, call in calls(t).items():
        assert torch.equal(call(packed=packed), inside[name])
    leaves = Inputs(*(tensor.clone().requires_grad_() for tensor in t))
    packed = fast.pack_weights(leaves.W_enc, leaves.b_enc)
    plain = Inputs(*(tensor.clone().requires_grad_() for tensor in t))
    for name, call in calls(leaves).items():
        weight = torch.randn(call(packed=packed).shape, generator=torch.Generator().manual_seed(1))
        used = [leaf for leaf in range(5) if name != "linear_topk" or leaf < 3][: 4 if name.startswith("encode") else 5]
        grads = torch.autograd.grad((call(packed=packed) * weight).sum(), [leaves[i] for i in used])
        expected = torch.autograd.grad((calls(plain)[name]() * weight).sum(), [plain[i] for i in used])
        for grad, same in zip(grads, expected, strict=True):
            assert_same_bits(grad, same)


def test_weights_made_in_inference_mode_cannot_go_stale_unseen() -> None:
    with torch.inference_mode():
        t = Inputs(*(tensor.clone() for tensor in make_inputs(CASE)))
        packed = fast.pack_weights(t.W_enc, t.b_enc)
        assert packed.source is None  # they count no versions: there is nothing to check
        for call in calls(t).values():
            assert_same_bits(call(packed=packed), call(backend="cpu"))


def test_several_threads_share_them() -> None:
    t = make_inputs(Case(64, 4000, 9, 30))
    packed = fast.pack_weights(t.W_enc, t.b_enc)
    expected = {name: call() for name, call in calls(t).items()}

    def work(i: int) -> None:
        torch.set_num_threads(1 + i % 2)
        for name, call in calls(t).items():
            assert_same_bits(call(packed=packed), expected[name])
            assert torch.equal(fast.pack_weights(t.W_enc, t.b_enc).data, packed.data)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_uses_its_parents() -> None:
    t = make_inputs(Case(64, 4000, 9, 30))
    with torch_threads(2):
        packed = fast.pack_weights(t.W_enc, t.b_enc)
        wanted = [tensor.numpy().tobytes() for tensor in (calls(t)["reconstruct"](packed=packed), packed.data)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads in the parent
            child = os.fork()
        if child == 0:
            same = False
            try:
                # The guards of conftest.py are filled by PyTorch, whose threads are gone.
                torch.empty = _EMPTY
                again = calls(t)["reconstruct"](packed=packed), fast.pack_weights(t.W_enc, t.b_enc).data
                same = [tensor.numpy().tobytes() for tensor in again] == wanted
            finally:
                os._exit(0 if same else 1)
        deadline = time.monotonic() + 60
        while (answer := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail("the child hangs")
            time.sleep(0.01)
    assert answer[1] == 0
