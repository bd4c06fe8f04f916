"""Reconstruction and steering by thresholds, without a list of what is active."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from capacity_checks import without_waiting
from cases import DTYPES, Case, Inputs, integer_inputs, make_inputs
from helpers import LAYOUTS, assert_equal, assert_no_worse, assert_same_bits, in_layout
from triton_cases import device, integers, on_device

import saerec_fast as fast
from saerec_fast import reference
from saerec_fast.kernels.triton import reconstruct, reconstruct_threshold, steer

INF, NAN = float("inf"), float("nan")
PART = 64  # for some of these tests: several parts of a dictionary that takes the interpreter a second
EDITS = [
    fast.Edit(0, "set", 3.0),
    fast.Edit(64, "scale", 2.0),
    fast.Edit(129, "add", -1.0),
    fast.Edit(7, "clamp_max", 0),
]


def per_feature(n: int) -> fast.JumpReLU:
    return fast.JumpReLU(torch.arange(n) % 3.0)


def check(inputs: Inputs, activation: fast.ReLU | fast.JumpReLU) -> torch.Tensor:
    """Equality with the float64 reference, rounded once."""
    out = device.reconstruct(*inputs, activation)
    assert out.dtype == inputs.x.dtype
    assert_equal(out, reference.reconstruct(*inputs.to(torch.float64), activation).to(out.dtype))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "n", "rows"), [(1, 1, 1), (15, 17, 3), (16, 16, 2), (17, 129, 130), (3, 5, 0)])
def test_odd_sizes(d: int, n: int, rows: int, dtype: torch.dtype) -> None:
    check(integer_inputs(Case(d, n, 1, rows, dtype)), per_feature(n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [129, 300])
def test_wide_states(d: int, dtype: torch.dtype) -> None:
    """Held by no tile, and in two blocks of columns. Few weights, so that 16 bits hold activations exactly."""
    inputs = integer_inputs(Case(d, 66, 1, 3, dtype))
    inputs.W_enc[:, 5:] = 0
    inputs.W_enc[:, -1] = 1
    check(inputs, fast.JumpReLU(1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [fast.ReLU(), fast.JumpReLU(0.7), fast.BatchTopK(4, threshold=0.9)], ids=str)
def test_no_worse_than_pytorch(activation: fast.ReLU | fast.JumpReLU | fast.BatchTopK, dtype: torch.dtype) -> None:
    """Rows in which float32 and ``dtype`` agree on what is active: rounding elsewhere costs a whole feature."""
    inputs = make_inputs(Case(24, 70, 1, 40, dtype))
    exact = inputs.to(torch.float64)
    threshold = getattr(activation, "threshold", 0.0)
    scores = reference.pre_activations(*exact[:4])
    plain_scores = reference.pre_activations(*inputs[:4])
    decided = ((scores > threshold) == (plain_scores > threshold)).all(-1) & ((scores - threshold).abs() > 1e-5).all(-1)
    assert decided.sum() >= 5
    out = device.reconstruct(*inputs, activation)
    plain, truth = (reference.reconstruct(*of, activation) for of in (inputs, exact))
    assert_no_worse(out[decided], plain[decided], truth[decided], 2.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_rows(dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(9, 130, 1, 6, dtype))
    inputs.x[0], inputs.x[1, 0], inputs.x[3, 3], inputs.x[4, 1] = NAN, NAN, INF, -INF
    out = check(inputs, per_feature(130))
    assert out[[2, 5]].isfinite().all()
    for edits in (EDITS, [fast.Edit(5, "set", 1.0)]):
        check_steer(inputs, fast.ReLU(), edits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts_give_the_same_bits(layout: str) -> None:
    inputs = make_inputs(Case(17, 70, 1, 5))
    moved = device.reconstruct(*in_layout(inputs, layout), fast.ReLU())
    assert_same_bits(moved, device.reconstruct(*inputs, fast.ReLU()))


def test_weights_of_unlike_strides() -> None:
    inputs = integer_inputs(Case(9, 40, 1, 3))
    wide = torch.full((40, 12), NAN)
    wide[:, :9] = inputs.W_dec
    check(inputs._replace(W_dec=wide[:, :9]), fast.ReLU())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinity_stays_where_nothing_cancels_it() -> None:
    """Also behind the last feature, whose tile is not full: no infinity times a padding zero."""
    inputs = integer_inputs(Case(9, 40, 1, 2))
    positive = inputs._replace(x=inputs.x.abs(), W_enc=inputs.W_enc.abs() + 1, W_dec=inputs.W_dec.abs() + 1)
    positive.x[0, 2] = INF
    assert check(positive, fast.ReLU())[0].eq(INF).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct_threshold, "PART", PART)
    inputs = make_inputs(Case(17, 200, 1, 131, dtype))
    programs = []
    launch_tuned = reconstruct_threshold.launch_tuned

    def spy(kernel, configurations, grid, sizes, *args, **constants):
        programs.append(grid({})[2])
        return launch_tuned(kernel, configurations, grid, sizes, *args, **constants)

    monkeypatch.setattr(reconstruct_threshold, "launch_tuned", spy)

    def run(rows: slice) -> torch.Tensor:
        return device.reconstruct(inputs.x[rows], *inputs[1:], fast.ReLU())

    whole = run(slice(0, 131))
    assert_same_bits(run(slice(130, 131)), whole[130:])
    monkeypatch.setattr(reconstruct_threshold, "BUSY_PROGRAMS", 2)
    assert_same_bits(run(slice(0, 131)), whole)
    assert_same_bits(run(slice(60, 70)), whole[60:70])
    assert programs == [4, 4, 1, 4]


def check_steer(inputs: Inputs, activation: fast.ReLU | fast.JumpReLU, edits: list[fast.Edit], positions="all") -> None:
    plan = fast.SteeringPlan(edits, "reconstruct", positions)
    out = device.steer(*inputs, activation, plan)
    assert_equal(out, reference.steer(*inputs.to(torch.float64), activation, plan).to(out.dtype))


@pytest.mark.parametrize("programs", [0, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edited_features_count_once(dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct_threshold, "PART", PART)
    monkeypatch.setattr(reconstruct_threshold, "BUSY_PROGRAMS", programs)
    inputs = integer_inputs(Case(9, 130, 1, 5, dtype))
    # Scores are integers, so that some stand on their thresholds.
    for threshold in (0.0, 1.0):
        check_steer(inputs, fast.JumpReLU(threshold), EDITS, torch.tensor([True, True, False, True, True]))
    check_steer(inputs, per_feature(130), [fast.Edit(j, "scale", 2.0) for j in range(130)])
    check_steer(inputs, per_feature(130), [])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_an_edit_sets_hides_what_was_encoded() -> None:
    inputs = integer_inputs(Case(9, 70, 1, 4))
    inputs.W_enc[3], inputs.W_enc[66] = NAN, INF
    check_steer(inputs, fast.ReLU(), [fast.Edit(3, "set", 2.0), fast.Edit(66, "set", -1.0)])


@pytest.mark.parametrize(("d", "waits"), [(512, False), (513, True)])
def test_waits_only_for_wide_states(d: int, waits: bool) -> None:
    """Of the kernels' functions: a dispatch mode does not see into operators."""
    inputs, threshold = integer_inputs(Case(d, 5, 1, 2)), torch.tensor([0.0])
    edits = [1], [fast.ops.EDIT_CODES["set"]], torch.tensor([2.0]), torch.tensor([True, False])
    for function, args in (
        (reconstruct.reconstruct, (*inputs, threshold, 0)),
        (steer.steer, (*inputs, threshold, 0, True, *edits)),
    ):
        on_device(function, *args)  # a plan's tensors are made by its first call
        expected = pytest.raises(AssertionError, match="waits for the device") if waits else nullcontext()
        with expected:
            on_device(without_waiting(function), *args)


def test_gradients() -> None:
    inputs = integer_inputs(Case(9, 40, 1, 5))
    weights = integers(5, 9, seed=3)
    found = []
    for module in (device, reference):
        leaves = Inputs(*(tensor.clone().requires_grad_() for tensor in inputs))
        out = module.reconstruct(*leaves, fast.JumpReLU(2.0))
        found.append(torch.autograd.grad((out * weights).sum(), leaves))
    for name, actual, expected in zip(Inputs._fields, *found, strict=True):
        assert torch.equal(actual, expected), name
