"""`make gpu` as far as it can be tried without a GPU: its steps, what becomes of each, and the page."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_bench import saved

from bench import gpu


def make_gpu(*options: str) -> list[str]:
    """The command that the Makefile runs, with this Python."""
    run = subprocess.run(["make", "-n", "gpu", *options], cwd=gpu.ROOT, check=True, capture_output=True, text=True)
    (command,) = (line.split() for line in run.stdout.splitlines() if "bench.gpu" in line)
    return [sys.executable, *command[command.index("-m") :]]


def main(*options: str) -> tuple[Any, str, str]:
    """The exit status of the command that the Makefile runs, and what it prints. In this process: to import torch takes seconds."""
    out, err, status = io.StringIO(), io.StringIO(), None
    with mock.patch.object(sys, "argv", make_gpu(*options)[2:]), redirect_stdout(out), redirect_stderr(err):
        try:
            gpu.main()
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def dry() -> list[list[str]]:
    """The commands of a dry run."""
    return [line.split() for line in main("GPU=--dry-run")[1].splitlines()]


def test_every_step_names_files_that_exist(dry):
    files = {part for command in dry for part in command if re.match(r"tests/.*\.py$", part)}
    assert len(files) > 10
    assert all((gpu.ROOT / file).exists() for file in files)


def test_every_step_can_be_chosen(dry):
    chosen = main("GPU=--dry-run --steps profile check")[1].splitlines()
    assert [line.split() for line in chosen] == [command for command in dry if command[0] == "ncu" or "check" in command]
    assert len(chosen) == 2
    status, _, error = main("GPU=--dry-run --steps chek")
    assert status == 2 and "--steps: there is no chek; there are check, " in error


def test_every_test_that_needs_a_gpu_runs_on_it(dry):
    """Those marked, wherever they are; a sanitizer, those of its selection."""
    marked = [command for command in dry if any("gpu and" in f"{a} {b}" for a, b in itertools.pairwise(command))]
    everywhere, *sanitized = marked
    assert everywhere[-1] == "tests"
    beginning = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool"]
    assert [command[:5] for command in sanitized] == [[*beginning, tool] for tool in gpu.SANITIZERS]
    assert all(set(gpu.SANITIZED) <= set(command) for command in sanitized)


@pytest.mark.parametrize(
    ("free", "cores", "wanted"), [(11 << 30, 24, 5), (140 << 30, 16, 8), (140 << 30, 2, 2), (1 << 30, 16, 1)]
)
def test_as_many_processes_as_the_memory_of_the_gpu_takes(monkeypatch, free, cores, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_free_memory", lambda: free)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: cores)
    assert gpu.workers() == wanted


def test_with_a_gpu_every_kernel_is_among_those_tests():
    """To collect all other tests too would take long."""
    wanted = {f"tests/{path.name}" for path in gpu.ROOT.glob("tests/test_*_kernels.py")} | {"tests/test_cuda.py"}
    options = ["--collect-only", "-qq", "-m", "gpu", *sorted(wanted)]
    code = f"import pytest, torch; torch.cuda.is_available = lambda: True; pytest.main({options})"
    run = subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, check=True, capture_output=True, text=True)
    assert {line.partition(":")[0] for line in run.stdout.splitlines()} >= wanted


def test_what_is_skipped_for_want_of_a_gpu_is_marked():
    """A skip of another kind would not be found by `make gpu`."""
    own = "skip" + "if(not torch.cuda.is_available()"
    assert [path.name for path in gpu.ROOT.glob("tests/**/*.py") if own in path.read_text()] == []


def test_the_profiled_call_runs():
    """On the CPU here."""
    code = gpu.PROFILED.replace("'cuda'", "'cpu'")
    assert code != gpu.PROFILED
    subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    status, _, _ = main()
    assert isinstance(status, str) and "there is no CUDA device here" in status  # Python prints it, and exits with 1


def test_the_page_tells_what_became_of_each_step(tmp_path):
    """Of one that works, one that fails, one whose tool is missing, one that hangs; and the times that the last one leaves."""
    write = f"open({str(tmp_path / 'suite.json')!r}, 'w').write({json.dumps(saved(crowded=0.001))!r})"
    todo = [
        gpu.Step("check", [sys.executable, "-c", "print('all is well')"]),
        gpu.Step("kernels", [sys.executable, "-c", "print('one differs'); raise SystemExit(3)"]),
        gpu.Step("memcheck", ["no-such-tool"], "no-such-tool"),
        gpu.Step("hangs", [sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(99)"]),
        gpu.Step("benchmarks", [sys.executable, "-c", write]),
    ]
    outcomes = list(gpu.report("A device", todo, tmp_path, limit=2))
    assert [outcome.status for outcome in outcomes] == [
        "ok", "FAILED (exit status 3)", "left out: no-such-tool is not installed", "FAILED (not done after 2 s)", "ok"
    ]  # fmt: skip
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# A device\n") and "all is well" in page and "one differs" in page and "so far" in page
    assert "| memcheck | left out: no-such-tool is not installed | 0 |" in page
    assert "| reassign crowded | 300 ms | 1 ms |" in page
    assert (tmp_path / "kernels.txt").read_text() == "one differs\n"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux says here whether a process still runs")
def test_what_hangs_beside_a_step_is_killed_with_it(tmp_path):
    """A worker whose kernel hangs hears no interrupt, and would keep the GPU."""
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
    code = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {deaf!r}], stdout=subprocess.PIPE);"
        "print(child.pid, child.stdout.readline(), flush=True); child.wait()"
    )
    outcome = gpu.run(gpu.Step("hangs", [sys.executable, "-c", code]), tmp_path, limit=2)
    assert outcome.status == "FAILED (not done after 2 s)"
    stat = Path(f"/proc/{int((tmp_path / 'hangs.txt').read_text().split()[0])}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"{stat} says that it still runs")
