"""The selection and compaction that the steer kernels use, run thread by thread on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

INF, NAN = np.inf, np.nan
SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 129, 255, 256, 257, 1000, 2048, 5000]


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Flags of the k best: descending, NaN above all, smallest index first."""
    order = np.lexsort((np.arange(len(scores)), -scores, ~np.isnan(scores)))
    flags = np.zeros(len(scores), dtype=np.uint8)
    flags[order[:k]] = 1
    return flags


@pytest.mark.parametrize("kind", ["normal", "ties", "one value", "wide", "awkward", "close"])
@pytest.mark.parametrize("n", SIZES)
def test_selects_the_k_best(emulated, n: int, kind: str) -> None:
    generator = np.random.default_rng(n)
    normal = generator.standard_normal(n).astype(np.float32)
    scores = {
        "normal": normal,
        "ties": np.round(normal * 2) / 2,
        "one value": np.full(n, -1.5, dtype=np.float32),
        "wide": (normal * 10.0 ** generator.integers(-40, 38, n)).astype(np.float32),
        "awkward": generator.choice(np.array([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 1.0], np.float32), n),
        # Only the last bits differ, so that all three histograms decide.
        "close": np.float32(1.0) + generator.integers(0, 50, n).astype(np.float32) * np.float32(2**-23),
    }[kind].astype(np.float32)
    for k in sorted({k for k in (1, 2, 15, 16, 17, 129, 511, 512, n - 1, n) if 1 <= k <= n}):
        emulated.emulation.seed = k
        flags, values = emulated.emulation.select(scores, k)
        np.testing.assert_array_equal(flags, best(scores, k), err_msg=f"k = {k}")
        np.testing.assert_array_equal(values, scores)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 511, 512, 3000])
def test_compaction_keeps_the_order(emulated, count: int) -> None:
    generator = np.random.default_rng(count)
    begin = 7
    for share in (0.0, 0.02, 0.5, 1.0):
        flags = generator.random(begin + count + 9) < share
        emulated.emulation.seed += 1
        placed = emulated.emulation.compact(flags, begin, begin + count)
        np.testing.assert_array_equal(placed, begin + np.flatnonzero(flags[begin : begin + count]))
