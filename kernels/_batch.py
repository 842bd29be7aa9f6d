"""The images of a batch. One table of integers holds the addresses of their tensors. The host writes it, and kernels read it.

Potential positives are counted over all images (P of them), and so are the anchors (A) and the ground truths. Ground truths are
called rows (G). Nothing is concatenated. A kernel finds its image, and reads the image's own tensors at their addresses and
strides. A kernel takes the table as `images`: its memory, Tensor[fields, B + 1] int64, and the number B of images. So it has one
compiled form for any number of images and any layout of their tensors.

    FIRST_*     where each image begins: its blocks of potential positives, its potential positives, its rows, its anchors and its
                blocks of anchors. The last column has the totals of all images
    the others  a tensor's address, then its strides. The last column is unused
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paa_gpu.kernels import _launch

# Potential positives of a program that goes over all of them: one a thread, so that neighbouring threads read neighbouring memory
# though the compiler knows nothing of the strides.
BLOCK = 128
TILES = tl.constexpr(8)  # of as many anchors, for a program that copies

FIRST_BLOCK, FIRST_POSITION, FIRST_ROW, FIRST_ANCHOR, FIRST_ANCHOR_BLOCK = (tl.constexpr(field) for field in range(5))
INDS, GT_INDS, LOSSES, LABEL, LABEL_WEIGHT, BBOX_WEIGHT = (tl.constexpr(field) for field in range(5, 17, 2))

#: Of the elements of a tensor whose address is in a table.
DTYPES = {
    getattr(torch, name): getattr(tl, name)
    for name in (
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
        *("float16", "bfloat16", "float32", "float64"),
    )
}


@triton.jit
def field(images, image, FIELD: tl.constexpr):
    """A field of an image, or of a block of images."""
    return tl.load(images[0] + FIELD * (images[1] + 1) + image)


@triton.jit
def vector(images, image, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """Address and stride of a tensor of the image, or of a block of images."""
    return field(images, image, FIELD).to(tl.pointer_type(DTYPE)), field(images, image, FIELD + 1)


@triton.jit
def image_of(start_ptr, n_images, value):
    """The image that owns `value`: the last of those that start at or before it (empty ones share their start with the next)."""
    first = (value * 0).to(tl.int32)
    remaining = n_images
    while remaining > 1:
        half = remaining // 2
        first += tl.where(tl.load(start_ptr + first + half) <= value, half, 0)
        remaining -= half
    return first


@triton.jit
def potential(images, block, BLOCK: tl.constexpr):
    """The image of a potential block, the positions [BLOCK] within the image, and which of them are there."""
    image = image_of(images[0] + FIRST_BLOCK * (images[1] + 1), images[1], block)
    first = field(images, image, FIRST_POSITION)
    position = (block - field(images, image, FIRST_BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    return image, position, position < field(images, image + 1, FIRST_POSITION) - first


@triton.jit
def anchors_at(images, image, position, inside, DTYPE: tl.constexpr):
    """The anchors of potential positives within their image, and which of them exist."""
    inds_ptr, stride = vector(images, image, INDS, DTYPE)
    anchor = tl.load(inds_ptr + position * stride, mask=inside, other=-1).to(tl.int64)
    n_anchors = field(images, image + 1, FIRST_ANCHOR) - field(images, image, FIRST_ANCHOR)
    return anchor, inside & (anchor >= 0) & (anchor < n_anchors)


@triton.jit
def rows_at(images, image, position, inside, DTYPE: tl.constexpr):
    """The rows of potential positives in the batch, and which of them exist."""
    gt_ptr, stride = vector(images, image, GT_INDS, DTYPE)
    gt = tl.load(gt_ptr + position * stride, mask=inside, other=-1).to(tl.int64)
    first = field(images, image, FIRST_ROW)
    return first + gt, inside & (gt >= 0) & (gt < field(images, image + 1, FIRST_ROW) - first)


def sizes_of(tensors: Sequence[Tensor]) -> list[int]:
    """The first size of each."""
    return [tensor.size(0) for tensor in tensors]


def starts_of(sizes: Iterable[int]) -> list[int]:
    """Where each part begins, and how large all are together."""
    return [0, *itertools.accumulate(sizes)]


def places(column: Sequence[Tensor]) -> list[Sequence[int]]:
    """Of tensors of one rank: all addresses, all strides of the first axis, and so on."""
    return [_launch.pointers(column), *zip(*map(Tensor.stride, column), strict=True)]


def addresses(column: Sequence[Tensor]) -> list[int]:
    """The fields of a column of the images' tensors: addresses, and strides axis after axis."""
    fields: list[int] = []
    for numbers in places(column):
        fields += numbers
        fields.append(0)
    return fields


def image_fields(
    potential: Sequence[int], num_gts: Sequence[int], anchors: Sequence[int], *columns: Sequence[Tensor]
) -> tuple[list[int], int, int]:
    """What the host knows of the images.

    Args:
        potential, num_gts, anchors: of each image.
        columns: in the order of the fields, the tensors of each image; their dtype does not vary within a column.

    Returns:
        The table, row after row; the numbers of potential blocks and of anchor blocks.
    """
    blocks, anchor_blocks = (
        starts_of([-(-size // block) for size in sizes]) for sizes, block in ((potential, BLOCK), (anchors, TILES.value * BLOCK))
    )
    table = [*blocks, *starts_of(potential), *starts_of(num_gts), *starts_of(anchors), *anchor_blocks]
    for column in columns:
        table += addresses(column)
    return table, blocks[-1], anchor_blocks[-1]
