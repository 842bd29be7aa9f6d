"""Bad input: every error by its message, and the inputs untouched after it.

The tables below are `docs/errors.md` too: `python tests/test_checks.py` writes it.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import assert_refused
from test_checks_detections import FUSION, NMS, VOTING
from test_head_inputs import INPUTS, SETTINGS, as_tv
from test_sklearn import OWN_ERRORS

import paa_gpu
from paa_gpu import _ops

Z = torch.zeros(3, dtype=torch.int64)


def batch(**changes):
    """Two images of 3 potential positives on 6 anchors."""
    one = {
        "pos_losses": torch.tensor([1.0, 2.0, 3.0]),
        "label": torch.tensor([0, 0, 0, 80, 80, 80]),
        "label_weight": torch.ones(6),
        "bbox_weight": torch.ones(6, 4),
        "pos_inds": torch.arange(3),
        "pos_gt_inds": Z,
    }
    return {**{k: [v.clone(), v.clone()] for k, v in one.items()}, "anchors": [4, 2], "num_classes": 80, **changes}


def second(name, value):
    """The batch with another value for the second image."""
    return {name: [batch()[name][0], value]}


BATCH = [
    # type, rank, shape, dtype, device of tensors; the image named
    ({"pos_losses": torch.zeros(3)}, TypeError, "`pos_losses` must be a list with one entry per image, got Tensor"),
    ({"pos_losses": []}, ValueError, "`pos_losses` must have at least one entry, got an empty list"),
    *(
        ({name: batch()[name][:1]}, ValueError, f"`{name}` must have 2 entries as `pos_losses` has, got 1")
        for name in ("label", "label_weight", "bbox_weight", "pos_inds", "pos_gt_inds")
    ),
    ({"num_gts": [1]}, ValueError, "`num_gts` must have 2 entries as `pos_losses` has, got 1"),
    (second("label", None), TypeError, "`label[1]` must be a Tensor, got NoneType"),
    (second("pos_losses", torch.zeros(3, 1)), ValueError, "`pos_losses[1]` must have 1 dimension, got shape [3, 1]"),
    (second("bbox_weight", torch.zeros(6)), ValueError, "`bbox_weight[1]` must have 2 dimensions, got shape [6]"),
    (second("bbox_weight", torch.zeros(6, 5)), ValueError, "`bbox_weight[1]` must have shape [6, 4], got [6, 5]"),
    (second("label_weight", torch.zeros(5)), ValueError, "`label_weight[1]` must have shape [6], got [5]"),
    (second("pos_inds", Z[:2]), ValueError, "`pos_inds[1]` must have shape [3], got [2]"),
    (second("pos_gt_inds", Z[:2]), ValueError, "`pos_gt_inds[1]` must have shape [3], got [2]"),
    ({"pos_losses": [Z, Z]}, TypeError, "`pos_losses[0]` must be float16, bfloat16, float32 or float64, got int64"),
    (second("pos_losses", torch.zeros(3).half()), TypeError, "`pos_losses[1]` must be float32, got float16"),
    ({"label": [torch.zeros(6)] * 2}, TypeError, "`label[0]` must be int64, got float32"),
    ({"pos_inds": [torch.zeros(3)] * 2}, TypeError, "`pos_inds[0]` must be int64 or int32, got float32"),
    ({"pos_gt_inds": [Z.bool()] * 2}, TypeError, "`pos_gt_inds[0]` must be int64 or int32, got bool"),
    (second("pos_inds", Z.to("meta")), ValueError, "`pos_inds[1]` must be on cpu as the other tensors are, got meta"),
    (
        {"pos_losses": [torch.zeros(3, device="meta")] * 2},
        ValueError,
        "`pos_losses[0]` must be on a CPU or CUDA device, got meta",
    ),
    # anchors
    ({"anchors": 6}, TypeError, "`anchors` must be a list with one entry per level, got int"),
    ({"anchors": [4, 3]}, ValueError, "`anchors` must hold 6 anchors over all levels as `label[0]` does, got 7"),
    ({"anchors": [[4, 2], [4, 1]]}, ValueError, "`anchors` must hold 6 anchors over all levels as `label[1]` does, got 5"),
    ({"anchors": [[4, 2]]}, ValueError, "`anchors` must have 2 entries as `pos_losses` has, got 1"),
    ({"anchors": [torch.zeros(4, 3), 2]}, ValueError, "`anchors[0]` must have shape [any, 4], got [4, 3]"),
    ({"anchors": [7, -1]}, ValueError, "`anchors[1]` must be at least 0, got -1"),
    ({"anchors": [[4, 2], [4.0, 2]]}, TypeError, "`anchors[1][0]` must be an int, got float"),
    # options
    ({"num_classes": 0}, ValueError, "`num_classes` must be at least 1, got 0"),
    ({"topk": 0}, ValueError, "`topk` must be at least 1, got 0"),
    ({"topk": 9.0}, TypeError, "`topk` must be an int, got float"),
    ({"topk": True}, TypeError, "`topk` must be an int, got bool"),
    ({"topk": np.int64(9)}, TypeError, "`topk` must be an int, got numpy.int64"),
    (
        {"covariance_type": "diagonal"},
        ValueError,
        '`covariance_type` must be "full", "tied", "diag" or "spherical", got \'diagonal\'',
    ),
    ({"separation": "c"}, ValueError, '`separation` must be "mmdet", "paper", "a", "b" or "d", got \'c\''),
    ({"singleton": None}, ValueError, '`singleton` must be "background" or "positive", got None'),
    ({"precision": "float16"}, ValueError, '`precision` must be "auto", "float64", "float32" or "mixed", got \'float16\''),
    ({"num_gts": [1, -1]}, ValueError, "`num_gts[1]` must be at least 0, got -1"),
    ({"num_gts": [1, 1.0]}, TypeError, "`num_gts[1]` must be an int, got float"),
    # what a callable returns
    ({"separation": lambda a, s, x, m: m}, TypeError, "`separation` must return a tuple (positive, ignored), got Tensor"),
    ({"separation": lambda a, s, x, m: (m, m.int())}, TypeError, "`separation: ignored` must be bool, got int32"),
    ({"separation": lambda a, s, x, m: (m[:1], m)}, ValueError, "`separation: positive` must have shape [2, 3], got [1, 3]"),
]

VALIDATED = [
    (second("pos_inds", torch.tensor([0, 6, 2])), "`pos_inds[1]` must be in [0, 6), got 6 at position 1"),
    (second("pos_inds", torch.tensor([0, 1, -1])), "`pos_inds[1]` must be in [0, 6), got -1 at position 2"),
    (second("pos_inds", torch.tensor([4, 1, 4])), "`pos_inds[1]` must not repeat an index, got 4 at position 0"),
    (second("pos_gt_inds", torch.tensor([0, 0, -1])), "`pos_gt_inds[1]` must not be negative, got -1 at position 2"),
    (
        {**second("pos_gt_inds", torch.tensor([0, 0, 1])), "num_gts": [2, 1]},
        "`pos_gt_inds[1]` must be below 1, the number of ground truths, got 1 at position 2",
    ),
    (
        second("pos_gt_inds", torch.tensor([-1, -1, -1])),
        "`pos_gt_inds[1]` must not be negative, got -1 at position 0",
    ),
    ({"num_gts": [1, 0]}, "`pos_gt_inds[1]` must be empty, because the image has no ground truth, got 0 at position 0"),
    (second("label", torch.tensor([0, 0, 0, 81, 80, 80])), "`label[1]` must be in [0, 80], got 81 at position 3"),
    (second("label", torch.tensor([0, 0, 0, 80, 80, -1])), "`label[1]` must be in [0, 80], got -1 at position 5"),
    (second("pos_losses", torch.tensor([1, np.nan, 3])), "`pos_losses[1]` must be finite, got nan at position 1, ground truth 0"),
    (
        second("pos_losses", torch.tensor([1, 3, -np.inf])),
        "`pos_losses[1]` must be finite, got -inf at position 2, ground truth 0",
    ),
    (
        {
            **second("pos_losses", torch.tensor([1, 3, -np.inf])),
            **second("pos_gt_inds", torch.tensor([0, 0, 1])),
            "num_gts": [1, 2],
        },
        "`pos_losses[1]` must be finite, got -inf at position 2, ground truth 1",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BATCH, ids=[message for _, _, message in BATCH])
def test_batch(changes, error, message):
    assert_refused(batch(**changes), error, message)


@pytest.mark.parametrize(("changes", "message"), VALIDATED, ids=[message for _, message in VALIDATED])
def test_validate(changes, message):
    assert_refused(batch(**changes, validate=True), ValueError, message)
    paa_gpu.paa_reassign_batch(**batch(**changes))


def test_validate_accepts_what_is_right():
    paa_gpu.paa_reassign_batch(**batch(validate=True))
    paa_gpu.paa_reassign_batch(**batch(validate=True, num_gts=[3, 1]))


def test_the_drop_in_names_its_arguments_without_an_image():
    one = {name: value[0] if isinstance(value, list) and name != "anchors" else value for name, value in batch().items()}
    paa_gpu.paa_reassign(**one)
    paa_gpu.paa_reassign(**{**one, "num_classes": 2**63 - 1})
    for changes, error, message in [
        ({"pos_losses": [1.0]}, TypeError, "`pos_losses` must be a Tensor, got list"),
        ({"label": torch.zeros(6)}, TypeError, "`label` must be int64, got float32"),
        ({"anchors": [6, 1]}, ValueError, "`anchors` must hold 6 anchors over all levels as `label` does, got 7"),
        ({"num_gt": 2**70}, ValueError, f"`num_gt` must be at most {2**63 - 1}, got {2**70}"),
        ({"num_classes": 2**70}, ValueError, f"`num_classes` must be at most {2**63 - 1}, got {2**70}"),
        ({"num_gt": -1}, ValueError, "`num_gt` must be at least 0, got -1"),
        ({"pos_inds": Z, "validate": True}, ValueError, "`pos_inds` must not repeat an index, got 0 at position 0"),
    ]:
        with pytest.raises(error, match="^" + re.escape(message) + "$"):
            paa_gpu.paa_reassign(**{**one, **changes})
    with pytest.raises(TypeError, match="num_classes"):
        paa_gpu.paa_reassign(*list(one.values())[:7])


def test_validation_counts_ground_truths_once(monkeypatch):
    """On a GPU each time is a wait."""
    counted, count = [], _ops.count_gts
    monkeypatch.setattr(_ops, "count_gts", lambda inds: counted.append(1) or count(inds))
    zeros = torch.zeros(3).long()
    arguments = (torch.rand(3), zeros, torch.ones(3), torch.ones(3, 4), torch.arange(3), zeros, [3])
    for separation in ("mmdet", lambda assignment, score, loss, mask: (assignment, ~assignment)):
        paa_gpu.paa_reassign(*arguments, num_classes=1, separation=separation, validate=True)
        assert len(counted) == 1
        counted.clear()


FIT = [
    ({"x": 3}, TypeError, "`x` must be a Tensor or a list of Tensors, got int"),
    ({"x": []}, ValueError, "`x` must have at least one entry, got an empty list"),
    ({"x": torch.zeros(2, 3, 1)}, ValueError, "`x` must have 2 dimensions, got shape [2, 3, 1]"),
    (
        {"x": torch.zeros(100, 1)},
        ValueError,
        "`x` must have one row per mixture, got shape [100, 1]: for N samples of one mixture pass Tensor[N], "
        "or use paa_gpu.integrations.sklearn.GaussianMixture",
    ),
    ({"x": Z[None]}, TypeError, "`x` must be float16, bfloat16, float32 or float64, got int64"),
    ({"x": torch.ones(1, 3).to_sparse()}, TypeError, "`x` must have the layout strided, got sparse_coo"),
    ({"x": [torch.zeros(3), torch.zeros(1, 3)]}, ValueError, "`x[1]` must have 1 dimension, got shape [1, 3]"),
    ({"x": [torch.zeros(3), torch.zeros(3).half()]}, TypeError, "`x[1]` must be float32, got float16"),
    ({"x": [torch.zeros(3)], "count": Z}, ValueError, "`count` must be None where `x` is a list, got Tensor"),
    ({"count": Z}, ValueError, "`count` must have shape [2], got [3]"),
    ({"count": torch.ones(2)}, TypeError, "`count` must be int64 or int32, got float32"),
    ({"covariance_type": "d"}, ValueError, '`covariance_type` must be "full", "tied", "diag" or "spherical", got \'d\''),
    ({"tol": -1e-3}, ValueError, "`tol` must not be negative, got -0.001"),
    ({"tol": float("nan")}, ValueError, "`tol` must be a number, got nan"),
    ({"reg_covar": -1}, ValueError, "`reg_covar` must not be negative, got -1"),
    ({"reg_covar": "1"}, TypeError, "`reg_covar` must be a float, got str"),
    ({"max_iter": 0}, ValueError, "`max_iter` must be at least 1, got 0"),
    ({"precision": 64}, ValueError, '`precision` must be "auto", "float64", "float32" or "mixed", got 64'),
    ({"weights_init": torch.ones(3)}, ValueError, "`weights_init` must have shape [2], got [3]"),
    ({"means_init": torch.ones(3, 2)}, ValueError, "`means_init` must have shape [2, 2], got [3, 2]"),
    ({"means_init": [1.0, 2.0]}, TypeError, "`means_init` must be a Tensor, got list"),
    ({"count": Z[:2].to("meta")}, ValueError, "`count` must be on cpu as the other tensors are, got meta"),
    ({"x": [torch.zeros(3), torch.zeros(3, device="meta")]}, ValueError, "`x[1]` must be on cpu as the other tensors are, got meta"),
    ({"weights_init": torch.ones(2, device="meta")}, ValueError, "`weights_init` must be on cpu as the other tensors are, got meta"),
    ({"precisions_init": torch.ones(2), "covariance_type": "tied"}, ValueError, "`precisions_init` must have shape [1], got [2]"),
    ({"n_components": 0}, ValueError, "`n_components` must be at least 1, got 0"),
    ({"n_components": 9}, ValueError, "`n_components` must be at most 8, got 9"),
    ({"n_components": 3, "means_init": torch.ones(2)}, ValueError, "`means_init` must have shape [3], got [2]"),
    ({"init": "k-means"}, ValueError, '`init` must be "minmax", "quantile", "kmeans" or "random", got \'k-means\''),
    ({"n_init": 0}, ValueError, "`n_init` must be at least 1, got 0"),
    ({"generator": 1.0}, TypeError, "`generator` must be a torch.Generator, an int or None, got float"),
    ({"generator": -1}, ValueError, "`generator` must be in [0, 2^63), got -1"),
    ({"weights_init": torch.tensor([1.5, -0.5])}, ValueError, "`weights_init` must not be negative, got [1.5, -0.5] in row 0"),
    (
        {"weights_init": torch.tensor([[0.5, 0.5], [5.0, 5.0]])},
        ValueError,
        "`weights_init` must sum to 1, got [5.0, 5.0] in row 1",
    ),
    ({"precisions_init": torch.tensor([1.0, 0.0])}, ValueError, "`precisions_init` must be positive, got [1.0, 0.0] in row 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), FIT, ids=[message for _, _, message in FIT])
def test_fit(changes, error, message):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        paa_gpu.fit_gmm_1d(**{"x": torch.zeros(2, 5), **changes})


def test_methods_of_a_fit():
    gmm = paa_gpu.fit_gmm_1d(torch.rand(2, 5))
    with pytest.raises(ValueError, match=re.escape("`x` must have shape [2, any], got [3, 5]")):
        gmm.predict(torch.rand(3, 5))
    with pytest.raises(ValueError, match=re.escape("`x` must have 2 entries as the fit has, got 1")):
        gmm.score_samples([torch.rand(5)])


SELECT = [
    ({"pos_losses": torch.zeros(3, 1)}, ValueError, "`pos_losses` must have 1 dimension, got shape [3, 1]"),
    ({"pos_inds": Z[:2]}, ValueError, "`pos_inds` must have shape [3], got [2]"),
    ({"pos_gt_inds": torch.zeros(3)}, TypeError, "`pos_gt_inds` must be int64 or int32, got float32"),
    ({"pos_gt_inds": Z.to("meta")}, ValueError, "`pos_gt_inds` must be on cpu as the other tensors are, got meta"),
    ({"level_sizes": 4}, TypeError, "`level_sizes` must be a list with one entry per level, got int"),
    ({"level_sizes": [3, -1]}, ValueError, "`level_sizes[1]` must be at least 0, got -1"),
    ({"num_gt": -1}, ValueError, "`num_gt` must be at least 0, got -1"),
    ({"topk": 0}, ValueError, "`topk` must be at least 1, got 0"),
]


@pytest.mark.parametrize(("changes", "error", "message"), SELECT, ids=[message for _, _, message in SELECT])
def test_select(changes, error, message):
    arguments = {"pos_losses": torch.zeros(3), "pos_inds": Z, "pos_gt_inds": Z, "level_sizes": [4], "num_gt": 1, **changes}
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        paa_gpu.select_candidates(**arguments)


def head(**changes):
    """Two levels, two images of 3 classes, 6 anchors."""
    return {
        "anchors": [torch.ones(4, 4), torch.ones(2, 4)],
        "cls_scores": [torch.ones(2, 3, 2, 2), torch.ones(2, 3, 1, 2)],
        "bbox_preds": [torch.ones(2, 4, 2, 2), torch.ones(2, 4, 1, 2)],
        "label": [torch.zeros(6, dtype=torch.int64)] * 2,
        "label_weight": [torch.ones(6)] * 2,
        "bbox_target": [torch.ones(6, 4)] * 2,
        "bbox_weight": [torch.ones(6, 4)] * 2,
        "pos_inds": [Z, Z[:1]],
        **changes,
    }


def second_of_head(name, value):
    return {name: [head()[name][0], value]}


HEAD = [
    ({"anchors": torch.ones(6, 4)}, TypeError, "`anchors` must be a list with one entry per level, got Tensor"),
    ({"anchors": []}, ValueError, "`anchors` must have at least one entry, got an empty list"),
    ({"cls_scores": [torch.ones(2, 3, 2, 2)]}, ValueError, "`cls_scores` must have 2 entries as `anchors` has, got 1"),
    ({"bbox_preds": []}, ValueError, "`bbox_preds` must have 2 entries as `anchors` has, got 0"),
    ({"label": []}, ValueError, "`label` must have at least one entry, got an empty list"),
    ({"pos_inds": [Z]}, ValueError, "`pos_inds` must have 2 entries as `label` has, got 1"),
    (second_of_head("anchors", torch.ones(2, 5)), ValueError, "`anchors[1]` must have shape [any, 4], got [2, 5]"),
    (second_of_head("anchors", torch.ones(3, 4)), ValueError, "`anchors[1]` must hold 2 anchors as `bbox_preds[1]` does, got 3"),
    (second_of_head("anchors", torch.ones(2, 4).half()), TypeError, "`anchors[1]` must be float32, got float16"),
    (
        second_of_head("cls_scores", torch.ones(2, 3, 2)),
        ValueError,
        "`cls_scores[1]` must have 4 dimensions, got shape [2, 3, 2]",
    ),
    (
        second_of_head("cls_scores", torch.ones(2, 4, 1, 2)),
        ValueError,
        "`cls_scores[1]` must have 3 channels (anchors at a location: 1), got 4",
    ),
    (
        second_of_head("bbox_preds", torch.ones(2, 4, 2, 2)),
        ValueError,
        "`bbox_preds[1]` must have shape [2, any, 1, 2], got [2, 4, 2, 2]",
    ),
    (
        second_of_head("bbox_preds", torch.ones(2, 6, 1, 2)),
        ValueError,
        "`bbox_preds[1]` must have 4 channels for each anchor of a location, got 6",
    ),
    (
        {"bbox_preds": [torch.ones(2, 8, 2, 2), torch.ones(2, 8, 1, 2)]},
        ValueError,
        "`cls_scores[0]` must have a multiple of 2 channels (anchors at a location: 2), got 3",
    ),
    (second_of_head("bbox_preds", torch.ones(2, 4, 1, 2).half()), TypeError, "`bbox_preds[1]` must be float32, got float16"),
    (second_of_head("label", Z), ValueError, "`label[1]` must have shape [6], got [3]"),
    (second_of_head("label", torch.zeros(6)), TypeError, "`label[1]` must be int64, got float32"),
    (second_of_head("label_weight", torch.ones(6).double()), TypeError, "`label_weight[1]` must be float32, got float64"),
    (second_of_head("bbox_target", torch.ones(6)), ValueError, "`bbox_target[1]` must have 2 dimensions, got shape [6]"),
    (second_of_head("bbox_weight", torch.ones(6, 1)), ValueError, "`bbox_weight[1]` must have shape [6, 4], got [6, 1]"),
    (second_of_head("pos_inds", Z.int()), TypeError, "`pos_inds[1]` must be int64, got int32"),
    (second_of_head("pos_inds", Z.to("meta")), ValueError, "`pos_inds[1]` must be on cpu as the other tensors are, got meta"),
    ({"gamma": -1}, ValueError, "`gamma` must not be negative, got -1"),
    ({"gamma": float("inf")}, ValueError, "`gamma` must be finite, got inf"),
    ({"alpha": "a"}, TypeError, "`alpha` must be a float, got str"),
    ({"alpha": 1.1}, ValueError, "`alpha` must be at most 1, got 1.1"),
    ({"loss_bbox_weight": None}, TypeError, "`loss_bbox_weight` must be a float, got NoneType"),
    ({"stds": (0.1, 0.1)}, ValueError, "`stds` must have 4 entries as a box has, got 2"),
    ({"stds": (0.1, 0.1, 0.2, -0.2)}, ValueError, "`stds[3]` must not be negative, got -0.2"),
    ({"stds": (0.1, 0, 0.2, 0.2), "box_loss": "l1"}, ValueError, "`stds[1]` must be positive, got 0"),
    ({"wh_ratio_clip": 0}, ValueError, "`wh_ratio_clip` must be positive, got 0"),
    ({"box_loss": "smooth_l1"}, ValueError, '`box_loss` must be "giou" or "l1", got \'smooth_l1\''),
    ({"convention": None}, ValueError, '`convention` must be "mmdet" or "torchvision", got None'),
]


@pytest.mark.parametrize(("changes", "error", "message"), HEAD, ids=[message for _, _, message in HEAD])
def test_candidate_losses(changes, error, message):
    assert_refused(head(**changes), error, message, paa_gpu.candidate_losses)


@pytest.mark.slow
def test_what_the_two_of_the_head_accept():
    paa_gpu.candidate_losses(**head())
    paa_gpu.candidate_losses(**head(alpha=1.0))
    paa_gpu.assign_max_iou(**assignment())


def assignment(**changes):
    """Two levels of 4 and 2 anchors, two images."""
    return {"anchors": [torch.ones(4, 4), torch.ones(2, 4)], "gt_bboxes": [torch.ones(3, 4), torch.ones(0, 4)], **changes}


ASSIGNMENT = [
    ({"anchors": []}, ValueError, "`anchors` must have at least one entry, got an empty list"),
    ({"gt_bboxes": torch.ones(3, 4)}, TypeError, "`gt_bboxes` must be a list with one entry per image, got Tensor"),
    ({"gt_bboxes": [torch.ones(4)]}, ValueError, "`gt_bboxes[0]` must have 2 dimensions, got shape [4]"),
    ({"gt_bboxes": [torch.ones(3, 5)]}, ValueError, "`gt_bboxes[0]` must have shape [any, 4], got [3, 5]"),
    (
        {"gt_bboxes": [torch.ones(3, 4), torch.ones(3, 4).half()]},
        TypeError,
        "`gt_bboxes[1]` must be float32, got float16",
    ),
    ({"anchors": [[torch.ones(4, 4)]]}, ValueError, "`anchors` must have 2 entries as `gt_bboxes` has, got 1"),
    (
        {"anchors": [[torch.ones(4, 4)], torch.ones(2, 4)]},
        TypeError,
        "`anchors[1]` must be a list with one entry per level, got Tensor",
    ),
    ({"anchors": [[], [torch.ones(4, 4)]]}, ValueError, "`anchors[0]` must have at least one entry, got an empty list"),
    ({"anchors": [[torch.ones(4, 4)], [torch.ones(4)]]}, ValueError, "`anchors[1][0]` must have 2 dimensions, got shape [4]"),
    (
        {"anchors": [[torch.ones(4, 4)], [torch.ones(4, 4).half()]]},
        TypeError,
        "`anchors[1][0]` must be float32, got float16",
    ),
    ({"anchors": [Z[:, None].expand(3, 4)]}, TypeError, "`anchors[0]` must be float16, bfloat16, float32 or float64, got int64"),
    (
        {"gt_bboxes": [torch.ones(3, 4, device="meta")]},
        ValueError,
        "`gt_bboxes[0]` must be on cpu as the other tensors are, got meta",
    ),
    ({"gt_bboxes": [as_tv(torch.ones(3, 4), "XYWH")]}, ValueError, "`gt_bboxes[0]` must have the format XYXY, got XYWH"),
    ({"gt_bboxes_ignore": [torch.ones(1, 4)]}, ValueError, "`gt_bboxes_ignore` must have 2 entries as `gt_bboxes` has, got 1"),
    (
        {"gt_bboxes_ignore": [torch.ones(1, 4), torch.ones(1, 3)]},
        ValueError,
        "`gt_bboxes_ignore[1]` must have shape [any, 4], got [1, 3]",
    ),
    (
        {"gt_bboxes_ignore": [torch.ones(1, 4), as_tv(torch.ones(1, 4), "XYWH")]},
        ValueError,
        "`gt_bboxes_ignore[1]` must have the format XYXY, got XYWH",
    ),
    ({"valid": [torch.ones(6, dtype=torch.bool), torch.ones(6)]}, TypeError, "`valid[1]` must be bool, got float32"),
    ({"valid": [torch.ones(6, dtype=torch.bool)]}, ValueError, "`valid` must have 2 entries as `gt_bboxes` has, got 1"),
    ({"valid": [torch.ones(5, dtype=torch.bool)] * 2}, ValueError, "`valid[0]` must have shape [6], got [5]"),
    ({"pos_iou_thr": -0.1}, ValueError, "`pos_iou_thr` must not be negative, got -0.1"),
    ({"neg_iou_thr": (0.1, 0.2)}, TypeError, "`neg_iou_thr` must be a float, got tuple"),
    ({"min_pos_iou": "0"}, TypeError, "`min_pos_iou` must be a float, got str"),
    ({"ignore_iof_thr": None}, TypeError, "`ignore_iof_thr` must be a float, got NoneType"),
    ({"match_low_quality": 1}, TypeError, "`match_low_quality` must be a bool, got int"),
    ({"gt_max_assign_all": None}, TypeError, "`gt_max_assign_all` must be a bool, got NoneType"),
    ({"low_quality": "best"}, ValueError, '`low_quality` must be "gt" or "anchor", got \'best\''),
    ({"eps": -1e-6}, ValueError, "`eps` must not be negative, got -1e-06"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ASSIGNMENT, ids=[message for _, _, message in ASSIGNMENT])
def test_assign(changes, error, message):
    assert_refused(assignment(**changes), error, message, paa_gpu.assign_max_iou)


PAGE = Path(__file__).parents[1] / "docs" / "errors.md"


def page() -> str:
    tables = {
        "`paa_reassign_batch` (and `paa_reassign`, without the index of the image)": BATCH,
        "More errors with `validate=True`, which reads the values": [
            (changes, ValueError, message) for changes, message in VALIDATED
        ],
        "`select_candidates`": SELECT,
        "`fit_gmm_1d`": FIT,
        "`score_voting_batch` (and `score_voting`, without the index of the image)": VOTING,
        "`batched_nms`": NMS,
        "`weighted_boxes_fusion`": FUSION,
        "`assign_max_iou`": ASSIGNMENT,
        "`candidate_losses`": HEAD,
        "`PAAHead`": SETTINGS,
        "`paa_gpu.integrations.sklearn.GaussianMixture` (besides the errors of scikit-learn)": [
            (None, ValueError, message) for *_, message in OWN_ERRORS
        ],
        "`PAAHead.loss`": [(None, ValueError, message) for *_, message in INPUTS],
    }
    text = (
        "# Errors\n\nThis page lists the errors of the main functions. It is written from the tests, which check every message in full. "
        "An error comes before any work, so the inputs stay as they were. The docstrings name the errors of all functions.\n"
    )
    for title, rows in tables.items():
        text += f"\n## {title}\n\n| error | message |\n|---|---|\n"
        text += "".join(f"| {error.__name__} | {message.replace('|', '&#124;')} |\n" for _, error, message in rows)
    return text


BOX, HUGE = torch.tensor([[0.0, 0, 6e4, 6e4]]), torch.rand(3, 9, dtype=torch.float64) * 1e300
TOO_LARGE = {
    "a voted box": lambda: paa_gpu.score_voting(torch.cat([BOX, BOX[:, :1]], 1).half(), Z[:1], BOX * 1.5, BOX[:, :1] + 1, 0.05),
    "a threshold": lambda: paa_gpu.score_voting(torch.cat([BOX, BOX[:, :1]], 1), Z[:1], BOX, BOX[:, :1], 1e300),
    "thresholds": lambda: paa_gpu.batched_nms(BOX[None], BOX[None, :, :2], None, 1e300, score_thr=1e300),
    "thresholds of matches": lambda: paa_gpu.assign_max_iou([BOX], [BOX], pos_iou_thr=1e300),
    "boxes": lambda: paa_gpu.assign_max_iou([BOX.double() * 1e300], [BOX, BOX]),
    "rows": lambda: paa_gpu.fit_gmm_1d(HUGE, precision="float32"),
    "lists of rows": lambda: paa_gpu.fit_gmm_1d(list(HUGE), precision="float32"),
    "what is read": lambda: paa_gpu.fit_gmm_1d(torch.rand(3, 9), precision="float32").predict_proba(HUGE),
    "a threshold of fusion": lambda: paa_gpu.weighted_boxes_fusion([[BOX / 6e4]], [[BOX[0, 3:]]], [[Z[:1]]], skip_box_thr=1e300),
}


@pytest.mark.parametrize("call", TOO_LARGE.values(), ids=TOO_LARGE)
def test_numbers_too_large_for_their_dtype_are_infinite_without_a_warning(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_a_start_of_all_rows_is_refused_as_row_0():
    """Also where the first row has other numbers that are not finite, and is not asked."""
    starts = {"weights_init": torch.tensor([0.5, 0.25]), "means_init": torch.tensor([[torch.nan, 0], [0, 1]])}
    with pytest.raises(ValueError, match=r"^`weights_init` must sum to 1, got \[0.5, 0.25\] in row 0$"):
        paa_gpu.fit_gmm_1d(torch.rand(2, 5), **starts)


def test_the_page_lists_every_error():
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())
