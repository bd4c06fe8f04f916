from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from saerec_fast.interpret.examples import TopExamples
from saerec_fast.types import SparseFeatures


def to_features(dense):
    matrix = sparse.csr_matrix(dense)
    return SparseFeatures(
        torch.from_numpy(matrix.indptr.astype(np.int64)),
        torch.from_numpy(matrix.indices.astype(np.int32)),
        torch.from_numpy(matrix.data.astype(np.float32)),
        dense.shape[1],
        (dense.shape[0],),
    )


def expected(column, items, users, count):
    """By sorting everything: best row per item, then value, then item index."""
    best = {}
    for value, item, user in zip(column, items, users, strict=True):
        if value > 0 and (item not in best or value > best[item][0]):
            best[item] = (value, user)
    ranked = sorted(best.items(), key=lambda pair: (-pair[1][0], pair[0]))[:count]
    return [(pytest.approx(value), item, user) for item, (value, user) in ranked]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 60),
    count=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    dense_path=st.booleans(),
    direction=st.sampled_from([1, -1]),
)
def test_equals_sorting_everything(seed, rows, count, cuts, dense_path, direction):
    random = np.random.default_rng(seed)
    dense = np.round(random.normal(size=(rows, 3)), 1).astype(np.float32)
    items, users = random.integers(0, 12, rows), random.integers(0, 5, rows)
    top = TopExamples(3, count, direction=direction)
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        if dense_path:
            top.update_dense(torch.from_numpy(dense[part]), items[part], users[part])
        else:
            top.update(to_features(dense[part]), items[part], users[part])
    for feature in range(3):
        found = [(one.value * direction, one.item, one.user) for one in top.examples(feature)]
        assert found == expected(dense[:, feature] * direction, items, users, count)


def test_titles_and_attributes():
    top = TopExamples(2, 3)
    top.update_dense(np.array([[1.0, 0.0], [3.0, 0.0]], dtype=np.float32), [0, 1], [7, 8])
    found = top.examples(
        0,
        titles=["Alien", "Psycho"],
        attributes=[[True, False], [True, True]],
        attribute_names=["Horror", "Thriller"],
    )
    assert [(one.title, one.attributes, one.user) for one in found] == [
        ("Psycho", ("Horror", "Thriller"), 8),
        ("Alien", ("Horror",), 7),
    ]
    assert top.examples(1) == []
    assert top.examples(0)[0].title == "1"


def test_errors():
    with pytest.raises(ValueError, match="direction"):
        TopExamples(2, 3, direction=0)
    with pytest.raises(ValueError, match="at least 1"):
        TopExamples(2, 0)
    top = TopExamples(2, 3)
    with pytest.raises(ValueError, match="1 rows"):
        top.update_dense(np.zeros((1, 2)), [0, 1], [0])
    with pytest.raises(ValueError, match="2 features"):
        top.update(to_features(np.zeros((1, 3))), [0], [0])
