"""The examples that a person would copy, each run in a short form."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paa_gpu import data

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def coco_data(tmp_path) -> Path:
    """Four crops of the bundled photograph as a data set in COCO's format; one has no boxes, and category ids have gaps."""
    recording = data.load()
    picture, boxes = data.picture(recording), torch.from_numpy(recording.gt["bboxes"])
    images, annotations = [], []
    for i, (x, y) in enumerate([(0, 0), (300, 0), (0, 300), (300, 300)]):
        picture.crop((x, y, x + 160, y + 128)).save(tmp_path / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "width": 160, "height": 128})
        inside = (boxes - torch.tensor([x, y, x, y])).clamp(torch.zeros(4), torch.tensor([160, 128, 160, 128]))
        for x1, y1, x2, y2 in inside[((inside[:, 2:] - inside[:, :2]) > 8).all(1)].tolist() * (i != 2):
            number = len(annotations)
            entry = {"id": number, "image_id": 10 + i, "category_id": 5 + 2 * (number % 2), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append({**entry, "area": (x2 - x1) * (y2 - y1), "iscrowd": 0})
    categories = [{"id": 5, "name": "tree"}, {"id": 7, "name": "bush"}]
    file = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "boxes.json").write_text(json.dumps(file))
    return tmp_path


def run(*command: str) -> str:
    result = subprocess.run([sys.executable, *command], env=os.environ, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def arguments(folder: Path, *more: str) -> list[str]:
    boxes = str(folder / "boxes.json")
    options = ["--images", str(folder), "--annotations", boxes, "--out", str(folder / "out"), "--size", "128", "--workers", "0"]
    return [str(EXAMPLES / "train_coco.py"), *options, "--batch-size", "2", *more]


@pytest.mark.slow
def test_training_on_coco_data_and_going_on_from_a_checkpoint(coco_data):
    run(*arguments(coco_data, "--epochs", "1"))
    first = torch.load(coco_data / "out" / "checkpoint.pt", weights_only=True)
    assert first["epoch"] == 1 and first["categories"] == [5, 7]
    printed = run(*arguments(coco_data, "--epochs", "2", "--resume", "--test-annotations", str(coco_data / "boxes.json")))
    second = torch.load(coco_data / "out" / "checkpoint.pt", weights_only=True)
    assert second["epoch"] == 2
    assert any(not torch.equal(first["detector"][name], value) for name, value in second["detector"].items())
    assert "Average Precision" in printed or "average precision 0" in printed
    assert (coco_data / "out" / "detections.png").stat().st_size > 1000
    assert {entry["category_id"] for entry in json.loads((coco_data / "out" / "detections.json").read_text())} <= {5, 7}


@pytest.mark.long
def test_the_same_example_in_two_processes(coco_data):
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments(coco_data, "--epochs", "1"))
    assert torch.load(coco_data / "out" / "checkpoint.pt", weights_only=True)["epoch"] == 1


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_noisy_labels_are_found_and_left_out(tmp_path):
    figures = load("noisy_labels").main(["--out", str(tmp_path / "picture.png")])
    assert figures["wrong labels found"] > 0.9 and figures["right labels kept"] > 0.9
    assert figures["accuracy after training with the low group"] > figures["accuracy after training with all labels"]
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_the_thresholds_of_a_teacher():
    found = load("teacher_thresholds").main([])
    assert ((found > 0.05) & (found <= 1)).all()


def test_a_class_with_two_groups_of_scores_gets_a_threshold_between_them_and_a_small_one_the_default():
    low, high = torch.linspace(0.05, 0.15, 40), torch.linspace(0.7, 0.9, 20)
    found = load("teacher_thresholds").thresholds([torch.cat([low, high]), low[:3], torch.zeros(0)])
    assert 0.7 <= found[0] <= 0.9
    assert found[1:].tolist() == [0.5, 0.5]
