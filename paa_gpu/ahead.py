"""`python -m paa_gpu compile`: compile now what later calls need.

Call it while you build the image of a container. Loops and kernels are compiled for each dtype, precision and method. So this
command makes a small call of each kind, and later calls compile no loop. Kernels also depend on the width of a row (up to a power
of two), on the number of components, and on some options, such as the scheme. A kernel that no call here uses is compiled when it
is first needed.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from . import (
    GaussianMixture1D,
    assign_max_iou,
    batched_nms,
    candidate_losses,
    fit_gmm_1d,
    paa_reassign,
    paa_reassign_batch,
    score_voting,
    score_voting_batch,
    testing,
)
from ._ops import INITS
from .diagnose import DTYPES, Cuda, Operation, cast, operations

PRECISIONS = ("float64", "float32", "mixed")
#: More candidates of a group than insertion keeps in order, and more values than one program or thread takes.
MANY, LONG = 65, 16_385


def _reassignments(rng: np.random.Generator) -> list[Operation]:
    batch, found = testing.make_batch([0, 7, 1], rng, dtype=torch.float32), []
    for topk, precision in product((9, MANY), PRECISIONS):
        options: Any = {"num_classes": batch.num_classes, "topk": topk, "precision": precision}
        image, images = tuple(column[1] for column in batch[:6]), tuple(batch[:6])
        found.append(Operation("paa_reassign", partial(paa_reassign, anchors=batch.anchors[1], **options), image))
        for separation in ("mmdet", lambda foreground, *_: (foreground, foreground)):
            several = partial(paa_reassign_batch, anchors=batch.anchors, separation=separation, **options)
            found.append(Operation("paa_reassign_batch", several, images))
    return found


def _fits(rng: np.random.Generator) -> list[Operation]:
    rows, long = (torch.from_numpy(rng.gamma(2.0, 1.0, shape)) for shape in ((3, 45), (1, LONG)))
    found = []
    for precision, components in product(PRECISIONS, (2, 3)):
        for init, x in product(INITS, (rows, long)):
            fit = partial(fit_gmm_1d, precision=precision, n_components=components, init=init)
            found += [Operation("fit_gmm_1d", fit, (x,)), Operation("fit_gmm_1d", partial(_with_means, fit), (x,))]
        fit = partial(fit_gmm_1d, precision=precision, n_components=components)
        found.append(Operation("GaussianMixture1D", partial(_read, fit), (rows,)))
    return found


def _with_means(fit: Any, x: torch.Tensor) -> GaussianMixture1D:
    mixture: GaussianMixture1D = fit(x, means_init=x[:, : fit.keywords["n_components"]])
    return mixture


def _read(fit: Any, x: torch.Tensor) -> list[Any]:
    mixture = fit(x)
    methods = mixture.predict, mixture.predict_proba, mixture.low_probability, mixture.score_samples, mixture.score
    return [method(x) for method in methods]


def _detections(rng: np.random.Generator) -> list[Operation]:
    predictions = testing.make_predictions([(30, 200), (5, 60)], rng, num_classes=3)
    det, label, boxes, scores = predictions
    best = [score.amax(1) for score in scores], [score.argmax(1) for score in scores]
    found = []
    for method, nms_pre in product(("hard", "linear", "gaussian"), (0, 20)):
        suppress: Any = partial(batched_nms, iou_threshold=0.5, method=method, nms_pre=nms_pre)
        found.append(Operation("batched_nms", partial(suppress, labels=None), (boxes, scores)))
        found.append(Operation("batched_nms", suppress, (boxes, *best)))
    pools = [[[image, image] for image in column] for column in (boxes, scores)]
    found.append(Operation("score_voting", partial(score_voting, score_thr=0.05), tuple(column[0] for column in predictions)))
    found.append(Operation("score_voting_batch", partial(score_voting_batch, score_thr=0.05), (det, label, *pools)))
    return found


def _assignments(rng: np.random.Generator) -> list[Operation]:
    anchors, boxes = testing.make_anchors([(25, 40), (13, 20)]), [testing.make_boxes(n, (320, 200), rng) for n in (9, 0)]
    head, found = testing.make_head_batch([9, 0], rng), []
    for low_quality in ("gt", "anchor"):
        match = partial(assign_max_iou, gt_bboxes_ignore=None, ignore_iof_thr=0.5, low_quality=low_quality)
        found.append(Operation("assign_max_iou", match, (anchors, boxes)))
    found += [Operation("candidate_losses", partial(candidate_losses, box_loss=loss), tuple(head)) for loss in ("giou", "l1")]
    halves = (torch.float16, torch.bfloat16)
    return [*found, *(Operation("candidate_losses", partial(_under_autocast, dtype), tuple(head)) for dtype in halves)]


def _under_autocast(dtype: torch.dtype, *columns: Any) -> list[torch.Tensor]:
    """Logits in half precision, and all else in float32."""
    anchors, cls_scores, *others = cast(columns, torch.float32)
    return candidate_losses(anchors, cast(cls_scores, dtype), *others)


def calls() -> list[Operation]:
    """A call of each kind: those that `check` compares, and others."""
    rng = np.random.default_rng(0)
    return [*operations(), *_reassignments(rng), *_fits(rng), *_detections(rng), *_assignments(rng)]


def run_compile(device: str = "cpu") -> int:
    """Make all calls on a device. Print the time of each function."""
    cuda = None if device == "cpu" else Cuda(device)
    by_name: dict[str, list[Operation]] = {}
    for operation in calls():
        by_name.setdefault(operation.name, []).append(operation)
    for name, same in by_name.items():
        start = time.perf_counter()
        for operation, dtype in product(same, DTYPES):
            arguments = cast(operation.arguments, dtype)
            operation.run(*(arguments if cuda is None else cuda.move(arguments)))
        print(f"{name:<24}{time.perf_counter() - start:8.1f} s", flush=True)
    return 0
