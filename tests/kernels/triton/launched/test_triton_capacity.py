"""``encode_threshold`` with a capacity."""

from __future__ import annotations

import pytest
import torch
from capacity_checks import capacities_around, check_capacity, check_gradients, without_waiting
from cases import DTYPES, Case, integer_inputs
from triton_cases import on_device

from saerec_fast.kernels.triton.encode_threshold import encode_threshold


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "n", "rows"), [(1, 1, 1), (15, 17, 3), (9, 130, 66), (3, 5, 0)])
def test_contract(d: int, n: int, rows: int, dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(d, n, 1, rows, dtype))
    for capacity in capacities_around(inputs, 1.0):
        on_device(check_capacity, inputs, 1.0, capacity, "triton")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_rows_are_cut_as_others() -> None:
    inputs = integer_inputs(Case(9, 70, 1, 3))
    inputs.x[1, 0] = float("nan")
    args = (*inputs[:4], torch.tensor([1.0]))
    _, indices, values = on_device(encode_threshold, *args)
    offsets, first, kept = on_device(encode_threshold, *args, capacity=60)
    assert offsets[-1] == len(indices) > 60
    assert torch.equal(first, indices[:60])
    torch.testing.assert_close(kept, values[:60], rtol=0, atol=0, equal_nan=True)
    assert kept.isnan().any()


@pytest.mark.parametrize("capacity", [0, 37, 500])
def test_gradients(capacity: int) -> None:
    on_device(check_gradients, integer_inputs(Case(9, 40, 1, 5)), 1.0, capacity, "triton")


def test_waits_only_without_a_capacity() -> None:
    args = (*integer_inputs(Case(9, 70, 1, 5))[:4], torch.tensor([1.0]))
    encode = without_waiting(encode_threshold)
    on_device(encode, *args, capacity=50)
    with pytest.raises(AssertionError, match="waits for the device"):
        on_device(encode, *args)
