"""``encode_threshold`` with a capacity: the contract on the reference and the CPU kernels."""

from __future__ import annotations

import pytest
import torch
from capacity_checks import RefuseWaiting, capacities_around, check_capacity, check_gradients
from cases import DTYPES, Case, integer_inputs, make_inputs
from hypothesis import given
from hypothesis import strategies as st

import saerec_fast as fast
from saerec_fast import reference

BACKENDS = ["reference", "cpu"]
SIZES = [(1, 1, 1), (15, 17, 3), (129, 65, 70), (3, 5, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "n", "rows"), SIZES)
def test_contract(d: int, n: int, rows: int, dtype: torch.dtype, backend: str) -> None:
    inputs = make_inputs(Case(d, n, 1, rows, dtype))
    for threshold in (0.0, torch.arange(n) % 3.0 - 1):
        for capacity in capacities_around(inputs, threshold):
            check_capacity(inputs, threshold, capacity, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_contract_holds_for_any_size(backend: str, data: st.DataObject) -> None:
    d, n, rows = (data.draw(st.integers(low, high)) for low, high in ((1, 9), (1, 40), (0, 9)))
    inputs = integer_inputs(Case(d, n, 1, rows), data.draw(st.integers(0, 99)))
    threshold = float(data.draw(st.integers(-3, 6)))
    check_capacity(inputs, threshold, data.draw(st.integers(0, n * rows + 3)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_rows_are_kept_and_cut_as_others(backend: str) -> None:
    inputs = integer_inputs(Case(7, 30, 1, 4))
    inputs.x[1, 0] = float("nan")
    for capacity in (20, 45, 200):
        exact = fast.encode_threshold(*inputs[:4], 1.0, backend=backend)
        fixed = fast.encode_threshold(*inputs[:4], 1.0, capacity=capacity, backend=backend)
        stored = min(capacity, len(exact.indices))
        assert torch.equal(fixed.indices[:stored], exact.indices[:stored])
        torch.testing.assert_close(fixed.values[:stored], exact.values[:stored], rtol=0, atol=0, equal_nan=True)
        assert (fixed.values[stored:] == 0).all()
        assert int(fixed.n_active) == len(exact.indices)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [0, 1, 37, 500])
def test_gradients(capacity: int, backend: str) -> None:
    check_gradients(integer_inputs(Case(9, 40, 1, 5)), 1.0, capacity, backend)


def test_reference_waits_only_without_a_capacity() -> None:
    args = integer_inputs(Case(9, 40, 1, 5))[:4]
    with RefuseWaiting():
        features = reference.encode_threshold(*args, 1.0, 30)
        features.dense()
    with pytest.raises(AssertionError, match="waits for the device"), RefuseWaiting():
        reference.encode_threshold(*args, 1.0)


@pytest.mark.parametrize("capacity", [2.0, True, "many"])
def test_capacity_of_a_wrong_type(capacity: object) -> None:
    with pytest.raises(TypeError, match="capacity: expected an integer or None, got"):
        fast.encode_threshold(*integer_inputs(Case(2, 3, 1, 1))[:4], capacity=capacity)


def test_capacity_below_zero() -> None:
    with pytest.raises(ValueError, match="capacity: expected at least 0, got -1"):
        fast.encode_threshold(*integer_inputs(Case(2, 3, 1, 1))[:4], capacity=-1)
