"""A baseline of ``make gpu``: the design OpenAI published with "Scaling and evaluating sparse autoencoders".

Gao et al., arXiv 2406.04093, and the repository openai/sparse_autoencoder, which no package index has.

Written anew from the published description; none of its code is here. What the design is:

* encoder: a dense product that stores all scores, then ``torch.topk``; kernels begin after it.
* decoder: a program a row, which goes through the row's entries and adds up whole rows of ``W_dec``.
* gradient of the activations: a program a row, one dot product with a row of ``W_dec`` an entry.
* gradients of both weight matrices: the entries of the batch sorted by feature; each program takes 128 of them in this
  order, sums while the feature stays the same and adds what it has to the output, with atomics, when it changes.
* gradients of the biases: summed by feature first, and multiplied with ``W_enc`` after that for ``b_dec``.

Accumulators are float32. Entries whose activation is zero are skipped. Weight gradients are added up in float32 and
converted at the end, since not every chip and Triton adds 16-bit numbers atomically; sums of atomics have no fixed
order. Left out is what serves training alone: dead-feature losses, sharding over several devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from cases import Inputs
from torch import Tensor, nn
from torch.nn import functional as F
from ways import Step

# Entries that one program of the sorted sum goes through.
SORTED_ENTRIES = 128


@triton.jit
def decode_kernel(indices, values, weight, out, k, d, BLOCK_D: tl.constexpr):
    """``out[r] = Σ_j values[r, j] · weight[indices[r, j]]``; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for j in range(k):
        value = tl.load(values + row * k + j).to(tl.float32)
        if value != 0:
            feature = tl.load(indices + row * k + j)
            total += value * tl.load(weight + feature * d + columns, mask=columns < d, other=0.0).to(tl.float32)
    tl.store(out + row * d + columns, total.to(out.dtype.element_ty), mask=columns < d)


@triton.jit
def sampled_kernel(rows, weight, indices, out, k, d, BLOCK_D: tl.constexpr):
    """``out[r, j] = <rows[r], weight[indices[r, j]]>``; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    left = tl.load(rows + row * d + columns, mask=columns < d, other=0.0).to(tl.float32)
    for j in range(k):
        feature = tl.load(indices + row * k + j)
        right = tl.load(weight + feature * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        tl.store(out + row * k + j, tl.sum(left * right).to(out.dtype.element_ty))


@triton.jit
def sorted_sum_kernel(features, sources, values, rows, out, entries, d, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr):
    """``out[feature] += value · rows[source]`` over entries sorted by feature; ENTRIES of them a program."""
    begin = tl.program_id(0).to(tl.int64) * ENTRIES
    end = tl.minimum(begin + ENTRIES, entries)
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    current = tl.load(features + begin)
    for entry in range(begin, end):
        feature = tl.load(features + entry)
        if feature != current:
            tl.atomic_add(out + current * d + columns, total, mask=columns < d)
            total = tl.zeros([BLOCK_D], tl.float32)
            current = feature
        value = tl.load(values + entry).to(tl.float32)
        if value != 0:
            source = tl.load(sources + entry)
            total += value * tl.load(rows + source * d + columns, mask=columns < d, other=0.0).to(tl.float32)
    tl.atomic_add(out + current * d + columns, total, mask=columns < d)


def decode(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """``(R, d)`` from indices (int64) and values ``(R, k)`` and a contiguous weight ``(n, d)``."""
    (rows, k), d = indices.shape, weight.shape[1]
    out = torch.empty(rows, d, dtype=weight.dtype, device=weight.device)
    decode_kernel[(rows,)](indices, values, weight, out, k, d, BLOCK_D=triton.next_power_of_2(d))
    return out


def sampled_product(rows: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """The entries ``(R, k)`` of ``rows @ weight.T`` at ``indices``."""
    k, d = indices.shape[1], weight.shape[1]
    out = torch.empty(indices.shape, dtype=rows.dtype, device=rows.device)
    sampled_kernel[(rows.shape[0],)](rows, weight, indices, out, k, d, BLOCK_D=triton.next_power_of_2(d))
    return out


def transposed_product(indices: Tensor, values: Tensor, rows: Tensor, n: int) -> Tensor:
    """``(n, d)``: the transpose of the sparse ``(R, n)`` with ``values`` at ``indices``, times ``rows (R, d)``."""
    entries, k, d = indices.numel(), indices.shape[1], rows.shape[1]
    features, order = indices.reshape(-1).sort()
    sources, sorted_values = order // k, values.reshape(-1)[order]
    out = torch.zeros(n, d, dtype=torch.float32, device=rows.device)
    sorted_sum_kernel[(triton.cdiv(entries, SORTED_ENTRIES),)](
        *(features, sources, sorted_values, rows, out, entries, d),
        ENTRIES=SORTED_ENTRIES,
        BLOCK_D=triton.next_power_of_2(d),
    )
    return out.to(rows.dtype)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
        centred = x - b_dec
        values, indices = F.linear(centred, W_enc, b_enc).topk(k)
        ctx.save_for_backward(centred, W_enc, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        centred, W_enc, indices = ctx.saved_tensors
        sums = torch.zeros(W_enc.shape[0], dtype=torch.float32, device=grad.device)
        sums.scatter_add_(0, indices.reshape(-1), grad.reshape(-1).float())
        grad_W_enc = transposed_product(indices, grad.contiguous(), centred, W_enc.shape[0])
        sums = sums.to(W_enc.dtype)
        return None, grad_W_enc, sums, -(sums @ W_enc), None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(indices, values, W_dec)
        return decode(indices, values, W_dec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        indices, values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        return None, sampled_product(grad, W_dec, indices), transposed_product(indices, values, grad, W_dec.shape[0])


def reconstruct(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, W_dec: Tensor, k: int) -> Tensor:
    """Decoded hidden states ``(R, d)`` in the dtype of ``x``; differentiable in all weights, not in ``x``."""
    values, indices = _Encode.apply(x, W_enc, b_enc, b_dec, k)
    return _Decode.apply(indices, values.relu(), W_dec) + b_dec


def forward(weights: Inputs, k: int) -> Callable[[Tensor], Tensor]:
    _, W_enc, b_enc, b_dec, W_dec = weights
    return lambda x: reconstruct(x, W_enc, b_enc, b_dec, W_dec, k)


def step(weights: Inputs, k: int) -> Step:
    parameters = [nn.Parameter(tensor.clone()) for tensor in weights[1:]]
    W_enc, b_enc, b_dec, W_dec = parameters

    def compute(x: Tensor) -> Tensor:
        loss = (reconstruct(x, W_enc, b_enc, b_dec, W_dec, k) - x).square().sum(-1).mean()
        loss.backward()
        return loss.detach()

    return Step(compute, parameters)
