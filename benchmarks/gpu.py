"""Times the GPU kernels beside PyTorch and SAE libraries and checks them in the same run: ``make gpu`` calls it.

``python benchmarks/gpu.py [--check] [--device cuda] [--seconds 240] [--out benchmarks/results]`` writes ``<gpu>.md``.
``--check`` only says whether there is a GPU to run on. ``--device cpu`` goes through the same steps with small sizes,
to try the script. After ``--seconds`` nothing more is measured, and the report says what was left out; what the
project's goals speak of comes first.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError as error:
    sys.exit(f"make gpu: {sys.executable} has no PyTorch ({error}); GPU_PYTHON=... names another Python.")

ROOT = Path(__file__).parents[1]
# Of this folder too: `make gpu` keeps a script's own folder off the path.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

Way = Callable[[], object]

# (d, n, k) of the dictionaries, as in docs/benchmarks.md.
DICTIONARIES = [(64, 2048, 32), (128, 4096, 32), (256, 8192, 64)]
SERVING_ROWS = [1, 16, 64, 256]
LARGE_BATCH = 65536
CHECKED_ROWS = 4096
# The share of ‖truth‖ that an error may have: float32 arithmetic in any order, and results rounded to bfloat16.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Scores rounded to bfloat16 select other features.
PEER_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.3}
# The ways of ways.py that run on a GPU, in its order; each is built on the device in the dtype of its section. sparsify
# multiplies in bfloat16 whatever it is given.
FORWARD_PEERS = ("eager_bag", "eager_dense", "compiled_bag", "sae_lens", "sparsify", "dictionary_learning")
STEP_PEERS = ("eager_bag", "sae_lens", "sae_lens_sparse", "sparsify", "dictionary_learning")
ROUNDED_PEERS = ("sparsify",)
# Compiling takes longer than all the rest: once a dtype.
COMPILED_WIDTH = 64
# Seconds of a way's rounds, after which three suffice.
WAY_SECONDS = 0.5
# Rows in which rounding may decide which feature is the k-th are left out of the check.
UNDECIDED_GAP = 1e-4


@dataclass(frozen=True)
class Rates:
    """Measured ceilings of the device: bytes a second of a large copy, operations a second of large products."""

    bytes: float
    operations: dict[torch.dtype, float]

    def work(self, moved: float, operations: float, dtype: torch.dtype) -> Work:
        """With the seconds that no program of so many bytes and operations goes below."""
        return Work(moved, operations, max(moved / self.bytes, operations / self.operations[dtype]))


@dataclass(frozen=True)
class Work:
    """What has to be done at least: bytes through memory, operations, and the seconds that these take."""

    moved: float
    operations: float
    seconds: float


@dataclass
class Row:
    way: str
    work: Work
    seconds: float | None  # on the device, a median
    call_seconds: float | None = None  # of the host, where calls follow each other
    error: float | None = None
    note: str = ""


@dataclass
class Section:
    title: str
    work: Work
    rows: list[Row] = field(default_factory=list)


class Bench:
    def __init__(self, device: str, seconds: float = float("inf")) -> None:
        self.device = device
        self.end = time.monotonic() + seconds
        self.left_out = 0  # sections
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

    def call_time(self, way: Way, calls: int = 200) -> float:
        """Seconds of the host a call, the device working in its own time."""
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
        note: str = "",
    ) -> None:
        """Adds a row: a time for a way that is right, else the reason why there is none. A string is such a reason.

        ``work`` is that of the section unless told.
        """
        if not isinstance(way, str) and time.monotonic() > self.end:
            way = "left out: the time was up"
        row = Row(name, work or section.work, None, note=way if isinstance(way, str) else note)
        section.rows.append(row)
        if isinstance(way, str):
            return
        try:
            if check is not None:
                row.error = check(way())
                # Not "greater": NaN must not pass.
                if not row.error <= tolerance:
                    row.note = "wrong"
                    return
            row.seconds = self.time(way, graph=graph)
            if graph:
                row.call_seconds = self.call_time(way)
        except Exception as error:  # one way that cannot run leaves the others their figures
            row.note = reason(error)


def reason(error: Exception) -> str:
    """The first line, for a cell of a table."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


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
    name = "torch.addmm, bfloat16 (the encoder alone)"
    bench.measure(section, name, lambda: product(inputs.x), None, 0.0, graph=graph, work=work)


def built(build: Callable[[], Way]) -> Way | str:
    """A way, or why it cannot be built here."""
    from peers import PeerUnavailableError

    try:
        return build()
    except PeerUnavailableError as error:
        missing = isinstance(error.__cause__, ModuleNotFoundError)
        return f"not installed: {error.__cause__}" if missing else f"not available: {error}"
    except Exception as error:  # what a library cannot do on this device or in this dtype
        return reason(error)


def measure_tuned(
    bench: Bench, section: Section, name: str, way: Way | str, check: Callable[[object], float], tolerance: float
) -> None:
    """The same after tuning, with the configurations it chose; results must be the same bits."""
    configurations = ""
    if not isinstance(way, str) and time.monotonic() < bench.end:
        from saerec_fast.kernels.triton import tuning

        untuned = check
        try:
            default, before = way(), tuning.chosen()
            with tuning.autotuning():
                way()
            configurations = described({k: c for k, c in tuning.chosen().items() if k not in before})

            def check(out: object) -> float:
                return untuned(out) if same_bits(out, default) else float("nan")
        except Exception as error:
            way = reason(error)

    bench.measure(section, f"{name}, tuned", way, check, tolerance, graph=False, note=configurations)


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

    bench.measure(section, "eager PyTorch", lambda: eager_steer(problem, features, typed), check, peer, graph=True)
    if rows == 64 and d == 64 and not bench.quick:
        compiled = torch.compile(eager_steer)
        way = lambda: compiled(problem, features, typed)  # noqa: E731 - a way among others
        bench.measure(section, "torch.compile", way, check, peer, graph=True)
    measure_yardstick(bench, rates, section, problem, graph=True)
    bench.measure(section, "saerec_fast, CUDA C++", cuda.available() or kernel, check, tolerance, graph=True)
    bench.measure(section, "saerec_fast.steer, backend cuda", public("cuda"), check, tolerance, graph=True)
    bench.measure(section, "saerec_fast.steer, backend triton", public("triton"), check, tolerance, graph=True)
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
    inputs = problem.inputs(dtype)
    for name in FORWARD_PEERS:
        if ways.TOPK[name].compiled and (d != COMPILED_WIDTH or bench.quick):
            continue

        def build(name: str = name) -> Way:
            call = ways.TOPK[name].build(inputs, k)
            return lambda: call(inputs.x)

        peer = PEER_TOLERANCES[torch.bfloat16 if name in ROUNDED_PEERS else dtype]
        with torch.no_grad():
            bench.measure(section, name, built(build), check, peer, graph=False)
    measure_yardstick(bench, rates, section, problem, graph=False)
    ours = usable("triton") or triton
    bench.measure(section, "saerec_fast.reconstruct, backend triton", ours, check, tolerance, graph=False)
    measure_tuned(bench, section, "saerec_fast.reconstruct, backend triton", ours, check, tolerance)
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

    inputs = problem.inputs(dtype)
    for name in STEP_PEERS:

        def build(name: str = name) -> Way:
            library_step = ways.STEP_TOPK[name].build(inputs, k)
            return lambda: [library_step(inputs.x), library_step.gradients()][1]

        peer = PEER_TOLERANCES[torch.bfloat16 if name in ROUNDED_PEERS else dtype]
        bench.measure(section, name, built(build), check, peer, graph=False)
    measure_yardstick(bench, rates, section, problem, graph=False)
    ours = usable("triton") or (lambda: step(triton, problem))
    bench.measure(section, "saerec_fast.reconstruct, backend triton", ours, check, tolerance, graph=False)
    measure_tuned(bench, section, "saerec_fast.reconstruct, backend triton", ours, check, tolerance)
    return section


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(bench: Bench, rates: Rates) -> list[Section]:
    if bench.quick:
        sizes = (8, 40, 4)
        return [make(bench, rates, *sizes, 6, torch.float32) for make in (serving, forward, training)]
    # What the goals speak of first. The truth of a training step is dense, in float64, and needs the whole batch.
    calls: list[tuple[Any, ...]] = [(forward, *DICTIONARIES[0], LARGE_BATCH, dtype) for dtype in TOLERANCES]
    calls += [(training, *DICTIONARIES[0], 16384, dtype) for dtype in TOLERANCES]
    calls += [(serving, *DICTIONARIES[0], rows, dtype) for rows in SERVING_ROWS for dtype in TOLERANCES]
    for sizes in DICTIONARIES[1:]:
        calls += [(forward, *sizes, LARGE_BATCH, dtype) for dtype in TOLERANCES]
        calls += [(serving, *sizes, rows, dtype) for rows in SERVING_ROWS for dtype in TOLERANCES]
    sections = []
    for make, *arguments in calls:
        if time.monotonic() > bench.end:
            print(f"left out, the time was up: {make.__name__} {arguments}")
            bench.left_out += 1
            continue
        sections.append(make(bench, rates, *arguments))
    return sections


def report(bench: Bench, rates: Rates, sections: list[Section]) -> str:
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if bench.device == "cuda":
        versions += f", CUDA {torch.version.cuda}"
    rate_text = ", ".join(f"{name_of(t)} products {rate / 1e12:.3g} TFLOP/s" for t, rate in rates.operations.items())
    parts = [
        f"# GPU kernels on {machine_name(bench.device)}",
        f"`make gpu` at commit {commit()}; {versions}. Measured ceilings: copy "
        f"{rates.bytes / 1e12:.3g} TB/s (bytes read and written), {rate_text}.",
        "Times are medians on the device; serving calls are replayed from a CUDA graph of 20, whose weights stay in "
        "the second-level cache. *call* is the host's time a call without a graph. The floor of a way is the larger of "
        "its bytes over the copy rate and its operations over the rate of products; the yardstick, which stores all "
        "scores, has its own. *error* is ‖out − truth‖ / ‖truth‖ against "
        "float64 in the same run, without rows in which rounding decides about the k-th feature; a wrong way has no "
        "time. PyTorch in bfloat16 rounds its scores before it selects, and is allowed the error that this makes; so "
        f"is {', '.join(ROUNDED_PEERS)}, which multiplies in bfloat16 whatever it is given. *tuned*: with the "
        "configurations in the note, which must give the bits of the default.",
        "Libraries: " + ", ".join(f"{name} {found}" for name, found in peer_versions().items()) + ".",
    ]
    for section in sections:
        parts.append(f"## {section.title}")
        lines = ["| way | µs | floor µs | MB | GFLOP | × floor | call µs | error | |", "|---" * 9 + "|"]
        for row in section.rows:
            work = row.work
            ratio = "–" if row.seconds is None else f"{row.seconds / work.seconds:.1f}"
            floor = [micros(work.seconds), f"{work.moved / 1e6:.3g}", f"{work.operations / 1e9:.3g}"]
            error = "–" if row.error is None else f"{row.error:.1e}"
            cells = [row.way, micros(row.seconds), *floor, ratio, micros(row.call_seconds), error, row.note]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    if bench.left_out:
        parts.append(f"Left out, since the time was up: {bench.left_out} sections.")
    return "\n\n".join(parts) + "\n"


def peer_versions() -> dict[str, str]:
    """Of the libraries among the ways, or that they are missing."""
    import peers

    return {name: peers.version_of(name) for name in ("sae_lens", "sparsify", "dictionary_learning")}


def micros(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:.3g}"


def machine_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"the CPU ({platform.machine()}), a dry run"


def commit() -> str:
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("make gpu: PyTorch sees no CUDA device, and without one there is nothing to test or to time.")
    if options.check:
        return
    import peers

    peers.set_environment()
    bench = Bench(options.device, options.seconds)
    rates = bench.rates()
    text = report(bench, rates, run(bench, rates))
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", machine_name(options.device).lower()).strip("-")
    (options.out / f"{slug}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
