"""`PYTHONPATH=tests python -m bench.work`: the work of the compiled kernels. ptxrun counts it on the CPU. It measures no time.

It counts warp instructions (PTX, without moves) by class. It also counts the 32-byte sectors that loads touch, over those that their
bytes fill. The calls are: `paa_reassign_batch` of the recorded images, of a crowded image, of ten times fewer boxes over the same
potential positives, and of one box with all anchors of an image; the EM loop alone, per row and iteration; `score_voting` of recorded predictions with one class and with 80;
`candidate_losses`; and `assign_max_iou` of few boxes and of many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from kernel_execution import execute

import paa_gpu
from paa_gpu import data, testing

from . import cases

CAPABILITY = 90


def main() -> None:
    batches = {"recorded": cases.recorded(), "600 boxes": crowd(600), "60 boxes": crowd(60), "all anchors": all_anchors()}
    for name, batch in batches.items():
        positives = sum(inds.shape[0] for inds in batch.pos_inds)
        print(f"\n{name}: {len(batch.num_gts)} images, {sum(batch.num_gts)} boxes, {positives} potential positives")
        count(paa_gpu.paa_reassign_batch, *batch.arguments, **batch.options)
    print(f"\nEM loop, a row of 45 and iteration, sm_{CAPABILITY}")
    for precision in ("float64", "float32"):
        print(f"  {precision:<24}{report(em_iteration(precision))}")
    for path in (data.BUNDLED, data.voting_paths()[-1]):
        call = data.load_voting(path)[0]
        boxes, classes = call.mlvl_nms_scores.shape
        print(f"\nscore voting, {call.name}: {len(call.det_labels)} detections, {boxes} boxes, {classes - 1} classes")
        count(paa_gpu.score_voting, *call.arguments)
    print("\ncandidate losses: 2 images of 2,000 potential positives, 80 classes")
    count(paa_gpu.candidate_losses, *cases.potential_positives())
    for boxes in (7, 200):
        anchors, gt_bboxes = cases.assignment(boxes)
        print(f"\nassignment: {sum(level.shape[0] for level in anchors)} anchors, {boxes} boxes")
        count(paa_gpu.assign_max_iou, anchors, gt_bboxes)


def count(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Run a public function on the compiled kernels, and print the work of each kernel."""
    with execute(CAPABILITY, seed=None, racecheck=0, count=True) as session:
        function(*args, **options)
    for kernel, counters in session.by_kernel().items():
        sectors = counters.load_sectors / max(counters.load_bytes / 32, 1)
        print(f"  {kernel:<24}{report(counters.warp_classes)}; load sectors {sectors:.2f} of those needed, sm_{CAPABILITY}")


def crowd(boxes: int) -> testing.Batch:
    """One image of 200,000 potential positives, shared by any number of boxes."""
    rng, each = np.random.default_rng(0), 200_000 // boxes
    return testing.make_batch([boxes], rng, ["bimodal"], (each, each), level_sizes=(200_000, 50_000), dtype=torch.float32)


def all_anchors() -> testing.Batch:
    """One box. All 22,400 anchors of an image of 800 x 1,333 pixels are its potential positives."""
    anchors = sum(cases.COCO_LEVELS)
    rng = np.random.default_rng(0)
    return testing.make_batch([1], rng, ["bimodal"], (anchors, anchors), level_sizes=cases.COCO_LEVELS, dtype=torch.float32)


def em_iteration(precision: str) -> Counter[str]:
    """The work of one iteration: the difference between 13 and 3 iterations of 20 rows."""
    x, counted = cases.losses(20, 45), []
    for max_iter in (3, 13):
        with execute(CAPABILITY, seed=None, racecheck=0, count=True) as session:
            paa_gpu.fit_gmm_1d(x, tol=0.0, max_iter=max_iter, precision=precision)
        counted.append(session.counters.warp_classes)
    return Counter({name: (counted[1][name] - counted[0][name]) / 200 for name in counted[1]})


def report(classes: Any) -> str:
    counts = {name: number for name, number in classes.most_common() if name != "mov" and number}
    return f"{sum(counts.values()):,.0f} instructions: " + ", ".join(f"{name} {number:,.0f}" for name, number in counts.items())


if __name__ == "__main__":
    main()
