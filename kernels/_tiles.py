"""Rows of values as tiles in registers: [BLOCK_K // 2, 2], whose pairs lie in one thread (see `em`)."""

from __future__ import annotations

import triton
import triton.language as tl

NOBODY = tl.constexpr(2**31 - 1)  # no position in a row


@triton.jit
def load_pairs(ptr, offset, mask, other):
    """Load a tile as two blocks [BLOCK_K // 2], so that the pairs stay in one thread."""
    first, second = tl.split(offset)
    first_mask, second_mask = tl.split(mask)
    return tl.join(tl.load(ptr + first, mask=first_mask, other=other), tl.load(ptr + second, mask=second_mask, other=other))


@triton.jit
def store_pairs(ptr, offset, value, mask):
    """The counterpart of `load_pairs`."""
    first, second = tl.split(offset)
    first_value, second_value = tl.split(value)
    first_mask, second_mask = tl.split(mask)
    tl.store(ptr + first, first_value, mask=first_mask)
    tl.store(ptr + second, second_value, mask=second_mask)


@triton.jit
def positions(start, BLOCK_K: tl.constexpr):
    """Positions of a tile in its row, [BLOCK_K // 2, 2]: the pairs (i, i + BLOCK_K // 2)."""
    first = start + tl.arange(0, BLOCK_K // 2)
    return tl.join(first, first + BLOCK_K // 2)


@triton.jit
def load_tile(row, start, BLOCK_K: tl.constexpr):
    """A tile of the row less the row's minimum, zero outside, and where inside."""
    x_ptr, stride_xk, n, shift = row
    position = positions(start, BLOCK_K)
    x = load_pairs(x_ptr, position.to(tl.int64) * stride_xk, position < n, 0.0).to(shift.dtype)
    return tl.where(position < n, x - shift, 0.0), position < n


@triton.jit
def tile_at(x, row, start, BLOCK_K: tl.constexpr, LONG: tl.constexpr):
    """The tile at `start`: that in registers, `x`, where it is the only one."""
    if LONG:
        return load_tile(row, start, BLOCK_K)
    return x, positions(start, BLOCK_K) < row[2]


@triton.jit
def find_range(x_ptr, stride_xk, n, end, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The smallest and the largest finite value of a row, and whether it can be fitted."""
    smallest, largest = tl.full((), float("inf"), DTYPE), tl.full((), float("-inf"), DTYPE)
    finite = tl.full((), 0, tl.int32)
    for start in range(0, end, BLOCK_K):
        x, inside = load_tile((x_ptr, stride_xk, n, tl.full((), 0.0, DTYPE)), start, BLOCK_K)
        inside = inside & (tl.abs(x) < float("inf"))
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, x, float("inf"))))
        largest = tl.maximum(largest, tl.max(tl.where(inside, x, float("-inf"))))
        finite += tl.sum(inside.to(tl.int32))
    return smallest, largest, (n >= 2) & (finite == n)
