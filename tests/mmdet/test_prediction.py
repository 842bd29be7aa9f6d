"""Inference: the detections of accelerated heads against those of the published ones."""

from __future__ import annotations

import copy
from unittest import mock

import api
import pytest
import torch
from api import PAAHead
from heads import assert_same_detections, build, make_features, make_samples

from paa_gpu.integrations.mmdet import accelerate, heads

SIZE = (256, 320)
SMALL = {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1}


def small(kind="PAAHead", **changes):
    """A head of which a few hundred scores an image are above the threshold."""
    head = build(type=kind, **SMALL, **changes).eval()
    torch.nn.init.normal_(head.atss_cls.weight, std=0.09)
    torch.nn.init.constant_(head.atss_cls.bias, -8)
    return head


def make_inputs(generator, images=3):
    return make_features(images, SIZE, 32, generator), make_samples([0] * images, SIZE, 80, generator)


@torch.no_grad()
def predict(head, inputs, **options):
    features, samples = inputs
    return api.predict(head, features, samples, **options)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", ["PAAHead"] + ["LADHead"] * (api.LADHead is not None))
def test_the_same_detections_in_the_same_order(kind, rescale, generator):
    head, inputs = small(kind), make_inputs(generator)
    inputs[1][0].set_metainfo({"scale_factor": (0.5, 0.8)})
    got, wanted = (predict(each, inputs, rescale=rescale) for each in (accelerate(copy.deepcopy(head)), head))
    plain = copy.deepcopy(head)
    plain.with_score_voting = False
    moved = 0
    for ours, theirs, unvoted in zip(got, wanted, predict(plain, inputs, rescale=rescale), strict=True):
        assert len(theirs) > 20
        assert_same_detections(ours, theirs)
        moved += not torch.equal(theirs.bboxes.sort(0).values, unvoted.bboxes.sort(0).values)
    assert moved == len(got)


@pytest.mark.parametrize(
    "test_cfg",
    [{"score_thr": 0.07}, {"max_per_img": 1}, {"nms_pre": 20}, {"nms": {"type": "nms", "iou_threshold": 0.9}}],
    ids=str,
)
def test_other_test_settings(test_cfg, generator):
    head, inputs = small(), make_inputs(generator)
    head.test_cfg.update(test_cfg)
    for ours, theirs in zip(predict(accelerate(copy.deepcopy(head)), inputs), predict(head, inputs), strict=True):
        assert len(theirs) > 0
        assert_same_detections(ours, theirs)


def test_voting_as_often_as_the_published_head(generator):
    """Once for each image with detections; not where the configuration turns it off, nor without detections."""
    inputs = make_inputs(generator)
    for changes, calls in (({}, 3), ({"score_voting": False}, 0)):
        head = accelerate(small(**changes))
        with mock.patch.object(heads, "score_voting", wraps=heads.score_voting) as voting:
            predict(head, inputs)
            assert voting.call_count == calls
            head.test_cfg.score_thr = 1.0
            assert [len(image) for image in predict(head, inputs)] == [0, 0, 0]
        assert voting.call_count == calls


def test_the_authors_convention(generator):
    """Widths and heights of one pixel more."""
    head, inputs = accelerate(small(), preset="paper"), make_inputs(generator)
    with mock.patch.object(heads, "score_voting", wraps=heads.score_voting) as voting:
        predict(head, inputs)
    assert {call.kwargs["offset"] for call in voting.call_args_list} == {1.0}


class KeepsItsBoxes(PAAHead):
    def score_voting(self, det_bboxes, det_labels, *others):
        return det_bboxes, det_labels


def test_a_subclass_keeps_its_voting(generator):
    head, inputs = small(), make_inputs(generator)
    head.__class__ = KeepsItsBoxes
    wanted = predict(head, inputs)
    for ours, theirs in zip(predict(accelerate(head), inputs), wanted, strict=True):
        assert_same_detections(ours, theirs)
