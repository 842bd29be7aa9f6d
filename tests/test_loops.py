"""What holds the compiled loops of CPU tensors together: the disk cache sees a change in any of their files."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import paa_gpu

FIT = """
import torch, paa_gpu
print(paa_gpu.fit_gmm_1d(torch.tensor([[0.0, 0.5, 1.0, 1.5]]), max_iter=1).lower_bound.item())
"""


@pytest.mark.long
def test_the_disk_cache_sees_a_change_in_what_a_loop_calls(tmp_path):
    """The fit lies in `em.py` and calls the exponential of `_numeric.py`."""
    package = tmp_path / "paa_gpu"
    shutil.copytree(Path(paa_gpu.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def lower_bound():
        return float(subprocess.run([sys.executable, "-c", FIT], cwd=tmp_path, check=True, capture_output=True, text=True).stdout)

    before = lower_bound()
    numeric = package / "cpu" / "_numeric.py"
    numeric.write_text(numeric.read_text().replace("return series * np.int64", "return 2 * series * np.int64"))
    assert lower_bound() > before + 0.1
