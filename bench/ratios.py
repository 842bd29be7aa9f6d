"""`python -m bench.ratios`: this library against the published loop, on the CPU, side by side in one run.

Every result is checked before it is timed. Times are medians of the calls in 5 interleaved rounds. Run it with OMP_NUM_THREADS=1, as `make
bench` does. More threads make the published loop slower and erratic. The library's loops get all cores anyway.
"""

from __future__ import annotations

import datetime
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

IMPORTS = """
import time, torch
start = time.perf_counter()
import paa_gpu
print(time.perf_counter() - start)
"""


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    baseline = "mmdet's PAAHead" if providers.MMDET else "paa_gpu.reference(published=True)"
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
          f"{platform.python_version()}, torch {torch.__version__}, scikit-learn {sklearn.__version__}; baseline: {baseline}")  # fmt: skip
    for name in ("recorded", "coco_like", "crowded"):
        batch(name)
    one_by_one()
    voting()
    for detections in (100, 1000):
        voting_of_classes(detections)
    losses()
    suppression()
    fusion()
    fits()
    imports()


def batch(name: str) -> None:
    call = cases.REASSIGN[name]()
    wanted = providers.oracle(call)
    providers.check(providers.library(call), wanted)
    differ = sum(int((ours[0] != theirs[0]).sum()) for ours, theirs in zip(providers.published(call), wanted, strict=True))
    loop, ours, limit = providers.interleaved(
        [lambda: providers.published(call), lambda: providers.library(call), providers.reassign_limit(call)]
    )
    boxes, positives = sum(call.batch.num_gts), sum(image[3] for image in wanted)
    print(f"paa_reassign_batch, {name}: {len(wanted)} images, {boxes} boxes, {positives} positives ({differ} labels of the "
          f"published float32 loop differ): {ours * 1e3:.2f} ms, {ours / boxes * 1e6:.2f} us a box; loop {loop * 1e3:.0f} ms, "
          f"{loop / ours:.0f}x; {ours / limit:.1f} times bare numpy")  # fmt: skip


def one_by_one() -> None:
    ratios = []
    for call in cases.split(cases.Call(cases.recorded())):
        providers.check(providers.library_one_by_one(call), providers.oracle(call))
        loop, ours = providers.interleaved(
            [lambda call=call: providers.published(call), lambda call=call: providers.library_one_by_one(call)],
            repeats=[1, 20],
        )
        ratios.append(loop / ours)
    print(f"paa_reassign, the recorded images one by one: median {statistics.median(ratios):.0f}x, {min(ratios):.0f}x to "
          f"{max(ratios):.0f}x")  # fmt: skip
    single = cases.Call(cases.one_box())
    providers.check(providers.library_one_by_one(single), providers.oracle(single))
    loop, ours = providers.interleaved(
        [lambda: providers.published(single), lambda: providers.library_one_by_one(single)], repeats=[5, 100]
    )
    print(f"paa_reassign, one box: {ours * 1e6:.0f} us; loop {loop * 1e3:.2f} ms, {loop / ours:.0f}x")


def voting() -> None:
    """Each recorded call by itself."""
    ratios, times, differences = [], [], []
    for arguments in cases.recorded_voting().values():
        differences.append(providers.check_voting(*arguments))
        loop, ours = providers.interleaved(
            [lambda a=arguments: providers.published_voting(*a), lambda a=arguments: paa_gpu.score_voting(*a)], repeats=[1, 20]
        )
        ratios.append(loop / ours)
        times.append((loop, ours))
    loop, ours = (sum(column) for column in zip(*times, strict=True))
    print(f"score_voting, {len(ratios)} recorded calls one by one: median {statistics.median(ratios):.0f}x, {min(ratios):.0f}x to "
          f"{max(ratios):.0f}x; all of them {ours * 1e3:.1f} ms, loop {loop * 1e3:.0f} ms, {loop / ours:.0f}x; boxes within "
          f"{max(differences):.1e} pixels of the loop's")  # fmt: skip


def voting_of_classes(detections: int) -> None:
    arguments = cases.predictions(detections)
    difference = providers.check_voting(*arguments)
    loop, ours = providers.interleaved(
        [lambda: providers.published_voting(*arguments), lambda: paa_gpu.score_voting(*arguments)], repeats=[1, 20]
    )
    print(f"score_voting, {detections} detections of 80 classes among 5,000 boxes: {ours * 1e3:.2f} ms; loop {loop * 1e3:.0f} ms, "
          f"{loop / ours:.0f}x; boxes within {difference:.1e} pixels of the loop's")  # fmt: skip


def losses() -> None:
    batch = cases.potential_positives()
    providers.check_losses(batch)
    unfused, ours = providers.interleaved(
        [lambda: reference.candidate_losses(*batch, dtype=torch.float32), lambda: paa_gpu.candidate_losses(*batch)],
        repeats=[5, 20],
    )
    print(
        f"candidate_losses, {len(batch.label)} images: {ours * 1e3:.2f} ms; unfused torch {unfused * 1e3:.1f} ms, {unfused / ours:.1f}x"
    )


def suppression() -> None:
    """`batched_nms` without a limit of detections, against torchvision's, image by image. Both must keep the same boxes."""
    for images, boxes, classes in itertools.product((1, 16), (1000, 5000, 20000), (1, 80)):
        batch = cases.suppression(images, boxes, classes)
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
        )
        print(f"batched_nms, {images} images of {boxes} boxes, {classes} classes: {ours * 1e3:.2f} ms; torchvision {theirs * 1e3:.1f} ms, "
              f"{theirs / ours:.1f}x")  # fmt: skip


def fusion() -> None:
    """`weighted_boxes_fusion` of five models, against ensemble-boxes image by image, which must give the same bits."""
    for images, classes in itertools.product((1, 16), (1, 80)):
        columns = cases.fusion(images, 5, 300, classes)
        inputs = [[[model.numpy() for model in part] for part in image] for image in zip(*columns, strict=True)]
        found = paa_gpu.weighted_boxes_fusion(*columns)
        for boxes, count, image in zip(found.boxes, found.count.tolist(), inputs, strict=True):
            if not (boxes[:count].numpy() == ensemble_boxes.weighted_boxes_fusion(*image)[0]).all():
                raise AssertionError(f"{images} images, {classes} classes: other boxes than ensemble-boxes gives")
        theirs, ours = providers.interleaved(
            [
                lambda inputs=inputs: [ensemble_boxes.weighted_boxes_fusion(*image) for image in inputs],
                lambda columns=columns: paa_gpu.weighted_boxes_fusion(*columns),
            ],
            rounds=3,
            repeats=[1, 10],
        )
        print(f"weighted_boxes_fusion, {images} images of 5 x 300 boxes, {classes} classes: {ours * 1e3:.2f} ms; ensemble-boxes "
              f"{theirs * 1e3:.1f} ms, {theirs / ours:.0f}x")  # fmt: skip


def fits() -> None:
    """Microseconds per row and iteration for many rows, and the additional time of a call with a few rows."""
    few, many = cases.losses(7, 45), cases.losses(2000, 45)
    few_iterations, iterations = (int(paa_gpu.fit_gmm_1d(x).n_iter.sum()) for x in (few, many))
    (many_time,) = providers.interleaved([lambda: paa_gpu.fit_gmm_1d(many)], rounds=51)
    (few_time,) = providers.interleaved([lambda: paa_gpu.fit_gmm_1d(few)], rounds=51, repeats=[20])
    each = many_time / iterations
    print(f"fit_gmm_1d, 2,000 rows of 45, {iterations / 2000:.1f} iterations a row: {many_time * 1e3:.2f} ms, {each * 1e6:.3f} us a row "
          f"and iteration; 7 rows: {few_time * 1e6:.0f} us, {few_iterations} iterations on one thread")  # fmt: skip


def imports() -> None:
    times = []
    for _ in range(5):
        got = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
        times.append(float(got.stdout))
        time.sleep(0.1)
    print(f"import paa_gpu, beyond torch: {statistics.median(times) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
