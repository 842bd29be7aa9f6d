"""From the maps of the pyramid's levels and the ground truths to the targets of a whole batch, without waiting for the device.

`PAAHead` and the integrations all train this way. `assign_max_iou` finds the potential positives. `candidate_losses` computes
their losses directly from the maps. `paa_reassign_batch` keeps the best. No shape depends on a value. There is an entry for each
of the A anchors, and one that is no potential positive has index -1. The positives stand at the front of a list whose length
Python knows.

Shapes: N images, C classes, A anchors of an image over all levels, G_n ground truths of image n. Boxes are x1, y1, x2, y2 in
pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ._dispatch import transforms
from ._staging import on_device
from .assign import assign_max_iou, assignment_of
from .boxes import corners, iou_and_giou_loss
from .losses import candidate_losses, check_maps, losses_of
from .reassign import check_options, paa_reassign_batch, reassignment_of

__all__ = ["Kept", "Targets", "assign_targets", "flatten_levels", "positive_losses"]


Made = TypeVar("Made")


class Targets(NamedTuple):
    """The targets of the N * A anchors of a batch, image after image."""

    label: Tensor  #: Tensor[N * A] int64, the class after the reassignment, C for background
    label_weight: Tensor  #: Tensor[N * A], of the classification: 0 where an anchor is not trained
    bbox_target: Tensor  #: Tensor[N * A, 4], the box of the anchor's ground truth, zeros without one
    positive: Tensor  #: Tensor[S] int64, the positives in [0, N * A), ascending, then 0; S: see `assign_targets`
    found: Tensor  #: BoolTensor[S], False for what follows the positives
    num_pos: Tensor  #: Tensor[N] int64, positives of each image
    gt_inds: Tensor  #: Tensor[N * A] int64 before the reassignment: i + 1, the ground truth i; 0, background; -1, not trained
    pos_losses: Tensor  #: Tensor[N * A], the losses of the anchors with a ground truth, NaN for the others


#: The defaults of the three functions. What they do after their checks of tensors is called here.
_ASSIGNMENT: dict[str, Any] = assign_max_iou.__kwdefaults__ or {}
_LOSSES: dict[str, Any] = candidate_losses.__kwdefaults__ or {}
_REASSIGNMENT: dict[str, Any] = paa_reassign_batch.__kwdefaults__ or {}
_OF_VALUES = ("num_gts", "validate")  # options of the last one that have no meaning here


@torch.no_grad()
def assign_targets(
    anchors: Sequence[Tensor],
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    ignored: Sequence[Tensor] | None = None,
    valid: Sequence[Tensor] | None = None,
    *,
    num_classes: int,
    pos_weight: float = 1.0,
    assignment: Mapping[str, Any] | None = None,
    losses: Mapping[str, Any] | None = None,
    reassignment: Mapping[str, Any] | None = None,
    classification: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Targets:
    """The targets of a batch.

    Args:
        anchors: per level Tensor[A_l, 4], the same for all images.
        cls_scores: per level Tensor[N, C, H_l, W_l], logits.
        bbox_preds: per level Tensor[N, 4, H_l, W_l], offsets; see `candidate_losses`.
        boxes: per image Tensor[G_n, 4] of any floating dtype, ground truths. G_n may be 0. Arithmetic is in the dtype of
            `anchors`.
        labels: per image Tensor[G_n] int64 or int32 in [0, C).
        ignored: per image Tensor[I_n, 4], boxes to ignore, see `assign_max_iou`.
        valid: per image BoolTensor[A], the anchors to train. None: all.
        num_classes: C, the label of background.
        pos_weight: the classification weight of positives and of potential positives.
        assignment, losses, reassignment: options of `assign_max_iou`, `candidate_losses` and `paa_reassign_batch`, by name.
        classification: a function from labels and weights Tensor[N * A] to the classification losses Tensor[N * A]. It is for
            losses that must be rounded exactly as another library rounds them. None: those of `candidate_losses`.

    Returns:
        `Targets`. Its list of positives has S = min(G * K, N * A) entries. G is the number of ground truths of the batch. K is
        the most candidates that one can have: `topk` of each level, or all anchors of a level with fewer.

    Raises:
        TypeError, ValueError: as the three functions do, except that callers check `boxes` and `labels`.

    A label outside [0, C) belongs to no class. The function does not modify its inputs, records no graph, and does not wait for
    the device. Source: PAA (arXiv 2007.08103), section 3.2; `PAAHead.get_targets` and `get_pos_loss` of mmdetection.
    """
    usual = {name: value for name, value in _REASSIGNMENT.items() if name not in _OF_VALUES}
    options = {**usual, "precision": "auto", **(reassignment or {})}  # nobody sees the parameters of the fits
    check_options(num_classes, **options)
    dtype, device = anchors[0].dtype, anchors[0].device
    boxes = _converted(boxes, dtype)
    ignored = None if ignored is None else _converted(ignored, dtype)
    check_maps(anchors, cls_scores, bbox_preds, boxes)
    num_gts, sizes = [image.shape[0] for image in boxes], [level.shape[0] for level in anchors]
    gt_inds, _ = assignment_of(
        anchors, [sum(sizes)] * len(boxes), boxes, ignored, valid, False, **{**_ASSIGNMENT, **(assignment or {})}
    )
    gt_inds = gt_inds.view(len(boxes), -1)  # [N, A]
    # One copy to the device: all numbers that `gt_inds` meets, the label of background, where the boxes of each image begin.
    numbers = on_device([-1, 0, 1, num_classes, *itertools.accumulate(num_gts[:-1], initial=0)], torch.int64, device)
    nowhere, least, background, first_gt = numbers.split_with_sizes([1, 2, 1, len(boxes)])
    trained, has_box = (gt_inds >= least.view(2, 1, 1)).unbind()
    label_weight = trained.to(dtype)
    if pos_weight != 1:
        label_weight = torch.where(has_box, pos_weight, label_weight)
    row = ((gt_inds + first_gt.view(-1, 1)) * has_box).flatten()  # 0: no ground truth
    label = torch.cat([background, *labels]).index_select(0, row).view_as(gt_inds)
    bbox_target = torch.cat([boxes[0].new_zeros(1, 4), *boxes]).index_select(0, row)
    # Anchors with a box have weight 1, and nobody asks for the others.
    bbox_weight = [anchors[0].new_full((), 1.0).expand(gt_inds.shape[1], 4)] * len(boxes)
    each_label, each_weight, each_target = label.unbind(), label_weight.unbind(), bbox_target.view(*gt_inds.shape, 4).unbind()
    pos_inds = torch.where(has_box, torch.arange(gt_inds.shape[1], device=device), nowhere).unbind()
    boxes_only = {} if classification is None else {"loss_cls_weight": 0.0}
    maps = ([level.detach() for level in levels] for levels in (cls_scores, bbox_preds))
    columns = each_label, each_weight, each_target, bbox_weight, pos_inds
    pos_losses = losses_of(anchors, *maps, *columns, **{**_LOSSES, **(losses or {}), **boxes_only})
    if classification is not None:
        pos_losses = pos_losses + classification(label.flatten(), label_weight.flatten())
    potential = pos_losses.view_as(label).unbind(), each_label, each_weight, bbox_weight, pos_inds, (gt_inds + nowhere).unbind()
    reassigned = reassignment_of(potential, sizes * len(boxes), num_gts, num_classes, **options)
    label, label_weight, num_pos = reassigned[0], reassigned[1], reassigned[3]
    most = sum(min(options["topk"], size) for size in sizes)
    # A list of a length that depends on the number of positives could only be had by waiting for it.
    size = min(sum(num_gts) * most, label.shape[0])
    index = torch.nonzero_static(label != background, size=size, fill_value=-1).flatten()
    return Targets(label, label_weight, bbox_target, index.clamp(min=0), index > nowhere, num_pos, gt_inds.flatten(), pos_losses)


def positive_losses(
    targets: Targets, anchors: Tensor, bbox_preds: Sequence[Tensor], iou_preds: Sequence[Tensor], stds: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the positives: GIoU loss [S], cross entropy of the predicted IoU [S], and IoU [S]. The IoU has no gradient.

    Args:
        targets: of the batch. Its list of S positives ends in unused entries. Their losses and their IoU are 0.
            If the offsets of a potential positive make no box, both losses are NaN: its ground truth gets no positives then, and
            training would go on without it.
        anchors: Tensor[A, 4].
        bbox_preds, iou_preds: per level Tensor[N, 4, H_l, W_l] and Tensor[N, 1, H_l, W_l].
        stds: deviations that the offsets were divided by.
    """
    index, found = targets.positive, targets.found
    all_deltas = flatten_levels(bbox_preds).flatten(0, 1)
    iou_pred = torch.cat([level.flatten(1) for level in iou_preds], 1).flatten().index_select(0, index)
    # Unused entries read anchor 0. Its values may be NaN, and NaN times 0 is NaN, so zeros take their place.
    deltas, bbox_target = (
        torch.where(found[:, None], rows.index_select(0, index), 0) for rows in (all_deltas, targets.bbox_target)
    )
    lower, upper = corners(anchors.index_select(0, index % anchors.shape[0]), deltas, stds)
    iou, giou = iou_and_giou_loss(lower, upper, bbox_target)
    iou = torch.where(found, iou.detach(), 0)
    cross_entropy = F.binary_cross_entropy_with_logits(torch.where(found, iou_pred, 0), iou, reduction="none")
    broken = ((targets.gt_inds > 0) & _no_box(all_deltas.detach())).any()
    weight = torch.where(broken, torch.nan, found.to(iou.dtype))
    return giou * weight, cross_entropy * weight, iou


def _no_box(deltas: Tensor) -> Tensor:
    """BoolTensor[n]: offsets [n, 4] whose box is NaN. Those of the size are clipped, so infinite ones make a box."""
    position, log_size = deltas.chunk(2, 1)
    return (position * 0 + log_size.clamp(-1, 1)).isnan().any(1)  # infinity times 0 is NaN, and a clip keeps a NaN


def flatten_levels(levels: Sequence[Tensor]) -> Tensor:
    """Tensor[N, A, channels] from Tensor[N, channels, H_l, W_l] of each level; cells row after row."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in levels], 1)


def _converted(images: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [image if image.dtype == dtype else image.to(dtype) for image in images]


class Kept:
    """A cache of what depends on the sizes of the maps and on settings alone. Copies and pickles of it are empty.

    It keeps nothing that is made while a compiler traces, in a transform of `torch.func`, from fake tensors, or in the memory of
    a CUDA graph. Each stream has entries of its own, because one stream does not know when the work of another is done.
    """

    MOST = 32  # of training with many sizes of images; anchors of 800 x 1333 pixels take 0.4 MB

    def __init__(self) -> None:
        self._values: dict[Any, Any] = {}

    def of(self, levels: Sequence[Tensor], make: Callable[[], Made], *settings: Any) -> Made:
        """What `make` returns for the sizes of these maps, Tensor[N, channels, H_l, W_l], and for these settings."""
        first = levels[0]
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms()  # type: ignore[attr-defined, no-untyped-call]
        if traced or type(first) is not Tensor:
            return make()
        stream = 0
        if first.is_cuda:
            with torch.cuda.device(first.device):
                if torch.cuda.is_current_stream_capturing():
                    return make()
            stream = torch.cuda.current_stream(first.device).cuda_stream
        key = (*(level.shape[2:] for level in levels), first.device, stream, *settings)
        value: Made | None = self._values.get(key)
        if value is None:
            with torch.inference_mode(False):
                value = make()
            if len(self._values) == self.MOST:
                self._values = {}
            self._values[key] = value
        return value

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Kept, ()
