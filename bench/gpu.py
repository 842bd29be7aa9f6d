"""`python -m bench.gpu`, which is `make gpu`: everything that a machine with a GPU can show, on one page.

The report of `paa_gpu check`, the tests on the GPU, the times beside those of the published loop, four sanitizers over a selection,
and a profile by `ncu`. A step that fails or takes too long does not stop the others. The page is `bench/results/<device>/README.md`.
It is written after each step, and the whole output of each step lies beside it. The exit status is 1 if a step failed.

A GPU may be there for minutes only: what tells most comes first, tests run in parallel, and `--steps` takes some of the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
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
#: Steps whose whole output is on the page.
TOLD = ("check", "ratios", "training step")
#: Seconds that a step has after its limit, to say what it has found so far.
GRACE = 15


class Step(NamedTuple):
    """A command, and the tool or the module without which it is left out."""

    name: str
    command: list[str]
    needs: str | None = None


class Outcome(NamedTuple):
    """What became of a step."""

    step: Step
    status: str
    seconds: float
    tail: str


def workers() -> int:
    """Processes that test at once. Each has a CUDA context, and copies of its inputs: up to 2 GiB."""
    room = _free_memory() // 2**31 if torch.cuda.is_available() else 1
    return max(1, min(room, os.cpu_count() or 1, 8))


def _free_memory() -> int:
    """Bytes on the GPU. Another process asks: a context of this one would stay there while the steps run."""
    code = "import torch; print(torch.cuda.mem_get_info()[0])"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def steps(folder: Path, public: list[str]) -> list[Step]:
    """All steps, in order. `public`: the files of tests of the public functions."""
    python = [sys.executable, "-m", "pytest", "-q", "--tb=short"]
    parallel = [*python, "-n", str(workers())]
    few = [*python, "-x", "-m", "gpu and not long and not slow", *SANITIZED]
    timed = ["env", "OMP_NUM_THREADS=1"]  # more threads make the published loop slower and erratic
    uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]  # else a sanitizer sees blocks of 2 MiB, and not the tensors in them
    suite = [*timed, *python, "bench", "--benchmark-only", "--benchmark-min-rounds=3", "--benchmark-max-time=0.25"]
    return [
        Step("check", [sys.executable, "-m", "paa_gpu", "check", "--device", "cuda"]),
        Step("tests that need a GPU", [*parallel, "-m", "gpu and not long", "tests"]),
        Step("public functions", [*parallel, "-m", "not long", "--execution", "cuda", *public]),
        Step("mmdetection", [*python, "tests/mmdet/test_cuda.py"], "mmdet"),
        Step("ratios", [*timed, sys.executable, "-m", "bench.ratios", "--device", "cuda"]),
        Step("training step", [*timed, sys.executable, "-m", "bench.head", "--device", "cuda", "--size", "800", "1333"], "mmdet"),
        Step("benchmarks", [*suite, f"--benchmark-json={folder / 'suite.json'}"]),
        Step("documentation", [*python, "tests/test_docs.py"]),
        Step("profile", ["ncu", "--set", "basic", "--clock-control", "none", sys.executable, "-c", PROFILED], "ncu"),
        *(
            Step(tool, [*uncached, "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *few], "compute-sanitizer")
            for tool in SANITIZERS
        ),
    ]


def run(step: Step, folder: Path, limit: float) -> Outcome:
    """Run a step for `limit` seconds at most. Its whole output goes to a file."""
    if step.needs and not _installed(step.needs):
        return Outcome(step, f"left out: {step.needs} is not installed", 0.0, "")
    path, start = folder / f"{step.name.replace(' ', '_')}.txt", time.monotonic()
    with path.open("w") as output:
        process = subprocess.Popen(step.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        status = _wait(process, limit)
    lines = path.read_text().rstrip().splitlines()
    tail = "\n".join(lines if step.name in TOLD else lines[-TAIL:])
    return Outcome(step, status, time.monotonic() - start, tail)


def _installed(name: str) -> bool:
    """A tool on the path, or a module; not merely a folder of that name, as tests/mmdet is."""
    return shutil.which(name) is not None or getattr(importlib.util.find_spec(name), "origin", None) is not None


def _wait(process: subprocess.Popen[bytes], limit: float) -> str:
    """What became of the process. At the limit it is asked to stop, so that pytest tells what failed. What still runs then is killed,
    with its children: a kernel that hangs would keep the GPU."""
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return f"FAILED (not done after {limit:.0f} s)"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"FAILED (exit status {status})" if status else "ok"


def page(device: str, outcomes: list[Outcome], folder: Path) -> str:
    """The report, as Markdown."""
    rows = [f"| {outcome.step.name} | {outcome.status} | {outcome.seconds:.0f} |" for outcome in outcomes]
    head = f"# {device}\n\n{datetime.date.today()}, torch {torch.__version__}\n\n| step | outcome | seconds |\n|---|---|---|\n"
    parts = [f"## {outcome.step.name}\n\n```text\n{outcome.tail}\n```" for outcome in outcomes if outcome.tail]
    results = folder / "suite.json"
    if results.exists():
        parts.append(f"## Times\n\n{plot.table(plot.medians(json.loads(results.read_text())))}")
    return head + "\n".join(rows) + "\n\n" + "\n\n".join(parts) + "\n"


def report(device: str, todo: list[Step], folder: Path, limit: float) -> Iterator[Outcome]:
    """Run the steps, writing the page after each."""
    outcomes: list[Outcome] = []
    for step in todo:
        outcomes.append(run(step, folder, limit))
        (folder / "README.md").write_text(page(device, outcomes, folder))
        yield outcomes[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", nargs="+", required=True, help="tests of the public functions, which run on the GPU")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these steps (default: all)")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a step may take (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the folder for the page (default: bench/results/<device>)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if device is None and not options.dry_run:
        raise SystemExit("there is no CUDA device here; --dry-run prints what would run on one")
    folder = options.out or ROOT / "bench" / "results" / re.sub(r"\W+", "-", device or "device").strip("-").lower()
    todo = steps(folder, options.public)
    if unknown := set(options.steps or ()) - {step.name for step in todo}:
        parser.error(f"--steps: there is no {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in todo)}")
    todo = [step for step in todo if not options.steps or step.name in options.steps]
    if options.dry_run:
        print(*(" ".join(step.command) for step in todo), sep="\n")
        return
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for outcome in report(str(device), todo, folder, options.limit):
        print(f"{outcome.step.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
    print(folder / "README.md")
    raise SystemExit(any(outcome.status.startswith("FAILED") for outcome in outcomes))


if __name__ == "__main__":
    main()
