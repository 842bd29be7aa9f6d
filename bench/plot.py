"""`python -m bench.plot RESULT [SCALING]`: saved results as the README's short table, as `docs/benchmarks.md`, and as pictures.

`pytest bench --benchmark-json RESULT` saves RESULT, and `python -m bench.scaling --out SCALING` saves SCALING. The short table stands in the
README between two comments. `docs/benchmarks.md` is written as a whole.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after its backend
from matplotlib.ticker import EngFormatter
from PIL import Image

from . import scaling

plt.rcParams.update({f"{of}.labelsize": 9 for of in ("axes", "xtick", "ytick")} | {"axes.titlesize": 9, "legend.fontsize": 9})

#: Inches. A page shows about 700 pixels, 96 an inch, so 9 points stay 9 points.
WIDTH = 7.2

ROOT = Path(__file__).parent.parent
START, END = "<!-- benchmarks: written by bench.plot -->", "<!-- end of benchmarks -->"

#: Test and provider as pytest names them: what the table says, its colour (Okabe and Ito's, for every kind of colour vision).
PROVIDERS = {
    "published": ("published loop", "#D55E00"),
    "scikit_learn": ("scikit-learn", "#000000"),
    "unfused": ("unfused torch", "#CC79A7"),
    "gmm_gpu": ("gmm-gpu (CPU)", "#E69F00"),
    "library_one_by_one": ("paa_gpu, image by image", "#56B4E9"),
    "library": ("paa_gpu", "#0072B2"),
    "cuda": ("paa_gpu (CUDA)", "#009E73"),
    "limit": ("bare numpy", "#999999"),
}

EXPLANATION = """`make bench` measures the figures of this page. All providers get the same inputs, one after the other in one run. Every result is checked before it is
timed. torch and paa_gpu get all cores. scikit-learn's loops get one thread, because more make them slower. "Bare numpy" is the arithmetic without the
algorithm, on one thread. For a reassignment, this is one copy of its three outputs into new memory, and one exp and one log for each candidate and
iteration of the fit. For a fit, it is only the exp and the log. A large fit can take less time than bare numpy. It uses all threads, and numpy's exp
and log are slow on processors without AVX-512."""

#: The cases of the README, in words.
HEADLINE = {
    "reassign coco_like": "assign 16 images of 7 boxes",
    "reassign one_image": "assign one image of 7 boxes",
    "reassign crowded": "assign one image of 600 boxes",
    "assignment of 200 boxes": "overlaps of 200 boxes with all anchors",
    "candidate losses": "losses of the candidates",
    "voting recorded_80_classes": "score voting, 80 classes",
    "fit 112x45": "fit 112 mixtures of 45 losses",
    "fit 1x1000000": "fit one mixture of 1,000,000 losses",
}

#: What a user would otherwise run.
BASELINES = ("published", "scikit_learn", "unfused")

UNITS = {
    "seconds": "time of a call [s]",
    "bytes": "peak of extra memory [bytes]",
    "instructions": "warp instructions, compiled",
    "sectors": "32-byte sectors, compiled",
}

Medians = dict[str, dict[str, float]]


def save(figure: Any, path: Path) -> None:
    """A small file: these pictures have few colours."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def medians(result: dict[str, Any]) -> Medians:
    """Seconds by group and provider. On a GPU, seconds between two events."""
    found: Medians = {}
    for benchmark in result["benchmarks"]:
        test, parameters = benchmark["name"].partition("[")[0], benchmark["params"] or {}
        provider = parameters.get("provider") or next((name for name in PROVIDERS if test.endswith(name)), "library")
        seconds = benchmark["extra_info"].get("event_seconds", benchmark["stats"]["median"])
        found.setdefault(benchmark["group"], {})[provider] = seconds
    return found


def table(found: Medians) -> str:
    names = [name for name in PROVIDERS if any(name in group for group in found.values())]
    lines = [
        "| case | " + " | ".join(PROVIDERS[name][0] for name in names) + " | speed-up | times bare numpy |",
        "|---|" + "---|" * (len(names) + 2),
    ]
    for group, seconds in found.items():
        cells = [_time(seconds[name]) if name in seconds else "" for name in names]
        lines.append(f"| {group} | " + " | ".join([*cells, *_ratios(seconds)]) + " |")
    return "\n".join(lines)


def short_table(found: Medians) -> str:
    """The cases of `HEADLINE` that were measured."""
    lines = ["| case | published | paa_gpu | speed-up | times bare numpy |", "|---|---|---|---|---|"]
    for group, words in HEADLINE.items():
        if group in found:
            times = [_time(seconds) for seconds in (_baseline(found[group]), found[group]["library"]) if seconds is not None]
            lines.append(f"| {words} | " + " | ".join([*times, *_ratios(found[group])]) + " |")
    return "\n".join(lines)


def _baseline(seconds: dict[str, float]) -> float | None:
    return next((seconds[name] for name in BASELINES if name in seconds), None)


def _ratios(seconds: dict[str, float]) -> list[str]:
    """How many times as fast as the baseline, and how many times as long as bare numpy."""
    baseline = _baseline(seconds)
    times = baseline / seconds["library"] if baseline else None
    ratio = "" if times is None else f"{times:.1f}x" if times < 10 else f"{times:.0f}x"
    return [ratio, f"{seconds['library'] / seconds['limit']:.1f}" if "limit" in seconds else ""]


def _time(seconds: float) -> str:
    """Three digits, in the unit that suits them."""
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def caption(result: dict[str, Any]) -> str:
    machine = result["machine_info"]
    device = machine["cuda"] or "no GPU"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    commit = result["commit"] if isinstance(result.get("commit"), str) else result["commit_info"]["id"][:7]
    return (
        f"`make bench`, medians, {result['datetime'][:10]}, commit {commit}: {machine['cpu']}, {machine['cores']} cores, {device}, "
        f"Python {machine['python_version']}, {versions}."
    )


def picture(found: Medians, path: Path) -> None:
    """A dot per case and provider, on a logarithmic axis of seconds."""
    figure, axes = plt.subplots(figsize=(WIDTH, 0.34 * len(found) + 1.4), layout="constrained")
    groups = list(found)[::-1]
    for name, (text, colour) in PROVIDERS.items():
        points = [(found[group][name], place) for place, group in enumerate(groups) if name in found[group]]
        if points:
            marker = "|" if name == "limit" else "o"
            axes.plot(*zip(*points, strict=True), marker, color=colour, label=text, markersize=7, markeredgewidth=1.5)
    axes.set(xscale="log", xlabel="time of a call, median", yticks=range(len(groups)), yticklabels=groups)
    axes.xaxis.set_major_formatter(EngFormatter("s"))
    axes.grid(axis="x", color="0.85")
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=3, frameon=False)
    save(figure, path)


def scaling_picture(result: dict[str, Any], path: Path) -> None:
    """A row for each axis that grows, a column for each quantity, and a slope for each curve."""
    grown = result["axes"]
    size = WIDTH, 1.7 * len(grown) + 0.4
    figure, grid = plt.subplots(len(grown), len(UNITS), figsize=size, layout="constrained", squeeze=False)
    for row, (name, points) in zip(grid, grown.items(), strict=True):
        for axes, (what, unit) in zip(row, UNITS.items(), strict=True):
            heading = "\n".join(textwrap.wrap(unit, 18)) + "\n" if name == next(iter(grown)) else ""
            known = [(point["x"], point[what]) for point in points if point.get(what)]
            if not known:
                axes.set_axis_off()
                continue
            x, y = zip(*known, strict=True)
            axes.plot(x, y, "o-", color="#0072B2", markersize=4)
            # A decade at least, or what hardly grows would look steep.
            margin = 1.2 * max(10 * min(y) / max(y), 1) ** 0.5
            axes.set(xscale="log", yscale="log", xlabel=name, ylim=(min(y) / margin, max(y) * margin))
            axes.set_title(f"{heading}slope {scaling.slope(points, what):.2f}")
            axes.set_xticks((x[0], x[-1]), labels=[f"{value:,}" for value in (x[0], x[-1])])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(EngFormatter("s" if what == "seconds" else "", sep=""))
            axes.grid(color="0.9")
    save(figure, path)


def scaling_table(result: dict[str, Any]) -> str:
    lines = ["| grows | from, to | " + " | ".join(UNITS.values()) + " |", "|---|---|" + "---|" * len(UNITS)]
    for name, points in result["axes"].items():
        slopes = [f"{scaling.slope(points, what):.2f}" for what in UNITS]
        lines.append(f"| {name} | {points[0]['x']:,} to {points[-1]['x']:,} | " + " | ".join(slopes) + " |")
    return "\n".join(lines)


def main(paths: list[str]) -> None:
    results = [json.loads(Path(path).read_text()) for path in paths]
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    found = medians(results[0])
    picture(found, docs / "benchmarks.png")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    more = (
        '"Published" is the published loop. For overlaps and losses it is unfused torch, for fits scikit-learn. '
        '"Bare numpy" does only the copies, exponentials and logarithms of the task, in plain numpy. '
        "[Benchmarks](docs/benchmarks.md) explains it and has all cases."
    )
    shown = f"{short_table(found)}\n\n{caption(results[0])} {more}"
    readme.write_text(f"{before}{START}\n\n{shown}\n\n{END}{rest.partition(END)[2]}")
    picture_line = "![Time of a call, by case and provider](benchmarks.png)"
    page = f"# Benchmarks\n\n{EXPLANATION}\n\n{picture_line}\n\n{table(found)}\n\n{caption(results[0])}\n"
    if len(results) > 1:
        scaling_picture(results[1], docs / "scaling.png")
        page += (
            "\n## How it grows\n\nThe table gives slopes of log(y) against log(x) over the upper half of each axis. A slope of 1 is linear growth.\n\n"
            f"{scaling_table(results[1])}\n\n![Time, memory and work against size](scaling.png)\n\n{caption(results[1])}\n"
        )
    (docs / "benchmarks.md").write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
