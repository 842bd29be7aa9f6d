"""Out of Python: `torch.export` and ONNX give the detections of eager, of other image sizes and other numbers of images too."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from test_head import make_head
from torch import nn

from paa_gpu.export import Detector, translations

NAMES = ("boxes", "scores", "labels", "count")
ROOM = 20


class Pool(nn.Module):
    """One map of 8 channels per stride: averages and their squares."""

    def forward(self, images):
        features = [nn.functional.avg_pool2d(images, stride) for stride in (8, 16)]
        return {str(i): torch.cat([level, level.square(), level[:, :2]], 1) * 4 for i, level in enumerate(features)}


def make_detector(**options):
    return Detector(make_head(**{"score_thr": 0.0707, "nms_pre": 40, "max_per_img": ROOM, **options}), Pool()).eval()


def make_images(images, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([[height, width - 8 * image] for image in range(images)])
    return torch.rand(images, 3, height, width, generator=generator), sizes


FREE = torch.export.Dim.AUTO
DYNAMIC = {"images": {0: FREE, 2: FREE, 3: FREE}, "image_sizes": {0: FREE}}

#: Other sizes than that of the export, one whose levels have fewer cells than `nms_pre`; one image and many.
BATCHES = [(2, 64, 96), (1, 64, 96), (5, 96, 128), (3, 32, 48)]


def assert_same(got, wanted):
    """All of it exactly, but boxes, and scores, to float32's rounding."""
    boxes, scores, labels, count = (torch.as_tensor(part) for part in got)
    assert torch.equal(count, wanted[3]) and torch.equal(labels, wanted[2])
    torch.testing.assert_close(scores, wanted[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(boxes, wanted[0], rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def exported():
    detector = make_detector()
    return detector, torch.export.export(detector, make_images(2, 64, 96), dynamic_shapes=DYNAMIC)


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@torch.no_grad()
def test_the_exported_program(exported, batch):
    detector, program = exported
    images = make_images(*batch)
    assert_same(program.module()(*images), detector(*images))


def run_onnx(module, arguments, dynamic_shapes, names, path):
    """A session of the file, and what it gives for other arguments."""
    torch.onnx.export(
        module, arguments, path, dynamo=True, dynamic_shapes=dynamic_shapes, custom_translation_table=translations(),
        output_names=names, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    inputs = [each.name for each in session.get_inputs()]
    return lambda *values: session.run(None, {name: value.numpy() for name, value in zip(inputs, values, strict=True)})


@pytest.mark.slow
@torch.no_grad()
def test_onnx(tmp_path):
    """Voted detections, of other sizes and numbers of images than that of the export."""
    detector = make_detector()
    run = run_onnx(detector, make_images(2, 64, 96), DYNAMIC, NAMES, tmp_path / "detector.onnx")
    found = 0
    for batch in BATCHES:
        images = make_images(*batch)
        wanted = detector(*images)
        found += int(wanted[3].sum())
        assert_same(run(*images), wanted)
    assert found > 50
