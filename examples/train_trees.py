"""Train a tree detector from a random start: `python examples/train_trees.py`, then look at trees.png.

The detector has torchvision's ResNet-18 and feature pyramid, small enough for two CPU cores, and `paa_gpu.PAAHead`. There are
only two aerial photographs, with hand-drawn tree crowns. So the detections show what the detector learnt by heart. They do not
show that it works for other photographs. You need a checkout, and `pip install -e .[examples]`.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from tqdm import trange

from paa_gpu import PAAHead, data

RECORDINGS = [data.BUNDLED, Path(__file__).parents[1] / "tests" / "data" / "g02_YELL_541_late.npz"]
CHANNELS = 64


class Detector(nn.Module):
    """Levels of stride 8 to 128, and the head."""

    def __init__(self) -> None:
        super().__init__()
        body = resnet18(norm_layer=lambda channels: nn.GroupNorm(16, channels))
        layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
        self.backbone = BackboneWithFPN(body, layers, [128, 256, 512], CHANNELS, LastLevelP6P7(CHANNELS, CHANNELS))
        self.head = PAAHead(
            num_classes=1, in_channels=CHANNELS, feat_channels=CHANNELS, stacked_convs=2, norm_groups=16, iou_threshold=0.4
        )

    def loss(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return self.head.loss(list(self.backbone(images).values()), targets)

    def predict(self, image: Tensor) -> dict[str, Tensor]:
        return self.head.predict(list(self.backbone(image[None]).values()), [tuple(image.shape[1:])])[0]


def read(path: Path) -> tuple[Tensor, Tensor]:
    """A picture [3, H, W], of about zero mean and unit deviation, and its boxes [G, 4]."""
    recording = data.load(path)
    pixels = torch.from_numpy(np.array(data.picture(recording))).permute(2, 0, 1).float()
    return (pixels - 110) / 50, torch.from_numpy(recording.gt["bboxes"])


def crop(image: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A random square of a picture, flipped at random. It keeps boxes with more than 30 % of their area inside."""
    y, x = (int(torch.randint(side - size + 1, ())) for side in image.shape[1:])
    inside = (boxes - torch.tensor([x, y, x, y])).clamp(0, size)
    area, whole = ((box[:, 2:] - box[:, :2]).prod(1) for box in (inside, boxes))
    inside, image = inside[area > 0.3 * whole], image[:, y : y + size, x : x + size]
    if torch.rand(()) < 0.5:
        image, inside = image.flip(2), torch.stack([size - inside[:, 2], inside[:, 1], size - inside[:, 0], inside[:, 3]], 1)
    if torch.rand(()) < 0.5:
        image, inside = image.transpose(1, 2), inside[:, [1, 0, 3, 2]]
    return image, {"boxes": inside, "labels": torch.zeros(len(inside), dtype=torch.int64)}


def train(detector: Detector, pictures: list[tuple[Tensor, Tensor]], steps: int, size: int) -> list[float]:
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    totals = []
    for _ in (bar := trange(steps)):
        images, targets = zip(*(crop(*picture, size) for picture in pictures), strict=True)
        loss = sum(detector.loss(torch.stack(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 10)
        optimizer.step()
        schedule.step()
        totals.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(totals[-20:]):.2f}")
    return totals


def draw(file: str, totals: list[float], image: Tensor, boxes: Tensor, found: dict[str, Tensor]) -> None:
    figure, (curve, picture) = plt.subplots(1, 2, figsize=(10, 6), width_ratios=(1, 2), layout="constrained")
    curve.plot(totals, color="0.8")
    curve.plot(np.convolve(totals, np.full(20, 0.05), "valid"), color="black")
    curve.set(xlabel="step", ylabel="sum of the losses", ylim=(0, None), title="training")
    picture.imshow((image.permute(1, 2, 0) * 50 + 110).clamp(0, 255).byte())
    for corners, color in ((boxes, "white"), (found["boxes"], "#E69F00")):
        for x1, y1, x2, y2 in corners.tolist():
            picture.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.2))
    picture.set(title="trees drawn by people (white), and found (orange)", xticks=[], yticks=[])
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--size", type=int, default=320, help="side of the crops, in pixels")
    parser.add_argument("--out", default="trees.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    pictures = [read(path) for path in RECORDINGS]
    detector = Detector()
    totals = train(detector, pictures, options.steps, options.size)
    image, boxes = pictures[0]
    found = detector.eval().predict(image)
    found = {name: values[found["scores"] > 0.5] for name, values in found.items()}
    hits = int((box_iou(boxes, found["boxes"]) > 0.5).any(1).sum())
    print(f"{len(found['boxes'])} boxes find {hits} of {len(boxes)} trees with an IoU above 0.5: see {options.out}")
    draw(options.out, totals, image, boxes, found)
