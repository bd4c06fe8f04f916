from __future__ import annotations

import pytest
import torch
from cases import DTYPES, KERNEL_CASES, Case, make_inputs
from helpers import EPS32, LAYOUTS, assert_equal, assert_no_worse, rounding, torch_threads
from hypothesis import given
from hypothesis import strategies as st

import saerec_fast as fast
from saerec_fast import reference

pytestmark = pytest.mark.usefixtures("isa")


def random_features(
    rows: int,
    n: int,
    most: int,
    dtype: torch.dtype = torch.float32,
    *,
    index_dtype: torch.dtype = torch.int32,
    seed: int = 0,
) -> fast.SparseFeatures:
    """Ragged rows of up to ``most`` features, the first row empty."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, min(most, n) + 1, (rows,), generator=generator)
    counts[:1] = 0
    indices = [torch.randperm(n, generator=generator)[:count] for count in counts.tolist()]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    values = torch.randn(int(counts.sum()), generator=generator).to(dtype)
    flat = torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64)
    return fast.SparseFeatures(offsets, flat.to(index_dtype), values, n, (rows,))


def check(features: fast.SparseFeatures, W_dec: torch.Tensor, b_dec: torch.Tensor | None) -> torch.Tensor:
    """Decode, and hold the result to the error bound of a float32 sum and to twice the error of plain PyTorch."""
    out = fast.decode_sparse(features, W_dec, b_dec, backend="cpu")
    exact = features._replace(values=features.values.double())
    bias = None if b_dec is None else b_dec.double()
    truth = reference.decode_sparse(exact, W_dec.double(), bias)
    sizes = exact._replace(values=exact.values.abs())
    magnitude = reference.decode_sparse(sizes, W_dec.double().abs(), None if bias is None else bias.abs())
    most = int(features.offsets.diff().max()) if features.n_rows else 0
    assert out.dtype == W_dec.dtype
    bound = (most + 2) * EPS32 * magnitude
    assert ((out - truth).abs() <= bound + rounding(truth.abs() + bound, out.dtype)).all()
    assert_no_worse(out, reference.decode_sparse(features, W_dec, b_dec), truth, factor=2)
    return out


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_decode(case: Case) -> None:
    inputs = make_inputs(case)
    check(random_features(case.rows, case.n, case.k, case.dtype), inputs.W_dec, inputs.b_dec)
    features = random_features(case.rows, case.n, case.k, case.dtype, index_dtype=torch.int64)
    check(features, inputs.W_dec, None)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tail(d: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(d, 19, 5, 4, dtype))
    check(random_features(4, 19, 5, dtype), inputs.W_dec, inputs.b_dec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout: str, dtype: torch.dtype) -> None:
    inputs, move = make_inputs(Case(37, 65, 15, 11, dtype)), LAYOUTS[layout]
    features = random_features(11, 65, 15, dtype)
    moved = features._replace(
        values=move(features.values), indices=move(features.indices.float()).int(), offsets=features.offsets
    )
    out = check(moved, move(inputs.W_dec), move(inputs.b_dec))
    plain = check(features, inputs.W_dec, inputs.b_dec)
    # Columns that are not contiguous are summed without fused multiply-adds.
    torch.testing.assert_close(out, plain, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_strided_indices_and_expanded_values() -> None:
    indices = torch.tensor([[3, 99], [0, 99], [7, 99], [3, 99]], dtype=torch.int32)[:, 0]
    offsets = torch.tensor([[0, 9], [2, 9], [2, 9], [4, 9]])[:, 0]
    features = fast.SparseFeatures(offsets, indices, torch.tensor([2.0]).expand(4), 8, (3,))
    W_dec = torch.arange(8.0)[:, None].expand(8, 5)
    out = fast.decode_sparse(features, W_dec, None, backend="cpu")
    assert out.tolist() == [[6.0] * 5, [0.0] * 5, [20.0] * 5]


@st.composite
def problems(draw):
    rows, n, d = draw(st.integers(0, 8)), draw(st.integers(1, 20)), draw(st.integers(1, 40))
    seed, dtype = draw(st.integers(0, 10**6)), draw(st.sampled_from(DTYPES))
    features = random_features(rows, n, draw(st.integers(0, n)), dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    features = features._replace(values=integers(*features.values.shape))
    if features.values.numel():
        for value in draw(st.lists(st.sampled_from([float("nan"), float("inf")]), max_size=1)):
            features.values[draw(st.integers(0, features.values.numel() - 1))] = value
    return features, integers(n, d), integers(d) if draw(st.booleans()) else None


@given(problems())
def test_any_integers_equal_the_reference(problem) -> None:
    features, W_dec, b_dec = problem
    out = fast.decode_sparse(features, W_dec, b_dec, backend="cpu")
    exact = features._replace(values=features.values.double())
    truth = reference.decode_sparse(exact, W_dec.double(), None if b_dec is None else b_dec.double())
    assert_equal(out, truth.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_as_pytorch_does(dtype: torch.dtype) -> None:
    # A product of two halves is exact in float32: what comes out shows every case of the conversion on the way back,
    # halfway between two numbers, subnormal, overflowing and NaN included.
    generator = torch.Generator().manual_seed(0)
    bits, integer = (32, torch.int32) if dtype == torch.float32 else (16, torch.int16)
    patterns = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (600,), generator=generator).to(integer)
    values = torch.cat([patterns.view(dtype), torch.linspace(-3, 3, 97).to(dtype)])
    factors = torch.cat([values[100:357], torch.tensor([1.0, 0.5, 2.0**-8, 3.0]).to(dtype)])
    rows = len(values)
    features = fast.SparseFeatures(torch.arange(rows + 1), torch.zeros(rows, dtype=torch.int32), values, 1, (rows,))
    out = fast.decode_sparse(features, factors[None], None, backend="cpu")
    assert_equal(out, (values.float()[:, None] * factors.float()).to(dtype))


def test_features_of_value_zero_and_unused_rows_of_the_dictionary_do_not_matter() -> None:
    W_dec = torch.full((6, 20), float("nan"))
    W_dec[2] = torch.arange(20.0)
    features = fast.SparseFeatures(torch.tensor([0, 1, 1]), torch.tensor([2]), torch.tensor([2.0]), 6, (2,))
    out = fast.decode_sparse(features, W_dec, None, backend="cpu")
    assert out.tolist() == [[2.0 * i for i in range(20)], [0.0] * 20]


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 0, 3)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape).numel()
    features = random_features(rows, 9, 4)._replace(batch_shape=shape)
    inputs = make_inputs(Case(6, 9, 4, rows))
    assert check(features, inputs.W_dec, inputs.b_dec).shape == (*shape, 6)


def test_threads_do_not_change_bits() -> None:
    features, inputs = random_features(1000, 300, 40), make_inputs(Case(65, 300, 40, 1))
    results = []
    for threads in (1, 2, 3, 5):
        with torch_threads(threads):
            results.append(fast.decode_sparse(features, inputs.W_dec, inputs.b_dec, backend="cpu"))
    assert all(torch.equal(result, results[0]) for result in results)
