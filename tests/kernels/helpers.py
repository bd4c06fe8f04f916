"""Truth, tolerances and awkward memory layouts, shared by the kernel tests.

The kernels accumulate in float32 and round once to the output's dtype, whatever the dtype of the inputs: their error
has a bound that can be computed, and the tests hold them to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from cases import Inputs
from torch import Tensor

import saerec_fast as fast
from saerec_fast import reference
from saerec_fast.types import Activation, JumpReLU, ReLU, SparseFeatures, TopK, TopKResult

EPS32 = torch.finfo(torch.float32).eps


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers, so that NaN equals NaN and -0.0 differs from 0.0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    different = bits(actual) != bits(expected)
    assert not different.any(), f"{int(different.sum())} of {different.numel()} elements differ"


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equality of values: NaN equals NaN, -0.0 equals 0.0."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound of the error of rounding float64 ``value`` to ``dtype``."""
    info = torch.finfo(dtype)
    return value.abs() * info.eps / 2 + info.tiny * info.eps


def score_tolerance(inputs: Inputs) -> Tensor:
    """Bound ``(rows, n)`` of the accumulation error of float32 scores: γ_{d+2} Σ|x − b_dec||w| + |b_enc|."""
    x, W_enc, b_enc, b_dec, _ = inputs.to(torch.float64)
    magnitude = (x.abs() + b_dec.abs()) @ W_enc.abs().T + b_enc.abs()
    return (inputs.x.shape[1] + 3) * EPS32 * magnitude + torch.finfo(torch.float32).tiny


def assert_top_k(result: TopKResult, scores: Tensor, tolerance: Tensor, dtype: torch.dtype) -> None:
    """The contract of top-k against float64 ``scores (rows, n)`` with a float32 ``tolerance`` of the same shape."""
    values, indices = result.values.double(), result.indices.long()
    if indices.numel() == 0:
        return
    assert result.values.dtype == dtype
    assert indices.min() >= 0
    assert indices.max() < scores.shape[1]
    ordered = indices.sort(-1).values
    assert (ordered.diff(dim=-1) > 0).all(), "a feature was returned twice"
    assert (values.diff(dim=-1) <= 0).all(), "values do not descend"
    chosen, slack = scores.gather(-1, indices), tolerance.gather(-1, indices)
    assert ((values - chosen).abs() <= slack + rounding(chosen.abs() + slack, dtype)).all(), "a value is off"
    left_out = (scores - tolerance).scatter(-1, indices, float("-inf")).amax(-1)
    assert (left_out <= (chosen + slack).amin(-1)).all(), "a better feature was left out"


def assert_no_worse(actual: Tensor, plain: Tensor, truth: Tensor, factor: float) -> None:
    """The largest error against float64 ``truth`` is at most ``factor`` times that of plain PyTorch."""
    if truth.numel() == 0:
        return
    error, plain_error = (float((t.double() - truth).abs().max()) for t in (actual, plain))
    # Where plain PyTorch happens to be exact, one rounding of the largest value is still fair.
    floor = torch.finfo(actual.dtype).eps * float(truth.abs().max())
    assert error <= factor * plain_error + floor, f"error {error:.3g}, plain PyTorch {plain_error:.3g}"


def truth_scores(inputs: Inputs) -> Tensor:
    x, W_enc, b_enc, b_dec, _ = inputs.to(torch.float64)
    return reference.pre_activations(x, W_enc, b_enc, b_dec)


def decided_rows(inputs: Inputs, activation: Activation) -> Tensor:
    """Rows whose active set no float32 rounding can change; on the others an error can be as large as a feature."""
    scores, slack = truth_scores(inputs), score_tolerance(inputs)
    if isinstance(activation, TopK):
        if activation.k == scores.shape[1]:
            return torch.ones(scores.shape[0], dtype=torch.bool)
        top = scores.topk(activation.k + 1, dim=-1).values
        return top[:, -2] - top[:, -1] > 2 * slack.amax(-1)
    if isinstance(activation, JumpReLU):
        return ((scores - torch.as_tensor(activation.threshold)).abs() > slack).all(-1)
    assert isinstance(activation, ReLU)
    return torch.ones(scores.shape[0], dtype=torch.bool)


def sorted_by_feature(features: SparseFeatures) -> SparseFeatures:
    order = torch.argsort(features.row_ids() * features.n_features + features.indices)
    return features._replace(indices=features.indices[order], values=features.values[order])


def _padded(tensor: Tensor, step: tuple[int, ...]) -> Tensor:
    shape = [size * s for size, s in zip(tensor.shape, step, strict=True)]
    big = torch.full(shape, float("nan"), dtype=tensor.dtype)
    view = big[tuple(slice(None, None, s) for s in step)]
    view.copy_(tensor)
    return view


def _unaligned(tensor: Tensor) -> Tensor:
    storage = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype)
    return storage[1:].view(tensor.shape).copy_(tensor)


# The same values in other memory; gaps hold NaN, so that a read between elements shows.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.T.contiguous().T if t.dim() == 2 else t,
    "strided_rows": lambda t: _padded(t, (2,) + (1,) * (t.dim() - 1)),
    "strided_columns": lambda t: _padded(t, (1,) * (t.dim() - 1) + (3,)),
    "unaligned": _unaligned,
}


def assert_same_features(actual: SparseFeatures, expected: SparseFeatures) -> None:
    """Equality, the expected values (float64) rounded once."""
    assert actual.batch_shape == expected.batch_shape
    assert actual.n_features == expected.n_features
    assert_equal(actual.offsets, expected.offsets)
    assert_equal(actual.indices, expected.indices)
    assert_equal(actual.values, expected.values.to(actual.values.dtype))


def in_layout(inputs: Inputs, layout: str) -> Inputs:
    return Inputs(*map(LAYOUTS[layout], inputs))


def moved(tensor: Tensor, device: str) -> Tensor:
    """On a device in the layout it had: strides, alignment and what lies in the gaps."""
    if tensor.device.type == device or tensor.requires_grad:
        return tensor.to(device)  # gradients come back through it
    storage = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def forward_ops(k: int) -> dict[str, Callable[[Inputs], tuple[Tensor, ...]]]:
    """Every op as a function of the inputs that gives row-aligned tensors (first dimension: rows)."""
    plan = fast.SteeringPlan([fast.Edit(0, "set", 1.5), fast.Edit(0, "scale", 0.5)])
    add = fast.SteeringPlan([fast.Edit(0, "add", 1.5)])
    rebuilt = fast.SteeringPlan([fast.Edit(0, "clamp_min", 0.5)], mode="reconstruct")

    def steered(plan: fast.SteeringPlan, activation: Activation) -> Callable[[Inputs], tuple[Tensor, ...]]:
        return lambda t: (fast.steer(*t, activation, plan, backend="cpu"),)

    def encode_threshold(t: Inputs) -> tuple[Tensor, ...]:
        features = fast.encode_threshold(*t[:4], 0.3, backend="cpu")
        return features.dense(), features.offsets.diff()

    def encode_decode(t: Inputs) -> tuple[Tensor, ...]:
        features = fast.encode_topk(*t[:4], k=k, backend="cpu")
        decoded = fast.decode_sparse(features, t.W_dec, t.b_dec, backend="cpu")
        return features.values.view(-1, k), features.indices.view(-1, k), decoded

    return {
        "linear_topk": lambda t: tuple(fast.linear_topk(*t[:3], k=k, backend="cpu")),
        "encode_decode": encode_decode,
        "encode_threshold": encode_threshold,
        "steer_delta_relu": steered(plan, fast.ReLU()),
        "steer_delta_topk": steered(plan, fast.TopK(k)),
        "steer_delta_add": steered(add, fast.TopK(k)),
        "steer_reconstruct_topk": steered(rebuilt, fast.TopK(k)),
        "steer_reconstruct_jumprelu": steered(rebuilt, fast.JumpReLU(0.3)),
    }
