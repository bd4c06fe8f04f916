from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saerec_fast.data import Split
from saerec_fast.recommender import SequenceRecommender, collect, hidden_of, iterate_hidden, site_module
from saerec_fast.recommender.collect import inference_windows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 9))
def test_windows_cover_every_item_once_in_order_and_end_with_a_full_one(lengths: list[int], max_length: int) -> None:
    offsets = np.cumsum([0, *lengths])
    starts, stops, users = inference_windows(offsets, max_length)
    assert [position for a, b in zip(starts, stops, strict=True) for position in range(a, b)] == list(
        range(offsets[-1])
    )
    for user, length in enumerate(lengths):
        mine = users == user
        if length:
            assert stops[mine][-1] == offsets[user + 1]
            assert (stops - starts)[mine][-1] == min(length, max_length)


@pytest.mark.parametrize("site", ["embedding", "mlp.0", "block.0", "block.1", "last"])
def test_rows_equal_a_direct_forward_and_carry_user_and_item(
    model: SequenceRecommender, split: Split, tmp_path: Path, site: str
) -> None:
    data = split.train_sae
    store = collect(model, data, site, tmp_path / "store", batch_size=5, progress=False)
    assert store.hidden.shape == (data.n_interactions, model.config.d_model)
    assert store.meta == {"site": site, "dataset": data.name}
    np.testing.assert_array_equal(store.items, data.items)
    np.testing.assert_array_equal(store.users, np.repeat(np.arange(data.n_users), np.diff(data.offsets)))

    captured: list[torch.Tensor] = []
    handle = site_module(model, site).register_forward_hook(
        lambda _module, _inputs, output: captured.append(hidden_of(output))
    )
    length = model.config.max_length
    for user in range(data.n_users):
        newest = data.sequence(user)[-length:].astype(np.int64)
        with torch.inference_mode():
            model(torch.as_tensor(newest)[None] + 1)
        rows = store.hidden[data.offsets[user + 1] - len(newest) : data.offsets[user + 1]]
        np.testing.assert_allclose(rows, captured[-1][0].numpy(), rtol=1e-5, atol=1e-5)
    handle.remove()


def test_iterating_gives_the_same_rows_and_leaves_the_model_as_it_was(
    model: SequenceRecommender, split: Split, tmp_path: Path
) -> None:
    model.train()
    store = collect(model, split.test, "block.0", tmp_path / "store", progress=False)
    batches = list(iterate_hidden(model, split.test, "block.0", batch_size=3))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    hidden, users, items = (torch.cat(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_allclose(hidden.numpy(), store.hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(users.numpy(), store.users)
    np.testing.assert_array_equal(items.numpy(), store.items)
    assert users.dtype == items.dtype == torch.int64


def test_an_error_in_the_forward_pass_leaves_no_hook(model: SequenceRecommender, split: Split) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    handle = model.transformer.ln_f.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        next(iterate_hidden(model, split.test, "block.0"))
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_site_is_refused_before_anything_is_written(
    model: SequenceRecommender, split: Split, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="site: unknown"):
        collect(model, split.test, "block.9", tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match="site: unknown"):
        iterate_hidden(model, split.test, "block.9")


def test_no_interactions_are_refused(model: SequenceRecommender, split: Split, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no interactions"):
        collect(model, split.test.select_users(np.zeros(0, np.int64)), "last", tmp_path, progress=False)
