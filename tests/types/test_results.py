from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from saerec_fast.types import SparseFeatures


def example(values: Tensor | None = None, index_type: torch.dtype = torch.int32) -> tuple[SparseFeatures, Tensor]:
    """Rows (2, 2): descending values with a zero, an empty row, unsorted columns, a NaN."""
    if values is None:
        values = torch.tensor([3.0, 1.0, 0.0, 2.0, 5.0, float("nan")])
    indices = torch.tensor([4, 0, 2, 3, 1, 0], dtype=index_type)
    dense = torch.zeros(4, 5, dtype=values.dtype)
    for row, column, value in zip([0, 0, 0, 2, 2, 3], indices.tolist(), values.detach(), strict=True):
        dense[row, column] = value
    offsets = torch.tensor([0, 3, 3, 5, 6])
    return SparseFeatures(offsets, indices, values, 5, (2, 2)), dense.reshape(2, 2, 5)


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense(dtype: torch.dtype, index_type: torch.dtype) -> None:
    features, expected = example(torch.tensor([3.0, 1.0, 0.0, 2.0, 5.0, -1.5], dtype=dtype), index_type)
    assert features.n_rows == 4
    assert features.row_ids().tolist() == [0, 0, 0, 2, 2, 3]
    assert features.row_ids().dtype == torch.int64
    dense = features.dense()
    assert dense.dtype == dtype
    assert torch.equal(dense, expected)


def test_dense_keeps_nan() -> None:
    features, expected = example()
    torch.testing.assert_close(features.dense(), expected, rtol=0, atol=0, equal_nan=True)


def test_dense_is_differentiable() -> None:
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: example(v)[0].dense(), values)


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_to_sparse_csr(index_type: torch.dtype) -> None:
    features, expected = example(index_type=index_type)
    csr = features.to_sparse_csr()
    assert csr.layout == torch.sparse_csr
    assert csr.shape == (4, 5)
    assert csr.crow_indices().tolist() == [0, 2, 2, 4, 5]  # the zero is not stored
    assert csr.col_indices().tolist() == [0, 4, 1, 3, 0]
    torch.testing.assert_close(csr.to_dense(), expected.reshape(4, 5), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("batch_shape", [(0,), (3, 0), (2,), ()])
def test_no_entries(batch_shape: tuple[int, ...]) -> None:
    n_rows = torch.Size(batch_shape).numel()
    empty = torch.empty(0)
    features = SparseFeatures(torch.zeros(n_rows + 1, dtype=torch.int64), empty.int(), empty, 5, batch_shape)
    assert features.n_rows == n_rows
    assert features.row_ids().shape == (0,)
    assert torch.equal(features.dense(), torch.zeros(*batch_shape, 5))
    csr = features.to_sparse_csr()
    assert csr.shape == (n_rows, 5)
    assert csr.crow_indices().tolist() == [0] * (n_rows + 1)
    assert csr.values().shape == (0,)


def test_csr_does_not_warn() -> None:
    """In a process of its own, since torch gives the warning once per process."""
    program = (
        "import torch\n"
        "from saerec_fast.types import SparseFeatures\n"
        "offsets = torch.tensor([0, 1])\n"
        "SparseFeatures(offsets, offsets[:1].int(), torch.ones(1), 3, (1,)).to_sparse_csr()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)
