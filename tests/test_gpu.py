"""`make gpu` as far as it can be tried without a GPU: its steps, what becomes of each, and the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from test_bench import saved

from bench import gpu


def make_gpu(*options: str) -> list[str]:
    """The command that the Makefile runs, with this Python."""
    run = subprocess.run(["make", "-n", "gpu", *options], cwd=gpu.ROOT, check=True, capture_output=True, text=True)
    (command,) = (line.split() for line in run.stdout.splitlines() if "bench.gpu" in line)
    return [sys.executable, *command[command.index("-m") :]]


@pytest.fixture(scope="module")
def dry() -> list[list[str]]:
    """The commands of a dry run."""
    run = subprocess.run(make_gpu("DRY=--dry-run"), cwd=gpu.ROOT, check=True, capture_output=True, text=True)
    return [line.split() for line in run.stdout.splitlines()]


def test_every_step_names_files_that_exist(dry):
    files = {part for command in dry for part in command if re.match(r"tests/.*\.py$", part)}
    assert len(files) > 20
    assert all((gpu.ROOT / file).exists() for file in files)


def test_every_test_of_kernels_runs_on_the_device(dry):
    """Each sanitizer too, over its selection."""
    (kernels,) = ({*command} for command in dry if "-k" in command and "compute-sanitizer" not in command)
    assert kernels >= {f"tests/{path.name}" for path in gpu.ROOT.glob("tests/test_*_kernels.py")}
    sanitized = [command for command in dry if command[0] == "compute-sanitizer"]
    assert [command[2] for command in sanitized] == list(gpu.SANITIZERS)
    assert all(set(gpu.SANITIZED) <= kernels & set(command) for command in sanitized)


def test_the_profiled_call_runs():
    """On the CPU here."""
    code = gpu.PROFILED.replace("'cuda'", "'cpu'")
    assert code != gpu.PROFILED
    subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    process = subprocess.run(make_gpu(), cwd=gpu.ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and "there is no CUDA device here" in process.stderr


def test_the_page_tells_what_became_of_each_step(tmp_path):
    """Of one that works, one that fails, one whose tool is missing; and the times that the last one leaves."""
    write = f"open({str(tmp_path / 'suite.json')!r}, 'w').write({json.dumps(saved(crowded=0.001))!r})"
    todo = [
        gpu.Step("check", [sys.executable, "-c", "print('all is well')"]),
        gpu.Step("kernels", [sys.executable, "-c", "print('one differs'); raise SystemExit(3)"]),
        gpu.Step("memcheck", ["no-such-tool"], "no-such-tool"),
        gpu.Step("benchmarks", [sys.executable, "-c", write]),
    ]
    outcomes = list(gpu.report("A device", todo, tmp_path))
    assert [outcome.status for outcome in outcomes] == [
        "ok", "FAILED (exit status 3)", "left out: no-such-tool is not installed", "ok"
    ]  # fmt: skip
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# A device\n") and "all is well" in page and "one differs" in page
    assert "| memcheck | left out: no-such-tool is not installed | 0 |" in page
    assert "| reassign crowded | 300 ms | 1 ms |" in page
    assert (tmp_path / "kernels.txt").read_text() == "one differs\n"
