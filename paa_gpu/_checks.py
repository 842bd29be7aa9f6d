"""Checks of arguments, and the wording of their errors: "`<argument>` must ..., got ...".

Checks come in the order rank, shape, layout, dtype, device, values. All come before any work. Only the checks of `validate=True`
read tensors, and those that ask `values_of`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .cpu._arrays import Array, view

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int64, torch.int32)
# Not `int | float` where it is used: Python would make the union again on every call, and torch 2.9 cannot compile it.
INT = (int, torch.SymInt)
REAL = (int, float)
NUMBER = (*REAL, torch.SymInt, torch.SymFloat, Real, Tensor)
LIST = (list, tuple)
INTEGERS = (*INDICES, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def _names(options: Iterable[Any]) -> str:
    words = [f'"{option}"' if isinstance(option, str) else str(option).removeprefix("torch.") for option in options]
    return " or ".join(words) if len(words) < 3 else ", ".join(words[:-1]) + " or " + words[-1]


def _sizes(shape: Iterable[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def type_name(value: Any) -> str:
    """The name of the type, after `numpy.` if it is numpy's. Python or torch have types with some of the same names."""
    kind = type(value)
    return f"numpy.{kind.__name__}" if kind.__module__ == "numpy" else kind.__name__


def _check_sizes(name: str, sizes: Sequence[int], shape: Sequence[int | None]) -> None:
    for size, wanted in zip(sizes, shape):  # noqa: B905  # both have the same length; `strict` takes a third of this loop
        if wanted is not None and size != wanted:
            raise ValueError(f"`{name}` must have shape {_sizes(shape)}, got {_sizes(sizes)}")


def check_tensor(
    name: str, value: Any, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> None:
    """A dense tensor of this shape (None: any size), one of these dtypes, on this device (None: the CPU or any CUDA device)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a Tensor, got {type_name(value)}")
    sizes = value.shape
    if len(sizes) != len(shape):
        raise ValueError(f"`{name}` must have {len(shape)} dimension{'s' * (len(shape) != 1)}, got shape {_sizes(sizes)}")
    if sizes != shape:
        _check_sizes(name, sizes, shape)
    if value.layout is not torch.strided:
        raise TypeError(f"`{name}` must have the layout strided, got {_names([value.layout])}")
    if value.dtype not in dtypes:
        raise TypeError(f"`{name}` must be {_names(dtypes)}, got {_names([value.dtype])}")
    if device is None:
        if not (value.is_cpu or value.is_cuda):
            raise ValueError(f"`{name}` must be on a CPU or CUDA device, got {value.device}")
    elif value.device != device:
        raise ValueError(f"`{name}` must be on {device} as the other tensors are, got {value.device}")


def check_list(name: str, value: Any, entry: str = "image", length: int | None = None, like: str = "`pos_losses`") -> None:
    """A list or tuple with an entry for each `entry`. It is not empty, or it has the length of `like`."""
    if not isinstance(value, LIST):
        raise TypeError(f"`{name}` must be a list with one entry per {entry}, got {type_name(value)}")
    if length is None and len(value) == 0:
        raise ValueError(f"`{name}` must have at least one entry, got an empty list")
    if length is not None and len(value) != length:
        raise ValueError(f"`{name}` must have {length} {'entry' if length == 1 else 'entries'} as {like} has, got {len(value)}")


def check_option(name: str, value: Any, options: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"`{name}` must be {_names(options)}, got {value!r}")


def check_int(name: str, value: Any, minimum: int, maximum: int = 2**63 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, INT):
        raise TypeError(f"`{name}` must be an int, got {type_name(value)}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}")
    if value > maximum:
        raise ValueError(f"`{name}` must be at most {maximum}, got {value}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool, got {type_name(value)}")


def check_float(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, REAL):
        raise TypeError(f"`{name}` must be a float, got {type_name(value)}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"`{name}` must be within the range of a float, got an int of {int(value).bit_length()} bits") from None
    if value != value:
        raise ValueError(f"`{name}` must be a number, got nan")


def check_non_negative(name: str, value: Any) -> None:
    check_float(name, value)
    if value < 0:
        raise ValueError(f"`{name}` must not be negative, got {value}")


def check_positive(name: str, value: Any) -> None:
    check_non_negative(name, value)
    if value == 0:
        raise ValueError(f"`{name}` must be positive, got {value}")


def check_finite_non_negative(name: str, value: Any) -> None:
    check_non_negative(name, value)
    if value == math.inf:
        raise ValueError(f"`{name}` must be finite, got {value}")


#: The weight of a model or of a pool. Products of other weights with scores may be infinite or zero in float32.
LEAST_WEIGHT, MOST_WEIGHT = 1e-30, 1e30


def check_weight(name: str, value: Any) -> None:
    check_positive(name, value)
    if not LEAST_WEIGHT <= value <= MOST_WEIGHT:
        raise ValueError(f"`{name}` must be from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, got {value}")


def check_share(name: str, value: Any) -> None:
    check_non_negative(name, value)
    if value > 1:
        raise ValueError(f"`{name}` must be at most 1, got {value}")


def values_of(tensor: Tensor) -> Array | None:
    """The values if they can be read at once. On a device they would have to be waited for, and a compiler, a transform and a
    fake tensor have none."""
    if not tensor.is_cpu or torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return None
    try:
        return view(tensor.detach())
    except RuntimeError:  # within a transform
        return None


def check_classes(name: str, labels: Tensor, num_classes: int) -> None:
    """Labels in [0, num_classes), if they can be read."""
    values = values_of(labels)
    if values is not None:
        (wrong,) = ((values < 0) | (values >= num_classes)).nonzero()
        if len(wrong):
            raise ValueError(f"`{name}` must be in [0, {num_classes}), got {values[wrong[0]]} at position {wrong[0]}")


def level_sizes_of(name: str, levels: Any) -> list[int]:
    """The number of anchors of each level, from a list of ints or of Tensor[A_l, 4]."""
    check_list(name, levels, "level", len(levels) if isinstance(levels, LIST) else None)
    sizes = []
    for i, level in enumerate(levels):
        if type(level) is int and level >= 0:  # first: these are quick to ask
            sizes.append(level)
        elif isinstance(level, Tensor):
            shape = level.shape
            if len(shape) != 2 or shape[1] != 4:
                raise ValueError(f"`{name}[{i}]` must have shape [any, 4], got {_sizes(shape)}")
            sizes.append(shape[0])
        else:
            check_int(f"{name}[{i}]", level, 0)
            sizes.append(level)
    return sizes


def check_levels(name: str, levels: Sequence[Tensor], channels: int | None, floating: bool = True) -> None:
    """Maps [N, channels, any, any] of one N, number of channels, dtype and device."""
    shape: tuple[int | None, ...] = (None, channels, None, None)
    first = levels[0]
    dtypes = FLOATS if floating or not isinstance(first, Tensor) else (first.dtype,)
    for level, tensor in enumerate(levels):
        check_tensor(f"{name}[{level}]", tensor, shape, dtypes, first.device if level else None)
        shape, dtypes = (*first.shape[:2], None, None), (first.dtype,)


def check_pyramid(name: str, levels: Sequence[Tensor], strides: Sequence[int]) -> None:
    """Maps in the order of their strides: sides of about 1 / stride of those of the images, if the sizes can be read.

    H cells cover more than (H - 1) * stride and less than (H + 1) * stride pixels, whether a network rounds up or down. One
    number of pixels must fit all levels.
    """
    for axis, side in (2, "heights"), (3, "widths"):
        cells = [level.shape[axis] for level in levels]
        if not _are_known(cells):
            return
        least = max([(number - 1) * stride for number, stride in zip(cells, strides, strict=True)])
        if least >= min([(number + 1) * stride for number, stride in zip(cells, strides, strict=True)]):
            raise ValueError(f"`{name}` must have {side} that fit the strides {list(strides)}, got {cells}")


def _are_known(sizes: Sequence[Any]) -> bool:
    """Whether sizes are numbers. If a compiler's or a tracer's were compared, the graph would hold for these sizes alone."""
    return not torch.compiler.is_compiling() and type(sizes[0]) is int


def check_corners(name: str, boxes: Tensor) -> None:
    """Boxes that know their format, as torchvision's `tv_tensors` do, have that of corners."""
    layout = getattr(boxes, "format", None)
    if layout is not None and (said := getattr(layout, "value", layout)) != "XYXY":
        raise ValueError(f"`{name}` must have the format XYXY, got {said}")


def _check_box_values(name: str, boxes: Tensor) -> None:
    """Finite corners in their order, if they can be read: not a NaN, and not widths and heights in their place."""
    values = values_of(boxes)
    if values is not None:
        sound = np.isfinite(values) & np.tile(values[:, :2] <= values[:, 2:], 2)
        refuse(~sound.min(1), name, values, "be finite, with x1 <= x2 and y1 <= y2")


def check_targets(targets: Any, num_images: int, num_classes: int, device: torch.device) -> None:
    """Boxes and labels of each image, as torchvision's detectors take them. A batch without images has no losses."""
    check_list("targets", targets)
    check_list("targets", targets, length=num_images, like="the batch")
    for i, target in enumerate(targets):
        if not isinstance(target, Mapping):
            raise TypeError(f"`targets[{i}]` must be a dictionary, got {type_name(target)}")
        for key in ("boxes", "labels"):
            if key not in target:
                raise ValueError(f"`targets[{i}]` must have an entry `{key}`, got {sorted(target)}")
        for key in ("boxes", "ignored_boxes"):
            if key in target:
                check_tensor(f"targets[{i}]['{key}']", target[key], (None, 4), FLOATS, device)
                check_corners(f"targets[{i}]['{key}']", target[key])
                _check_box_values(f"targets[{i}]['{key}']", target[key])
        check_tensor(f"targets[{i}]['labels']", target["labels"], (target["boxes"].shape[0],), INDICES, device)
        check_classes(f"targets[{i}]['labels']", target["labels"], num_classes)


def check_image_sizes(image_sizes: Any, num_images: int, device: torch.device | None, level: Tensor, stride: int) -> None:
    """(height, width) of each image, or Tensor[N, 2]. Not negative and within the batch, if the values can be read.

    `level` is the first map of the batch. Its H cells cover less than (H + 1) * stride pixels.
    """
    cells = level.shape[2:]
    most = [(number + 1) * stride for number in cells] if _are_known(cells) else [math.inf, math.inf]
    if isinstance(image_sizes, Tensor):
        check_tensor("image_sizes", image_sizes, (num_images, 2), (*FLOATS, *INDICES), device)
        values = values_of(image_sizes)
        if values is not None:
            refuse(~(values.min(1) >= 0), "image_sizes", values, "be at least 0")
            refuse((values >= most).max(1), "image_sizes", values, f"be (height, width) within the batch, below {most}")
        return
    check_list("image_sizes", image_sizes, length=num_images, like="the batch")
    for i, size in enumerate(image_sizes):
        name = f"image_sizes[{i}]"
        for number, limit in zip(_pair(name, size, "(height, width)"), most, strict=True):
            known = _check_number(name, number)
            if known is not None and not known >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {known}")
            if known is not None and not known < limit:
                raise ValueError(f"`{name}` must be (height, width) within the batch, below {most}, got {size}")


def check_scale_factors(scale_factors: Any, num_images: int, device: torch.device | None) -> None:
    """A number or (in x, in y) for each image, or Tensor[N] or Tensor[N, 2]. Positive, if the values can be read."""
    if isinstance(scale_factors, Tensor):
        if scale_factors.dim() not in (1, 2):
            expected = f"[{num_images}] or [{num_images}, 2]"
            raise ValueError(f"`scale_factors` must have shape {expected}, got {list(scale_factors.shape)}")
        shape = (num_images,) if scale_factors.dim() == 1 else (num_images, 2)
        check_tensor("scale_factors", scale_factors, shape, (*FLOATS, *INDICES), device)
        values = values_of(scale_factors)
        if values is not None:
            least = values if scale_factors.dim() == 1 else values.min(1)
            refuse(~(least > 0), "scale_factors", values, "be positive")
        return
    check_list("scale_factors", scale_factors, length=num_images, like="the batch")
    for i, factor in enumerate(scale_factors):
        name = f"scale_factors[{i}]"
        for number in _pair(name, factor, "a number or (in x, in y)") if isinstance(factor, LIST) else (factor,):
            known = _check_number(name, number)
            if known is not None and not known > 0:
                raise ValueError(f"`{name}` must be positive, got {known}")


def _pair(name: str, value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, LIST) or len(value) != 2:
        raise ValueError(f"`{name}` must be {what}, got {value!r}")
    return value


def _check_number(name: str, value: Any) -> Any:
    """A number of Python, numpy or torch. Returns its value, or None if it is not known yet, as on the way to another runtime."""
    if isinstance(value, bool) or not isinstance(value, NUMBER):
        raise TypeError(f"`{name}` must be a number, got {type_name(value)}")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"`{name}` must be a number, got a tensor of shape {list(value.shape)}")
        values = values_of(value)
        return None if values is None else values.item()
    return value if isinstance(value, Real) else None


def refuse(wrong: Array, name: str, value: Array, must: str, where: str = "at position {}") -> None:
    """An error if any of `wrong` [N] is true. `value` has a row for each, or one for all."""
    if wrong.any():
        row = int(wrong.argmax()) % len(value)
        raise ValueError(f"`{name}` must {must}, got {value[row].tolist()} {where.format(row)}")


def check_values(tensors: Sequence[Tensor], num_gt: int, num_classes: int, image: str) -> None:
    """The values of the six tensors of one image. Reading them waits for the device. In messages, `image` follows a name."""
    pos_losses, label, _, _, pos_inds, pos_gt_inds = tensors
    losses, labels, inds, gts = (view(tensor.cpu()) for tensor in (pos_losses, label, pos_inds, pos_gt_inds))
    anchors = len(labels)
    refuse((labels < 0) | (labels > num_classes), f"label{image}", labels, f"be in [0, {num_classes}]")
    refuse((inds < 0) | (inds >= anchors), f"pos_inds{image}", inds, f"be in [0, {anchors})")
    seen, position = np.full(anchors, -1), np.arange(len(inds))
    seen[inds] = position
    refuse(seen[inds] != position, f"pos_inds{image}", inds, "not repeat an index")
    refuse(gts < 0, f"pos_gt_inds{image}", gts, "not be negative")
    within = f"be below {num_gt}, the number of ground truths" if num_gt else "be empty, because the image has no ground truth"
    refuse(gts >= num_gt, f"pos_gt_inds{image}", gts, within)
    infinite = ~np.isfinite(losses)
    gt = gts[infinite.argmax()] if len(gts) else 0
    refuse(infinite, f"pos_losses{image}", losses, "be finite", f"at position {{}}, ground truth {gt}")
