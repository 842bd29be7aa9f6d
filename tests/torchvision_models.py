"""Small detectors of torchvision from a random start, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

SIZE = 96
SIZES = (
    (8, 12, 18),
    (24, 36),
    (48, 64),
)  # of anchors; not as many at each level as the RPN's head wants, so the RPN takes the first
RATIOS = (0.5, 1.0, 2.0)


class Body(nn.Module):
    """Levels of stride 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(16, 32, 2, stride=2), nn.ReLU())


def backbone() -> BackboneWithFPN:
    return BackboneWithFPN(Body(), {"low": "0", "high": "1"}, [16, 32], 16, LastLevelMaxPool())


def anchors() -> AnchorGenerator:
    return AnchorGenerator(((8, 12, 18), (16, 24, 36), (32, 48, 72)), (RATIOS,) * 3)


def with_differences(head: nn.Module) -> nn.Module:
    """The head with larger weights. torchvision's are so small that anchors of like overlap have equal losses but for rounding,
    and which of them become positive then depends on the processor."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1)
    return head


def retinanet(box_loss: str = "l1", num_classes: int = 3, **options) -> detection.RetinaNet:
    model = detection.RetinaNet(backbone(), num_classes, min_size=SIZE, max_size=2 * SIZE, anchor_generator=anchors(), **options)
    with_differences(model.head).regression_head._loss_type = box_loss
    return model


class Columns(nn.Module):
    """Two levels for SSD."""

    out_channels = (16, 32)

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        low = self.body.low(images)
        return {"0": low, "1": self.body.high(low)}


def ssd(num_classes: int = 3) -> detection.ssd.SSD:
    boxes = DefaultBoxGenerator([[2], [2, 3]], min_ratio=15, max_ratio=60)
    return detection.ssd.SSD(Columns(), boxes, (SIZE, SIZE), num_classes)


def faster_rcnn(num_classes: int = 3, **options) -> detection.FasterRCNN:
    kind = {"mask": detection.MaskRCNN, "keypoint": detection.KeypointRCNN}.get(options.pop("kind", "box"), detection.FasterRCNN)
    return kind(
        backbone(), num_classes, min_size=SIZE, max_size=2 * SIZE, rpn_anchor_generator=anchors(),
        rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, box_batch_size_per_image=64, **options,
    )  # fmt: skip


MODELS = {
    "RetinaNet": retinanet,
    "SSD": ssd,
    "FasterRCNN": faster_rcnn,
    "MaskRCNN": lambda: faster_rcnn(kind="mask", mask_head=MaskRCNNHeads(16, (256,), 1)),
    "KeypointRCNN": lambda: faster_rcnn(2, kind="keypoint", num_keypoints=4, keypoint_head=KeypointRCNNHeads(16, (512,))),
}


def batch(
    generator: torch.Generator, boxes: tuple[int, ...] = (7, 0, 3), num_classes: int = 3
) -> tuple[list[Tensor], list[dict]]:
    """Images of different sizes, and their targets for any of the detectors: labels from 1 on are background for none."""
    images, targets = [], []
    for count in boxes:
        height, width = (int(torch.randint(60, 120, (), generator=generator)) for _ in range(2))
        images.append(torch.rand(3, height, width, generator=generator))
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        size = 4 + torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.35
        box = torch.cat([corner, corner + size], 1)
        points = corner[:, None] + torch.rand(count, 4, 2, generator=generator) * size[:, None]
        targets.append({
            "boxes": box,
            "labels": torch.randint(1, num_classes, (count,), generator=generator),
            "masks": (torch.rand(count, height, width, generator=generator) < 0.5).to(torch.uint8),
            "keypoints": torch.cat([points, torch.ones(count, 4, 1)], 2),
        })  # fmt: skip
    return images, targets
