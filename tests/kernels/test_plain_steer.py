"""The bound call of attached plans: the same bits as the general way in every pass, and nothing that is not plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES
from helpers import assert_same_bits, torch_threads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import saerec_fast as fast
from saerec_fast import _C, Direction, Edit, SteeringPlan
from saerec_fast.api import steer_plans
from saerec_fast.kernels import cpu
from saerec_fast.types import Activation

N_FEATURES = 300
ADD = [Edit(3, "add", 2.0), Edit(7, "add", -1.5)]
PLANS = {
    "empty": SteeringPlan(),
    "add": SteeringPlan(ADD),
    "nothing added": SteeringPlan([Edit(3, "add", 2.0), Edit(3, "add", -2.0)]),
    "direction": SteeringPlan([Direction([1.0] * 24, 0.5), *ADD]),
    "add last": SteeringPlan(ADD, positions="last"),
    "add clipped": SteeringPlan(ADD, max_relative_norm=0.1, on_excess="clip"),
    "edit": SteeringPlan([Edit(3, "set", 2.0), Edit(9, "scale", 0.0), Edit(250, "clamp_max", 0.1), *ADD]),
    "many edits": SteeringPlan([Edit(feature, "scale", 0.5) for feature in range(0, 300, 9)]),
    "edit last": SteeringPlan([Edit(3, "set", 2.0)], positions="last"),
    "add reconstruct": SteeringPlan(ADD, mode="reconstruct"),
    "edit reconstruct": SteeringPlan([Edit(3, "set", 2.0), *ADD], mode="reconstruct"),
}

pytestmark = pytest.mark.usefixtures("isa", "reading")


@pytest.fixture(params=["exchange", "attributes"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read through torch's C interface, or by their attributes as where torch has none."""
    if request.param == "attributes":
        monkeypatch.setattr(cpu, "TENSOR_EXCHANGE", None)
    elif cpu.TENSOR_EXCHANGE is None:
        pytest.skip("this torch has no C interface to its tensors")


def make_sae(
    activation: Activation | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> fast.SparseAutoencoder:
    sae = fast.SparseAutoencoder(24, N_FEATURES, activation or fast.ReLU(), dtype=dtype, **options).eval()
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_()
    return sae


def make_states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, 24).to(dtype)
    x.view(-1)[::7] = -0.0
    return x


def bound(sae: fast.SparseAutoencoder) -> _C.PlainSteer:
    plain = sae.bind_steer()
    assert plain is not None
    return plain


def plans_of(plan: Any, strengths: Tensor | None = None) -> _C.SteerPlans:
    plans = steer_plans(plan, strengths)
    assert plans is not None
    return plans


def run(plain: _C.PlainSteer, x: Tensor, mask: Tensor | None, plans: _C.SteerPlans) -> Tensor:
    steered = plain.run(x, mask, plans)
    assert steered is not None, "left to the general way"
    assert x.numel() == 0 or steered.data_ptr() != x.data_ptr()
    return steered


@torch.no_grad()
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [fast.ReLU(), fast.TopK(8)], ids=repr)
def test_every_pass_has_the_bits_of_the_general_way(activation: Activation, dtype: torch.dtype, name: str) -> None:
    sae, plan = make_sae(activation, dtype, mean=0.2, std=1.5), PLANS[name]
    plain, shared = bound(sae), plans_of(plan)
    for shape in ((1, 1), (1, 17), (3, 15), (2, 129), (0, 5), (2, 0)):
        x, plans = make_states(*shape, dtype=dtype), plans_of(plan)
        x[:1, :1, 3] = torch.nan
        partly = torch.rand(shape) < 0.6
        for mask in (None, torch.ones(shape, dtype=torch.bool), partly, torch.zeros(shape, dtype=torch.bool)):
            expected = sae.steer(x, plan, valid=mask)
            for _ in range(3):
                assert_same_bits(run(plain, x, mask, plans), expected)
            # These were last run with sequences of another length.
            assert_same_bits(run(plain, x, mask, shared), expected)
            if mask is not None:
                assert_same_bits(run(plain, x, mask[..., None], plans), expected)


@torch.no_grad()
def test_rows_without_a_plan_beside_rows_that_only_add() -> None:
    sae, x = make_sae(), make_states(3, 5)
    plain, plans = bound(sae), plans_of([PLANS["add"], None, PLANS["add"]])
    for _ in range(4):
        steered = run(plain, x, None, plans)
        assert_same_bits(steered[1], x[1])
        assert_same_bits(steered[::2], sae.steer(x[::2], PLANS["add"]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["add", "edit", "many edits", "edit reconstruct"])
def test_any_number_of_threads(name: str) -> None:
    sae, plan, x = make_sae(), PLANS[name], make_states(64, 50)
    plain, plans = bound(sae), plans_of(plan)
    expected = sae.steer(x, plan)
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert_same_bits(run(plain, x, None, plans), expected)


@torch.no_grad()
@pytest.mark.parametrize("ops", [("add", "add"), ("set", "scale")])
@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_strengths_are_read_in_every_pass(ops: tuple[Any, Any], shape: tuple[int, ...]) -> None:
    sae, x = make_sae(), make_states(3, 5)
    plan = SteeringPlan([Edit(3, ops[0], 1.0), Edit(9, ops[1], 1.0)])
    strengths = torch.ones(shape)
    plain, plans = bound(sae), plans_of(plan, strengths)
    for change in (1.0, 1.0, 1.0, -2.0, 1.0, 1.0, 0.0, 1.0, 1.0):
        strengths.mul_(change)
        own = strengths if strengths.dim() == 1 else strengths[:, None]
        assert_same_bits(run(plain, x, None, plans), sae.steer(x, plan, strengths=own))


@torch.no_grad()
@pytest.mark.parametrize("name", ["add", "edit"])
def test_plans_that_move_to_another_autoencoder(name: str) -> None:
    """What was made of the plans belongs to the autoencoder they last ran with, and to its weights at that time."""
    plan, x = PLANS[name], make_states(3, 5)
    plans, first, second = plans_of(plan), make_sae(), make_sae()
    for sae in (first, first, second, first):
        assert_same_bits(run(bound(sae), x, None, plans), sae.steer(x, plan))
    plain = bound(first)
    run(plain, x, None, plans)
    first.W_dec.mul_(2.0)
    assert plain.run(x, None, plans) is None
    assert_same_bits(run(bound(first), x, None, plans), first.steer(x, plan))


@torch.no_grad()
def test_an_infinite_decoder_row_changes_no_row_whose_feature_stays() -> None:
    sae, plan = make_sae(), SteeringPlan([Edit(3, "scale", 0.5), Edit(9, "scale", 0.5)])
    sae.W_dec[3] = torch.inf
    x = make_states(40, 1)
    active = sae.encode(x).dense()[..., 3] > 0
    assert active.any()
    assert not active.all()
    steered = run(bound(sae), x, None, plans_of(plan))
    assert steered[active].isinf().all()
    assert steered[~active].isfinite().all()
    assert_same_bits(steered, sae.steer(x, plan))


class Wrapped(Tensor):
    pass


@torch.no_grad()
@pytest.mark.parametrize("name", ["add", "edit"])
def test_what_is_not_plain_is_left_to_the_general_way(name: str) -> None:
    sae, x, mask = make_sae(), make_states(3, 5), torch.ones(3, 5, dtype=torch.bool)
    plain, plans = bound(sae), plans_of(PLANS[name])
    run(plain, x, mask, plans)
    for other in (
        x.double(),
        x.bfloat16(),
        x.to("meta"),
        x.transpose(0, 1),
        x[:, :, :23],
        x[0, 0],
        x[None],
        torch.zeros(3, 5, 23),
        torch._efficientzerotensor((3, 5, 24)),
        x.as_subclass(Wrapped),
        torch.nn.Parameter(x),
        x.to_sparse(),
        None,
        3.0,
    ):
        assert plain.run(other, None, plans) is None  # type: ignore[arg-type]
    for other in (
        mask.int(),
        mask[:, :4],
        mask[:2],
        mask.T.contiguous(),
        torch.ones(5, 3, dtype=torch.bool).T,
        mask[..., None].expand(3, 5, 2).contiguous(),
        mask[None],
        mask.as_subclass(Wrapped),
        False,
    ):
        assert plain.run(x, other, plans) is None  # type: ignore[arg-type]
    with torch.enable_grad():
        assert plain.run(x, None, plans) is None
    assert torch.func.vmap(lambda part: torch.zeros(()) if plain.run(part, None, plans) is None else 1)(x).sum() == 0


@torch.no_grad()
def test_wrong_arguments_raise() -> None:
    plain, x = bound(make_sae()), make_states(3, 5)
    for arguments in (
        (),
        (x, None),
        (x, None, None),
        (x, None, SteeringPlan()),
        (x, None, plans_of(SteeringPlan()), 1),
    ):
        with pytest.raises(TypeError, match="run: expected"):
            plain.run(*arguments)
    with pytest.raises(TypeError, match="run: expected"):
        plain.run(x, None, _C.SteerPlans.__new__(_C.SteerPlans))


@torch.no_grad()
@pytest.mark.parametrize("name", ["add", "edit"])
def test_modes_see_what_is_done(name: str) -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    calls: list[str] = []
    sae, x = make_sae(), make_states(3, 5)
    plain, plans = bound(sae), plans_of(PLANS[name])
    with Seen():
        assert plain.run(x, None, plans) is None
    expected = [run(plain, x, None, plans) for _ in range(3)][-1]
    calls.clear()
    with Seen():
        steered = plain.run(x, None, plans)
    if steered is None:
        assert name == "edit"
    else:
        assert calls == ["aten.add.Tensor"]
        assert_same_bits(steered, expected)
