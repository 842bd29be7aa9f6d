"""The whole loss of a published head, from the levels' outputs, without waiting for the device.

It is `paa_gpu.targets` with a head's options. It replaces the assigner, the sampler, `get_targets`, `get_pos_loss` and the
losses, and computes the same. A head may have another of these parts, or override a method. Then the head's own code stays in
use, and `obstacles` says why.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._staging import on_device
from ...assign import check_boxes
from ...boxes import LEAST_WEIGHT, WH_RATIO_CLIP, focal_loss
from ...targets import Kept, Targets, assign_targets, flatten_levels, positive_losses
from .versions import AVERAGE_EPS, PAAHead, Truth, anchors_of, anchors_per_location, prior_generator

HALF = (torch.bfloat16, torch.float16)
METHODS = ("get_anchors", "get_targets", "_get_targets_single", "get_pos_loss", "gmm_separation_scheme")
# As they were when this module was imported: somebody may replace a method of the class itself.
PUBLISHED = {(PAAHead, name): getattr(PAAHead, name) for name in METHODS}


def overrides(head: Any, method: str, base: type) -> bool:
    """Whether a head's method of this name differs from that of `base`: in its class, on the object, or as replaced in `base`."""
    published = PUBLISHED.get((base, method)) or getattr(base, method)
    # Not the `__func__` of the bound method: a compiler that traces this finds another object there.
    own = vars(head).get(method)
    found = getattr(type(head), method) if own is None else getattr(own, "__func__", None)
    return found is not published


def _own_methods(part: Any) -> list[str]:
    """The methods that somebody has set on the object, in place of those of its class."""
    return [name for name in getattr(part, "__dict__", ()) if callable(getattr(type(part), name, None))]


def _has_hooks(loss: Any) -> bool:
    """Whether a call of the module does more than to compute."""
    return bool(loss._forward_pre_hooks or loss._forward_hooks or loss._backward_pre_hooks or loss._backward_hooks)


def obstacles(head: Any) -> list[str]:
    """The reasons why this module cannot compute the whole loss of a head. Empty if it can."""
    found = [f"it has a `{name}` of its own" for name in METHODS if overrides(head, name, PAAHead)]
    if not hasattr(head, "assigner"):
        return [*found, "it has no assigner (`train_cfg`)"]
    assigner, coder = head.assigner, head.bbox_coder
    generator, calculator = prior_generator(head), getattr(assigner, "iou_calculator", object())
    for name, part, wanted in (
        ("assigner", assigner, "MaxIoUAssigner"), ("IoU calculator", calculator, "BboxOverlaps2D"),
        ("sampler", head.sampler, "PseudoSampler"), ("box coder", coder, "DeltaXYWHBBoxCoder"),
        ("anchor generator", generator, "AnchorGenerator"), ("classification loss", head.loss_cls, "FocalLoss"),
        ("box loss", head.loss_bbox, "GIoULoss"), ("IoU loss", head.loss_centerness, "CrossEntropyLoss"),
    ):  # fmt: skip
        if type(part).__name__ != wanted or type(part).__module__.partition(".")[0] != "mmdet":
            found.append(f"its {name} is {type(part).__name__}, not mmdetection's {wanted}")
        found += [f"its {name} has its own `{method}`" for method in _own_methods(part)]
    if found:
        return found
    negative = assigner.neg_iou_thr
    loss_cls, loss_bbox, loss_iou = head.loss_cls, head.loss_bbox, head.loss_centerness
    for differs, reason in (
        (set(anchors_per_location(generator)) != {1}, "it has several anchors a location"),
        (getattr(generator, "use_box_type", False), "its anchors are of a box type"),
        (not isinstance(negative, (int, float)), "`neg_iou_thr` of its assigner is a range"),
        (assigner.ignore_iof_thr > 0 and not assigner.ignore_wrt_candidates, "`ignore_wrt_candidates` of its assigner is False"),
        (getattr(assigner, "perm_repeat_gt_cfg", None) is not None, "`perm_repeat_gt_cfg` of its assigner is set"),
        (getattr(calculator, "dtype", None) is not None, "its IoU calculator computes in half precision"),
        (not head.reg_decoded_bbox, "`reg_decoded_bbox` is False"),
        (any(coder.means) or getattr(coder, "add_ctr_clamp", False), "its box coder has means, or clamps centres"),
        (getattr(loss_cls, "activated", False), "its classification loss takes probabilities"),
        (loss_bbox.eps != 1e-6, f"`eps` of its box loss is {loss_bbox.eps}, not 1e-6"),
        (not loss_iou.use_sigmoid or loss_iou.class_weight is not None, "its IoU loss is a softmax, or has class weights"),
        (_has_hooks(loss_bbox), "its box loss has hooks"),
        (_has_hooks(loss_iou), "its IoU loss has hooks"),
        (any(loss.reduction != "mean" for loss in (loss_cls, loss_bbox, loss_iou)), "the reduction of a loss is not a mean"),
    ):
        if differs:
            found.append(reason)
    return found


class _Grid(NamedTuple):
    """Everything that depends only on the sizes of the levels."""

    anchors: list[Tensor]  # per level Tensor[A_l, 4]
    all_anchors: Tensor  # Tensor[A, 4]
    cells: Tensor  # Tensor[A, 2] int64: column and row
    levels: Tensor  # Tensor[A] int64


def _grid(head: Any, sizes: Sequence[tuple[int, int]], device: torch.device) -> _Grid:
    """That of a head. Making it copies to the device, which waits."""
    anchors = anchors_of(prior_generator(head), sizes, device)
    index = [torch.arange(height * width, device=device) for height, width in sizes]
    cells = [torch.stack([i % width, i // width], 1) for i, (_, width) in zip(index, sizes, strict=True)]
    levels = [torch.full_like(i, level) for level, i in enumerate(index)]
    return _Grid(anchors, torch.cat(anchors), torch.cat(cells), torch.cat(levels))


def assign(head: Any, cls_scores: list[Tensor], bbox_preds: list[Tensor], truth: Truth) -> tuple[Tensor, Targets]:
    """The anchors of an image [A, 4], and the targets of the batch."""
    sizes = [(level.shape[-2], level.shape[-1]) for level in cls_scores]
    kept, device = vars(head).setdefault("grids", Kept()), cls_scores[0].device
    generator = prior_generator(head)
    base = generator.base_anchors  # which somebody may replace, or change in place
    versions = [0 if boxes.is_inference() else boxes._version for boxes in base]
    grid = kept.of(cls_scores, lambda: _grid(head, sizes, device), generator, *base, *versions)
    assigner, options = head.assigner, head.reassignment()
    names = ("pos_iou_thr", "neg_iou_thr", "min_pos_iou", "ignore_iof_thr", "match_low_quality", "gt_max_assign_all")
    weight = head.train_cfg.pos_weight
    half = cls_scores[0].dtype in HALF
    assert truth.labels is not None
    check_boxes(truth.boxes, cls_scores[0].device)
    targets = assign_targets(
        grid.anchors, cls_scores, bbox_preds, truth.boxes, truth.labels, truth.ignored, _valid(head, grid, sizes, truth.metas),
        num_classes=head.num_classes,
        pos_weight=weight if weight > 0 else 1.0,
        assignment={name: getattr(assigner, name) for name in names},
        losses={
            "gamma": head.loss_cls.gamma, "alpha": head.loss_cls.alpha, "loss_cls_weight": head.loss_cls.loss_weight,
            "loss_bbox_weight": head.loss_bbox.loss_weight, "stds": head.bbox_coder.stds, "wh_ratio_clip": WH_RATIO_CLIP,
        },
        reassignment=options,
        classification=functools.partial(_each_classification, head.loss_cls, cls_scores) if half else None,
    )  # fmt: skip
    return grid.all_anchors, targets


def _each_classification(loss: Any, cls_scores: list[Tensor], label: Tensor, label_weight: Tensor) -> Tensor:
    """Of each anchor [N * A]. mmdetection computes them in the dtype of the scores, step by step. In half precision that decides
    which anchors become positive, so it has to be the head's own loss."""
    scores = flatten_levels(cls_scores).flatten(0, 1)
    each: Tensor = loss(scores, label, label_weight, avg_factor=1.0, reduction_override="none")
    return each.sum(-1)


def _valid(head: Any, grid: _Grid, sizes: Sequence[tuple[int, int]], metas: list[dict[str, Any]]) -> Sequence[Tensor] | None:
    """Which anchors of each image are trained: those of cells within its `pad_shape`, at most `allowed_border` pixels outside
    its `img_shape`; None where all are."""
    strides, border, device = prior_generator(head).strides, head.train_cfg.allowed_border, grid.cells.device
    limits = [
        [
            (min(math.ceil(meta["pad_shape"][1] / stride[0]), width), min(math.ceil(meta["pad_shape"][0] / stride[1]), height))
            for stride, (height, width) in zip(strides, sizes, strict=True)
        ]
        for meta in metas
    ]
    valid = None
    if any(level != size[::-1] for image in limits for level, size in zip(image, sizes, strict=True)):
        valid = (grid.cells < on_device(limits, torch.int64, device).index_select(1, grid.levels)).all(-1)
    if border >= 0:
        anchors = grid.all_anchors
        ends = on_device(
            [(meta["img_shape"][1] + border, meta["img_shape"][0] + border) for meta in metas], anchors.dtype, device
        )
        inside = (anchors[:, :2] >= -border).all(-1) & (anchors[:, 2:] < ends[:, None]).all(-1)
        valid = inside if valid is None else valid & inside
    return None if valid is None else valid.unbind()


def losses(
    head: Any, maps: Sequence[list[Tensor]], anchors: Tensor, targets: Targets, num_images: int, by_iou: bool
) -> dict[str, Tensor]:
    """The three losses; `by_iou`: that of boxes is weighted by their IoU (PAA; LAD's is not)."""
    cls_scores, bbox_preds, iou_preds = maps
    scores, num_pos = flatten_levels(cls_scores).flatten(0, 1), targets.num_pos.sum()
    giou, bce, iou = positive_losses(targets, anchors, bbox_preds, iou_preds, head.bbox_coder.stds)
    weight, total = (iou.clamp(min=LEAST_WEIGHT), iou.sum()) if by_iou else (1.0, num_pos)
    return {
        "loss_cls": _classification(head.loss_cls, scores, targets, num_pos.clamp(min=num_images)),
        "loss_bbox": head.loss_bbox.loss_weight * _mean(giou * weight, total),
        "loss_iou": head.loss_centerness.loss_weight * _mean(bce, num_pos),
    }


def _classification(loss: Any, scores: Tensor, targets: Targets, number: Tensor) -> Tensor:
    """The head's own loss. On a GPU it is one kernel. On the CPU it would make one-hot labels, so ours takes its place, except in
    half precision, where ours would round otherwise."""
    if scores.is_cpu and scores.dtype not in HALF and not _has_hooks(loss):
        focal = focal_loss(scores, targets.label, loss.gamma, loss.alpha).sum(1)
        result: Tensor = loss.loss_weight * _mean(focal * targets.label_weight, number)
    else:
        result = loss(scores, targets.label, targets.label_weight, avg_factor=number)
    return result


def _mean(values: Tensor, number: Tensor) -> Tensor:
    """As mmdetection divides; where it adds nothing to the number, 0 / 0 is 0 here."""
    return values.sum() / (number + AVERAGE_EPS if AVERAGE_EPS else number.clamp(min=LEAST_WEIGHT))


class LabelAssignment(Sequence[Any]):
    """A teacher's assignment for its student: the seven results of the published `get_label_assignment`.

    They are computed when code reads one of them, and this waits. The accelerated student does not read them.
    """

    def __init__(self, anchors: Tensor, targets: Targets) -> None:
        self.anchors, self.targets = anchors, targets
        self._results: tuple[Any, ...] | None = None

    def results(self) -> tuple[Any, ...]:
        """labels, label weights, box targets of all anchors; box weights before reassignment, a list; indices of the positives,
        their anchors (None without any), their number."""
        if self._results is None:
            targets = self.targets
            images = len(targets.num_pos)
            bbox_weights = (targets.gt_inds > 0).to(self.anchors.dtype)[:, None].repeat(1, 4).view(images, -1, 4)
            positive, num_pos = targets.positive[targets.found], int(targets.num_pos.sum())
            pos_anchors = self.anchors[positive % len(self.anchors)] if num_pos else None
            everywhere = (targets.label, targets.label_weight, targets.bbox_target, list(bbox_weights.unbind()))
            self._results = (*everywhere, positive, pos_anchors, num_pos)
        return self._results

    def __iter__(self) -> Iterator[Any]:
        return iter(self.results())

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: Any) -> Any:
        return self.results()[index]
