"""The examples that a person would copy, each run in a short form."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def changed(file: Path, change) -> str:
    """A COCO file like this one, changed by a function, beside it."""
    content = json.loads(file.read_text())
    change(content)
    (file.parent / "changed.json").write_text(json.dumps(content))
    return str(file.parent / "changed.json")


def only_bushes(content) -> None:
    content["categories"] = content["categories"][1:]
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] == 7]


@pytest.mark.slow
def test_training_that_goes_on_is_the_same_training(coco_data, monkeypatch):
    """As if nobody had interrupted it, while it saved its second epoch."""
    example, save = load("train_coco"), torch.save

    def weights(*more: str):
        example.main(arguments(coco_data, "--epochs", "2", *more)[1:])
        return torch.load(coco_data / "out" / "checkpoint.pt", weights_only=True)["detector"]

    def save_one(state, path: Path) -> None:
        if state["epoch"] == 2:
            path.write_bytes(b"a part")
            raise KeyboardInterrupt
        save(state, path)

    wanted = weights()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save_one)
        weights()
    assert torch.load(coco_data / "out" / "checkpoint.pt", weights_only=True)["epoch"] == 1
    got = weights("--resume")
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.slow
def test_training_that_goes_on_takes_the_new_learning_rate(coco_data):
    """With 0, parameters stay."""
    example = load("train_coco")

    def parameters(*more: str):
        example.main(arguments(coco_data, *more)[1:])
        state = torch.load(coco_data / "out" / "checkpoint.pt", weights_only=True)["detector"]
        return {name: value for name, value in state.items() if "running" not in name and "tracked" not in name}

    before = parameters("--epochs", "1")
    after = parameters("--epochs", "2", "--resume", "--lr", "0")
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.slow
def test_detections_have_the_categories_of_the_training_set(coco_data):
    """Also with a test file that has fewer of them, no areas and no crowds. Without an epoch, the example evaluates alone."""
    example, boxes = load("train_coco"), coco_data / "boxes.json"
    example.main(arguments(coco_data, "--epochs", "1")[1:])

    def change(content) -> None:
        only_bushes(content)
        for annotation in content["annotations"]:
            del annotation["iscrowd"], annotation["area"]

    example.main(arguments(coco_data, "--epochs", "0", "--resume", "--test-annotations", changed(boxes, change))[1:])
    found = {entry["category_id"] for entry in json.loads((coco_data / "out" / "detections.json").read_text())}
    assert found == {5, 7}
    with pytest.raises(ValueError, match=r"must have the categories of .*checkpoint.pt, \[5, 7\], got \[7\]$"):
        example.main([*arguments(coco_data, "--resume")[1:], "--annotations", changed(boxes, only_bushes)])


def test_boxes_that_train(coco_data):
    """No crowds; and of boxes that reach beyond the image, the part within."""
    example, boxes = load("train_coco"), coco_data / "boxes.json"

    def change(content) -> None:
        whole = {"image_id": 12, "category_id": 7, "bbox": [-10, 0, 200, 128], "area": 25600}
        content["annotations"] += [{**whole, "id": 1000, "iscrowd": 1}, {**whole, "id": 1001}]

    samples = [example.CocoBoxes(str(coco_data), changed(boxes, change), 128, training) for training in (True, False)]
    (_, target), (_, unused) = (data[2] for data in samples)
    assert target["boxes"].tolist() == [[0, 0, 160, 128]] and target["labels"].tolist() == [1]
    assert unused["boxes"].shape == (0, 4) and target["image_id"] == unused["image_id"] == 12
    assert len(samples[0].coco.anns) == len(samples[1].coco.anns)


def test_detections_that_are_the_boxes_are_perfect(coco_data):
    """Two annotations have the id 0, which pycocotools takes for none. And a picture of any format is drawn."""
    example, boxes = load("train_coco"), coco_data / "boxes.json"

    def change(content) -> None:
        with Image.open(coco_data / "0.png") as picture:
            picture.convert("L").save(coco_data / "0.bmp")
        content["images"][0]["file_name"] = "0.bmp"
        content["annotations"][0]["id"] = content["annotations"][1]["id"] = 0

    coco = example.CocoBoxes(str(coco_data), changed(boxes, change), 128, training=False).coco
    assert len(coco.anns) == len(json.loads(boxes.read_text())["annotations"])
    found = [
        {**{name: entry[name] for name in ("image_id", "category_id", "bbox")}, "score": 0.9} for entry in coco.anns.values()
    ]
    assert example.evaluate(coco, found) == 1
    example.draw(coco_data / "drawn.png", str(coco_data), coco, found)
    assert (coco_data / "drawn.png").stat().st_size > 1000


def test_each_side_has_its_own_scale(coco_data):
    """A side is resized to whole pixels: here from 13 to 10, and from 1,000 to 800. Boxes go back by these numbers."""
    example = load("train_coco")

    def change(content) -> None:
        Image.new("RGB", (1000, 13)).save(coco_data / "wide.png")
        content["images"][0] |= {"file_name": "wide.png", "width": 1000, "height": 13}

    content = changed(coco_data / "boxes.json", change)
    data = example.CocoBoxes(str(coco_data), content, 480, training=False)
    image, target = data[0]
    assert image.shape == (3, 10, 800) and target["scale"] == (0.8, 10 / 13)


def test_a_picture_is_turned_where_its_boxes_are(coco_data):
    """The first picture lies on its side on the disk, and EXIF tells how to turn it. Boxes may be those of either form."""
    example, boxes = load("train_coco"), coco_data / "boxes.json"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    with Image.open(coco_data / "0.png") as upright:
        upright.transpose(Image.Transpose.ROTATE_90).save(coco_data / "turned.png", exif=exif)

    def at(width: int, height: int):
        entry = {"file_name": "turned.png", "width": width, "height": height}
        content = changed(boxes, lambda content: content["images"][0].update(entry))
        return example.CocoBoxes(str(coco_data), content, 128, training=False)

    def of(picture: Image.Image):
        return torch.from_numpy(np.array(picture))

    with Image.open(coco_data / "0.png") as upright, Image.open(coco_data / "turned.png") as lying:
        for size, wanted in (((160, 128), upright), ((128, 160), lying)):
            data = at(*size)
            assert data[0][0].shape == (3, *size[::-1])
            assert torch.equal(of(example.load(str(coco_data), data.coco.imgs[10])), of(wanted.convert("RGB")))
            example.draw(coco_data / "drawn.png", str(coco_data), data.coco, [])
    with pytest.raises(ValueError, match=r"turned.png must have the size \(100, 128\) of its entry, got \(128, 160\)"):
        at(100, 128)[0]


WRONG = {
    "annotation 1 must have a bbox .*, got \\[\\]": lambda content: content["annotations"][1].pop("bbox"),
    "annotation 0 must have a bbox .*, got \\[\\]$": lambda content: content["annotations"][0].update(bbox=[]),
    "annotation 0 must be of a category of \\[5, 7\\], got 55": lambda content: content["annotations"][0].update(category_id=55),
    "must have images, got none": lambda content: content["images"].clear(),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_file_of_annotations_is_refused(coco_data, message):
    with pytest.raises(ValueError, match=f"changed.json.*{message}"):
        load("train_coco").read(changed(coco_data / "boxes.json", WRONG[message]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "-3"], "--epochs: must be at least 0, got -3"),
        (["--size", "0"], "--size: must be at least 32, got 0"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (
            ["--backbone", "mobilenet_v3_large"],
            "--backbone must be a ResNet of torchvision, or timm:NAME, got mobilenet_v3_large",
        ),
    ],
)
def test_a_wrong_option_is_refused(coco_data, capsys, options, message):
    with pytest.raises((SystemExit, ValueError)) as error:
        load("train_coco").main([*arguments(coco_data)[1:], *options])
    assert message in capsys.readouterr().err + str(error.value)


def test_categories_of_the_test_are_those_of_the_training_set(coco_data):
    """Also by their names: a number may mean another category in another file."""
    other = changed(coco_data / "boxes.json", lambda content: content["categories"][0].update(name="shrub"))
    with pytest.raises(ValueError, match=r"{5: 'tree', 7: 'bush'}, got {5: 'shrub', 7: 'bush'}"):
        load("train_coco").main([*arguments(coco_data)[1:], "--test-annotations", other])


@pytest.mark.parametrize("strides", [[4, 8, 16, 32], [16, 16, 16]])
def test_levels_of_a_timm_backbone(monkeypatch, strides):
    """Those of strides 8, 16 and 32 are taken. A network without them, such as a plain transformer, is refused."""

    class Network(torch.nn.Module):
        def __init__(self, out_indices=None, **kwargs):
            super().__init__()
            self.strides = strides if out_indices is None else [strides[i] for i in out_indices]
            self.feature_info = types.SimpleNamespace(reduction=lambda: self.strides)

        def forward(self, images):
            return [images[:, :1, ::stride, ::stride].expand(-1, stride, -1, -1) for stride in self.strides]

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=lambda name, **options: Network(**options)))
    make_body = load("train_coco").make_body
    if len(strides) == 4:
        assert make_body("timm:network", pretrained=False)[1] == [8, 16, 32]
    else:
        with pytest.raises(ValueError, match=r"strides \(8, 16, 32\), got \[\(1, 16, 8, 8\), .* for 128 x 128"):
            make_body("timm:network", pretrained=False)


@pytest.mark.long
def test_the_same_example_in_two_processes(coco_data):
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments(coco_data, "--epochs", "1"))
    assert torch.load(coco_data / "out" / "checkpoint.pt", weights_only=True)["epoch"] == 1


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
