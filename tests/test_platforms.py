"""Without Triton, as on Windows and macOS: everything for CPU tensors, and a clear error for others. Without Python's lock, and
without numba's compiler: refused. An old processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Triton is not found, as where it is not installed.
HIDE = """
import sys
from importlib.machinery import PathFinder
assert "triton" not in sys.modules
class WithoutTriton:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name == "triton" else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTriton
sys.path.insert(0, "tests")
import numpy as np, torch, paa_gpu
from paa_gpu import data, testing
"""

CPU = """
from test_head import make_features, make_head, make_targets
rng = np.random.default_rng(0)
recording = data.load()
assert paa_gpu.paa_reassign(*recording.arguments, num_classes=recording.num_classes)[3] == recording.published.sum()
batch = testing.make_batch([3, 0, 5], rng)
for separation in ("mmdet", paa_gpu.separation.separate):
    assert paa_gpu.paa_reassign_batch(*batch.arguments, **batch.options, separation=separation).num_pos.sum() > 0
sizes = batch.anchors[0]
found = paa_gpu.select_candidates(batch.pos_losses[0], batch.pos_inds[0], batch.pos_gt_inds[0], sizes, num_gt=3)
assert paa_gpu.fit_gmm_1d(found.loss, found.count).predict(found.loss).shape == found.loss.shape
predictions = testing.make_predictions([(3, 9), (0, 5)], rng)
boxes, _ = paa_gpu.score_voting_batch(*predictions, 0.05)
one, _ = paa_gpu.score_voting(*(column[0] for column in predictions), 0.05)
assert torch.equal(one, boxes[0])
head = testing.make_head_batch([5, 0], rng)
assert [len(losses) for losses in paa_gpu.candidate_losses(*head)] == [5, 0]
assert len(paa_gpu.assign_max_iou(head.anchors, [testing.make_boxes(4, (99, 99), rng)]).gt_inds) == 1
sum(make_head().loss(make_features(2), make_targets([3, 1])).values()).backward()
assert paa_gpu.reduce_mean(torch.tensor(3)) == 3
compiled = torch.compile(lambda x: paa_gpu.fit_gmm_1d(x).means, fullgraph=True, backend="aot_eager")
assert compiled(torch.rand(2, 9)).shape == (2, 2)
assert "triton" not in sys.modules
"""

CUDA = """
from paa_gpu import _dispatch
with _dispatch.kernels_on_cpu():  # what runs for CUDA tensors
    try:
        paa_gpu.fit_gmm_1d(torch.rand(2, 9))
    except ImportError as error:
        print(error)
paa_gpu.fit_gmm_1d(torch.rand(2, 9))
"""


def run(code: str) -> str:
    got = subprocess.run([sys.executable, "-c", HIDE + code], cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    return got.stdout


@pytest.mark.slow
def test_the_whole_cpu_path():
    run(CPU)


def test_the_error_for_cuda_tensors():
    assert run(CUDA) == (
        "tensors on a CUDA device need Triton: pip install triton (on Windows: triton-windows); tensors on the CPU need none\n"
    )


@pytest.mark.slow
def test_the_command_says_what_is_missing(tmp_path):
    code = f"from paa_gpu.__main__ import main\nmain(['--out', {str(tmp_path / 'picture.png')!r}])"
    assert "none: Triton is not installed" in run(code)


def test_free_threaded_python_is_refused():
    """The message says what to do. No such Python is needed to see it."""
    script = "import sys; sys._is_gil_enabled = lambda: False; import paa_gpu"
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1
    assert "ImportError: paa_gpu needs Python's global interpreter lock" in process.stderr and "PYTHON_GIL=1" in process.stderr


def test_loops_that_are_not_compiled_are_refused():
    script = "import torch, paa_gpu; paa_gpu.fit_gmm_1d(torch.rand(2, 9))"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.endswith(
        "ImportError: tensors on the CPU need loops that numba compiles: unset NUMBA_DISABLE_JIT in the environment\n"
    )


@pytest.mark.slow
def test_a_processor_that_fuses_no_products_with_sums(tmp_path):
    """As x86 before 2013, and some emulators: functions of one value keep their digits, and a value its bits wherever it stands."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    tests = ["tests/test_numeric.py", "tests/test_mixture.py::test_every_form_of_the_input"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
