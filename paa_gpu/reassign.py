"""Probabilistic anchor assignment: from the losses of the potential positives to the targets of the detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._checks import FLOATS, INDICES, LIST, check_int, check_list, check_option, check_tensor, check_values, level_sizes_of
from .em import COVARIANCE_TYPES
from .mixture import GaussianMixture1D
from .separation import SCHEMES

__all__ = ["Reassignment", "paa_reassign", "paa_reassign_batch"]

Anchors = Sequence[Tensor] | Sequence[int]
Separation = str | Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

SINGLETONS = ("background", "positive")

# The tensors of an image, and their dtypes.
_NAMES = ("pos_losses", "label", "label_weight", "bbox_weight", "pos_inds", "pos_gt_inds")
_DTYPES: Sequence[Sequence[torch.dtype]] = (FLOATS, (torch.int64,), FLOATS, FLOATS, INDICES, INDICES)


class Reassignment(NamedTuple):
    """The targets of a batch of B images after reassignment, all on the device of the inputs."""

    label: list[Tensor]  #: per image Tensor[A] int64
    label_weight: list[Tensor]  #: per image Tensor[A]
    bbox_weight: list[Tensor]  #: per image Tensor[A, 4]
    num_pos: Tensor  #: Tensor[B] int64, positives of each image
    fit: GaussianMixture1D  #: the mixtures of all G ground truths of the batch, image after image
    fit_image: Tensor  #: Tensor[G] int64, the image of each row of `fit`
    fit_gt: Tensor  #: Tensor[G] int64, the ground truth of each row within its image
    positive: list[Tensor]  #: per image BoolTensor[P], which entries of `pos_inds` are positive
    ignored: list[Tensor]  #: per image BoolTensor[P], which entries of `pos_inds` are ignored


def paa_reassign(
    pos_losses: Tensor,
    label: Tensor,
    label_weight: Tensor,
    bbox_weight: Tensor,
    pos_inds: Tensor,
    pos_gt_inds: Tensor,
    anchors: Anchors,
    *,
    num_classes: int,
    topk: int = 9,
    covariance_type: str = "diag",
    separation: Separation = "mmdet",
    singleton: str = "background",
    precision: str = "auto",
    num_gt: int | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Reassign the anchors of one image: a drop-in for `PAAHead.paa_reassign` of mmdetection.

    Args:
        pos_losses: Tensor[P] float16, bfloat16, float32 or float64, loss of each potential positive.
        label: Tensor[A] int64, class of each anchor; background is `num_classes`.
        label_weight: Tensor[A] floating, classification weight.
        bbox_weight: Tensor[A, 4] floating, regression weight.
        pos_inds: Tensor[P] int64 or int32, anchor index of each potential positive; unique, in any order.
        pos_gt_inds: Tensor[P] int64 or int32, ground truth of each potential positive, from 0.
        anchors: one entry per pyramid level: Tensor[A_l, 4], or the number of anchors A_l.
        num_classes: the label of background.
        topk: the most candidates of a ground truth on each level.
        covariance_type: "diag", "full" or "spherical", which are the same in one dimension; or "tied".
        separation: "mmdet", "paper", "a", "b" or "d" (see `paa_gpu.separation`), or a function. The function gets the padded
            batch, `(assignment: BoolTensor[G, K], score: Tensor[G, K], loss: Tensor[G, K], mask: BoolTensor[G, K])`. It returns
            `(positive, ignored)`, two BoolTensor[G, K]. It runs once. The library drops what it marks outside `mask`. A candidate
            that it marks as both is positive.
        singleton: the rule for a ground truth with one candidate. "background": it gets no positive (mmdetection). "positive":
            its candidate is positive (the authors' repository).
        precision: of the fit. "float64"; "float32"; "mixed"; or "auto". "mixed" decides as "float64" does. Kernels then fit in
            float32, and once more in float64 where float32 is not sure of a decision (`docs/options.md`). "auto" is "mixed" on
            GPUs with slow float64, and "float64" elsewhere. For CPU tensors, both are "float64".
        num_gt: ground truths of the image. None: the largest of `pos_gt_inds` plus one. Reading it waits for the device.
        validate: check the values too. This waits for the device.

    Returns:
        `(label, label_weight, bbox_weight, num_pos)`. The first three are copies of the targets. A potential positive that did
        not become positive has label `num_classes` and bbox_weight 0. An ignored one also has label_weight 0. `num_pos` is the
        number of positives, an int. Reading it waits for the device once.

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype or device; `topk` < 1; an unknown option. With `validate`, a
            ValueError names the position of an index out of range or repeated, a label outside [0, num_classes], or a loss that
            is not finite.

    Ties: equal losses are ordered by anchor index. Scores within 1e-9 tie; the lower (loss, anchor index) wins. A ground truth
    with a loss that is not finite among its candidates gets no positives. Others are not affected. P = 0 returns copies and 0.

    Without `validate`, an index out of range is left out. An anchor may occur twice. It becomes background if none of its
    potential positives is positive, and gets label_weight 0 if any of them is ignored, as published. A ground truth still has at
    most the K candidates of `select_candidates`. The function does not modify its inputs, and records no graph.

    Source: PAA (arXiv 2007.08103), section 3.2.
    """
    image: Sequence[Tensor] = (pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds)
    options = (num_classes, topk, covariance_type, separation, singleton, precision)
    sizes = level_sizes_of("anchors", anchors)
    _check_image(image, sizes, _DTYPES, None, "")
    check_options(*options)
    if num_gt is not None:
        check_int("num_gt", num_gt, 0)
    image = _ops.detached(image)
    number: Any = num_gt  # without one, the operator itself counts
    if number is None and (validate or callable(separation)):
        (number,) = _ops.count_gts(image[-1:])
    if validate:
        check_values(image, number, num_classes, "")
    if callable(separation):
        results = _with_callable([[tensor] for tensor in image], sizes, [number], *options)
    else:
        results = _ops.paa_reassign(*image, sizes, number, *options)
    return results[0], results[1], results[2], int(results[3].item())


def paa_reassign_batch(
    pos_losses: Sequence[Tensor],
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    anchors: Anchors | Sequence[Anchors],
    *,
    num_classes: int,
    topk: int = 9,
    covariance_type: str = "diag",
    separation: Separation = "mmdet",
    singleton: str = "background",
    precision: str = "float64",
    num_gts: Sequence[int] | None = None,
    validate: bool = False,
) -> Reassignment:
    """Reassign the anchors of a batch of images at once. For each image, the result equals that of `paa_reassign`.

    Args:
        pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds: lists with one tensor per image. Shapes and dtypes
            are those of `paa_reassign`. A list has one dtype.
        anchors: one list of levels (Tensor[A_l, 4] or ints) for all images, or a list of such lists, one per image.
        num_gts: ground truths of each image. None: the call reads the largest `pos_gt_inds` of each image, and waits once.
        num_classes, topk, covariance_type, separation, singleton, precision, validate: as in `paa_reassign`. If
            `separation` is a function, it gets the ground truths of all images at once. The default of `precision` is "float64",
            because the result holds the parameters of the fits. With "mixed" and "auto", they may have float32's accuracy.

    Returns:
        `Reassignment`. With `num_gts`, and without `validate`, nothing waits for the device, and a CUDA graph can capture the
        call. Make the call once before the capture. It compiles the kernels and reserves the pinned memory that replays read.

    Raises:
        TypeError, ValueError: as `paa_reassign`, with the number of the image; lists that are empty or differ in length.

    An image without potential positives keeps its targets. Its `num_pos` is 0. Source: PAA (arXiv 2007.08103), section 3.2.
    """
    check_list("pos_losses", pos_losses)
    images = len(pos_losses)
    columns = [pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds]
    for name, column in zip(_NAMES, columns, strict=True):
        check_list(name, column, length=images)
    if num_gts is not None:
        check_list("num_gts", num_gts, length=images)
    options = (num_classes, topk, covariance_type, separation, singleton, precision)
    sizes = _levels_of_images(anchors, images)
    dtypes, device = _DTYPES, None
    for i in range(images):
        image = [column[i] for column in columns]
        _check_image(image, sizes[i], dtypes, device, f"[{i}]")
        if i == 0:  # the others have its dtypes and device
            dtypes, device = tuple((tensor.dtype,) for tensor in image), image[0].device
    check_options(*options)
    for i, num_gt in enumerate(num_gts or ()):
        check_int(f"num_gts[{i}]", num_gt, 0)
    checked = [_ops.detached(column) for column in columns]
    num_gts = num_gts or _ops.count_gts(checked[-1])
    if validate:
        for i in range(images):
            check_values([column[i] for column in checked], num_gts[i], num_classes, f"[{i}]")
    results = reassignment_of(checked, [size for levels in sizes for size in levels], num_gts, *options)
    anchors_of, potential = ([tensor.shape[0] for tensor in checked[i]] for i in (1, 4))
    return Reassignment(
        _split(results[0], anchors_of),
        _split(results[1], anchors_of),
        _split(results[2], anchors_of),
        results[3],
        GaussianMixture1D._make([*results[4:11], covariance_type]),
        results[11],
        results[12],
        _split(results[13], potential),
        _split(results[14], potential),
    )


def _split(result: Tensor, sizes: list[int]) -> list[Tensor]:
    """The part of each image."""
    return [result] if len(sizes) == 1 else list(result.split_with_sizes(sizes))


def _levels_of_images(anchors: Anchors | Sequence[Anchors], images: int) -> list[list[int]]:
    """The level sizes of each image. Each image gets as many levels. A level without anchors changes nothing."""
    if not isinstance(anchors, LIST) or not anchors or not isinstance(anchors[0], LIST):
        return [level_sizes_of("anchors", anchors)] * images
    check_list("anchors", anchors, length=images)
    sizes = [level_sizes_of(f"anchors[{image}]", levels) for image, levels in enumerate(anchors)]
    most = max(len(levels) for levels in sizes)
    return [levels + [0] * (most - len(levels)) for levels in sizes]


def check_options(
    num_classes: int, topk: int, covariance_type: str, separation: Separation, singleton: str, precision: str
) -> None:
    check_int("num_classes", num_classes, 1)
    check_scheme(topk, covariance_type, separation, singleton)
    check_option("precision", precision, _ops.PRECISIONS)


def check_scheme(topk: int, covariance_type: str, separation: Separation, singleton: str) -> None:
    check_int("topk", topk, 1)
    check_option("covariance_type", covariance_type, COVARIANCE_TYPES)
    if not callable(separation):
        check_option("separation", separation, SCHEMES)
    check_option("singleton", singleton, SINGLETONS)


def reassignment_of(
    columns: Sequence[Sequence[Tensor]],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    num_classes: int,
    topk: int,
    covariance_type: str,
    separation: Separation,
    singleton: str,
    precision: str,
) -> tuple[Tensor, ...]:
    """The results of the operator `paa_reassign_batch` for tensors and options that were checked, or cannot be wrong."""
    options = level_sizes, num_gts, num_classes, topk, covariance_type, separation, singleton, precision
    if callable(separation):
        return _with_callable(columns, *options)
    results: tuple[Tensor, ...] = _ops.paa_reassign_batch(*columns, *options)
    return results


def _with_callable(
    columns: Sequence[Sequence[Tensor]],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    num_classes: int,
    topk: int,
    covariance_type: str,
    separation: Any,
    singleton: str,
    precision: str,
) -> tuple[Tensor, ...]:
    """The results of the operator `paa_reassign_batch`, with a caller's scheme between two operators."""
    pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds = columns
    loss, index, count, assignment, score, *fit, fit_image, fit_gt = _ops.fit_candidates(
        pos_losses, pos_inds, pos_gt_inds, level_sizes, num_gts, topk, covariance_type, precision
    )
    masks = _separate(separation, singleton, loss, count, assignment, score, fit[-1])
    *targets, positive, ignored = _ops.write_targets(label, label_weight, bbox_weight, pos_inds, index, *masks, num_classes)
    return *targets, *fit, fit_image, fit_gt, positive, ignored


def _check_image(
    image: Sequence[Tensor],
    level_sizes: Sequence[int],
    dtypes: Sequence[Sequence[torch.dtype]],
    device: torch.device | None,
    end: str,
) -> None:
    """The six tensors of an image, whose names end in `end`; device: see `check_tensor`."""
    pos_losses, label, label_weight, bbox_weight, pos_inds, pos_gt_inds = image
    check_tensor("pos_losses" + end, pos_losses, (None,), dtypes[0], device)
    potential, device = pos_losses.shape, pos_losses.device
    check_tensor("label" + end, label, (None,), dtypes[1], device)
    anchors = label.shape
    check_tensor("label_weight" + end, label_weight, anchors, dtypes[2], device)
    check_tensor("bbox_weight" + end, bbox_weight, (*anchors, 4), dtypes[3], device)
    check_tensor("pos_inds" + end, pos_inds, potential, dtypes[4], device)
    check_tensor("pos_gt_inds" + end, pos_gt_inds, potential, dtypes[5], device)
    if sum(level_sizes) != anchors[0]:
        raise ValueError(f"`anchors` must hold {anchors[0]} anchors over all levels as `label{end}` does, got {sum(level_sizes)}")


def _separate(
    separation: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    singleton: str,
    loss: Tensor,
    count: Tensor,
    assignment: Tensor,
    score: Tensor,
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a caller's scheme over the padded batch: (positive, ignored), both BoolTensor[G, K]."""
    position = torch.arange(loss.shape[1], device=loss.device)
    mask = (position < count[:, None]) & valid[:, None]
    alone = (count == 1)[:, None] & (position == 0) & loss.to(score.dtype).isfinite()  # as the fit takes it
    masks = separation(assignment, score, loss, mask.clone())  # it may change its arguments
    if not isinstance(masks, tuple) or len(masks) != 2:  # type: ignore[redundant-expr]  # a caller's
        raise TypeError(f"`separation` must return a tuple (positive, ignored), got {type(masks).__name__}")
    for name, candidates in zip(("positive", "ignored"), masks, strict=True):
        check_tensor(f"separation: {name}", candidates, tuple(loss.shape), (torch.bool,), loss.device)
    positive = masks[0] & mask
    if singleton == "positive":
        positive = positive | alone
    return positive, masks[1] & mask & ~positive
