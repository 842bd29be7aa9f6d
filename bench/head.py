"""`make bench-mmdet`: mmdetection's real PAAHead and the accelerated one, on one device, side by side in one run.

Training: the loss of the published configuration (80 classes, 5 levels), from the outputs of the levels. The towers are left out. There
are three ways: the published head; the accelerated head as it was before, which a head with parts of its own still is; the accelerated
head. Results are checked before anything is timed. Times are medians of interleaved rounds. The times of the parts come from the same
calls. With `--loaded`, for a machine with other work to do, they are CPU times of the process, on one thread. Waits are those of a CUDA device, counted on the CPU. Memory is the peak of the process, reset before each call (Linux).

With `--device cuda`, the heads and all tensors are there, and each time begins and ends with an idle device. So a loss takes longer
here than one whose parts nobody times.

Inference: `predict` of the published configuration, with its towers, on random features of two images.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import heads  # tests/mmdet; imports mmdet
import mmdet
import sklearn
import torch
from api import truth_of
from synchronisations import Synchronisations

import paa_gpu
from paa_gpu import reference, targets
from paa_gpu.integrations import mmdet as integration
from paa_gpu.integrations.mmdet import heads as ours
from paa_gpu.integrations.mmdet import whole
from paa_gpu.integrations.mmdet.versions import Truth

from . import machine, matching

CHANNELS, CLASSES = 256, 80  # of the published configuration
BATCHES = ((2, 7), (16, 7), (16, 60))  # images, boxes of each
PARTS = ("anchors and IoU assignment", "losses of the candidates", "reassignment", "classification loss", "box and IoU losses")
Maps = list[list[torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(320, 512), help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loaded", action="store_true", help="one thread, and CPU time instead of wall time")
    parser.add_argument(
        "--device", type=torch.device, default="cpu", help="where the heads and tensors are (default: %(default)s)"
    )
    options = parser.parse_args()
    size, rounds, device = tuple(options.size), options.rounds, options.device
    torch.set_num_threads(1 if options.loaded else os.cpu_count() or 1)
    Parts.clock = time.process_time if options.loaded else time.perf_counter
    if device.type == "cuda":
        Parts.clock = functools.partial(idle_clock, device)
    versions = (
        f"mmdet {mmdet.__version__}, torch {torch.__version__}, scikit-learn {sklearn.__version__}, paa_gpu {paa_gpu.__version__}"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.describe()["cpu"]
    print(f"{datetime.date.today()}, {name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"{'CPU time on one thread' if options.loaded else 'wall time'}, {versions}, commit {machine.commit()}; images of "
          f"{size[0]} x {size[1]} pixels")  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    small = heads.build(in_channels=32, feat_channels=32, stacked_convs=1).to(device)  # the outputs have the same shapes
    spread(small, 0.09)
    for images, boxes in BATCHES:
        loss(small, *inputs(images, boxes, size, 32, generator, device), rounds)
    head = spread(heads.build().eval().to(device), 0.03)  # some 2,000 scores of an image are above the threshold
    predict(head, *inputs(2, 0, size, CHANNELS, generator, device))


def idle_clock(device: torch.device) -> float:
    """Seconds, read when the device has nothing to do."""
    torch.cuda.synchronize(device)
    return time.perf_counter()


def inputs(
    images: int, boxes: int, size: tuple[int, int], channels: int, generator: torch.Generator, device: torch.device
) -> tuple[list[torch.Tensor], list[Any]]:
    """Features and samples of a batch."""
    samples = heads.make_samples([boxes] * images, size, CLASSES, generator)
    for sample in samples:
        for name in ("bboxes", "labels"):
            setattr(sample.gt_instances, name, getattr(sample.gt_instances, name).to(device))
    return [level.to(device) for level in heads.make_features(images, size, channels, generator)], samples


def spread(head: Any, std: float) -> Any:
    """Scores that vary as a trained head's do. scikit-learn refuses the losses of a new head: in float32 they are too close together."""
    torch.nn.init.normal_(head.atss_cls.weight, std=std)
    torch.nn.init.constant_(head.atss_cls.bias, -8.5)
    return head


# --- training -------------------------------------------------------------------------------------------------------------------


class Parts:
    """The seconds that each part of a loss took since the last reading. A part inside another counts as the outer one."""

    clock = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.elapsed: Counter[str] = Counter()
        self.running = False

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return function(*args, **kwargs)
            self.running, start = True, self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.running = False
                self.elapsed[part] += self.clock() - start

        return timed

    def read(self) -> Counter[str]:
        elapsed, self.elapsed = self.elapsed, Counter()
        return elapsed


#: Where each part is, in the published head and in the library.
OWN_PARTS = {"get_anchors": PARTS[0], "get_targets": PARTS[0], "get_pos_loss": PARTS[1]}
OWN_LOSSES = {"loss_cls": PARTS[3], "loss_bbox": PARTS[4], "loss_centerness": PARTS[4]}
LIBRARY_PARTS = [
    (whole, "_valid", PARTS[0]), (targets, "assignment_of", PARTS[0]), (targets, "losses_of", PARTS[1]),
    (targets, "reassignment_of", PARTS[2]), (whole, "_classification", PARTS[3]), (whole, "positive_losses", PARTS[4]),
]  # fmt: skip


def published(head: Any, parts: Parts) -> Any:
    """A copy of a head whose own parts are timed."""
    head = copy.deepcopy(head)
    for name, part in OWN_PARTS.items():
        setattr(head, name, parts.around(part, getattr(head, name)))
    for name, part in OWN_LOSSES.items():
        module = getattr(head, name)
        module.forward = parts.around(part, module.forward)
    return head


@contextmanager
def timed(parts: Parts) -> Iterator[None]:
    """The library's parts are timed."""
    with ExitStack() as stack:
        for module, name, part in LIBRARY_PARTS:
            stack.enter_context(mock.patch.object(module, name, parts.around(part, getattr(module, name))))
        stack.enter_context(mock.patch.object(ours, "_reassign", parts.around(PARTS[2], ours._reassign)))
        yield


def loss(head: Any, features: list[torch.Tensor], samples: list[Any], rounds: int) -> None:
    """Time, waits and memory of one batch in three ways."""
    with torch.no_grad():
        maps = [[level.detach() for level in levels] for levels in head(features)]
    accelerated, oracle = integration.accelerate(copy.deepcopy(head)), copy.deepcopy(head)
    oracle.paa_reassign = functools.partial(reference.paa_reassign, num_classes=head.num_classes)
    differ = check(accelerated, oracle, head, features, samples)
    parts = Parts()
    theirs, before = published(head, parts), published(accelerated, parts)
    theirs.paa_reassign = parts.around(PARTS[2], theirs.paa_reassign)
    ways = {"published": theirs, "accelerated, before": before, "accelerated": accelerated}
    truth = truth_of(samples)
    times: dict[str, list[Counter[str]]] = {name: [] for name in ways}
    with timed(parts):
        for _ in range(rounds + 1):
            for name, each in ways.items():
                times[name].append(one_call(each, maps, truth, parts))
    print(f"loss of {len(samples)} images with {len(samples[0].gt_instances)} boxes each; {differ} labels of the published float32 "
          "head differ")  # fmt: skip
    totals = {}
    for name, each in ways.items():
        taken = {part: statistics.median(call[part] for call in times[name][1:]) for part in (*PARTS, "rest", "all", "backward")}
        waits, peak = waits_of(each, maps, truth), peak_of(name, each, maps, truth)
        totals[name] = taken
        print(f"  {name:<20} {1e3 * taken.pop('all'):7.1f} ms; " + ", ".join(f"{part} {1e3 * taken[part]:.1f}" for part in taken)
              + f"; {waits} waits; peak of the assignment {peak / 2**20:.1f} MiB")  # fmt: skip
    for name in ("published", "accelerated, before"):
        rows = list(zip(times[name][1:], times["accelerated"][1:], strict=True))
        forward = statistics.median(a["all"] / b["all"] for a, b in rows)
        both = statistics.median((a["all"] + a["backward"]) / (b["all"] + b["backward"]) for a, b in rows)
        print(f"  {name} / accelerated: {forward:.2f} of the loss, {both:.2f} with backward")


def check(accelerated: Any, oracle: Any, head: Any, features: list[torch.Tensor], samples: list[Any]) -> int:
    """Check the accelerated head. Return how many labels of the published head differ, which fits in float32."""
    got = heads.step(accelerated, features, samples)
    heads.assert_same_step(got, heads.step(oracle, features, samples))
    with mock.patch.object(ours, "_whole", lambda *_: False):
        heads.assert_same_step(heads.step(accelerated, features, samples), got)
    return int((heads.step(copy.deepcopy(head), features, samples).labels != got.labels).sum())


def old_way(head: Any) -> Any:
    """A head with timed methods looks like a head with methods of its own. Here it always takes the way of such heads."""
    return mock.patch.object(ours, "_whole", lambda *_: False) if "get_targets" in vars(head) else ExitStack()


def one_call(head: Any, maps: Maps, truth: tuple[Any, ...], parts: Parts) -> Counter[str]:
    """The times of the parts, of the rest, of all of the loss, and of its backward pass to the maps."""
    leaves = [[level.clone().requires_grad_() for level in levels] for levels in maps]
    parts.read()
    with old_way(head):
        start = parts.clock()
        losses = head.loss_by_feat(*leaves, *truth)
        end = parts.clock()
    taken = parts.read()
    taken["rest"], taken["all"] = end - start - sum(taken.values()), end - start
    sum(losses.values()).backward()
    taken["backward"] = parts.clock() - end
    return taken


def waits_of(head: Any, maps: Maps, truth: tuple[Any, ...]) -> int:
    with old_way(head), Synchronisations() as mode:
        head.loss_by_feat(*maps, *truth)
    return mode.count


def peak_of(name: str, head: Any, maps: Maps, truth: tuple[Any, ...]) -> float:
    """The bytes that assignment takes, from the maps to the targets: the median of three calls."""
    assign = whole.assign if name == "accelerated" else ours._assign
    call = functools.partial(assign, head, *maps[:2], Truth.of(*truth))
    if maps[0][0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    return statistics.median(matching.measure(call)["bytes"] for _ in range(3))


# --- inference ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(head: Any, features: list[torch.Tensor], samples: list[Any]) -> None:
    """`predict` with NMS and score voting."""
    accelerated, theirs = integration.accelerate(copy.deepcopy(head)), copy.deepcopy(head)
    found = accelerated.predict(features, samples)
    for mine, other in zip(found, theirs.predict(features, samples), strict=True):
        heads.assert_same_detections(mine, other)
    parts, times = Parts(), {}
    for each in (theirs, accelerated):
        each.score_voting = parts.around("voting", each.score_voting)
    for _ in range(3):
        for name, each in (("published", theirs), ("accelerated", accelerated)):
            start = parts.clock()
            each.predict(features, samples)
            taken = parts.read()
            taken["all"] = parts.clock() - start
            times.setdefault(name, []).append(taken)
    print(f"predict, images with {[len(image) for image in found]} detections")
    for name, calls in times.items():
        everything, voting = (statistics.median(call[part] for call in calls) for part in ("all", "voting"))
        print(f"  {name:<20} {1e3 * everything:.0f} ms, of it voting {1e3 * voting:.1f} ms ({voting / everything:.1%})")


if __name__ == "__main__":
    main()
