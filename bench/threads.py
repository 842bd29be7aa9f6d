"""`python -m bench.threads`: every operation whose images or rows threads share, on one thread and on all.

What a loop costs in microseconds, and what it costs to hand a slice over (`paa_gpu/cpu/_loops.py`), was measured. It has to be right
to a factor only: a second thread must not make a call slower. The last column is the time on all threads as a part of that on one.
Times are medians, in turns.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import paa_gpu
from paa_gpu import testing

from . import cases, machine

ROUNDS = 15
IMAGES, SIZES = (2, 4, 16), (30, 300, 1500)


def calls(images: int, size: int) -> dict[str, Callable[[], Any]]:
    """A call of each operation. `size` is that of an image or of a row."""
    rng = np.random.default_rng(0)
    batch = testing.make_batch([3] * images, rng, ["bimodal"], (size // 3, size // 3), (1, 1), (4 * size, size, 9))
    pos_losses, *targets, inds, gts = ([*column] for column in batch[:6])
    for column in (pos_losses, inds, gts):
        column[-1] = column[-1].flip(0)  # one image whose anchors descend
    predictions = testing.make_predictions([(max(size // 10, 3), size)] * images, rng, num_classes=4)
    boxes, head = cases.suppression(images, size, 2), testing.make_head_batch([size // 2] * images, rng, ((size, 4), (9, 5)))
    models, x = cases.fusion(images, 3, size, 2), cases.losses(8 * images, size)
    return {
        "paa_reassign_batch": lambda: paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options),
        "paa_reassign_batch, anchors in any order": lambda: paa_gpu.paa_reassign_batch(
            pos_losses, *targets, inds, gts, batch.anchors, **batch.options
        ),
        "paa_reassign_batch, a callable": lambda: paa_gpu.paa_reassign_batch(
            *batch.arguments, **batch.options, separation=lambda assignment, *others: (assignment, ~others[-1])
        ),
        "score_voting_batch": lambda: paa_gpu.score_voting_batch(*predictions, 0.05),
        "batched_nms": lambda: paa_gpu.batched_nms(*boxes, 0.5),
        "batched_nms, soft": lambda: paa_gpu.batched_nms(*boxes, 0.5, method="linear"),
        "batched_nms of scores": lambda: paa_gpu.batched_nms(predictions.mlvl_bboxes, predictions.mlvl_nms_scores, None, 0.5),
        "weighted_boxes_fusion": lambda: paa_gpu.weighted_boxes_fusion(*models),
        "candidate_losses": lambda: paa_gpu.candidate_losses(*head),
        "fit_gmm_1d": lambda: paa_gpu.fit_gmm_1d(x),
        "fit_gmm_1d, k-means": lambda: paa_gpu.fit_gmm_1d(x, init="kmeans", means_init=x[:, :2]),
        "fit_gmm_1d, three components": lambda: paa_gpu.fit_gmm_1d(x[: 2 * images], n_components=3),
    }


def seconds(call: Callable[[], Any], threads: tuple[int, ...], rounds: int = ROUNDS) -> list[float]:
    """The median time on each number of threads."""
    usual, times = torch.get_num_threads(), [[] for _ in threads]
    call()
    try:
        for _ in range(rounds):
            for number, taken in zip(threads, times, strict=True):
                torch.set_num_threads(number)
                for _ in range(3):
                    start = time.perf_counter()
                    call()
                    taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(usual)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    threads = os.cpu_count() or 1
    print(f"{machine.describe()['cpu']}, {threads} threads, torch {torch.__version__}, commit {machine.commit()}")
    for images, size in itertools.product(IMAGES, SIZES):
        for name, call in calls(images, size).items():
            one, all_threads = seconds(call, (1, threads))
            print(
                f"{name:<42}{images:>3} of {size:>5}: {one * 1e6:9.0f} us, {all_threads * 1e6:9.0f} us  {all_threads / one:.2f}"
            )


if __name__ == "__main__":
    main()
