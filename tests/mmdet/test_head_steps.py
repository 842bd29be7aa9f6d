"""The two steps before the reassignment, against mmdetection's own code: `MaxIoUAssigner`, and `PAAHead.get_pos_loss`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from heads import build
from mmdet.models.task_modules.assigners import MaxIoUAssigner
from mmengine.structures import InstanceData

import paa_gpu
from paa_gpu import testing

SHAPES = ((40, 60), (20, 30), (10, 15), (5, 8), (3, 4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_iof_thr": 0.5},
        {"match_low_quality": False, "pos_iou_thr": 0.5, "neg_iou_thr": 0.4},
        {"gt_max_assign_all": False, "min_pos_iou": 0.3, "pos_iou_thr": 0.7, "neg_iou_thr": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("number", [0, 1, 30])
def test_assignment(options, number):
    """Exactly, ground truths that nothing overlaps included."""
    rng = np.random.default_rng(number)
    anchors, boxes, ignored = testing.make_anchors(SHAPES), *(testing.make_boxes(n, (480, 320), rng) for n in (number, 3))
    if number > 1:
        boxes[3] = boxes[1]
    assigner = MaxIoUAssigner(**{"pos_iou_thr": 0.1, "neg_iou_thr": 0.1, "min_pos_iou": 0.0, **options})
    wanted = assigner.assign(
        InstanceData(priors=torch.cat(anchors)),
        InstanceData(bboxes=boxes, labels=torch.zeros(number, dtype=torch.int64)),
        InstanceData(bboxes=ignored),
    )
    got = paa_gpu.assign_max_iou(anchors, [boxes], [ignored], **options)
    assert torch.equal(got.gt_inds[0], wanted.gt_inds) and torch.equal(got.max_overlaps[0], wanted.max_overlaps)


def test_losses():
    """Within what float32 leaves of the published form: its decoded corners are rounded at hundreds of pixels. In float64, 1e-12."""
    head = build()
    batch = testing.make_head_batch([500, 0, 700], np.random.default_rng(0), SHAPES, num_classes=80)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        columns = [[t.to(dtype) if t.is_floating_point() else t for t in column] for column in batch]
        anchors, scores, deltas, *targets = columns
        scores, deltas = (torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps], 1) for maps in (scores, deltas))
        for image, got in enumerate(paa_gpu.candidate_losses(*columns)):
            own = [column[image] for column in targets]
            (wanted,) = head.get_pos_loss(anchors, scores[image], deltas[image], *own)
            torch.testing.assert_close(got, wanted.to(dtype), rtol=tolerance, atol=0)
