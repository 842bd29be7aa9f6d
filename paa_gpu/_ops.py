"""The `torch.library` contracts: schema, fake, and which implementation runs where.

Each function below is the contract of one operator. Its annotations are the schema. Its docstring describes the results. Its body
makes empty results (the fake). The default implementation uses Triton (`kernels/`). CPU tensors use numba (`paa_gpu/cpu/`). Both
are functions of the same name and signature in the module of the capability. `_dispatch.py` registers and calls them.
Operators take arguments that the public functions have checked, and return flat tensors in new memory.

Shapes: B images, `len(level_sizes) // B` pyramid levels, A anchors and P potential positives over all images,
G = sum(num_gts) ground truths (rows, image after image), K = `max_candidates` of a row; D detections over all images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import Operator, device_alone
from .cpu._arrays import join, largest

#: The dtype of the results of a fit. "auto" is "mixed" on devices where float64 is slow, and "float64" elsewhere. Compiled loops
#: for CPU tensors fit in float64 where kernels mix.
PRECISIONS = {"auto": torch.float64, "float64": torch.float64, "float32": torch.float32, "mixed": torch.float64}

#: What `read_mixture` reads.
READOUTS = ("predict", "predict_proba", "low_probability", "score_samples", "log_likelihood")

#: Where a fit starts.
INITS = ("minmax", "quantile", "kmeans", "random")

#: tol, reg_covar and max_iter of the fit of candidates: scikit-learn's defaults, with which PAA was published.
FIT_OPTIONS = 1e-3, 1e-6, 100

#: The k-means start of two components is exact up to so many values; of longer rows so many of Lloyd's steps at most. Losses take
#: 5 to 20; each step is a launch for a long row.
EXACT, LLOYD_PASSES = 64, 50

#: How a cluster of `weighted_boxes_fusion` gets its score.
AVERAGE, OVERFLOW, MAXIMUM, BOX_AND_MODEL, ABSENT_MODEL = range(5)

#: So many numbers, and more, torch shares among its threads.
SHARED = 32_768

Fit = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def max_candidates(pos_inds: Sequence[Tensor], level_sizes: Sequence[int], topk: int) -> int:
    """K: the most candidates of a ground truth of the batch. The host knows it, so a huge `topk` costs no memory."""
    levels = len(level_sizes) // len(pos_inds)
    return max(
        min(inds.shape[0], sum(min(topk, size) for size in level_sizes[image * levels : (image + 1) * levels]))
        for image, inds in enumerate(pos_inds)
    )


def count_gts(pos_gt_inds: list[Tensor]) -> list[int]:
    """The largest index of each image plus one. Reading it waits for the device once. numpy finds it on the CPU: see
    `cpu/_arrays.py`."""
    if not torch.compiler.is_compiling() and device_alone(pos_gt_inds) == "cpu":
        return [largest(inds) + 1 for inds in pos_gt_inds]
    most = [inds.max() for inds in pos_gt_inds if inds.shape[0]]
    found = iter([most[0].item()] if len(most) == 1 else torch.stack(most).tolist() if most else ())
    return [max(int(next(found)) + 1, 0) if inds.shape[0] else 0 for inds in pos_gt_inds]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one after the other, without their graphs. A single one stays where it is. numpy joins many numbers on the CPU:
    see `cpu/_arrays.py`."""
    parts = detached(tensors)
    if len(parts) == 1:
        return parts[0]
    small = torch.compiler.is_compiling() or sum(map(Tensor.numel, parts)) < SHARED
    return torch.cat(parts) if small or device_alone(parts) != "cpu" else join(parts)


def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without their graphs. One without a graph stays as it is, which saves a call."""
    return [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]


def sum_tolerance(weights_init: Tensor | None) -> float:
    """The largest distance of a sum of given weights from 1: 8 units in the last place of their original type."""
    return 0.0 if weights_init is None else max(1e-6, 8 * torch.finfo(weights_init.dtype).eps)


def empty_fit(like: Tensor, rows: int, precision: str, n_components: int = 2) -> Fit:
    """weights, means, variances [G, n_components]; lower_bound, n_iter, converged, valid [G]."""
    dtype = PRECISIONS[precision]
    return (
        like.new_empty((rows, n_components), dtype=dtype),
        like.new_empty((rows, n_components), dtype=dtype),
        like.new_empty((rows, n_components), dtype=dtype),
        like.new_empty(rows, dtype=dtype),
        like.new_empty(rows, dtype=torch.int64),
        like.new_empty(rows, dtype=torch.bool),
        like.new_empty(rows, dtype=torch.bool),
    )


def empty_answer(x: Tensor, weights: Tensor, what: str) -> Tensor:
    """The result of `read_mixture`."""
    if what == "log_likelihood":
        return weights.new_empty(weights.shape[0])
    if what == "predict":
        return weights.new_empty(x.shape, dtype=torch.int64)
    return weights.new_empty((*x.shape, weights.shape[1]) if what == "predict_proba" else x.shape)


def _operator(stem: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make an operator of a contract. Its implementations are in the modules of this name."""
    return functools.partial(Operator, stem)


@_operator("topk")
def select_candidates(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [G, K] ascending, then +inf; index [G, K] into the concatenated pos_inds, then -1; count [G]."""
    rows, width = sum(num_gts), max_candidates(pos_inds, level_sizes, topk)
    like = pos_losses[0]
    return (
        like.new_empty((rows, width)),
        like.new_empty((rows, width), dtype=torch.int64),
        like.new_empty(rows, dtype=torch.int64),
    )


@_operator("em")
def fit_gmm_1d(
    x: Tensor,
    count: Tensor | None,
    lengths: Sequence[int] | None,
    weights_init: Tensor | None,
    means_init: Tensor | None,
    precisions_init: Tensor | None,
    covariance_type: str,
    tol: float,
    reg_covar: float,
    max_iter: int,
    precision: str,
    n_components: int = 2,
    init: str = "minmax",
    n_init: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fit the rows of `x` [G, K], the first `count` [G] of each, or of flat `x` [sum(lengths)]: see `empty_fit`.

    weights_init and means_init are [1 or G, n_components], as is precisions_init, or [1 or G, 1] where tied. `init` is one of
    `INITS`; `n_init` and `seed`, in [0, 2^63), matter for "random" only.
    """
    return empty_fit(x, x.shape[0] if lengths is None else len(lengths), precision, n_components)


@_operator("mixture")
def read_mixture(
    x: Tensor,
    count: Tensor | None,
    lengths: Sequence[int] | None,
    weights: Tensor,
    means: Tensor,
    variances: Tensor,
    what: str,
) -> Tensor:
    """One of `READOUTS` for the rows of `x`, which are those of `fit_gmm_1d`; the parameters are [G, components].

    predict: int64, -1 where x is not finite, or no density is a number; predict_proba: shape of `x` and a last dimension for the
    components;
    low_probability, that of the smallest mean, and score_samples: shape of `x`; NaN, or -1, at padding. log_likelihood: [G],
    the sum of score_samples over a row. All but labels are of the dtype of the parameters.
    """
    return empty_answer(x, weights, what)


@_operator("reassign")
def paa_reassign_batch(
    pos_losses: Sequence[Tensor],
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    num_classes: int,
    topk: int,
    covariance_type: str,
    separation: str,
    singleton: str,
    precision: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """Label [A], label_weight [A], bbox_weight [A, 4], num_pos [B]; the fit; fit_image, fit_gt [G]; positive, ignored [P]."""
    rows = sum(num_gts)
    return (
        *empty_targets(label, label_weight, bbox_weight),
        *empty_fit(pos_losses[0], rows, precision),
        *_empty_rows(label[0], rows),
        *empty_masks(pos_inds),
    )


@_operator("reassign")
def paa_reassign(
    pos_losses: Tensor,
    label: Tensor,
    label_weight: Tensor,
    bbox_weight: Tensor,
    pos_inds: Tensor,
    pos_gt_inds: Tensor,
    level_sizes: Sequence[int],
    num_gt: int | None,
    num_classes: int,
    topk: int,
    covariance_type: str,
    separation: str,
    singleton: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The targets of one image, without what only a caller of `paa_reassign_batch` sees: label [A], label_weight [A],
    bbox_weight [A, 4], num_pos [1]. Their sizes do not depend on `num_gt`, so None, see `count_gts`, is left to the operator."""
    return empty_targets([label], [label_weight], [bbox_weight])


@_operator("reassign")
def fit_candidates(
    pos_losses: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    pos_gt_inds: Sequence[Tensor],
    level_sizes: Sequence[int],
    num_gts: Sequence[int],
    topk: int,
    covariance_type: str,
    precision: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor,
]:  # fmt: skip
    """loss, index, count as `select_candidates`; assignment [G, K] (True: foreground), score [G, K]; the fit; fit_image, fit_gt.

    assignment is False and score -inf at padding and in rows that are not valid.
    """
    rows, width = sum(num_gts), max_candidates(pos_inds, level_sizes, topk)
    like = pos_losses[0]
    return (
        like.new_empty((rows, width)),
        like.new_empty((rows, width), dtype=torch.int64),
        like.new_empty(rows, dtype=torch.int64),
        like.new_empty((rows, width), dtype=torch.bool),
        like.new_empty((rows, width), dtype=PRECISIONS[precision]),
        *empty_fit(like, rows, precision),
        *_empty_rows(like, rows),
    )


@_operator("reassign")
def write_targets(
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    index: Tensor,
    candidate_positive: Tensor,
    candidate_ignored: Tensor,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Label [A], label_weight [A], bbox_weight [A, 4], num_pos [B], positive, ignored [P], from the masks [G, K] of `index`."""
    return (*empty_targets(label, label_weight, bbox_weight), *empty_masks(pos_inds))


def empty_losses(scores: Tensor, deltas: Tensor, targets: Tensor, pos_inds: Sequence[Tensor]) -> Tensor:
    """Loss [P]: float64 if the maps or the targets are, else float32."""
    wide = torch.float64 in (scores.dtype, deltas.dtype, targets.dtype)
    return scores.new_empty(sum(inds.shape[0] for inds in pos_inds), dtype=torch.float64 if wide else torch.float32)


def box_numbers(wh_ratio_clip: float, convention: str) -> tuple[float, float, float, float]:
    """Least and most logarithm of a decoded box's scale; the least area of the GIoU, and what is added to its denominators."""
    most = abs(math.log(wh_ratio_clip))
    return (-most, most, 1e-6, 0.0) if convention == "mmdet" else (-math.inf, most, -math.inf, 1e-7)


@_operator("losses")
def candidate_losses(
    anchors: Sequence[Tensor],
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_target: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    gamma: float,
    alpha: float,
    loss_cls_weight: float,
    loss_bbox_weight: float,
    stds: Sequence[float],
    wh_ratio_clip: float,
    box_loss: str,
    convention: str,
) -> Tensor:
    """Loss [P] of the potential positives of all images; NaN at an index out of range. See `empty_losses`."""
    return empty_losses(cls_scores[0], bbox_preds[0], label_weight[0], pos_inds)


@_operator("assign")
def assign_max_iou(
    anchors: Sequence[Tensor],
    gt_bboxes: Sequence[Tensor],
    gt_bboxes_ignore: Sequence[Tensor],
    valid: Sequence[Tensor],
    per_image: bool,
    pos_iou_thr: float,
    neg_iou_thr: float,
    min_pos_iou: float,
    ignore_iof_thr: float,
    eps: float,
    match_low_quality: bool,
    gt_max_assign_all: bool,
    low_quality: str,
) -> tuple[Tensor, Tensor]:
    """gt_inds int64 and max_overlaps float32, both [A] of all images. `gt_bboxes_ignore` and `valid` may be empty lists.

    `anchors` are the levels of all images, or, `per_image`, as many levels of each image, one image after the other.
    """
    anchors_of_batch = sum(level.shape[0] for level in anchors) * (1 if per_image else len(gt_bboxes))
    return (
        gt_bboxes[0].new_empty(anchors_of_batch, dtype=torch.int64),
        gt_bboxes[0].new_empty(anchors_of_batch, dtype=torch.float32),
    )


def empty_voted(det_bboxes: Sequence[Tensor], det_labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """det_bboxes [D, 5] and det_labels [D]."""
    detections = sum(image.shape[0] for image in det_labels)
    return det_bboxes[0].new_empty((detections, 5)), det_labels[0].new_empty(detections)


@_operator("voting")
def score_voting(
    det_bboxes: Sequence[Tensor],
    det_labels: Sequence[Tensor],
    mlvl_bboxes: Sequence[Tensor],
    mlvl_nms_scores: Sequence[Tensor],
    score_thr: float,
    iou_thr: float,
    sigma: float,
    offset: float,
    keep_order: bool,
    weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """The voted det_bboxes [D, 5] and det_labels [D] of all images. Within an image by class, or in the order of the inputs.

    With `weights`, of P pools, there are P candidate tensors per image, so B * P of boxes and of scores.
    """
    return empty_voted(det_bboxes, det_labels)


@_operator("voting")
def score_voting_padded(
    det_bboxes: Tensor,
    det_labels: Tensor,
    mlvl_bboxes: Tensor,
    mlvl_nms_scores: Tensor,
    score_thr: float,
    iou_thr: float,
    sigma: float,
    offset: float,
    keep_order: bool,
) -> tuple[Tensor, Tensor]:
    """`score_voting` of B images of one size: [B, M, 5], [B, M], [B, K, 4], [B, K, C]. A compiler need not know B, M or K."""
    return det_bboxes.new_empty(det_bboxes.shape), det_labels.new_empty(det_labels.shape)


def confidence_rule(conf_type: str, allows_overflow: bool) -> int:
    if conf_type == "avg":
        return OVERFLOW if allows_overflow else AVERAGE
    return {"max": MAXIMUM, "box_and_model_avg": BOX_AND_MODEL, "absent_model_aware_avg": ABSENT_MODEL}[conf_type]


def empty_fused(boxes: Tensor, scores: Tensor, images: int, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of `weighted_boxes_fusion`."""
    return (
        boxes.new_empty((images, room, 4)),
        scores.new_empty((images, room)),
        boxes.new_empty((images, room), dtype=torch.int64),
        boxes.new_empty(images, dtype=torch.int64),
    )


def empty_detections(boxes: Tensor, scores: Tensor, images: int, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of `batched_nms`."""
    return (
        boxes.new_empty((images, room, 4)),
        scores.new_empty((images, room)),
        boxes.new_empty((images, room), dtype=torch.int64),
        boxes.new_empty((images, room), dtype=torch.int64),
        boxes.new_empty(images, dtype=torch.int64),
    )


@_operator("nms")
def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    lengths: Sequence[int] | None,
    iou_threshold: float,
    score_thr: float | None,
    nms_pre: int,
    max_per_img: int,
    method: str,
    sigma: float,
    min_score: float,
    class_agnostic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Boxes [B, M, 4], scores, labels, index into the image's boxes [B, M], count [B], then zeros, and -1 for labels and index.

    boxes [B, K, 4], scores [B, K, C], labels [B, K] with C = 1 or None; or with `lengths`, B of them, flat: [T, 4], [T, C], [T].
    M is max_per_img, or all there may be where that is 0.
    """
    images = boxes.shape[0] if lengths is None else len(lengths)
    # Not the largest length where it does not matter: it may depend on data.
    room = max_per_img or (boxes.shape[1] if lengths is None else max(lengths)) * scores.shape[-1]
    return empty_detections(boxes, scores, images, room)


def empty_targets(
    label: Sequence[Tensor], label_weight: Sequence[Tensor], bbox_weight: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    anchors = sum(image.shape[0] for image in label)
    return (
        label[0].new_empty(anchors),
        label_weight[0].new_empty(anchors),
        bbox_weight[0].new_empty((anchors, 4)),
        label[0].new_empty(len(label), dtype=torch.int64),
    )


def _empty_rows(like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(rows, dtype=torch.int64), like.new_empty(rows, dtype=torch.int64)


def empty_masks(pos_inds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    potential = sum(inds.shape[0] for inds in pos_inds)
    return pos_inds[0].new_empty(potential, dtype=torch.bool), pos_inds[0].new_empty(potential, dtype=torch.bool)


@_operator("fusion")
def weighted_boxes_fusion(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    lengths: Sequence[int],
    weights: Sequence[float],
    iou_thr: float,
    skip_box_thr: float,
    conf_type: str,
    allows_overflow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes [B, M, 4], scores, labels [B, M], count [B], then zeros, and -1 for labels. M is the most boxes of an image.

    The inputs are flat: boxes [T, 4], scores [T], labels [T], image after image, and model after model in each. There are
    B * len(weights) lengths.
    """
    models = len(weights)
    images = len(lengths) // models
    room = max(sum(lengths[image * models : (image + 1) * models]) for image in range(images))
    return empty_fused(boxes, scores, images, room)
