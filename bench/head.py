"""`make bench-mmdet`: mmdetection's real PAAHead with and without `accelerate`, on the CPU, side by side in one run.

The published configuration (80 classes, 5 levels, 256 channels, 4 convolutions in each tower) gets random features of two 320 x 512
images. Results are checked before anything is timed. A time is the fastest of 3 interleaved rounds, because the convolutions take
seconds, and other programs on the machine disturb them. The times of the assignment come from the same calls.
"""

from __future__ import annotations

import copy
import datetime
import functools
import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import heads  # tests/mmdet; imports mmdet
import mmdet
import sklearn
import torch

import paa_gpu
from paa_gpu import reference, targets
from paa_gpu.integrations import mmdet as integration

SIZE = (320, 512)


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, mmdet {mmdet.__version__}, torch {torch.__version__}, "
          f"scikit-learn {sklearn.__version__}, paa_gpu {paa_gpu.__version__}")  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = spread(heads.build().eval())
    features = heads.make_features(2, SIZE, 256, generator)
    for boxes in (7, 50):
        loss(head, features, heads.make_samples([boxes] * 2, SIZE, head.num_classes, generator))
    predict(head, features, heads.make_samples([0, 0], SIZE, head.num_classes, generator))


def spread(head: Any) -> Any:
    """Scores that vary as a trained head's do. About 2,000 of an image are above the threshold."""
    torch.nn.init.normal_(head.atss_cls.weight, std=0.03)
    torch.nn.init.constant_(head.atss_cls.bias, -8.5)
    return head


def loss(head: Any, features: list[torch.Tensor], samples: list[Any]) -> None:
    """`loss`, and a step with backward. The assignment: the published head's calls of `paa_reassign`, the library's one call."""
    published, accelerated, oracle = copy.deepcopy(head), integration.accelerate(copy.deepcopy(head)), copy.deepcopy(head)
    oracle.paa_reassign = functools.partial(reference.paa_reassign, num_classes=head.num_classes)
    got = heads.step(accelerated, features, samples)
    heads.assert_same_step(got, heads.step(oracle, features, samples))
    watches = {name: [Stopwatch(), Stopwatch(), Stopwatch()] for name in ("published", "accelerated")}
    for name, each in (("published", published), ("accelerated", accelerated)):
        each.loss, each.loss_by_feat = watches[name][0].around(each.loss), watches[name][1].around(each.loss_by_feat)
    published.paa_reassign = watches["published"][2].around(published.paa_reassign)
    batch = watches["accelerated"][2].around(targets.paa_reassign_batch)
    differ = int((heads.step(published, features, samples).labels != got.labels).sum())
    with mock.patch.object(targets, "paa_reassign_batch", batch):
        rows = interleaved({
            name: (functools.partial(heads.step, each, features, samples), *watches[name])
            for name, each in (("published", published), ("accelerated", accelerated))
        })  # fmt: skip
    boxes, positives = [len(sample.gt_instances) for sample in samples], int((got.labels < head.num_classes).sum())
    print(f"loss, images of {boxes} boxes, {positives} positives ({differ} labels of the published float32 head differ)")
    for name, (step, loss, by_feat, assignment) in rows.items():
        print(f"  {name:<12} loss {loss * 1e3:.0f} ms, of it loss_by_feat {by_feat * 1e3:.0f} ms and in that the assignment "
              f"{assignment * 1e3:.1f} ms: {assignment / by_feat:.1%} of loss_by_feat, {assignment / loss:.1%} of loss, "
              f"{assignment / step:.2%} of the step with backward, {step * 1e3:.0f} ms")  # fmt: skip


class Stopwatch:
    """The time that the calls of a function took since the last reading."""

    def __init__(self) -> None:
        self.elapsed = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.elapsed += time.perf_counter() - start
            return result

        return timed

    def read(self) -> float:
        elapsed, self.elapsed = self.elapsed, 0.0
        return elapsed


def interleaved(calls: dict[str, tuple[Any, ...]], rounds: int = 3) -> dict[str, list[float]]:
    """For each name, the time of its fastest call, and the shortest reading of each of its stopwatches."""
    seen: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, *watches) in calls.items():
            for watch in watches:
                watch.read()
            start = time.perf_counter()
            call()
            seen[name].append([time.perf_counter() - start, *(watch.read() for watch in watches)])
    return {name: [min(column) for column in zip(*times, strict=True)] for name, times in seen.items()}


@torch.no_grad()
def predict(head: Any, features: list[torch.Tensor], samples: list[Any]) -> None:
    """`predict` with NMS and score voting."""
    accelerated, published = integration.accelerate(copy.deepcopy(head)), copy.deepcopy(head)
    for ours, theirs in zip(accelerated.predict(features, samples), published.predict(features, samples), strict=True):
        heads.assert_same_detections(ours, theirs)
    ours, theirs = Stopwatch(), Stopwatch()
    published.score_voting, accelerated.score_voting = (
        theirs.around(published.score_voting),
        ours.around(accelerated.score_voting),
    )
    rows = interleaved({
        "published": (lambda: published.predict(features, samples), theirs),
        "accelerated": (lambda: accelerated.predict(features, samples), ours),
    })  # fmt: skip
    kept = [len(detections) for detections in accelerated.predict(features, samples)]
    print(f"predict, images with {kept} detections")
    for name, (total, voting) in rows.items():
        print(f"  {name:<12} predict {total * 1e3:.0f} ms, of it voting {voting * 1e3:.1f} ms ({voting / total:.1%})")


if __name__ == "__main__":
    main()
