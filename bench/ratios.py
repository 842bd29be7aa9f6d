"""`python -m bench.ratios [--device cuda]`: this library against what one would otherwise run, on one device, side by side in one run.

Every result is checked before it is timed. Times are medians of the calls in 5 interleaved rounds. Run it with OMP_NUM_THREADS=1, as `make
bench` does. More threads make the published loop slower and erratic. The library's loops get all cores anyway.

With `--device cuda`, both get the same tensors on the GPU, and a time ends when the GPU is done. Where mmdetection is not installed, the
published loop copies an image to the host once, instead of many times for each box. So it is faster than mmdetection's own.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time

import ensemble_boxes
import sklearn
import torch
import torchvision

import paa_gpu
from paa_gpu import reference

from . import cases, providers

Device = str | torch.device

IMPORTS = """
import time, torch
start = time.perf_counter()
import paa_gpu
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cpu", help="where the tensors are (default: %(default)s)")
    device = parser.parse_args().device
    torch.set_num_threads(os.cpu_count() or 1)
    baseline = "mmdet's PAAHead" if providers.MMDET else "paa_gpu.reference(published=True)"
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name += f", {torch.cuda.get_device_name(device)}"
    print(f"{datetime.date.today()}, {name}, {os.cpu_count()} cores, Python "
          f"{platform.python_version()}, torch {torch.__version__}, scikit-learn {sklearn.__version__}; baseline: {baseline}")  # fmt: skip
    for case in ("recorded", "coco_like", "crowded"):
        batch(case, device)
    one_by_one(device)
    voting(device)
    for detections in (100, 1000):
        voting_of_classes(detections, device)
    losses(device)
    assignment(device)
    suppression(device)
    fusion(device)
    fits(device)
    imports()


def batch(name: str, device: Device = "cpu") -> None:
    call = cases.REASSIGN[name]()
    wanted, there = providers.oracle(call), call.to(device)
    providers.check(providers.library(there), wanted)
    differ = sum(int((ours[0].cpu() != theirs[0]).sum()) for ours, theirs in zip(providers.published(there), wanted, strict=True))
    ways = [lambda: providers.published(there), lambda: providers.library(there)]
    limits = [providers.reassign_limit(call)] * (str(device) == "cpu")
    loop, ours, *limit = providers.interleaved([*ways, *limits], repeats=[1, 20, *(20 for _ in limits)], device=device)
    boxes, positives = sum(call.batch.num_gts), sum(image[3] for image in wanted)
    print(f"paa_reassign_batch, {name}: {len(wanted)} images, {boxes} boxes, {positives} positives ({differ} labels of the "
          f"published float32 loop differ): {ours * 1e3:.2f} ms, {ours / boxes * 1e6:.2f} us a box; loop {loop * 1e3:.0f} ms, "
          f"{loop / ours:.0f}x" + "".join(f"; {ours / least:.1f} times bare numpy" for least in limit))  # fmt: skip


def one_by_one(device: Device = "cpu") -> None:
    images = [single(call, device, 1) for call in cases.split(cases.Call(cases.recorded()))]
    ratios, batches = ([loop / ours for loop, ours, _ in images], [batched / ours for _, ours, batched in images])
    print(f"paa_reassign, the recorded images one by one: median {statistics.median(ratios):.0f}x, {min(ratios):.0f}x to "
          f"{max(ratios):.0f}x; a batch of one takes {statistics.median(batches):.2f} times that")  # fmt: skip
    loop, ours, batched = single(cases.Call(cases.one_box()), device, 5)
    print(f"paa_reassign, one box: {ours * 1e6:.0f} us; loop {loop * 1e3:.2f} ms, {loop / ours:.0f}x; a batch of one takes "
          f"{batched / ours:.2f} times that")  # fmt: skip


def single(call: cases.Call, device: Device, loops: int) -> list[float]:
    """Seconds for a single image: by the published loop, by `paa_reassign`, and as a batch of one."""
    there, wanted = call.to(device), providers.oracle(call)
    ways = providers.published, providers.library_one_by_one, providers.library
    for ours in ways[1:]:
        providers.check(ours(there), wanted)
    return providers.interleaved(
        [functools.partial(way, there) for way in ways], repeats=[loops, 20 * loops, 20 * loops], device=device
    )


def voting(device: Device = "cpu") -> None:
    """Each recorded call by itself."""
    ratios, times, differences = [], [], []
    for call in cases.recorded_voting().values():
        arguments = providers.move(call, device)
        differences.append(providers.check_voting(*arguments))
        loop, ours = providers.interleaved(
            [lambda a=arguments: providers.published_voting(*a), lambda a=arguments: paa_gpu.score_voting(*a)],
            repeats=[1, 20],
            device=device,
        )
        ratios.append(loop / ours)
        times.append((loop, ours))
    loop, ours = (sum(column) for column in zip(*times, strict=True))
    print(f"score_voting, {len(ratios)} recorded calls one by one: median {statistics.median(ratios):.0f}x, {min(ratios):.0f}x to "
          f"{max(ratios):.0f}x; all of them {ours * 1e3:.1f} ms, loop {loop * 1e3:.0f} ms, {loop / ours:.0f}x; boxes within "
          f"{max(differences):.1e} pixels of the loop's")  # fmt: skip


def voting_of_classes(detections: int, device: Device = "cpu") -> None:
    arguments = providers.move(cases.predictions(detections), device)
    difference = providers.check_voting(*arguments)
    loop, ours = providers.interleaved(
        [lambda: providers.published_voting(*arguments), lambda: paa_gpu.score_voting(*arguments)], repeats=[1, 20], device=device
    )
    print(f"score_voting, {detections} detections of 80 classes among 5,000 boxes: {ours * 1e3:.2f} ms; loop {loop * 1e3:.0f} ms, "
          f"{loop / ours:.0f}x; boxes within {difference:.1e} pixels of the loop's")  # fmt: skip


def losses(device: Device = "cpu") -> None:
    batch = cases.potential_positives().to(device)
    providers.check_losses(batch)
    unfused, ours = providers.interleaved(
        [lambda: reference.candidate_losses(*batch, dtype=torch.float32), lambda: paa_gpu.candidate_losses(*batch)],
        repeats=[5, 20],
        device=device,
    )
    print(
        f"candidate_losses, {len(batch.label)} images: {ours * 1e3:.2f} ms; unfused torch {unfused * 1e3:.1f} ms, {unfused / ours:.1f}x"
    )


def assignment(device: Device = "cpu") -> None:
    """All anchors of one image, against torch's matrix of all overlaps."""
    for boxes in (7, 200):
        arguments = providers.move(cases.assignment(boxes), device)
        providers.check_assignment(*arguments)
        matrix, ours = providers.interleaved(
            [lambda a=arguments: reference.assign_max_iou(*a), lambda a=arguments: paa_gpu.assign_max_iou(*a)],
            repeats=[2, 20],
            device=device,
        )
        print(
            f"assign_max_iou, {boxes} boxes: {ours * 1e3:.2f} ms; matrix of overlaps {matrix * 1e3:.1f} ms, {matrix / ours:.1f}x"
        )


def suppression(device: Device = "cpu") -> None:
    """`batched_nms` without a limit of detections, against torchvision's, image by image. Both must keep the same boxes."""
    for images, boxes, classes in itertools.product((1, 16), (1000, 5000, 20000), (1, 80)):
        batch = providers.move(cases.suppression(images, boxes, classes), device)
        found = paa_gpu.batched_nms(*batch, 0.6)
        for own, count, image in zip(found.index, found.count.tolist(), zip(*batch, strict=True), strict=True):
            each = [(image[2] == c).nonzero()[:, 0] for c in range(classes)]
            wanted = torch.cat([rows[torchvision.ops.nms(image[0][rows], image[1][rows], 0.6)] for rows in each])
            if not torch.equal(own[:count].sort().values, wanted.sort().values):
                raise AssertionError(f"{images} images of {boxes} boxes, {classes} classes: other boxes than torchvision keeps")
        theirs, ours = providers.interleaved(
            [
                lambda batch=batch: [torchvision.ops.batched_nms(*image, 0.6) for image in zip(*batch, strict=True)],
                lambda batch=batch: paa_gpu.batched_nms(*batch, 0.6),
            ],
            rounds=3,
            device=device,
        )
        print(f"batched_nms, {images} images of {boxes} boxes, {classes} classes: {ours * 1e3:.2f} ms; torchvision {theirs * 1e3:.1f} ms, "
              f"{theirs / ours:.1f}x")  # fmt: skip


def fusion(device: Device = "cpu") -> None:
    """`weighted_boxes_fusion` of five models, against ensemble-boxes image by image on the CPU, which must give the same bits."""
    for images, classes in itertools.product((1, 16), (1, 80)):
        columns = cases.fusion(images, 5, 300, classes)
        inputs = [[[model.numpy() for model in part] for part in image] for image in zip(*columns, strict=True)]
        there = providers.move(columns, device)
        found = paa_gpu.weighted_boxes_fusion(*there)
        for boxes, count, image in zip(found.boxes.cpu(), found.count.tolist(), inputs, strict=True):
            if not (boxes[:count].numpy() == ensemble_boxes.weighted_boxes_fusion(*image)[0]).all():
                raise AssertionError(f"{images} images, {classes} classes: other boxes than ensemble-boxes gives")
        theirs, ours = providers.interleaved(
            [
                lambda inputs=inputs: [ensemble_boxes.weighted_boxes_fusion(*image) for image in inputs],
                lambda columns=there: paa_gpu.weighted_boxes_fusion(*columns),
            ],
            rounds=3,
            repeats=[1, 10],
            device=device,
        )
        print(f"weighted_boxes_fusion, {images} images of 5 x 300 boxes, {classes} classes: {ours * 1e3:.2f} ms; ensemble-boxes "
              f"{theirs * 1e3:.1f} ms, {theirs / ours:.0f}x")  # fmt: skip


def fits(device: Device = "cpu") -> None:
    """Microseconds per row and iteration for many rows, and the additional time of a call with a few rows."""
    few, many = (cases.losses(rows, 45).to(device) for rows in (7, 2000))
    few_iterations, iterations = (int(paa_gpu.fit_gmm_1d(x).n_iter.sum()) for x in (few, many))
    (many_time,) = providers.interleaved([lambda: paa_gpu.fit_gmm_1d(many)], rounds=51, device=device)
    (few_time,) = providers.interleaved([lambda: paa_gpu.fit_gmm_1d(few)], rounds=51, repeats=[20], device=device)
    each = many_time / iterations
    print(f"fit_gmm_1d, 2,000 rows of 45, {iterations / 2000:.1f} iterations a row: {many_time * 1e3:.2f} ms, {each * 1e6:.3f} us a row "
          f"and iteration; 7 rows: {few_time * 1e6:.0f} us, {few_iterations} iterations in all")  # fmt: skip


def imports() -> None:
    times = []
    for _ in range(5):
        got = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
        times.append(float(got.stdout))
        time.sleep(0.1)
    print(f"import paa_gpu, beyond torch: {statistics.median(times) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
