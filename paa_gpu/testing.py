"""Inputs and tolerances for tests and benchmarks, ours and yours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

#: Anchors of each level of an 800 x 800 image with strides 8 to 128, one anchor a location.
LEVEL_SIZES = (10000, 2500, 625, 169, 49)

#: Shapes of a ground truth's losses, see `make_losses`.
LOSS_SHAPES = ("bimodal", "unimodal", "outlier", "equal", "two", "one", "heavy", "float16")


class Batch(NamedTuple):
    """The arguments of `paa_reassign_batch`: lists with one entry per image."""

    pos_losses: list[Tensor]
    label: list[Tensor]
    label_weight: list[Tensor]
    bbox_weight: list[Tensor]
    pos_inds: list[Tensor]
    pos_gt_inds: list[Tensor]
    anchors: list[list[int]]
    num_classes: int
    num_gts: list[int]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return self[:7]

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that belong to the data."""
        return {"num_classes": self.num_classes, "num_gts": self.num_gts}

    def to(self, device: torch.device | str) -> Batch:
        columns = ([tensor.to(device) for tensor in column] for column in self[:6])
        return Batch._make([*columns, *self[6:]])


def make_losses(shape: str, size: int, rng: np.random.Generator) -> Array:
    """The losses of one ground truth: float64 [size]. The shapes "one" and "two" have [1] and [2]."""
    if shape not in LOSS_SHAPES:
        raise ValueError(f"`shape` must be one of {', '.join(LOSS_SHAPES)}, got {shape!r}")
    size = {"two": 2, "one": 1}.get(shape, size)
    if shape == "bimodal":
        centre = np.where(rng.random(size) < rng.uniform(0.2, 0.8), rng.uniform(0.3, 1), rng.uniform(1.5, 3))
        return np.abs(centre + rng.normal(size=size) * rng.uniform(0.02, 0.3))
    if shape == "outlier" and size > 0:
        losses = 3 + rng.normal(size=size) * 1e-3
        losses[rng.integers(size)] += rng.uniform(5, 24)
        return losses
    if shape == "equal":
        return np.full(size, rng.uniform(0.1, 5))
    if shape == "heavy":
        return np.abs(rng.standard_t(1.5, size))
    losses = np.abs(rng.normal(2, 0.5, size))
    return losses.astype(np.float16).astype(np.float64) if shape == "float16" else losses


def make_batch(
    num_gts: Sequence[int],
    rng: np.random.Generator,
    shapes: Sequence[str] = LOSS_SHAPES,
    sizes: tuple[int, int] = (2, 60),
    scales: tuple[float, float] = (1.0, 1.0),
    level_sizes: Sequence[int] = LEVEL_SIZES,
    num_classes: int = 80,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Random images with these numbers of ground truths.

    Each ground truth draws a loss shape from `shapes`, a number of potential positives from `sizes`, and a scale from `scales`
    (log-uniform). Its anchors are drawn level by level, more often from the lower levels. `pos_inds` ascends.
    """
    if len(num_gts) == 0:
        raise ValueError("`num_gts` must have an entry for each image, got none")
    images = [
        _make_image(num_gt, rng, shapes, sizes, scales, level_sizes, num_classes, dtype) for num_gt in num_gts
    ]  # fmt: skip
    columns = map(list, zip(*images, strict=True))
    return Batch._make([*columns, [list(level_sizes)] * len(num_gts), num_classes, list(num_gts)])


def _make_image(
    num_gt: int,
    rng: np.random.Generator,
    shapes: Sequence[str],
    sizes: tuple[int, int],
    scales: tuple[float, float],
    level_sizes: Sequence[int],
    num_classes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    scale = np.exp(rng.uniform(np.log(scales[0]), np.log(scales[1]), num_gt))
    rows = [
        make_losses(shapes[int(rng.integers(len(shapes)))], int(rng.integers(*sizes, endpoint=True)), rng) * scale[gt]
        for gt in range(num_gt)
    ]
    anchors, gt_of = sum(level_sizes), np.repeat(np.arange(num_gt), [len(row) for row in rows])
    potential = len(gt_of)
    if potential > anchors:
        raise ValueError(f"`num_gts` and `sizes` must fit {anchors} anchors, got {potential} potential positives")
    # Sampled without replacement, anchors of a level of n with probability ~ sqrt(n) / n: all levels take part.
    probability = np.concatenate([np.full(size, size**-0.5) for size in level_sizes if size])
    inds = rng.choice(anchors, potential, replace=False, p=probability / probability.sum())
    order = np.argsort(inds)
    losses = np.concatenate(rows)[order] if rows else np.zeros(0)
    pos_inds, pos_gt_inds = torch.from_numpy(inds[order]), torch.from_numpy(gt_of[order])
    # From numpy, here and below: no default device or dtype of torch changes it.
    label = torch.from_numpy(np.full(anchors, num_classes, np.int64))
    label[pos_inds] = torch.from_numpy(rng.integers(num_classes, size=num_gt))[pos_gt_inds] if num_gt else label[:0]
    label_weight, bbox_weight = (
        torch.from_numpy(array) for array in (np.ones(anchors, np.float32), np.zeros((anchors, 4), np.float32))
    )
    bbox_weight[pos_inds] = 1
    return torch.from_numpy(losses).to(dtype), label, label_weight, bbox_weight, pos_inds, pos_gt_inds


def make_noisy_label_losses(
    size: int, noise: float, rng: np.random.Generator, *, symmetric: bool = True, late: bool = False
) -> Array:
    """Cross entropies of `size` samples, scaled to [0, 1] as methods for noisy labels do. A share `noise` has wrong labels.

    With `symmetric`, a wrong label is any class. Otherwise it is the most similar class, and its loss is lower. After the warm-up
    of a training, the losses of right and wrong labels overlap. With `late`, they are far apart. Then the losses of right labels
    are near zero, and the model has learnt some wrong labels.
    """
    wrong = rng.random(size) < noise
    if late:
        right = rng.gamma(0.6, 0.15, size)
        other = rng.normal(6.0 if symmetric else 4.0, 1.5, size)
        learnt = rng.random(size) < (0.05 if symmetric else 0.15)
        losses = np.where(wrong & ~learnt, other, right)
    else:
        losses = np.where(wrong, rng.normal(3.0 if symmetric else 2.2, 0.7, size), rng.gamma(2.0, 0.45, size))
    losses = np.abs(losses)
    shifted: Array = (losses - losses.min()) / (losses.max() - losses.min())
    return shifted


class Predictions(NamedTuple):
    """The tensors of `score_voting_batch`: lists with one entry per image."""

    det_bboxes: list[Tensor]
    det_labels: list[Tensor]
    mlvl_bboxes: list[Tensor]
    mlvl_nms_scores: list[Tensor]

    def to(self, device: torch.device | str) -> Predictions:
        return Predictions._make([tensor.to(device) for tensor in column] for column in self)


def make_predictions(
    shapes: Sequence[tuple[int, int]],
    rng: np.random.Generator,
    num_classes: int = 80,
    share: float = 0.3,
    size: float = 1333.0,
    dtype: torch.dtype = torch.float32,
) -> Predictions:
    """Random images with these numbers of detections and of boxes before NMS.

    Boxes crowd around objects, about twenty around each, in an image of side `size`. A `share` of the scores is between 0.05 and
    1. The others are zero, and so is a last column for the background. A detection is one of the boxes, with a class for which it
    has a score, if it has any. So it votes for itself.
    """
    images = [_make_predictions(*shape, rng, num_classes, share, size, dtype) for shape in shapes]
    return Predictions._make(map(list, zip(*images, strict=True)))


def _make_predictions(
    detections: int, boxes: int, rng: np.random.Generator, num_classes: int, share: float, size: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    objects = max(boxes // 20, 1)
    side = np.exp(rng.uniform(np.log(size / 40), np.log(size / 2), (objects, 2)))
    corner = rng.uniform(0, 1, (objects, 2)) * (size - side)
    owner = rng.integers(objects, size=boxes)
    corners = np.concatenate([corner, corner + side], 1)[owner] + rng.normal(size=(boxes, 4)) * np.tile(side, 2)[owner] * 0.1
    bboxes = torch.from_numpy(corners).to(dtype)
    score = rng.uniform(0.05, 1, (boxes, num_classes)) * (rng.random((boxes, num_classes)) < share)
    scores = torch.from_numpy(np.concatenate([score, np.zeros((boxes, 1))], 1)).to(dtype)
    if not boxes:
        det_bboxes, det_labels = (torch.from_numpy(array) for array in (np.ones((detections, 5)), np.zeros(detections, np.int64)))
        return det_bboxes.to(dtype), det_labels, bboxes, scores
    chosen = torch.from_numpy(rng.integers(boxes, size=detections))
    best, label = (scores[chosen, :-1] * torch.from_numpy(rng.random((detections, num_classes)))).max(1)
    return torch.cat([bboxes[chosen], best.to(dtype)[:, None]], 1), label, bboxes, scores


def make_anchors(shapes: Sequence[tuple[int, int]], stride: int = 8, scale: int = 8) -> list[Tensor]:
    """PAA's anchors: per level Tensor[H * W, 4], squares of `scale` strides; each level has twice the stride."""
    levels = []
    for level, (height, width) in enumerate(shapes):
        step = float(stride * 2**level)
        y, x = (torch.from_numpy(axis).flatten() for axis in np.indices((height, width), np.float32))
        centre = torch.stack([x, y], 1) * step + (step - 1) / 2
        levels.append(torch.cat([centre - scale * step / 2, centre + scale * step / 2], 1))
    return levels


def make_boxes(number: int, extent: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """Tensor[number, 4] float32: boxes of all sizes, log-uniform from 4 pixels, in an image of this width and height."""
    centre = rng.random((number, 2)) * extent
    half = 0.5 * np.exp(rng.uniform(np.log(4), np.log(max(extent)), (number, 2)))
    return torch.from_numpy(np.concatenate([centre - half, centre + half], 1)).float()


class HeadBatch(NamedTuple):
    """The arguments of `candidate_losses`: lists with one entry per level, then with one per image."""

    anchors: list[Tensor]
    cls_scores: list[Tensor]
    bbox_preds: list[Tensor]
    label: list[Tensor]
    label_weight: list[Tensor]
    bbox_target: list[Tensor]
    bbox_weight: list[Tensor]
    pos_inds: list[Tensor]

    def to(self, device: torch.device | str) -> HeadBatch:
        return HeadBatch._make([tensor.to(device) for tensor in column] for column in self)


def make_head_batch(
    potential: Sequence[int],
    rng: np.random.Generator,
    shapes: Sequence[tuple[int, int]] = ((13, 17), (7, 9), (4, 5)),
    num_classes: int = 7,
    error: float = 0.5,
    per_location: int = 1,
) -> HeadBatch:
    """Random float32 predictions for images with these numbers of potential positives, in random order.

    A location has `per_location` anchors. They share a corner and differ in size. Target boxes and deltas differ from the anchors
    by about `error` of their size. Labels may be background.
    """
    anchors, images = [boxes.repeat_interleave(per_location, 0) for boxes in make_anchors(shapes)], len(potential)
    for level in anchors:
        sizes = (level[:, 2:] - level[:, :2]) * torch.from_numpy(np.arange(len(level)) % per_location)[:, None] / per_location
        level[:, 2:] += sizes
    boxes = torch.cat(anchors)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape)).float()

    sizes = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return HeadBatch(
        anchors,
        [normal(images, num_classes * per_location, *shape) * 2 - 2 for shape in shapes],
        [normal(images, 4 * per_location, *shape) * 5 * error for shape in shapes],
        [torch.from_numpy(rng.integers(num_classes + 1, size=len(boxes))) for _ in potential],
        [torch.from_numpy(rng.random(len(boxes))).float() for _ in potential],
        [boxes + sizes * normal(*boxes.shape) * error * 0.3 for _ in potential],
        [torch.from_numpy(rng.random((len(boxes), 4))).float() for _ in potential],
        [torch.from_numpy(rng.permutation(len(boxes))[:number]) for number in potential],
    )


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """A context in which every operator of the library runs its Triton kernels for CPU tensors too.

    Triton itself must run on the CPU. Use its interpreter (set `TRITON_INTERPRET=1` in the environment before the first import of
    the kernels), or a driver for CPU tensors such as `ptxrun`, which executes the compiled kernels. The context holds for all
    threads of the process.

    Raises:
        RuntimeError: Triton would look for a GPU.
    """
    import triton

    from paa_gpu import _dispatch

    if not triton.knobs.runtime.interpret:
        try:
            device = triton.runtime.driver.active.get_active_torch_device()
        except RuntimeError:  # no driver at all
            device = None
        if device is None or device.type != "cpu":
            raise RuntimeError(
                "triton_on_cpu() must run under Triton's interpreter (TRITON_INTERPRET=1) or an active ptxrun session"
            )
    with _dispatch.kernels_on_cpu():
        yield
