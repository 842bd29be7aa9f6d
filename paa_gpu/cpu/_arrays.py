"""Tensors as numpy arrays, and arrays as tensors.

The compiled loops work on arrays. So does all copying and checking around them, because torch's own operations run on OpenMP
threads. A forked child would wait for these threads for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def view(tensor: Tensor) -> Array:
    """The values of a tensor, without a copy; of bfloat16, which numpy has not, as float32."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    # bfloat16 is the upper half of a float32.
    return (tensor.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)


def numbers(tensor: Tensor) -> Array:
    """The values of a tensor, without a copy; the bits of 2 bytes as int16, because numpy has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype.itemsize == 2 else tensor).numpy()


def join(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat` of tensors that have one dtype."""
    tensor, dtype = torch.from_numpy(np.concatenate([*map(numbers, tensors)])), tensors[0].dtype
    return tensor.view(dtype) if dtype.itemsize == 2 else tensor


def largest(indices: Tensor) -> int:
    """The largest index, but at least -1, which is that of none."""
    values = view(indices)
    return max(values.item(values.argmax()), -1) if len(values) else -1


def cast(values: Array, dtype: Any) -> Array:
    """The values, contiguous; without a copy where they are and have this dtype. What is too large for it is infinite."""
    if values.dtype.itemsize <= np.dtype(dtype).itemsize:
        return np.ascontiguousarray(values, dtype)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype)


def array(tensor: Tensor, dtype: Any) -> Array:
    """`cast` for the values of a tensor."""
    return cast(view(tensor), dtype)


def flat(tensors: Sequence[Tensor], dtype: Any) -> Array:
    """The images' values one after the other, contiguous; without a copy where there is one image of this dtype."""
    if len(tensors) == 1:
        return array(tensors[0], dtype)
    values = [view(tensor) for tensor in tensors]
    if values[0].dtype.itemsize <= np.dtype(dtype).itemsize:
        return np.concatenate(values, dtype=dtype)
    with np.errstate(over="ignore"):
        return np.concatenate(values, dtype=dtype)


def part(tensor: Tensor, begin: int, end: int, dtype: Any) -> Array:
    """Values `begin` to `end` of a tensor, row by row, contiguous; without a copy where they are and have this dtype."""
    if tensor.is_contiguous():
        return array(tensor.view(-1)[begin:end], dtype)
    values = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().flat[begin:end]
    return array(torch.from_numpy(values).view(tensor.dtype), dtype)


def tensor(values: Array, dtype: torch.dtype) -> Tensor:
    """A tensor of the values, rounded to `dtype`, by way of float32 as on a GPU; without a copy where they have it."""
    if values.dtype == np.float64 and dtype != torch.float64:
        values = cast(values, np.float32)
    if dtype == torch.float16:
        return torch.from_numpy(cast(values, np.float16))
    if dtype == torch.bfloat16:
        bits = values.view(np.int32)
        # The upper half, to nearest, ties to even.
        return torch.from_numpy((bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def rounded(number: float, dtype: torch.dtype) -> float:
    """A number as torch rounds it before it compares a tensor of this dtype with it; of the usual one without a tensor."""
    if dtype != torch.float32:
        return torch.tensor(number, dtype=dtype, device="cpu").item()
    return float(_nearest(number, np.float32))


def _nearest(number: float, dtype: Any) -> Any:
    """The nearest number of the dtype. To silence numpy takes longer than the rest, so only large numbers do."""
    if -1e38 < number < 1e38:
        return dtype(number)
    with np.errstate(over="ignore"):
        return dtype(number)


def at_most(number: float, dtype: Any) -> float:
    """The largest number of a numpy dtype up to this one: what exceeds the one exceeds the other."""
    nearest = _nearest(number, dtype)
    return float(nearest if float(nearest) <= number else np.nextafter(nearest, dtype(-np.inf)))


def offsets(sizes: Sequence[int]) -> Array:
    """Where each of consecutive parts begins, and where the last one ends."""
    return np.array([0, *itertools.accumulate(sizes)], np.int64)


def lengths(tensors: Sequence[Tensor]) -> list[int]:
    """The first size of each (`len` of a tensor is slow)."""
    return [tensor.shape[0] for tensor in tensors]
