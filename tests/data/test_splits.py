import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saerec_fast.data import Dataset, ItemTable, Split, cross_validation_splits, split_users, synthetic_dataset


def dataset(sequences, first_times=None, n_items=None):
    n_items = n_items or 1 + max(item for sequence in sequences for item in sequence)
    lengths = [len(sequence) for sequence in sequences]
    timestamps = None
    if first_times is not None:
        timestamps = np.concatenate(
            [first + np.arange(length) for first, length in zip(first_times, lengths, strict=True)]
        )
    ids = np.array([f"i{item}" for item in range(n_items)])
    attributes = np.arange(n_items)[:, None] % 2 == np.arange(2)
    return Dataset(
        "made",
        np.array([f"u{user}" for user in range(len(sequences))]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.array([item for sequence in sequences for item in sequence]),
        timestamps,
        ItemTable(ids, [f"Item {item}" for item in range(n_items)], ["even", "odd"], attributes),
    )


def raw(part):
    """Sequences by raw user id, of raw item ids."""
    return {str(part.user_ids[user]): part.item_table.ids[part.sequence(user)].tolist() for user in range(part.n_users)}


@st.composite
def datasets(draw):
    n_users = draw(st.integers(8, 40))
    n_items = draw(st.integers(3, 12))
    sequences = draw(st.lists(st.lists(st.integers(0, n_items - 1), max_size=8), min_size=n_users, max_size=n_users))
    if not any(sequences):
        sequences[0] = [0]
    times = draw(st.one_of(st.none(), st.lists(st.integers(0, 50), min_size=n_users, max_size=n_users)))
    return dataset(sequences, times, n_items)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(datasets(), st.integers(1, 4), st.integers(0, 5))
def test_properties(data, min_item_count, seed):
    shares = {"test_share": 0.2, "sae_share": 0.25, "validation_share": 0.1}
    try:
        split = split_users(data, min_item_count=min_item_count, seed=seed, **shares)
    except ValueError as error:
        if "too small" in str(error) or "cannot be split" in str(error):
            return
        raise
    users = [str(user) for part in split.parts.values() for user in part.user_ids]
    assert len(users) == len(set(users))
    seen = set(split.train.items.tolist())
    assert seen == set(range(split.n_items))
    counts = np.bincount(data.items, minlength=data.n_items)
    by_id = {str(identifier): int(count) for identifier, count in zip(data.item_table.ids, counts, strict=True)}
    kept = set(split.train.item_table.ids.tolist())
    assert all(by_id[item] >= min_item_count for item in kept)
    original = raw(data)
    for part in split.parts.values():
        assert part.item_table is split.train.item_table
        assert part.n_users >= 1
        assert part.lengths.min() >= 2
        for user, sequence in raw(part).items():
            assert sequence == [item for item in original[user] if item in kept]
    # The table's columns moved along with the ids.
    table, source = split.train.item_table, data.item_table
    position = {str(identifier): index for index, identifier in enumerate(source.ids)}
    rows = [position[str(identifier)] for identifier in table.ids]
    assert rows == sorted(rows)
    assert table.titles == [source.titles[row] for row in rows]
    assert (table.attributes == source.attributes[rows]).all()


def test_test_users_are_the_newest_by_their_first_event():
    generator = np.random.default_rng(0)
    first = generator.permutation(100) * 1000
    data = dataset([[0, 1, 2]] * 100, first)
    split = split_users(data)
    newest = {f"u{user}" for user in np.argsort(first)[-15:]}
    assert set(split.test.user_ids.tolist()) == newest
    assert {name: part.n_users for name, part in split.parts.items()} == {
        "train": 60,
        "validation": 5,
        "train_sae": 20,
        "test": 15,
    }
    assert split.notes == []
    assert (split.test.timestamps == data.timestamps.reshape(100, 3)[np.sort(np.argsort(first)[-15:])].ravel()).all()


def test_the_first_event_counts_even_if_its_item_is_dropped():
    # User 0 came first, with an item that nobody else has.
    data = dataset([[3, 0, 1]] + [[0, 1, 2]] * 19, [0, *range(1, 20)])
    late = data.timestamps.copy()
    late[1:3] = 1000
    data = Dataset("made", data.user_ids, data.offsets, data.items, late, data.item_table)
    assert "u0" not in split_users(data).test.user_ids.tolist()


def test_without_timestamps_a_seeded_random_share_tests_and_a_note_says_so():
    data = dataset([[0, 1, 2]] * 60)
    split = split_users(data, seed=1)
    assert "no timestamps" in split.notes[0]
    assert split.test.timestamps is None
    assert raw(split.test) == raw(split_users(data, seed=1).test)
    assert raw(split.test) != raw(split_users(data, seed=2).test)
    assert raw(split.test).keys() != {f"u{user}" for user in range(51, 60)}


def test_notes_count_what_was_dropped():
    # Item 3 is rare, user 0 is left with one item; item 4 is frequent, but only the newest user has it.
    data = dataset([[0, 3], *[[0, 1, 2]] * 30, [0, 1, 4, 4, 4, 4, 4]], range(32))
    split = split_users(data, seed=3)
    assert split.notes[0] == "Dropped 1 item with fewer than 5 interactions (1 interaction)."
    assert split.notes[1] == "Dropped 1 user with fewer than 2 items."
    assert split.notes[2] == "Dropped 1 item that no training user has (5 interactions)."
    assert split.n_items == 3
    assert raw(split.test)["u31"] == ["i0", "i1"]


def test_users_who_lose_their_items_to_training_are_dropped():
    data = dataset([*[[0, 1, 2]] * 30, [0, 4, 4, 4, 4, 4]], range(31))
    split = split_users(data)
    assert "u31" not in split.test.user_ids.tolist()
    assert split.notes[-1] == "Dropped 1 user of test with fewer than 2 items known from training."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_share": 0.0}, "test_share must lie between 0 and 1"),
        ({"sae_share": 1.0}, "sae_share must lie between 0 and 1"),
        ({"validation_share": float("nan")}, "validation_share must lie"),
        ({"test_share": 0.5, "sae_share": 0.4, "validation_share": 0.1}, "sum to less than 1"),
        ({"min_item_count": 0}, "min_item_count must be at least 1"),
        ({"min_item_count": 1000}, "0 users with at least 2 items cannot be split"),
    ],
)
def test_unsound_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_users(dataset([[0, 1, 2]] * 20, range(20)), **arguments)


def test_save_and_load(tmp_path):
    split = split_users(synthetic_dataset(80, 30, 3), min_item_count=10)
    split.save(tmp_path / "split")
    back = Split.load(tmp_path / "split")
    assert back.notes == split.notes
    for name, part in split.parts.items():
        assert back.parts[name].fingerprint() == part.fingerprint()
        assert back.parts[name].item_table is back.train.item_table


def test_load_notices_parts_of_another_split(tmp_path):
    data = synthetic_dataset(80, 30, 3)
    with pytest.raises(FileNotFoundError, match="no saved split"):
        Split.load(tmp_path)
    split_users(data, seed=0).save(tmp_path)
    split_users(data, seed=1).train.save(tmp_path / "train")
    with pytest.raises(ValueError, match="train belongs to another split"):
        Split.load(tmp_path)
    (tmp_path / "split.json").write_text('{"format": "saerec-fast split", "version": 99}')
    with pytest.raises(ValueError, match="version 99"):
        Split.load(tmp_path)


def test_parts_must_share_the_table():
    split = split_users(synthetic_dataset(80, 30, 3))
    with pytest.raises(ValueError, match="share one item table"):
        Split(split.train, split.validation, split.train_sae, synthetic_dataset(80, 30, 3), [])


@pytest.mark.parametrize("n_folds", [2, 3, 5])
def test_every_user_is_held_out_once(n_folds):
    data = synthetic_dataset(60, 30, 2, seed=3, mean_length=15)
    splits = list(cross_validation_splits(data, n_folds=n_folds, validation_share=0.1, seed=1))
    assert len(splits) == n_folds
    held_out = [user for split in splits for user in split.test.user_ids]
    assert sorted(held_out) == sorted(data.user_ids)
    for split in splits:
        parts = [raw(part) for part in (split.train, split.validation, split.test)]
        assert sum(map(len, parts)) == data.n_users
        assert len({user for part in parts for user in part}) == data.n_users
        assert split.train_sae.n_users == 0
        assert split.validation.n_users == round(0.1 * (data.n_users - split.test.n_users))
        assert len(np.unique(split.train.items)) == split.n_items


def test_folds_follow_the_seed_and_drop_what_training_does_not_have():
    data = dataset([[0, 1, 2], [0, 1, 3], [0, 1], [1, 0], [0, 1], [1, 0]])
    first, again, other = (list(cross_validation_splits(data, n_folds=3, seed=seed)) for seed in (0, 0, 1))
    assert [raw(split.test) for split in first] == [raw(split.test) for split in again]
    assert [raw(split.test) for split in first] != [raw(split.test) for split in other]
    assert any("no training user has" in note for split in first for note in split.notes)
    for split in first:
        assert set(np.unique(split.train.items)) == set(range(split.n_items))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n_folds": 1}, "n_folds"), ({"validation_share": 0}, "validation_share"), ({"n_folds": 7}, "6 users")],
)
def test_unsound_folds(arguments, message):
    with pytest.raises(ValueError, match=message):
        cross_validation_splits(dataset([[0, 1]] * 6), **arguments)
