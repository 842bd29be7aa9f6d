"""Training, going on and validation with mmengine's Runner, as `tools/train.py` of mmdetection builds it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from api import CONFIGS, Config
from heads import PAA, small, under_the_tie_rule
from mmengine.runner import Runner

from paa_gpu import data
from paa_gpu.integrations.mmdet import PAAHeadGPU, accelerate, explain

SIZE = (192, 160)  # width and height


@pytest.fixture
def boxes(tmp_path) -> Path:
    """Four crops of the bundled photograph, and their boxes in COCO's format."""
    recording = data.load()
    picture, trees = data.picture(recording), torch.from_numpy(recording.gt["bboxes"])
    images, annotations = [], []
    for i, (x, y) in enumerate([(0, 0), (300, 0), (0, 300), (300, 300)]):
        picture.crop((x, y, x + SIZE[0], y + SIZE[1])).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]})
        inside = (trees - torch.tensor([x, y, x, y])).clamp(torch.zeros(4), torch.tensor([*SIZE, *SIZE]))
        for x1, y1, x2, y2 in inside[((inside[:, 2:] - inside[:, :2]) > 8).all(1)].tolist():
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append({**entry, "area": (x2 - x1) * (y2 - y1), "iscrowd": 0})
    file = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(file))
    return tmp_path / "boxes.json"


def config(boxes: Path, name: str, epochs: int, **head) -> Config:
    """The published configuration with a small detector, our data, and an average of the weights."""
    made = Config.fromfile(str(CONFIGS / PAA))
    made.model = small(PAA)
    made.model.bbox_head.update(num_classes=1, **head)
    for loader in (made.train_dataloader, made.val_dataloader, made.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(
            data_root="", ann_file=str(boxes), data_prefix={"img": str(boxes.parent)}, metainfo={"classes": ("tree",)}
        )
        for step in loader.dataset.pipeline:
            if step.type == "Resize":
                step.scale = SIZE
            if step.type == "RandomFlip":  # by random numbers that a checkpoint does not keep
                step.prob = 0.0
    made.val_evaluator.ann_file = made.test_evaluator.ann_file = str(boxes)
    made.train_cfg.max_epochs = epochs
    made.default_hooks.logger.interval = 1
    made.custom_hooks = [{"type": "EMAHook"}]
    made.update(work_dir=str(boxes.parent / name), experiment_name=f"{boxes.parent.name}-{name}", randomness={"seed": 0})
    return made


def trained(made: Config, change=lambda model: None) -> Runner:
    """The Runner after training of its model, changed before."""
    runner = Runner.from_cfg(made)
    change(runner.model)
    runner.train()
    return runner


def losses(runner: Runner) -> torch.Tensor:
    """The total of each step."""
    return torch.from_numpy(runner.message_hub.get_scalar("train/loss").data[0])


def use_the_tie_rule(model) -> None:
    model.bbox_head = under_the_tie_rule(model.bbox_head)


def test_it_trains_as_the_published_head_does(boxes):
    """By the line and by the configuration: with the same bits. Then it validates, with the average of the weights."""
    published = trained(config(boxes, "published", 2), use_the_tie_rule)
    line = trained(config(boxes, "line", 2), accelerate)
    named = trained(config(boxes, "named", 2, type="PAAHeadGPU"))
    for runner in (line, named):
        assert type(runner.model.bbox_head) is PAAHeadGPU
        assert [entry.accelerated for entry in explain(runner.model)] == ["the whole loss"]
        assert len(losses(runner)) == 4
        torch.testing.assert_close(losses(runner), losses(published), rtol=1e-5, atol=0)
        assert runner.message_hub.get_scalar("val/coco/bbox_mAP_50").current() > 0
    assert torch.equal(losses(line), losses(named))
    wanted = named.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in line.model.state_dict().items())


def test_training_that_goes_on_is_the_same_training(boxes, monkeypatch):
    """From a checkpoint of the Runner, which torch loads only where it is told that the file is trusted."""
    whole = trained(config(boxes, "whole", 2), accelerate)
    trained(config(boxes, "parts", 1), accelerate)
    made = config(boxes, "parts", 2)
    made.update(resume=True, experiment_name=f"{made.experiment_name}-on")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trained(made, accelerate)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    made.experiment_name += "-again"
    rest = trained(made, accelerate)
    assert torch.equal(losses(rest)[-2:], losses(whole)[-2:])
    saved = [torch.load(boxes.parent / name / "epoch_2.pth") for name in ("whole", "parts")]
    for part in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(value, saved[1][part][name]) for name, value in saved[0][part].items()), part
