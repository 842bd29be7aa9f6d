"""Named inputs of the benchmarks, with their origin and size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from paa_gpu import data, testing

Voting = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]

# Anchors of an 800 x 1333 image with strides 8 to 128.
COCO_LEVELS = (16800, 4200, 1050, 273, 77)


class Call(NamedTuple):
    """A call of `paa_reassign_batch`."""

    batch: testing.Batch
    topk: int = 9

    @property
    def options(self) -> dict[str, Any]:
        return {**self.batch.options, "topk": self.topk}

    def to(self, device: torch.device | str) -> Call:
        return self._replace(batch=self.batch.to(device))


def recorded() -> testing.Batch:
    """The recordings with at least one box, as one batch (27 in a checkout)."""
    recordings = [recording for recording in map(data.load, data.paths()) if recording.num_gt]
    columns = zip(*(recording.arguments for recording in recordings), strict=True)
    *tensors, anchors = map(list, columns)
    sizes = [[len(level) for level in levels] for levels in anchors]
    return testing.Batch._make([*tensors, sizes, recordings[0].num_classes, [recording.num_gt for recording in recordings]])


def recorded_voting() -> dict[str, Voting]:
    """The arguments of every recorded call of `score_voting` (81 in a checkout, two of them with 80 classes)."""
    return {call.name: call.arguments for path in data.voting_paths() for call in data.load_voting(path)}


def predictions(detections: int) -> Voting:
    """This many detections of 80 classes among 5,000 boxes."""
    made = testing.make_predictions([(detections, 5000)], np.random.default_rng(4))
    return (*(column[0] for column in made), 0.05)


def coco_like() -> testing.Batch:
    """16 images of 7 boxes, float32 losses."""
    rng = np.random.default_rng(0)
    return testing.make_batch([7] * 16, rng, ["bimodal"], (100, 400), level_sizes=COCO_LEVELS, dtype=torch.float32)


def crowded() -> testing.Batch:
    """600 boxes in one image, float32 losses."""
    rng = np.random.default_rng(1)
    return testing.make_batch([600], rng, ["bimodal"], (10, 60), level_sizes=COCO_LEVELS, dtype=torch.float32)


def one_image() -> testing.Batch:
    """One image of 7 boxes, float32 losses."""
    return split(Call(coco_like()))[0].batch


def one_box() -> testing.Batch:
    """One image with one box of 60 potential positives, float32 losses."""
    return testing.make_batch([1], np.random.default_rng(3), ["bimodal"], (60, 60), dtype=torch.float32)


def large_groups() -> testing.Batch:
    """4 images of 7 boxes with about 900 potential positives each, for a larger `topk` than usual."""
    rng = np.random.default_rng(5)
    return testing.make_batch([7] * 4, rng, ["bimodal"], (600, 1200), level_sizes=COCO_LEVELS, dtype=torch.float32)


#: Calls of `paa_reassign_batch`.
REASSIGN: dict[str, Callable[[], Call]] = {
    "recorded": lambda: Call(recorded()),
    "coco_like": lambda: Call(coco_like()),
    "crowded": lambda: Call(crowded()),
    "one_image": lambda: Call(one_image()),
    "one_box": lambda: Call(one_box()),
    "topk_9": lambda: Call(large_groups(), 9),
    "topk_25": lambda: Call(large_groups(), 25),
    "topk_100": lambda: Call(large_groups(), 100),
}

#: Calls of `score_voting`: recorded with one class and with 80, and made.
VOTING: dict[str, Callable[[], Voting]] = {
    "recorded_one_class": lambda: next(iter(recorded_voting().values())),
    "recorded_80_classes": lambda: list(recorded_voting().values())[-1],
    "100_detections": lambda: predictions(100),
    "1000_detections": lambda: predictions(1000),
}

HEAD_SHAPES = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))  # levels of an 800 x 1333 image

#: Rows x length of the fit alone.
FITS = {"7x45": (7, 45), "112x45": (112, 45), "2000x45": (2000, 45), "10000x45": (10_000, 45), "1000x1000": (1000, 1000)}


def split(call: Call) -> list[Call]:
    """One call for each image of a call."""
    batch = call.batch
    images = zip(*batch[:7], batch.num_gts, strict=True)
    return [
        call._replace(batch=testing.Batch(*([part] for part in parts), batch.num_classes, [num_gt])) for *parts, num_gt in images
    ]


def potential_positives() -> testing.HeadBatch:
    """The arguments of `candidate_losses`: two images, 80 classes, 2,000 potential positives each."""
    return testing.make_head_batch([2000, 2000], np.random.default_rng(0), HEAD_SHAPES, num_classes=80)


def suppression(images: int, boxes: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes [images, boxes, 4] of about 60 pixels in a picture of 800, with scores and labels, for `batched_nms`."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 800, (images, boxes, 2))
    corners = np.concatenate([corner, corner + rng.uniform(4, 104, (images, boxes, 2))], 2)
    scores, labels = rng.random((images, boxes)), rng.integers(classes, size=(images, boxes))
    return torch.from_numpy(corners).float(), torch.from_numpy(scores).float(), torch.from_numpy(labels)


def fusion(images: int, models: int, boxes: int, classes: int) -> list[list[list[torch.Tensor]]]:
    """Boxes, scores and labels of each model around the same 60 objects of each image, for `weighted_boxes_fusion`."""
    rng = np.random.default_rng(0)
    columns: list[list[list[torch.Tensor]]] = [[], [], []]
    for _ in range(images):
        corner, label = rng.uniform(0, 0.7, (60, 2)), rng.integers(classes, size=60)
        truth = np.concatenate([corner, corner + rng.uniform(0.05, 0.3, (60, 2))], 1)
        which = rng.integers(60, size=(models, boxes))
        values = truth[which] + rng.normal(0, 0.01, (models, boxes, 4)), rng.random((models, boxes)), label[which]
        for column, part in zip(columns, values, strict=True):
            column.append(list(torch.from_numpy(part.clip(0, 1) if part.ndim == 3 else part)))
    return columns


def assignment(boxes: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Anchors and boxes of one image, for `assign_max_iou`."""
    return testing.make_anchors(HEAD_SHAPES), [testing.make_boxes(boxes, (1333, 800), np.random.default_rng(0))]


def losses(rows: int, length: int) -> torch.Tensor:
    """Rows of bimodal losses, Tensor[rows, length] float64, ascending."""
    rng = np.random.default_rng(2)
    return torch.from_numpy(np.sort(np.stack([testing.make_losses("bimodal", length, rng) for _ in range(rows)])))


#: What noisy-label learning fits: losses of all samples, of 100 classes, and of 80 classes of few samples.
MIXTURES: dict[str, Callable[[], list[torch.Tensor]]] = {
    "1x1000000": lambda: normalised_losses([1_000_000]),
    "1x50000": lambda: normalised_losses([50_000]),
    "100x50000": lambda: normalised_losses([50_000] * 100),
    "80x100_to_1000": lambda: normalised_losses(np.random.default_rng(7).integers(100, 1001, 80).tolist()),
}


def normalised_losses(lengths: list[int]) -> list[torch.Tensor]:
    """Losses after the warm-up of a training, float64. Two fifths of the labels are wrong."""
    rng = np.random.default_rng(6)
    return [torch.from_numpy(testing.make_noisy_label_losses(length, 0.4, rng)) for length in lengths]
