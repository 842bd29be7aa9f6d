"""What several kernels use: constants, floats as ordered integers, rounding, the highest of pairs, masks."""

from __future__ import annotations

import triton
import triton.language as tl

HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
EPS = tl.constexpr(2.220446049250313e-16)  # of float64, in every precision, as scikit-learn has it


@triton.jit
def ordered_key(x):
    """Integers in the order of the floats `x`: -inf < finite < +inf < NaN, both zeros equal, all NaN equal.

    int64 for float64; int32 for the narrower types, which float32 holds exactly. Works on the bits, so that flushed
    subnormals cannot change the order.
    """
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
        nan = magnitude > 0x7FF0000000000000
        largest = 0x7FFFFFFFFFFFFFFF
    else:
        if x.dtype == tl.bfloat16:
            bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        else:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        magnitude = bits & 0x7FFFFFFF
        nan = magnitude > 0x7F800000
        largest = 0x7FFFFFFF
    return tl.where(nan, largest, tl.where(magnitude == 0, 0, key))


@triton.jit
def narrow(x, ptr):
    """`x` in the dtype that the pointer points to. float32 is between, because no target narrows float64 further in one step."""
    return (x if ptr.dtype.element_ty == tl.float64 else x.to(tl.float32)).to(ptr.dtype.element_ty)


@triton.jit
def first_of_highest(key, at, other_key, other_at):
    """The pair (key, position) with the higher key. Of equal keys, the pair with the lower position."""
    other = (other_key > key) | ((other_key == key) & (other_at < at))
    return tl.where(other, other_key, key), tl.where(other, other_at, at)


@triton.jit
def only_if(flag, mask):
    """The mask where a scalar holds, else nothing.

    `mask & flag` is the same once compiled. But the interpreter of Triton 3.9 makes integers of a comparison that it broadcasts,
    and refuses them as a mask.
    """
    return tl.where(flag, mask, False)


@triton.jit
def smallest_integer(DTYPE: tl.constexpr):
    return tl.full((), -(1 << (DTYPE.primitive_bitwidth - 1)), DTYPE)
