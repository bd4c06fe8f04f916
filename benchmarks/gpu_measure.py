"""What ``make gpu`` measures on a GPU: each way is checked against float64 before its time is believed.

A section is a task at one size and dtype. The process of :func:`run` notes each result in a journal, so that another
one can take over where a fault on the GPU has ended it.
"""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Any

import torch
import torch.nn.functional as F
from gpu_report import NO_WORK, OURS, YARDSTICK, Journal, Rates, Row, Section, Work, name_of
from torch import Tensor

Way = Callable[[], object]

# (d, n, k) of the dictionaries, as in docs/benchmarks.md.
DICTIONARIES = [(64, 2048, 32), (128, 4096, 32), (256, 8192, 64)]
# What the goal speaks of first.
SERVING_ROWS = [64, 1, 16, 256]
LARGE_BATCH = 65536
CHECKED_ROWS = 4096
# The share of ‖truth‖ that an error may have: float32 arithmetic in any order, and results rounded to bfloat16.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Scores rounded to bfloat16 select other features.
PEER_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.3}
# The ways of ways.py that run on a GPU, that whose time a goal speaks of first; each is built on the device in the
# dtype of its section. sparsify multiplies in bfloat16 whatever it is given.
FORWARD_PEERS = ("sparsify", "eager_bag", "eager_dense", "sae_lens", "dictionary_learning", "compiled_bag")
STEP_PEERS = ("sparsify", "eager_bag", "sae_lens", "sae_lens_sparse", "dictionary_learning")
RECONSTRUCT = f"{OURS}.reconstruct, backend triton"
OPENAI = "OpenAI's design, re-implemented"
PEER_LIBRARIES = ("sparsify", "sae_lens", "dictionary_learning")
ROUNDED_PEERS = ("sparsify",)
# Compiling takes longer than all the rest: once a dtype.
COMPILED_WIDTH = 64
# Seconds of a way's rounds, after which three suffice.
WAY_SECONDS = 0.5
# The exit status of a process whose GPU answers no more.
LOST_DEVICE = 3
# Rows in which rounding may decide which feature is the k-th are left out of the check.
UNDECIDED_GAP = 1e-4


class Bench:
    def __init__(self, device: str, seconds: float = float("inf"), journal: Journal | None = None) -> None:
        self.device = device
        self.end = time.monotonic() + seconds
        self.journal = journal or Journal()
        self.quick = device == "cpu"
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, std: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, device=self.device, generator=self.generator) * std).to(dtype)

    def rates(self) -> Rates:
        size = 256 if self.quick else 8192
        numbers = size * size * (1 if self.quick else 4)
        source = torch.randn(numbers, device=self.device)
        target = torch.empty_like(source)
        copy = self.time(lambda: target.copy_(source), graph=False)
        operations = {}
        for dtype in TOLERANCES:
            a, b = (self.normal(size, size, std=1.0, dtype=dtype) for _ in range(2))
            operations[dtype] = 2 * size**3 / self.time(lambda a=a, b=b: a @ b, graph=False)
        return Rates(2 * source.numel() * source.element_size() / copy, operations)

    def time(self, way: Way, *, graph: bool, calls: int = 20, rounds: int = 15) -> float:
        """Median seconds of a call on the device; with ``graph``, in replays of a CUDA graph of several calls."""
        if self.quick:
            start = time.perf_counter()
            way()
            return time.perf_counter() - start
        for _ in range(3):
            way()
        torch.cuda.synchronize()
        replay: Callable[[], object] = way
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                for _ in range(calls):
                    way()
            replay = captured.replay
            replay()
        else:
            calls = 1
        seconds: list[float] = []
        start = time.monotonic()
        while len(seconds) < rounds and (len(seconds) < 3 or time.monotonic() < start + WAY_SECONDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3 / calls)
        return statistics.median(seconds)

    def call_time(self, way: Way, calls: int = 50) -> float:
        """Seconds of the host a call, the device working in its own time.

        So few calls that their launches, ten or so each, fit into the device's queue: a full one makes the host wait.
        """
        start = time.perf_counter()
        for _ in range(1 if self.quick else calls):
            way()
        seconds = time.perf_counter() - start
        if not self.quick:
            torch.cuda.synchronize()
        return seconds / (1 if self.quick else calls)

    def measure(
        self,
        section: Section,
        name: str,
        way: Way | str,
        check: Callable[[object], float] | None,
        tolerance: float,
        *,
        graph: bool,
        work: Work | None = None,
        note: Callable[[], str] = str,
    ) -> None:
        """Adds a row: a time for a way that is right, else the reason why there is none. A string is such a reason.

        ``work`` is that of the section unless told; ``note`` is asked after the way has run.
        """
        if self.journal.has(section.title, name):
            return
        row = Row(name, work or section.work)
        section.rows.append(row)
        self.journal.add("begun", section=section.title, way=name)
        if isinstance(way, str) or time.monotonic() > self.end:
            row.note = way if isinstance(way, str) else "left out: the time was up"
        else:
            # Libraries may set it when they are imported.
            torch.set_float32_matmul_precision("highest")
            try:
                self.run(row, way, check, tolerance, graph)
                row.note = row.note or note()
            except Exception as error:  # one way that cannot run leaves the others their figures
                row.note, row.failed = reason(error), not is_missing(error)
        self.journal.add_row(section.title, row)
        if row.failed and self.device_is_lost():
            sys.exit(LOST_DEVICE)

    def run(self, row: Row, way: Way, check: Callable[[object], float] | None, tolerance: float, graph: bool) -> None:
        if check is not None:
            row.error = check(way())
            # Not "greater": NaN must not pass.
            if not row.error <= tolerance:
                row.note, row.failed = "wrong", True
                return
        row.peak = self.peak(way)
        row.seconds = self.time(way, graph=graph)
        if graph:
            row.call_seconds = self.call_time(way)

    def peak(self, way: Way) -> int | None:
        """Bytes on the device during a call, beyond those before it; its own result counts."""
        if self.quick:
            return None
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def device_is_lost(self) -> bool:
        """Whether what failed has left the device in a state in which all else fails as well."""
        if self.quick:
            return False
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.device).item()
        except Exception:
            return True
        return False


def is_missing(error: Exception) -> bool:
    """Whether a library is not installed, which is no failure."""
    from peers import PeerUnavailableError

    return isinstance(error, PeerUnavailableError) and isinstance(error.__cause__, ModuleNotFoundError)


def reason(error: Exception) -> str:
    """Short enough for a cell of a table."""
    if is_missing(error):
        return f"not installed: {error.__cause__}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]


def relative_error(out: Tensor, truth: Tensor, rows: Tensor) -> float:
    difference = (out.double() - truth)[rows].norm()
    return float(difference / truth[rows].norm())


def decided(pre: Tensor, k: int) -> Tensor:
    """Rows of float64 scores whose k-th is clear of the next one."""
    if k == pre.shape[1]:
        return torch.ones(pre.shape[0], dtype=torch.bool, device=pre.device)
    top = pre.topk(k + 1, dim=-1).values
    return top[:, -2] - top[:, -1] > UNDECIDED_GAP * top.abs().amax()


@dataclass
class Problem:
    """A dictionary and a batch on the device."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    W_dec: Tensor
    k: int

    @classmethod
    def make(cls, bench: Bench, d: int, n: int, k: int, rows: int, dtype: torch.dtype) -> Problem:
        return cls(
            bench.normal(rows, d, std=1.0, dtype=dtype),
            bench.normal(n, d, std=d**-0.5, dtype=dtype),
            bench.normal(n, std=0.1, dtype=dtype),
            bench.normal(d, std=0.1, dtype=dtype),
            bench.normal(n, d, std=d**-0.5, dtype=dtype),
            k,
        )

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.W_enc, self.b_enc, self.b_dec, self.W_dec

    def first(self, rows: int, dtype: torch.dtype) -> Problem:
        x, *weights = (tensor.to(dtype) for tensor in (self.x[:rows], *self.arguments()[1:]))
        return Problem(x, *weights, self.k)

    def pre_activations(self) -> Tensor:
        return torch.addmm(self.b_enc, self.x - self.b_dec, self.W_enc.T)

    def inputs(self, dtype: torch.dtype) -> Any:
        """As the ways of ways.py take them."""
        from cases import Inputs

        return Inputs(*self.arguments()).to(dtype)

    def encoder_operations(self) -> int:
        return 2 * self.x.numel() * self.W_enc.shape[0]

    def weight_bytes(self) -> int:
        return (self.W_enc.numel() + self.b_enc.numel()) * self.x.element_size()


def eager_steer(problem: Problem, features: Tensor, values: Tensor) -> Tensor:
    """As one writes it in PyTorch: set a few features, add the change to the hidden state."""
    pre = problem.pre_activations()
    top = pre.topk(problem.k, dim=-1)
    a = torch.zeros_like(pre).scatter_(1, top.indices, top.values.relu())
    return problem.x + (values - a[:, features]) @ problem.W_dec[features]


def eager_reconstruct(problem: Problem) -> Tensor:
    top = problem.pre_activations().topk(problem.k, dim=-1)
    decoded = F.embedding_bag(top.indices, problem.W_dec, per_sample_weights=top.values.relu(), mode="sum")
    return decoded + problem.b_dec


def measure_yardstick(bench: Bench, rates: Rates, section: Section, problem: Problem, *, graph: bool) -> None:
    """The bare encoder product in bfloat16, which reads all there is to encode and stores all scores."""
    import ways

    inputs, rows, dtype = problem.inputs(torch.bfloat16), problem.x.shape[0], torch.bfloat16
    numbers = inputs.x.numel() + inputs.W_enc.numel() + rows * inputs.W_enc.shape[0]
    work = rates.work(numbers * dtype.itemsize, problem.encoder_operations(), dtype)
    product = ways.encoder_addmm(inputs, problem.k)
    bench.measure(section, YARDSTICK, lambda: product(inputs.x), None, 0.0, graph=graph, work=work)


def measure_openai(
    bench: Bench,
    section: Section,
    way_of: Callable[[Any], Way],
    check: Callable[[object], float],
    dtype: torch.dtype,
) -> None:
    def build() -> Way:
        import gpu_openai

        return way_of(gpu_openai)

    with torch.set_grad_enabled("step" in section.title):
        way = usable("triton") or lazily(build)
        bench.measure(section, OPENAI, way, check, PEER_TOLERANCES[dtype], graph=False)


def lazily(build: Callable[[], Way]) -> Way:
    """A way that is built when it is first called: where that fails, the failure is the way's."""
    made: list[Way] = []

    def way() -> object:
        if not made:
            made.append(build())
        return made[0]()

    return way


def measure_tuned(
    bench: Bench, section: Section, name: str, way: Way | str, check: Callable[[object], float], tolerance: float
) -> None:
    """The same after tuning, with the configurations it chose; results must be the same bits."""
    texts: list[str] = []
    defaults: list[object] = []

    def tune() -> Way:
        from saerec_fast.kernels.triton import tuning

        assert not isinstance(way, str)
        defaults.append(way())
        before = tuning.chosen()
        with tuning.autotuning():
            way()
        texts.append(described({k: c for k, c in tuning.chosen().items() if k not in before}))
        return way

    def check_bits(out: object) -> float:
        return check(out) if same_bits(out, defaults[0]) else float("nan")

    tuned = way if isinstance(way, str) else lazily(tune)
    bench.measure(section, f"{name}, tuned", tuned, check_bits, tolerance, graph=False, note=lambda: texts[0])


def same_bits(out: object, expected: object) -> bool:
    tensors, others = (list(found) if isinstance(found, list) else [found] for found in (out, expected))
    return len(tensors) == len(others) and all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def described(choices: dict[Any, Any]) -> str:
    """Kernels and the configurations that were chosen for them."""
    texts = []
    for kind, configuration in choices.items():
        constants = "".join(f", {name} {value}" for name, value in configuration.kwargs.items())
        schedule = f"{configuration.num_warps} warps, {configuration.num_stages} stages"
        texts.append(f"{kind.kernel} ({kind.rows} rows): {schedule}{constants}")
    return "; ".join(sorted(texts))


def usable(backend: str) -> str:
    """Reason why a backend cannot run, empty if it can."""
    from saerec_fast.backend import available_backends

    return available_backends()[backend]


def serving(bench: Bench, rates: Rates, d: int, n: int, k: int, rows: int, dtype: torch.dtype) -> Section:
    """Four features set in a top-k dictionary: the whole encoder has to run."""
    import saerec_fast as fast
    from saerec_fast.kernels import cuda

    problem = Problem.make(bench, d, n, k, rows, dtype)
    chosen = sorted({0, n // 3, n // 2, n - 1})
    features = torch.tensor(chosen, device=bench.device)
    values = torch.tensor([1.5, 0.0, -0.5, 2.0][: len(chosen)], device=bench.device)
    exact = problem.first(rows, torch.float64)
    truth, clear = eager_steer(exact, features, values.double()), decided(exact.pre_activations(), k)
    size = problem.x.element_size()
    moved = problem.weight_bytes() + size * (2 * problem.x.numel() + len(chosen) * d)
    section = Section(
        f"Serving steer, {rows} rows, (d, n, k) = ({d}, {n}, {k}), {name_of(dtype)}",
        rates.work(moved, problem.encoder_operations(), dtype),
    )

    def check(out: object) -> float:
        assert isinstance(out, Tensor)
        return relative_error(out, truth, clear)

    tolerance, peer = TOLERANCES[dtype], PEER_TOLERANCES[dtype]
    typed = values.to(dtype)
    plan = fast.SteeringPlan([fast.Edit(f, "set", float(v)) for f, v in zip(chosen, values.tolist(), strict=True)])

    def kernel() -> Tensor:
        codes = [0] * len(chosen)
        return cuda.steer(*problem.arguments(), None, k, False, chosen, codes, values, None)

    def public(backend: str) -> Way | str:
        return usable(backend) or (
            lambda: fast.steer(*problem.arguments(), fast.TopK(k), plan, strengths=values, backend=backend)
        )

    name = f"{OURS}.steer, backend"
    bench.measure(section, f"{OURS}, CUDA C++", cuda.available() or kernel, check, tolerance, graph=True)
    bench.measure(section, f"{name} cuda", public("cuda"), check, tolerance, graph=True)
    bench.measure(section, f"{name} triton", public("triton"), check, tolerance, graph=True)
    measure_yardstick(bench, rates, section, problem, graph=True)
    bench.measure(section, "eager PyTorch", lambda: eager_steer(problem, features, typed), check, peer, graph=True)
    if rows == 64 and d == 64 and not bench.quick:
        compiled = torch.compile(eager_steer)
        way = lambda: compiled(problem, features, typed)  # noqa: E731 - a way among others
        bench.measure(section, "torch.compile", way, check, peer, graph=True)
    return section


def forward(bench: Bench, rates: Rates, d: int, n: int, k: int, rows: int, dtype: torch.dtype) -> Section:
    import saerec_fast as fast

    problem = Problem.make(bench, d, n, k, rows, dtype)
    checked = min(rows, CHECKED_ROWS)
    exact = problem.first(checked, torch.float64)
    truth, clear = eager_reconstruct(exact), decided(exact.pre_activations(), k)
    size = problem.x.element_size()
    operations = problem.encoder_operations() + 2 * rows * k * d
    moved = 2 * problem.weight_bytes() + size * 2 * problem.x.numel()
    section = Section(
        f"Encode + decode, {rows} rows, (d, n, k) = ({d}, {n}, {k}), {name_of(dtype)}",
        rates.work(moved, operations, dtype),
    )

    def check(out: object) -> float:
        assert isinstance(out, Tensor)
        return relative_error(out[:checked], truth, clear)

    def triton() -> Tensor:
        return fast.reconstruct(*problem.arguments(), fast.TopK(k), backend="triton")

    import ways

    tolerance = TOLERANCES[dtype]
    ours = usable("triton") or triton
    bench.measure(section, RECONSTRUCT, ours, check, tolerance, graph=False)
    measure_yardstick(bench, rates, section, problem, graph=False)
    inputs = problem.inputs(dtype)
    for name in FORWARD_PEERS:
        if ways.TOPK[name].compiled and (d != COMPILED_WIDTH or bench.quick):
            continue

        def build(name: str = name) -> Way:
            call = ways.TOPK[name].build(inputs, k)
            return lambda: call(inputs.x)

        peer = PEER_TOLERANCES[torch.bfloat16 if name in ROUNDED_PEERS else dtype]
        with torch.no_grad():
            bench.measure(section, name, lazily(build), check, peer, graph=False)

    def openai(design: Any) -> Way:
        call = design.forward(inputs, k)
        return lambda: call(inputs.x)

    measure_openai(bench, section, openai, check, dtype)
    measure_tuned(bench, section, RECONSTRUCT, ours, check, tolerance)
    return section


def training(bench: Bench, rates: Rates, d: int, n: int, k: int, rows: int, dtype: torch.dtype) -> Section:
    """Forward, mean squared error and the gradients of all parameters."""
    import saerec_fast as fast

    problem = Problem.make(bench, d, n, k, rows, dtype)
    parameters = [problem.W_enc, problem.b_enc, problem.b_dec, problem.W_dec]
    # Features whose gradient rounding can change by more than itself are those of undecided rows; few, and averaged.
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    size = problem.x.element_size()
    operations = problem.encoder_operations() + 5 * 2 * rows * k * d
    moved = 4 * problem.weight_bytes() + size * problem.x.numel()
    section = Section(
        f"Training step, {rows} rows, (d, n, k) = ({d}, {n}, {k}), {name_of(dtype)}",
        rates.work(moved, operations, dtype),
    )

    def step(reconstruct: Callable[[Problem], Tensor], of: Problem) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (of.W_enc, of.b_enc, of.b_dec, of.W_dec)]
        W_enc, b_enc, b_dec, W_dec = leaves
        out = reconstruct(Problem(of.x, W_enc, b_enc, b_dec, W_dec, k))
        loss = (out - of.x).pow(2).sum() / of.x.shape[0]
        return list(torch.autograd.grad(loss, leaves))

    exact = problem.first(rows, torch.float64)
    truth = step(eager_reconstruct, exact)

    def check(out: object) -> float:
        assert isinstance(out, list)
        assert len(out) == len(parameters)
        return max(float((g.double() - t).norm() / t.norm()) for g, t in zip(out, truth, strict=True))

    def triton(of: Problem) -> Tensor:
        return fast.reconstruct(*of.arguments(), fast.TopK(k), backend="triton")

    import ways

    ours = usable("triton") or (lambda: step(triton, problem))
    bench.measure(section, RECONSTRUCT, ours, check, tolerance, graph=False)
    measure_yardstick(bench, rates, section, problem, graph=False)
    inputs = problem.inputs(dtype)
    for name in STEP_PEERS:

        def build(name: str = name) -> Way:
            library_step = ways.STEP_TOPK[name].build(inputs, k)
            return lambda: [library_step(inputs.x), library_step.gradients()][1]

        peer = PEER_TOLERANCES[torch.bfloat16 if name in ROUNDED_PEERS else dtype]
        bench.measure(section, name, lazily(build), check, peer, graph=False)

    def openai(design: Any) -> Way:
        openai_step = design.step(inputs, k)
        return lambda: [openai_step(inputs.x), openai_step.gradients()][1]

    measure_openai(bench, section, openai, check, dtype)
    measure_tuned(bench, section, RECONSTRUCT, ours, check, tolerance)
    return section


def facts() -> dict[str, str]:
    """Versions of what is measured, or that it is missing; whether it can be imported, the rows say."""
    from peers import PEERS

    found = {"Python": platform.python_version(), "PyTorch": torch.__version__, "CUDA": str(torch.version.cuda)}
    for name in ("saerec-fast", "triton", *(PEERS[peer][0] for peer in PEER_LIBRARIES)):
        installed = next(distributions(name=name), None)
        found[name] = "not installed" if installed is None else installed.version
    return found


def run(bench: Bench) -> None:
    """Measures what the journal does not have yet."""
    if not bench.journal.facts():
        bench.journal.add("facts", facts=facts())
    rates = bench.journal.rates()
    if rates is None:
        try:
            rates = bench.rates()
        except Exception as error:  # times without floors are still times
            bench.journal.add("facts", facts={"ceilings": reason(error)})
            rates = Rates(float("nan"), dict.fromkeys(TOLERANCES, float("nan")))
        operations = {name_of(dtype): rate for dtype, rate in rates.operations.items()}
        bench.journal.add("rates", bytes=rates.bytes, operations=operations)
    for make, *arguments in calls(bench.quick):
        name = " ".join([make.__name__, *(str(argument) for argument in arguments)])
        if bench.journal.is_closed(name):
            continue
        if time.monotonic() > bench.end:
            bench.journal.add("left_out", section=name)
            continue
        bench.journal.add("begun", section=name, way="")
        try:
            make(bench, rates, *arguments)
        except Exception as error:  # of what is needed before the first way
            bench.journal.add_row(name, Row("", NO_WORK, note=reason(error), failed=True))
            if bench.device_is_lost():
                sys.exit(LOST_DEVICE)
        bench.journal.add("finished", section=name)
        # Graphs and autograd leave cycles, which hold gigabytes.
        gc.collect()
        if not bench.quick:
            torch.cuda.empty_cache()


def calls(quick: bool) -> list[tuple[Any, ...]]:
    """The sections: what measures each, and its arguments."""
    if quick:
        return [(make, 8, 40, 4, 6, torch.float32) for make in (serving, forward, training)]
    # What the goals speak of first. The truth of a training step is dense, in float64, and needs the whole batch.
    found: list[tuple[Any, ...]] = [(forward, *DICTIONARIES[0], LARGE_BATCH, dtype) for dtype in TOLERANCES]
    found += [(training, *DICTIONARIES[0], 16384, dtype) for dtype in TOLERANCES]
    found += [(serving, *DICTIONARIES[0], rows, dtype) for rows in SERVING_ROWS for dtype in TOLERANCES]
    for sizes in DICTIONARIES[1:]:
        found += [(forward, *sizes, LARGE_BATCH, dtype) for dtype in TOLERANCES]
        found += [(serving, *sizes, rows, dtype) for rows in SERVING_ROWS for dtype in TOLERANCES]
    return found
