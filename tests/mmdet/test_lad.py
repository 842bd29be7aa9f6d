"""LADHead: the teacher's assignment, the student's losses, and the detector that keeps its teacher out of sight."""

from __future__ import annotations

import copy

import api
import pytest
import torch
from api import LADHead, assign
from heads import (
    LAD,
    TieRuleLADHead,
    as_class,
    assert_same_outside,
    assert_same_step,
    build,
    make_features,
    make_samples,
    step,
    variants,
)

from paa_gpu.integrations.mmdet import LADHeadGPU, accelerate, restore

SIZE = (256, 320)
SMALL = {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1}


@pytest.mark.parametrize("boxes", [[0, 0], [0, 1, 7], [200]], ids=str)
def test_teacher_and_student(boxes, generator):
    features, samples = make_features(len(boxes), SIZE, 32, generator), make_samples(boxes, SIZE, 80, generator)
    teacher = variants(build(LAD, "teacher_bbox_head", **SMALL))
    assert type(teacher.accelerated) is LADHeadGPU
    rule = teacher.tie_rule
    rule.tied, rule.ties = [], 0
    got, wanted, float64 = (assign(head, features, samples) for head in (teacher.accelerated, rule, teacher.float64))
    assert_same_outside(torch.cat(rule.tied), rule.ties, got[0], float64[0])
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    student = variants(build(LAD, "bbox_head", **SMALL))
    assert_same_step(step(student.accelerated, features, samples, (got,)), step(student.published, features, samples, (wanted,)))


def test_an_accelerated_teacher_suits_a_published_student(generator):
    features, samples = make_features(2, SIZE, 32, generator), make_samples([3, 2], SIZE, 80, generator)
    teacher, student = build(LAD, "teacher_bbox_head", **SMALL), build(LAD, "bbox_head", **SMALL)
    losses = api.loss(student, features, samples, (assign(accelerate(teacher), features, samples),))
    assert all(loss.isfinite() for loss in losses.values())


def small_detector():
    model = api.model_of(LAD)
    backbone = {"depth": 18, "base_channels": 8, "init_cfg": None}
    model.pop("pretrained", None)
    for part in ("backbone", "teacher_backbone"):
        model[part].update(backbone)
    for part in ("neck", "teacher_neck"):
        model[part].update(in_channels=[8, 16, 32, 64], out_channels=32)
    for part in ("bbox_head", "teacher_bbox_head"):
        model[part].update(SMALL)
    model.teacher_ckpt = None
    return api.build_detector(model)


def test_the_detector_with_both_heads(generator):
    """`modules()` does not list the teacher, which does the assigning."""
    model = small_detector()
    accelerated = accelerate(copy.deepcopy(model))
    assert type(accelerated.bbox_head) is type(accelerated.teacher_model.bbox_head) is LADHeadGPU
    assert accelerated.state_dict().keys() == model.state_dict().keys()
    model.teacher_model.bbox_head = as_class(model.teacher_model.bbox_head, TieRuleLADHead)
    images, samples = torch.randn(2, 3, *SIZE, generator=generator), make_samples([7, 3], SIZE, 80, generator)
    got, wanted = api.detector_loss(accelerated, images, samples), api.detector_loss(model, images, samples)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    restore(accelerated)
    assert type(accelerated.bbox_head) is type(accelerated.teacher_model.bbox_head) is LADHead
