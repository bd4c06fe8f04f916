"""Linear readings of hidden states against scikit-learn, and on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from saerec_fast.interpret import FeatureStatistics, representations
from saerec_fast.interpret.representations import (
    LinearMap,
    independent_components,
    linear_probe,
    principal_components,
    random_directions,
    sample_rows,
)
from saerec_fast.sae import ActivationStore

D_MODEL = 6


def write_store(path, hidden, items=None):
    with ActivationStore.create(path, *hidden.shape) as writer:
        writer.append(hidden, np.zeros(len(hidden)), np.zeros(len(hidden)) if items is None else items)
    return ActivationStore(path)


def correlated_rows(rows=500, seed=0):
    random = np.random.default_rng(seed)
    return (random.normal(size=(rows, D_MODEL)) @ random.normal(size=(D_MODEL, D_MODEL)) + 40).astype(np.float32)


def test_principal_components_are_those_of_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(representations, "_READ_ROWS", 64)
    hidden = correlated_rows()
    found = principal_components(write_store(tmp_path, hidden))
    expected = PCA(svd_solver="full").fit(hidden.astype(np.float64))
    np.testing.assert_allclose(found.variances, expected.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(found.directions.weight, expected.components_, atol=1e-9)
    np.testing.assert_allclose(found.directions(hidden), expected.transform(hidden), atol=1e-4)


def test_whitening_leaves_out_what_does_not_vary(tmp_path):
    hidden = correlated_rows()
    hidden -= hidden.mean(1, keepdims=True)
    white = principal_components(write_store(tmp_path, hidden)).whitening()
    assert white.n_outputs == D_MODEL - 1
    np.testing.assert_allclose(np.cov(white(hidden).T), np.eye(D_MODEL - 1), atol=1e-4)


def test_independent_components_find_mixed_sources(tmp_path):
    random = np.random.default_rng(1)
    sources = random.laplace(size=(4000, D_MODEL))
    hidden = (sources @ random.normal(size=(D_MODEL, D_MODEL)) + 3).astype(np.float32)
    store = write_store(tmp_path, hidden)
    components = principal_components(store)
    found, converged = independent_components(store, components.whitening(), rows=3000)
    assert converged

    def recovered(linear):
        return np.abs(np.corrcoef(linear(hidden).T, sources.T)[:D_MODEL, D_MODEL:]).max(0).min()

    assert recovered(found) > 0.98
    assert recovered(components.directions) < 0.9


def test_independent_components_that_did_not_converge_say_so(tmp_path):
    store = write_store(tmp_path, correlated_rows())
    whitening = principal_components(store).whitening()
    found, converged = independent_components(store, whitening, iterations=1)
    assert not converged
    assert found.weight.shape == (D_MODEL, D_MODEL)


def test_random_directions_are_unit_and_seeded():
    mean = np.arange(D_MODEL)
    found = random_directions(300, mean, seed=4)
    np.testing.assert_allclose(np.linalg.norm(found.weight, axis=1), 1)
    np.testing.assert_allclose(found(mean[None]), 0, atol=1e-6)
    np.testing.assert_array_equal(found.weight, random_directions(300, mean, seed=4).weight)
    assert np.abs(found.weight.mean(0)).max() < 0.1


@pytest.fixture
def distributed(tmp_path):
    """Items whose first attribute is spread over all dimensions, so that no single one tells it."""
    random = np.random.default_rng(2)
    vectors = random.normal(size=(400, D_MODEL))
    attributes = np.stack([vectors.sum(1) + 0.3 * random.normal(size=400) > 2, np.zeros(400, dtype=bool)], axis=1)
    items = random.integers(0, 400, 4000)
    hidden = (vectors[items] * 3 + 10 + 0.1 * random.normal(size=(4000, D_MODEL))).astype(np.float32)
    return write_store(tmp_path, hidden[:2000], items[:2000]), attributes, hidden[2000:], items[2000:]


def test_the_probe_beats_single_dimensions_where_it_must(distributed):
    store, attributes, hidden, items = distributed
    probe = linear_probe(store, principal_components(store).whitening(), attributes)
    scores = probe(hidden)
    assert ((scores >= 0) & (scores <= 1)).all()
    label = attributes[items, 0]
    raw = FeatureStatistics(D_MODEL, attributes, ["spread", "never"], signed=False)
    raw.update_dense(hidden, items, np.zeros(len(items)))
    result = raw.result()
    assert pearsonr(scores[:, 0], label).statistic > result.strength()[:, 0].max() + 0.3
    assert roc_auc_score(label, scores[:, 0]) > 0.97 > result.strength("roc_auc")[:, 0].max() + 0.1
    # Probabilities, and not only an order: as many are promised as there are.
    assert scores[:, 0].mean() == pytest.approx(label.mean(), abs=0.02)


def test_an_attribute_that_no_row_has_gets_a_constant_probe(distributed):
    store, attributes, hidden, _ = distributed
    scores = linear_probe(store, principal_components(store).whitening(), attributes, rows=500)(hidden)
    assert np.ptp(scores[:, 1]) == 0
    assert np.ptp(scores[:, 0]) > 0.9


def test_maps_compose_and_the_logistic_function_does_not_overflow():
    random = np.random.default_rng(3)
    first = LinearMap(random.normal(size=(4, 3)), random.normal(size=4))
    weight, offset = random.normal(size=(2, 4)), random.normal(size=2)
    x = random.normal(size=(5, 3))
    by_hand = (x @ first.weight.T + first.offset) @ weight.T + offset
    np.testing.assert_allclose(first.then(weight, offset)(x), by_hand, rtol=1e-5)
    np.testing.assert_allclose(first.then(weight, offset, logistic=True)(x), expit(by_hand), rtol=1e-5)
    far = LinearMap(np.eye(1), np.zeros(1), logistic=True)(np.array([[-1e6], [1e6]]))
    np.testing.assert_array_equal(far, [[0], [1]])


def test_samples_are_rising_and_whole_where_small():
    np.testing.assert_array_equal(sample_rows(5, 9, 0), np.arange(5))
    chosen = sample_rows(1000, 100, 0)
    assert len(np.unique(chosen)) == 100
    assert (np.diff(chosen) > 0).all()
    assert not np.array_equal(chosen, sample_rows(1000, 100, 1))


def test_one_row_has_no_components(tmp_path):
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        principal_components(write_store(tmp_path, correlated_rows(1)))
