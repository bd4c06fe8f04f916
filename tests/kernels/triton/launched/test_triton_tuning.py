"""Choosing between a kernel's configurations: all of them give the same bits, and nothing is timed unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import triton
from cases import DTYPES, Case, make_inputs
from helpers import assert_same_bits
from triton_cases import device, on_device, operators

import saerec_fast as fast
from saerec_fast.kernels.triton import (
    decode_sparse,
    encode_threshold,
    linear_topk,
    reconstruct_threshold,
    sparse_weight_gradient,
    tuning,
)

SERVING_ROWS = 4  # for these tests: the interpreter takes seconds for a hundred rows
CASE = Case(7, 80, 3, 6)
UNWRITTEN = 2**31 - 1  # the order of NaN, which no score here is


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "SERVING_ROWS", SERVING_ROWS)
    tuning._chosen.clear()
    yield
    tuning._chosen.clear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trials of each tuning; the last configuration always wins."""
    trials: list[int] = []

    def measured(call: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
        for _ in range(2):
            call()
        trials.append(1)
        return [-float(len(trials))] * len(quantiles)

    monkeypatch.setattr(tuning, "measured", measured)
    return trials


def encoded(inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return operators.encode_topk(*inputs[:4], CASE.k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["maxima_configurations", "emit_configurations"])
def test_configurations_of_the_score_passes(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Groups of several tiles, and none that the last tile fills.
    monkeypatch.setattr(linear_topk, "PROGRAMS", 1)
    x, weight, bias = make_inputs(Case(19, 300, 9, 5, dtype))[:3]
    exclude = fast.Ragged.from_lists([[(7 * i) % 300 for i in range(10 * r)] for r in range(5)])
    configurations = getattr(linear_topk, name)(dtype)
    assert 1 <= len(configurations) <= 6
    expected = device.linear_topk(x, weight, bias, k=9, exclude=exclude)
    for configuration in configurations[1:]:
        monkeypatch.setattr(linear_topk, name, lambda dtype, chosen=configuration: [chosen])
        result = device.linear_topk(x, weight, bias, k=9, exclude=exclude)
        assert_same_bits(result.values, expected.values)
        assert_same_bits(result.indices, expected.indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_configurations_of_the_threshold_passes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, threshold = make_inputs(Case(19, 70, 1, 5, dtype)), torch.tensor([0.5])

    def results() -> tuple[torch.Tensor, ...]:
        entries = on_device(encode_threshold.encode_threshold, *inputs[:4], threshold)
        return *entries, on_device(reconstruct_threshold.reconstruct_threshold, *inputs, threshold)

    expected = results()
    for module, name, configurations in (
        (encode_threshold, "emit_configurations", linear_topk.emit_configurations(dtype)),
        (reconstruct_threshold, "configurations", reconstruct_threshold.configurations(19, dtype)),
    ):
        for chosen in configurations[1:]:
            monkeypatch.setattr(module, name, lambda *_, chosen=chosen: [chosen])
            for out, truth in zip(results(), expected, strict=True):
                assert_same_bits(out, truth)


def test_wider_groups_are_all_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the list of maxima that no program wrote would be random numbers."""
    x, weight = make_inputs(Case(16, 300, 8, 70))[:2]
    empty, seen = torch.empty, []
    monkeypatch.setattr(linear_topk, "PROGRAMS", 1)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(UNWRITTEN))
    launch = linear_topk.launch

    def spy(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        if kernel is linear_topk.bound_kernel:
            maxima, n_groups = args[0], args[3]
            seen.append(int(maxima[: 70 * n_groups].max()))
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(linear_topk, "launch", spy)
    for configuration in linear_topk.maxima_configurations(torch.float32):
        monkeypatch.setattr(linear_topk, "maxima_configurations", lambda dtype, chosen=configuration: [chosen])
        device.linear_topk(x, weight, k=8)
    assert len(seen) == 3
    assert all(largest < UNWRITTEN for largest in seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_configurations_of_sparse_sums(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _, b_dec, W_dec = make_inputs(Case(20, 2, 1, 3, dtype))
    offsets = torch.tensor([0, 0, 35, 38])
    indices = torch.arange(38, dtype=torch.int32) % 5 % 2
    values = torch.linspace(-1, 1, 38).to(dtype)

    def results() -> tuple[torch.Tensor, ...]:
        decoded = operators.decode_sparse(offsets, indices, values, W_dec, b_dec)
        return decoded, *operators.sparse_weight_gradient(offsets, indices, values, x, b_dec, 2)

    expected = results()
    for module in (decode_sparse, sparse_weight_gradient):
        for configuration in module.CONFIGURATIONS[1:]:
            monkeypatch.setattr(module, "CONFIGURATIONS", [configuration])
            for out, truth in zip(results(), expected, strict=True):
                assert_same_bits(out, truth)


def test_nothing_is_timed_unasked(timed: list[int]) -> None:
    encoded(make_inputs(CASE))
    assert not timed
    assert not tuning.chosen()


def test_serving_batches_are_never_timed(timed: list[int]) -> None:
    with tuning.autotuning():
        encoded(make_inputs(Case(7, 80, 3, SERVING_ROWS)))
    assert not timed
    assert not tuning.chosen()


def test_once_for_batches_of_a_kind(timed: list[int]) -> None:
    inputs = make_inputs(CASE)
    expected = encoded(inputs)
    with tuning.autotuning():
        tuned = encoded(inputs)
        # Emission has one configuration in float32.
        configurations = linear_topk.maxima_configurations(torch.float32)
        assert len(timed) == len(configurations)
        ((kind, configuration),) = tuning.chosen().items()
        assert (kind.kernel, kind.rows) == ("group_maxima_kernel", 16)
        assert str(configuration) == str(configurations[-1])
        again = encoded(inputs)
        fewer = encoded(inputs._replace(x=inputs.x[:5]))
    after = encoded(inputs)
    assert len(timed) == len(configurations)
    for out, truth in zip((*tuned, *again, *after), expected * 3, strict=True):
        assert_same_bits(out, truth)
    assert_same_bits(fewer[0], expected[0][:5])


def test_trials_leave_the_list_of_candidates_as_one_run_does(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that every trial adds to overflows; its rows would be repaired, at the cost of several passes."""
    counts: list[torch.Tensor] = []
    launch = linear_topk.launch

    def spy(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        if kernel is linear_topk.repair_kernel:
            counts.append(args[10].clone())
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(linear_topk, "launch", spy)
    inputs = make_inputs(Case(7, 80, 3, 6, torch.bfloat16))
    encoded(inputs)
    with tuning.autotuning():
        encoded(inputs)
    assert {kind.kernel for kind in tuning.chosen()} == {"group_maxima_kernel", "emit_kernel"}
    assert counts[0].min() >= 3
    assert_same_bits(counts[1], counts[0])


def test_trials_leave_threshold_passes_as_one_run_does(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums, counts and bits are written anew by each trial; in one program for several parts too."""
    monkeypatch.setattr(reconstruct_threshold, "PART", 64)
    monkeypatch.setattr(reconstruct_threshold, "BUSY_PROGRAMS", 0)
    inputs, activation = make_inputs(Case(7, 140, 3, 6, torch.bfloat16)), fast.JumpReLU(0.5)

    def results() -> tuple[torch.Tensor, ...]:
        entries = device.encode_threshold(*inputs[:4], 0.5)
        return *entries[:3], device.reconstruct(*inputs, activation)

    expected = results()
    with tuning.autotuning():
        tuned = results()
    assert {kind.kernel for kind in tuning.chosen()} == {"mark_kernel", "fill_kernel", "sum_kernel"}
    for out, truth in zip(tuned, expected, strict=True):
        assert_same_bits(out, truth)


def test_backward_passes_are_tuned_too(timed: list[int]) -> None:
    inputs = make_inputs(Case(3, 4, 2, 5))

    def gradients() -> tuple[torch.Tensor, ...]:
        x, *weights = (tensor.clone().requires_grad_() for tensor in inputs)
        device.reconstruct(x, *weights, fast.TopK(2)).square().sum().backward()
        return tuple(tensor.grad for tensor in (x, *weights))

    expected = gradients()
    with tuning.autotuning():
        tuned = gradients()
    assert {kind.kernel for kind in tuning.chosen()} == {"decode_kernel", "gradient_kernel"}
    for out, truth in zip(tuned, expected, strict=True):
        assert_same_bits(out, truth)


def test_not_while_a_graph_is_captured(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(CASE)
    with tuning.autotuning():
        with monkeypatch.context() as capture:
            capture.setattr(tuning, "is_captured", lambda tensor: True)
            encoded(inputs)
        assert not timed
        encoded(inputs)
    assert timed


def test_asking_ends_with_its_block(timed: list[int]) -> None:
    with pytest.raises(KeyError), tuning.autotuning():
        raise KeyError
    encoded(make_inputs(CASE))
    assert not timed


@pytest.mark.parametrize(("rows", "expected"), [(257, 1024), (1024, 1024), (1025, 4096), (65536, 65536)])
def test_rows_count_in_powers_of_four(rows: int, expected: int) -> None:
    assert tuning.rows_class(rows) == expected


def test_the_default_comes_first() -> None:
    """What is launched unasked, and what test_aot.py compares the others with."""
    assert decode_sparse.CONFIGURATIONS[0].kwargs == sparse_weight_gradient.CONFIGURATIONS[0].kwargs == {"STAGES": 1}
    for dtype in DTYPES:
        schedule = linear_topk.schedule(dtype)
        for configurations in (linear_topk.maxima_configurations(dtype), linear_topk.emit_configurations(dtype)):
            first: triton.Config = configurations[0]
            assert {"num_warps": first.num_warps, "num_stages": first.num_stages} == schedule
