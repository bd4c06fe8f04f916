"""Times the GPU kernels beside PyTorch and checks them in the same run: ``make gpu`` calls it.

``python benchmarks/gpu.py [--check] [--device cuda] [--out benchmarks/results]`` writes ``<gpu>.md``. ``--check`` only
says whether there is a GPU to run on. ``--device cpu`` goes through the same steps with small sizes, to try the script.
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

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError as error:
    sys.exit(f"make gpu: {sys.executable} has no PyTorch ({error}); GPU_PYTHON=... names another Python.")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

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
# Rows in which rounding may decide which feature is the k-th are left out of the check.
UNDECIDED_GAP = 1e-4


@dataclass(frozen=True)
class Rates:
    """Measured ceilings of the device: bytes a second of a large copy, operations a second of large products."""

    bytes: float
    operations: dict[torch.dtype, float]

    def floor(self, moved: float, operations: float, dtype: torch.dtype) -> float:
        """The seconds that no program of so many bytes and operations goes below."""
        return max(moved / self.bytes, operations / self.operations[dtype])


@dataclass
class Row:
    way: str
    seconds: float | None  # on the device, a median
    call_seconds: float | None = None  # of the host, where calls follow each other
    error: float | None = None
    note: str = ""


@dataclass
class Section:
    title: str
    floor: float
    moved: float
    operations: float
    rows: list[Row] = field(default_factory=list)


class Bench:
    def __init__(self, device: str) -> None:
        self.device = device
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
        seconds = []
        for _ in range(rounds):
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
    ) -> None:
        """Adds a row: a time for a way that is right, else the reason why there is none. A string is such a reason."""
        if isinstance(way, str):
            section.rows.append(Row(name, None, note=way))
            return
        row = Row(name, None)
        section.rows.append(row)
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
            row.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


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

    def addmm(self) -> Way:
        """The yardstick: the bare encoder product in bfloat16, which stores all scores."""
        x, W_enc, b_enc = (tensor.to(torch.bfloat16) for tensor in (self.x, self.W_enc, self.b_enc))
        return lambda: torch.addmm(b_enc, x, W_enc.T)

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
        rates.floor(moved, problem.encoder_operations(), dtype),
        moved,
        problem.encoder_operations(),
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
    bench.measure(section, "torch.addmm, bfloat16 (the encoder alone)", problem.addmm(), None, 0.0, graph=True)
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
        rates.floor(moved, operations, dtype),
        moved,
        operations,
    )

    def check(out: object) -> float:
        assert isinstance(out, Tensor)
        return relative_error(out[:checked], truth, clear)

    def triton() -> Tensor:
        return fast.reconstruct(*problem.arguments(), fast.TopK(k), backend="triton")

    tolerance, peer = TOLERANCES[dtype], PEER_TOLERANCES[dtype]
    bench.measure(section, "eager PyTorch", lambda: eager_reconstruct(problem), check, peer, graph=False)
    if d == 64 and not bench.quick:
        compiled = torch.compile(eager_reconstruct)
        bench.measure(section, "torch.compile", lambda: compiled(problem), check, peer, graph=False)
    bench.measure(section, "torch.addmm, bfloat16 (the encoder alone)", problem.addmm(), None, 0.0, graph=False)
    bench.measure(
        section, "saerec_fast.reconstruct, backend triton", usable("triton") or triton, check, tolerance, graph=False
    )
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
        rates.floor(moved, operations, dtype),
        moved,
        operations,
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

    eager = lambda: step(eager_reconstruct, problem)  # noqa: E731 - a way among others
    ours = usable("triton") or (lambda: step(triton, problem))
    bench.measure(section, "eager PyTorch", eager, check, PEER_TOLERANCES[dtype], graph=False)
    bench.measure(section, "torch.addmm, bfloat16 (the encoder alone)", problem.addmm(), None, 0.0, graph=False)
    bench.measure(section, "saerec_fast.reconstruct, backend triton", ours, check, tolerance, graph=False)
    return section


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(bench: Bench, rates: Rates) -> list[Section]:
    if bench.quick:
        sizes = (8, 40, 4)
        return [make(bench, rates, *sizes, 6, torch.float32) for make in (serving, forward, training)]
    sections = [
        serving(bench, rates, *sizes, rows, dtype)
        for sizes in DICTIONARIES
        for dtype in TOLERANCES
        for rows in SERVING_ROWS
    ]
    sections += [forward(bench, rates, *sizes, LARGE_BATCH, dtype) for sizes in DICTIONARIES for dtype in TOLERANCES]
    # The truth of a training step is dense, in float64, and needs the whole batch.
    sections += [training(bench, rates, *DICTIONARIES[0], 16384, dtype) for dtype in TOLERANCES]
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
        "the second-level cache. *call* is the host's time a call without a graph. The floor is the larger of bytes "
        "over the copy rate and operations over the rate of products. *error* is ‖out − truth‖ / ‖truth‖ against "
        "float64 in the same run, without rows in which rounding decides about the k-th feature; a wrong way has no "
        "time. PyTorch in bfloat16 rounds its scores before it selects, and is allowed the error that this makes.",
    ]
    for section in sections:
        parts.append(f"## {section.title}")
        parts.append(
            f"Floor {micros(section.floor)} µs: {section.moved / 1e6:.3g} MB, {section.operations / 1e9:.3g} GFLOP."
        )
        lines = ["| way | µs | × floor | call µs | error | |", "|---|---|---|---|---|---|"]
        for row in section.rows:
            ratio = "–" if row.seconds is None else f"{row.seconds / section.floor:.1f}"
            error = "–" if row.error is None else f"{row.error:.1e}"
            cells = [row.way, micros(row.seconds), ratio, micros(row.call_seconds), error, row.note]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


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
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("make gpu: PyTorch sees no CUDA device, and without one there is nothing to test or to time.")
    if options.check:
        return
    bench = Bench(options.device)
    rates = bench.rates()
    text = report(bench, rates, run(bench, rates))
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", machine_name(options.device).lower()).strip("-")
    (options.out / f"{slug}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
