"""A plan in somebody else's model, against the same plan applied by hand to the hidden states of the site."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import os
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from saerec_fast import reference
from saerec_fast.api import steer_plans
from saerec_fast.sae import SparseAutoencoder
from saerec_fast.steering import SteeringHandle, attach
from saerec_fast.types import BatchTopK, Direction, Edit, JumpReLU, ReLU, SteeringPlan, TopK

# The package's function of that name hides the module.
attach_module, forward_module = (sys.modules[f"saerec_fast.steering.{name}"] for name in ("attach", "forward"))

WIDTH = 8
N_FEATURES = 24
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
EDITS = [Edit(0, "set", 3.0), Edit(7, "add", 1.5), Edit(7, "scale", 0.5), Edit(23, "clamp_min", 2.0)]


class Pair(NamedTuple):
    hidden: Tensor
    weights: Tensor


class Block(nn.Module):
    """A residual layer that returns its hidden state as ``layout`` says."""

    def __init__(self, layout: str = "tensor") -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.layout = layout

    def forward(self, hidden: Tensor) -> Any:
        hidden = hidden + torch.tanh(self.mlp(hidden))
        side = hidden[..., :3]
        return {
            "tensor": hidden,
            "tuple": (side, hidden, hidden + 1),
            "list": [side, hidden + 1, hidden],
            "named": Pair(hidden, side),
            "dict": {"hidden": hidden},
            "narrow": (side, 3),
        }[self.layout]


class Model(nn.Module):
    def __init__(self, layout: str = "tensor") -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block(layout)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor, *, fail: bool = False) -> Tensor:
        hidden = self.blocks[0](self.embedding(tokens))
        if fail:
            raise RuntimeError("asked to")
        hidden = self.blocks[1](hidden)
        if isinstance(hidden, tuple):
            hidden = next(part for part in hidden if part.shape[-1] == WIDTH)
        elif isinstance(hidden, list):
            hidden = hidden[-1]
        elif isinstance(hidden, dict):
            hidden = hidden["hidden"]
        return self.head(hidden)


def make_model(layout: str = "tensor") -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Model(layout).eval()


def make_sae(activation: Any = None, **options: Any) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(7)
    sae = SparseAutoencoder(WIDTH, N_FEATURES, activation, generator=generator, **options).eval()
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(N_FEATURES, generator=generator))
        sae.b_dec.copy_(0.1 * torch.randn(WIDTH, generator=generator))
    return sae


@pytest.fixture
def model() -> Model:
    return make_model()


@pytest.fixture
def sae() -> SparseAutoencoder:
    return make_sae()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def is_item(tokens: Tensor, **_: Any) -> Tensor:
    return tokens != 0


def through_block_0(model: Model, tokens: Tensor) -> Tensor:
    """Hidden states after block 0."""
    return model.blocks[0](model.embedding(tokens))


def from_block_0(model: Model, hidden: Tensor) -> Tensor:
    """The rest of the forward pass."""
    return model.head(model.blocks[1](hidden))


def what_is_attached(model: nn.Module) -> list[Any]:
    """All that hangs on the modules of a model: hooks, and what is in the place of a ``forward``."""
    return [
        attached
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) or name == "forward"
        for attached in (value if name != "forward" else [value])
    ]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("with_valid", [True, False])
@pytest.mark.parametrize("activation", [ReLU(), TopK(4), JumpReLU(0.2), BatchTopK(4, threshold=0.1)], ids=repr)
@torch.no_grad()
def test_acts_at_the_site(model: Model, activation: Any, mode: Any, positions: Any, with_valid: bool) -> None:
    sae = make_sae(activation, mean=0.3, std=1.7)
    plan = SteeringPlan(EDITS, mode=mode, positions=positions)
    plain = model(TOKENS)
    hidden = through_block_0(model, TOKENS)
    expected = from_block_0(model, sae.steer(hidden, plan, valid=is_item(TOKENS) if with_valid else None))
    with attach(model, "blocks.0", sae, plan, valid=is_item if with_valid else None):
        steered = model(TOKENS)
    assert torch.equal(steered, expected)
    assert not torch.allclose(steered, plain)
    assert torch.equal(model(TOKENS), plain)


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@torch.no_grad()
def test_last_is_the_last_valid_position_and_the_rest_keeps_its_bits(model: Model, sae: Any, mode: Any) -> None:
    plain = through_block_0(model, TOKENS)
    with attach(model, "blocks.0", sae, SteeringPlan(EDITS, mode=mode, positions="last"), valid=is_item) as handle:
        seen: list[Tensor] = []
        model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
        model(TOKENS)
        handle.update(SteeringPlan(EDITS, mode=mode, positions="all"))
        model(TOKENS)
    last, everywhere = seen
    steered = torch.zeros(TOKENS.shape, dtype=torch.bool)
    steered[[0, 1, 2], [4, 2, 0]] = True  # the fourth row is all padding
    assert same_bits(last[~steered], plain[~steered])
    assert (last[steered] != plain[steered]).any(-1).all()
    assert same_bits(everywhere[TOKENS == 0], plain[TOKENS == 0])
    assert (everywhere[TOKENS != 0] != plain[TOKENS != 0]).any(-1).all()
    assert torch.equal(everywhere[steered], last[steered])


@torch.no_grad()
def test_padding_on_the_left_needs_no_mask_for_last(model: Model, sae: SparseAutoencoder) -> None:
    left = TOKENS[:3].flip(1)
    plan = SteeringPlan(EDITS, positions="last")
    plain = through_block_0(model, left)
    with attach(model, "blocks.0", sae, plan):
        by_default = through_block_0(model, left)
    with attach(model, "blocks.0", sae, plan, valid=is_item):
        expected = model(left)
    assert same_bits(by_default[:, :-1], plain[:, :-1])
    assert (by_default[:, -1] != plain[:, -1]).any(-1).all()
    assert torch.equal(from_block_0(model, by_default), expected)


@torch.no_grad()
def test_mask_of_positions(model: Model, sae: SparseAutoencoder) -> None:
    mask = torch.zeros(TOKENS.shape, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = mask[1, 4] = True
    plain = through_block_0(model, TOKENS)
    with attach(model, "blocks.0", sae, SteeringPlan(EDITS, positions=mask)) as handle:
        steered = through_block_0(model, TOKENS)
        assert torch.equal((steered != plain).any(-1), mask)
        other = mask.roll(1, 0)
        handle.update(SteeringPlan(EDITS, positions=other))
        assert torch.equal((through_block_0(model, TOKENS) != plain).any(-1), other)
        assert mask.sum() == 3  # the caller's mask was not written to
        with pytest.raises(ValueError, match=r"positions: expected a mask of shape \(3, 5\), got \(4, 5\)"):
            through_block_0(model, TOKENS[:3])


@pytest.mark.parametrize("site", ["blocks.0", ""])
def test_empty_plan_changes_no_bit(model: Model, site: str) -> None:
    sae = make_sae(mean=0.3) if site else SparseAutoencoder(5, 7)
    with torch.no_grad():
        model.embedding.weight[1, ::2] = -0.0
        plain = model(TOKENS)
        with attach(model, site, sae, SteeringPlan(), valid=is_item):
            assert same_bits(model(TOKENS), plain)


@pytest.mark.parametrize("layout", ["tensor", "tuple", "list", "named"])
@torch.no_grad()
def test_output_layouts(layout: str, sae: SparseAutoencoder) -> None:
    model = make_model(layout)
    plan = SteeringPlan(EDITS)
    hidden = through_block_0(model, TOKENS)
    own: list[Any] = []
    forward = model.blocks[1].forward
    model.blocks[1].forward = lambda hidden: own.append(forward(hidden)) or own[-1]  # type: ignore[func-returns-value]
    plain = model.blocks[1](hidden)
    with attach(model, "blocks.1", sae, plan):
        steered = model.blocks[1](hidden)
    assert all(map(torch.equal, own[0], own[1]))  # a container that the module keeps is not written to either
    assert type(steered) is type(plain)
    if layout == "tensor":
        plain, steered = (plain,), (steered,)
    index = {"tensor": 0, "tuple": 1, "list": 2, "named": 0}[layout]
    for number, (before, after) in enumerate(zip(plain, steered, strict=True)):
        assert torch.equal(after, sae.steer(before, plan) if number == index else before)


@pytest.mark.parametrize("plan", [SteeringPlan(), SteeringPlan(EDITS), SteeringPlan(mode="reconstruct")], ids=repr)
@torch.no_grad()
def test_output_is_fresh_and_the_modules_own_is_not_written(sae: SparseAutoencoder, plan: SteeringPlan) -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    with attach(model, "0", sae, plan):
        out = model(x)
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        out.zero_()  # as libraries do with what a layer returned
    assert torch.equal(x, kept)


@torch.no_grad()
def test_module_instead_of_path_and_keyword_calls(model: Model, sae: SparseAutoencoder) -> None:
    plan = SteeringPlan(EDITS, positions="last")
    with attach(model, model.blocks[0], sae, plan, valid=is_item) as by_module:
        assert by_module.site == "blocks.0"
        expected = model(TOKENS)
    with attach(model, "blocks.0", sae, plan, valid=is_item):
        assert torch.equal(model(tokens=TOKENS, fail=False), expected)


@torch.no_grad()
def test_handles_nest_in_the_order_of_attaching(model: Model, sae: SparseAutoencoder) -> None:
    other = make_sae(TopK(3), std=0.5)
    set_plan, scale_plan = SteeringPlan([Edit(2, "set", 4.0)], positions="last"), SteeringPlan([Edit(2, "scale", 3.0)])
    plain = model(TOKENS)
    hidden = through_block_0(model, TOKENS)
    valid = is_item(TOKENS)
    once = sae.steer(hidden, set_plan, valid=valid)
    with attach(model, "blocks.0", sae, set_plan, valid=is_item):
        with attach(model, "blocks.0", other, scale_plan, valid=is_item):
            assert torch.equal(model(TOKENS), from_block_0(model, other.steer(once, scale_plan, valid=valid)))
        assert torch.equal(model(TOKENS), from_block_0(model, once))
    assert torch.equal(model(TOKENS), plain)
    outer = attach(model, "blocks.0", sae, set_plan, valid=is_item)
    inner = attach(model, "blocks.0", other, scale_plan, valid=is_item)
    outer.detach()  # in any order
    assert torch.equal(model(TOKENS), from_block_0(model, other.steer(hidden, scale_plan, valid=valid)))
    inner.detach()


@torch.no_grad()
def test_two_handles_on_the_model_itself(sae: SparseAutoencoder) -> None:
    model = nn.Sequential(nn.Embedding(10, WIDTH))
    plan = SteeringPlan(EDITS, positions="last")
    valid = is_item(TOKENS)
    expected = sae.steer(sae.steer(model(TOKENS), plan, valid=valid), plan, valid=valid)
    with attach(model, "", sae, plan, valid=is_item), attach(model, model, sae, plan, valid=is_item):
        assert torch.equal(model(TOKENS), expected)


def test_detach_twice_leaves_nothing_behind(model: Model, sae: SparseAutoencoder) -> None:
    state = list(model.state_dict())
    handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item)
    assert len(what_is_attached(model)) == 2
    assert list(model.state_dict()) == state
    assert handle.attached
    handle.detach()
    handle.detach()
    assert not handle.attached
    assert not what_is_attached(model)
    for use in (handle.__enter__, lambda: handle.update(SteeringPlan())):
        with pytest.raises(RuntimeError, match="detached"):
            use()


def test_an_error_in_the_block_or_in_the_forward_pass_leaves_nothing_behind(model: Model, sae: Any) -> None:
    from saerec_fast.steering.attach import _running

    plain = model(TOKENS)
    with (
        pytest.raises(RuntimeError, match="asked to"),
        attach(model, "blocks.1", sae, SteeringPlan(EDITS), valid=is_item),
    ):
        model(TOKENS, fail=True)
    assert not what_is_attached(model)
    assert _running.masks == ()
    assert torch.equal(model(TOKENS), plain)
    handle = attach(model, "blocks.1", sae, SteeringPlan(EDITS, positions="last"), valid=is_item)
    expected = model(TOKENS)
    with pytest.raises(RuntimeError, match="asked to"):
        model(TOKENS.flip(1), fail=True)
    assert torch.equal(model(TOKENS), expected)  # not the mask of the call that failed
    with pytest.raises(RuntimeError, match="valid"):
        model.blocks[1](through_block_0(model, TOKENS))
    handle.detach()


def test_a_handle_dies_with_its_model(sae: SparseAutoencoder) -> None:
    import weakref

    handle = attach(make_model(), "blocks.0", sae, SteeringPlan(EDITS))
    gone = weakref.ref(handle)
    del handle
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_copy_of_a_steered_model_is_steered_on_its_own(model: Model, sae: SparseAutoencoder) -> None:
    plain = model(TOKENS)
    with attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item) as handle:
        steered = model(TOKENS)
        twin = copy.deepcopy(model)
        handle.update(strengths=[0.0, 0.0, 1.0, 0.0])
        assert torch.equal(twin(TOKENS), steered)
    assert torch.equal(model(TOKENS), plain)
    assert torch.equal(twin(TOKENS), steered)


@torch.no_grad()
def test_strengths_replace_the_values(model: Model, sae: SparseAutoencoder) -> None:
    plan = SteeringPlan([Edit(2, "set", 4.0), Edit(5, "add", 1.0)])
    expected = {}
    for strengths in ((1.0, 2.0), (3.0, -1.0)):
        edits = [Edit(edit.feature, edit.op, value) for edit, value in zip(plan.edits, strengths, strict=True)]
        with attach(model, "blocks.0", sae, SteeringPlan(edits)):
            expected[strengths] = model(TOKENS)
    given = torch.tensor([1.0, 2.0])
    with attach(model, "blocks.0", sae, plan, strengths=given) as handle:
        assert torch.equal(model(TOKENS), expected[1.0, 2.0])
        address = handle.strengths.data_ptr()
        handle.update(strengths=[3, -1])
        assert torch.equal(model(TOKENS), expected[3.0, -1.0])
        handle.update(SteeringPlan([Edit(2, "set", 1.0), Edit(5, "add", 2.0)]))
        assert torch.equal(model(TOKENS), expected[1.0, 2.0])
        assert handle.plan.values == (1.0, 2.0)
        handle.update(plan, strengths=torch.tensor([3.0, -1.0], dtype=torch.float64))
        assert torch.equal(model(TOKENS), expected[3.0, -1.0])
        assert handle.strengths.data_ptr() == address
        assert given.tolist() == [1.0, 2.0]  # the caller's tensor was not written to
        handle.strengths.copy_(given)
        assert torch.equal(model(TOKENS), expected[1.0, 2.0])


@torch.no_grad()
def test_strengths_per_row(model: Model, sae: SparseAutoencoder) -> None:
    plan = SteeringPlan([Edit(2, "scale", 1.0), Edit(5, "add", 0.0)])
    strengths = torch.tensor([[1.0, 0.0], [3.0, 1.0], [1.0, 2.0], [1.0, 0.0]])
    plain = through_block_0(model, TOKENS)
    plain[3, 0, 0] = -0.0
    alone = []
    for row in range(4):
        with attach(model, "blocks.0", sae, plan, strengths=strengths[row]):
            alone.append(through_block_0(model, TOKENS)[row])
    with attach(model, "blocks.0", sae, plan, strengths=strengths) as handle:
        steered = through_block_0(model, TOKENS)
        assert torch.equal(steered, torch.stack(alone))
        assert same_bits(steered[0], plain[0])
        assert (steered[1:3] != plain[1:3]).any(-1).all()
        # One row's strengths touch no other row.
        handle.update(strengths=torch.cat([strengths[:2], torch.tensor([[9.0, 9.0]]), strengths[3:]]))
        assert same_bits(through_block_0(model, TOKENS)[[0, 1, 3]], steered[[0, 1, 3]])
        with pytest.raises(ValueError, match=r"strengths: expected \(3, 2\), .* got \(4, 2\)"):
            model(TOKENS[:3])
        handle.update(strengths=[1.0, 0.0])  # another shape
        assert torch.equal(through_block_0(model, TOKENS[:3]), plain[:3])


def test_rows_of_two_dimensional_hidden_states_take_strengths_of_their_own(sae: SparseAutoencoder) -> None:
    model = nn.Sequential(nn.Identity())
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    plan = SteeringPlan([Edit(2, "add", 0.0)])
    strengths = torch.tensor([[0.0], [1.0], [2.0]])
    with attach(model, "0", sae, plan, strengths=strengths):
        torch.testing.assert_close(model(x) - x, strengths * sae.W_dec[2])


def test_gradients_reach_the_strengths(sae: SparseAutoencoder) -> None:
    model = make_model().requires_grad_(False)
    sae.requires_grad_(False)
    plan = SteeringPlan([Edit(2, "add", 0.0), Edit(5, "set", 1.0)], positions="last")
    strengths = torch.tensor([[0.5, 1.0]] * 4, requires_grad=True)
    handle = attach(model, "blocks.0", sae, plan, valid=is_item, strengths=strengths)
    assert handle.strengths is strengths
    model(TOKENS).square().sum().backward()
    assert strengths.grad is not None
    gradient = strengths.grad.clone()
    assert (gradient[:3] != 0).all()
    assert (gradient[3] == 0).all()  # all padding
    step = 1e-2
    for row, column in ((0, 0), (1, 1)):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                strengths[row, column] += sign * step
                losses.append(model(TOKENS).square().sum())
                strengths[row, column] -= sign * step
        torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), gradient[row, column], rtol=2e-2, atol=1e-3)
    handle.update(strengths=torch.zeros(2))
    assert strengths[0, 1] == 1.0  # a plain update does not write to what the caller learns
    assert not handle.strengths.requires_grad
    handle.detach()


def test_strengths_that_are_learnt_in_half_precision(model: Model, sae: SparseAutoencoder) -> None:
    strengths = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    with attach(model, "blocks.0", sae, SteeringPlan([Edit(2, "add", 0.0)]), strengths=strengths):
        for _ in range(2):
            model(TOKENS).sum().backward()
    assert strengths.grad is not None
    assert strengths.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_types(dtype: torch.dtype) -> None:
    model, sae = make_model().to(dtype), make_sae(dtype=dtype)
    plan = SteeringPlan(EDITS)
    hidden = through_block_0(model, TOKENS)
    with attach(model, "blocks.0", sae, plan) as handle:
        steered = through_block_0(model, TOKENS)
        handle.update(strengths=torch.tensor([plan.values] * 4))
        assert torch.equal(through_block_0(model, TOKENS), steered)
    assert steered.dtype == dtype
    exact = make_sae(dtype=torch.float64)
    exact.load_state_dict(sae.state_dict())
    error = (steered.double() - exact.steer(hidden.double(), plan)).abs().max()
    assert error <= 40 * torch.finfo(dtype).eps


def test_inference_mode(model: Model, sae: SparseAutoencoder) -> None:
    with torch.inference_mode():
        given = torch.tensor([1.0, 2.0, 0.5, 0.0])
        mask = TOKENS != 0
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS, positions=mask), strengths=given)
        inside = model(TOKENS)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), inside)
    # What was made inside can be written to outside.
    handle.update(SteeringPlan(EDITS, positions=~mask), strengths=[0.0] * 4)
    model(TOKENS).sum().backward()
    with torch.inference_mode():
        handle.update(strengths=given)
        handle.update(SteeringPlan(EDITS, positions=TOKENS != 0), strengths=given)
        assert torch.equal(model(TOKENS), inside)
    handle.detach()


def test_threads_do_not_see_each_others_masks(sae: SparseAutoencoder) -> None:
    """Two forward passes: both have begun before either is steered, and both are steered before either ends."""
    model = make_model()
    plan = SteeringPlan(EDITS, positions="last")
    batches = [TOKENS[:2], TOKENS[:2].flip(1)]
    barrier = threading.Barrier(2, timeout=20)
    results: list[Any] = [None, None]
    with attach(model, "blocks.1", sae, plan, valid=is_item), torch.no_grad():
        expected = [model(batch) for batch in batches]

        def wait(*_: Any) -> None:
            barrier.wait()

        for block in model.blocks:
            block.register_forward_hook(wait)

        def run(number: int) -> None:
            with torch.no_grad():
                results[number] = model(batches[number])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not torch.equal(expected[0], expected[1])
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


class TestRequest:
    """Plans of one call in one thread."""

    OTHER = SteeringPlan([Edit(2, "add", -2.0), Direction([1.0] * WIDTH, 0.5)], positions="last")

    @torch.no_grad()
    def test_rows_follow_plans_of_their_own(self, model: Model, sae: SparseAutoencoder) -> None:
        hidden, plain = through_block_0(model, TOKENS), model(TOKENS)
        plans = [SteeringPlan(EDITS), None, self.OTHER, SteeringPlan(EDITS, mode="reconstruct")]
        with attach(model, "blocks.0", sae, SteeringPlan(), valid=is_item) as handle:
            with handle.request(plans):
                steered = model(TOKENS)
            after = model(TOKENS)
        assert same_bits(after, plain)
        assert same_bits(steered[1], plain[1])
        for row in (0, 2, 3):
            expected = sae.steer(hidden[row : row + 1], plans[row], valid=is_item(TOKENS[row : row + 1]))
            torch.testing.assert_close(steered[row], from_block_0(model, expected)[0])
        assert not same_bits(steered[0], plain[0])

    @torch.no_grad()
    def test_one_plan_for_the_batch_replaces_that_of_the_handle(self, model: Model, sae: SparseAutoencoder) -> None:
        with attach(model, "blocks.0", sae, self.OTHER, valid=is_item):
            expected = model(TOKENS)
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item, strengths=[0.0] * 4) as handle:
            own = model(TOKENS)
            with handle.request(SteeringPlan(EDITS)), handle.request(self.OTHER):
                assert same_bits(model(TOKENS), expected)
            assert same_bits(model(TOKENS), own)

    @torch.no_grad()
    def test_an_error_leaves_nothing_behind(self, model: Model, sae: SparseAutoencoder) -> None:
        with attach(model, "blocks.0", sae, SteeringPlan(), valid=is_item) as handle:
            plain = model(TOKENS)
            with pytest.raises(RuntimeError, match="asked to"), handle.request(self.OTHER):
                model(TOKENS, fail=True)
            assert same_bits(model(TOKENS), plain)

    def test_gradients_flow_through_rows_of_their_own(self, model: Model, sae: SparseAutoencoder) -> None:
        handle = attach(model, "blocks.0", sae, SteeringPlan(), valid=is_item)
        with handle.request([SteeringPlan(EDITS), None, self.OTHER, None]):
            model(TOKENS).square().sum().backward()
        assert model.embedding.weight.grad is not None
        assert sae.W_dec.grad is not None
        assert sae.W_dec.grad[7].abs().sum() > 0

    @torch.no_grad()
    def test_masks_of_one_sequence(self, model: Model, sae: SparseAutoencoder) -> None:
        mask = torch.tensor([False, True, False, False, True])
        plan = SteeringPlan(EDITS, positions=mask)
        with attach(model, "blocks.0", sae, SteeringPlan()) as handle, handle.request([None, plan, None, None]):
            steered = model(TOKENS)
        hidden = through_block_0(model, TOKENS)
        hidden[1] = sae.steer(hidden[1], plan)
        torch.testing.assert_close(steered, from_block_0(model, hidden))

    @torch.no_grad()
    def test_threads_do_not_see_each_others_requests(self, model: Model, sae: SparseAutoencoder) -> None:
        handle = attach(model, "blocks.0", sae, SteeringPlan(), valid=is_item)
        plans = [SteeringPlan([Edit(thread, "add", 1.0 + thread)]) for thread in range(8)]

        @torch.no_grad()
        def alone(plan: SteeringPlan) -> Tensor:
            with handle.request(plan):
                return model(TOKENS)

        expected = [alone(plan) for plan in plans]
        wrong: list[int] = []

        def work(thread: int) -> None:
            answers = [alone(plans[thread]) for _ in range(50)]
            wrong.extend(thread for answer in answers if not same_bits(answer, expected[thread]))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert wrong == []
        assert not any(same_bits(one, expected[0]) for one in expected[1:])

    @torch.no_grad()
    def test_compiled_code_follows_requests(self, model: Model, sae: SparseAutoencoder) -> None:
        handle = attach(model, "blocks.0", sae, SteeringPlan(), valid=is_item)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        plain = compiled(TOKENS)
        for plan in (self.OTHER, [SteeringPlan(EDITS), None, self.OTHER, None]):
            with handle.request(plan):
                torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
                assert not torch.equal(compiled(TOKENS), plain)
        assert torch.equal(compiled(TOKENS), plain)

    def test_errors(self, model: Model, sae: SparseAutoencoder) -> None:
        handle = attach(model, "blocks.0", sae, SteeringPlan())
        with (
            pytest.raises(ValueError, match=r"feature.*23, got 24"),
            handle.request([SteeringPlan([Edit(24, "add", 1)])]),
        ):
            pass
        with pytest.raises(ValueError, match="directions of width 8"), handle.request(SteeringPlan([Direction([1.0])])):
            pass
        with pytest.raises(TypeError, match="expected a SteeringPlan or a list of them, got str"), handle.request("x"):  # type: ignore[arg-type]
            pass
        with pytest.raises(TypeError, match="plan: expected a SteeringPlan, got int"), handle.request([3]):  # type: ignore[list-item]
            pass
        with handle.request([None]), pytest.raises(ValueError, match=r"a plan or None for each of \(4,\), got 1"):
            model(TOKENS)
        handle.detach()
        with pytest.raises(RuntimeError, match="detached"), handle.request(self.OTHER):
            pass


class TestUpdatesMeanwhile:
    """Another thread's update at any moment of a forward pass: the pass does what was in force, or what comes."""

    OLD = SteeringPlan([Edit(2, "add", 4.0), Edit(5, "set", 1.0)])
    UPDATES = (
        SteeringPlan([Edit(2, "add", 1.0), Edit(5, "set", 3.0)]),
        SteeringPlan([Edit(7, "set", 6.0), Edit(3, "scale", 2.0)]),
        SteeringPlan([Edit(7, "set", 6.0)], mode="reconstruct"),
    )

    @staticmethod
    def during(line: int, forward: Any, update: Any) -> tuple[Any, bool]:
        """What ``forward`` returns where another thread calls ``update`` before the ``line``-th line that this one
        runs of the steering code, and whether there were as many. Where that line has to be over first, it waits."""
        left = line
        other = threading.Thread(target=update)

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in (attach_module.__file__, forward_module.__file__):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    other.start()
                    other.join(0.02)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            output = forward()
        finally:
            sys.settrace(before)
        if left <= 0:
            other.join()
        return output, left <= 0

    @pytest.mark.parametrize(
        ("old", "new", "is_bound"),
        [
            (OLD, UPDATES[0], True),
            (OLD, UPDATES[1], True),
            (OLD, UPDATES[1], False),
            (OLD.at_positions(TOKENS > 2), UPDATES[0].at_positions(TOKENS < 5), False),
        ],
        ids=["values", "plan", "plan, nothing bound", "mask"],
    )
    @torch.no_grad()
    def test_at_every_line(
        self, model: Model, sae: SparseAutoencoder, old: SteeringPlan, new: SteeringPlan, is_bound: bool
    ) -> None:
        with attach(model, "blocks.0", sae, old, valid=is_item) as handle:

            def forward(plan: SteeringPlan) -> Tensor:
                handle.update(plan)
                for _ in range(2 * is_bound):
                    model(TOKENS)
                return model(TOKENS)

            answers = [forward(old), forward(new)]
            assert not torch.equal(*answers)
            for line in range(1, 1000):
                forward(old)
                if not is_bound:
                    handle._state.plain = None
                output, ran = self.during(line, lambda: model(TOKENS), lambda: handle.update(new))
                assert any(torch.equal(output, answer) for answer in answers), f"line {line}: a mixture"
                if not ran:
                    break
                assert torch.equal(model(TOKENS), answers[1]), f"line {line}: the update is lost"
        assert line > 5

    @pytest.mark.parametrize(
        "valid",
        [{"valid": is_item}, {"valid": lambda hidden: hidden[..., 0] > 0, "valid_from": "blocks.0"}],
        ids=["of the model", "of the site"],
    )
    @torch.no_grad()
    def test_detaching_at_every_line(self, model: Model, sae: SparseAutoencoder, valid: dict[str, Any]) -> None:
        """Of a pass, and a pass at every line of the detach: it is that of a model with the plan or without it."""

        def attached() -> SteeringHandle:
            handle = attach(model, "blocks.0", sae, self.OLD, **valid)
            for _ in range(2):
                model(TOKENS)
            return handle

        plain = model(TOKENS)
        with attached():
            steered = model(TOKENS)
        assert not torch.equal(plain, steered)
        for line in range(1, 1000):
            handle = attached()
            output, ran = self.during(line, lambda: model(TOKENS), handle.detach)
            assert any(torch.equal(output, answer) for answer in (plain, steered)), f"line {line} of a pass"
            handle.detach()
            if not ran:
                break
        assert line > 5
        for line in range(1, 1000):
            handle = attached()
            outputs: list[Tensor] = []

            def one_pass(outputs: list[Tensor] = outputs) -> None:
                with torch.no_grad():
                    outputs.append(model(TOKENS))

            _, ran = self.during(line, handle.detach, one_pass)
            if not ran:
                break
            assert any(torch.equal(outputs[0], answer) for answer in (plain, steered)), f"line {line} of the detach"
        assert line > 5

    @torch.no_grad()
    def test_no_pass_reads_values_that_are_being_written(
        self, model: Model, sae: SparseAutoencoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A write that stops half-way, in the middle of which another thread wants to steer."""
        plans = [SteeringPlan([Edit(2, "add", one), Edit(5, "add", one)]) for one in (1.0, 3.0)]
        expected = []
        for plan in plans:
            with attach(model, "blocks.0", sae, plan):
                expected.append(model(TOKENS))
        copy_whole, other, answers = Tensor.copy_, threading.Thread(), []

        def run() -> None:
            with torch.no_grad():
                answers.append(model(TOKENS))

        def copy_by_halves(into: Tensor, values: Tensor) -> Tensor:
            nonlocal other
            monkeypatch.setattr(Tensor, "copy_", copy_whole)
            into[0] = values[0]
            other = threading.Thread(target=run)
            other.start()
            other.join(0.5)
            return copy_whole(into, values)

        with attach(model, "blocks.0", sae, plans[0]) as handle:
            assert all(torch.equal(model(TOKENS), expected[0]) for _ in range(2))
            monkeypatch.setattr(Tensor, "copy_", copy_by_halves)
            handle.update(plans[1])
            other.join()
            assert len(answers) == 1
            assert any(torch.equal(answers[0], answer) for answer in expected)
            assert torch.equal(model(TOKENS), expected[1])

    @torch.no_grad()
    def test_many_threads_beside_updates(self, model: Model, sae: SparseAutoencoder) -> None:
        plans = [self.OLD, *self.UPDATES]
        expected = []
        for plan in plans:
            with attach(model, "blocks.0", sae, plan):
                expected.append(model(TOKENS))
        mixed: list[Tensor] = []
        with attach(model, "blocks.0", sae, self.OLD) as handle:

            @torch.no_grad()
            def work() -> None:
                for _ in range(100):
                    output = model(TOKENS)
                    if not any(torch.equal(output, answer) for answer in expected):
                        mixed.append(output)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            turn = 0
            while any(thread.is_alive() for thread in threads):
                turn += 1
                handle.update(plans[turn % len(plans)])
            for thread in threads:
                thread.join()
        assert not mixed
        assert turn > len(plans)

    def test_a_fork_waits_for_the_write(self, model: Model, sae: SparseAutoencoder) -> None:
        """Else the child would find the lock of the values taken, by a thread that it does not have."""
        held, forked = threading.Event(), threading.Event()

        def write() -> None:
            with attach_module._values:
                held.set()
                forked.wait(0.2)

        writer = threading.Thread(target=write)
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS)), torch.no_grad():
            writer.start()
            held.wait()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of newer Pythons: threads and fork
                child = os.fork()
            if child == 0:
                taken = False
                try:
                    taken = attach_module._values.acquire(timeout=10)
                finally:
                    os._exit(0 if taken else 1)
            forked.set()
            writer.join()
            assert os.waitpid(child, 0)[1] == 0


class TestPlainCall:
    """What one bound call does of a handle's own plan must be what is done without it, whatever changes."""

    @staticmethod
    def reference(model: Model, sae: SparseAutoencoder, plan: SteeringPlan, **options: Any) -> Tensor:
        block = copy.deepcopy(model.blocks[0])
        vars(block).pop("forward", None)
        return from_block_0(model, sae.steer(block(model.embedding(TOKENS)), plan, **options))

    @pytest.fixture(autouse=True)
    def _without_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def test_is_bound_by_the_first_pass_and_used_by_the_second(self, model: Model, sae: SparseAutoencoder) -> None:
        plan = SteeringPlan(EDITS)
        expected = self.reference(model, sae, plan, valid=is_item(TOKENS))
        with attach(model, "blocks.0", sae, plan, valid=is_item) as handle:
            first = model(TOKENS)
            assert handle._state.plain is not None
            assert handle._state.plain.is_current()
            handle._steer_any = None  # type: ignore[method-assign, assignment]  # only the bound call is left
            assert same_bits(model(TOKENS), first)
            assert torch.equal(first, expected)

    @pytest.mark.parametrize("how", ["made", "loaded", "moved"])
    def test_is_bound_where_all_is_made_under_inference_mode(self, model: Model, how: str, tmp_path: Path) -> None:
        plan, outside = SteeringPlan(EDITS), make_sae()
        outside.save(tmp_path)
        with torch.inference_mode():
            make = {
                "made": make_sae,
                "loaded": lambda: SparseAutoencoder.load(tmp_path),
                "moved": lambda: outside.double().float(),
            }
            sae = make[how]()
            with attach(model, "blocks.0", sae, plan) as handle:
                first = model(TOKENS)
                plain = handle._state.plain
                assert plain is not None
                assert same_bits(model(TOKENS), first)
                assert handle._state.plain is plain
                assert plain.is_current()
                sae.W_dec.mul_(1.5)
                assert not plain.is_current()
                changed = model(TOKENS)
                assert same_bits(changed, self.reference(model, sae, plan))
                assert not same_bits(changed, first)

    @pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "mean", "std"])
    @pytest.mark.parametrize("how", ["written to", "data replaced", "object replaced"])
    def test_changed_weights_are_noticed(self, model: Model, name: str, how: str) -> None:
        sae = make_sae(mean=0.3, std=1.7)
        plan = SteeringPlan(EDITS, mode="reconstruct")
        handle = attach(model, "blocks.0", sae, plan)
        before = [model(TOKENS) for _ in range(3)][-1]
        changed = getattr(sae, name) * 1.5
        if how == "written to":
            getattr(sae, name).copy_(changed)
        elif how == "data replaced":
            getattr(sae, name).data = changed
        else:
            setattr(sae, name, nn.Parameter(changed) if name[1] == "_" else changed)
        after = model(TOKENS)
        handle.detach()
        assert not same_bits(after, before)
        assert same_bits(after, self.reference(model, sae, plan))

    def test_changed_activation_and_mode_are_noticed(self, model: Model) -> None:
        sae, plan = make_sae(TopK(2)), SteeringPlan(EDITS)
        handle = attach(model, "blocks.0", sae, plan)
        for change in (
            lambda: setattr(sae, "activation", TopK(20)),
            lambda: setattr(sae, "activation", JumpReLU(torch.full((N_FEATURES,), 0.4))),
            lambda: sae.threshold.fill_(0.0),
            sae.train,
            sae.eval,
        ):
            model(TOKENS), model(TOKENS)
            change()
            steered = model(TOKENS)
            torch.testing.assert_close(steered, self.reference(model, sae, plan))
        handle.detach()

    def test_follows_updates_and_requests(self, model: Model, sae: SparseAutoencoder) -> None:
        plan, other = SteeringPlan(EDITS), SteeringPlan([Edit(4, "set", 6.0)], positions="last")
        with attach(model, "blocks.0", sae, plan) as handle:
            own = [model(TOKENS) for _ in range(2)][-1]
            handle.strengths.mul_(2.0)
            strengths = torch.tensor(plan.values) * 2.0
            assert same_bits(model(TOKENS), self.reference(model, sae, plan, strengths=strengths))
            with handle.request(other):
                assert same_bits(model(TOKENS), self.reference(model, sae, other))
            handle.update(plan)
            assert same_bits(model(TOKENS), own)
            handle.update(other)
            for _ in range(2):
                assert same_bits(model(TOKENS), self.reference(model, sae, other))
            handle.update(strengths=torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
            rows = [model(TOKENS) for _ in range(2)][-1]
            handle.update(strengths=[2.0])
            assert same_bits(model(TOKENS)[1], rows[1])

    def test_what_is_not_plain_after_what_was(self, model: Model, sae: SparseAutoencoder) -> None:
        plan = SteeringPlan(EDITS)
        host = nn.Sequential(nn.Identity())
        with attach(host, "0", sae, plan):
            x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1))
            for _ in range(2):
                expected = host(x)
            assert same_bits(host(x.transpose(0, 1)), expected.transpose(0, 1).contiguous())
            torch.testing.assert_close(host(x.unsqueeze(0))[0], expected)
            assert same_bits(host(x[0]), expected[0])
            with pytest.raises(ValueError, match="returned shape"):
                host(x[..., :5])
            with torch.enable_grad():
                assert host(x.requires_grad_()).requires_grad
            x = x.detach()
            x[1, 2, 3] = torch.nan
            with_nan = host(x)
            assert with_nan[1, 2].isnan().all()
            others = torch.ones(3, 4, dtype=torch.bool)
            others[1, 2] = False
            assert same_bits(with_nan[others], expected[others])

    def test_a_trace_holds_what_is_done(self, model: Model, sae: SparseAutoencoder) -> None:
        other = torch.tensor([[2, 2, 3, 4]])
        sae.requires_grad_(False)  # a trace takes no other constants
        for plan in (SteeringPlan([Edit(2, "add", 3.0)]), SteeringPlan(EDITS)):
            with attach(model, "blocks.0", sae, plan):
                for _ in range(3):
                    model(TOKENS)
                expected = model(other)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of shapes that become constants, and of torch.jit itself
                    traced = torch.jit.trace(model, (other,), check_trace=False)
                torch.testing.assert_close(traced(other.clone()), expected)
                assert torch.equal(model(other), expected)

    def test_a_mask_with_a_column(self, model: Model, sae: SparseAutoencoder) -> None:
        plan = SteeringPlan(EDITS)
        expected = self.reference(model, sae, plan, valid=is_item(TOKENS))
        with attach(model, "blocks.0", sae, plan, valid=lambda tokens: is_item(tokens)[..., None]):
            for _ in range(3):
                assert torch.equal(model(TOKENS), expected)

    @pytest.mark.parametrize("valid", [lambda tokens: tokens, lambda tokens: None, lambda tokens: tokens[:, 1:] != 0])
    def test_a_wrong_mask_after_a_right_one(self, model: Model, sae: SparseAutoencoder, valid: Any) -> None:
        masks = iter([is_item, is_item, valid])
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=lambda tokens: next(masks)(tokens)):
            model(TOKENS), model(TOKENS)
            with pytest.raises((TypeError, ValueError), match="valid: expected"):
                model(TOKENS)

    @pytest.mark.parametrize("change", ["double", "half"])
    def test_learnt_strengths_that_move_to_another_dtype(
        self, model: Model, sae: SparseAutoencoder, change: str
    ) -> None:
        holder = torch.nn.ParameterList([torch.full((len(EDITS),), 2.0)])
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS)) as handle:
            handle.update(strengths=holder[0])
            expected = [model(TOKENS) for _ in range(2)][-1]
            getattr(holder, change)()
            assert handle.strengths.dtype != torch.float32
            assert torch.equal(model(TOKENS), expected)

    def test_negative_views_are_read_as_what_they_stand_for(self, sae: SparseAutoencoder) -> None:
        plan, x = SteeringPlan(EDITS), torch.randn(2, 3, sae.d_model)
        plain, plans = sae.bind_steer(), steer_plans(plan)
        assert plain is not None
        assert plans is not None
        assert plain.run(x, None, plans) is not None
        negative = torch._neg_view(x)
        assert plain.run(negative, None, plans) is None
        assert torch.equal(sae.steer(negative, plan), sae.steer(-x, plan))

    def test_buffers_of_somebody_else_do_not_matter(self, model: Model, sae: SparseAutoencoder) -> None:
        with torch.inference_mode():
            note = torch.ones(1)
        sae.register_buffer("note", note)
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS)) as handle:
            steered = [model(TOKENS) for _ in range(2)]
            assert same_bits(*steered)
            assert handle._state.plain is not None
        assert handle._state.plain is None

    @pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 5), (2, 1, 4), ()], ids=str)
    def test_strengths_that_do_not_fit_are_not_taken(self, sae: SparseAutoencoder, shape: tuple[int, ...]) -> None:
        plain, x = sae.bind_steer(), torch.randn(2, 3, sae.d_model)
        assert plain is not None
        for fitting in ((4,), (2, 4)):
            plans = steer_plans(SteeringPlan(EDITS), torch.zeros(fitting))
            assert plans is not None
            assert plain.run(x, None, plans) is not None
        plans = steer_plans(SteeringPlan(EDITS), torch.zeros(shape))
        assert plans is not None
        assert plain.run(x, None, plans) is None

    def test_a_plan_that_comes_while_another_is_bound(
        self, model: Model, sae: SparseAutoencoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another thread's update, put where it hurts most: after the binding, before it is kept."""
        bind_steer, newer = sae.bind_steer, SteeringPlan([Edit(5, "add", 3.0)])
        expected = self.reference(model, sae, newer, valid=is_item(TOKENS))
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item) as handle:

            def late(*arguments: Any) -> Any:
                bound = bind_steer(*arguments)
                monkeypatch.setattr(sae, "bind_steer", bind_steer)
                handle.update(newer)
                return bound

            monkeypatch.setattr(sae, "bind_steer", late)
            model(TOKENS)
            for _ in range(3):
                assert torch.equal(model(TOKENS), expected)

    def test_copies_and_pickles_bind_their_own(self, model: Model, sae: SparseAutoencoder) -> None:
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item) as handle:
            steered = [model(TOKENS) for _ in range(2)][-1]
            assert handle._state.plain is not None
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert all(same_bits(twin(TOKENS), steered) for _ in range(2))

    def test_warnings_of_a_limit_come_every_time(self, model: Model, sae: SparseAutoencoder) -> None:
        plan = SteeringPlan([Edit(2, "add", 100.0)], max_relative_norm=0.5, on_excess="reject")
        with attach(model, "blocks.0", sae, plan):
            for _ in range(3):
                with pytest.raises(ValueError, match="times its norm"):
                    model(TOKENS)


class TestPlainRequests:
    """The same of what requests ask for: plans of one pass, by the bound call, are what they are without it."""

    LAST = SteeringPlan([Edit(2, "add", -2.0), Direction([1.0] * WIDTH, 0.5)], positions="last")
    WHOLE = SteeringPlan([Edit(3, "clamp_max", 0.2), Edit(9, "set", 2.0)], mode="reconstruct")
    CLIPPED = SteeringPlan([Edit(2, "add", 50.0)], max_relative_norm=0.5, on_excess="clip")
    PER_ROW = torch.arange(16.0).reshape(4, 4)

    @pytest.fixture(autouse=True)
    def _without_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    @staticmethod
    def only_bound(handles: Sequence[SteeringHandle], forward: Callable[[], Tensor]) -> Tensor:
        """What ``forward`` returns where nothing but the bound calls can steer."""
        for handle in handles:
            handle._steer_any = None  # type: ignore[method-assign, assignment]
        try:
            return forward()
        finally:
            for handle in handles:
                del handle._steer_any

    @staticmethod
    def without_bound(handles: Sequence[SteeringHandle], forward: Callable[[], Tensor]) -> Tensor:
        for handle in handles:
            handle._state.plain = None
        return forward()

    def check(self, handles: Sequence[SteeringHandle], forward: Callable[[], Tensor]) -> Tensor:
        expected = self.without_bound(handles, forward)
        assert same_bits(self.only_bound(handles, forward), expected)
        return expected

    @pytest.mark.parametrize(
        "requests",
        [
            pytest.param([{"plan": LAST}], id="one"),
            pytest.param([{"plan": SteeringPlan()}], id="empty"),
            pytest.param([{"plan": [LAST, None, WHOLE, CLIPPED]}], id="rows"),
            pytest.param([{"plan": [None, LAST, LAST, SteeringPlan()]}], id="one for two rows"),
            pytest.param([{"plan": [None] * 4}], id="none"),
            pytest.param([{"strengths": [1.0, 2.0, 3.0, 4.0]}], id="strengths"),
            pytest.param([{"strengths": PER_ROW}], id="strengths of rows"),
            pytest.param([{"plan": WHOLE, "strengths": PER_ROW[:, :2].contiguous()}], id="plan, strengths of rows"),
            pytest.param([{"plan": LAST, "strengths": PER_ROW[:, :2].contiguous()}], id="last, strengths of rows"),
            pytest.param([{"plan": LAST}, {"plan": [WHOLE, None, LAST, None]}], id="nested plans"),
            pytest.param([{"plan": [WHOLE] * 4}, {"strengths": PER_ROW}], id="nested strengths"),
        ],
    )
    @pytest.mark.parametrize("activation", [None, TopK(4), JumpReLU(0.2)], ids=["relu", "topk", "jumprelu"])
    @pytest.mark.parametrize("valid", [None, is_item], ids=["no mask", "mask"])
    def test_same_bits(self, model: Model, activation: Any, valid: Any, requests: list[dict[str, Any]]) -> None:
        sae = make_sae(activation)
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=valid)
        own = model(TOKENS)
        with ExitStack() as stack:
            for request in requests:
                stack.enter_context(handle.request(**request))
            steered = self.check([handle], lambda: model(TOKENS))
            assert not same_bits(steered, own)
            plans = requests[-1].get("plan")
            if isinstance(plans, list):
                for row, plan in enumerate(plans):
                    with handle.request(plan or SteeringPlan()):
                        assert torch.equal(steered[row], model(TOKENS)[row])
        assert same_bits(self.check([handle], lambda: model(TOKENS)), own)

    def test_hidden_states_without_a_sequence(self, sae: SparseAutoencoder) -> None:
        host, x = nn.Sequential(nn.Identity()), torch.randn(3, WIDTH)
        handle = attach(host, "0", sae, SteeringPlan(EDITS))
        for request in ({"plan": [self.WHOLE, None, self.CLIPPED]}, {"strengths": self.PER_ROW[:3]}):
            with handle.request(**request):  # type: ignore[arg-type]
                assert not same_bits(self.check([handle], lambda: host(x)), x)
        with handle.request([None, self.LAST, None]):
            for _ in range(2):
                with pytest.raises(ValueError, match="'last' needs hidden states"):
                    host(x)

    def test_empty_batch(self, model: Model, sae: SparseAutoencoder) -> None:
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS))
        for request in ({"plan": []}, {"plan": self.LAST}, {"strengths": torch.zeros(0, 4)}):
            with handle.request(**request):  # type: ignore[arg-type]
                assert self.check([handle], lambda: model(TOKENS[:0])).shape == (0, 5, 5)

    def test_errors_come_all_the_same(self, model: Model, sae: SparseAutoencoder) -> None:
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS))
        expected = [model(TOKENS) for _ in range(2)][-1]
        rejects = SteeringPlan([Edit(2, "add", 50.0)], max_relative_norm=0.5, on_excess="reject")
        masked = SteeringPlan(EDITS, positions=torch.ones(4, dtype=torch.bool))
        for request, message in (
            ({"plan": [None, self.LAST, None]}, r"a plan or None for each of \(4,\), got 3"),
            ({"strengths": self.PER_ROW[:3]}, r"strengths: expected \(4, 4\), one row for each"),
            ({"plan": [None, None, rejects, None]}, "times its norm"),
            ({"plan": rejects}, "times its norm"),
            ({"plan": [None, masked, None, None]}, r"positions: expected a mask of shape \(5,\)"),
            ({"plan": masked}, "positions: expected"),
        ):
            with handle.request(**request):  # type: ignore[arg-type]
                for _ in range(2):
                    with pytest.raises(ValueError, match=message):
                        model(TOKENS)
            assert same_bits(self.only_bound([handle], lambda: model(TOKENS)), expected)

    def test_strengths_written_to_or_given_other_memory(self, model: Model, sae: SparseAutoencoder) -> None:
        requested, learnt = torch.ones(4, 4), nn.Parameter(torch.ones(4, 4))
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS))
        with handle.request(strengths=requested):
            self.check([handle], lambda: model(TOKENS))
            requested.copy_(self.PER_ROW)
            expected = self.check([handle], lambda: model(TOKENS))
        handle.update(strengths=learnt)
        before = self.check([handle], lambda: model(TOKENS))
        learnt.copy_(self.PER_ROW)
        assert same_bits(self.only_bound([handle], lambda: model(TOKENS)), expected)
        learnt.data = torch.ones(4, 4)
        assert same_bits(self.only_bound([handle], lambda: model(TOKENS)), before)
        learnt.data = self.PER_ROW.clone().t()
        assert same_bits(model(TOKENS), self.without_bound([handle], lambda: model(TOKENS)))
        learnt.data = torch.ones(2, 8)
        with pytest.raises(ValueError, match=r"strengths: expected \(4, 4\)"):
            model(TOKENS)

    def test_strengths_of_rows_of_the_handle(self, model: Model, sae: SparseAutoencoder) -> None:
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS), strengths=torch.zeros(4, 4))
        before = self.check([handle], lambda: model(TOKENS))
        handle.update(strengths=self.PER_ROW)
        after = self.only_bound([handle], lambda: model(TOKENS))
        assert same_bits(after, self.without_bound([handle], lambda: model(TOKENS)))
        assert not torch.equal(after[1:], before[1:])
        with pytest.raises(ValueError, match=r"strengths: expected \(3, 4\), one row for each"):
            model(TOKENS[:3])

    def test_two_handles(self, model: Model, sae: SparseAutoencoder) -> None:
        handles = [attach(model, f"blocks.{i}", sae, SteeringPlan(EDITS), valid=is_item) for i in (0, 1)]
        own = self.check(handles, lambda: model(TOKENS))
        with handles[0].request([self.LAST, None, None, self.WHOLE]):
            outer = self.check(handles, lambda: model(TOKENS))
            with handles[1].request(strengths=self.PER_ROW):
                both = self.check(handles, lambda: model(TOKENS))
            assert same_bits(model(TOKENS), outer)
        assert not torch.equal(own, outer)
        assert not torch.equal(both, outer)

    def test_threads_with_plans_of_their_own(self, model: Model, sae: SparseAutoencoder) -> None:
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item)
        requests = [
            [SteeringPlan([Edit(i, "set", 1.0 + i)]), None, self.LAST, None][:: 1 - 2 * (i % 2)] for i in range(6)
        ]
        expected = []
        for plans in requests:
            with handle.request(plans):
                expected.append(self.check([handle], lambda: model(TOKENS)))
        wrong: list[int] = []

        @torch.no_grad()
        def work(i: int) -> None:
            for _ in range(50):
                with handle.request(requests[i]):
                    wrong.extend([i] * (not same_bits(model(TOKENS), expected[i])))

        with ThreadPoolExecutor(len(requests)) as pool:
            list(pool.map(work, range(len(requests))))
        assert wrong == []
        assert not any(same_bits(one, expected[0]) for one in expected[1:])

    def test_adding_depends_on_what_it_reads_alone(self, model: Model) -> None:
        sae = make_sae(mean=0.3, std=1.7)
        handle = attach(model, "blocks.0", sae, SteeringPlan([Edit(7, "add", 1.5)]))
        steered = self.check([handle], lambda: model(TOKENS))
        for changed in (sae.W_enc, sae.b_enc, sae.b_dec, sae.mean):
            changed.mul_(1.5)
            assert same_bits(self.only_bound([handle], lambda: model(TOKENS)), steered)
        with handle.request(self.WHOLE), pytest.raises(TypeError, match="NoneType"):
            self.only_bound([handle], lambda: model(TOKENS))
        for changed in (sae.W_dec, sae.std):
            changed.mul_(1.5)
            with pytest.raises(TypeError, match="NoneType"):
                self.only_bound([handle], lambda: model(TOKENS))
            assert not torch.equal(self.check([handle], lambda: model(TOKENS)), steered)
            steered = model(TOKENS)
        sae.activation = BatchTopK(2)  # without a threshold, nothing is steered
        with pytest.raises(ValueError, match="threshold"):
            model(TOKENS)

    def test_learnt_strengths_that_hold_the_handle_are_collected(self, model: Model, sae: SparseAutoencoder) -> None:
        strengths = nn.Parameter(torch.ones(4))
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS), strengths=strengths)
        model(TOKENS), model(TOKENS)
        assert handle._state.plans is not None
        strengths.handle = handle  # type: ignore[attr-defined]
        alive = weakref.ref(handle)
        del model.blocks[0].forward
        del handle, strengths
        gc.collect()
        assert alive() is None


class TestModes:
    """Modes that look at torch's calls see the steering too, bound or not."""

    @pytest.fixture(autouse=True)
    def _without_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("kind", [TorchDispatchMode, TorchFunctionMode])
    @pytest.mark.parametrize(
        "plan", [SteeringPlan(EDITS), [SteeringPlan(EDITS), None, None, None]], ids=["one", "rows"]
    )
    def test_see_the_op(self, model: Model, sae: SparseAutoencoder, kind: Any, plan: Any) -> None:
        seen: list[str] = []

        class Mode(kind):  # type: ignore[misc]
            def see(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

            __torch_dispatch__ = __torch_function__ = see

        handle = attach(model, "blocks.0", sae, SteeringPlan())
        for _ in range(2):
            model(TOKENS)
        with handle.request(plan):
            expected = model(TOKENS)
            with Mode():
                steered = model(TOKENS)
            torch.testing.assert_close(steered, expected)
            assert sum("saerec_fast" in name for name in seen) == 1
            n_seen = len(seen)
            assert same_bits(model(TOKENS), expected)
        assert len(seen) == n_seen

    def test_fake_tensors(self, model: Model, sae: SparseAutoencoder) -> None:
        attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item)
        for _ in range(2):
            model(TOKENS)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            output = model(mode.from_tensor(TOKENS))
        assert isinstance(output, FakeTensor)
        assert output.shape == (4, 5, 5)
        expected = from_block_0(
            model, sae.steer(through_block_0(make_model(), TOKENS), SteeringPlan(EDITS), valid=is_item(TOKENS))
        )
        assert all(torch.equal(model(TOKENS), expected) for _ in range(2))

    def test_autocast(self, model: Model, sae: SparseAutoencoder) -> None:
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS))
        model(TOKENS), model(TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            steered = model(TOKENS)
            handle._state.plain = None
            assert torch.equal(steered, model(TOKENS))


# torch has decompositions of its own scripted when forward-mode derivatives are asked for first.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
class TestTransforms:
    """Forward-mode derivatives and batching, which are there without gradients too."""

    PLANS = (
        SteeringPlan(EDITS),
        SteeringPlan([*EDITS, Direction([1.0] * WIDTH, 2.0)], mode="reconstruct", positions="last"),
    )

    @pytest.fixture(params=PLANS, ids=["delta", "reconstruct"])
    def site(self, request: pytest.FixtureRequest, sae: SparseAutoencoder) -> Iterator[tuple[nn.Module, Any]]:
        """A linear layer that is steered, bound already, and what it should compute, in differentiable PyTorch."""
        host, plan = nn.Sequential(nn.Linear(WIDTH, WIDTH)), request.param
        twin = copy.deepcopy(host)
        weights = (sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec, sae.activation)
        with torch.no_grad(), attach(host, "0", sae, plan) as handle:
            for _ in range(2):
                host(self.x())
            assert handle._state.plain is not None
            yield host, lambda x: reference.steer(twin(x), *weights, plan)

    @staticmethod
    def x(seed: int = 1) -> Tensor:
        return torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(seed))

    def test_jvp(self, site: tuple[nn.Module, Any]) -> None:
        host, expected = site
        output, tangent = torch.func.jvp(host, (self.x(),), (self.x(2),))
        wanted, wanted_tangent = torch.func.jvp(expected, (self.x(),), (self.x(2),))
        torch.testing.assert_close(output, wanted)
        torch.testing.assert_close(tangent, wanted_tangent)
        plain = torch.func.jvp(host[0].forward.forward, (self.x(),), (self.x(2),))[1]
        assert not torch.allclose(tangent, plain)

    def test_dual_numbers(self, site: tuple[nn.Module, Any]) -> None:
        host, expected = site
        wanted = torch.func.jvp(expected, (self.x(),), (self.x(2),))[1]
        with forward_ad.dual_level():
            output = forward_ad.unpack_dual(host(forward_ad.make_dual(self.x(), self.x(2))))
            assert output.tangent is not None
            torch.testing.assert_close(output.tangent, wanted)
        assert forward_ad._current_level == -1

    def test_vmap(self, site: tuple[nn.Module, Any]) -> None:
        host, _ = site
        batches = torch.stack([self.x(seed) for seed in range(3)])
        torch.testing.assert_close(torch.func.vmap(host)(batches), torch.stack([host(x) for x in batches]))

    def test_jacobian(self, site: tuple[nn.Module, Any]) -> None:
        """Both at once, per sequence."""
        host, expected = site
        x = self.x()[:1, :2]
        torch.testing.assert_close(torch.func.jacfwd(host)(x), torch.func.jacfwd(expected)(x))


def test_a_handle_that_its_autoencoder_holds_is_collected(model: Model) -> None:
    sae = make_sae()
    sae.handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS))  # type: ignore[assignment]
    with torch.no_grad():
        model(TOKENS), model(TOKENS)
    assert sae.handle._state.plain is not None
    alive = weakref.ref(sae)
    del model.blocks[0].forward
    del sae
    gc.collect()
    assert alive() is None


def test_copies_have_requests_of_their_own(model: Model, sae: SparseAutoencoder) -> None:
    """A pickle of another process may bring a key that a handle of this one has."""
    other = SteeringPlan([Edit(7, "set", 6.0)])
    with attach(model, "blocks.0", sae, SteeringPlan(EDITS)) as handle:
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        steered = model(TOKENS)
        with handle.request(other):
            assert not torch.equal(model(TOKENS), steered)
            assert all(torch.equal(twin(TOKENS), steered) for twin in twins)


class TestForward:
    """What lies in the place of a module's ``forward`` while a handle is there."""

    def test_keeps_signature_and_name(self, model: Model, sae: SparseAutoencoder) -> None:
        signature, code = inspect.signature(model.forward), model.forward.__code__
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item):
            assert "forward" in vars(model)
            assert inspect.signature(model.forward) == signature
            assert list(signature.parameters) == ["tokens", "fail"]
            assert model.forward.__name__ == "forward"
            assert model.forward.__code__ is code

    @torch.no_grad()
    def test_a_call_of_it_is_steered(self, model: Model, sae: SparseAutoencoder) -> None:
        plain = model.forward(TOKENS)
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS, positions="last"), valid=is_item):
            steered = model(TOKENS)
            assert not torch.equal(steered, plain)
            assert torch.equal(model.forward(TOKENS), steered)
            hidden = model.blocks[0].forward.__wrapped__(model.embedding(TOKENS))  # type: ignore[union-attr]
        expected = sae.steer(hidden, SteeringPlan(EDITS, positions="last"), valid=is_item(TOKENS))
        assert torch.equal(steered, from_block_0(model, expected))
        assert torch.equal(model.forward(TOKENS), plain)

    @pytest.mark.parametrize("first", ["hook", "handle"])
    @torch.no_grad()
    def test_hooks_are_around_it(self, model: Model, sae: SparseAutoencoder, first: str) -> None:
        """Hooks see what was steered, and ``valid`` what they changed, whichever was there first."""
        given: list[Tensor] = []
        seen: list[Tensor] = []

        def valid(tokens: Tensor) -> Tensor:
            given.append(tokens)
            return tokens != 0

        def add_hooks() -> None:
            model.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
            model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))

        if first == "hook":
            add_hooks()
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=valid)
        if first == "handle":
            add_hooks()
        model(TOKENS)
        handle.detach()
        flipped = TOKENS.flip(1)
        assert torch.equal(given[0], flipped)
        hidden = through_block_0(model, flipped)
        assert torch.equal(seen[0], sae.steer(hidden, SteeringPlan(EDITS), valid=is_item(flipped)))

    @torch.no_grad()
    def test_somebody_elses_comes_back(self, model: Model, sae: SparseAutoencoder) -> None:
        block, forward = model.blocks[0], model.blocks[0].forward

        def doubled(hidden: Tensor) -> Tensor:
            return 2 * forward(hidden)

        block.forward = doubled
        hidden = through_block_0(model, TOKENS)
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS)):
            assert torch.equal(through_block_0(model, TOKENS), sae.steer(hidden, SteeringPlan(EDITS)))
        assert vars(block)["forward"] is doubled

    @torch.no_grad()
    def test_somebody_elses_on_top_stays(self, model: Model, sae: SparseAutoencoder) -> None:
        hidden = through_block_0(model, TOKENS)
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS))
        block, ours = model.blocks[0], model.blocks[0].forward

        def negated(hidden: Tensor) -> Tensor:
            return -ours(hidden)

        block.forward = negated
        steered = sae.steer(hidden, SteeringPlan(EDITS))
        assert torch.equal(through_block_0(model, TOKENS), -steered)
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(model.embedding(TOKENS)), -steered)
        handle.detach()
        assert block.forward is negated
        assert torch.equal(through_block_0(model, TOKENS), -hidden)
        torch.testing.assert_close(compiled(model.embedding(TOKENS)), -hidden)
        del compiled
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS)):
            assert torch.equal(through_block_0(model, TOKENS), sae.steer(-hidden, SteeringPlan(EDITS)))
        assert block.forward is negated
        block.forward = ours  # as who put theirs there would undo it
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS)):
            assert torch.equal(through_block_0(model, TOKENS), steered)
        assert not what_is_attached(model)

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
    @torch.no_grad()
    def test_detached_in_any_order(self, model: Model, sae: SparseAutoencoder, order: tuple[int, ...]) -> None:
        plain = model(TOKENS)
        plans = [SteeringPlan([Edit(number, "add", 2.0)]) for number in range(3)]
        hidden = through_block_0(model, TOKENS)
        valids = [is_item, None, lambda tokens: tokens != 1]
        handles = [attach(model, "blocks.0", sae, plan, valid=valid) for plan, valid in zip(plans, valids, strict=True)]
        left = [0, 1, 2]
        for number in order:
            handles[number].detach()
            left.remove(number)
            expected = hidden
            for other in left:
                valid = valids[other]
                expected = sae.steer(expected, plans[other], valid=None if valid is None else valid(TOKENS))
            for _ in range(2):
                assert torch.equal(model(TOKENS), from_block_0(model, expected) if left else plain)
        assert not what_is_attached(model)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_drops_the_mask_of_that_pass_alone(self, model: Model, sae: Any, error: Any) -> None:
        from saerec_fast.steering.attach import _running

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, tokens: Tensor) -> Tensor:
                with pytest.raises(error):
                    self.model(tokens)
                seen.append(_running.masks)
                return self.model(tokens)

        def fail(*_: Any) -> None:
            fails.remove()
            raise error

        outer, seen = Outer(), []  # type: ignore[var-annotated]
        fails = model.head.register_forward_pre_hook(fail)
        with (
            attach(outer, "model.blocks.1", sae, SteeringPlan(EDITS), valid=is_item) as first,
            attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item),
        ):
            outer(TOKENS)
            assert [key for key, _ in seen[0]] == [first._key]
            assert _running.masks == ()

    @torch.no_grad()
    def test_a_lasting_mask_outlives_the_passes_around(self, model: Model, sae: SparseAutoencoder) -> None:
        """Of a module before the site, inside of one that another handle's ``valid`` reads."""
        plan, other = SteeringPlan(EDITS, positions="last"), SteeringPlan([Edit(4, "add", 2.0)])
        first = attach(model, "blocks.1", sae, plan, valid=is_item, valid_from="embedding")
        second = attach(model, "blocks.0", sae, other, valid=is_item)
        for tokens in (TOKENS, TOKENS.flip(1)):
            model(tokens)
            expected = sae.steer(
                Block.forward(model.blocks[1], hidden := torch.ones(4, 5, WIDTH)), plan, valid=tokens != 0
            )
            assert torch.equal(model.blocks[1](hidden), expected)
        second.detach()
        assert torch.equal(model.blocks[1](hidden), expected)
        first._valid = lambda tokens: 1 // 0
        with pytest.raises(ZeroDivisionError):
            model(TOKENS)
        with pytest.raises(RuntimeError, match="ran outside"):  # the one before does not count any more
            model.blocks[1](hidden)
        first.detach()

    @torch.no_grad()
    def test_attaching_while_another_thread_detaches(self, sae: SparseAutoencoder) -> None:
        """Put where it would hurt most: when the last handle is out, before the module gets its own forward back."""
        attached: list[SteeringHandle] = []

        class Watched(nn.Identity):
            def __delattr__(self, name: str) -> None:
                thread.start()
                thread.join(0.2)  # it waits for the detach to be over
                super().__delattr__(name)

        host, x = nn.Sequential(Watched()), torch.ones(2, 3, WIDTH)
        thread = threading.Thread(target=lambda: attached.append(attach(host, "0", sae, SteeringPlan(EDITS))))
        attach(host, "0", sae, SteeringPlan()).detach()
        thread.join()
        assert attached[0].attached
        assert torch.equal(host(x), sae.steer(x, SteeringPlan(EDITS)))

    @pytest.mark.parametrize("where", ["root", "inside"])
    @pytest.mark.parametrize("site", ["", "0"])
    @torch.no_grad()
    def test_graph_module(self, sae: SparseAutoencoder, where: str, site: str) -> None:
        graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
        twin = copy.deepcopy(graph)
        x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))
        plain, hidden = graph(x), graph.get_submodule("0")(x)
        handle = attach(graph, site, sae, SteeringPlan(EDITS), valid=lambda x: x[..., 0] > 0)
        steered = sae.steer(hidden if site else plain, SteeringPlan(EDITS), valid=x[..., 0] > 0)
        steered = steered.tanh() if site else steered
        graph.recompile()
        for _ in range(2):
            assert torch.equal(graph(x), steered)
        models = [module if where == "root" else nn.Sequential(module) for module in (twin, graph)]
        compiled = [torch.compile(model, backend="eager", fullgraph=True) for model in models]
        for _ in range(2):
            torch.testing.assert_close(compiled[0](x), plain)
            torch.testing.assert_close(compiled[1](x), steered)
        handle.detach()
        assert not what_is_attached(graph)
        for one in (graph, *compiled):
            torch.testing.assert_close(one(x), plain)

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("site", ["", "blocks.0", "blocks.0.mlp"])
    @pytest.mark.parametrize("valid", [is_item, None], ids=["valid", "all_valid"])
    # torch's own, in strict mode.
    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
    @torch.no_grad()
    def test_export(self, sae: SparseAutoencoder, site: str, strict: bool, valid: Any) -> None:
        class States(Model):
            def forward(self, tokens: Tensor) -> Tensor:
                return through_block_0(self, tokens)

        model = States().eval()
        model.sae = sae  # strict mode wants every parameter that is read to be the model's
        plain = model(TOKENS)
        handle = attach(model, site, sae, SteeringPlan(EDITS, positions="last"), valid=valid)
        steered = [model(TOKENS) for _ in range(2)][-1]
        assert not torch.allclose(steered, plain)
        exported = torch.export.export(model, (TOKENS,), strict=strict).module()
        torch.testing.assert_close(exported(TOKENS), steered)
        assert torch.equal(model(TOKENS), steered)
        handle.detach()
        assert not what_is_attached(model)
        torch.testing.assert_close(exported(TOKENS), steered)
        assert torch.equal(model(TOKENS), plain)


class TestCompiled:
    """A plan inside a compiled graph; ``backend`` counts graphs and runs them as they are."""

    graphs: int

    def backend(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward

    def compile(self, model: Any) -> Any:
        self.graphs = 0
        return torch.compile(model, backend=self.backend, fullgraph=True)

    @pytest.mark.parametrize("mode", ["delta", "reconstruct"])
    @pytest.mark.parametrize("positions", ["all", "last", "mask"])
    @torch.no_grad()
    def test_follows_updates_without_compiling_again(self, model: Model, mode: Any, positions: Any) -> None:
        sae = make_sae(TopK(4), mean=0.3, std=1.7)
        if positions == "mask":
            positions = TOKENS > 2
        valid = None if isinstance(positions, Tensor) else is_item
        plain = model(TOKENS)
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS, mode=mode, positions=positions), valid=valid)
        twin = copy.deepcopy(model)
        compiled = self.compile(model)
        first = compiled(TOKENS)
        torch.testing.assert_close(first, twin(TOKENS))
        assert not torch.allclose(first, plain)
        graphs = self.graphs
        handle.update(strengths=[0.5, -2.0, 3.0, 1.0])
        second = compiled(TOKENS)
        assert not torch.allclose(second, first)
        torch.testing.assert_close(second, model(TOKENS))
        edits = [Edit(edit.feature, edit.op, 0.25) for edit in EDITS]
        shifted = positions.roll(1, 0) if isinstance(positions, Tensor) else positions
        handle.update(SteeringPlan(edits, mode=mode, positions=shifted))
        third = compiled(TOKENS)
        assert not torch.allclose(third, second)
        torch.testing.assert_close(third, model(TOKENS))
        assert self.graphs == graphs
        handle.update(SteeringPlan([Edit(4, "set", 6.0)], mode=mode, positions=positions))
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
        handle.detach()
        assert torch.equal(compiled(TOKENS), plain)

    @torch.no_grad()
    def test_is_one_graph_inside_a_compiled_function(self, model: Model, sae: SparseAutoencoder) -> None:
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS, positions="last"), valid=is_item):
            expected = model(TOKENS)
            serve = self.compile(lambda tokens: model(tokens).softmax(-1))
            torch.testing.assert_close(serve(TOKENS), expected.softmax(-1))
            assert self.graphs == 1
            with torch.inference_mode():
                torch.testing.assert_close(serve(TOKENS), expected.softmax(-1))

    @torch.no_grad()
    def test_strengths_per_row(self, model: Model, sae: SparseAutoencoder) -> None:
        strengths = torch.rand(4, 4, generator=torch.Generator().manual_seed(2))
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item, strengths=strengths) as handle:
            compiled = self.compile(model)
            torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
            graphs = self.graphs
            handle.update(strengths=strengths.flip(0))
            torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
            assert self.graphs == graphs

    @torch.no_grad()
    def test_in_several_threads(self, model: Model, sae: SparseAutoencoder) -> None:
        batches = [TOKENS, TOKENS.flip(1), TOKENS.flip(0)]
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS, positions="last"), valid=is_item):
            expected = [model(batch) for batch in batches]
            compiled = self.compile(model)
            results: list[Any] = [None] * len(batches)

            def run(number: int) -> None:
                with torch.no_grad():
                    results[number] = compiled(batches[number])

            threads = [threading.Thread(target=run, args=(number,)) for number in range(len(batches))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted)

    # torch looks at .grad of every tensor that enters a compiled function.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
    def test_gradients_reach_the_strengths(self, model: Model, sae: SparseAutoencoder) -> None:
        strengths = torch.tensor([0.5, 0.0, 1.0, 1.0], requires_grad=True)
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item, strengths=strengths):
            (eager,) = torch.autograd.grad(model(TOKENS).square().sum(), strengths)
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            (traced,) = torch.autograd.grad(compiled(TOKENS).square().sum(), strengths)
        torch.testing.assert_close(traced, eager)

    @pytest.mark.parametrize("first", ["plain", "steered"])
    @pytest.mark.parametrize("site", ["", "blocks", "blocks.0", "blocks.0.mlp"])
    @pytest.mark.parametrize("valid", [is_item, None], ids=["valid", "all_valid"])
    @torch.no_grad()
    def test_beside_an_unsteered_one(self, site: str, first: str, valid: Any) -> None:
        """Both of one class and shape: neither runs what was compiled for the other, whichever was compiled first."""

        class Two(Model):  # of the width of the states also at its end
            def forward(self, tokens: Tensor) -> Tensor:
                return self.blocks(self.embedding(tokens))

        plain, steered = Two().eval(), Two().eval()
        plain.blocks = nn.Sequential(*plain.blocks)
        steered.blocks = nn.Sequential(*steered.blocks)
        steered.load_state_dict(plain.state_dict())
        handle = attach(steered, site, make_sae(), SteeringPlan(EDITS), valid=valid)
        expected = {"plain": plain(TOKENS), "steered": steered(TOKENS)}
        assert not torch.allclose(expected["plain"], expected["steered"])
        compiled = {"plain": self.compile(plain), "steered": self.compile(steered)}
        order = sorted(compiled, key=lambda name: name != first)
        for name in order * 2:
            torch.testing.assert_close(compiled[name](TOKENS), expected[name])
        handle.detach()
        for name in order:
            torch.testing.assert_close(compiled[name](TOKENS), expected["plain"])

    @torch.no_grad()
    def test_a_second_handle_beside_an_unsteered_one(self, sae: SparseAutoencoder) -> None:
        plain, steered = make_model(), make_model()
        compiled_plain = self.compile(plain)
        unsteered = compiled_plain(TOKENS)
        other = attach(steered, "blocks.0", sae, SteeringPlan([Edit(4, "set", 6.0)]))
        handle = attach(steered, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item)
        compiled = self.compile(steered)
        torch.testing.assert_close(compiled(TOKENS), steered(TOKENS))
        handle.detach()
        torch.testing.assert_close(compiled(TOKENS), steered(TOKENS))
        assert not torch.allclose(compiled(TOKENS), unsteered)
        other.detach()
        torch.testing.assert_close(compiled(TOKENS), unsteered)
        assert all("forward" not in vars(module) for module in steered.modules())

    @torch.no_grad()
    def test_a_mask_that_lasts(self, model: Model, sae: SparseAutoencoder) -> None:
        plan = SteeringPlan(EDITS, positions="last")
        with attach(model, "blocks.0", sae, plan, valid=is_item, valid_from="embedding"):
            compiled = self.compile(model)
            for tokens in (TOKENS, TOKENS.flip(1), TOKENS.flip(0)):
                expected = sae.steer(Block.forward(model.blocks[0], model.embedding(tokens)), plan, valid=tokens != 0)
                torch.testing.assert_close(compiled(tokens), from_block_0(model, expected))
            assert self.graphs == 1

    @torch.no_grad()
    def test_a_steered_forward_alone(self, model: Model, sae: SparseAutoencoder) -> None:
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS)):
            steered = through_block_0(model, TOKENS)
            compiled = self.compile(model.blocks[0].forward)
            torch.testing.assert_close(compiled(model.embedding(TOKENS)), steered)

    def test_copies_and_pickles_keep_apart(self, model: Model, sae: SparseAutoencoder) -> None:
        attach(model, "blocks.0", sae, SteeringPlan(EDITS))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            forward = vars(twin.blocks[0])["forward"]
            assert forward.module is twin.blocks[0]
            assert forward.forward.__self__ is twin.blocks[0]
            assert forward.forward.__func__ is Block.forward

    def test_a_forward_put_there_by_somebody_else_stays(self, model: Model, sae: SparseAutoencoder) -> None:
        handle = attach(model, "blocks.0", sae, SteeringPlan(EDITS))
        theirs = model.blocks[0].forward

        def wrapped(hidden: Tensor) -> Tensor:
            return theirs(hidden)

        model.blocks[0].forward = wrapped
        handle.detach()
        assert model.blocks[0].forward is wrapped
        attach(model, "blocks.0", sae, SteeringPlan(EDITS)).detach()
        assert model.blocks[0].forward is wrapped

    def test_attaching_later_is_an_error(self, model: Model, sae: SparseAutoencoder) -> None:
        compiled = self.compile(model)
        for target, site in ((compiled, "blocks.0"), (compiled, "_orig_mod.blocks.0"), (model, "blocks.0")):
            with pytest.raises(ValueError, match="not compiled yet"):
                attach(target, site, sae, SteeringPlan(EDITS))
        assert not what_is_attached(model)
        cycle: list[Any] = [compiled]
        cycle.append(cycle)
        del compiled, target, cycle
        # Nobody is left who would ignore the handle, though the wrapper has not been collected yet.
        attach(model, "blocks.0", sae, SteeringPlan(EDITS)).detach()

    @pytest.mark.parametrize("where", ["", "blocks.0", "blocks.0.mlp"])
    def test_compiled_in_place(self, model: Model, sae: SparseAutoencoder, where: str) -> None:
        model.get_submodule(where).compile(backend="eager")
        if where == "blocks.0.mlp":
            attach(model, "blocks.0", sae, SteeringPlan(EDITS)).detach()  # compiled code inside the site is fine
        with pytest.raises(ValueError, match="not compiled yet"):
            attach(model, "blocks.0.mlp", sae, SteeringPlan(EDITS))

    def test_compiled_forward(self, model: Model, sae: SparseAutoencoder) -> None:
        """In the place of a module's own, also where a handle lies on top."""
        model.forward = torch.compile(model.forward, backend="eager")
        handle = attach(model.blocks, "0", sae, SteeringPlan(EDITS))
        with pytest.raises(ValueError, match="not compiled yet"):
            attach(model, "blocks.1", sae, SteeringPlan(EDITS))
        handle.detach()
        del model.forward
        model.embedding.forward = torch.compile(model.embedding.forward, backend="eager")
        attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item, valid_from="embedding")
        with pytest.raises(ValueError, match="not compiled yet"):
            attach(model, "embedding", sae, SteeringPlan(EDITS))

    def test_compiled_part_of_a_model(self, model: Model, sae: SparseAutoencoder) -> None:
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
        with pytest.raises(ValueError, match="not compiled yet"):
            attach(model, "blocks.0._orig_mod.mlp", sae, SteeringPlan(EDITS))
        attach(model, "blocks.1", sae, SteeringPlan(EDITS)).detach()


class TestErrors:
    @pytest.mark.parametrize(
        ("site", "message"),
        [
            ("blocks.00", r"no module 'blocks.00'; near matches: .*blocks\.0"),
            ("blocks.0.attention", r"near matches|blocks\.0 has: blocks\.0\.mlp"),
            ("qqqqqq", "it has: embedding, blocks, head"),
            ("blocks", "ModuleList, which is never called"),
        ],
    )
    def test_unknown_site(self, model: Model, sae: SparseAutoencoder, site: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            attach(model, site, sae, SteeringPlan(EDITS))

    def test_module_of_another_model(self, model: Model, sae: SparseAutoencoder) -> None:
        with pytest.raises(ValueError, match="expected a module of Model, got another Block"):
            attach(model, make_model().blocks[0], sae, SteeringPlan(EDITS))

    def test_unknown_feature(self, model: Model, sae: SparseAutoencoder) -> None:
        plan = SteeringPlan([Edit(N_FEATURES, "set", 1.0)])
        with pytest.raises(ValueError, match=r"feature.*23, got 24"):
            attach(model, "blocks.0", sae, plan)
        with attach(model, "blocks.0", sae, SteeringPlan(EDITS)) as handle:
            before = model(TOKENS)
            with pytest.raises(ValueError, match=r"feature.*23, got 24"):
                handle.update(plan)
            assert torch.equal(model(TOKENS), before)
        assert not what_is_attached(model)

    @pytest.mark.parametrize(
        ("strengths", "error", "message"),
        [
            ([1.0, 2.0], ValueError, r"expected shape \(4,\) or \(B, 4\).*got \(2,\)"),
            (torch.ones(4, 3), ValueError, r"got \(4, 3\)"),
            (torch.ones(2, 5, 4), ValueError, r"got \(2, 5, 4\)"),
            (torch.tensor(1.0), ValueError, r"got \(\)"),
            ([1.0, 2.0, float("nan"), 0.0], ValueError, "finite"),
            (torch.tensor([1.0, 2.0, float("inf"), 0.0]), ValueError, "finite"),
            (torch.tensor([1.0, 2.0, float("inf"), 0.0], requires_grad=True), ValueError, "finite"),
            (torch.ones(4, dtype=torch.bool), TypeError, "bool"),
            (torch.ones(4, dtype=torch.complex64), TypeError, "complex"),
            ("four", TypeError, "expected numbers"),
            ([[1.0], [1.0, 2.0]], TypeError, "expected numbers"),
        ],
    )
    def test_strengths(self, model: Model, sae: Any, strengths: Any, error: Any, message: str) -> None:
        plan = SteeringPlan(EDITS)
        with pytest.raises(error, match=f"strengths: .*{message}"):
            attach(model, "blocks.0", sae, plan, strengths=strengths)
        with attach(model, "blocks.0", sae, plan) as handle:
            for update in ({"strengths": strengths}, {"plan": SteeringPlan(EDITS[::-1]), "strengths": strengths}):
                with pytest.raises(error, match="strengths: "):
                    handle.update(**update)
            assert handle.plan is plan
            assert handle.strengths.tolist() == list(plan.values)

    @pytest.mark.parametrize(
        ("argument", "value"),
        [("model", "gpt2"), ("site", 3), ("sae", nn.Linear(3, 3)), ("plan", [Edit(0, "set", 1.0)]), ("valid", "mask")],
    )
    def test_wrong_types(self, model: Model, sae: SparseAutoencoder, argument: str, value: Any) -> None:
        arguments: dict[str, Any] = {"model": model, "site": "blocks.0", "sae": sae, "plan": SteeringPlan()}
        with pytest.raises(TypeError, match=f"{argument}: expected"):
            attach(**{**arguments, argument: value})

    def test_nothing_to_update(self, model: Model, sae: SparseAutoencoder) -> None:
        with (
            attach(model, "blocks.0", sae, SteeringPlan(EDITS)) as handle,
            pytest.raises(ValueError, match="got neither"),
        ):
            handle.update()

    def test_wrong_width(self, model: Model) -> None:
        plan = SteeringPlan([Edit(0, "set", 1.0)])
        with (
            attach(model, "blocks.0", SparseAutoencoder(6, 12), plan),
            pytest.raises(ValueError, match=r"'blocks.0' returned shape \(4, 5, 8\), expected \(\.\.\., 6\)"),
        ):
            model(TOKENS)

    @pytest.mark.parametrize(("layout", "got"), [("dict", "dict"), ("narrow", r"tuple\(torch.float32 \(4")])
    def test_no_hidden_state_in_the_output(self, sae: SparseAutoencoder, layout: str, got: str) -> None:
        model = make_model(layout)
        with (
            attach(model, "blocks.1", sae, SteeringPlan(EDITS)),
            pytest.raises(TypeError, match=rf"'blocks.1' to return a tensor \(\.\.\., 8\).*got {got}"),
        ):
            model(TOKENS)

    def test_valid_of_a_model_that_is_not_called(self, model: Model, sae: SparseAutoencoder) -> None:
        with (
            attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item),
            pytest.raises(RuntimeError, match=r"valid: site 'blocks.0' ran outside a forward pass"),
        ):
            through_block_0(model, TOKENS)

    @pytest.mark.parametrize(
        ("valid", "error", "message"),
        [
            (lambda tokens: tokens, TypeError, r"expected a bool mask \(4, 5\), got torch.int64"),
            (lambda tokens: None, TypeError, ".*got NoneType"),
            (lambda tokens: tokens[:, 1:] != 0, ValueError, r"expected a mask \(4, 5\).*got \(4, 4\)"),
        ],
    )
    def test_valid_must_return_a_mask(self, model: Model, sae: Any, valid: Any, error: Any, message: str) -> None:
        with (
            attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=valid),
            pytest.raises(error, match=f"valid: {message}"),
        ):
            model(TOKENS)

    def test_last_of_rows_without_a_sequence(self, sae: SparseAutoencoder) -> None:
        model = nn.Sequential(nn.Identity())
        with (
            attach(model, "0", sae, SteeringPlan(EDITS, positions="last")),
            pytest.raises(ValueError, match=r"'last' needs hidden states \(B, L, d\)"),
        ):
            model(torch.zeros(3, WIDTH))

    def test_sae_without_an_inference_threshold(self, model: Model) -> None:
        with pytest.raises(ValueError, match="BatchTopK needs a threshold"):
            attach(model, "blocks.0", make_sae(BatchTopK(4)), SteeringPlan(EDITS))

    def test_scripted_model(self, sae: SparseAutoencoder) -> None:
        scripted = nn.Sequential(nn.Identity())
        scripted.__class__ = type("ScriptModule", (nn.Sequential, torch.jit.ScriptModule), {})
        with pytest.raises(ValueError, match="expected a plain module, got ScriptModule"):
            attach(scripted, "0", sae, SteeringPlan(EDITS))


@torch.no_grad()
def test_empty_batch(model: Model, sae: SparseAutoencoder) -> None:
    with attach(model, "blocks.0", sae, SteeringPlan(EDITS, positions="last"), valid=is_item):
        assert model(TOKENS[:0]).shape == (0, 5, 5)


def test_functional_call(model: Model, sae: SparseAutoencoder) -> None:
    weights = {name: weight * 2 for name, weight in model.state_dict().items()}
    with attach(model, "blocks.0", sae, SteeringPlan(EDITS), valid=is_item):
        called = torch.func.functional_call(model, weights, (TOKENS,))
        model.load_state_dict(weights)
        assert torch.equal(called, model(TOKENS))


def test_repr(model: Model, sae: SparseAutoencoder) -> None:
    with attach(model, "blocks.0", sae, SteeringPlan(EDITS, positions=TOKENS != 0)) as handle:
        assert isinstance(handle, SteeringHandle)
        assert repr(handle) == (
            "SteeringHandle(site='blocks.0', edits=4, mode='delta', positions='mask', attached=True)"
        )
