"""The ops as PyTorch operators: kernels, fake kernels, autograd.

``torch.ops.saerec_fast.*`` run the C++ kernels, ``torch.ops.saerec_fast_triton.*`` the Triton ones, and
``torch.ops.saerec_fast_cuda.*`` the CUDA C++ kernel for ``steer`` and the Triton ones besides: a set of operators for
each backend, since two backends may take tensors of one device, and a backward pass must stay on the backend of its
forward pass.

Everything here works on flat hidden states ``(R, d)`` and trusts its arguments; callers use :mod:`saerec_fast.api`.
``Library.define`` / ``impl`` with an ``autograd.Function`` under the Autograd key costs a third of what
``custom_op`` does per call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd.function import once_differentiable

from saerec_fast import reference
from saerec_fast.backend import available_backends
from saerec_fast.types.plan import OPS

# The namespace of each backend's operators.
NAMESPACES = {"cpu": "saerec_fast", "triton": "saerec_fast_triton", "cuda": "saerec_fast_cuda"}

_SCHEMAS = {
    "linear_topk": "(Tensor x, Tensor weight, Tensor? bias, int k, Tensor? exclude_offsets, Tensor? exclude_ids,"
    " Tensor? packed=None) -> (Tensor, Tensor)",
    "encode_topk": "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, int k, Tensor? packed=None)"
    " -> (Tensor, Tensor)",
    "encode_threshold": "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor threshold,"
    " Tensor? packed=None, SymInt? capacity=None) -> (Tensor, Tensor, Tensor)",
    "encode_features": "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor threshold, Tensor features)"
    " -> Tensor",
    "reconstruct": "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor W_dec, Tensor? threshold, int k,"
    " Tensor? packed=None) -> Tensor",
    "decode_sparse": "(Tensor offsets, Tensor indices, Tensor values, Tensor W_dec, Tensor? b_dec) -> Tensor",
    "sparse_dot": "(Tensor offsets, Tensor indices, Tensor rows, Tensor weight) -> Tensor",
    "sparse_weight_gradient": "(Tensor offsets, Tensor indices, Tensor coefficients, Tensor rows, Tensor? shift,"
    " SymInt n) -> (Tensor, Tensor)",
    "sparse_training_step": "(Tensor x, Tensor offsets, Tensor indices, Tensor values, Tensor W_enc, Tensor W_dec,"
    " Tensor? b_dec, float scale, float penalty) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "largest_entries": "(Tensor offsets, Tensor values, int count) -> (Tensor, Tensor)",
    "steer": "(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor W_dec, Tensor? threshold, int k,"
    " bool reconstruct, int[] features, int[] ops, Tensor values, Tensor? mask,"
    " Tensor? packed=None) -> Tensor",
}


# Only for the CPU kernels: weights of normalised hidden states, as they are in an autoencoder. What is made of them is
# kept between calls.
_STEER_NORMALIZED = (
    "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, Tensor W_dec, Tensor? threshold, int k,"
    " bool reconstruct, int[] features, int[] ops, Tensor values, Tensor? mask,"
    " Tensor? mean, Tensor? std) -> Tensor"
)


def uniform_offsets(rows: int, k: int, device: torch.device) -> Tensor:
    """Row offsets of exactly k entries a row, int64 ``(rows + 1,)``."""
    return torch.arange(rows + 1, device=device) * k


def _fake_linear_topk(x: Tensor, weight: Tensor, bias: Any, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int64)


def _fake_encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Any, b_dec: Any, k: int, packed: Any = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int32)


def _fake_encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Any, b_dec: Any, threshold: Tensor, packed: Any = None, capacity: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    offsets = x.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return offsets, x.new_empty(entries, dtype=torch.int32), x.new_empty(entries)


def _fake_encode_features(
    x: Tensor, W_enc: Tensor, b_enc: Any, b_dec: Any, threshold: Tensor, features: Tensor
) -> Tensor:
    return x.new_empty((x.shape[0], features.shape[0]))


def _fake_reconstruct(x: Tensor, W_enc: Tensor, *args: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_decode_sparse(offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Any) -> Tensor:
    return W_dec.new_empty((offsets.shape[0] - 1, W_dec.shape[1]))


def _fake_sparse_dot(offsets: Tensor, indices: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(indices.shape[0])


def _fake_sparse_weight_gradient(
    offsets: Tensor, indices: Tensor, coefficients: Tensor, rows: Tensor, shift: Any, n: int
) -> Any:
    return rows.new_empty((n, rows.shape[1])), rows.new_empty(n)


def _fake_sparse_training_step(
    x: Tensor, offsets: Tensor, indices: Any, values: Any, W_enc: Tensor, W_dec: Tensor, *args: Any
) -> Any:
    n, d = W_dec.shape
    sums, counts = x.new_empty(2, dtype=torch.float64), x.new_empty(n, dtype=torch.int64)
    shapes: tuple[tuple[int, ...], ...] = ((x.shape[0], d), (n, d), (n,), (n, d), (d,))
    return sums, counts, *(x.new_empty(shape) for shape in shapes)


def _fake_largest_entries(offsets: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(offsets), offsets.new_empty(kept)


def _fake_steer(x: Tensor, W_enc: Tensor, *args: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _encoder_gradients(
    ctx: Any,
    operators: Any,
    offsets: Tensor,
    indices: Tensor,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``<x − shift, weight> + bias`` at sparse entries, in the order x, weight, bias, shift."""
    needs_x, needs_weight, needs_bias, needs_shift = ctx.needs_encoder_grad
    grad_x = grad_weight = grad_bias = grad_shift = None
    if needs_x or needs_shift:
        grad_x = operators.decode_sparse(offsets, indices, gradient, weight, None)
    if needs_weight or needs_bias:
        grad_weight, grad_bias = operators.sparse_weight_gradient(offsets, indices, gradient, x, shift, weight.shape[0])
    if needs_shift:
        assert grad_x is not None
        grad_shift = -grad_x.sum(0)
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        grad_shift,
    )


class _LinearTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operators: Any,
        x: Tensor,
        weight: Tensor,
        bias: Any,
        k: int,
        exclude_offsets: Any,
        exclude_ids: Any,
        packed: Any = None,
    ) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            values, indices = operators.linear_topk(x, weight, bias, k, exclude_offsets, exclude_ids, packed)
        ctx.operators, ctx.needs_encoder_grad = operators, (*ctx.needs_input_grad[1:4], False)
        ctx.save_for_backward(x, weight, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Any) -> Any:
        x, weight, indices = ctx.saved_tensors
        offsets = uniform_offsets(x.shape[0], indices.shape[1], x.device)
        grads = _encoder_gradients(
            ctx, ctx.operators, offsets, indices.reshape(-1), grad_values.reshape(-1), x, weight, None
        )
        return None, *grads[:3], None, None, None, None


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operators: Any, x: Tensor, W_enc: Tensor, b_enc: Any, b_dec: Any, k: int, packed: Any = None
    ) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            values, indices = operators.encode_topk(x, W_enc, b_enc, b_dec, k, packed)
        ctx.operators, ctx.needs_encoder_grad = operators, ctx.needs_input_grad[1:5]
        ctx.save_for_backward(x, W_enc, b_dec, indices, values)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Any) -> Any:
        x, W_enc, b_dec, indices, values = ctx.saved_tensors
        offsets = uniform_offsets(x.shape[0], indices.shape[1], x.device)
        # "Not ≤", as the gradient of torch.relu: a NaN lets it pass.
        gradient = torch.where(values <= 0, 0, grad_values).reshape(-1)
        return (
            None,
            *_encoder_gradients(ctx, ctx.operators, offsets, indices.reshape(-1), gradient, x, W_enc, b_dec),
            None,
            None,
        )


class _EncodeThreshold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operators: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Any,
        b_dec: Any,
        threshold: Tensor,
        packed: Any = None,
        capacity: Any = None,
    ) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            offsets, indices, values = operators.encode_threshold(x, W_enc, b_enc, b_dec, threshold, packed, capacity)
        ctx.operators, ctx.needs_encoder_grad = operators, ctx.needs_input_grad[1:5]
        ctx.capacity = capacity
        ctx.save_for_backward(x, W_enc, b_dec, offsets, indices)
        ctx.mark_non_differentiable(offsets, indices)
        return offsets, indices, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _offsets: Any, _indices: Any, grad_values: Tensor) -> Any:
        x, W_enc, b_dec, offsets, indices = ctx.saved_tensors
        if ctx.capacity is not None:
            # The offsets count entries that were not stored, too.
            offsets = offsets.clamp(max=ctx.capacity)
        return (
            None,
            *_encoder_gradients(ctx, ctx.operators, offsets, indices, grad_values.contiguous(), x, W_enc, b_dec),
            None,
            None,
            None,
        )


class _DecodeSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operators: Any, offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Any
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out = operators.decode_sparse(offsets, indices, values, W_dec, b_dec)
        ctx.save_for_backward(offsets, indices, values, W_dec)
        ctx.operators = operators
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        offsets, indices, values, W_dec = ctx.saved_tensors
        operators = ctx.operators
        grad_values = grad_weight = grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_values = operators.sparse_dot(offsets, indices, grad, W_dec)
        if ctx.needs_input_grad[4]:
            grad_weight, _ = operators.sparse_weight_gradient(offsets, indices, values, grad, None, W_dec.shape[0])
        if ctx.needs_input_grad[5]:
            grad_bias = grad.sum(0)
        return None, None, None, grad_values, grad_weight, grad_bias


class _Steer(torch.autograd.Function):
    """Forward is the fused kernel; backward goes through the differentiable twin, whose intermediate values the kernel
    never stores. Their number depends on the data, which a compiler accepts inside a backward, not inside one op."""

    @staticmethod
    def forward(ctx: Any, operators: Any, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out = operators.steer(*args)
        ctx.operators = operators
        ctx.tensor_places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        ctx.args = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(*(args[i] for i in ctx.tensor_places))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        args, leaves = list(ctx.args), {}
        for i, tensor in zip(ctx.tensor_places, ctx.saved_tensors, strict=True):
            args[i] = tensor.detach()
            if ctx.needs_input_grad[i + 1]:
                leaves[i] = args[i].requires_grad_()
        with torch.enable_grad():
            out = _steer_differentiable(ctx.operators, *args)
        grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if out.requires_grad:
            grads = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
        results: list[Tensor | None] = [None] * len(args)
        for i, leaf_grad in zip(leaves, grads, strict=True):
            results[i] = leaf_grad
        return None, *results


def _reconstruct_differentiable(
    operators: Any,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    k: int,
    packed: Tensor | None = None,
) -> Any:
    no_values = torch.empty(0, dtype=torch.float32, device=x.device)
    return _Steer.apply(operators, x, W_enc, b_enc, b_dec, W_dec, threshold, k, True, [], [], no_values, None, packed)


class _EncodeFeatures(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operators: Any, x: Tensor, W_enc: Tensor, b_enc: Any, b_dec: Any, threshold: Tensor, features: Tensor
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out = operators.encode_features(x, W_enc, b_enc, b_dec, threshold, features)
        ctx.operators, ctx.needs_encoder_grad = operators, ctx.needs_input_grad[1:5]
        ctx.save_for_backward(x, W_enc, b_dec, features, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, W_enc, b_dec, features, out = ctx.saved_tensors
        # An activation is 0 where it is off; one that is on is above a threshold >= 0.
        gradient = torch.where(out == 0, 0, grad).reshape(-1)
        offsets, indices = _columns_as_entries(features, x.shape[0])
        grads = _encoder_gradients(ctx, ctx.operators, offsets, indices, gradient, x, W_enc, b_dec)
        return None, *grads, None, None


def _columns_as_entries(features: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Offsets and indices of dense columns ``(rows, m)`` as sparse entries: PyTorch's product of the two matrices would
    add rows in an order that depends on the number of threads."""
    return uniform_offsets(rows, features.shape[0], features.device), features.repeat(rows)


def _steer_differentiable(
    operators: Any,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    k: int,
    reconstruct: bool,
    features: list[int],
    ops: list[int],
    values: Tensor,
    mask: Tensor | None,
    packed: Tensor | None = None,
) -> Tensor:
    """The fused op as a composition of differentiable ones."""
    slots = sorted(set(features))
    slot_ids = torch.tensor(slots, dtype=torch.int64, device=x.device)
    rows = x.shape[0]

    def decoded(columns: dict[int, Tensor]) -> Tensor:
        entries = torch.stack(list(columns.values()), -1).reshape(-1)
        return operators.decode_sparse(*_columns_as_entries(slot_ids, rows), entries, W_dec, None)

    # In delta mode a feature that is only added to changes by the sum of its values, whatever its activation.
    needed = sorted({f for f, op in zip(features, ops, strict=True) if reconstruct or op != EDIT_CODES["add"]})
    columns = {slot: x.new_zeros(rows) for slot in slots}
    sparse: tuple[Tensor, Tensor, Tensor] | None = None
    if k > 0:
        if needed or reconstruct:
            top_values, top_indices = operators.encode_topk(x, W_enc, b_enc, b_dec, k, packed)
            sparse = uniform_offsets(rows, k, x.device), top_indices.reshape(-1), top_values.reshape(-1)
            columns |= {slot: torch.where(top_indices == slot, top_values, 0).sum(-1) for slot in needed}
    elif reconstruct:
        assert threshold is not None
        sparse = operators.encode_threshold(x, W_enc, b_enc, b_dec, threshold, packed)
        offsets, indices, entries = sparse
        entry_rows = torch.arange(rows, device=x.device).repeat_interleave(offsets.diff(), output_size=indices.shape[0])
        for slot in needed:
            columns[slot] = columns[slot].index_add(0, entry_rows, torch.where(indices == slot, entries, 0))
    elif needed:
        needed_ids = torch.tensor(needed, dtype=torch.int64, device=x.device)
        active = operators.encode_features(x, W_enc, b_enc, b_dec, threshold, needed_ids)
        columns |= dict(zip(needed, active.unbind(-1), strict=True))
    edited = dict(columns)
    for i, (feature, op) in enumerate(zip(features, ops, strict=True)):
        edited[feature] = _EDITS[op](edited[feature], values[..., i].to(x.dtype).expand(rows))
    steered = x
    if reconstruct:
        assert sparse is not None
        # Edited features leave the sparse part altogether: taking an infinite activation off again would not undo it.
        offsets, indices, entries = sparse
        if slots:
            entries = torch.where(torch.isin(indices, slot_ids), 0, entries)
        steered = operators.decode_sparse(offsets, indices, entries, W_dec, b_dec)
        if slots:
            steered = steered + decoded(edited)
    elif slots:
        # Also for rows the edits happen to leave alone: strengths are learnt starting from neutral values.
        steered = x + decoded({slot: edited[slot] - columns[slot] for slot in slots})
    steered = steered if mask is None else torch.where(mask.unsqueeze(-1), steered, x)
    return steered.clone() if steered is x else steered


def steer_by_features(
    x: Tensor,
    W_enc: Tensor | None,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    W_dec: Tensor,
    threshold: Tensor | None,
    features: list[int],
    ops: list[int],
    values: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Delta edits that need no activations but those of their own features, in float32 at least. Encoder and
    ``threshold`` are not looked at where all of them add."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, values = x.to(dtype), values.to(dtype)

    def places(of: list[int]) -> Tensor:
        return torch.tensor(of, dtype=torch.int64, device=x.device)

    def decoder_rows(of: list[int]) -> Tensor:
        return W_dec.index_select(0, places(of)).to(dtype)

    # A feature that is only added to changes by the sum of its values, whatever its activation.
    needed = sorted({f for f, op in zip(features, ops, strict=True) if op != EDIT_CODES["add"]})
    added = [j for j, feature in enumerate(features) if feature not in needed]
    change = x.new_zeros((), dtype=dtype)
    if added:
        strengths = values if len(added) == len(features) else values.index_select(-1, places(added))
        rows = decoder_rows([features[j] for j in added])
        # The product with a vector would be a call of its own, too.
        change = strengths @ rows if strengths.dim() > 1 else (strengths.unsqueeze(-1) * rows).sum(0)
    if needed:
        assert W_enc is not None
        assert threshold is not None
        centred = wide if b_dec is None else wide - b_dec.to(dtype)
        pre = centred @ W_enc.index_select(0, places(needed)).to(dtype).T
        if b_enc is not None:
            pre = pre + b_enc.index_select(0, places(needed)).to(dtype)
        bound = threshold if threshold.shape[0] == 1 else threshold.index_select(0, places(needed))
        active = torch.where(pre <= bound.to(dtype), 0, pre)
        columns = dict(zip(needed, active.unbind(-1), strict=True))
        for j, (feature, op) in enumerate(zip(features, ops, strict=True)):
            if feature in columns:
                columns[feature] = _EDITS[op](columns[feature], values[..., j].expand(x.shape[0]))
        # Also for rows the edits happen to leave alone: strengths are learnt starting from neutral values.
        change = change + (torch.stack(list(columns.values()), -1) - active) @ decoder_rows(needed)
    steered = reference.add_change(wide, change).to(x.dtype)
    return steered if mask is None else torch.where(mask.unsqueeze(-1), steered, x)


EDIT_CODES = {op: code for code, op in enumerate(OPS)}
# In the order of OPS.
_EDITS = (
    lambda activation, value: value,
    lambda activation, value: activation + value,
    lambda activation, value: activation * value,
    torch.maximum,
    torch.minimum,
)


# The sparse_ operators and largest_entries serve training only and have no gradient of their own.
_DIFFERENTIABLE: dict[str, Callable[..., Any]] = {
    "linear_topk": _LinearTopK.apply,
    "encode_topk": _EncodeTopK.apply,
    "encode_threshold": _EncodeThreshold.apply,
    "decode_sparse": _DecodeSparse.apply,
    "encode_features": _EncodeFeatures.apply,
    "reconstruct": _reconstruct_differentiable,
    "steer": _Steer.apply,
}


def _autograd(operators: Any, name: str) -> Callable[..., Any]:
    op, differentiable = getattr(operators, name), _DIFFERENTIABLE[name]

    def implementation(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return differentiable(operators, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return implementation


def operators_of(backend: str) -> Any:
    """``torch.ops.<namespace>`` of a backend."""
    return getattr(torch.ops, NAMESPACES[backend])


def _triton(name: str) -> Callable[..., Any]:
    def implementation(*args: Any) -> Any:
        # Imported when first called: triton costs more than all the rest.
        module = importlib.import_module(f"saerec_fast.kernels.triton.{name}")
        # Triton launches on the current device.
        with torch.cuda.device_of(args[0]):
            return getattr(module, name)(*args)

    return implementation


# Operators whose kernels Inductor gets to see, to place them among its own and to do without the buffers between. The
# others stay whole: their kernels store where loaded values tell them to, which PyTorch's analysis takes for writing to
# its inputs, so that it would copy the weights first; or they read a size from the device.
_TAKEN_APART = ("decode_sparse", "encode_features", "sparse_dot", "sparse_weight_gradient")


def _kernels_of(name: str) -> Callable[..., Any]:
    """What torch.compile makes of a Triton operator on CUDA tensors: as ``torch.library.triton_op`` does it, whose
    operators would cost three times as much a call. An exported program keeps the operator."""

    def decompose(mode: Any, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not args[0].is_cuda or torch.compiler.is_exporting():
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        from saerec_fast.kernels.triton.launch import recording

        module = importlib.import_module(f"saerec_fast.kernels.triton.{name}")
        with mode, recording():
            return getattr(module, name)(*args, **kwargs)

    return decompose


def _cuda_steer(*args: Any) -> Tensor:
    """The CUDA C++ kernel, made for the small batches of serving; Triton's where it does not take the arguments."""
    from saerec_fast.kernels import cuda

    x, edit_ops = args[0], 10
    if x.shape[0] > _CUDA_STEER_ROWS or cuda.supports(*args[:edit_ops]):
        steered: Tensor = _triton("steer")(*args)
        return steered
    with torch.cuda.device_of(x):
        return cuda.steer(*args)


# Rows up to which one launch that does everything is meant to beat several; more fill the device anyway.
_CUDA_STEER_ROWS = 256


def _define(backend: str) -> torch.library.Library:
    library = torch.library.Library(NAMESPACES[backend], "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACES[backend]}::{name}", globals()[f"_fake_{name}"], lib=library)
        if name in _DIFFERENTIABLE:
            library.impl(name, _autograd(operators_of(backend), name), "Autograd")
    return library


# Operators live as long as their libraries.
_libraries = {backend: _define(backend) for backend in NAMESPACES}


def _steer_normalized_autograd(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, W_dec: Tensor, *args: Any
) -> Tensor:
    *edits, mean, std = args
    operators = operators_of("cpu")
    tensors = (arg for arg in (x, W_enc, b_enc, b_dec, W_dec, *args) if isinstance(arg, Tensor))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        if mean is not None:
            W_enc, b_dec, W_dec = reference.fold_normalization(W_enc, b_dec, W_dec, mean, std)
        differentiable: Tensor = operators.steer(x, W_enc, b_enc, b_dec, W_dec, *edits)
        return differentiable
    with torch._C._AutoDispatchBelowAutograd():
        steered: Tensor = operators.steer_normalized(x, W_enc, b_enc, b_dec, W_dec, *args)
    return steered


_cpu = _libraries["cpu"]
_cpu.define(f"steer_normalized{_STEER_NORMALIZED}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake(f"{NAMESPACES['cpu']}::steer_normalized", _fake_steer, lib=_cpu)
_cpu.impl("steer_normalized", _steer_normalized_autograd, "Autograd")

if not available_backends()["cpu"]:
    from saerec_fast.kernels import cpu

    for _name in (*_SCHEMAS, "steer_normalized"):
        _cpu.impl(_name, getattr(cpu, _name), "CPU")
for _name in _SCHEMAS:
    # Triton's interpreter takes tensors on the CPU; saerec_fast.backend knows whether it runs.
    for _key in ("CUDA", "CPU"):
        _libraries["triton"].impl(_name, _triton(_name), _key)
    _libraries["cuda"].impl(_name, _cuda_steer if _name == "steer" else _triton(_name), "CUDA")
# Before torch 2.7 there is no telling an export, which would lose the operators.
for _name in _TAKEN_APART if hasattr(torch.compiler, "is_exporting") else ():
    for _backend in ("triton", "cuda"):
        torch.library.register_torch_dispatch(
            f"{NAMESPACES[_backend]}::{_name}", FunctionalTensorMode, _kernels_of(_name), lib=_libraries[_backend]
        )
