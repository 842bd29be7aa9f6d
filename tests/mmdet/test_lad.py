"""LADHead: the teacher's assignment and the student's losses. The detector of both: test_detector.py."""

from __future__ import annotations

import api
import pytest
import torch
from api import assign
from heads import LAD, assert_same_outside, assert_same_step, build, make_features, make_samples, step, variants

from paa_gpu.integrations.mmdet import LADHeadGPU, accelerate

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


@pytest.mark.skipif(not api.IS_3X, reason="2.x casts to float32 what is in half precision")
def test_autocast(generator):
    """The teacher's scores, in bfloat16, decide; the student's losses are in its own."""
    features, samples = make_features(2, SIZE, 32, generator), make_samples([7, 0], SIZE, 80, generator)
    teacher, student = variants(build(LAD, "teacher_bbox_head", **SMALL)), variants(build(LAD, "bbox_head", **SMALL))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = (assign(head, features, samples) for head in (teacher.accelerated, teacher.tie_rule))
        assert torch.equal(got[0], wanted[0])
        ours, theirs = step(student.accelerated, features, samples, (got,)), step(student.published, features, samples, (wanted,))
    assert_same_step(ours, theirs)


def test_an_accelerated_teacher_suits_a_published_student(generator):
    features, samples = make_features(2, SIZE, 32, generator), make_samples([3, 2], SIZE, 80, generator)
    teacher, student = build(LAD, "teacher_bbox_head", **SMALL), build(LAD, "bbox_head", **SMALL)
    losses = api.loss(student, features, samples, (assign(accelerate(teacher), features, samples),))
    assert all(loss.isfinite() for loss in losses.values())
