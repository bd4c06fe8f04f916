import numpy as np
import pytest

from saerec_fast.data import common_attributes, synthetic_dataset


@pytest.fixture(scope="module")
def data():
    return synthetic_dataset(1500, 300, 8, seed=1)


def test_sizes_names_and_times(data):
    assert (data.n_users, data.n_items) == (1500, 300)
    assert data.item_table.titles[12] == "Item 12"
    assert data.item_table.attribute_names[0] == "attribute 0"
    counts = data.item_table.attributes.sum(axis=1)
    assert counts.min() == 1
    assert counts.max() <= 3
    assert data.lengths.min() >= 1
    assert len(common_attributes(data)) == 8
    assert len(set(data.user_ids.tolist())) == 1500
    assert abs(np.corrcoef(np.arange(1500), data.lengths)[0, 1]) < 0.1


def test_nobody_meets_an_item_twice(data):
    for user in range(data.n_users):
        assert len(set(data.sequence(user).tolist())) == data.lengths[user]


def test_seeds():
    assert synthetic_dataset(50, 40, 4, 3).fingerprint() == synthetic_dataset(50, 40, 4, 3).fingerprint()
    assert synthetic_dataset(50, 40, 4, 3).fingerprint() != synthetic_dataset(50, 40, 4, 4).fingerprint()


def test_a_seed_of_the_catalogue_gives_other_users_of_the_same_items():
    first, second = (synthetic_dataset(400, 60, 4, seed, catalogue_seed=7) for seed in (3, 4))
    np.testing.assert_array_equal(first.item_table.attributes, second.item_table.attributes)
    counts = [np.bincount(data.items, minlength=60) for data in (first, second)]
    assert np.corrcoef(*counts)[0, 1] > 0.8
    assert first.sequence(0).tolist() != second.sequence(0).tolist()
    other = synthetic_dataset(400, 60, 4, 3, catalogue_seed=8)
    assert (other.item_table.attributes != first.item_table.attributes).any()


def test_popularity_is_skewed(data):
    counts = np.sort(np.bincount(data.items, minlength=300))[::-1]
    assert counts[:30].sum() > 3 * counts[-30:].sum()


def test_tastes_show_and_drift(data):
    """A user's neighbouring items share attributes more often than the user's distant ones, and those than chance."""
    attributes = data.item_table.attributes

    def share(first, second):
        return (attributes[first] & attributes[second]).any(axis=1).mean()

    near, far = [], []
    for user in np.flatnonzero(data.lengths > 40):
        sequence = data.sequence(user)
        near.append(share(sequence[:-2], sequence[2:]))
        far.append(share(sequence[:-30], sequence[30:]))
    shuffled = np.random.default_rng(0).permutation(data.items)
    chance = share(data.items, shuffled)
    assert np.mean(near) > np.mean(far) + 0.03
    assert np.mean(far) > chance + 0.02


def test_order_matters(data):
    """The likeliest successor of an item follows it far more often than the likeliest item follows anything."""
    inner = np.ones(data.n_interactions, bool)
    inner[data.offsets[1:] - 1] = False
    before = np.flatnonzero(inner)
    pairs = np.zeros((300, 300))
    np.add.at(pairs, (data.items[before], data.items[before + 1]), 1)
    assert pairs.max(axis=1).sum() / pairs.sum() > 3 * pairs.sum(axis=0).max() / pairs.sum()


def test_tiny():
    assert synthetic_dataset(1, 1, 1).items.tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 2), "n_users"),
        ((5, 0, 2), "n_items"),
        ((5, 5, 0), "n_attributes"),
        ((5, 2, 3), "every attribute needs an item"),
    ],
)
def test_unsound_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_dataset(*arguments)


@pytest.mark.parametrize(
    "arguments", [{"mean_length": 4}, {"popularity_exponent": -1}, {"drift": 1.5}, {"sequel_probability": float("nan")}]
)
def test_unsound_settings(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        synthetic_dataset(5, 5, 2, **arguments)
