"""A checkpoint that 2.28.2 wrote, in its own environment, in the heads of 3.3.0 and in ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from heads import build, make_features
from mmengine.runner import load_checkpoint

import paa_gpu
from paa_gpu.integrations.mmdet import accelerate

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-mmdet-2.28.2" / "bin" / "python"  # beside the environment that runs this, in `make test-mmdet`
SMALL = {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1}
WRITE = """
import torch, heads
from mmcv.runner import save_checkpoint
torch.manual_seed(0)
head = heads.build(**{small}).eval()
features = heads.make_features(2, (64, 96), 32, torch.Generator().manual_seed(0))
save_checkpoint(head, "head.pth", meta=dict(epoch=12))
with torch.no_grad():
    torch.save(head(features), "outputs.pt")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder with the checkpoint, and what the head of 2.28.2 makes of features with seed 0."""
    folder = tmp_path_factory.mktemp("2.28.2")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "mmdet")))
    code = WRITE.format(small=SMALL)
    subprocess.run([PYTHON, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": paths}, check=True)
    return folder


@pytest.mark.parametrize("kind", ["published", "accelerated", "without mmdetection"])
def test_the_checkpoint_of_an_older_head(kind, written):
    head = paa_gpu.PAAHead(80, 32, 32, 1) if kind == "without mmdetection" else build(**SMALL)
    if kind == "accelerated":
        accelerate(head)
    load_checkpoint(head, str(written / "head.pth"), strict=True)
    features = make_features(2, (64, 96), 32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = head.eval()(features)
    for got, wanted in zip(outputs, torch.load(written / "outputs.pt"), strict=True):
        assert all(map(torch.equal, got, wanted))
