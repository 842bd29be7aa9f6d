"""One name for each thing that mmdetection 2.11 to 2.28, 3.x and onedl-mmdetection (3.4 and later) name differently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from mmdet import __version__ as _version
except ImportError as error:
    raise ImportError(
        "paa_gpu.integrations.mmdet needs mmdetection 2.11 to 3.x: `pip install mmdet==3.3.0 mmengine==0.10.7` and mmcv 2.0 or "
        "2.1, or `pip install onedl-mmdetection`"
    ) from error

_MAJOR, _MINOR = (int(part) for part in _version.split(".")[:2])
if not (2, 11) <= (_MAJOR, _MINOR) < (4, 0):
    raise ImportError(f"paa_gpu.integrations.mmdet needs mmdetection 2.11 to 3.x, got mmdet {_version}")
IS_3X = _MAJOR == 3

from mmdet.models import dense_heads  # noqa: E402  # behind the check
from mmdet.models.dense_heads import PAAHead  # noqa: E402
from mmdet.models.losses.utils import weight_reduce_loss  # noqa: E402

if IS_3X:
    from mmdet.models.utils import levels_to_images, multi_apply
    from mmdet.registry import MODELS as HEADS
    from mmdet.structures.bbox import bbox_overlaps
else:
    from mmdet.core import bbox_overlaps, multi_apply
    from mmdet.models import HEADS
    from mmdet.models.dense_heads.paa_head import levels_to_images

LADHead: Any = getattr(dense_heads, "LADHead", None)  # since 2.19

__all__ = [
    "AVERAGE_EPS", "HEADS", "IS_3X", "LOSS", "LADHead", "PAAHead", "Truth", "anchors_of", "anchors_per_location", "bbox_overlaps",
    "in_float32", "levels_to_images", "multi_apply", "prior_generator", "published_targets",
]  # fmt: skip

LOSS = "loss_by_feat" if IS_3X else "loss"  # the method from the levels' outputs to the losses
_FLOAT32_EPS = float(torch.finfo(torch.float32).eps)
#: What mmdetection's losses add to the number that they divide by; early versions add nothing.
AVERAGE_EPS = 0.0 if weight_reduce_loss(torch.zeros(1), avg_factor=torch.zeros(())).isnan() else _FLOAT32_EPS


class Truth(NamedTuple):
    """The ground truths of a batch. `published` holds the arguments of the head's own methods that contained them."""

    boxes: list[Tensor]
    labels: list[Tensor] | None
    ignored: list[Tensor] | None
    metas: list[dict[str, Any]]
    published: tuple[Any, ...]

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> Truth:
        """From the arguments of the head's methods after the levels' outputs, by position or by name."""
        return _of_3x(*args, **kwargs) if IS_3X else _of_2x(*args, **kwargs)


def _of_3x(
    batch_gt_instances: list[Any], batch_img_metas: list[dict[str, Any]], batch_gt_instances_ignore: list[Any] | None = None
) -> Truth:
    boxes, ignored = [_tensor(image.bboxes) for image in batch_gt_instances], batch_gt_instances_ignore
    return Truth(
        boxes,
        [image.labels for image in batch_gt_instances],
        _filled([None if image is None else _tensor(image.bboxes) for image in ignored or ()], boxes),
        batch_img_metas,
        (batch_gt_instances, batch_img_metas, ignored),
    )


def _of_2x(
    gt_bboxes: list[Tensor],
    gt_labels: list[Tensor] | None,
    img_metas: list[dict[str, Any]],
    gt_bboxes_ignore: list[Tensor] | None = None,
) -> Truth:
    published = (gt_bboxes, gt_labels, img_metas, gt_bboxes_ignore)
    return Truth(gt_bboxes, gt_labels, _filled(gt_bboxes_ignore or (), gt_bboxes), img_metas, published)


def _filled(ignored: Sequence[Tensor | None], boxes: Sequence[Tensor]) -> list[Tensor] | None:
    """The boxes to ignore, none for an image without them. None if no image has any."""
    if all(image is None for image in ignored):
        return None
    return [own[:0] if image is None else image for image, own in zip(ignored, boxes, strict=True)]


def _tensor(boxes: Any) -> Tensor:
    """The tensor of a box type of 3.x."""
    tensor: Tensor = getattr(boxes, "tensor", boxes)
    return tensor


def published_targets(head: Any, anchors: Any, valid_flags: Any, truth: Truth) -> tuple[Any, ...]:
    """The results of the head's own `get_targets`."""
    result: tuple[Any, ...]
    if IS_3X:
        instances, metas, ignored = truth.published
        result = head.get_targets(anchors, valid_flags, instances, metas, batch_gt_instances_ignore=ignored)
    else:
        boxes, labels, metas, ignored = truth.published
        result = head.get_targets(
            anchors, valid_flags, boxes, metas, gt_bboxes_ignore_list=ignored, gt_labels_list=labels,
            label_channels=head.cls_out_channels,
        )  # fmt: skip
    return result


def prior_generator(head: Any) -> Any:
    """`anchor_generator` until 2.14."""
    return head.prior_generator if hasattr(head, "prior_generator") else head.anchor_generator


def anchors_of(generator: Any, sizes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """The anchors of each level."""
    grid = generator.grid_priors if hasattr(generator, "grid_priors") else generator.grid_anchors
    levels: list[Tensor] = grid(sizes, device=device)
    return levels


def anchors_per_location(generator: Any) -> list[int]:
    """Of each level."""
    number: list[int] = generator.num_base_priors if hasattr(generator, "num_base_priors") else generator.num_base_anchors
    return number


def in_float32(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorator of 2.x that casts arguments if the model trains in half precision. 3.x has none."""
    if IS_3X:
        return lambda method: method
    from mmcv.runner import force_fp32

    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = force_fp32(apply_to=names)
    return decorator
