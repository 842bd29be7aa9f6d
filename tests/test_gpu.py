"""`make gpu` as far as it can be tried without a GPU: its steps, what becomes of each, and the page."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_bench import saved

from bench import gpu


def test_the_steps_name_files_and_options_that_exist(tmp_path):
    """pytest collects every step's tests. So a file that moves cannot leave a step with nothing to run."""
    for step in gpu.steps(tmp_path):
        files = [part for part in step.command if part.startswith("tests/")]
        assert all((gpu.ROOT / file).exists() for file in files), step.name
    names = [step.name for step in gpu.steps(tmp_path)]
    assert names[0] == "check" and names[-1] == "benchmarks" and set(gpu.SANITIZERS) <= set(names)


def test_a_dry_run_prints_the_commands():
    process = subprocess.run([sys.executable, "-m", "bench.gpu", "--dry-run"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert process.returncode == 0
    assert len(process.stdout.splitlines()) == len(gpu.steps(gpu.ROOT))
    assert "--execution cuda tests/test_assign.py" in process.stdout


@pytest.mark.skipif(gpu.torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    process = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and "there is no CUDA device here" in process.stderr


def test_the_page_tells_what_became_of_each_step(tmp_path):
    """Of one that works, one that fails, one whose tool is missing; and the times that the last one leaves."""
    write = f"open({str(tmp_path / 'suite.json')!r}, 'w').write({json.dumps(saved())!r})"
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
    assert "| memcheck | left out: no-such-tool is not installed | 0 |" in page and "## Times" in page
    assert (tmp_path / "kernels.txt").read_text() == "one differs\n"
