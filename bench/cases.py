"""Named inputs of the benchmarks: where they come from, and how large they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from paa_gpu import data, testing

# Anchors of an 800 x 1333 image with strides 8 to 128.
COCO_LEVELS = (16800, 4200, 1050, 273, 77)


def recorded() -> testing.Batch:
    """The recordings with at least one box, as one batch (27 in a checkout)."""
    recordings = [recording for recording in map(data.load, data.paths()) if recording.num_gt]
    columns = zip(*(recording.arguments for recording in recordings), strict=True)
    *tensors, anchors = map(list, columns)
    sizes = [[len(level) for level in levels] for levels in anchors]
    return testing.Batch._make([*tensors, sizes, recordings[0].num_classes, [recording.num_gt for recording in recordings]])


def recorded_voting() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """The arguments of every recorded call of `score_voting` (81 in a checkout, two of them with 80 classes)."""
    return [call.arguments for path in data.voting_paths() for call in data.load_voting(path)]


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
    return split(coco_like())[0]


def one_box() -> testing.Batch:
    """One image with one box of 60 potential positives, float32 losses."""
    return testing.make_batch([1], np.random.default_rng(3), ["bimodal"], (60, 60), dtype=torch.float32)


BATCHES: dict[str, Callable[[], testing.Batch]] = {
    "recorded": recorded,
    "coco_like": coco_like,
    "crowded": crowded,
    "one_image": one_image,
    "one_box": one_box,
}

#: Rows x length of the fit alone.
FITS = {"7x45": (7, 45), "112x45": (112, 45), "2000x45": (2000, 45), "10000x45": (10_000, 45), "1000x1000": (1000, 1000)}


def split(batch: testing.Batch) -> list[testing.Batch]:
    """The images of a batch, each as a batch of one."""
    columns = [*batch[:7], batch.num_gts]
    return [
        testing.Batch._make([*([column[image]] for column in columns[:7]), batch.num_classes, [batch.num_gts[image]]])
        for image in range(len(batch.num_gts))
    ]


def losses(rows: int, length: int) -> torch.Tensor:
    """Rows of bimodal losses, Tensor[rows, length] float64, ascending."""
    rng = np.random.default_rng(2)
    return torch.from_numpy(np.sort(np.stack([testing.make_losses("bimodal", length, rng) for _ in range(rows)])))
