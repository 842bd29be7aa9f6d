"""Who answers: the published loop, and this library. Every provider takes a batch and returns the targets of its images."""

from __future__ import annotations

import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import paa_gpu
from paa_gpu import reference, testing

Targets = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]


def published(batch: testing.Batch) -> Targets:
    """The published head's loop, image by image: mmdetection's own code where it is installed, else our reference."""
    loop = _mmdet_loop(batch.num_classes)
    return [loop(*arguments) for arguments in zip(*batch.arguments, strict=True)]


def has_mmdet() -> bool:
    """By its metadata: under pytest, `mmdet` also finds the folder tests/mmdet."""
    try:
        return bool(importlib.metadata.version("mmdet"))
    except importlib.metadata.PackageNotFoundError:
        return False


def _mmdet_loop(num_classes: int) -> Callable[..., Any]:
    if not has_mmdet():
        return lambda *arguments: reference.paa_reassign(*arguments, num_classes=num_classes, published=True)
    head = _mmdet_head(num_classes)

    def loop(*arguments: Any) -> Any:
        *tensors, levels = arguments
        return head.paa_reassign(*tensors, [torch.empty(size, 4) for size in levels])

    return loop


def library(batch: testing.Batch) -> Targets:
    """One call of `paa_reassign_batch`."""
    got = paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options)
    return list(zip(got.label, got.label_weight, got.bbox_weight, got.num_pos.tolist(), strict=True))


def library_one_by_one(batch: testing.Batch) -> Targets:
    """`paa_reassign` for one image after the other; it finds the number of ground truths itself, as the published loop does."""
    columns = zip(*batch.arguments, strict=True)
    return [paa_gpu.paa_reassign(*arguments, num_classes=batch.num_classes) for arguments in columns]


def published_voting(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`PAAHead.score_voting`: mmdetection's own code where it is installed, else our reference."""
    if not has_mmdet():
        return reference.score_voting(*arguments, published=True)
    return _mmdet_head(arguments[3].shape[1] - 1).score_voting(*arguments)


@functools.cache
def _mmdet_head(num_classes: int) -> Any:
    from mmdet.models.dense_heads import PAAHead

    return PAAHead(num_classes, 8, feat_channels=8, stacked_convs=1, covariance_type="diag")


def check_voting(*arguments: Any) -> float:
    """Raise unless the library gives the published order, labels and scores, and boxes within a thousandth of a pixel; returns the
    largest difference."""
    (got, labels), (wanted, wanted_labels) = paa_gpu.score_voting(*arguments), published_voting(*arguments)
    difference = float((got - wanted).abs().max())
    if not (torch.equal(labels, wanted_labels) and torch.equal(got[:, 4], wanted[:, 4]) and difference <= 1e-3):
        raise AssertionError(f"score_voting does not give the published detections: {difference} pixels")
    return difference


def check_agreement(batch: testing.Batch, provider: Callable[[testing.Batch], Targets]) -> tuple[int, int]:
    """Raise unless a provider gives the oracle's targets. Where the published loop itself, fed with float32 losses, does not (its
    squares are rounded), the oracle in float64 decides. Returns the positives of the oracle, and how many of the loop differ."""
    differ = total = 0
    got, wanted = provider(batch), published(batch)
    for arguments, ours, theirs in zip(zip(*batch.arguments, strict=True), got, wanted, strict=True):
        oracle = reference.paa_reassign(*arguments, num_classes=batch.num_classes)
        if not all(torch.equal(a, b) for a, b in zip(ours[:3], oracle[:3], strict=True)) or ours[3] != oracle[3]:
            raise AssertionError(f"{provider.__name__} does not give the oracle's targets")
        total += oracle[3]
        differ += int((theirs[0] != oracle[0]).sum())
    return total, differ


def interleaved(calls: Sequence[Callable[[], Any]], rounds: int = 5, repeats: Sequence[int] | None = None) -> list[float]:
    """The median time of each call, in seconds, over `rounds` in which each takes its turn, the mean of its `repeats` at a time:
    a call of a millisecond is not timed once after a loop of half a second, with cold caches and a sleeping core."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for taken, call, count in zip(times, calls, repeats or [1] * len(calls), strict=True):
            start = time.perf_counter()
            for _ in range(count):
                call()
            taken.append((time.perf_counter() - start) / count)
    return [statistics.median(taken) for taken in times]
