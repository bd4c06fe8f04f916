from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saerec_fast.data import Split
from saerec_fast.files import read_json
from saerec_fast.recommender import (
    EpochRecord,
    PopularityRecommender,
    RecommenderConfig,
    SequenceRecommender,
    TransformerScorer,
    evaluate,
    item_popularity,
    train_recommender,
)
from saerec_fast.recommender.training import (
    _TiedCrossEntropy,
    next_item_ndcg,
    schedule,
    spectral_item_embeddings,
    tied_cross_entropy,
    training_batches,
    training_windows,
    window_tokens,
)

SETTINGS: dict[str, Any] = {"epochs": 4, "batch_size": 16, "learning_rate": 5e-3, "progress": False}


class Interrupted(Exception):
    pass


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_windows_predict_every_item_but_the_first_exactly_once(lengths: list[int], max_length: int, seed: int) -> None:
    offsets = np.cumsum([0, *lengths])
    starts, stops = training_windows(offsets, max_length, np.random.default_rng(seed))
    predicted = [position for a, b in zip(starts, stops, strict=True) for position in range(a + 1, b)]
    expected = [position for a, b in pairwise(offsets) for position in range(a + 1, b)]
    assert sorted(predicted) == expected
    assert all(2 <= b - a <= max_length + 1 for a, b in zip(starts, stops, strict=True))
    # A sequence that fits is never cut.
    assert len(starts) >= sum(length >= 2 for length in lengths)
    if max(lengths) <= max_length + 1:
        assert len(starts) == sum(length >= 2 for length in lengths)


def test_batches_hold_every_window_once_and_differ_between_epochs() -> None:
    offsets = np.array([0, 30, 33, 60])
    epochs = []
    for seed in (0, 1):
        batches = list(training_batches(offsets, 5, 4, np.random.default_rng(seed)))
        assert all(len(starts) <= 4 for starts, _ in batches)
        starts, stops = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        assert sorted(position for a, b in zip(starts, stops, strict=True) for position in range(a + 1, b)) == [
            *range(1, 30),
            *range(31, 33),
            *range(34, 60),
        ]
        epochs.append(starts.tolist())
    assert epochs[0] != epochs[1]


def test_window_tokens_shift_by_one_and_pad_on_the_right() -> None:
    inputs, targets = window_tokens(np.arange(10, 20), np.array([0, 7]), np.array([4, 9]))
    assert inputs.tolist() == [[11, 12, 13], [18, 0, 0]]
    assert targets.tolist() == [[12, 13, 14], [19, 0, 0]]


@pytest.mark.parametrize("block_values", [1, 20, 1 << 20])
def test_cross_entropy_equals_the_dense_one(monkeypatch: pytest.MonkeyPatch, block_values: int) -> None:
    monkeypatch.setattr(_TiedCrossEntropy, "BLOCK_VALUES", block_values)
    monkeypatch.setattr(_TiedCrossEntropy, "MIN_ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (9,), generator=generator)
    dense = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    expected = torch.autograd.grad(3 * dense, (hidden, weight))
    loss = tied_cross_entropy(hidden, weight, targets)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, dense)
    torch.testing.assert_close(got, expected)


def test_next_item_ndcg_equals_leaving_out_each_item_of_the_last_window(
    model: SequenceRecommender, split: Split
) -> None:
    per_user = []
    for user in range(split.validation.n_users):
        history = split.validation.sequence(user)
        start = max(0, len(history) - model.config.max_length - 1)
        gains = []
        for end in range(start + 1, len(history)):
            tokens = torch.as_tensor(history[start:end].astype(np.int64))[None] + 1
            scores = model.scores(model(tokens)[0, -1]).detach()
            scores[torch.as_tensor(history[:end].astype(np.int64))] = -math.inf
            ranking = scores.sort(descending=True, stable=True).indices.tolist()
            rank = ranking.index(int(history[end])) + 1
            gains.append(1 / math.log2(1 + rank) if rank <= 10 else 0)
        per_user.append(np.mean(gains))
    assert next_item_ndcg(model, split.validation, batch_size=3) == pytest.approx(np.mean(per_user), rel=1e-6)


def test_spectral_embeddings_span_the_leading_directions(split: Split) -> None:
    data = split.train
    table = np.zeros((data.n_users, data.n_items))
    table[np.repeat(np.arange(data.n_users), np.diff(data.offsets)), data.items] = 1
    table /= np.sqrt(table.sum(1, keepdims=True) * table.sum(0))
    _, singular, right = np.linalg.svd(table, full_matrices=False)
    expected = right[1:9].T * np.sqrt(singular[1:9])
    expected /= np.sqrt(np.mean(expected**2))
    got = spectral_item_embeddings(data, 8, seed=2)
    assert got.dtype == torch.float32
    # Signs are free; inner products are not.
    np.testing.assert_allclose(
        (got @ got.T).numpy(), expected @ expected.T, atol=1e-2 * np.abs(expected @ expected.T).max()
    )
    assert torch.equal(got, spectral_item_embeddings(data, 8, seed=2))


def test_spectral_embeddings_fill_up_what_the_data_do_not_give(split: Split) -> None:
    few = split.train.select_users(np.arange(3))
    coordinates = spectral_item_embeddings(few, 8)
    assert coordinates.isfinite().all()
    assert torch.linalg.matrix_rank(coordinates) == 8


def test_schedule_rises_then_falls_to_zero() -> None:
    values = [schedule(share, 0.1) for share in np.linspace(0, 1, 50)]
    peak = int(np.argmax(values))
    assert 3 <= peak <= 6
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert 0 < values[0] < 0.05
    assert math.isclose(values[-1], 0, abs_tol=1e-12)
    assert schedule(0.0, 0.0) == 1


def test_training_learns_more_than_popularity(split: Split, config: RecommenderConfig, tmp_path: Path) -> None:
    random_state = torch.get_rng_state()
    model = train_recommender(split, config, tmp_path, **{**SETTINGS, "epochs": 12, "learning_rate": 1e-2})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training
    popularity = item_popularity(split.train)
    learned, popular = (
        evaluate(recommend, split.test, popularity=popularity, targets_per_user=5).ndcg.mean()
        for recommend in (TransformerScorer(model), PopularityRecommender(split.train))
    )
    assert learned > 1.1 * popular
    log = read_json(tmp_path / "training.json")
    assert log["epochs"][-1]["loss"] < log["epochs"][0]["loss"]
    assert log["settings"]["config"]["n_items"] == split.train.n_items
    best = max(log["epochs"], key=lambda record: record["validation_ndcg"])
    assert log["best_epoch"] == best["epoch"]
    assert next_item_ndcg(model, split.validation) == pytest.approx(best["validation_ndcg"], abs=1e-9)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    split: Split, config: RecommenderConfig, tmp_path: Path, stop_after: int
) -> None:
    whole = train_recommender(split, config, tmp_path / "whole", **SETTINGS)

    def interrupt(record: EpochRecord) -> None:
        if record.epoch == stop_after:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_recommender(split, config, tmp_path / "parts", **SETTINGS, on_epoch=interrupt)
    assert len(read_json(tmp_path / "parts" / "training.json")["epochs"]) == stop_after
    torch.rand(7)  # the global random state must not matter
    resumed = train_recommender(split, config, tmp_path / "parts", **SETTINGS)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    logs = [read_json(tmp_path / run / "training.json") for run in ("whole", "parts")]
    for log in logs:
        for record in log["epochs"]:
            del record["seconds"]
    assert logs[0] == logs[1]
    last = [(tmp_path / run / "checkpoint-4.safetensors").read_bytes() for run in ("whole", "parts")]
    assert last[0] == last[1]


def test_a_finished_run_is_loaded_without_training(split: Split, config: RecommenderConfig, tmp_path: Path) -> None:
    first = train_recommender(split, config, tmp_path, **{**SETTINGS, "epochs": 1})

    def unexpected(record: EpochRecord) -> None:
        raise AssertionError(record)

    second = train_recommender(split, config, tmp_path, **{**SETTINGS, "epochs": 1}, on_epoch=unexpected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert len(list(tmp_path.glob("checkpoint-*.safetensors"))) == 1


def test_training_stops_after_patience_and_keeps_the_best_epoch(
    split: Split, config: RecommenderConfig, tmp_path: Path
) -> None:
    # A learning rate of nearly zero: no epoch can beat the first by more than noise for long.
    train_recommender(split, config, tmp_path, **{**SETTINGS, "epochs": 30, "learning_rate": 1e-9}, patience=2)
    log = read_json(tmp_path / "training.json")
    assert len(log["epochs"]) < 30
    assert len(log["epochs"]) == log["best_epoch"] + 2


def test_a_folder_of_another_run_is_refused_unless_overwritten(
    split: Split, config: RecommenderConfig, tmp_path: Path
) -> None:
    short = {**SETTINGS, "epochs": 1}
    train_recommender(split, config, tmp_path, **short)
    with pytest.raises(ValueError, match="other seed"):
        train_recommender(split, config, tmp_path, **short, seed=1)
    train_recommender(split, config, tmp_path, **short, seed=1, resume=False)
    assert read_json(tmp_path / "training.json")["settings"]["seed"] == 1


def test_a_damaged_checkpoint_is_named(split: Split, config: RecommenderConfig, tmp_path: Path) -> None:
    short = {**SETTINGS, "epochs": 1}
    train_recommender(split, config, tmp_path, **short)
    tensors = tmp_path / "checkpoint-1.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint-1\.safetensors"):
        train_recommender(split, config, tmp_path, **short)
    for text in ("{", json.dumps({"settings": {}}), "[]"):
        (tmp_path / "checkpoint.json").write_text(text)
        with pytest.raises(ValueError, match=r"checkpoint\.json"):
            train_recommender(split, config, tmp_path, **short)


def test_wrong_arguments_are_named(split: Split, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_items"):
        train_recommender(split, RecommenderConfig(n_items=3), tmp_path, **SETTINGS)
    right = RecommenderConfig(n_items=split.train.n_items)
    with pytest.raises(ValueError, match="item_init"):
        train_recommender(split, right, tmp_path, **SETTINGS, item_init="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epochs"):
        train_recommender(split, right, tmp_path, **{**SETTINGS, "epochs": 0})


def test_the_progress_bar_shows_loss_and_ndcg(
    split: Split, config: RecommenderConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train_recommender(split, config, tmp_path, **{**SETTINGS, "epochs": 1, "progress": True})
    assert isinstance(model, SequenceRecommender)
    assert "NDCG@10" in " ".join(capsys.readouterr().out.split())
