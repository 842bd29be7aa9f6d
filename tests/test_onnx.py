"""Out of Python: exported programs, compiled ones and files of ONNX give the detections of eager, of other sizes too."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from test_head import make_head
from test_nms import make_image
from test_predict import OPTIONS
from torch import nn

import paa_gpu
from paa_gpu import testing
from paa_gpu.integrations.onnx import translations

AUTO = torch.export.Dim.AUTO


def to_onnx(module, arguments, dynamic_shapes, path):
    """What the file gives for other arguments."""
    torch.onnx.export(
        module.eval(), arguments, path, dynamo=True, dynamic_shapes=dynamic_shapes, custom_translation_table=translations(),
        verbose=False, optimize=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [each.name for each in session.get_inputs()]

    def run(*values):
        got = session.run(None, {name: value.numpy() for name, value in zip(inputs, values, strict=True)})
        return [torch.from_numpy(part) for part in got]

    return run


class Suppress(nn.Module):
    """NMS in each of its hard ways."""

    WAYS = (
        {"max_per_img": 12},
        {"score_thr": 0.5, "max_per_img": 60},
        {"nms_pre": 30, "class_agnostic": True},
        {"score_thr": 0.3, "nms_pre": 25, "max_per_img": 9},
    )

    def forward(self, boxes, scores, labels, table):
        results = []
        # In float64 there are overlaps of just 1 / 3, which are none of 1 / 3 in float32.
        iou_threshold = 0.31 if boxes.dtype == torch.float64 else 1 / 3
        for options in self.WAYS:
            for way in ((scores, labels), (table, None)):
                results += paa_gpu.batched_nms(boxes, *way, iou_threshold, **options)
        return [*results, *paa_gpu.batched_nms(boxes, scores, labels, 1.5)]  # ONNX allows 1 at most


def make_candidates(images, number, classes, rng, dtype=torch.float32):
    boxes, scores, labels = map(torch.stack, zip(*(make_image(number, 3, rng, True, 120) for _ in range(images)), strict=True))
    table = torch.from_numpy(np.round(rng.random((images, number, classes)) * 16) / 16).float()
    labels = (labels * 5 - 4).to(torch.int32 if dtype == torch.float32 else torch.int64)
    return boxes.to(dtype), scores.to(dtype), labels, table.to(dtype)


#: Of voted boxes; labels are equal.
ROUNDING = {torch.float16: 0.5, torch.float32: 1e-4, torch.float64: 1e-10, torch.int32: 0, torch.int64: 0}

LONG = [pytest.param(dtype, marks=pytest.mark.long) for dtype in (torch.float16, torch.float64)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *LONG], ids=str)
def test_nms(dtype, rng, tmp_path):
    """Exactly, equal scores too; other numbers of images, boxes and classes; negative scores; no candidate, no box."""
    arguments = make_candidates(2, 40, 3, rng, dtype)
    shapes = {
        "boxes": {0: AUTO, 1: AUTO},
        "scores": {0: AUTO, 1: AUTO},
        "labels": {0: AUTO, 1: AUTO},
        "table": dict.fromkeys(range(3), AUTO),
    }
    run = to_onnx(Suppress(), arguments, shapes, tmp_path / "nms.onnx")
    none = [*make_candidates(2, 7, 2, rng, dtype)]
    none[1], none[3] = none[1] * 0, none[3] * 0
    no_box = [column[:, :0] for column in arguments]
    negative = make_candidates(2, 9, 2, rng, dtype)
    negative = negative[0], negative[1] - 5, negative[2], negative[3] - 5
    for others in (make_candidates(3, 70, 2, rng, dtype), make_candidates(1, 5, 6, rng, dtype), negative, none, no_box):
        for got, wanted in zip(run(*others), Suppress()(*others), strict=True):
            assert got.dtype == wanted.dtype and torch.equal(got, wanted)


class Vote(nn.Module):
    def forward(self, det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores, count):
        columns = det_bboxes, det_labels, mlvl_bboxes, mlvl_nms_scores
        options = (0.05, 0.1, 0.04, 1.0, True), (0.05, 0.5, 0.025, 0.0, True)
        return paa_gpu.score_voting_batch(*columns, 0.05, count=count), *(
            paa_gpu.score_voting_batch(*columns, *each) for each in options
        )


def make_voters(images, detections, boxes, rng, dtype=torch.float32):
    """Also what just is no voter: its score is the threshold, its IoU 1 / 2, or it has hardly an area in common."""
    columns = testing.make_predictions([(detections, boxes)] * images, rng, num_classes=4)
    det, label, box, score = map(torch.stack, columns)
    score[..., -1] = 0.5  # what a label of -1 would read
    label[:, 1], label[:, 2], label[:, 3] = -1, score.shape[2], 99
    det[:, 3], det[0, 4, 2], box[:, 5, 1], box[0, 6, 0], box[0, 7] = 0, torch.inf, torch.nan, -torch.inf, torch.inf
    label[:, 0], score[:, 1:5] = 0, 0.9
    det[:, 0, :4], box[:, 1], score[:, 1] = torch.tensor([0.0, 0, 8, 4]), torch.tensor([0.0, 0, 7, 4]), 0.05
    box[:, 2], box[:, 3] = torch.tensor([0.0, 0, 4, 4]), torch.tensor([0.0, 0, 100, 1e-10])
    det[:, -1, :4], label[:, -1] = torch.tensor([0.0, 0, 50, 1e-10]), 0
    return det.to(dtype), label.int(), box.to(dtype), score.to(dtype), torch.arange(images) * 7 % (detections + 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *LONG], ids=str)
def test_voting(dtype, rng, tmp_path):
    """Boxes to rounding, for sums have another order; labels outside, boxes that are not finite, padding."""
    shapes = [{0: AUTO, 1: AUTO}] * 4 + [{0: AUTO}]
    run = to_onnx(Vote(), make_voters(2, 12, 30, rng, dtype), shapes, tmp_path / "voting.onnx")
    no_box, no_detection = make_voters(2, 9, 12, rng, dtype), make_voters(2, 9, 12, rng, dtype)
    no_box = *no_box[:2], *(column[:, :0] for column in no_box[2:4]), no_box[4]
    no_detection = *(column[:, :0] for column in no_detection[:2]), *no_detection[2:4], 0 * no_detection[4]
    for others in (make_voters(3, 20, 90, rng, dtype), make_voters(1, 5, 9, rng, dtype), no_box, no_detection):
        wanted = [part for pair in Vote()(*others) for part in pair]
        for got, part in zip(run(*others), wanted, strict=True):
            torch.testing.assert_close(got, part, rtol=0, atol=ROUNDING[part.dtype], equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [0, 2, 3])
def test_voting_computes_in_the_widest_dtype(wide, rng, tmp_path):
    """One of the three has digits, or scores, that only float64 can tell apart."""
    voters = [*make_voters(2, 12, 30, rng)[:4]]
    voters[wide] = voters[wide].double()
    if wide == 3:
        voters[3] *= 1e-50
    else:
        for i in (0, 2):
            voters[i][..., :4] += 2**24
        voters[wide][..., :4] += 0.3
    module = Vote()
    module.forward = lambda *columns: paa_gpu.score_voting_batch(*columns, 1e-60, 0.1)
    run = to_onnx(module, tuple(voters), None, tmp_path / "voting.onnx")
    for got, part in zip(run(*voters), module(*voters), strict=True):
        torch.testing.assert_close(got, part, rtol=1e-12 if got.dtype == torch.float64 else 1e-7, atol=0, equal_nan=True)


class Soft(nn.Module):
    def forward(self, boxes, scores):
        return paa_gpu.batched_nms(boxes[None], scores[None], None, 0.5, method="linear")


class Lists(nn.Module):
    def forward(self, boxes, scores):
        return paa_gpu.batched_nms([boxes, boxes[:2]], [scores, scores[:2]], None, 0.5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Soft(), "`method` must be \"hard\" in ONNX, got 'linear'"),
        (Lists(), "`boxes` must be a Tensor in ONNX, got list"),
    ],
    ids=["soft", "lists"],
)
def test_what_has_no_translation(module, message, tmp_path):
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        to_onnx(module, (torch.rand(4, 4), torch.rand(4, 2)), None, tmp_path / "none.onnx")
    cause = error.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert str(cause) == message


# --- the head ------------------------------------------------------------------------------------------------------------------


class Pool(nn.Module):
    """One map of 8 channels per stride: averages and their squares."""

    def forward(self, images):
        features = [nn.functional.avg_pool2d(images, stride) for stride in (8, 16)]
        return [torch.cat([level, level.square(), level[:, :2]], 1) * 4 for level in features]


class Detector(nn.Module):
    """From images to detections."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Pool(), make_head(**OPTIONS)

    def forward(self, images, image_sizes):
        return self.head.predict(self.backbone(images), image_sizes, padded=True)


def make_images(images, height, width):
    generator = torch.Generator().manual_seed(height)
    sizes = torch.tensor([[height, width - 8 * image] for image in range(images)])
    return torch.rand(images, 3, height, width, generator=generator), sizes


DYNAMIC = {"images": {0: AUTO, 2: AUTO, 3: AUTO}, "image_sizes": {0: AUTO}}

#: Other sizes than that of the export, one whose levels have fewer cells than `nms_pre`; one image and many.
BATCHES = [(2, 64, 96), (1, 64, 96), (5, 96, 128), (3, 32, 48)]


def assert_detections(run, detector):
    """Those of eager: scores and boxes to float32's rounding, all else exactly."""
    found = 0
    for batch in BATCHES:
        images = make_images(*batch)
        wanted, got = detector(*images), run(*images)
        got = dict(zip(wanted, got.values() if isinstance(got, dict) else got, strict=True))
        assert torch.equal(got["count"], wanted["count"]) and torch.equal(got["labels"], wanted["labels"])
        torch.testing.assert_close(got["scores"], wanted["scores"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got["boxes"], wanted["boxes"], rtol=0, atol=1e-3)
        found += int(wanted["count"].sum())
    assert found > 50


@pytest.fixture(scope="module")
def detector():
    return Detector().eval()


@pytest.fixture(scope="module")
def program(detector):
    return torch.export.export(detector, make_images(2, 64, 96), dynamic_shapes=DYNAMIC)


@pytest.mark.long
@torch.no_grad()
def test_the_exported_program(program, detector):
    assert_detections(program.module(), detector)


@pytest.mark.long
@torch.no_grad()
def test_ahead_of_time_compilation(program, detector, tmp_path):
    """By Inductor, for the CPU: the package calls the operators, which are registered where paa_gpu is imported."""
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "detector.pt2"))
    assert_detections(torch._inductor.aoti_load_package(path), detector)


@pytest.mark.long
@torch.no_grad()
def test_a_file_of_the_whole_detector(detector, tmp_path):
    run = to_onnx(detector, make_images(2, 64, 96), DYNAMIC, tmp_path / "detector.onnx")
    assert_detections(run, detector)
