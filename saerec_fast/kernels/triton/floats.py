"""Conversions between float32 and the dtypes of tensors, rounding to nearest even.

On a GPU they are one instruction each. Triton's interpreter (3.6 to 3.9) cuts bfloat16 off instead of rounding, and
multiplies the bit patterns in a product of bfloat16 tiles; there the same is done on the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saerec_fast.kernels.triton.launch import INTERPRETED as _INTERPRETED

INTERPRETED: tl.constexpr = tl.constexpr(_INTERPRETED)


@triton.jit
def to_float32(x):
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def to_dtype_of(x, pointer):
    """Float32 ``x`` in the dtype that ``pointer`` points to."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        # Adding half a unit, or just less where the last bit kept is even, carries into it where it must go up.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(nan, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(pointer.dtype.element_ty)


@triton.jit
def product(left, right, total):
    """``total + left @ right``, products and sums in float32."""
    if INTERPRETED:
        return tl.dot(to_float32(left), to_float32(right), total, input_precision="ieee")
    else:
        return tl.dot(left, right, total, input_precision="ieee")
