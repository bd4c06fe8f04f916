"""The study's memory does not grow with the number of interactions, but for the interactions themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import large_data
import numpy as np
import pytest
import study_memory

from saerec_fast.data import read_dataset

FEW, MANY = 150_000, 600_000
D_MODEL = 32

# Small models, so that what grows with the rows is not lost beside them. Each step's peak is measured from what is
# resident before it; a first round on little data loads what is loaded once.
_SCRIPT = """
import functools, json, re, sys
from pathlib import Path
import large_data
import torch
from saerec_fast import pipeline
from saerec_fast.files import write_json
from saerec_fast.recommender import RecommenderConfig, SequenceRecommender
from saerec_fast.sae import SAETrainingConfig
from saerec_fast.sae.activation_store import ActivationStoreWriter

folder, n_interactions, d_model, leak = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "leak"
torch.set_num_threads(1)
large_data.BLOCK_USERS = 500
pipeline.FeatureStatistics = functools.partial(
    pipeline.FeatureStatistics, auc_rows=10**9 if leak else 5_000, max_groups=16
)
if leak:
    kept, append = [], ActivationStoreWriter.append
    def keep(self, hidden, users, items):
        kept.append(hidden.repeat(1, 4))  # enough to stand out from what the process had free
        append(self, hidden, users, items)
    ActivationStoreWriter.append = keep

def status(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def study(folder, n_interactions):
    def measured(name, step):
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        step()
        peaks[name] = status("VmHWM") - before

    peaks = {}
    measured("generate", lambda: large_data.write_large_data(
        folder / "data", n_interactions, n_items=500, n_attributes=4, mean_length=60.0))
    run = pipeline.Run(folder / "run", progress=False)
    measured("read", lambda: run.prepare_data(pipeline.DataSettings(str(folder / "data"))))
    SequenceRecommender(RecommenderConfig(run.split.n_items, d_model, n_layers=1, n_heads=1)).save(
        run.folder / "recommender" / "model")
    write_json(run.folder / "recommender" / "settings.json", {})
    write_json(run.folder / "recommender" / "result.json", {})
    measured("collect", lambda: run.collect_activations(pipeline.ActivationSettings("block.0", "non_test")))
    run.train_sae(SAETrainingConfig(n_features=32, activation="topk", k=4, steps=5, batch_size=256))
    measured("interpret", run.interpret)
    return peaks

study(folder / "first", 20_000)
print(json.dumps(study(folder / "second", n_interactions)))
"""

# Every thread has buffers of its own, and how many run at a time is chance.
ONE_THREAD = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process can only be reset on Linux"
)


@pytest.fixture(scope="module")
def growth(tmp_path_factory):
    """A function: step → bytes of peak memory per further interaction; its "leak" keeps every row four times."""

    @lru_cache
    def measure(leak: str) -> dict[str, float]:
        peaks = []
        for n_interactions in (FEW, MANY):
            arguments = [str(tmp_path_factory.mktemp("study")), str(n_interactions), str(D_MODEL), leak]
            done = subprocess.run(
                [sys.executable, "-c", _SCRIPT, *arguments],
                env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(Path(large_data.__file__).parent)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            peaks.append(json.loads(done.stdout.splitlines()[-1]))
        few, many = peaks
        return {step: (many[step] - few[step]) / (MANY - FEW) for step in few}

    return measure


# An interaction takes 12 bytes (item and time). Reading parses 24 and sorts a copy, splitting copies each part;
# collection and interpretation hold a copy of the chosen users' interactions.
BYTES_PER_INTERACTION = {"generate": 20, "read": 300, "collect": 80, "interpret": 150}


@needs_proc
@pytest.mark.parametrize("step", BYTES_PER_INTERACTION)
def test_memory_is_flat_in_the_number_of_interactions(growth, step):
    assert growth("no leak")[step] < BYTES_PER_INTERACTION[step]


@needs_proc
@pytest.mark.parametrize("step", ["collect", "interpret"])
def test_kept_rows_would_show(growth, step):
    assert growth("leak")[step] > 1.3 * BYTES_PER_INTERACTION[step]


def test_large_data_has_the_layout_of_grouplens_and_follows_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(large_data, "BLOCK_USERS", 50)

    def write(name, seed):
        n_users = large_data.write_large_data(
            tmp_path / name, 5_001, n_items=300, n_attributes=6, mean_length=30.0, seed=seed
        )
        return n_users, *((tmp_path / name / file).read_bytes() for file in ("ratings.csv", "movies.csv"))

    first = write("a", 3)
    assert first == write("b", 3)
    other = write("c", 4)
    assert first[1] != other[1]
    assert first[2] != other[2]

    data = read_dataset(tmp_path / "a")
    assert (data.n_interactions, data.n_users) == (5_001, first[0])
    assert data.n_users > 2 * 50
    assert len(data.item_table.attribute_names) == 6
    assert data.user_ids.tolist() == [str(user + 1) for user in range(data.n_users)]
    # Blocks are other users over the same items: nobody's history returns in the next block.
    histories = {tuple(data.sequence(user).tolist()) for user in range(data.n_users)}
    assert len(histories) == data.n_users
    popularity = np.sort(np.bincount(data.items, minlength=data.n_items))[::-1]
    assert popularity[:30].sum() > 3 * popularity[-30:].sum()


def test_large_data_refuses_to_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="n_interactions: expected at least 1, got 0"):
        large_data.write_large_data(tmp_path, 0)


@needs_proc
def test_measure_sees_memory_and_failures(tmp_path):
    script = "import time; block = bytearray(200 << 20); time.sleep(0.2); del block"
    usage = study_memory.measure([sys.executable, "-c", script], tmp_path / "output.txt")
    assert usage.peak > 200 << 20
    assert 200 << 20 < usage.anonymous <= usage.peak
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1:.*gone wrong"):
        study_memory.measure([sys.executable, "-c", "raise SystemExit('gone wrong')"], tmp_path / "output.txt")


@pytest.mark.parametrize(("peak", "fails"), [(5 << 30, True), (3 << 30, False)])
def test_the_limit_is_kept(tmp_path, monkeypatch, capsys, peak, fails):
    def measure(command, output):
        output.write_text("said\n")
        return study_memory.Usage(1.0, peak if command[-1] == "interpret" else 1 << 30, 1 << 30)

    monkeypatch.setattr(study_memory, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["study_memory.py", "--scratch", str(tmp_path), "--limit", "4"])
    if fails:
        with pytest.raises(SystemExit, match=r"more than 4.0 GiB: interpret"):
            study_memory.main()
    else:
        study_memory.main()
    assert f"| interpret (said) | 1 | {peak >> 30}.00 | 1.00 |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
