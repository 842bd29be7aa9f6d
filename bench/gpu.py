"""`python -m bench.gpu`, which is `make gpu`: everything that a machine with a GPU can show, on one page.

The report of `paa_gpu check`, the tests on the GPU, four sanitizers over a selection, a profile by `ncu`, and the benchmarks with the
published loop beside them. A step that fails does not stop the others. The page is `bench/results/<device>/README.md`; it is written
after each step, and the whole output of each step lies beside it. The exit status is 1 if a step failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from . import plot

ROOT = Path(__file__).parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = [f"tests/test_{stem}_kernels.py" for stem in ("reassign", "assign", "voting", "losses")]
PROFILED = "from bench import cases, providers; providers.library(cases.Call(cases.coco_like().to('cuda')))"
TAIL = 12


class Step(NamedTuple):
    """A command, and the tool without which it is left out."""

    name: str
    command: list[str]
    tool: str | None = None


class Outcome(NamedTuple):
    """What became of a step."""

    step: Step
    status: str
    seconds: float
    tail: str


def steps(folder: Path, public: list[str], kernels: list[str]) -> list[Step]:
    """All steps, in order: what is quick and tells most comes first. `public`, `kernels`: files of tests."""
    python = [sys.executable, "-m", "pytest", "-q"]
    pytest, few = [*python, "-m", "not long"], ["-x", "-m", "not long and not slow", "-k", "cuda", *SANITIZED]
    return [
        Step("check", [sys.executable, "-m", "paa_gpu", "check", "--device", "cuda"]),
        Step("tests that need a GPU", [*pytest, "tests/test_cuda.py"]),
        Step("public functions", [*pytest, "--execution", "cuda", *public]),
        Step("kernels", [*pytest, "-k", "cuda", *kernels]),
        *(
            Step(tool, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *python, *few], "compute-sanitizer")
            for tool in SANITIZERS
        ),
        Step("profile", ["ncu", "--set", "basic", sys.executable, "-c", PROFILED], "ncu"),
        Step("benchmarks", [*python, "bench", "--benchmark-only", f"--benchmark-json={folder / 'suite.json'}"]),
    ]


def run(step: Step, folder: Path) -> Outcome:
    """Run a step. Its whole output goes to a file."""
    if step.tool and shutil.which(step.tool) is None:
        return Outcome(step, f"left out: {step.tool} is not installed", 0.0, "")
    start = time.monotonic()
    process = subprocess.run(step.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (folder / f"{step.name.replace(' ', '_')}.txt").write_text(process.stdout)
    status = "ok" if process.returncode == 0 else f"FAILED (exit status {process.returncode})"
    lines = process.stdout.rstrip().splitlines()
    tail = "\n".join(lines if step.name == "check" else lines[-TAIL:])
    return Outcome(step, status, time.monotonic() - start, tail)


def page(device: str, outcomes: list[Outcome], folder: Path) -> str:
    """The report, as Markdown."""
    rows = [f"| {outcome.step.name} | {outcome.status} | {outcome.seconds:.0f} |" for outcome in outcomes]
    head = f"# {device}\n\n{datetime.date.today()}, torch {torch.__version__}\n\n| step | outcome | seconds |\n|---|---|---|\n"
    parts = [f"## {outcome.step.name}\n\n```text\n{outcome.tail}\n```" for outcome in outcomes if outcome.tail]
    results = folder / "suite.json"
    if results.exists():
        parts.append(f"## Times\n\n{plot.table(plot.medians(json.loads(results.read_text())))}")
    return head + "\n".join(rows) + "\n\n" + "\n\n".join(parts) + "\n"


def report(device: str, todo: list[Step], folder: Path) -> Iterator[Outcome]:
    """Run the steps, writing the page after each."""
    outcomes: list[Outcome] = []
    for step in todo:
        outcomes.append(run(step, folder))
        (folder / "README.md").write_text(page(device, outcomes, folder))
        yield outcomes[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--public", nargs="+", required=True, help="tests of the public functions, which run on the GPU")
    parser.add_argument("--kernels", nargs="+", required=True, help="tests of the kernels, of which those with `cuda` run")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if device is None and not options.dry_run:
        raise SystemExit("there is no CUDA device here; --dry-run prints what would run on one")
    folder = ROOT / "bench" / "results" / re.sub(r"\W+", "-", device or "device").strip("-").lower()
    todo = steps(folder, options.public, options.kernels)
    if options.dry_run:
        print(*(" ".join(step.command) for step in todo), sep="\n")
        return
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for outcome in report(str(device), todo, folder):
        print(f"{outcome.step.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
    print(folder / "README.md")
    raise SystemExit(any(outcome.status.startswith("FAILED") for outcome in outcomes))


if __name__ == "__main__":
    main()
