"""Other readings of hidden states than an SAE's, to measure its features beside: linear maps fitted on stored rows.

Principal components, and the whitening that the others start from, come from sums over the whole store, in bounded
memory; independent components and probes are fitted by scikit-learn on a sample of rows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saerec_fast.sae import ActivationStore

FloatArray = NDArray[np.float64]

_READ_ROWS = 16384
# Directions with less than this share of the largest variance are rounding: a layer norm leaves one such.
_NO_VARIANCE = 1e-9


@dataclass(frozen=True)
class LinearMap:
    """``x weightᵀ + offset``, of hidden rows x.

    Attributes:
        weight: float64 ``(m, d)``.
        offset: float64 ``(m,)``.
        logistic: whether the logistic function follows, as in a probe that gives probabilities.
    """

    weight: FloatArray
    offset: FloatArray
    logistic: bool = False

    @property
    def n_outputs(self) -> int:
        return len(self.weight)

    def __call__(self, hidden: ArrayLike) -> NDArray[np.float32]:
        """``(rows, d)`` to float32 ``(rows, m)``; computed in float64."""
        result = np.asarray(hidden, dtype=np.float64) @ self.weight.T + self.offset
        if self.logistic:
            # By tanh, which does not overflow.
            result = 0.5 * (1 + np.tanh(0.5 * result))
        return result.astype(np.float32)

    def then(self, weight: FloatArray, offset: FloatArray | float = 0.0, *, logistic: bool = False) -> LinearMap:
        """This map followed by another, ``weight (p, m)`` and ``offset (p,)``, as one."""
        return LinearMap(weight @ self.weight, weight @ self.offset + offset, logistic)


@dataclass(frozen=True)
class PrincipalComponents:
    """The axes of largest variance.

    Attributes:
        directions: the map to centred coordinates along orthonormal axes, by falling variance; of the two signs of an
            axis, the one whose largest entry is positive.
        variances: float64 ``(d,)``, unbiased.
    """

    directions: LinearMap
    variances: FloatArray

    def whitening(self) -> LinearMap:
        """The map to uncorrelated coordinates of variance 1; axes without variance are left out."""
        kept = self.variances > _NO_VARIANCE * self.variances[0]
        scale = 1 / np.sqrt(self.variances[kept])
        return LinearMap(
            self.directions.weight[kept] * scale[:, None],
            self.directions.offset[kept] * scale,
            self.directions.logistic,
        )


def principal_components(store: ActivationStore) -> PrincipalComponents:
    """Principal components of all rows of a store, from its covariance in float64; memory ``d²``.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(store) < 2:
        raise ValueError(f"store: expected at least 2 rows, got {len(store)}")
    mean = store.column_mean()
    scatter = np.zeros((store.d_model, store.d_model))
    for batch in store.batches(_READ_ROWS):
        centred = batch.hidden.double().numpy() - mean
        scatter += centred.T @ centred
    variances, axes = np.linalg.eigh(scatter / (len(store) - 1))
    variances, axes = np.maximum(variances[::-1], 0), axes.T[::-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], axis=1)
    axes = axes * np.where(largest < 0, -1.0, 1.0)
    return PrincipalComponents(LinearMap(axes, -axes @ mean), variances)


def independent_components(
    store: ActivationStore, whitening: LinearMap, *, rows: int = 50_000, iterations: int = 400, seed: int = 0
) -> tuple[LinearMap, bool]:
    """Independent components by FastICA (Hyvärinen & Oja 2000; scikit-learn's, with its default contrast log cosh).

    Args:
        store: hidden rows.
        whitening: of the store.
        rows: sample to fit on.
        iterations: at most.
        seed: of the sample and of the start.

    Returns:
        The map, and whether it converged.
    """
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    sample = whitening(store.hidden[sample_rows(len(store), rows, seed)]).astype(np.float64)
    ica = FastICA(whiten=False, max_iter=iterations, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caller is told
        ica.fit(sample)
    return whitening.then(ica.components_), bool(ica.n_iter_ < iterations)


def random_directions(n_directions: int, mean: ArrayLike, *, seed: int = 0) -> LinearMap:
    """Unit vectors drawn uniformly from the sphere, of rows centred at ``mean (d,)``."""
    centre = np.asarray(mean, dtype=np.float64)
    weight = np.random.default_rng(seed).normal(size=(n_directions, len(centre)))
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    return LinearMap(weight, -weight @ centre)


def linear_probe(
    store: ActivationStore, whitening: LinearMap, attributes: ArrayLike, *, rows: int = 200_000, seed: int = 0
) -> LinearMap:
    """A logistic regression per attribute: the probability that the row's item has it.

    Logistic rather than ridge regression, because its output is, as far as the model holds, P(attribute | x), which no
    function of x exceeds in correlation with the attribute; ridge scores are not bounded and lose to features that
    are silent on most rows. Its penalty (scikit-learn's default, on whitened rows) is small beside thousands of rows.

    Args:
        store: hidden rows, with the item of each.
        whitening: of the store; makes the fit fast.
        attributes: bool ``(n_items, A)``.
        rows: sample to fit on.
        seed: of the sample.

    Returns:
        A map to A probabilities; constant for an attribute that no row or every row of the sample has.
    """
    from sklearn.linear_model import LogisticRegression

    chosen = sample_rows(len(store), rows, seed)
    sample = whitening(store.hidden[chosen]).astype(np.float64)
    labels = np.asarray(attributes, dtype=np.bool_)[store.items[chosen]]
    weight, offset = np.zeros((labels.shape[1], sample.shape[1])), np.zeros(labels.shape[1])
    for column, label in enumerate(labels.T):
        if label.all() or not label.any():
            continue
        fitted = LogisticRegression(max_iter=1000).fit(sample, label)
        weight[column], offset[column] = fitted.coef_[0], fitted.intercept_[0]
    return whitening.then(weight, offset, logistic=True)


def sample_rows(n_rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """``count`` of ``n_rows`` row numbers in rising order, all of them where there are no more."""
    if n_rows <= count:
        return np.arange(n_rows)
    chosen: NDArray[np.int64] = np.random.default_rng(seed).choice(n_rows, count, replace=False, shuffle=False)
    return np.sort(chosen)
