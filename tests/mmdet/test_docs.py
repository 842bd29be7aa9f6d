"""The Python of the documentation that needs mmdetection or torchvision: whole pages, with what they take for granted."""

from __future__ import annotations

import pages
import pytest
import torch
from torch import nn

from paa_gpu import PAAHead
from paa_gpu.integrations.mmdet import PAAHeadGPU


def needs_more(block) -> bool:
    return any(mark in block.code for mark in ("mmdet.accelerate", "# mmdet", "torchvision"))


# docs/torchvision.md needs no mmdetection: `make test` runs it.
PAGES = [page for page in pages.PAGES if page.stem != "torchvision" and any(map(needs_more, pages.blocks(page)))]


@pytest.fixture
def given(tmp_path, monkeypatch):
    """What the pages have from somewhere: a model of mmdetection, a batch's features and targets, a checkpoint in the folder."""
    from mmdet.models.dense_heads import PAAHead as Published

    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"bbox_head": Published(1, 16, feat_channels=32, stacked_convs=1)})
    checkpoint = {f"bbox_head.{name}": value for name, value in PAAHead(80, 256).state_dict().items()}
    torch.save({"state_dict": checkpoint}, "paa_r50_fpn_1x_coco.pth")
    return {
        **pages.given(),
        "model": model,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_runs(page, given):
    found = pages.blocks(page)
    assert not [block.name for block in found if set(block.missing) - {"a GPU"}]
    pages.run([block for block in found if not block.missing], given)
    if any("mmdet.accelerate(model)" in block.code for block in found):
        assert isinstance(given["model"]["bbox_head"], PAAHeadGPU)


def test_these_pages():
    assert [page.stem for page in PAGES] == ["README", "drop-in", "head", "mmdetection", "moving-from-scikit-learn"]
