"""`python -m bench.host`: what Python does before a GPU has all it needs, as a multiple of `torch.add` in the same run.

Every public call runs its host code for the Triton kernels, on CPU tensors, with launches that return at once. Triton's own part
of a launch is therefore not in it, nor are copies to the device. Times are those of this thread alone: the least of many rounds
in which the calls take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton

import paa_gpu
from paa_gpu import _ops, testing

from . import cases

ROUNDS, REPEATS = 100, 10


class HostCall(NamedTuple):
    """A public call, and the most `torch.add` it may take where that is fixed."""

    run: Callable[[], Any]
    budget: float = np.inf


def _return_at_once(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def launches_return_at_once() -> Iterator[None]:
    """The operators run the kernels' host code for CPU tensors; nothing is computed."""
    with _ops.kernels_on_cpu(), mock.patch.object(triton.runtime.jit.JITFunction, "run", _return_at_once):
        yield


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
        "batched_nms": HostCall(lambda: paa_gpu.batched_nms(*found, 0.6)),
    }


def multiples(measured: dict[str, HostCall], rounds: int = ROUNDS) -> dict[str, float]:
    """Of each call, how many times `torch.add` of three numbers it takes."""
    a = torch.zeros(3)
    least = dict.fromkeys(("torch.add", *measured), np.inf)
    runs = {"torch.add": lambda: torch.add(a, a), **{name: call.run for name, call in measured.items()}}
    with launches_return_at_once():
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.thread_time()
                for _ in range(REPEATS):
                    run()
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
