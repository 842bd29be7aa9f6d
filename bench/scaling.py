"""`PYTHONPATH=tests python -m bench.scaling --out FILE`: how `paa_reassign_batch` grows.

One of four sizes grows while the others stay: boxes of one image over the same 20,000 potential positives; potential positives of
seven boxes; images of seven boxes; `topk`. The suite checks results. This module measures the time of a call (median) and the most
memory that its arrays take at once. If ptxrun can be imported, it also counts instructions and sectors of the compiled kernels. They
show without a GPU how the GPU path grows. The slope of an axis is that of log(y) against log(x) over its upper half. Above 1, growth
is faster than linear.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paa_gpu import testing

from . import cases, machine, providers

# A pyramid that has room for 200,000 potential positives.
LEVELS = (187_500, 46_875, 11_719, 2_930, 733)

CAPABILITY = 90
COUNTED_POSITIVES = 20_000
MINIMUM_SECONDS = 0.3


def boxes(number: int) -> cases.Call:
    each = 20_000 // number
    return _call([number], (each, each), LEVELS)


def potential_positives(number: int) -> cases.Call:
    return _call([7], (number // 7, number // 7), LEVELS)


def images(number: int) -> cases.Call:
    return _call([7] * number, (100, 400), cases.COCO_LEVELS)


def topk(number: int) -> cases.Call:
    return _call([7] * 2, (600, 1200), cases.COCO_LEVELS)._replace(topk=number)


def _call(num_gts: list[int], sizes: tuple[int, int], levels: tuple[int, ...]) -> cases.Call:
    rng = np.random.default_rng(len(num_gts))
    return cases.Call(testing.make_batch(num_gts, rng, ["bimodal"], sizes, level_sizes=levels, dtype=torch.float32))


#: Name, how to make a point, the points.
AXES: dict[str, tuple[Callable[[int], cases.Call], tuple[int, ...]]] = {
    "boxes": (boxes, (1, 3, 10, 30, 100, 300, 1000)),
    "potential positives": (potential_positives, (100, 300, 1000, 3000, 10_000, 30_000, 100_000, 200_000)),
    "images": (images, (1, 2, 4, 8, 16, 32, 64)),
    "topk": (topk, (3, 9, 25, 50, 100)),
}


def measure(call: cases.Call) -> dict[str, float]:
    times = []
    providers.library(call)
    while sum(times) < MINIMUM_SECONDS or len(times) < 5:
        start = time.perf_counter()
        providers.library(call)
        times.append(time.perf_counter() - start)
    point = {"seconds": statistics.median(times), "bytes": _peak_bytes(lambda: providers.library(call))}
    positives = sum(inds.shape[0] for inds in call.batch.pos_inds)
    if positives <= COUNTED_POSITIVES and importlib.util.find_spec("ptxrun"):
        point |= _work(call)
    return point


def _peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that arrays took at once during `run`, with results. numpy tells tracemalloc about its allocations."""
    tracemalloc.start()
    keep = run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del keep
    return peak


def _work(call: cases.Call) -> dict[str, float]:
    from kernel_execution import execute

    with execute(CAPABILITY, seed=None, racecheck=0, count=True) as session:
        providers.library(call)
    classes = session.counters.warp_classes
    return {
        "instructions": sum(number for name, number in classes.items() if name != "mov"),
        "sectors": session.counters.load_sectors + session.counters.store_sectors,
    }


def slope(points: list[dict[str, float]], what: str) -> float:
    """The slope of log(what) against log(x): least squares over the upper half of the points that have a value."""
    known = [(math.log(point["x"]), math.log(point[what])) for point in points if point.get(what)]
    if len(known) < 2:
        return math.nan
    x, y = np.array(known[-max(2, (len(known) + 1) // 2) :]).T
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    axes: dict[str, list[dict[str, float]]] = {}
    for name, (make, values) in AXES.items():
        axes[name] = []
        for value in values:
            point = {"x": value, **measure(make(value))}
            axes[name].append(point)
            print(
                f"{name} {value}: " + ", ".join(f"{key} {number:.3g}" for key, number in point.items() if key != "x"), flush=True
            )
        print(
            f"{name}: slopes "
            + ", ".join(f"{what} {slope(axes[name], what):.2f}" for what in ("seconds", "bytes", "instructions", "sectors"))
        )
    result = {
        "machine_info": machine.describe(),
        "commit": machine.commit(),
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "axes": axes,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
