from __future__ import annotations

import pytest
import torch
from cases import DTYPES, KERNEL_CASES, Case, Inputs, integer_inputs, make_inputs
from helpers import (
    EPS32,
    LAYOUTS,
    assert_equal,
    assert_no_worse,
    assert_same_bits,
    decided_rows,
    forward_ops,
    in_layout,
    rounding,
    score_tolerance,
    torch_threads,
)
from hypothesis import given
from hypothesis import strategies as st

import saerec_fast as fast
from saerec_fast import reference
from saerec_fast.types import Activation
from saerec_fast.types.plan import OPS

pytestmark = pytest.mark.usefixtures("isa")

INF, NAN = float("inf"), float("nan")


def activation_of(kind: str, case: Case) -> Activation:
    return {
        "relu": fast.ReLU(),
        "jumprelu": fast.JumpReLU(0.4),
        "jumprelu_per_feature": fast.JumpReLU(torch.linspace(0.0, 1.0, case.n)),
        "topk": fast.TopK(case.k),
        "batch_topk": fast.BatchTopK(case.k, threshold=0.8),
    }[kind]


ACTIVATIONS = ["relu", "jumprelu", "jumprelu_per_feature", "topk", "batch_topk"]


def all_edits(n: int) -> list[fast.Edit]:
    """Every op, on the first and the last feature too, one feature edited twice."""
    features = [0, n // 3, n // 2, n // 2, n - 1]
    return [fast.Edit(f, op, value) for f, op, value in zip(features, OPS, (1.5, -0.75, 2.0, 0.5, 0.25), strict=True)]


def exact_activation(activation: Activation) -> Activation:
    if isinstance(activation, fast.BatchTopK):
        return fast.JumpReLU(activation.threshold)
    return activation


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("case", KERNEL_CASES[::4], ids=str)
def test_steer(case: Case, kind: str, mode: str) -> None:
    inputs, activation = make_inputs(case), activation_of(kind, case)
    plan = fast.SteeringPlan(all_edits(case.n), mode=mode)
    out = fast.steer(*inputs, activation, plan, backend="cpu")
    assert out.shape == inputs.x.shape
    assert out.dtype == case.dtype
    if case.rows == 0:
        return
    rows = decided_rows(inputs, exact_activation(activation))
    assert rows.float().mean() > 0.9 or case.rows < 10
    exact = inputs.to(torch.float64)
    truth = reference.steer(*exact, activation, plan)
    scores = reference.pre_activations(*exact[:4])
    a = reference.activate(scores, activation)
    edited = a.scatter(
        1, torch.tensor([e.feature for e in plan.edits]).expand(case.rows, -1), float(4 + 3 * a.abs().amax())
    )
    # Errors of the activations, amplified by at most 2 by the edits, go through the decoder; then the sums' own.
    sums = (edited.abs() @ exact.W_dec.abs() + exact.x.abs() + exact.b_dec.abs()) * (case.n + 8) * EPS32
    bound = (2 * score_tolerance(inputs) * (edited != 0)) @ exact.W_dec.abs() + sums
    error = (out - truth).abs()
    assert (error <= bound + rounding(truth.abs() + bound, case.dtype))[rows].all()
    plain = reference.steer(*inputs, activation, plan)
    assert_no_worse(out[rows], plain[rows], truth[rows], factor=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_single_edits_on_integers(kind: str, op: str, dtype: torch.dtype) -> None:
    case = Case(5, 40, 7, 30, dtype)
    inputs, activation = integer_inputs(case), activation_of(kind, case)
    for mode in ("delta", "reconstruct"):
        for value in (0.0, 2.0, -1.0):
            plan = fast.SteeringPlan([fast.Edit(39, op, value)], mode=mode)
            check_exact(inputs, activation, plan)


def check_exact(inputs: Inputs, activation: Activation, plan: fast.SteeringPlan, **options) -> torch.Tensor:
    """Equality with the float64 reference, rounded once."""
    out = fast.steer(*inputs, activation, plan, backend="cpu", **options)
    truth = reference.steer(*inputs.to(torch.float64), activation, plan, **options)
    assert_equal(out, truth.to(out.dtype))
    return out


@st.composite
def problems(draw):
    case = Case(
        draw(st.integers(1, 20)),
        n := draw(st.integers(1, 50)),
        draw(st.integers(1, n)),
        draw(st.integers(0, 10)),
        draw(st.sampled_from(DTYPES)),
    )
    inputs = integer_inputs(case, draw(st.integers(0, 10**6)))
    edits = st.builds(fast.Edit, st.integers(0, n - 1), st.sampled_from(OPS), st.integers(-3, 3).map(float))
    positions = draw(st.one_of(st.just("all"), st.lists(st.booleans(), min_size=case.rows, max_size=case.rows)))
    if positions != "all":
        positions = torch.tensor(positions, dtype=torch.bool)
    elif case.rows and draw(st.booleans()):
        positions = "last"
    plan = fast.SteeringPlan(
        draw(st.lists(edits, max_size=5)), draw(st.sampled_from(["delta", "reconstruct"])), positions
    )
    activation = draw(
        st.sampled_from([fast.ReLU(), fast.JumpReLU(2.0), fast.TopK(case.k), fast.JumpReLU(torch.arange(n) % 4.0)])
    )
    options = {}
    m = len(plan.edits)
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(m,), (1, m), (case.rows, m)]))
        options["strengths"] = torch.arange(torch.Size(shape).numel()).reshape(shape).remainder(7).sub(3.0)
    if draw(st.booleans()):
        options["valid"] = torch.tensor(
            draw(st.lists(st.booleans(), min_size=case.rows, max_size=case.rows)), dtype=torch.bool
        )
    return inputs, activation, plan, options


@given(problems())
def test_any_integers_equal_the_reference(problem) -> None:
    inputs, activation, plan, options = problem
    check_exact(inputs, activation, plan, **options)


def awkward_rows(dtype: torch.dtype) -> Inputs:
    inputs = make_inputs(Case(19, 60, 9, 40, dtype))
    inputs.x[0], inputs.x[1], inputs.x[2] = -0.0, 0.0, NAN
    inputs.x[3, 5], inputs.x[4, 6], inputs.x[5, ::2], inputs.x[6] = NAN, INF, -0.0, -INF
    inputs.x[7] = torch.finfo(dtype).tiny / 4
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_empty_delta_plan_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    inputs, activation = awkward_rows(dtype), activation_of(kind, Case(19, 60, 9, 40))
    out = fast.steer(*inputs, activation, fast.SteeringPlan(), backend="cpu")
    assert_same_bits(out, inputs.x)
    assert out.data_ptr() != inputs.x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_that_are_not_steered_keep_their_bits(mode: str, kind: str, dtype: torch.dtype, backend: str) -> None:
    inputs, activation = awkward_rows(dtype), activation_of(kind, Case(19, 60, 9, 40))
    before = inputs.x.clone()
    mask = torch.arange(40) % 3 == 1
    for positions, valid in [(mask, None), ("all", mask), (mask, ~mask), ("last", torch.arange(40) < 31)]:
        plan = fast.SteeringPlan(all_edits(60), mode, positions)
        out = fast.steer(*inputs, activation, plan, valid=valid, backend=backend)
        steered = reference.steered_positions(plan, torch.Size([40]), valid, inputs.x.device)
        assert_same_bits(out[~steered], inputs.x[~steered])
        assert (out[steered][10:] != inputs.x[steered][10:]).any() or steered.sum() <= 10
    assert_same_bits(inputs.x, before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edits_that_change_nothing_keep_the_bits(dtype: torch.dtype, backend: str) -> None:
    inputs = awkward_rows(dtype)
    finite = inputs._replace(x=inputs.x[[0, 1, 5, 7, 8, 9]])
    plan = fast.SteeringPlan([fast.Edit(0, "scale", 1.0), fast.Edit(3, "add", 0.0), fast.Edit(5, "clamp_max", 1e4)])
    for activation in (fast.ReLU(), fast.TopK(9)):
        assert_same_bits(fast.steer(*finite, activation, plan, backend=backend), finite.x)


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_non_finite_rows(kind: str, mode: str) -> None:
    case = Case(6, 40, 7, 12)
    inputs = integer_inputs(case)
    inputs.x[0], inputs.x[1, 0], inputs.x[2, 3], inputs.x[3, 1] = NAN, NAN, INF, -INF
    for edits in ([fast.Edit(4, "add", 2.0)], [fast.Edit(0, "set", 1.0)], all_edits(40)[:3]):
        check_exact(inputs, activation_of(kind, case), fast.SteeringPlan(edits, mode))


@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
def test_masks_and_strengths_of_every_chunk(mode: str, kind: str) -> None:
    case = Case(5, 40, 7, 300)
    inputs = integer_inputs(case)
    mask = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.5
    plan = fast.SteeringPlan([fast.Edit(3, "add", 1.0), fast.Edit(9, "scale", 1.0)], mode, mask)
    strengths = torch.arange(600.0).reshape(300, 2) % 7
    check_exact(inputs, activation_of(kind, case), plan, strengths=strengths)


def hard_to_select(kind: str, n: int, dtype: torch.dtype) -> Inputs:
    """Rows of which a screen in bytes can tell little or much, and some that it cannot take."""
    inputs = make_inputs(Case(33, n, 1, 40, dtype))
    if kind == "near_duplicates":
        inputs.W_enc.copy_(inputs.W_enc[: n // 4 + 1].repeat(4, 1)[:n] * (1 + torch.arange(n) % 7 * 1e-4).unsqueeze(1))
        inputs.b_enc.zero_()
    elif kind == "far_apart":
        # Every score is a tenth above the next.
        scale = 1.1 ** -torch.randperm(n, generator=torch.Generator().manual_seed(0)).float().clamp_max(200)
        inputs.W_enc.copy_(inputs.x[8].float() * scale.unsqueeze(1))
        inputs.b_enc.zero_()
        inputs.x[9:].copy_(inputs.x[8].float() * torch.linspace(0.5, 2.0, 31).unsqueeze(1))
    elif kind == "large_biases":
        inputs.b_enc.copy_(1000 + inputs.b_enc.float())
    inputs.x[0], inputs.x[1, 3], inputs.x[2, 5], inputs.x[3, 7], inputs.x[4] = NAN, NAN, INF, -INF, 0.0
    inputs.x[5:7] *= 1e3
    inputs.x[7] *= 1e-3
    if dtype != torch.float16:
        inputs.x[6] *= 1e15
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "near_duplicates", "far_apart", "large_biases"])
@pytest.mark.parametrize(("n", "k"), [(256, 32), (519, 8), (1030, 1), (1030, 40)])
def test_edited_features_are_selected_as_by_the_whole_top_k(n: int, k: int, kind: str, dtype: torch.dtype) -> None:
    # Forty rows are screened, one alone is not: there every score is computed.
    inputs = hard_to_select(kind, n, dtype)
    ranked = reference.pre_activations(*inputs.to(torch.float64)[:4]).argsort(1, descending=True)
    for decided_by in (8, 20):
        for best in (max(k - 2, 0), k - 1, k, 3 * k):
            chosen = ranked[decided_by, best : best + 4].tolist()
            edits = [
                fast.Edit(f, op, 1.5) for f, op in zip(chosen, ("set", "scale", "clamp_max", "scale"), strict=True)
            ]
            plan = fast.SteeringPlan(edits)
            whole = fast.steer(*inputs, fast.TopK(k), plan, backend="cpu")
            for row in (*range(8), decided_by, 39):
                alone = inputs._replace(x=inputs.x[row : row + 1])
                assert_same_bits(fast.steer(*alone, fast.TopK(k), plan, backend="cpu")[0], whole[row])


@pytest.mark.parametrize("n_edits", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_any_number_of_edits(kind: str, n_edits: int) -> None:
    case = Case(37, 80, 7, 21)
    activation = activation_of(kind, case)
    edits = [fast.Edit(f, OPS[f % len(OPS)], 2.0) for f in range(n_edits)]
    for dtype in DTYPES:
        check_exact(integer_inputs(Case(37, 80, 7, 21, dtype)), activation, fast.SteeringPlan(edits))


def test_strengths_per_row() -> None:
    case = Case(8, 50, 9, 24)
    inputs = integer_inputs(case)
    inputs = inputs._replace(x=inputs.x.reshape(4, 6, 8))
    edits = [fast.Edit(3, "add", 1.0), fast.Edit(3, "scale", 1.0), fast.Edit(7, "set", 1.0)]
    generator = torch.Generator().manual_seed(0)
    for shape in [(3,), (1, 3), (6, 3), (4, 1, 3), (1, 6, 3), (4, 6, 3)]:
        strengths = torch.randint(-3, 4, shape, generator=generator).float()
        for mode in ("delta", "reconstruct"):
            for activation in (fast.ReLU(), fast.TopK(9)):
                check_exact(inputs, activation, fast.SteeringPlan(edits, mode), strengths=strengths)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("strength_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strengths_of_another_dtype(dtype: torch.dtype, strength_dtype: torch.dtype, backend: str) -> None:
    inputs = integer_inputs(Case(8, 50, 9, 5, dtype))
    plan = fast.SteeringPlan([fast.Edit(i, op, 1.0) for i, op in enumerate(OPS)])
    strengths = torch.arange(25, dtype=strength_dtype).reshape(5, 5) % 4
    for requires_grad in (False, True):
        given = strengths.clone().requires_grad_(requires_grad)
        out = fast.steer(*inputs, fast.ReLU(), plan, strengths=given, backend=backend)
        truth = reference.steer(*inputs.to(torch.float64), fast.ReLU(), plan, strengths=strengths.double())
        assert_equal(out.detach(), truth.to(dtype))


def test_one_row_never_touches_another() -> None:
    inputs = make_inputs(Case(33, 200, 16, 150))
    plan = fast.SteeringPlan([fast.Edit(5, "set", 1.0), fast.Edit(9, "add", 0.0)])
    strengths = torch.zeros(150, 2)
    strengths[:, 0] = torch.linspace(-1, 1, 150)
    for activation in (fast.ReLU(), fast.TopK(16)):
        whole = fast.steer(*inputs, activation, plan, strengths=strengths, backend="cpu")
        for row in (0, 7, 127, 128, 149):
            alone = inputs._replace(x=inputs.x[row : row + 1])
            out = fast.steer(*alone, activation, plan, strengths=strengths[row], backend="cpu")
            assert_same_bits(out[0], whole[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
def test_memory_layouts(mode: str, layout: str, dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(17, 66, 9, 13, dtype))
    mask = LAYOUTS[layout]((torch.arange(13) % 4 != 0).float()).bool()
    moved = Inputs(*map(LAYOUTS[layout], inputs))
    strengths = LAYOUTS[layout](torch.arange(26.0).reshape(13, 2) % 5 - 2)
    plan = fast.SteeringPlan([fast.Edit(2, "add", 1.0), fast.Edit(60, "scale", 1.0)], mode, mask)
    for activation in (fast.ReLU(), fast.TopK(9), fast.JumpReLU(LAYOUTS[layout](torch.arange(66) % 3.0))):
        check_exact(moved, activation, plan, strengths=strengths)
    check_exact(moved, fast.TopK(9), fast.SteeringPlan([], mode))


def test_expanded_x_gets_a_fresh_output() -> None:
    inputs = integer_inputs(Case(6, 30, 5, 1))
    inputs = inputs._replace(x=inputs.x.expand(7, 6))
    out = check_exact(inputs, fast.TopK(5), fast.SteeringPlan([fast.Edit(1, "add", 1.0)]))
    assert out.is_contiguous()


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 0, 3)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    inputs = integer_inputs(Case(6, 30, 5, torch.Size(shape).numel()))
    inputs = inputs._replace(x=inputs.x.reshape(*shape, 6))
    for mode in ("delta", "reconstruct"):
        for positions in ("all", "last") if shape else ("all",):
            plan = fast.SteeringPlan([fast.Edit(1, "set", 1.0)], mode, positions)
            assert check_exact(inputs, fast.TopK(5), plan).shape == inputs.x.shape


def test_last_takes_each_sequences_last_valid_position() -> None:
    inputs = integer_inputs(Case(6, 30, 5, 15))
    inputs = inputs._replace(x=inputs.x.reshape(3, 5, 6))
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    plan = fast.SteeringPlan([fast.Edit(1, "add", 5.0)], positions="last")
    out = check_exact(inputs, fast.ReLU(), plan, valid=valid)
    changed = (out != inputs.x).any(-1)
    assert changed.nonzero().tolist() == [[0, 2], [1, 4]]


def test_reconstruct_is_encode_then_decode() -> None:
    inputs = integer_inputs(Case(9, 130, 16, 140))
    for activation, features in [
        (fast.TopK(16), fast.encode_topk(*inputs[:4], k=16)),
        (fast.JumpReLU(2.0), fast.encode_threshold(*inputs[:4], 2.0)),
    ]:
        out = fast.reconstruct(*inputs, activation, backend="cpu")
        assert_equal(out, fast.decode_sparse(features, inputs.W_dec, inputs.b_dec))
        assert_equal(out, reference.reconstruct(*inputs, activation))


@pytest.mark.parametrize("name", forward_ops(1))
def test_bits_do_not_depend_on_threads_or_batch(name: str) -> None:
    # Every op, not only steer: 300 rows are three chunks, and 1, 2, 3, 5 threads cut them differently.
    op, inputs = forward_ops(17)[name], make_inputs(Case(33, 500, 17, 300))
    whole = op(inputs)
    for threads in (2, 3, 5):
        with torch_threads(threads):
            for result, expected in zip(op(inputs), whole, strict=True):
                assert_same_bits(result, expected)
            part = inputs._replace(x=inputs.x[100:237])
            for result, expected in zip(op(part), whole, strict=True):
                assert_same_bits(result, expected[100:237])
    for row in (0, 1, 5, 127, 128, 255, 299):
        for result, expected in zip(op(inputs._replace(x=inputs.x[row : row + 1])), whole, strict=True):
            assert_same_bits(result, expected[row : row + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_of_a_row_do_not_depend_on_the_layout_of_the_batch(layout: str) -> None:
    inputs = make_inputs(Case(33, 200, 17, 20))
    plan = fast.SteeringPlan([fast.Edit(3, "scale", 0.5)])
    moved = in_layout(inputs, layout)
    for activation in (fast.ReLU(), fast.TopK(17)):
        whole = fast.steer(*moved, activation, plan, backend="cpu")
        for row in (0, 19):
            alone = fast.steer(*moved._replace(x=moved.x[row : row + 1]), activation, plan, backend="cpu")
            assert_same_bits(alone[0], whole[row])
