"""The CUDA steer kernels against the reference: emulated on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import emulation
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
    rounding,
    score_tolerance,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saerec_fast as fast
from saerec_fast import reference
from saerec_fast.kernels import cuda
from saerec_fast.types import Activation
from saerec_fast.types.plan import OPS

INF, NAN = float("inf"), float("nan")
ACTIVATIONS = ["relu", "jumprelu", "jumprelu_per_feature", "topk"]


def activation_of(kind: str, case: Case) -> Activation:
    return {
        "relu": fast.ReLU(),
        "jumprelu": fast.JumpReLU(0.4),
        "jumprelu_per_feature": fast.JumpReLU(torch.linspace(0.0, 1.0, case.n)),
        "topk": fast.TopK(case.k),
    }[kind]


def all_edits(n: int) -> list[fast.Edit]:
    """Every op, on the first and the last feature too, one feature edited twice."""
    features = [0, n // 3, n // 2, n // 2, n - 1]
    return [fast.Edit(f, op, value) for f, op, value in zip(features, OPS, (1.5, -0.75, 2.0, 0.5, 0.25), strict=True)]


def check_exact(kernel, inputs: Inputs, activation: Activation, plan: fast.SteeringPlan, **options) -> torch.Tensor:
    """Equality with the float64 reference, rounded once."""
    out = kernel.steer(inputs, activation, plan, **options)
    truth = reference.steer(*inputs.to(torch.float64), activation, plan, **options)
    assert_equal(out, truth.to(out.dtype))
    return out


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("case", KERNEL_CASES[::4], ids=str)
def test_error_is_bounded(kernel, case: Case, kind: str, mode: str) -> None:
    inputs, activation = make_inputs(case), activation_of(kind, case)
    plan = fast.SteeringPlan(all_edits(case.n), mode=mode)
    out = kernel.steer(inputs, activation, plan)
    assert out.shape == inputs.x.shape
    assert out.dtype == case.dtype
    if case.rows == 0:
        return
    rows = decided_rows(inputs, activation)
    assert rows.float().mean() > 0.9 or case.rows < 10
    exact = inputs.to(torch.float64)
    truth = reference.steer(*exact, activation, plan)
    a = reference.activate(reference.pre_activations(*exact[:4]), activation)
    edited = a.scatter(
        1, torch.tensor([e.feature for e in plan.edits]).expand(case.rows, -1), float(4 + 3 * a.abs().amax())
    )
    # Errors of the activations, amplified by at most 2 by the edits, go through the decoder; then the sums' own.
    sums = (edited.abs() @ exact.W_dec.abs() + exact.x.abs() + exact.b_dec.abs()) * (case.n + 8) * EPS32
    bound = (2 * score_tolerance(inputs) * (edited != 0)) @ exact.W_dec.abs() + sums
    error = (out - truth).abs()
    assert (error <= bound + rounding(truth.abs() + bound, case.dtype))[rows].all()
    assert_no_worse(out[rows], reference.steer(*inputs, activation, plan)[rows], truth[rows], factor=2)


# Around the vector of 16 bytes, the round of eight lanes and the panel of the decoder; around the features of a warp,
# of a block and of a slice, and beyond one list of entries; around the tiles of 4 and 8 rows.
@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "n", "k", "rows"),
    [
        (3, 15, 15, 4),
        (31, 63, 16, 5),
        (32, 64, 17, 3),
        (63, 127, 127, 2),
        (64, 128, 129 - 1, 8),
        (65, 513, 512, 9),
        (1030, 40, 7, 2),
        (2100, 20, 3, 1),
        (8, 2500, 129, 17),
    ],
)
def test_sizes_on_integers(kernel, d: int, n: int, k: int, rows: int, dtype: torch.dtype, kind: str, mode: str) -> None:
    case = Case(d, n, k, rows, dtype)
    inputs = integer_inputs(case)
    # Activations of integers reach d, and n of them add up; kept exact in float32, and rounded once.
    check_exact(kernel, inputs, activation_of(kind, case), fast.SteeringPlan(all_edits(n), mode))
    check_exact(kernel, inputs, activation_of(kind, case), fast.SteeringPlan([], mode))


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


@given(problems(), st.integers(0, 10**6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_integers_equal_the_reference(kernel, problem, seed: int) -> None:
    inputs, activation, plan, options = problem
    if kernel.emulation is not None:
        kernel.emulation.seed = seed
    check_exact(kernel, inputs, activation, plan, **options)


def awkward_rows(dtype: torch.dtype) -> Inputs:
    inputs = make_inputs(Case(19, 60, 9, 40, dtype))
    inputs.x[0], inputs.x[1], inputs.x[2] = -0.0, 0.0, NAN
    inputs.x[3, 5], inputs.x[4, 6], inputs.x[5, ::2], inputs.x[6] = NAN, INF, -0.0, -INF
    inputs.x[7] = torch.finfo(dtype).tiny / 4
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
def test_rows_that_are_not_steered_keep_their_bits(kernel, mode: str, kind: str, dtype: torch.dtype) -> None:
    inputs, activation = awkward_rows(dtype), activation_of(kind, Case(19, 60, 9, 40))
    before = inputs.x.clone()
    mask = torch.arange(40) % 3 == 1
    for positions, valid in [(mask, None), ("all", mask), (mask, ~mask), ("last", torch.arange(40) < 31)]:
        plan = fast.SteeringPlan(all_edits(60), mode, positions)
        out = kernel.steer(inputs, activation, plan, valid=valid)
        steered = reference.steered_positions(plan, torch.Size([40]), valid, inputs.x.device)
        assert_same_bits(out[~steered], inputs.x[~steered])
        assert (out[steered][10:] != inputs.x[steered][10:]).any() or steered.sum() <= 10
    assert_same_bits(inputs.x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edits_that_change_nothing_keep_the_bits(kernel, dtype: torch.dtype) -> None:
    inputs = awkward_rows(dtype)
    finite = inputs._replace(x=inputs.x[[0, 1, 5, 7, 8, 9]])
    plan = fast.SteeringPlan([fast.Edit(0, "scale", 1.0), fast.Edit(3, "add", 0.0), fast.Edit(5, "clamp_max", 1e4)])
    for activation in (fast.ReLU(), fast.TopK(9)):
        assert_same_bits(kernel.steer(finite, activation, plan), finite.x)
        assert_same_bits(kernel.steer(inputs, activation, fast.SteeringPlan()), inputs.x)


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_non_finite_rows(kernel, kind: str, mode: str) -> None:
    case = Case(6, 40, 7, 12)
    inputs = integer_inputs(case)
    inputs.x[0], inputs.x[1, 0], inputs.x[2, 3], inputs.x[3, 1] = NAN, NAN, INF, -INF
    for edits in ([fast.Edit(4, "add", 2.0)], [fast.Edit(0, "set", 1.0)], all_edits(40)[:3]):
        check_exact(kernel, inputs, activation_of(kind, case), fast.SteeringPlan(edits, mode))


def test_strengths_per_row(kernel) -> None:
    case = Case(8, 50, 9, 24)
    inputs = integer_inputs(case)
    inputs = inputs._replace(x=inputs.x.reshape(4, 6, 8))
    edits = [fast.Edit(3, "add", 1.0), fast.Edit(3, "scale", 1.0), fast.Edit(7, "set", 1.0)]
    generator = torch.Generator().manual_seed(0)
    for shape in [(3,), (1, 3), (6, 3), (4, 1, 3), (1, 6, 3), (4, 6, 3)]:
        strengths = torch.randint(-3, 4, shape, generator=generator).float()
        for mode in ("delta", "reconstruct"):
            for activation in (fast.ReLU(), fast.TopK(9)):
                check_exact(kernel, inputs, activation, fast.SteeringPlan(edits, mode), strengths=strengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
def test_memory_layouts(kernel, mode: str, layout: str, dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(17, 66, 9, 13, dtype))
    mask = LAYOUTS[layout]((torch.arange(13) % 4 != 0).float()).bool()
    moved = Inputs(*map(LAYOUTS[layout], inputs))
    strengths = LAYOUTS[layout](torch.arange(26.0).reshape(13, 2) % 5 - 2)
    plan = fast.SteeringPlan([fast.Edit(2, "add", 1.0), fast.Edit(60, "scale", 1.0)], mode, mask)
    for activation in (fast.ReLU(), fast.TopK(9), fast.JumpReLU(LAYOUTS[layout](torch.arange(66) % 3.0))):
        check_exact(kernel, moved, activation, plan, strengths=strengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 17, 31, 63, 66])
def test_aligned_rows_that_end_within_a_vector(kernel, d: int, dtype: torch.dtype) -> None:
    inputs = integer_inputs(Case(d, 40, 9, 5, dtype))

    def with_gaps(weight: torch.Tensor) -> torch.Tensor:
        padded = torch.full((40, (d + 127) // 64 * 64), NAN, dtype=dtype)
        padded[:, :d] = weight
        return padded[:, :d]

    gapped = inputs._replace(W_enc=with_gaps(inputs.W_enc), W_dec=with_gaps(inputs.W_dec))
    for mode in ("delta", "reconstruct"):
        for activation in (fast.ReLU(), fast.TopK(9)):
            check_exact(kernel, gapped, activation, fast.SteeringPlan(all_edits(40), mode))


def test_without_biases(kernel) -> None:
    inputs = integer_inputs(Case(9, 70, 9, 5))
    bare = inputs._replace(b_enc=None, b_dec=None)
    zeros = inputs._replace(b_enc=torch.zeros(70), b_dec=torch.zeros(9))
    for activation in (fast.ReLU(), fast.TopK(9)):
        for mode in ("delta", "reconstruct"):
            plan = fast.SteeringPlan(all_edits(70), mode)
            truth = reference.steer(*zeros.to(torch.float64), activation, plan)
            assert_equal(kernel.steer(bare, activation, plan), truth.float())


@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
def test_most_edits(kernel, mode: str, kind: str) -> None:
    case = Case(9, 300, 30, 3)
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(0, 300, (cuda.MAX_EDITS,), generator=generator).tolist()
    edits = [fast.Edit(f, OPS[i % 5], float(i % 4 - 1)) for i, f in enumerate(features)]
    check_exact(kernel, integer_inputs(case), activation_of(kind, case), fast.SteeringPlan(edits, mode))


def test_the_bits_of_a_row_do_not_depend_on_its_batch(kernel) -> None:
    inputs = make_inputs(Case(33, 700, 16, 150))
    plan = fast.SteeringPlan([fast.Edit(5, "set", 1.0), fast.Edit(9, "scale", 0.5)])
    rebuild = fast.SteeringPlan([fast.Edit(5, "set", 1.0)], "reconstruct")
    for activation in (fast.ReLU(), fast.TopK(16)):
        for chosen in (plan, rebuild):
            whole = kernel.steer(inputs, activation, chosen)
            part = kernel.steer(inputs._replace(x=inputs.x[3:40]), activation, chosen)
            assert_same_bits(part, whole[3:40])
            for row in (0, 7, 149):
                alone = kernel.steer(inputs._replace(x=inputs.x[row : row + 1]), activation, chosen)
                assert_same_bits(alone[0], whole[row])


# Chips that differ in clusters, in size, and in shared memory, down to scores in the workspace.
DEVICES = {
    "a100": emulation.Device(80, 108, 163 * 1024),
    "one_multiprocessor": emulation.Device(90, 1, 227 * 1024),
    "many": emulation.Device(100, 1000, 227 * 1024),
    "workspace": emulation.Device(90, 132, 20 * 1024),
    "workspace_without_clusters": emulation.Device(86, 10, 20 * 1024),
}


@pytest.mark.parametrize("mode", ["delta", "reconstruct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DEVICES)
def test_bits_do_not_depend_on_the_chip(emulated, name: str, dtype: torch.dtype, mode: str) -> None:
    inputs = make_inputs(Case(33, 700, 16, 21, dtype))
    inputs.x[2, 3] = NAN
    inputs.W_enc[300:310] = inputs.W_enc[100]  # ties
    inputs.b_enc[300:310] = inputs.b_enc[100]
    plan = fast.SteeringPlan([fast.Edit(100, "scale", 0.5), fast.Edit(305, "set", 2.0)], mode)
    extension = emulated.emulation
    for activation in (fast.ReLU(), fast.TopK(16)):
        expected = emulated.steer(inputs, activation, plan)
        extension.device = DEVICES[name]
        out = emulated.steer(inputs, activation, plan)
        extension.device = emulation.Device()
        assert_same_bits(out, expected)
        first, second = extension.shapes[-2:]
        if second.encodes:
            assert first != second
            assert bool(second.workspace_bytes) == name.startswith("workspace")


@pytest.mark.parametrize("seed", range(6))
def test_bits_do_not_depend_on_the_order_of_threads(emulated, seed: int) -> None:
    inputs = make_inputs(Case(20, 1100, 40, 9))
    inputs.W_enc[300:350] = inputs.W_enc[100]
    for n_edits in (0, 2):
        for mode in ("delta", "reconstruct"):
            plan = fast.SteeringPlan([fast.Edit(100, "scale", 0.5), fast.Edit(305, "set", 2.0)][:n_edits], mode)
            for activation in (fast.ReLU(), fast.TopK(40)):
                emulated.emulation.seed = 0
                expected = emulated.steer(inputs, activation, plan)
                emulated.emulation.seed = 1 + seed
                assert_same_bits(emulated.steer(inputs, activation, plan), expected)


def shape_of(emulated, case: Case, device: emulation.Device, activation: Activation, op: str = "set"):
    emulated.emulation.device = device
    plan = fast.SteeringPlan([fast.Edit(0, op, 1.0)])
    mask = torch.zeros(case.rows, dtype=torch.bool)  # only the shape is wanted
    emulated.steer(make_inputs(case), activation, plan, valid=mask)
    return emulated.emulation.shapes[-1]


def test_shape_of_the_launch(emulated) -> None:
    h200, a100 = emulation.Device(), emulation.Device(80, 108, 163 * 1024)
    top_k = fast.TopK(32)
    serving = Case(64, 2048, 32, 64)
    shape = shape_of(emulated, serving, h200, top_k)
    assert (shape.encodes, shape.tile_rows, shape.cluster_blocks, shape.blocks) == (1, 4, 8, 128)
    assert shape.workspace_bytes == 0
    assert shape_of(emulated, Case(64, 2048, 32, 1), h200, top_k)[1:4] == (1, 8, 8)
    assert shape_of(emulated, Case(64, 2048, 32, 256), h200, top_k)[1:4] == (8, 8, 256)
    assert shape_of(emulated, serving, a100, top_k)[1:4] == (1, 1, 64)
    # What needs no sweep gets one block a row.
    assert shape_of(emulated, serving, h200, top_k, "add")[:4] == (0, 1, 1, 64)
    assert shape_of(emulated, serving, h200, fast.ReLU())[:4] == (0, 1, 1, 64)
    # Scores of one row that no block can hold.
    wide = shape_of(emulated, Case(4, 70000, 32, 3), h200, top_k)
    assert wide.workspace_bytes == 4 * 3 * 70000
    assert wide.shared_bytes <= h200.shared_memory


def support(x: torch.Tensor, n: int, k: int, edits: int, op: int = 0) -> str:
    W = torch.zeros(1, x.shape[1], dtype=x.dtype).expand(n, -1)
    return cuda.supports(x, W, None, None, W, None, k, False, [0] * edits, [op] * edits)


def test_what_is_not_supported_is_named(emulated) -> None:
    assert support(torch.zeros(2, 64), 2048, 32, 1) == ""
    assert "k: expected at most 512, got 513" in support(torch.zeros(2, 64), 2048, 513, 1)
    assert support(torch.zeros(2, 64), 2048, 513, 1, op=1) == ""  # adds need no selection
    too_many = cuda.MAX_EDITS + 1
    assert f"edits: expected at most 256, got {too_many}" in support(torch.zeros(2, 64), 2048, 32, too_many)
    assert "float64" in support(torch.zeros(2, 64, dtype=torch.float64), 2048, 32, 1)
    assert "width of 40000 does not fit" in support(torch.zeros(2, 40000), 4, 1, 1)
    emulated.emulation.device = emulation.Device(capability=75)
    assert "8.0 or newer, got 7.5" in support(torch.zeros(2, 64), 2048, 32, 1)
    with pytest.raises(ValueError, match=r"8\.0 or newer"):
        emulated.steer(make_inputs(Case(4, 8, 2, 1)), fast.TopK(2), fast.SteeringPlan([fast.Edit(0, "set", 1.0)]))


def test_replays_of_a_cuda_graph_read_what_the_tensors_hold(on_device) -> None:
    inputs = Inputs(*(tensor.cuda() for tensor in make_inputs(Case(64, 2048, 32, 64))))
    values, mask = torch.tensor([2.0, 0.5], device="cuda"), torch.ones(64, dtype=torch.bool, device="cuda")

    def steer() -> torch.Tensor:
        return cuda.steer(*inputs[:4], inputs.W_dec, None, 32, False, [3, 9], [0, 2], values, mask)

    steer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = steer()
    for seed in range(3):
        inputs.x.copy_(make_inputs(Case(64, 2048, 32, 64), seed).x)
        values.mul_(-1.5)
        mask.copy_(torch.arange(64) % (seed + 2) == 0)
        graph.replay()
        assert_same_bits(out.cpu(), steer().cpu())


def test_a_gpu_gives_the_bits_of_the_emulation(on_device, request: pytest.FixtureRequest) -> None:
    plans = [fast.SteeringPlan(all_edits(700), mode) for mode in ("delta", "reconstruct")]
    problems = [
        (make_inputs(Case(33, 700, 16, rows, dtype)), activation, plan)
        for dtype in DTYPES
        for rows in (1, 21)
        for activation in (fast.TopK(16), fast.JumpReLU(0.4))
        for plan in plans
    ]
    on_gpu = [on_device.steer(*problem) for problem in problems]
    emulated = request.getfixturevalue("emulated")  # from here on in place of the module
    for out, problem in zip(on_gpu, problems, strict=True):
        assert_same_bits(out, emulated.steer(*problem))


def test_the_launch_is_on_the_current_stream(on_device) -> None:
    inputs = Inputs(*(tensor.cuda() for tensor in make_inputs(Case(64, 2048, 32, 64))))
    expected = cuda.steer(*inputs[:4], inputs.W_dec, None, 32, True, [], [], torch.zeros(0, device="cuda"), None)
    x = torch.zeros_like(inputs.x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        x.copy_(inputs.x)
        out = cuda.steer(
            x, *inputs[1:4], inputs.W_dec, None, 32, True, [], [], torch.zeros(0, device="cuda"), None
        ).cpu()
    assert_same_bits(out, expected.cpu())
