"""Matching of dictionaries that are known to be alike, and of those that are not."""

from __future__ import annotations

import numpy as np
import pytest

from saerec_fast.interpret.stability import match_directions, match_random

N, D = 40, 12


@pytest.fixture
def dictionary():
    return np.random.default_rng(0).normal(size=(N, D))


def test_a_permuted_and_scaled_dictionary_is_found_again(dictionary):
    random = np.random.default_rng(1)
    order = random.permutation(N)
    found = match_directions(dictionary, dictionary[order] * random.uniform(0.1, 9, size=(N, 1)))
    np.testing.assert_array_equal(order[found.partner], np.arange(N))
    np.testing.assert_array_equal(found.nearest, found.partner)
    np.testing.assert_allclose(found.cosine, 1)


def test_perturbation_lowers_the_cosine_of_what_is_matched(dictionary):
    random = np.random.default_rng(2)
    order = random.permutation(N)
    noise = random.normal(size=(N, D))
    near = match_directions(dictionary, (dictionary + 0.1 * noise)[order])
    far = match_directions(dictionary, (dictionary + noise)[order])
    np.testing.assert_array_equal(order[near.partner], np.arange(N))
    assert far.cosine.mean() < near.cosine.mean() < 1


def test_a_mirrored_direction_is_no_match(dictionary):
    mirrored = dictionary.copy()
    mirrored[7] *= -1
    found = match_directions(dictionary, mirrored)
    others = np.arange(N) != 7
    np.testing.assert_allclose(found.nearest_cosine[others], 1)
    assert found.nearest[7] != 7
    assert found.nearest_cosine[7] < 0.95
    assert found.partner[7] != 7


def test_one_to_one_shares_no_partner_where_the_nearest_do():
    first = np.array([[1.0, 0.0], [1.0, 0.1]])
    second = np.array([[1.0, 0.05], [0.0, 1.0]])
    found = match_directions(first, second)
    assert found.nearest.tolist() == [0, 0]
    assert found.partner.tolist() == [0, 1]
    assert (found.nearest_cosine >= found.cosine).all()


def test_the_sum_of_cosines_is_the_largest():
    """Taking the best pair first would leave a bad one."""
    found = match_directions(np.array([[1.0, 0.0], [0.8, 0.6]]), np.array([[0.9, 0.44], [0.1, -1.0]]))
    assert found.partner.tolist() == [1, 0]


def test_a_smaller_dictionary_leaves_some_alone(dictionary):
    found = match_directions(dictionary, dictionary[:5])
    assert (found.partner >= 0).sum() == 5
    np.testing.assert_array_equal(np.isnan(found.cosine), found.partner < 0)
    assert np.isfinite(found.nearest_cosine).all()
    assert (match_directions(dictionary[:5], dictionary).partner >= 0).all()


def test_random_directions_match_worse_and_the_same_each_time(dictionary):
    found = match_random(dictionary, N, seed=3)
    assert found.cosine.mean() < 0.8
    np.testing.assert_array_equal(found.cosine, match_random(dictionary, N, seed=3).cosine)
    assert not np.array_equal(found.cosine, match_random(dictionary, N, seed=4).cosine)


def test_errors(dictionary):
    with pytest.raises(ValueError, match="one width, got 12 and 11"):
        match_directions(dictionary, dictionary[:, :11])
    with pytest.raises(ValueError, match="second: expected directions, got 1 rows of zeros"):
        match_directions(dictionary, np.zeros((1, D)))
    with pytest.raises(ValueError, match=r"first: expected shape \(n, d\)"):
        match_directions(np.zeros((0, D)), dictionary)
