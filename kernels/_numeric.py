"""Device functions that several kernels use: floats as ordered integers, rounding, the highest of pairs, sorting of pairs."""

from __future__ import annotations

import triton
import triton.language as tl


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
def _side(axis: tl.constexpr, n_axes: tl.constexpr):
    """0 and 1 along one axis of the hypercube."""
    return tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (n_axes - 1 - axis))


@triton.jit
def _compare_and_swap(key, tie, axis: tl.constexpr, n_axes: tl.constexpr):
    # The sum over an axis of two, less one's own value, is the other's: integers wrap around.
    other_key = tl.sum(key, axis, keep_dims=True) - key
    other_tie = tl.sum(tie, axis, keep_dims=True) - tie
    after = (key > other_key) | ((key == other_key) & (tie > other_tie))
    swap = after != (_side(axis, n_axes) != 0)
    return tl.where(swap, other_key, key), tl.where(swap, other_tie, tie)


@triton.jit
def smallest_integer(DTYPE: tl.constexpr):
    return tl.full((), -(1 << (DTYPE.primitive_bitwidth - 1)), DTYPE)


@triton.jit
def sort_pairs(key, tie, inside, LOG_BLOCK: tl.constexpr):
    """Sort the pairs (key, tie), integers [2 ** LOG_BLOCK], ascending by key, then by tie: a bitonic network.

    What is not inside goes to the end, where both are the largest integers.
    """
    cube_key = tl.reshape(tl.where(inside, key, ~smallest_integer(key.dtype)), [2] * LOG_BLOCK)
    cube_tie = tl.reshape(tl.where(inside, tie, ~smallest_integer(tie.dtype)), [2] * LOG_BLOCK)
    for stage in tl.static_range(1, LOG_BLOCK + 1):
        # Every other run descends: its complements ascend. A direction for each comparison would be more masks than
        # AMD has scalar registers.
        if stage < LOG_BLOCK:
            descending = -_side(LOG_BLOCK - 1 - stage, LOG_BLOCK)
            cube_key, cube_tie = cube_key ^ descending, cube_tie ^ descending
        for axis in tl.static_range(LOG_BLOCK - stage, LOG_BLOCK):
            cube_key, cube_tie = _compare_and_swap(cube_key, cube_tie, axis, LOG_BLOCK)
        if stage < LOG_BLOCK:
            cube_key, cube_tie = cube_key ^ descending, cube_tie ^ descending
    return tl.reshape(cube_key, key.shape), tl.reshape(cube_tie, tie.shape)
