"""`PYTHONPATH=tests python -m bench.matching --out FILE`: matching with torchvision's matrix of overlaps, and without.

The benchmark has one image of 1,333 x 800 pixels, the anchors of `retinanet_resnet50_fpn`, and more and more boxes. If both ways
fit into free memory, their matches are compared first. Then both are timed in turn. Peak memory is that of the process, reset
before each call (Linux). Device operations are counted on the CPU: all but views and allocations. With `ptxrun` on the path, the
operations of this library are counted too. Their number does not depend on the sizes. FILE gets the numbers. A picture is written
beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from paa_gpu.integrations.torchvision.matching import matches_of

from . import machine

HEIGHT, WIDTH, STRIDES = 800, 1333, (8, 16, 32, 64, 128)
BOXES = (10, 100, 1000, 5000)
MATCHER = Matcher(0.5, 0.4, allow_low_quality_matches=True)
#: The least bytes that torchvision takes at once for an anchor and a box: corners of the intersection, its sides, areas, the matrix.
BYTES_A_PAIR = 28


def anchors(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Tensor[A, 4] for one image, which the network pads to multiples of 32."""
    height, width = (-(-side // 32) * 32 for side in (height, width))
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    levels = [torch.empty(1, 1, -(-height // stride), -(-width // stride)) for stride in STRIDES]
    return generator(ImageList(torch.empty(1, 3, height, width), [(height, width)]), levels)[0]


def boxes(number: int) -> Tensor:
    """Tensor[G, 4] within the image, of 4 to 200 pixels."""
    random = torch.Generator().manual_seed(number)
    corner = torch.rand(number, 2, generator=random) * torch.tensor([WIDTH, HEIGHT])
    size = 4 * 50 ** torch.rand(number, 2, generator=random)
    return torch.cat([corner, torch.minimum(corner + size, torch.tensor([WIDTH + 1.0, HEIGHT + 1.0]))], 1)


def with_matrix(gts: Tensor, priors: Tensor) -> Tensor:
    return MATCHER(box_iou(gts, priors))


def without(gts: Tensor, priors: Tensor) -> Tensor:
    return matches_of(MATCHER, [gts], [priors])[0]


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"matrix": with_matrix, "paa_gpu": without}


def status(file: str, key: str) -> int:
    """Bytes, from a table of the kernel in kB."""
    lines = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def measure(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds, and the most additional bytes that the process took."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left free is given back, so that it counts when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, start = status("/proc/self/status", "VmRSS"), time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start, "bytes": status("/proc/self/status", "VmHWM") - before}


def point(number: int, priors: Tensor, rounds: int) -> dict[str, Any]:
    gts = boxes(number)
    fits = BYTES_A_PAIR * number * len(priors) < status("/proc/meminfo", "MemAvailable") * 0.8
    ways = WAYS if fits else {"paa_gpu": without}
    if fits and not torch.equal(with_matrix(gts, priors), without(gts, priors)):
        raise AssertionError(f"the matches of {number} boxes differ")
    made: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            made[name].append(measure(lambda way=way: way(gts, priors)))
    return {
        "boxes": number,
        **{name: {what: statistics.median(one[what] for one in all_) for what in all_[0]} for name, all_ in made.items()},
    }


def operations() -> dict[str, int]:
    """Device operations of the matching of one image."""
    from device_operations import FREE, profiled

    priors, gts = anchors(64, 64), boxes(5) / 20
    with torch.profiler.profile() as profile:
        with_matrix(gts, priors)
    leaves = [event for event in profile.events() if event.name.startswith("aten::") and not event.cpu_children]
    counted = {"matrix": sum(event.name.removeprefix("aten::") not in FREE for event in leaves)}
    operations, launches = profiled(lambda: without(gts, priors), small=("sub",))
    return {**counted, "paa_gpu": len(operations) + len(launches)}


def draw(result: dict[str, Any], file: Path) -> None:
    import matplotlib.pyplot as plt

    from .plot import save

    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
    for axis, what, scale, label in zip(axes, ("bytes", "seconds"), (2**20, 1), ("peak memory [MiB]", "time [s]"), strict=True):
        for name, color, text in (("matrix", "#0072B2", "torchvision, with the matrix"), ("paa_gpu", "#D55E00", "accelerated")):
            known = [(one["boxes"], max(one[name][what] / scale, 1e-3)) for one in result["points"] if name in one]
            axis.loglog(*zip(*known, strict=True), marker="o", color=color, label=text)
        axis.set(xlabel="boxes in the image", ylabel=label)
        axis.grid(alpha=0.3)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(lambda value, _: f"{value:,g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--boxes", type=int, nargs="+", default=BOXES)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    priors = anchors()
    result = {
        "machine": machine.describe(),
        "commit": machine.commit(),
        "date": str(datetime.date.today()),
        "anchors": len(priors),
    }
    result["operations"] = operations() if importlib.util.find_spec("ptxrun") else {}
    result["points"] = []
    for number in options.boxes:
        result["points"].append(point(number, priors, options.rounds))
        print(result["points"][-1], flush=True)
        options.out.write_text(json.dumps(result, indent=1))
    draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
