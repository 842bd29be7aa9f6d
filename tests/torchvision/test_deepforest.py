"""DeepForest, the real package: trained by PAA in its own loop on a picture that it brings along, from a random start."""

from __future__ import annotations

import copy
import functools
import shutil
from pathlib import Path

import deepforest
import pages
import pytest
import torch
import torchvision
from deepforest.main import deepforest as Forest  # noqa: N812
from deepforest.models.retinanet import RetinaNetHub
from torchvision.ops import box_iou

from paa_gpu.integrations.torchvision import PAAOptions, RetinaNetPAA, accelerate, restore, use_paa

DATA = Path(deepforest.__file__).parent / "data"


@pytest.fixture
def forest(monkeypatch, tmp_path):
    """DeepForest around its own RetinaNet, small images and no weights to download."""
    published = torchvision.models.detection.retinanet_resnet50_fpn
    without_weights = functools.partial(published, weights_backbone=None)
    monkeypatch.setattr(torchvision.models.detection, "retinanet_resnet50_fpn", without_weights)
    torch.manual_seed(0)
    model = RetinaNetHub(num_classes=1, label_dict={"Tree": 0}, min_size=128, max_size=128)
    train = {"csv_file": str(DATA / "OSBS_029.csv"), "root_dir": str(DATA), "epochs": 2}
    settings = {"train": train, "log_root": str(tmp_path), "accelerator": "cpu", "num_classes": 1, "label_dict": {"Tree": 0}}
    forest = Forest(model=model, config_args=settings)
    forest.set_labels({"Tree": 0})
    return forest


def test_its_own_loop_trains_by_paa(forest, monkeypatch, tmp_path):
    keys = list(forest.model.state_dict())
    assert use_paa(forest.model, score_voting=True) is forest.model
    assert isinstance(forest.model, RetinaNetPAA)
    assert isinstance(forest.model, RetinaNetHub)
    assert list(forest.model.state_dict()) == keys
    matches = []
    published = forest.model.head.compute_loss

    def compute_loss(targets, outputs, anchors, matched):
        matches.append((targets[0]["boxes"], anchors[0], matched[0]))
        return published(targets, outputs, anchors, matched)

    monkeypatch.setattr(forest.model.head, "compute_loss", compute_loss)
    forest.create_trainer(logger=False)
    forest.trainer.fit(forest)
    assert len(matches) == 2  # steps, of one picture each
    for boxes, anchors, matched in matches:
        positive = matched >= 0
        assert len(boxes) == 61
        assert positive.sum() >= 30
        assert (box_iou(boxes, anchors)[matched[positive], positive.nonzero().flatten()] > 0).all()
    monkeypatch.undo()
    path = tmp_path / "forest.pt"
    torch.save(forest.model.state_dict(), path)
    restore(forest)
    assert type(forest.model) is RetinaNetHub
    forest.model.load_state_dict(torch.load(path))


def test_a_whole_forest_can_be_changed(forest):
    assert use_paa(forest, 5) is forest
    assert forest.model.paa_options == PAAOptions(5)
    assert accelerate(forest) is forest
    picture = torch.rand(3, 100, 100)
    forest.model.score_thresh = 0.005
    (found,) = forest.model.eval()([picture])
    assert found["boxes"].shape[1] == 4
    assert type(restore(forest).model) is RetinaNetHub


def test_the_lines_of_the_documentation(forest, monkeypatch, tmp_path):
    """But for the published weights, which come from the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deepforest.main.deepforest", lambda: forest)
    shutil.copy(DATA / "OSBS_029.csv", "trees.csv")
    shutil.copytree(DATA, "images", ignore=lambda _, names: [name for name in names if not name.startswith("OSBS_029")])
    forest.config.train.csv_file = forest.config.train.root_dir = None
    (block,) = (block for block in pages.blocks(pages.ROOT / "docs" / "torchvision.md") if "deepforest" in block.code)
    before = copy.deepcopy(forest.model.state_dict())
    pages.run([block], {"use_paa": use_paa})
    assert isinstance(forest.model, RetinaNetPAA)
    assert any(not torch.equal(value, before[name]) for name, value in forest.model.state_dict().items())
