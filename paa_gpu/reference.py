"""The published loops. They go from ground truth to ground truth, and from detection to detection.

The tests use them as an oracle, and the benchmarks as a baseline. They are written for clarity. They are slow. Tensors may be on
any device, but the fits run on the CPU. scikit-learn is imported at the first call. There are two conventions and two precisions:

* mmdetection's `PAAHead.paa_reassign`: `covariance_type="diag"`, `separation="mmdet"`, `singleton="background"`. The authors'
  repository: `"full"`, `"paper"`, `"positive"`.
* `published=True` fits the losses without changes, as both do: in float32, and not shifted. The last bit decides ties of the
  score, and scikit-learn may raise errors. `published=False` fits in float64, minus the minimum, with the library's rule for
  ties.

Score voting is similar. `published=True` is mmdetection's `PAAHead.score_voting`. `published=False` computes in float64, with the
library's rules for boxes without voters.

`candidate_losses` and `assign_max_iou` are `PAAHead.get_pos_loss` and `MaxIoUAssigner` of mmdetection, in torch. The losses come
in any precision. The assignment uses the matrix of all overlaps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

TIE = 1e-9  # scores and densities that differ by less are equal but for rounding


class GroundTruth(NamedTuple):
    """The results for one ground truth. Indices are positions in `pos_inds`."""

    candidates: Array  #: ascending by (loss, anchor index)
    positive: Array  #: as indices, like the candidates
    ignored: Array  #: likewise
    mixture: Any  #: the fitted `sklearn.mixture.GaussianMixture`, or None
    foreground: Array  #: bool, of each candidate; empty without a fit
    score: Array  #: log-density of each candidate; empty without a fit
    margin: Array  #: difference of the components' log-densities at each candidate; empty without a fit


def paa_reassign(
    pos_losses: Tensor,
    label: Tensor,
    label_weight: Tensor,
    bbox_weight: Tensor,
    pos_inds: Tensor,
    pos_gt_inds: Tensor,
    anchors: Sequence[Tensor] | Sequence[int],
    *,
    num_classes: int,
    topk: int = 9,
    covariance_type: str = "diag",
    separation: str = "mmdet",
    singleton: str = "background",
    published: bool = False,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`PAAHead.paa_reassign` of mmdetection. Arguments and results are those of `paa_gpu.paa_reassign`."""
    label, label_weight, bbox_weight = label.clone(), label_weight.clone(), bbox_weight.clone()
    positive = np.zeros(len(pos_inds), bool)
    for gt in ground_truths(
        pos_losses, pos_inds, pos_gt_inds, anchors, topk=topk, covariance_type=covariance_type,
        separation=separation, singleton=singleton, published=published,
    ):  # fmt: skip
        positive[gt.positive] = True
        label_weight[pos_inds[gt.ignored]] = 0
    # By anchor, as published: one that occurs twice is background where it is never positive.
    negative = pos_inds[~torch.isin(pos_inds, pos_inds[positive])]
    label[negative] = num_classes
    bbox_weight[negative] = 0
    return label, label_weight, bbox_weight, int(positive.sum())


def ground_truths(
    pos_losses: Tensor,
    pos_inds: Tensor,
    pos_gt_inds: Tensor,
    anchors: Sequence[Tensor] | Sequence[int],
    *,
    topk: int = 9,
    covariance_type: str = "diag",
    separation: str = "mmdet",
    singleton: str = "background",
    published: bool = False,
) -> Iterator[GroundTruth]:
    """Treat one ground truth after the other."""
    losses = pos_losses.detach().cpu().numpy()
    inds, gts = pos_inds.cpu().numpy(), pos_gt_inds.cpu().numpy()
    bounds = np.cumsum([0] + [level if isinstance(level, int) else len(level) for level in anchors])
    level = np.searchsorted(bounds, inds, side="right") - 1
    nothing = np.arange(0)
    for gt in range(gts.max() + 1 if len(gts) else 0):
        candidates = select(np.flatnonzero(gts == gt), losses, inds, level, topk)
        x = losses[candidates].astype(losses.dtype if published else np.float64)
        if not np.isfinite(x).all() and not published:
            yield GroundTruth(candidates, nothing, nothing, None, nothing, nothing, nothing)
        elif len(x) < 2:
            kept = candidates if singleton == "positive" else nothing
            yield GroundTruth(candidates, kept, nothing, None, nothing, nothing, nothing)
        else:
            x = x if published else x - x.min()
            mixture = fit(x, covariance_type)
            with np.errstate(divide="ignore"):
                log_resp = np.log(mixture.predict_proba(x[:, None]))
            margin = log_resp[:, 0] - log_resp[:, 1]
            score = mixture.score_samples(x[:, None])
            tie = 0 if published else TIE
            foreground = margin >= -tie
            positive, ignored = separate(foreground, score, separation, tie)
            yield GroundTruth(candidates, candidates[positive], candidates[ignored], mixture, foreground, score, margin)


def select(members: Array, losses: Array, inds: Array, level: Array, topk: int) -> Array:
    """The `topk` smallest losses of each level, then all of them, ascending by (loss, anchor index)."""
    members = members[np.lexsort((inds[members], losses[members]))]
    levels = level[members]
    rank = np.zeros(len(members), int)
    for value in np.unique(levels):
        rank[levels == value] = np.arange((levels == value).sum())
    return members[rank < topk]


def fit(x: Array, covariance_type: str) -> Any:
    """scikit-learn's mixture, with PAA's start: weights 1/2, means at the extremes, precisions 1."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    shape = {"full": (2, 1, 1), "diag": (2, 1), "spherical": (2,), "tied": (1, 1)}[covariance_type]
    mixture = GaussianMixture(
        2,
        covariance_type=covariance_type,
        weights_init=np.array([0.5, 0.5]),
        means_init=np.array([[x.min()], [x.max()]]),
        precisions_init=np.ones(shape),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(x[:, None])


def separate(foreground: Array, score: Array, separation: str, tie: float) -> tuple[Array, Array]:
    """Masks of the positive and of the ignored candidates. Figure 3 of the paper, scheme by scheme."""
    position = np.arange(len(score))
    nobody = np.zeros(len(score), bool)
    if not foreground.any():
        return (~nobody if separation == "paper" else nobody), nobody

    def first_best(among: Array) -> int:
        return int(np.flatnonzero(among & (score >= score[among].max() - tie))[0])

    threshold = first_best(foreground)
    up_to_threshold = position <= threshold
    if separation == "mmdet":
        return foreground & up_to_threshold, nobody
    if separation == "paper":
        return up_to_threshold, nobody
    if separation == "a":
        return foreground, nobody
    if separation == "b":
        negative_from = len(score) if foreground.all() else first_best(~foreground)
        return up_to_threshold, ~up_to_threshold & (position < negative_from)
    assert separation == "d", separation
    return foreground & up_to_threshold, foreground & ~up_to_threshold


def score_voting(
    det_bboxes: Tensor,
    det_labels: Tensor,
    mlvl_bboxes: Tensor,
    mlvl_nms_scores: Tensor,
    score_thr: float,
    iou_thr: float = 0.01,
    sigma: float = 0.025,
    offset: float = 0.0,
    keep_order: bool = False,
    published: bool = False,
) -> tuple[Tensor, Tensor]:
    """`PAAHead.score_voting` of mmdetection. Arguments are those of `paa_gpu.score_voting`. Boxes are float64 unless `published`.

    The published form drops detections of classes without candidates, and divides 0 by 0 if there are no voters.
    """
    candidates = mlvl_nms_scores > score_thr
    if not published:
        det_bboxes, mlvl_bboxes, mlvl_nms_scores = det_bboxes.double(), mlvl_bboxes.double(), mlvl_nms_scores.double()
    box, label = candidates.nonzero(as_tuple=True)
    candidate_boxes, candidate_scores = mlvl_bboxes[box], mlvl_nms_scores[candidates]
    voted, order = [det_bboxes[:0]], [det_labels.new_empty(0, dtype=torch.int64)]
    for c in range(mlvl_nms_scores.shape[1]) if published else sorted(set(det_labels.tolist())):
        of_class = label == c
        if published and not of_class.any():
            continue
        boxes, scores = candidate_boxes[of_class], candidate_scores[of_class]
        order.append((det_labels == c).nonzero()[:, 0])
        detections = det_bboxes[order[-1]]
        for detection, ious in zip(detections, overlaps(detections[:, :4], boxes, offset), strict=True):
            voters = ious > iou_thr
            weights = (torch.exp(-((1 - ious[voters]) ** 2) / sigma) * scores[voters])[:, None]
            total = torch.sum(weights, 0)
            mean = torch.sum(weights * boxes[voters], 0) / total
            if not published and total == 0:
                mean = detection[:4]
            voted.append(torch.cat([mean, detection[4:]])[None])
    bboxes, inds = torch.cat(voted), torch.cat(order)
    if keep_order:
        bboxes, inds = bboxes[inds.argsort()], inds.sort().values
    return bboxes, det_labels[inds]


def overlaps(first: Tensor, second: Tensor, offset: float) -> Tensor:
    """IoU of every box with every other, Tensor[k, n]."""

    def area(box: Tensor) -> Tensor:
        return (box[:, 2] - box[:, 0] + offset) * (box[:, 3] - box[:, 1] + offset)

    low, high = torch.max(first[:, None, :2], second[:, :2]), torch.min(first[:, None, 2:], second[:, 2:])
    intersection = (high - low + offset).clamp(min=0).prod(-1)
    return intersection / (area(first)[:, None] + area(second) - intersection).clamp(min=1e-6)


def candidate_losses(
    anchors: Sequence[Tensor],
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    label: Sequence[Tensor],
    label_weight: Sequence[Tensor],
    bbox_target: Sequence[Tensor],
    bbox_weight: Sequence[Tensor],
    pos_inds: Sequence[Tensor],
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    loss_cls_weight: float = 1.0,
    loss_bbox_weight: float = 1.3,
    stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
    wh_ratio_clip: float = 16 / 1000,
    box_loss: str = "giou",
    convention: str = "mmdet",
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """`PAAHead.get_pos_loss` of mmdetection, image by image from permuted maps, in this dtype.

    All else is as for `paa_gpu.candidate_losses`.
    """
    classes, boxes, limit = (
        cls_scores[0].shape[1] * 4 // bbox_preds[0].shape[1],
        torch.cat(list(anchors)),
        abs(math.log(wh_ratio_clip)),
    )
    scores, deltas = (
        torch.cat([level.to(dtype).permute(0, 2, 3, 1).reshape(len(level), -1, width) for level in maps], 1)
        for maps, width in ((cls_scores, classes), (bbox_preds, 4))
    )
    losses = []
    for image, inds in enumerate(pos_inds):
        i = inds.long()
        logit, delta, anchor, target = scores[image, i], deltas[image, i], boxes[i].to(dtype), bbox_target[image][i].to(dtype)
        is_label = (label[image][i][:, None] == torch.arange(classes, device=logit.device)).to(dtype)
        p = logit.sigmoid()
        missing = (1 - p) * is_label + p * (1 - is_label)
        weight = (alpha * is_label + (1 - alpha) * (1 - is_label)) * missing**gamma
        focal = torch.nn.functional.binary_cross_entropy_with_logits(logit, is_label, weight, reduction="none").sum(1)
        weight, scale = bbox_weight[image][i].to(dtype), delta.new_tensor(stds)
        if box_loss == "l1":
            of_box = (weight * (delta - _encoded(anchor, target) / scale).abs()).sum(1)
        else:
            least = -limit if convention == "mmdet" else -math.inf
            of_box = weight.mean(1) * (1 - _giou(_decoded(anchor, delta * scale, least, limit), target, convention))
        losses.append(loss_cls_weight * label_weight[image][i].to(dtype) * focal + loss_bbox_weight * of_box)
    return losses


def _encoded(anchor: Tensor, target: Tensor) -> Tensor:
    """The deltas from anchors to targets: shifts of the centre, and logarithms of the scale."""
    size = anchor[:, 2:] - anchor[:, :2]
    shift = (target[:, :2] + target[:, 2:] - anchor[:, :2] - anchor[:, 2:]) * 0.5 / size
    return torch.cat([shift, ((target[:, 2:] - target[:, :2]) / size).log()], 1)


def _decoded(anchor: Tensor, delta: Tensor, least: float, most: float) -> Tensor:
    size = anchor[:, 2:] - anchor[:, :2]
    centre = (anchor[:, :2] + anchor[:, 2:]) * 0.5 + size * delta[:, :2]
    half = size * delta[:, 2:].clamp(least, most).exp() * 0.5
    return torch.cat([centre - half, centre + half], 1)


def _giou(boxes: Tensor, targets: Tensor, convention: str) -> Tensor:
    size = (torch.min(boxes[:, 2:], targets[:, 2:]) - torch.max(boxes[:, :2], targets[:, :2])).clamp(min=0)
    enclosing = (torch.max(boxes[:, 2:], targets[:, 2:]) - torch.min(boxes[:, :2], targets[:, :2])).clamp(min=0)
    union, whole = _area(boxes) + _area(targets) - size.prod(1), enclosing.prod(1)
    if convention == "torchvision":
        return size.prod(1) / (union + 1e-7) - (whole - union) / (whole + 1e-7)
    union, whole = union.clamp(min=1e-6), whole.clamp(min=1e-6)
    return size.prod(1) / union - (whole - union) / whole


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def assign_max_iou(
    anchors: Sequence[Any],
    gt_bboxes: Sequence[Tensor],
    gt_bboxes_ignore: Sequence[Tensor] | None = None,
    valid: Sequence[Tensor] | None = None,
    *,
    pos_iou_thr: float = 0.1,
    neg_iou_thr: float = 0.1,
    min_pos_iou: float = 0.0,
    ignore_iof_thr: float = -1.0,
    match_low_quality: bool = True,
    gt_max_assign_all: bool = True,
    low_quality: str = "gt",
    eps: float = 1e-6,
) -> tuple[list[Tensor], list[Tensor]]:
    """`MaxIoUAssigner` of mmdetection, image by image from the matrix of all overlaps, in float32.

    Arguments and results are those of `paa_gpu.assign_max_iou`.
    """
    results: tuple[list[Tensor], list[Tensor]] = [], []
    for image, boxes in enumerate(gt_bboxes):
        levels = anchors if isinstance(anchors[0], Tensor) else anchors[image]
        everything = torch.cat(list(levels)).float()
        exist = torch.ones_like(everything[:, 0], dtype=torch.bool) if valid is None else valid[image]
        priors = everything[exist]
        overlaps = _iou_or_iof(boxes.float(), priors, eps)
        if gt_bboxes_ignore is not None and ignore_iof_thr > 0 and len(gt_bboxes_ignore[image]):
            iof = _iou_or_iof(gt_bboxes_ignore[image].float(), priors, eps, of_prior=True)
            overlaps[:, iof.amax(0) > ignore_iof_thr] = -1
        options = (pos_iou_thr, neg_iou_thr, min_pos_iou, match_low_quality, gt_max_assign_all, low_quality)
        for result, values in zip(results, _assign(overlaps, *options), strict=True):
            result.append(values.new_full((len(everything),), -1).masked_scatter(exist, values))
    return results


def _iou_or_iof(boxes: Tensor, priors: Tensor, eps: float, of_prior: bool = False) -> Tensor:
    """Tensor[G, A]: intersection over union, or over the area of the prior; -1 if the quotient is NaN."""
    size = torch.min(boxes[:, None, 2:], priors[:, 2:]) - torch.max(boxes[:, None, :2], priors[:, :2])
    overlap = size.clamp(min=0).prod(2)
    whole = _area(priors).expand_as(overlap) if of_prior else _area(boxes)[:, None] + _area(priors) - overlap
    return (overlap / torch.max(whole, whole.new_tensor([max(eps, 1e-45)]))).nan_to_num(-1)


def _assign(
    overlaps: Tensor,
    pos_iou_thr: float,
    neg_iou_thr: float,
    min_pos_iou: float,
    match_low_quality: bool,
    gt_max_assign_all: bool,
    low_quality: str,
) -> tuple[Tensor, Tensor]:
    """gt_inds and max_overlaps of one image."""
    gts, priors = overlaps.shape
    gt_inds = overlaps.new_full((priors,), -1, dtype=torch.int64)
    if gts == 0 or priors == 0:
        return gt_inds + 1, overlaps.new_zeros(priors)
    highest, owner = overlaps.max(0)
    gt_inds[(highest >= 0) & (highest < neg_iou_thr)] = 0
    gt_inds[highest >= pos_iou_thr] = owner[highest >= pos_iou_thr] + 1
    for gt, overlap in enumerate(overlaps if match_low_quality else ()):
        if overlap.max() >= min_pos_iou:
            best = overlap == overlap.max() if gt_max_assign_all else overlap.argmax()
            gt_inds[best] = gt + 1 if low_quality == "gt" else owner[best] + 1
    return gt_inds, highest
