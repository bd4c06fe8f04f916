from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import Case, make_inputs
from helpers import assert_same_bits, forward_ops, torch_threads

import saerec_fast as fast
from saerec_fast import _C, reference
from saerec_fast.kernels import cpu

CASE = Case(64, 4000, 16, 300)


def _run_all() -> list[torch.Tensor]:
    inputs = make_inputs(CASE)
    return [tensor for op in forward_ops(16).values() for tensor in op(inputs)]


def _digest(tensors: list[torch.Tensor]) -> bytes:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).digest()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_works_alone() -> None:
    with torch_threads(2):
        fast.linear_topk(*make_inputs(CASE)[:3], k=16, backend="cpu")  # opens OpenMP's threads in the parent
        inputs = make_inputs(CASE)
        expected = _digest([*fast.encode_topk(*inputs[:4], k=16, backend="cpu")[:3]])
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads in the parent
            child = os.fork()
        if child == 0:
            try:
                features = fast.encode_topk(*inputs[:4], k=16, backend="cpu")
                os.write(write, bytes([_C.is_serial()]) + _digest([*features[:3]]))
            finally:
                os._exit(0)
        os.close(write)
        deadline = time.monotonic() + 60
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail("the child hangs")
            time.sleep(0.01)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
    assert answer[:1] == b"\1", "the child is not serial"
    assert answer[1:] == expected
    assert not _C.is_serial()


def test_concurrent_calls() -> None:
    expected = _run_all()

    def work(_: int) -> list[torch.Tensor]:
        torch.set_num_threads(2)  # a new Python thread does not inherit it
        return _run_all()

    with torch_threads(2), ThreadPoolExecutor(4) as pool:
        for result in pool.map(work, range(8)):
            for tensor, same in zip(result, expected, strict=True):
                assert_same_bits(tensor, same)


@pytest.mark.usefixtures("isa")
def test_a_build_for_threads_computes_the_right_thing() -> None:
    """The other tests here compare a build with itself, and would pass one that is wrong in the same way each time."""
    inputs = make_inputs(CASE)
    plan = fast.SteeringPlan([fast.Edit(0, "set", 1.5), fast.Edit(3999, "scale", 0.5)])
    pairs = [
        (fast.encode_topk(*inputs[:4], k=16, backend="cpu"), reference.encode_topk(*inputs[:4], k=16)),
        (fast.encode_threshold(*inputs[:4], 0.3, backend="cpu"), reference.encode_threshold(*inputs[:4], 0.3)),
    ]
    results = [(actual.dense(), expected.dense()) for actual, expected in pairs]
    for activation in (fast.TopK(16), fast.JumpReLU(0.3)):
        results += [
            (fast.reconstruct(*inputs, activation, backend="cpu"), reference.reconstruct(*inputs, activation)),
            (fast.steer(*inputs, activation, plan, backend="cpu"), reference.steer(*inputs, activation, plan)),
        ]
    for actual, expected in results:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_concurrent_gradients() -> None:
    inputs = make_inputs(CASE)

    def work(_: int) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        features = fast.encode_topk(*leaves[:4], k=16, backend="cpu")
        fast.decode_sparse(features, leaves[4], leaves[3]).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = work(0)
    with ThreadPoolExecutor(3) as pool:
        for result in pool.map(work, range(6)):
            for leaf, same in zip(result, expected, strict=True):
                torch.testing.assert_close(leaf, same, rtol=1e-5, atol=1e-4)


KERNELS = [
    "pack",
    "linear_topk",
    "encode_threshold",
    "encode_features",
    "reconstruct",
    "decode_sparse",
    "sparse_dot",
    "sparse_weight_gradient",
    "sparse_training_step",
    "largest_entries",
    "adam_step",
    "steer",
]


class _Counting:
    """A thread that counts whenever it gets the GIL."""

    def __enter__(self) -> _Counting:
        self.count, self.stop = 0, False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def _run(self) -> None:
        while not self.stop:
            self.count += 1
            time.sleep(0)

    def __exit__(self, *_: object) -> None:
        self.stop = True
        self.thread.join()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gil_is_released(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    progress: list[int] = []
    entry = {"reconstruct": "BoundReconstruct"}.get(kernel, kernel)

    class Spy:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            function = getattr(_C, name)
            if name != entry:
                return function

            if isinstance(function, type):
                # Arguments first, the kernel later.
                return lambda *args: types.SimpleNamespace(run=spied(function(*args).run))
            return spied(function)

    def spied(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            before = counting.count
            result = function(*args)
            progress.append(counting.count - before)
            return result

        return call

    inputs = make_inputs(CASE)
    offsets = torch.arange(CASE.rows + 1) * 200
    indices = torch.randint(0, CASE.n, (CASE.rows * 200,))
    entries = torch.randn(CASE.rows * 200)
    moments = [torch.rand(CASE.n, CASE.d) for _ in range(4)]
    calls: dict[str, Callable[[], Any]] = {
        "pack": lambda: cpu.pack(*inputs[1:3]),
        "encode_features": lambda: cpu.encode_features(*inputs[:4], torch.zeros(1), indices[:500].unique()),
        "reconstruct": lambda: cpu.reconstruct(*inputs, None, 16),
        "linear_topk": lambda: cpu.linear_topk(*inputs[:3], 16, None, None),
        "encode_threshold": lambda: cpu.encode_threshold(*inputs[:4], torch.zeros(1)),
        "decode_sparse": lambda: cpu.decode_sparse(offsets, indices, entries, inputs.W_dec, None),
        "sparse_dot": lambda: cpu.sparse_dot(offsets, indices, inputs.x, inputs.W_dec),
        "sparse_weight_gradient": lambda: cpu.sparse_weight_gradient(offsets, indices, entries, inputs.x, None, CASE.n),
        "sparse_training_step": lambda: cpu.sparse_training_step(
            inputs.x, offsets, indices, entries, inputs.W_enc, inputs.W_dec, None, 1.0, 0.0
        ),
        "largest_entries": lambda: cpu.largest_entries(offsets, entries, 30_000),
        "adam_step": lambda: cpu.adam_step(*moments, 1, 1e-3, (0.9, 0.999), 1e-8, False),
        "steer": lambda: cpu.steer(*inputs, None, 16, True, [], [], torch.zeros(0), None),
    }
    monkeypatch.setattr(cpu, "_C", Spy())
    interval = sys.getswitchinterval()
    try:
        # With so long an interval nobody is made to give the GIL up: the counter moves only if the kernel releases it.
        sys.setswitchinterval(1000)
        with _Counting() as counting:
            for _ in range(200):
                calls[kernel]()
                if progress[-1] > 0:
                    break
    finally:
        sys.setswitchinterval(interval)
    assert progress[-1] > 0
