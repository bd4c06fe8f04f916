from __future__ import annotations

import copy
import json
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saerec_fast.sae import SparseAutoencoder
from saerec_fast.types import BatchTopK, Direction, Edit, ReLU, SteeringPlan, TopK
from saerec_fast.types.plan import MODES, OPS

EDIT = Edit(3, "set", 1.5)

edits = st.builds(
    Edit,
    feature=st.integers(0, 2**31 - 1),
    op=st.sampled_from(OPS),
    value=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**80), 2**80),
)
masks = st.lists(st.integers(1, 4), max_size=3).flatmap(
    lambda shape: st.integers(0, 2**32 - 1).map(
        lambda seed: torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    )
)
plans = st.builds(
    SteeringPlan,
    edits=st.lists(edits, max_size=5),
    mode=st.sampled_from(MODES),
    positions=st.sampled_from(["all", "last"]) | masks,
)


@given(plans)
def test_json_round_trip(plan: SteeringPlan) -> None:
    back = SteeringPlan.from_json(plan.to_json())
    assert back.edits == plan.edits
    assert back.mode == plan.mode
    if isinstance(plan.positions, torch.Tensor):
        assert isinstance(back.positions, torch.Tensor)
        assert back.positions.dtype == torch.bool
        assert torch.equal(back.positions, plan.positions)
    else:
        assert back.positions == plan.positions
    assert back == plan
    json.loads(plan.to_json(), parse_constant=pytest.fail)  # strict json: no NaN, no Infinity


@given(plans)
def test_values_are_those_of_the_edits_in_order(plan: SteeringPlan) -> None:
    assert plan.values == tuple(edit.value for edit in plan.edits)


def test_plans_differ_by_every_part() -> None:
    plan = SteeringPlan([EDIT, Edit(4, "add", 1.0)], mode="delta", positions="all")
    others = [
        SteeringPlan([Edit(4, "add", 1.0), EDIT]),
        SteeringPlan([EDIT]),
        SteeringPlan([EDIT, Edit(4, "add", 2.0)]),
        SteeringPlan([EDIT, Edit(4, "scale", 1.0)]),
        SteeringPlan(plan.edits, mode="reconstruct"),
        SteeringPlan(plan.edits, positions="last"),
        SteeringPlan(plan.edits, positions=torch.ones(2, 3, dtype=torch.bool)),
        "plan",
    ]
    assert plan == SteeringPlan(list(plan.edits))
    assert all(plan != other for other in others)


def test_defaults() -> None:
    plan = SteeringPlan()
    assert (plan.edits, plan.mode, plan.positions) == ((), "delta", "all")
    assert SteeringPlan.from_dict({"edits": []}) == plan


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        SteeringPlan([EDIT]).mode = "reconstruct"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        EDIT.value = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_numbers_of_other_libraries_become_pythons(value: Any) -> None:
    edit = Edit(np.int64(7), "add", value)  # type: ignore[arg-type]
    assert edit == Edit(7, "add", 0.5)
    assert (type(edit.feature), type(edit.value)) == (int, float)
    assert SteeringPlan.from_json(SteeringPlan([edit]).to_json()).edits == (edit,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feature", -1),
        ("feature", 1.0),
        ("feature", True),
        ("feature", "3"),
        ("feature", None),
        ("op", "multiply"),
        ("op", "SET"),
        ("op", None),
        ("op", ["set"]),
        ("value", float("nan")),
        ("value", float("inf")),
        ("value", -float("inf")),
        ("value", 10**400),
        ("value", True),
        ("value", "1"),
        ("value", None),
        ("value", 1j),
    ],
)
def test_an_edit_is_checked_when_it_is_made(field: str, value: Any) -> None:
    arguments = {"feature": 3, "op": "set", "value": 1.5, field: value}
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got "):
        Edit(**arguments)
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got "):
        SteeringPlan.from_dict({"edits": [arguments]})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"edits": [{"feature": 3}]}, TypeError, "edits: expected Edit or Direction objects, got dict"),
        ({"mode": "replace"}, ValueError, "mode: expected one of delta, reconstruct, got 'replace'"),
        ({"mode": None}, ValueError, "mode: .*got None"),
        ({"positions": "first"}, ValueError, "positions: .*got 'first'"),
        ({"positions": None}, ValueError, "positions: .*got None"),
        ({"positions": [True, False]}, ValueError, "positions: .*got \\["),
        ({"positions": np.array([True, False])}, ValueError, "positions: .*got array"),
        ({"positions": torch.ones(3)}, TypeError, "positions: expected a bool mask, got torch.float32"),
    ],
)
def test_a_plan_is_checked_when_it_is_made(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        SteeringPlan(**arguments)


def test_one_edit_is_no_list_of_edits() -> None:
    with pytest.raises(TypeError):
        SteeringPlan(EDIT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"edits": [], "postions": "last"}, ValueError, r"plan: expected keys .*got unknown \['postions'\]"),
        ({"mode": "delta"}, ValueError, r"plan: .*missing \['edits'\]"),
        ({"edits": [{**EDIT.to_dict(), "strength": 1}]}, ValueError, r"edit: .*unknown \['strength'\]"),
        ({"edits": [{"feature": 3, "op": "set"}]}, ValueError, r"edit: .*missing \['value'\]"),
        ({"edits": [3]}, TypeError, "edit: expected a mapping, got int"),
        ({"edits": None}, TypeError, "edits: expected a list, got NoneType"),
        ({"edits": EDIT.to_dict()}, TypeError, "edits: expected a list, got dict"),
        ([], TypeError, "plan: expected a mapping, got list"),
        ({"edits": [], "mode": "paper"}, ValueError, "mode: .*got 'paper'"),
        ({"edits": [], "positions": "first"}, ValueError, "positions: .*got 'first'"),
        ({"edits": [], "positions": [[1, 0]]}, TypeError, "positions: .*nested lists of bools"),
        ({"edits": [], "positions": [[True], [True, False]]}, TypeError, "positions: .*nested lists of bools"),
        ({"edits": [], "positions": None}, TypeError, "positions: .*nested lists of bools"),
        ({"edits": [], "positions": {"first": True}}, TypeError, "positions: .*nested lists of bools"),
    ],
)
def test_from_dict_refuses(data: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        SteeringPlan.from_dict(data)
    with pytest.raises(error, match=message):
        SteeringPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", '{"edits": [{"feature": 1, "op": "set", "value": NaN}]}'])
def test_from_json_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting|finite"):
        SteeringPlan.from_json(text)


class TestDirection:
    def test_keeps_a_float32_copy(self) -> None:
        vector = torch.tensor([1.0, -2.0], dtype=torch.float64)
        direction = Direction(vector, 2, "horror")
        vector.zero_()
        assert direction.vector.dtype == torch.float32
        assert direction.to_dict() == {"vector": [1.0, -2.0], "value": 2.0, "name": "horror"}
        assert direction == Direction([1.0, -2.0], 2.0, "horror")
        assert hash(direction) == hash(Direction([1.0, -2.0], 2.0, "horror"))
        assert direction != Direction([1.0, -2.0], 2.0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"vector": []}, r"vector: expected finite numbers \(d,\), got \[\]"),
            ({"vector": [[1.0]]}, "vector: expected finite"),
            ({"vector": [1.0, float("nan")]}, "vector: expected finite"),
            ({"vector": "text"}, "vector: expected finite"),
            ({"vector": torch.zeros(2, 3)}, r"got torch.float32 \(2, 3\)"),
            ({"vector": [1.0], "value": float("inf")}, "value: expected a finite number"),
            ({"vector": [1.0], "name": 3}, "name: expected text, got int"),
        ],
    )
    def test_is_checked_when_it_is_made(self, arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Direction(**arguments)

    def test_in_a_plan(self) -> None:
        plan = SteeringPlan([EDIT, Direction([1.0, 2.0], 3.0)])
        assert SteeringPlan.from_json(plan.to_json()) == plan
        assert plan.feature_edits == ((0, EDIT),)
        assert [place for place, _ in plan.directions] == [1]
        assert (plan.largest_feature, plan.direction_width) == (3, 2)
        with pytest.raises(ValueError, match="directions of one width, got 1 and 2"):
            SteeringPlan([Direction([1.0]), Direction([1.0, 2.0])])
        with pytest.raises(ValueError, match=r"direction: .*unknown"):
            SteeringPlan.from_dict({"edits": [{"vector": [1.0], "value": 1.0, "feature": 3}]})


def test_a_limit_is_part_of_the_plan() -> None:
    plan = SteeringPlan([EDIT], max_relative_norm=0.5, on_excess="warn")
    assert SteeringPlan.from_json(plan.to_json()) == plan
    assert plan != SteeringPlan([EDIT], max_relative_norm=0.5)
    assert plan != SteeringPlan([EDIT])
    assert "max_relative_norm" not in SteeringPlan([EDIT]).to_dict()
    for changed in (plan.scaled(2.0), plan.with_edits([]), plan.at_positions("last")):
        assert (changed.max_relative_norm, changed.on_excess) == (0.5, "warn")
    for arguments, message in [
        ({"max_relative_norm": 0.0}, "max_relative_norm: expected a number > 0"),
        ({"max_relative_norm": float("nan")}, "max_relative_norm: expected a finite number"),
        ({"on_excess": "drop"}, "on_excess: expected one of clip, warn, reject"),
    ]:
        with pytest.raises(ValueError, match=message):
            SteeringPlan([EDIT], **arguments)


def test_scaled() -> None:
    plan = SteeringPlan([Edit(0, "set", 3.0), Edit(1, "scale", 0.5), Direction([1.0], -2.0)], "reconstruct", "last")
    assert plan.scaled(1.0) == plan
    assert plan.scaled(2.0).values == (6.0, 0.0, -4.0)
    assert plan.scaled(0.0).values == (0.0, 1.0, 0.0)
    assert (plan.scaled(2.0).mode, plan.scaled(2.0).positions) == ("reconstruct", "last")
    with pytest.raises(ValueError, match="factor: expected a finite number"):
        plan.scaled(float("inf"))


def test_copies_and_pickles() -> None:
    plan = SteeringPlan([EDIT, Direction([1.0])], positions=torch.tensor([True, False]), max_relative_norm=1.0)
    for copied in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan), copy.copy(plan)):
        assert copied == plan
        assert copied.largest_feature == 3


@pytest.mark.parametrize(
    ("activation", "mode", "edits", "work", "row_operations"),
    [
        (ReLU(), "delta", [], "copy", 0),
        (TopK(4), "delta", [Edit(1, "add", 1.0), Edit(2, "add", 1.0)], "add", 8),
        (ReLU(), "delta", [Direction([1.0] * 8)], "add", 8),
        (ReLU(), "delta", [Edit(1, "set", 1.0), Edit(1, "add", 1.0), Edit(2, "add", 1.0)], "features", 16),
        (BatchTopK(4, threshold=0.5), "delta", [Edit(1, "set", 1.0), Edit(2, "scale", 2.0)], "features", 32),
        (TopK(4), "delta", [Edit(1, "clamp_max", 1.0)], "encode", 24 * 8 + 8),
        (ReLU(), "reconstruct", [], "encode", 24 * 8),
    ],
)
def test_explain(activation: Any, mode: Any, edits: Any, work: str, row_operations: int) -> None:
    sae = SparseAutoencoder(8, 24, activation)
    cost = SteeringPlan(edits, mode).explain(sae)
    assert (cost.work, cost.row_operations) == (work, row_operations)
    assert str(cost).startswith(f"{work}: ")
    with pytest.raises(ValueError, match="expected one that fits the plan, got 24 features of width 8"):
        SteeringPlan([Edit(24, "add", 1.0)]).explain(sae)


numbers = st.none() | st.booleans() | st.text(max_size=4) | st.integers() | st.floats() | st.integers(0, 9)
anything = st.recursive(
    numbers | st.binary(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
malformed_entries = (
    st.fixed_dictionaries({"feature": numbers, "op": st.sampled_from(OPS) | anything, "value": numbers})
    | st.fixed_dictionaries({"vector": st.lists(numbers, max_size=4) | anything, "value": numbers})
    | anything
)
malformed_plans = anything | st.fixed_dictionaries(
    {"edits": st.lists(malformed_entries, max_size=3) | anything},
    optional={
        "mode": st.sampled_from(MODES) | anything,
        "positions": st.sampled_from(["all", "last"]) | st.lists(st.booleans() | anything, max_size=3) | anything,
        "max_relative_norm": numbers,
        "on_excess": st.sampled_from(["clip", "warn", "reject"]) | anything,
        "postions": anything,
    },
)
NAMES = (
    *("plan", "edit", "direction", "edits", "feature", "op", "value", "vector", "name", "mode", "positions"),
    *("max_relative_norm", "on_excess"),
)


@given(malformed_plans)
def test_from_dict_takes_a_plan_or_names_what_is_wrong(data: Any) -> None:
    try:
        plan = SteeringPlan.from_dict(data)
    except (ValueError, TypeError) as error:
        refusal = str(error)
    else:
        refusal = ""
        assert SteeringPlan.from_json(plan.to_json()) == plan
    assert not refusal or refusal.split(": ")[0] in NAMES


@given(plans.map(SteeringPlan.to_json), st.data())
def test_a_damaged_text_is_a_plan_or_raises_what_from_json_says(text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    damaged = text[:cut] + data.draw(st.text(max_size=3)) + text[cut + data.draw(st.integers(0, 3)) :]
    try:
        plan = SteeringPlan.from_json(damaged)
    except (ValueError, TypeError):
        return
    assert SteeringPlan.from_json(plan.to_json()) == plan


def test_json_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ValueError, match="json"):
        SteeringPlan.from_json("[" * 100_000)


@pytest.mark.parametrize("data", [{"edits": [], None: 1, 3: 2}, {"edits": [{**EDIT.to_dict(), None: 1, 3: 2}]}])
def test_keys_that_are_no_text_are_named(data: Any) -> None:
    with pytest.raises(ValueError, match=r"(plan|edit): expected keys .*unknown"):
        SteeringPlan.from_dict(data)
