"""Hidden states on disk: what comes back, in which order, and what is refused."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from saerec_fast.sae import ActivationStore


def write_store(path, hidden, **meta):
    rows = np.arange(len(hidden))
    with ActivationStore.create(path, len(hidden), hidden.shape[1], **meta) as writer:
        for first in range(0, len(hidden), 97):
            part = slice(first, first + 97)
            writer.append(hidden[part], rows[part], rows[part] * 2)
    return ActivationStore(path)


@pytest.fixture
def hidden():
    return torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))


def test_roundtrip(tmp_path, hidden):
    store = write_store(tmp_path / "store", hidden, site="block.0")
    assert len(store) == 1000
    assert store.d_model == 7
    assert store.meta == {"site": "block.0"}
    assert store.hidden.dtype == np.float32
    assert store.users.dtype == store.items.dtype == np.int32
    np.testing.assert_array_equal(store.hidden, hidden.numpy())
    np.testing.assert_array_equal(store.items, 2 * np.arange(1000))


def test_accepts_bfloat16_and_lists(tmp_path):
    hidden = torch.randn(3, 2).bfloat16()
    with ActivationStore.create(tmp_path, 3, 2) as writer:
        writer.append(hidden, [1, 2, 3], torch.tensor([4, 5, 6]))
    store = ActivationStore(tmp_path)
    np.testing.assert_array_equal(store.hidden, hidden.float().numpy())
    assert store.users.tolist() == [1, 2, 3]
    assert store.items.tolist() == [4, 5, 6]


def test_mean_and_std_over_all_numbers(tmp_path, hidden, monkeypatch):
    # Far from 0, where sums of squares would cancel, and in several blocks.
    monkeypatch.setattr("saerec_fast.sae.activation_store._BLOCK_BYTES", 8 * 7 * 300)
    far = hidden + 1000
    store = write_store(tmp_path, far)
    mean, std = store.mean_std()
    assert mean == pytest.approx(float(far.double().mean()), rel=1e-12)
    assert std == pytest.approx(float(far.double().std(unbiased=False)), rel=1e-9)
    np.testing.assert_allclose(store.column_mean(), far.double().mean(0).numpy(), rtol=1e-12)


def test_statistics_refuse_values_that_are_not_finite(tmp_path, hidden):
    hidden[5, 3] = float("nan")
    with pytest.raises(ValueError, match=r"hidden\.npy.*finite"):
        write_store(tmp_path, hidden).mean_std()


def test_empty_store(tmp_path):
    store = write_store(tmp_path, torch.empty(0, 3))
    assert len(store) == 0
    assert list(store.batches(4)) == []
    assert list(store.batches(4, shuffle_seed=1)) == []
    with pytest.raises(ValueError, match="empty"):
        store.mean_std()


def test_sequential_batches_keep_the_order(tmp_path, hidden):
    store = write_store(tmp_path, hidden)
    batches = list(store.batches(300))
    assert [len(batch.hidden) for batch in batches] == [300, 300, 300, 100]
    assert torch.equal(torch.cat([batch.hidden for batch in batches]), hidden)
    assert [len(batch.hidden) for batch in store.batches(300, drop_last=True)] == [300, 300, 300]
    assert torch.equal(next(store.batches(300, start=2)).hidden, hidden[600:900])


@pytest.mark.parametrize("buffer_rows", [None, 700, 300, 5])
def test_shuffle_is_a_permutation_that_keeps_rows_together(tmp_path, hidden, buffer_rows):
    store = write_store(tmp_path, hidden)
    batches = list(store.batches(64, 3, buffer_rows=buffer_rows))
    users = np.concatenate([batch.users for batch in batches])
    assert sorted(users) == list(range(1000))
    assert not np.array_equal(users, np.arange(1000))
    assert torch.equal(torch.cat([batch.hidden for batch in batches]), hidden[users])
    np.testing.assert_array_equal(np.concatenate([batch.items for batch in batches]), 2 * users)
    assert {len(batch.hidden) for batch in batches[:-1]} == {64}


@pytest.mark.parametrize("buffer_rows", [None, 300])
def test_shuffle_is_deterministic_and_resumes(tmp_path, hidden, buffer_rows):
    store = write_store(tmp_path, hidden)

    def users(seed, start=0):
        return [batch.users.tolist() for batch in store.batches(64, seed, buffer_rows=buffer_rows, start=start)]

    assert users(3) == users(3)
    assert users(3) != users(4)
    assert users((3, 1)) != users((3, 2))
    for start in (1, 7, 15, 16, 99):
        assert users(3, start) == users(3)[start:]


def test_memory_of_a_shuffle_is_bounded(tmp_path):
    hidden = np.zeros((40_000, 16), np.float32)
    with ActivationStore.create(tmp_path, *hidden.shape) as writer:
        writer.append(hidden, np.zeros(40_000), np.zeros(40_000))
    store = ActivationStore(tmp_path)
    tracemalloc.start()
    try:
        for _ in store.batches(128, 0, buffer_rows=1024):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 1024 * 16 * 4 < hidden.nbytes / 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="mapped pages are counted in /proc")
def test_pages_that_were_read_do_not_stay_with_the_process(tmp_path):
    def mapped():
        return 1024 * int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    hidden = np.zeros((200_000, 64), np.float32)
    with ActivationStore.create(tmp_path, *hidden.shape) as writer:
        writer.append(hidden, np.zeros(200_000), np.zeros(200_000))
    store = ActivationStore(tmp_path)
    passes = (store.mean_std, lambda: sum(1 for _ in store.batches(512)), lambda: sum(1 for _ in store.batches(512, 0)))
    for read in passes:
        before = mapped()
        read()
        assert mapped() - before < hidden.nbytes / 4


def test_incomplete_store_is_refused(tmp_path, hidden):
    def interrupted():
        with ActivationStore.create(tmp_path, 1000, 7) as writer:
            writer.append(hidden, range(1000), range(1000))
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        interrupted()
    with pytest.raises(ValueError, match="incomplete"):
        ActivationStore(tmp_path)
    assert len(write_store(tmp_path, hidden)) == 1000


def test_number_of_rows_must_be_the_announced_one(tmp_path, hidden):
    writer = ActivationStore.create(tmp_path, 1001, 7)
    writer.append(hidden, range(1000), range(1000))
    with pytest.raises(ValueError, match="1001 rows were announced, got 1002"):
        writer.append(hidden[:2], [0, 0], [0, 0])
    with pytest.raises(ValueError, match="1001 rows were announced, only 1000 came"):
        writer.close()
    with pytest.raises(ValueError, match="incomplete"):
        ActivationStore(tmp_path)
    with pytest.raises(ValueError, match="closed"):
        writer.append(hidden[:1], [0], [0])


def test_wrong_shapes_are_refused(tmp_path):
    with ActivationStore.create(tmp_path, 0, 7) as writer:
        with pytest.raises(ValueError, match=r"hidden: expected shape \(m, 7\), got \(2, 6\)"):
            writer.append(np.zeros((2, 6)), [0, 0], [0, 0])
        with pytest.raises(ValueError, match=r"items: expected shape \(2,\), got \(3,\)"):
            writer.append(np.zeros((2, 7)), [0, 0], [0, 0, 0])
    with pytest.raises(ValueError, match="d_model"):
        ActivationStore.create(tmp_path, 0, 0)
    with pytest.raises(ValueError, match="complete"):
        ActivationStore.create(tmp_path, 0, 1, complete=True)


def test_damaged_stores_are_refused(tmp_path, hidden):
    with pytest.raises(FileNotFoundError, match="no activation store"):
        ActivationStore(tmp_path / "nowhere")

    truncated = write_store(tmp_path / "truncated", hidden).path / "hidden.npy"
    truncated.write_bytes(truncated.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"hidden\.npy.*complete"):
        ActivationStore(truncated.parent)

    missing = write_store(tmp_path / "missing", hidden).path / "items.npy"
    missing.unlink()
    with pytest.raises(ValueError, match=r"items\.npy.*missing"):
        ActivationStore(missing.parent)

    meta = write_store(tmp_path / "meta", hidden).path / "meta.json"
    description = json.loads(meta.read_text())
    meta.write_text(json.dumps({**description, "d_model": 8}))
    with pytest.raises(ValueError, match=r"hidden\.npy.*expected float32 of shape \(1000, 8\)"):
        ActivationStore(meta.parent)
    meta.write_text(json.dumps({**description, "version": 9}))
    with pytest.raises(ValueError, match="expected version 1, got 9"):
        ActivationStore(meta.parent)
    meta.write_text("{")
    with pytest.raises(ValueError, match="not valid json"):
        ActivationStore(meta.parent)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 1, "start": -1}])
def test_batches_refuse_arguments_out_of_range(tmp_path, hidden, arguments):
    with pytest.raises(ValueError, match="expected an integer"):
        write_store(tmp_path, hidden).batches(**arguments)
