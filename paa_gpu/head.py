"""The head of a PAA detector, for any backbone: what mmdetection's `PAAHead` does, in torch, with this library's operators.

Anchors, boxes and sizes are in pixels of the batch; boxes are x1, y1, x2, y2. Level `l` has one square anchor of side
`anchor_scale * strides[l]` per cell, centred on its first pixel. Shapes: N images, A anchors over all levels, C classes.

Training waits for the device nowhere: `targets.py` assigns without it, and what the losses are divided by stays on the device.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import (
    FLOATS,
    INDICES,
    LIST,
    check_bool,
    check_classes,
    check_float,
    check_int,
    check_list,
    check_non_negative,
    check_option,
    check_positive,
    check_tensor,
)
from ._ops import PRECISIONS
from .boxes import decode, focal_loss
from .distributed import reduce_mean
from .em import COVARIANCE_TYPES
from .reassign import SINGLETONS, Separation
from .separation import SCHEMES
from .targets import Targets, assign_targets, flatten_levels, on_device, positive_losses
from .voting import score_voting_batch

__all__ = ["PAAHead", "levels_to_images"]

LEAST_WEIGHT = 1e-12  # of a box's GIoU loss, which its IoU weights
EPS = float(torch.finfo(torch.float32).eps)  # added to what losses are divided by, as published

Size = tuple[int, int]


def levels_to_images(mlvl_tensor: Sequence[Tensor]) -> list[Tensor]:
    """From one tensor per pyramid level to one per image, the levels one after the other.

    Args:
        mlvl_tensor: Tensor[N, C, H_l, W_l] of each level, of one dtype.

    Returns:
        N tensors Tensor[sum of H_l * W_l, C], contiguous views of one; cells row after row.

    Raises:
        TypeError, ValueError: not a list or empty; a level whose rank, N, C, dtype or device differs from the first's.

    Source: the function of the same name in mmdetection's `mmdet.models.utils`.
    """
    check_list("mlvl_tensor", mlvl_tensor, "level")
    _check_levels("mlvl_tensor", mlvl_tensor, None)
    return list(flatten_levels(mlvl_tensor).unbind())


class PAAHead(nn.Module):
    """Towers, losses and detections of PAA; parameters have the names of mmdetection's `PAAHead`, so its checkpoints load.

    The defaults are the published configuration. Source: PAA (arXiv 2007.08103); mmdetection 3.3.0, `PAAHead`.

    Args:
        num_classes: C; labels are 0 to C - 1.
        in_channels: of the features of every level.
        feat_channels: of the towers; a multiple of `norm_groups`.
        stacked_convs: convolutions of each of the two towers.
        norm_groups: of the towers' group normalisation.
        strides: pixels between two cells of each level.
        anchor_scale: side of an anchor in strides.
        target_stds: what the predicted offsets (x, y, log w, log h) are multiplied with.
        pos_iou_thr, neg_iou_thr, min_pos_iou, match_low_quality, ignore_iof_thr: which anchors are potential positives, see
            `assign_max_iou`. With the default `ignore_iof_thr`, ignored boxes change nothing.
        allowed_border: pixels by which an anchor may reach beyond its image to be trained; negative: any number.
        topk, covariance_type, separation, singleton, precision: of the assignment, see `paa_reassign`.
        gamma, alpha: of the focal loss.
        bbox_loss_weight, iou_loss_weight: of GIoU loss and IoU prediction; the focal loss has weight 1.
        nms_pre: boxes of each level at most that go on to NMS; 0: all.
        score_thr: detections have a score above it, the root of class score * predicted IoU.
        iou_threshold: of NMS, within a class.
        max_per_img: detections of an image at most; 0: all.
        score_voting: whether `score_voting` refines the boxes.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        feat_channels: int = 256,
        stacked_convs: int = 4,
        norm_groups: int = 32,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        anchor_scale: float = 8,
        target_stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
        *,
        pos_iou_thr: float = 0.1,
        neg_iou_thr: float = 0.1,
        min_pos_iou: float = 0.0,
        match_low_quality: bool = True,
        ignore_iof_thr: float = -1.0,
        allowed_border: float = -1.0,
        topk: int = 9,
        covariance_type: str = "diag",
        separation: Separation = "mmdet",
        singleton: str = "background",
        precision: str = "float64",
        gamma: float = 2.0,
        alpha: float = 0.25,
        bbox_loss_weight: float = 1.3,
        iou_loss_weight: float = 0.5,
        nms_pre: int = 1000,
        score_thr: float = 0.05,
        iou_threshold: float = 0.6,
        max_per_img: int = 100,
        score_voting: bool = True,
    ) -> None:
        for name, number, least in (
            ("num_classes", num_classes, 1), ("in_channels", in_channels, 1), ("feat_channels", feat_channels, 1),
            ("stacked_convs", stacked_convs, 0), ("norm_groups", norm_groups, 1), ("topk", topk, 1),
            ("nms_pre", nms_pre, 0), ("max_per_img", max_per_img, 0),
        ):  # fmt: skip
            check_int(name, number, least)
        if feat_channels % norm_groups:
            raise ValueError(f"`feat_channels` must be a multiple of `norm_groups`, {norm_groups}, got {feat_channels}")
        check_list("strides", strides, "level")
        for level, stride in enumerate(strides):
            check_int(f"strides[{level}]", stride, 1)
        check_list("target_stds", target_stds, "offset", length=4, like="a box")
        for i, std in enumerate(target_stds):
            check_positive(f"target_stds[{i}]", std)
        check_positive("anchor_scale", anchor_scale)
        for name, value in (
            ("pos_iou_thr", pos_iou_thr), ("neg_iou_thr", neg_iou_thr), ("min_pos_iou", min_pos_iou), ("gamma", gamma),
            ("alpha", alpha), ("bbox_loss_weight", bbox_loss_weight), ("iou_loss_weight", iou_loss_weight),
            ("iou_threshold", iou_threshold),
        ):  # fmt: skip
            check_non_negative(name, value)
        for name, value in (
            ("ignore_iof_thr", ignore_iof_thr), ("allowed_border", allowed_border), ("score_thr", score_thr),
        ):  # fmt: skip
            check_float(name, value)
        check_bool("match_low_quality", match_low_quality)
        check_bool("score_voting", score_voting)
        check_option("covariance_type", covariance_type, COVARIANCE_TYPES)
        if not callable(separation):
            check_option("separation", separation, SCHEMES)
        check_option("singleton", singleton, SINGLETONS)
        check_option("precision", precision, PRECISIONS)
        super().__init__()
        self.num_classes, self.in_channels = num_classes, in_channels
        self.strides, self.anchor_scale, self.target_stds = tuple(strides), anchor_scale, tuple(target_stds)
        self.assignment: dict[str, Any] = {
            "pos_iou_thr": pos_iou_thr, "neg_iou_thr": neg_iou_thr, "min_pos_iou": min_pos_iou,
            "match_low_quality": match_low_quality, "ignore_iof_thr": ignore_iof_thr,
        }  # fmt: skip
        self.allowed_border = allowed_border
        self.reassignment: dict[str, Any] = {
            "topk": topk, "covariance_type": covariance_type, "separation": separation, "singleton": singleton,
            "precision": precision,
        }  # fmt: skip
        self.gamma, self.alpha = gamma, alpha
        self.bbox_loss_weight, self.iou_loss_weight = bbox_loss_weight, iou_loss_weight
        self.nms_pre, self.score_thr, self.iou_threshold = nms_pre, score_thr, iou_threshold
        self.max_per_img, self.score_voting = max_per_img, score_voting
        self.cls_convs = _tower(in_channels, feat_channels, stacked_convs, norm_groups)
        self.reg_convs = _tower(in_channels, feat_channels, stacked_convs, norm_groups)
        features = feat_channels if stacked_convs else in_channels
        self.atss_cls = nn.Conv2d(features, num_classes, 3, padding=1)
        self.atss_reg = nn.Conv2d(features, 4, 3, padding=1)
        self.atss_centerness = nn.Conv2d(features, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in strides)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: convolutions from a normal distribution of deviation 0.01, every class at a score of 0.01."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.constant_(module.bias, -math.log(99) if module is self.atss_cls else 0)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
            elif isinstance(module, Scale):
                nn.init.ones_(module.scale)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The predictions of every level.

        Args:
            features: Tensor[N, in_channels, H_l, W_l] of each level; list or tuple.

        Returns:
            `(cls_scores, bbox_preds, iou_preds)`, a list each with Tensor[N, C, H_l, W_l] logits, Tensor[N, 4, H_l, W_l] float32
            offsets and Tensor[N, 1, H_l, W_l] logits of the IoU.

        Raises:
            TypeError, ValueError: not one tensor per stride; a level of another rank, N or number of channels.
        """
        check_list("features", features, "level", length=len(self.strides), like="`strides`")
        _check_levels("features", features, self.in_channels)
        cls_scores, bbox_preds, iou_preds = [], [], []
        for level, scale in zip(features, self.scales, strict=True):
            cls_feature, reg_feature = level, level
            for conv in self.cls_convs:
                cls_feature = conv(cls_feature)
            for conv in self.reg_convs:
                reg_feature = conv(reg_feature)
            cls_scores.append(self.atss_cls(cls_feature))
            bbox_preds.append(scale(self.atss_reg(reg_feature)).float())
            iou_preds.append(self.atss_centerness(reg_feature))
        return cls_scores, bbox_preds, iou_preds

    def loss(
        self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]], image_sizes: Sequence[Size] | None = None
    ) -> dict[str, Tensor]:
        """The losses of a batch, to be summed. float32, under autocast too; nothing synchronises.

        Args:
            features: as `forward` takes them.
            targets: for each image, as torchvision's detectors take them, `boxes`: Tensor[G, 4] floating, `labels`: Tensor[G]
                int64 or int32 in [0, C), and if wanted `ignored_boxes`: Tensor[I, 4] (see `ignore_iof_thr`). Either may be empty.
            image_sizes: (height, width) of each image within the batch; the cells beyond it are not trained. mmdetection gives
                the size padded to a multiple of 32, its `pad_shape`. None: the whole batch is picture.

        Returns:
            `{"loss_cls", "loss_bbox", "loss_iou"}`, a scalar each; 0 for the last two in a batch without positives. What they are
            divided by is averaged over the processes where `torch.distributed` is initialised, so that averaging the processes'
            gradients, as DistributedDataParallel does, gives those of the joined batch.

        Raises:
            TypeError, ValueError: as `forward`; lists not of N entries; a target without `boxes` or `labels`, or of the wrong
                shape, dtype or device; no `image_sizes` where `allowed_border` is not negative; a label outside [0, C), on the
                CPU.

        On a device a label outside [0, C) is of no class: to be refused, it would have to be waited for. An image of which no
        anchor is inside contributes nothing (mmdetection raises). Not finite losses: see `paa_reassign`.
        """
        num_images = _num_images(features)
        self._check_targets(targets, image_sizes, num_images, features[0].device)
        cls_scores, bbox_preds, iou_preds = self(features)
        # Autocast keeps to float32 what starts there: there are neither products of matrices nor convolutions behind the towers.
        cls_scores, iou_preds = [level.float() for level in cls_scores], [level.float() for level in iou_preds]
        anchors = self._anchors(cls_scores)
        assigned = self._assign(cls_scores, bbox_preds, anchors, targets, image_sizes)
        giou, cross_entropy, iou = positive_losses(assigned, torch.cat(anchors), bbox_preds, iou_preds, self.target_stds)
        num_pos, images, iou_sum = reduce_mean(torch.stack([assigned.num_pos.sum(), iou.new_full((), num_images), iou.sum()]))
        loss_cls = focal_loss(flatten_levels(cls_scores).flatten(0, 1), assigned.label, self.gamma, self.alpha).sum(1)
        return {
            "loss_cls": (loss_cls * assigned.label_weight).sum() / (torch.maximum(num_pos, images) + EPS),
            "loss_bbox": self.bbox_loss_weight * (giou * iou.clamp(min=LEAST_WEIGHT)).sum() / (iou_sum + EPS),
            "loss_iou": self.iou_loss_weight * cross_entropy.sum() / (num_pos + EPS),
        }

    @torch.no_grad()
    def predict(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[Size],
        scale_factors: Sequence[float | tuple[float, float]] | None = None,
    ) -> list[dict[str, Tensor]]:
        """The detections of a batch. float32, under autocast too; needs torchvision, for NMS.

        Args:
            features: as `forward` takes them.
            image_sizes: (height, width) of each image within the batch; boxes are clipped to it.
            scale_factors: how much each image was enlarged before, a number or (in x, in y); the boxes are divided by it, before
                NMS. None: they stay in pixels of the batch.

        Returns:
            For each image a dictionary with `boxes` Tensor[k, 4], `scores` Tensor[k] and `labels` Tensor[k] int64, by class,
            ascending, and within a class by score, descending, as published; without voting all by score.

        Raises:
            TypeError, ValueError: as `forward`; lists not of N entries.
            ImportError: no torchvision.
        """
        _check_sizes(image_sizes, _num_images(features))
        if scale_factors is not None:
            check_list("scale_factors", scale_factors, length=len(image_sizes), like="`image_sizes`")
        cls_scores, bbox_preds, iou_preds = self(features)
        mlvl_bboxes, mlvl_scores = self._decode(cls_scores, bbox_preds, iou_preds, image_sizes)
        if scale_factors is not None:
            mlvl_bboxes = mlvl_bboxes / _pairs(scale_factors, mlvl_bboxes)
        boxes, scores = list(mlvl_bboxes), list(mlvl_scores)
        detections = [self._nms(*image) for image in zip(boxes, scores, strict=True)]
        det_bboxes, det_labels = [image[0] for image in detections], [image[1] for image in detections]
        if self.score_voting:
            det_bboxes, det_labels = score_voting_batch(det_bboxes, det_labels, boxes, scores, self.score_thr)
        return [
            {"boxes": bboxes[:, :4], "scores": bboxes[:, 4], "labels": labels}
            for bboxes, labels in zip(det_bboxes, det_labels, strict=True)
        ]

    def _anchors(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Tensor[A_l, 4] of each level; made from numbers of the host, which costs no synchronisation."""
        anchors = []
        for level, stride in zip(levels, self.strides, strict=True):
            y, x = (torch.arange(size, device=level.device, dtype=torch.float32) * stride for size in level.shape[2:])
            half = 0.5 * stride * self.anchor_scale
            y, x = torch.meshgrid(y, x, indexing="ij")
            anchors.append(torch.stack([x - half, y - half, x + half, y + half], -1).reshape(-1, 4))
        return anchors

    def _assign(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        anchors: list[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        image_sizes: Sequence[Size] | None,
    ) -> Targets:
        """What the anchors are trained with."""
        boxes = [target["boxes"] for target in targets]
        ignored = [target.get("ignored_boxes", boxes[0][:0]) for target in targets]
        valid = None if image_sizes is None else self._inside(torch.cat(anchors), image_sizes).unbind()
        return assign_targets(
            anchors, cls_scores, bbox_preds, boxes, [target["labels"] for target in targets], ignored, valid,
            num_classes=self.num_classes,
            assignment=self.assignment,
            losses={
                "gamma": self.gamma, "alpha": self.alpha, "loss_bbox_weight": self.bbox_loss_weight, "stds": self.target_stds,
            },
            reassignment=self.reassignment,
        )  # fmt: skip

    def _inside(self, anchors: Tensor, image_sizes: Sequence[Size]) -> Tensor:
        """BoolTensor[N, A]: anchors of a cell within the image, of which at most `allowed_border` pixels are outside."""
        x1, y1, x2, y2 = anchors.unbind(1)
        sizes = on_device([[width, height] for height, width in image_sizes], anchors.dtype, anchors.device)
        width, height = sizes.unbind(1)
        width, height = width[:, None], height[:, None]
        inside = (x1 + x2 < 2 * width) & (y1 + y2 < 2 * height)
        if self.allowed_border >= 0:
            border = self.allowed_border
            inside &= (x1 >= -border) & (y1 >= -border) & (x2 < width + border) & (y2 < height + border)
        return inside

    def _decode(
        self, cls_scores: list[Tensor], bbox_preds: list[Tensor], iou_preds: list[Tensor], image_sizes: Sequence[Size]
    ) -> tuple[Tensor, Tensor]:
        """Boxes [N, K, 4] and scores [N, K, C] of the best `nms_pre` of each level."""
        anchors = self._anchors(cls_scores)
        limits = _pairs([(width, height) for height, width in image_sizes], anchors[0])
        boxes, scores = [], []
        for *outputs, priors in zip(cls_scores, bbox_preds, iou_preds, anchors, strict=True):
            cls_score, bbox_pred, iou_pred = (flatten_levels([level.float()]) for level in outputs)
            score = (cls_score.sigmoid() * iou_pred.sigmoid()).sqrt()
            priors = priors.expand(len(score), -1, -1)
            if 0 < self.nms_pre < score.shape[1]:
                best = score.amax(2).topk(self.nms_pre).indices[..., None]
                score, bbox_pred, priors = (
                    tensor.gather(1, best.expand(-1, -1, tensor.shape[2])) for tensor in (score, bbox_pred, priors)
                )
            boxes.append(decode(priors, bbox_pred, self.target_stds).clamp(min=0).minimum(limits))
            scores.append(score)
        return torch.cat(boxes, 1), torch.cat(scores, 1)

    def _nms(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The detections of one image: Tensor[k, 5] and labels [k]."""
        try:  # the one function of torchvision here: the rest works without it
            from torchvision.ops import batched_nms
        except ImportError as error:
            raise ImportError("`PAAHead.predict` needs torchvision: pip install paa-gpu[head]") from error
        index, labels = (scores > self.score_thr).nonzero().unbind(1)
        boxes, scores = boxes[index], scores[index, labels]
        kept = batched_nms(boxes, scores, labels, self.iou_threshold)
        if self.max_per_img:
            kept = kept[: self.max_per_img]
        return torch.cat([boxes[kept], scores[kept, None]], 1), labels[kept]

    def _check_targets(
        self,
        targets: Sequence[Mapping[str, Tensor]],
        image_sizes: Sequence[Size] | None,
        num_images: int,
        device: torch.device,
    ) -> None:
        check_list("targets", targets, length=num_images, like="the batch")
        for i, target in enumerate(targets):
            for key in ("boxes", "labels"):
                if key not in target:
                    raise ValueError(f"`targets[{i}]` must have an entry `{key}`, got {sorted(target)}")
            check_tensor(f"targets[{i}]['boxes']", target["boxes"], (None, 4), FLOATS, device)
            check_tensor(f"targets[{i}]['labels']", target["labels"], (len(target["boxes"]),), INDICES, device)
            check_classes(f"targets[{i}]['labels']", target["labels"], self.num_classes)
            if "ignored_boxes" in target:
                check_tensor(f"targets[{i}]['ignored_boxes']", target["ignored_boxes"], (None, 4), FLOATS, device)
        if image_sizes is not None:
            _check_sizes(image_sizes, num_images)
        elif self.allowed_border >= 0:
            raise ValueError(f"`image_sizes` must be given with an `allowed_border` of {self.allowed_border}, got None")


class Scale(nn.Module):
    """One learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _tower(in_channels: int, feat_channels: int, stacked_convs: int, groups: int) -> nn.ModuleList:
    """Convolutions with group normalisation, under the names of mmcv's ConvModule."""
    return nn.ModuleList(
        nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(feat_channels if i else in_channels, feat_channels, 3, padding=1, bias=False),
                gn=nn.GroupNorm(groups, feat_channels),
                activate=nn.ReLU(inplace=True),
            )
        )
        for i in range(stacked_convs)
    )


def _pairs(values: Sequence[float | tuple[float, float]], like: Tensor) -> Tensor:
    """Tensor[N, 1, 4] of x, y, x, y of each image, on the device of `like`."""
    pairs = [value if isinstance(value, LIST) else (value, value) for value in values]
    return on_device([[[x, y, x, y]] for x, y in pairs], like.dtype, like.device)


def _num_images(features: Any) -> int:
    check_list("features", features, "level")
    return len(features[0]) if isinstance(features[0], Tensor) and features[0].dim() else 0


def _check_levels(name: str, levels: Sequence[Tensor], channels: int | None) -> None:
    """Maps [N, channels, any, any] of one N, number of channels, dtype and device."""
    shape: tuple[int | None, ...] = (None, channels, None, None)
    for level, tensor in enumerate(levels):
        first = levels[0] if level else None
        dtypes = FLOATS if first is None else (first.dtype,)
        check_tensor(f"{name}[{level}]", tensor, shape, dtypes, None if first is None else first.device)
        shape = (*tensor.shape[:2], None, None)


def _check_sizes(image_sizes: Any, num_images: int) -> None:
    check_list("image_sizes", image_sizes, length=num_images, like="the batch")
    for i, size in enumerate(image_sizes):
        if not isinstance(size, LIST) or len(size) != 2:
            raise ValueError(f"`image_sizes[{i}]` must be (height, width), got {size!r}")
