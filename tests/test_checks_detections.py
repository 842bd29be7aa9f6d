"""Bad input of the operations on detections: every error by its message. `test_checks.py` writes them into `docs/errors.md`."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from refusals import assert_refused

import paa_gpu

Z = torch.zeros(3, dtype=torch.int64)


def predictions(**changes):
    """Two images of 2 detections and 3 boxes of 4 classes."""
    one = {
        "det_bboxes": torch.ones(2, 5),
        "det_labels": Z[:2],
        "mlvl_bboxes": torch.ones(3, 4),
        "mlvl_nms_scores": torch.ones(3, 4),
    }
    return {**{k: [v.clone(), v.clone()] for k, v in one.items()}, "score_thr": 0.05, **changes}


def pools(**changes):
    """Two pools of 3 boxes for each image."""
    return {name: [[torch.ones(3, 4)] * 2] * 2 for name in ("mlvl_bboxes", "mlvl_nms_scores")} | changes


def second_prediction(name, value):
    return {name: [predictions()[name][0], value]}


PADDED = {
    "det_bboxes": torch.ones(2, 2, 5), "det_labels": Z[:2].repeat(2, 1), "mlvl_bboxes": torch.ones(2, 3, 4),
    "mlvl_nms_scores": torch.ones(2, 3, 4),
}  # fmt: skip
VOTING = [
    ({"det_bboxes": torch.ones(2, 5)}, ValueError, "`det_bboxes` must have 3 dimensions, got shape [2, 5]"),
    ({"det_bboxes": None}, TypeError, "`det_bboxes` must be a list with one entry per image, got NoneType"),
    ({"det_bboxes": torch.ones(2, 2, 5)}, TypeError, "`det_labels` must be a Tensor, got list"),
    ({"count": Z[:2]}, ValueError, "`count` must be None where `det_bboxes` is a list, got Tensor"),
    ({**PADDED, "count": Z}, ValueError, "`count` must have shape [2], got [3]"),
    ({**PADDED, "count": torch.ones(2)}, TypeError, "`count` must be int64 or int32, got float32"),
    (
        {**PADDED, "mlvl_nms_scores": torch.ones(2, 2, 4)},
        ValueError,
        "`mlvl_nms_scores` must have shape [2, 3, any], got [2, 2, 4]",
    ),
    ({"det_bboxes": []}, ValueError, "`det_bboxes` must have at least one entry, got an empty list"),
    ({"mlvl_bboxes": [torch.ones(3, 4)]}, ValueError, "`mlvl_bboxes` must have 2 entries as `det_bboxes` has, got 1"),
    ({"weights": [1.0]}, ValueError, "`weights` must be None where `mlvl_bboxes` has no pools, got list"),
    ({**PADDED, "weights": [1.0]}, ValueError, "`weights` must be None where `mlvl_bboxes` has no pools, got list"),
    (pools(mlvl_bboxes=[[], []]), ValueError, "`mlvl_bboxes[0]` must have at least one entry, got an empty list"),
    (
        pools(mlvl_nms_scores=[torch.ones(3, 4)] * 2),
        TypeError,
        "`mlvl_nms_scores[0]` must be a list with one entry per pool, got Tensor",
    ),
    (
        pools(mlvl_bboxes=[[torch.ones(3, 4)] * 2, [torch.ones(3, 4)]]),
        ValueError,
        "`mlvl_bboxes[1]` must have 2 entries as `mlvl_bboxes[0]` has, got 1",
    ),
    (
        pools(mlvl_nms_scores=[[torch.ones(3, 4)] * 2, [torch.ones(3, 4), torch.ones(2, 4)]]),
        ValueError,
        "`mlvl_nms_scores[1][1]` must have shape [3, 4], got [2, 4]",
    ),
    (pools(weights=[1.0]), ValueError, "`weights` must have 2 entries as `mlvl_bboxes[0]` has, got 1"),
    (pools(weights=[1.0, 0]), ValueError, "`weights[1]` must be positive, got 0"),
    (pools(weights=[1.0, math.inf]), ValueError, "`weights[1]` must be from 1e-30 to 1e+30, got inf"),
    (pools(weights=[1e30, 1.1e30]), ValueError, "`weights[1]` must be from 1e-30 to 1e+30, got 1.1e+30"),
    (pools(weights=[1e-31, 1.0]), ValueError, "`weights[0]` must be from 1e-30 to 1e+30, got 1e-31"),
    (second_prediction("det_labels", [0, 1]), TypeError, "`det_labels[1]` must be a Tensor, got list"),
    (second_prediction("det_bboxes", torch.ones(5)), ValueError, "`det_bboxes[1]` must have 2 dimensions, got shape [5]"),
    (second_prediction("det_bboxes", torch.ones(2, 4)), ValueError, "`det_bboxes[1]` must have shape [any, 5], got [2, 4]"),
    (second_prediction("det_labels", Z), ValueError, "`det_labels[1]` must have shape [2], got [3]"),
    (second_prediction("mlvl_bboxes", torch.ones(3, 5)), ValueError, "`mlvl_bboxes[1]` must have shape [any, 4], got [3, 5]"),
    (
        second_prediction("mlvl_nms_scores", torch.ones(2, 4)),
        ValueError,
        "`mlvl_nms_scores[1]` must have shape [3, 4], got [2, 4]",
    ),
    (
        second_prediction("mlvl_nms_scores", torch.ones(3, 5)),
        ValueError,
        "`mlvl_nms_scores[1]` must have shape [3, 4], got [3, 5]",
    ),
    (
        {"mlvl_bboxes": [Z[:, None].expand(3, 4)] * 2},
        TypeError,
        "`mlvl_bboxes[0]` must be float16, bfloat16, float32 or float64, got int64",
    ),
    (
        {"det_labels": [torch.zeros(2)] * 2},
        TypeError,
        "`det_labels[0]` must be int64, int32, int16, int8, uint8, uint16, uint32 or uint64, got float32",
    ),
    (second_prediction("det_labels", Z[:2].int()), TypeError, "`det_labels[1]` must be int64, got int32"),
    (second_prediction("det_bboxes", torch.ones(2, 5).half()), TypeError, "`det_bboxes[1]` must be float32, got float16"),
    (
        second_prediction("mlvl_bboxes", torch.ones(3, 4, device="meta")),
        ValueError,
        "`mlvl_bboxes[1]` must be on cpu as the other tensors are, got meta",
    ),
    ({"score_thr": "0.05"}, TypeError, "`score_thr` must be a float, got str"),
    ({"score_thr": True}, TypeError, "`score_thr` must be a float, got bool"),
    ({"score_thr": np.float32(0.05)}, TypeError, "`score_thr` must be a float, got numpy.float32"),
    ({"iou_thr": -0.01}, ValueError, "`iou_thr` must not be negative, got -0.01"),
    ({"sigma": 0}, ValueError, "`sigma` must be positive, got 0"),
    ({"sigma": -1.0}, ValueError, "`sigma` must not be negative, got -1.0"),
    ({"sigma": None}, TypeError, "`sigma` must be a float, got NoneType"),
    ({"offset": 0.5}, ValueError, "`offset` must be 0 or 1, got 0.5"),
    ({"offset": "1"}, TypeError, "`offset` must be a float, got str"),
    ({"keep_order": 1}, TypeError, "`keep_order` must be a bool, got int"),
]


@pytest.mark.parametrize(("changes", "error", "message"), VOTING, ids=[message for _, _, message in VOTING])
def test_vote(changes, error, message):
    assert_refused(predictions(**changes), error, message, paa_gpu.score_voting_batch)


def test_voting_of_one_image_names_its_arguments_without_an_image():
    one = {name: value[0] if isinstance(value, list) else value for name, value in predictions().items()}
    paa_gpu.score_voting(**one)
    for changes, error, message in [
        ({"det_bboxes": [1.0]}, TypeError, "`det_bboxes` must be a Tensor, got list"),
        ({"mlvl_nms_scores": torch.ones(2, 4)}, ValueError, "`mlvl_nms_scores` must have shape [3, any], got [2, 4]"),
    ]:
        with pytest.raises(error, match="^" + re.escape(message) + "$"):
            paa_gpu.score_voting(**{**one, **changes})


def candidates(**changes):
    """Two images of 3 boxes with a label each."""
    return {"boxes": [torch.ones(3, 4)] * 2, "scores": [torch.ones(3)] * 2, "labels": [Z] * 2, "iou_threshold": 0.5, **changes}


TENSORS = {"boxes": torch.ones(2, 3, 4), "scores": torch.ones(2, 3), "labels": torch.stack([Z, Z])}
NMS = [
    ({**TENSORS, "boxes": torch.ones(3, 4)}, ValueError, "`boxes` must have 3 dimensions, got shape [3, 4]"),
    ({**TENSORS, "boxes": torch.ones(2, 3, 5)}, ValueError, "`boxes` must have shape [any, any, 4], got [2, 3, 5]"),
    ({**TENSORS, "scores": torch.ones(2, 3, 5)}, ValueError, "`scores` must have 2 dimensions, got shape [2, 3, 5]"),
    ({**TENSORS, "labels": None}, ValueError, "`scores` must have 3 dimensions, got shape [2, 3]"),
    ({**TENSORS, "labels": torch.ones(2, 3)}, TypeError, "`labels` must be int64, int32, int16, int8, uint8, uint16, uint32 or uint64, got float32"),
    ({**TENSORS, "scores": [torch.ones(3)] * 2}, TypeError, "`scores` must be a Tensor, got list"),
    ({"boxes": []}, ValueError, "`boxes` must have at least one entry, got an empty list"),
    ({"scores": torch.ones(2, 3)}, TypeError, "`scores` must be a list with one entry per image, got Tensor"),
    ({"scores": [torch.ones(3)]}, ValueError, "`scores` must have 2 entries as `boxes` has, got 1"),
    ({"labels": [Z]}, ValueError, "`labels` must have 2 entries as `boxes` has, got 1"),
    ({"boxes": [torch.ones(3, 4), torch.ones(3, 4).half()]}, TypeError, "`boxes[1]` must be float32, got float16"),
    ({"scores": [torch.ones(3), torch.ones(2)]}, ValueError, "`scores[1]` must have shape [3], got [2]"),
    ({"scores": [torch.ones(3, 2), torch.ones(3, 5)], "labels": None}, ValueError, "`scores[1]` must have shape [3, 2], got [3, 5]"),
    ({"labels": [Z, Z.int()]}, TypeError, "`labels[1]` must be int64, got int32"),
    ({"scores": [torch.ones(3, device="meta")] * 2}, ValueError, "`scores[0]` must be on cpu as the other tensors are, got meta"),
    ({"iou_threshold": -0.5}, ValueError, "`iou_threshold` must not be negative, got -0.5"),
    ({"score_thr": "0"}, TypeError, "`score_thr` must be a float, got str"),
    ({"score_thr": float("nan")}, ValueError, "`score_thr` must be a number, got nan"),
    ({"score_thr": 1 << 1024}, ValueError, "`score_thr` must be within the range of a float, got an int of 1025 bits"),
    ({"nms_pre": -1}, ValueError, "`nms_pre` must be at least 0, got -1"),
    ({"max_per_img": None}, TypeError, "`max_per_img` must be an int, got NoneType"),
    ({"method": "soft"}, ValueError, '`method` must be "hard", "linear" or "gaussian", got \'soft\''),
    ({"sigma": 0.0}, ValueError, "`sigma` must be positive, got 0.0"),
    ({"min_score": -1.0}, ValueError, "`min_score` must not be negative, got -1.0"),
    ({"class_agnostic": 1}, TypeError, "`class_agnostic` must be a bool, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), NMS, ids=[message for _, _, message in NMS])
def test_nms(changes, error, message):
    assert_refused(candidates(**changes), error, message, paa_gpu.batched_nms)


def test_what_nms_accepts():
    for changes in ({}, TENSORS, {**TENSORS, "labels": None, "scores": torch.ones(2, 3, 0)}):
        paa_gpu.batched_nms(**candidates(**changes))


def models(**changes):
    """Two images of two models of 3 boxes each."""
    one = {"boxes": torch.ones(3, 4), "scores": torch.ones(3), "labels": Z}
    return {**{name: [[part, part], [part, part]] for name, part in one.items()}, **changes}


def third_model(name, value):
    """Of the second image the first model."""
    columns = models()[name]
    return {name: [columns[0], [value, columns[1][1]]]}


FUSION = [
    ({"boxes": torch.ones(3, 4)}, TypeError, "`boxes` must be a list with one entry per image, got Tensor"),
    ({"boxes": []}, ValueError, "`boxes` must have at least one entry, got an empty list"),
    ({"scores": models()["scores"][:1]}, ValueError, "`scores` must have 2 entries as `boxes` has, got 1"),
    ({"labels": [*models()["labels"], []]}, ValueError, "`labels` must have 2 entries as `boxes` has, got 3"),
    ({"boxes": [torch.ones(3, 4)] * 2}, TypeError, "`boxes[0]` must be a list with one entry per model, got Tensor"),
    ({"boxes": [[], []]}, ValueError, "`boxes[0]` must have at least one entry, got an empty list"),
    ({"boxes": [models()["boxes"][0], [torch.ones(3, 4)]]}, ValueError, "`boxes[1]` must have 2 entries as `boxes[0]` has, got 1"),
    ({"boxes": [[torch.ones(3, 4)] * 65] * 2}, ValueError, "`boxes[0]` must have at most 64 entries, got 65"),
    ({"scores": [[torch.ones(3)], [torch.ones(3)] * 2]}, ValueError, "`scores[0]` must have 2 entries as `boxes[0]` has, got 1"),
    ({"labels": [[Z, Z], [Z]]}, ValueError, "`labels[1]` must have 2 entries as `boxes[1]` has, got 1"),
    (third_model("boxes", torch.ones(3, 5)), ValueError, "`boxes[1][0]` must have shape [any, 4], got [3, 5]"),
    (third_model("boxes", torch.ones(3, 4).half()), TypeError, "`boxes[1][0]` must be float32, got float16"),
    (third_model("scores", torch.ones(2)), ValueError, "`scores[1][0]` must have shape [3], got [2]"),
    (third_model("labels", Z.int()), TypeError, "`labels[1][0]` must be int64, got int32"),
    (third_model("labels", Z.to("meta")), ValueError, "`labels[1][0]` must be on cpu as the other tensors are, got meta"),
    ({"weights": 1.0}, TypeError, "`weights` must be a list with one entry per model, got float"),
    ({"weights": [1.0]}, ValueError, "`weights` must have 2 entries as `boxes[0]` has, got 1"),
    ({"weights": [1.0, 0.0]}, ValueError, "`weights[1]` must be positive, got 0.0"),
    ({"weights": [1e39, 1.0]}, ValueError, "`weights[0]` must be from 1e-30 to 1e+30, got 1e+39"),
    ({"iou_thr": -0.1}, ValueError, "`iou_thr` must not be negative, got -0.1"),
    ({"skip_box_thr": None}, TypeError, "`skip_box_thr` must be a float, got NoneType"),
    ({"conf_type": "mean"}, ValueError, "`conf_type` must be \"avg\", \"max\", \"box_and_model_avg\" or \"absent_model_aware_avg\", got 'mean'"),
    ({"allows_overflow": 1}, TypeError, "`allows_overflow` must be a bool, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), FUSION, ids=[message for _, _, message in FUSION])
def test_fusion(changes, error, message):
    assert_refused(models(**changes), error, message, paa_gpu.weighted_boxes_fusion)


def test_the_smallest_and_the_largest_weight():
    paa_gpu.score_voting_batch(**predictions(**pools(weights=[1e-30, 1e30])))
