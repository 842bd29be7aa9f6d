"""The targets of a reassignment for CPU tensors: copies of those that were given, and what is written into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import Array, lengths, numbers, offsets
from ._loops import compiled, inner

#: Microseconds to write at a potential positive; to copy the targets of an anchor.
WRITING, COPYING = 0.003, 0.001

#: What copies the targets of some images.
Copy = Callable[[int, int], None]


@inner
def _ignore(begin: Any, end: Any, pos_inds: Any, ignored: Any, start: Any, label_weight: Any, size: Any) -> None:
    """No label weight at the ignored ones of the potential positives [begin, end) of the image whose anchors begin at `start`.

    A label weight has `size` bytes.
    """
    for p in range(begin, end):
        if ignored[p]:
            at = (start + np.uint64(pos_inds[p])) * size
            for byte in range(at, at + size):
                label_weight[byte] = 0


@inner
def write_images(
    first: int, last: int, pos_inds: Any, pos_offset: Any, positive: Any, ignored: Any, anchor_offset: Any, num_classes: int,
    label: Any, label_weight: Any, bbox_weight: Any, kept: Any, background: Any, num_pos: Any,
) -> None:  # fmt: skip
    """Background at all potential positives, but for anchors that are a positive's (`kept`), in whatever order two of them that
    share an anchor come.

    The anchors that become background are gathered first, so that the loops that write ask nothing. An anchor is unsigned: a
    negative one is too large then, and an index that may be negative takes a branch. All that are too large share the place of
    `kept` behind those of the image. Box weights go column by column: a call to fill one short row takes longer than to fill it.
    """
    for image in range(first, last):
        start, stop = np.uint64(anchor_offset[image]), np.uint64(anchor_offset[image + 1])
        begin, end = np.uint64(pos_offset[image]), np.uint64(pos_offset[image + 1])
        none = stop - start
        own = kept[start + np.uint64(image) :]
        positives, ignoreds = 0, 0
        for p in range(begin, end):
            if positive[p]:
                own[np.uint64(pos_inds[p])] = True
            positives += positive[p]
            ignoreds += ignored[p]
        own[none], num_pos[image] = True, positives
        found = begin
        for p in range(begin, end):
            anchor = min(np.uint64(pos_inds[p]), none)
            background[found] = start + anchor
            found += np.uint64(not own[anchor])
        for i in range(begin, found):
            label[np.uint64(background[i])] = num_classes
        for word in range(np.uint64(bbox_weight.shape[1])):
            for i in range(begin, found):
                bbox_weight[np.uint64(background[i]), word] = 0
        if ignoreds > 0:
            _ignore(begin, end, pos_inds, ignored, start, label_weight, np.uint64(len(label_weight) // len(label)))


@compiled
def write_alone(
    first: int, last: int, pos_inds: Any, pos_offset: Any, positive: Any, ignored: Any, anchor_offset: Any, num_classes: int,
    label: Any, label_weight: Any, bbox_weight: Any, kept: Any, background: Any, num_pos: Any,
) -> None:  # fmt: skip
    """`write_images` alone."""
    write_images(
        first, last, pos_inds, pos_offset, positive, ignored, anchor_offset, num_classes,
        label, label_weight, bbox_weight, kept, background, num_pos,
    )  # fmt: skip


def room_to_write(targets: tuple[Any, ...], images: int, potential: int) -> tuple[Array, Array, Array]:
    """What `write_images` takes behind the targets: kept and background, which it needs only for itself, and num_pos."""
    return np.zeros(len(targets[2]) + images, bool), np.empty(potential, np.int64), np.empty(images, np.int64)


def writing(pos_offset: Array, anchor_offset: Array) -> Array:
    """Microseconds to copy the targets of the first images and to write into them."""
    ends: Array = WRITING * pos_offset + COPYING * anchor_offset
    return ends


def _joined(columns: Sequence[Sequence[Tensor]]) -> tuple[list[Array], Copy | None]:
    """Room for the images of each column one after the other, where the numbers of an anchor are neighbours; and what copies some
    of the images there. A single image is there already."""
    if len(columns[0]) == 1:
        return [numbers(image).copy() for (image,) in columns], None
    images = [[*map(numbers, column)] for column in columns]
    start = offsets(lengths(columns[0]))
    joined = [np.empty((start[-1], *column[0].shape[1:]), column[0].dtype) for column in images]

    def copy(first: int, last: int) -> None:
        for column, whole in zip(images, joined, strict=True):
            np.concatenate(column[first:last], out=whole[start[first] : start[last]])

    return joined, copy


def after(copy: Copy | None, loop: Callable[..., None]) -> Callable[..., None]:
    """`loop` for images that are copied first, if they are not there already."""
    if copy is None:
        return loop

    def run(first: int, last: int, *args: Any) -> None:
        copy(first, last)
        loop(first, last, *args)

    return run


def _tensor_and_words(joined: Array, dtype: torch.dtype) -> tuple[Tensor, Array]:
    """Joined targets as a tensor and as integers: bytes or, where an anchor has four numbers, [A, words of eight bytes]. Zero has
    the same bits in every dtype, so that one compiled loop writes all."""
    tensor = torch.from_numpy(joined)
    words = joined.view(np.int64 if joined.ndim == 2 else np.uint8)
    return tensor.view(dtype) if dtype.itemsize == 2 else tensor, words


def copies(
    label: Sequence[Tensor], label_weight: Sequence[Tensor], bbox_weight: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Copy | None, tuple[Array, ...]]:
    """Copies of the targets: the tensors, what fills those of some images, and what `write_images` writes into."""
    (labels, *joined), copy = _joined((label, label_weight, bbox_weight))
    weights, weight_bytes = _tensor_and_words(joined[0], label_weight[0].dtype)
    box_weights, box_weight_words = _tensor_and_words(joined[1], bbox_weight[0].dtype)
    tensors = torch.from_numpy(labels), weights, box_weights
    return tensors, copy, (labels, weight_bytes, box_weight_words)
