"""Peak memory of the study's steps on generated data of 20 million interactions, each step in a process of its own.

Peak memory is the largest resident set the system saw (``ru_maxrss``): what the process allocated and the pages of
files mapped into it, libraries and the store of hidden states among them. Beside it stands the largest anonymous
memory alone (``RssAnon``, sampled), which is what the system cannot take back. The limit is on the former.

The recommender has the shape of a real one and is not trained, which would take hours: what is collected and
interpreted is of the same size either way. For Linux.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# Nothing large is imported here: what this process holds counts as the peak of the processes it starts.
if TYPE_CHECKING:
    from saerec_fast.pipeline import Run

_SAMPLE_SECONDS = 0.01


class Usage(NamedTuple):
    """What a step took; bytes."""

    seconds: float
    peak: int
    anonymous: int


def generate(folder: Path, options: argparse.Namespace) -> None:
    from large_data import write_large_data

    n_users = write_large_data(folder / "data", options.interactions, seed=options.seed)
    print(f"{options.interactions:,} interactions of {n_users:,} users")


def show(folder: Path, options: argparse.Namespace) -> None:
    from saerec_fast.cli import app

    app(["data", "show", str(folder / "data")])


def read_and_split(folder: Path, options: argparse.Namespace) -> None:
    from saerec_fast.pipeline import DataSettings

    parts = _run(folder).prepare_data(DataSettings(str(folder / "data"), seed=options.seed))["parts"]
    print(", ".join(f"{name} {part['interactions']:,}" for name, part in parts.items()))


def initialise_recommender(folder: Path, options: argparse.Namespace) -> None:
    import torch

    from saerec_fast.files import write_json
    from saerec_fast.recommender import RecommenderConfig, SequenceRecommender

    run = _run(folder)
    torch.manual_seed(options.seed)
    step = run.folder / "recommender"
    SequenceRecommender(RecommenderConfig(n_items=run.result("data")["n_items"])).save(step / "model")
    write_json(step / "settings.json", {"settings": {"trained": False}})
    write_json(step / "result.json", {"result": {}, "seconds": 0.0})


def collect_activations(folder: Path, options: argparse.Namespace) -> None:
    from saerec_fast.pipeline import ActivationSettings

    result = _run(folder).collect_activations(ActivationSettings("block.0", options.users))
    print(f"{result['n_rows']:,} rows of {result['users']:,} users")


def train_sae(folder: Path, options: argparse.Namespace) -> None:
    from saerec_fast.sae import SAETrainingConfig

    config = SAETrainingConfig(activation="topk", k=32, steps=options.sae_steps, seed=options.seed)
    quality = _run(folder).train_sae(config)
    print(f"explained variance {quality['explained_variance']:.3f}, L0 {quality['l0']:.1f}")


def interpret(folder: Path, options: argparse.Namespace) -> None:
    run = _run(folder)
    run.interpret()
    rows = {name: run.saved_statistics(name).n_rows for name in ("sae", "sae_train")}
    print(f"{rows['sae']:,} rows of test users, {rows['sae_train']:,} of the SAE's")


STEPS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "generate the data": generate,
    "saerec data show": show,
    "read and split": read_and_split,
    "initialise the recommender": initialise_recommender,
    "collect activations": collect_activations,
    "train the SAE": train_sae,
    "interpret": interpret,
}


def _run(folder: Path) -> Run:
    from saerec_fast.pipeline import Run

    return Run(folder / "run", progress=False)


def measure(command: list[str], output: Path) -> Usage:
    """Run ``command``, which writes to ``output``, to its end.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote.
    """
    started = time.perf_counter()
    anonymous = 0
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        while True:
            found, status, usage = os.wait4(process.pid, os.WNOHANG)
            if found:
                break
            anonymous = max(anonymous, _anonymous(process.pid))
            time.sleep(_SAMPLE_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output.read_text()}")
    return Usage(time.perf_counter() - started, 1024 * usage.ru_maxrss, anonymous)


def _anonymous(pid: int) -> int:
    match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(match[1]) if match else 0  # a process that has just ended has no such line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=20_000_000, help="default: %(default)s")
    parser.add_argument(
        "--users",
        choices=("train_sae", "non_test"),
        default="train_sae",
        help="whose hidden states are collected, and interpreted beside the test users'; non_test: everybody's",
    )
    parser.add_argument("--sae-steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--limit", type=float, default=4.0, help="GiB of peak memory a step may take (%(default)s)")
    parser.add_argument("--scratch", type=Path, default=Path("build"), help="folder for the data (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        STEPS[options.step](options.scratch, options)
        return

    options.scratch.mkdir(parents=True, exist_ok=True)
    exceeded = []
    with tempfile.TemporaryDirectory(prefix="memory-", dir=options.scratch) as scratch:
        print("| step | seconds | peak memory, GiB | of it anonymous |\n|---|---|---|---|", flush=True)
        for step in STEPS:
            command = [sys.executable, __file__, *sys.argv[1:], "--scratch", scratch, "--step", step]
            output = Path(scratch) / "output.txt"
            usage = measure(command, output)
            lines = output.read_text().strip().splitlines()
            said = f" ({lines[-1]})" if lines and step != "saerec data show" else ""
            print(f"| {step}{said} | {usage.seconds:.0f} | {usage.peak / 2**30:.2f} | {usage.anonymous / 2**30:.2f} |")
            sys.stdout.flush()
            if usage.peak > options.limit * 2**30:
                exceeded.append(step)
    if exceeded:
        sys.exit(f"more than {options.limit} GiB: {', '.join(exceeded)}")


if __name__ == "__main__":
    main()
