"""`python -m bench.host`: what Python does before a GPU has all it needs, as a multiple of `torch.add` in the same run.

Every public call runs its host code for the Triton kernels, on CPU tensors, with launches that return at once. Triton's own part
of a launch is therefore not in it, nor are copies to the device. Times are those of this thread alone: the least of many rounds
in which the calls take turns.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton

import paa_gpu
from paa_gpu import _checks, _dispatch, testing

from . import cases

ROUNDS, REPEATS = 100, 10
# Maps of few cells and classes: torch's own operations run here on the CPU, and what they do with numbers is the device's work.
# How many operations there are does not depend on it (`tests/test_bench.py`).
FEW = ((4, 4), (2, 2), (1, 1), (1, 1), (1, 1))


class HostCall(NamedTuple):
    """A public call, and the most `torch.add` it may take where that is fixed."""

    run: Callable[[], Any]
    budget: float = np.inf
    around: Callable[[], AbstractContextManager[object]] = nullcontext


def _return_at_once(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def launches_return_at_once() -> Iterator[None]:
    """The operators run the kernels' host code for CPU tensors; nothing is computed."""
    with _dispatch.kernels_on_cpu(), mock.patch.object(triton.runtime.jit.JITFunction, "run", _return_at_once):
        yield


@contextmanager
def as_with_results() -> Iterator[None]:
    """Memory that launches would fill has zeros, because indices are read from it. Labels and boxes are not read, as on a GPU."""
    zeros = mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    with zeros, mock.patch.object(_checks, "values_of", _return_at_once):
        yield


def head_loss(shapes: Sequence[tuple[int, int]] = FEW) -> Callable[[], dict[str, torch.Tensor]]:
    """`PAAHead.loss` from the outputs of the towers: 16 images of 7 boxes. Gradients are recorded, as in training."""
    module = paa_gpu.PAAHead(num_classes=2, in_channels=1, feat_channels=1, stacked_convs=0, norm_groups=1)
    features = [torch.zeros(16, 1, *shape) for shape in shapes]
    with torch.no_grad():
        outputs = module(features)
    for level in itertools.chain(*outputs):
        level.requires_grad_()
    module.forward = lambda _: outputs  # type: ignore[method-assign]
    targets = [{"boxes": boxes.clone(), "labels": torch.arange(7) % 2} for boxes in cases.assignment(7)[1] * 16]
    return lambda: module.loss(features, targets)


def calls() -> dict[str, HostCall]:
    """Calls as detectors make them, and their budgets."""
    batch, image = cases.coco_like(), cases.one_image()
    single = [column[0] for column in image.arguments[:6]]
    voting, losses = cases.predictions(100), cases.potential_positives()
    rows, anchors, boxes = cases.losses(112, 45), testing.make_anchors(cases.HEAD_SHAPES), cases.assignment(7)[1] * 16
    found = cases.suppression(1, 1000, 1)
    return {
        "paa_reassign_batch, 16 images": HostCall(lambda: paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options), 200),
        "paa_reassign, one image": HostCall(
            lambda: paa_gpu.paa_reassign(*single, image.anchors[0], num_classes=80, num_gt=7), 90
        ),
        "score_voting": HostCall(lambda: paa_gpu.score_voting(*voting), 30),
        "fit_gmm_1d": HostCall(lambda: paa_gpu.fit_gmm_1d(rows), 24),
        "candidate_losses, 2 images": HostCall(lambda: paa_gpu.candidate_losses(*losses)),
        "assign_max_iou, 16 images": HostCall(lambda: paa_gpu.assign_max_iou(anchors, boxes)),
        # 1,330 to 1,450 when it was first measured, and in turns with that, 655 to 730 since. A half is 690; the rest is noise.
        "PAAHead.loss, without the towers": HostCall(head_loss(), 750, as_with_results),
        "batched_nms": HostCall(lambda: paa_gpu.batched_nms(*found, 0.6)),
    }


def multiples(measured: dict[str, HostCall], rounds: int = ROUNDS) -> dict[str, float]:
    """Of each call, how many times `torch.add` of three numbers it takes."""
    a = torch.zeros(3)
    least = dict.fromkeys(("torch.add", *measured), np.inf)
    runs = {"torch.add": HostCall(lambda: torch.add(a, a)), **measured}
    with launches_return_at_once():
        for _ in range(rounds):
            for name, call in runs.items():
                with call.around():
                    start = time.thread_time()
                    for _ in range(REPEATS):
                        call.run()
                    least[name] = min(least[name], (time.thread_time() - start) / REPEATS)
    return {name: least[name] / least["torch.add"] for name in measured}


def main() -> None:
    torch.set_num_threads(1)
    measured = calls()
    print(f"host code of a call over torch.add; torch {torch.__version__}, triton {triton.__version__}")
    found = multiples(measured)
    for name, multiple in found.items():
        print(f"  {name:<32}{multiple:6.0f}   budget {measured[name].budget:.0f}")
    if any(multiple > measured[name].budget for name, multiple in found.items()):
        raise SystemExit("a call takes longer than its budget")


if __name__ == "__main__":
    main()
