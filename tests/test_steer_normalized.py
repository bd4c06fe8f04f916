"""The operator of compiled steering, which keeps what it makes of an autoencoder's weights."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES
from kernels.helpers import assert_same_bits
from torch import Tensor

import saerec_fast as fast
from saerec_fast import reference
from saerec_fast.kernels import cpu

N, D, ROWS, K = 129, 17, 20, 7
PLANS = {
    "edits": fast.SteeringPlan([fast.Edit(0, "set", 2.0), fast.Edit(128, "scale", 0.5), fast.Edit(64, "add", 1.0)]),
    "reconstruct": fast.SteeringPlan([fast.Edit(5, "set", 2.0)], "reconstruct"),
    "no edits": fast.SteeringPlan([], "reconstruct"),
    "direction": fast.SteeringPlan(
        [fast.Edit(0, "set", 2.0), fast.Direction(torch.linspace(-1, 1, D), 0.5)],
        max_relative_norm=0.5,
        on_excess="clip",
    ),
}
SCALARS = {"plain": {}, "normalised": {"mean": 0.25, "std": 1.5}}
EDITS = False, [3, 3, 9], [0, 2, 1], torch.tensor([1.0, 0.5, 2.0]), None
STEER, STEER_NORMALIZED = torch.ops.saerec_fast.steer, torch.ops.saerec_fast.steer_normalized


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    cpu._kept.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Weights that were packed."""
    seen: list[Tensor] = []

    def pack(weight: Tensor, bias: Tensor | None, original: Callable[..., Tensor] = cpu.pack) -> Tensor:
        seen.append(weight)
        return original(weight, bias)

    monkeypatch.setattr(cpu, "pack", pack)
    return seen


def make_sae(activation: fast.Activation | None = None, **scalars: Any) -> fast.SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    sae = fast.SparseAutoencoder(D, N, activation or fast.TopK(K), generator=generator, **scalars).eval()
    with torch.no_grad():
        # Biases that decide which features are selected.
        sae.b_enc.copy_(torch.randn(N, generator=generator))
        sae.b_dec.copy_(0.1 * torch.randn(D, generator=generator))
    return sae


def hidden_states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def weights_of(sae: fast.SparseAutoencoder) -> tuple[Tensor, ...]:
    return sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec


def run(sae: fast.SparseAutoencoder, x: Tensor, edits: Any = EDITS) -> Tensor:
    scalars = (sae.mean, sae.std) if sae._is_normalized else (None, None)
    steered: Tensor = STEER_NORMALIZED(x, *weights_of(sae), None, K, *edits, *scalars)
    return steered


def fresh(sae: fast.SparseAutoencoder, x: Tensor, edits: Any = EDITS) -> Tensor:
    """The same with weights folded here and now, and nothing packed."""
    W_enc, b_enc, b_dec, W_dec = weights_of(sae)
    W_enc, b_dec, W_dec = reference.fold_normalization(W_enc, b_dec, W_dec, sae.mean, sae.std)
    steered: Tensor = STEER(x, W_enc, b_enc, b_dec, W_dec, None, K, *edits)
    return steered


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scalars", SCALARS)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 129])
@torch.no_grad()
def test_is_steer_with_folded_weights(rows: int, scalars: str, dtype: torch.dtype) -> None:
    sae, x = make_sae(**SCALARS[scalars]).to(dtype), hidden_states(rows, dtype=dtype)
    per_row = torch.randn(rows, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(rows) % 3 > 0
    for edits in (EDITS, (True, *EDITS[1:]), (False, *EDITS[1:3], per_row, mask), (True, [], [], torch.zeros(0), None)):
        for _ in range(2):
            assert_same_bits(run(sae, x, edits), fresh(sae, x, edits))


@torch.no_grad()
def test_of_a_dictionary_that_is_screened() -> None:
    """Smaller ones are scored whole."""
    generator = torch.Generator().manual_seed(0)
    sae = fast.SparseAutoencoder(64, 1024, fast.TopK(K), generator=generator, mean=0.25, std=1.5).eval()
    sae.b_enc.copy_(torch.randn(1024, generator=generator))
    x = torch.randn(40, 64, generator=generator)
    for edits in (EDITS, (True, *EDITS[1:])):
        assert_same_bits(run(sae, x, edits), fresh(sae, x, edits))


@pytest.mark.parametrize("scalars", SCALARS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@torch.no_grad()
def test_weights_that_cannot_be_screened(bad: float, scalars: str) -> None:
    sae, x = make_sae(**SCALARS[scalars]), hidden_states(ROWS)
    sae.W_enc[40, 3] = bad
    x[2] = float("nan")
    for _ in range(2):
        assert_same_bits(run(sae, x), fresh(sae, x))


@pytest.mark.parametrize("scalars", SCALARS)
@torch.no_grad()
def test_strided_weights(scalars: str) -> None:
    sae, x = make_sae(**SCALARS[scalars]), hidden_states(ROWS)
    expected = fresh(sae, x)
    for name in ("W_enc", "W_dec"):
        weight = getattr(sae, name)
        setattr(sae, name, torch.nn.Parameter(weight.t().contiguous().t()))
        assert getattr(sae, name).stride() == (1, N)
    for _ in range(2):
        assert_same_bits(run(sae, x), expected)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "b_dec", "W_dec", "mean", "std"])
@torch.no_grad()
def test_every_change_is_seen(name: str, packed: list[Tensor]) -> None:
    sae, x = make_sae(**SCALARS["normalised"]), hidden_states(ROWS)
    before = run(sae, x)
    assert_same_bits(run(sae, x), before)
    assert len(packed) == 1
    tensor = getattr(sae, name)
    tensor.mul_(1.25)
    in_place = run(sae, x)
    assert not torch.equal(in_place, before)
    assert_same_bits(in_place, fresh(sae, x))
    tensor.data = 1.5 * tensor
    replaced = run(sae, x)
    assert not torch.equal(replaced, in_place)
    assert_same_bits(replaced, fresh(sae, x))
    assert len(packed) == 3


@torch.no_grad()
def test_each_autoencoder_has_its_own(packed: list[Tensor]) -> None:
    saes = [make_sae(mean=mean, std=1.5) for mean in (0.0, 0.25)]
    x = hidden_states(ROWS)
    for _ in range(3):
        for sae in saes:
            assert_same_bits(run(sae, x), fresh(sae, x))
    assert len(packed) == len(cpu._kept) == 2


@torch.no_grad()
def test_another_owner_of_the_same_id() -> None:
    x = hidden_states(ROWS)
    first, second = make_sae(**SCALARS["plain"]), make_sae(**SCALARS["normalised"])
    for sae in (first, second):
        run(sae, x)
    key = cpu._kept[id(second.W_enc)].key
    cpu._kept[id(second.W_enc)] = cpu._kept[id(first.W_enc)]._replace(key=key)
    assert_same_bits(run(second, x), fresh(second, x))


@pytest.mark.parametrize("scalars", SCALARS)
@torch.no_grad()
def test_goes_with_the_autoencoder(scalars: str) -> None:
    sae, x = make_sae(**SCALARS[scalars]), hidden_states(ROWS)
    run(sae, x)
    assert len(cpu._kept) == 1
    del sae
    gc.collect()
    assert not cpu._kept


@torch.inference_mode()
def test_inference_tensors_are_not_kept() -> None:
    sae, x = make_sae(**SCALARS["normalised"]), hidden_states(ROWS)
    unseen = [weight.clone() for weight in weights_of(sae)]
    for factor in (1.0, 2.0):
        unseen[0].mul_(factor)
        W_enc, b_dec, W_dec = reference.fold_normalization(unseen[0], unseen[2], unseen[3], sae.mean, sae.std)
        expected = STEER(x, W_enc, unseen[1], b_dec, W_dec, None, K, *EDITS)
        assert_same_bits(STEER_NORMALIZED(x, *unseen, None, K, *EDITS, sae.mean, sae.std), expected)
    assert not cpu._kept


@torch.no_grad()
def test_threads_that_come_first_together() -> None:
    sae, x = make_sae(**SCALARS["normalised"]), hidden_states(ROWS)
    expected = fresh(sae, x)
    results: list[Tensor] = []
    start = threading.Barrier(8)

    def steer() -> None:
        with torch.no_grad():
            start.wait()
            results.extend(run(sae, x) for _ in range(20))

    threads = [threading.Thread(target=steer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160
    for result in results:
        assert_same_bits(result, expected)


def test_gradients_reach_all_it_is_given() -> None:
    results = []
    for steer in (STEER_NORMALIZED, None):
        sae, x = make_sae(**SCALARS["normalised"]), hidden_states(ROWS).requires_grad_()
        values = EDITS[3].clone().requires_grad_()
        scalars = [scalar.clone().requires_grad_() for scalar in (sae.mean, sae.std)]
        edits = (*EDITS[:3], values, None)
        leaves = [x, *weights_of(sae), values, *scalars]
        if steer is None:
            W_enc, b_dec, W_dec = reference.fold_normalization(sae.W_enc, sae.b_dec, sae.W_dec, *scalars)
            plan = fast.SteeringPlan([fast.Edit(3, "set", 1.0), fast.Edit(3, "scale", 0.5), fast.Edit(9, "add", 2.0)])
            out = reference.steer(x, W_enc, sae.b_enc, b_dec, W_dec, fast.TopK(K), plan, strengths=values)
        else:
            out = steer(x, *weights_of(sae), None, K, *edits, *scalars)
        results.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))
    assert all(gradient is not None and bool(gradient.any()) for gradient in results[1])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("scalars", SCALARS)
@pytest.mark.parametrize("activation", [fast.TopK(K), fast.ReLU(), fast.JumpReLU(torch.full((N,), 0.2))], ids=repr)
@torch.no_grad()
def test_compiled_steering_packs_once(activation: Any, scalars: str, plan: str, packed: list[Tensor]) -> None:
    sae, x = make_sae(activation, **SCALARS[scalars]), hidden_states(4, 5)
    valid = torch.arange(20).reshape(4, 5) % 7 > 0
    steer = torch.compile(lambda x: sae.steer(x, PLANS[plan], valid=valid), backend="aot_eager", fullgraph=True)
    by_features = PLANS[plan].mode == "delta" and not isinstance(activation, fast.TopK)
    for _ in range(3):
        torch.testing.assert_close(steer(x), sae.steer(x, PLANS[plan], valid=valid), rtol=1e-5, atol=1e-5)
    assert len(cpu._kept) == (not by_features)
    # The module keeps its own for calls that are not compiled.
    packed.clear()
    steer(x)
    assert not packed
    sae.W_enc.mul_(0.5)
    sae.b_enc.add_(0.1)
    torch.testing.assert_close(steer(x), sae.steer(x, PLANS[plan], valid=valid), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch, about its own internals
@torch.no_grad()
def test_with_inductor() -> None:
    sae, x = make_sae(**SCALARS["normalised"]), hidden_states(4, 5)
    steer = torch.compile(lambda x: 2 * sae.steer(x + 1, PLANS["edits"]), fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(steer(x), 2 * sae.steer(x + 1, PLANS["edits"]), rtol=1e-5, atol=1e-5)
    assert len(cpu._kept) == 1


@torch.no_grad()
def test_training_mode_keeps_nothing(packed: list[Tensor]) -> None:
    sae, x = make_sae(**SCALARS["normalised"]).train(), hidden_states(ROWS)
    steer = torch.compile(lambda x: sae.steer(x, PLANS["edits"]), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(steer(x), sae.steer(x, PLANS["edits"]), rtol=1e-5, atol=1e-5)
    assert not packed
    assert not cpu._kept


def test_gradients_of_compiled_steering() -> None:
    results = []
    for compiled in (False, True):
        sae, x = make_sae(**SCALARS["normalised"]), hidden_states(ROWS).requires_grad_()
        strengths = torch.tensor([1.0, 0.5, 2.0], requires_grad=True)

        def steer(x: Tensor, strengths: Tensor, sae: fast.SparseAutoencoder = sae) -> Tensor:
            return sae.steer(x, PLANS["edits"], strengths=strengths)

        run_it = torch.compile(steer, backend="aot_eager", fullgraph=True) if compiled else steer
        leaves = [x, strengths, *weights_of(sae)]
        results.append(torch.autograd.grad(run_it(x, strengths).square().sum(), leaves))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
