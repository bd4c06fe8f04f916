from dataclasses import replace

import numpy as np
import pytest

from saerec_fast.data import Dataset, ItemTable, attribute_shares, common_attributes, describe
from saerec_fast.data.dataset import ARRAYS_FILE, DESCRIPTION_FILE, user_chunks


def table(n_items=4):
    attributes = np.zeros((n_items, 2), bool)
    attributes[:2, 0] = True
    attributes[1, 1] = True
    return ItemTable(
        np.array([f"i{i}" for i in range(n_items)]), [f"T {i}" for i in range(n_items)], ["A", "B"], attributes
    )


def dataset(**changes):
    arguments = {
        "name": "small",
        "user_ids": np.array(["u", "v", "w"]),
        "offsets": np.array([0, 3, 3, 5]),
        "items": np.array([0, 1, 1, 3, 2]),
        "timestamps": np.array([10, 10, 20, 5, 6]),
        "item_table": table(),
    }
    return Dataset(**{**arguments, **changes})


def test_contract_of_the_arrays():
    data = dataset()
    assert (data.n_users, data.n_items, data.n_interactions) == (3, 4, 5)
    assert data.offsets.dtype == np.int64
    assert data.items.dtype == np.int32
    assert data.timestamps.dtype == np.int64
    assert data.user_ids.dtype.kind == "U"
    assert data.sequence(0).tolist() == [0, 1, 1]
    assert data.sequence(1).tolist() == []
    assert data.sequence(2).tolist() == [3, 2]
    assert data.lengths.tolist() == [3, 0, 2]
    for user in (-1, 3):
        with pytest.raises(IndexError, match=r"not in 0\.\.2"):
            data.sequence(user)


def test_object_ids_become_unicode():
    data = dataset(user_ids=np.array(["u", "vv", "w"], dtype=object))
    assert data.user_ids.dtype == np.dtype("<U2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": np.array([0, 3, 5])}, "offsets of length 4"),
        ({"offsets": np.array([0, 4, 3, 5])}, "rise from 0"),
        ({"offsets": np.array([0, 3, 3, 4])}, "end at 4"),
        ({"offsets": np.array([1, 3, 3, 5])}, "start at 1"),
        ({"items": np.array([0, 1, 1, 4, 2])}, r"0\.\.3, got 0\.\.4"),
        ({"items": np.array([0, 1, 1, -1, 2])}, r"got -1\.\.2"),
        ({"items": np.array([0.0, 1, 1, 3, 2])}, "items as a one-dimensional array of integers"),
        ({"items": np.array([0, 1, 1, 2**40, 2])}, "do not fit int32"),
        ({"timestamps": np.array([10, 10, 20])}, "one timestamp per interaction"),
        ({"timestamps": np.array([10, 9, 20, 5, 6])}, "timestamps of user 'u'"),
        ({"timestamps": np.array([10, 10, 20, 7, 6])}, "timestamps of user 'w'"),
        ({"user_ids": np.array([1, 2, 3])}, "user ids as a one-dimensional array of strings"),
        ({"user_ids": np.array(["a", 2, "b"], dtype=object)}, "user ids to be strings"),
    ],
)
def test_unsound_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titles": ["a"]}, "one title per item"),
        ({"ids": np.array(["a", "b", "a", "c"])}, "'a' appears more than once"),
        ({"attribute_names": ["A", "A"]}, "attribute names appear more than once"),
        ({"attribute_names": ["A"]}, r"bool \(4, 1\)"),
        ({"attributes": np.zeros((4, 2), int)}, "int64"),
    ],
)
def test_unsound_tables(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(table(), **changes)


def test_select_users_keeps_the_order_given_and_the_table():
    data = dataset()
    chosen = data.select_users(np.array([2, 1, 0, 2]))
    assert chosen.user_ids.tolist() == ["w", "v", "u", "w"]
    assert [chosen.sequence(user).tolist() for user in range(4)] == [[3, 2], [], [0, 1, 1], [3, 2]]
    assert chosen.timestamps.tolist() == [5, 6, 10, 10, 20, 5, 6]
    assert chosen.item_table is data.item_table
    nobody = data.select_users(np.zeros(0, np.int64))
    assert nobody.n_users == nobody.n_interactions == 0
    assert data.select_users([]).n_users == 0


def test_select_users_refuses_masks_and_strangers():
    with pytest.raises(ValueError, match="integers"):
        dataset().select_users(np.array([True, False, True]))
    with pytest.raises(ValueError, match=r"0\.\.2"):
        dataset().select_users(np.array([3]))


def test_describe():
    facts = describe(dataset())
    assert facts["density"] == 4 / 12  # u met item 1 twice
    assert facts["sequence_length"]["median"] == 2
    assert facts["sequence_length"]["max"] == 3
    assert facts["items_without_attributes"] == 2
    assert facts["attributes"] == [
        {"name": "A", "item_share": 0.5, "interaction_share": 0.6},
        {"name": "B", "item_share": 0.25, "interaction_share": 0.4},
    ]
    assert facts["first_time"] == "1970-01-01T00:00:05+00:00"
    assert describe(dataset(timestamps=None))["last_time"] is None


def test_describe_of_nothing():
    empty = Dataset(
        "none", np.array([]), np.zeros(1, np.int64), np.zeros(0, np.int32), None,
        ItemTable(np.array([]), [], [], np.zeros((0, 0), bool)),
    )  # fmt: skip
    facts = describe(empty)
    assert facts["density"] is None
    assert facts["sequence_length"]["mean"] is None


def test_common_attributes():
    data = dataset()
    assert attribute_shares(data).tolist() == [0.6, 0.4]
    assert common_attributes(data).tolist() == [0, 1]
    assert common_attributes(data, 0.5).tolist() == [0]
    with pytest.raises(ValueError, match="min_share"):
        common_attributes(data, 1.5)


def test_chunks_cover_every_user_once():
    offsets = np.array([0, 3, 3, 20, 21, 22, 22])
    for size in (1, 2, 5, 100):
        chunks = user_chunks(offsets, size)
        assert [user for start, stop in chunks for user in range(start, stop)] == list(range(6))


@pytest.mark.parametrize("timestamps", [np.array([10, 10, 20, 5, 6]), None])
def test_save_and_load(tmp_path, timestamps):
    data = dataset(timestamps=timestamps, user_ids=np.array(["u", "é,\t\n", "名前"]))
    data.save(tmp_path / "a" / "b")
    back = Dataset.load(tmp_path / "a" / "b")
    assert back.fingerprint() == data.fingerprint()
    assert back.name == data.name
    assert back.user_ids.tolist() == data.user_ids.tolist()
    assert back.items.tolist() == data.items.tolist()
    assert (back.timestamps is None) == (timestamps is None)
    assert back.item_table.titles == data.item_table.titles
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted([DESCRIPTION_FILE, ARRAYS_FILE])


def test_fingerprint_tells_data_apart_but_not_names():
    data = dataset()
    assert replace(data, name="other").fingerprint() == data.fingerprint()
    assert replace(data, timestamps=None).fingerprint() != data.fingerprint()
    assert dataset(user_ids=np.array(["u", "v", "x"])).fingerprint() != data.fingerprint()


def test_load_notices_damage(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved dataset"):
        Dataset.load(tmp_path)
    data = dataset()
    data.save(tmp_path)
    whole = (tmp_path / ARRAYS_FILE).read_bytes()
    (tmp_path / ARRAYS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=ARRAYS_FILE):
        Dataset.load(tmp_path)
    replace(data, timestamps=None).save(tmp_path / "other")
    (tmp_path / ARRAYS_FILE).write_bytes((tmp_path / "other" / ARRAYS_FILE).read_bytes())
    with pytest.raises(ValueError, match="another save"):
        Dataset.load(tmp_path)
    (tmp_path / DESCRIPTION_FILE).write_text("{}")
    with pytest.raises(ValueError, match="not the description"):
        Dataset.load(tmp_path)
