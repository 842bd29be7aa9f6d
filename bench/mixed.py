"""`PYTHONPATH=tests python -m bench.mixed [rows]`: what fits of mixed precision decide, how many rows need float64, and the work.

The kernels run as compiled, on the CPU, by ptxrun. The rows are the recordings and random ground truths of all shapes. One half of the
random ones has losses of the usual size, the other half sizes from 0.001 to 1,000. A row was fitted in float64 if its lower bound has the
same bits as in a fit in float64. The work is that of the kernel that fits, in warp instructions of a fit, in either precision.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from kernel_execution import execute

import paa_gpu
from paa_gpu import testing

from . import cases

CAPABILITY = 90
LEVEL_SIZES = (60000, 10000, 5000, 2000, 1000)
SEPARATIONS = ("mmdet", "b", "paper", "d")
EACH = 2000  # ground truths of a call


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    report("recordings", count(cases.recorded(), "mmdet"))
    work("recordings", cases.recorded())
    for name, batch in zip(("usual size", "0.001 to 1,000"), random_batches(2 * EACH), strict=True):
        work(f"random ground truths, {name}", batch)
    totals = {"usual size": Counter[str](), "0.001 to 1,000": Counter[str]()}
    for number, batch in enumerate(random_batches(rows)):
        totals[("usual size", "0.001 to 1,000")[number % 2]].update(count(batch, SEPARATIONS[number // 2 % 4]))
    for name, total in totals.items():
        report(f"random ground truths, {name}", total)


def random_batches(rows: int) -> Iterator[testing.Batch]:
    """Of the usual size and of all sizes in turn; two of float32, then two of float64."""
    for number in range(rows // EACH):
        scales = (1e-3, 1e3) if number % 2 else (1.0, 1.0)
        dtype = torch.float64 if number // 2 % 2 else torch.float32
        rng = np.random.default_rng(number)
        yield testing.make_batch([EACH], rng, scales=scales, level_sizes=LEVEL_SIZES, dtype=dtype)


def count(batch: testing.Batch, separation: str) -> Counter[str]:
    """Ground truths with a fit, those fitted in float64, and those in which a decision differs from float64."""
    with execute(CAPABILITY, seed=None, racecheck=0):
        mixed, double = (
            paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options, precision=precision, separation=separation)
            for precision in ("mixed", "float64")
        )
    fit, wanted = mixed.fit, double.fit
    rows = (fit.n_iter != wanted.n_iter) | (fit.converged != wanted.converged) | (fit.valid != wanted.valid)
    masks = zip((*mixed.positive, *mixed.ignored), (*double.positive, *double.ignored), strict=True)
    return Counter(
        rows=int(wanted.valid.sum()),
        again=int((wanted.valid & (fit.lower_bound == wanted.lower_bound)).sum()),
        fits=int(rows.sum()),
        candidates=sum(int((a != b).sum()) for a, b in masks),
    )


def work(name: str, batch: testing.Batch) -> None:
    """Print the warp instructions of a fit: in float64, and all."""
    for precision in ("float64", "mixed"):
        with execute(CAPABILITY, seed=None, racecheck=0, count=True) as session:
            fit = paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options, precision=precision).fit
        classes, rows = session.by_kernel()["_fit_candidates_kernel"].warp_classes, int(fit.valid.sum())
        total = sum(number for kind, number in classes.items() if kind != "mov")
        print(
            f"{name}, {precision}: {classes['fp64'] / rows:.0f} of {total / rows:.0f} warp instructions are in float64",
            flush=True,
        )


def report(name: str, total: Counter[str]) -> None:
    if total["rows"]:
        share = 100 * total["again"] / total["rows"]
        print(
            f"{name}: {total['rows']} fits, {share:.1f} % of them in float64; {total['fits']} fits and {total['candidates']} "
            "candidates are decided otherwise than in float64",
            flush=True,
        )


if __name__ == "__main__":
    main()
