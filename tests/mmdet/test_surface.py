"""The public functions in the places of a head's methods, and what passes between versions: each against the installed mmdetection."""

from __future__ import annotations

import api
import pytest
import torch
from heads import Float64PAAHead, TieRulePAAHead, as_class, build, make_features, make_samples

import paa_gpu
from paa_gpu.integrations.mmdet import accelerate, versions

SIZE = (256, 320)
SMALL = {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1}


@pytest.fixture
def batch(generator):
    """A head, its outputs, its anchors and flags, and the ground truths."""
    head = build(**SMALL)
    features, samples = make_features(2, SIZE, 32, generator), make_samples([7, 3], SIZE, 80, generator)
    truth = versions.Truth.of(*api.truth_of(samples))
    with torch.no_grad():
        outputs = head(features)
    flags = head.get_anchors([level.shape[-2:] for level in outputs[0]], truth.metas, device=torch.device("cpu"))
    return head, outputs, *flags, truth


def test_get_targets_returns_what_it_returned(batch):
    head, _, anchors, flags, truth = batch
    wanted = versions.published_targets(head, anchors, flags, truth)
    for ours, theirs in zip(versions.published_targets(accelerate(head), anchors, flags, truth), wanted, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert len(wanted) == 6


@torch.no_grad()
def test_paa_reassign_with_the_arguments_of_the_method(batch):
    """Under the library's rule for ties, image by image."""
    head, (cls_scores, bbox_preds, _), anchors, flags, truth = batch
    labels, weights, targets, box_weights, pos_inds, gt_inds = versions.published_targets(head, anchors, flags, truth)
    scores, boxes = paa_gpu.levels_to_images(cls_scores), paa_gpu.levels_to_images(bbox_preds)
    rule = as_class(head, TieRulePAAHead)
    for image, levels in enumerate(anchors):
        own = (labels[image], weights[image], targets[image], box_weights[image], pos_inds[image])
        (losses,) = head.get_pos_loss(levels, scores[image], boxes[image], *own)
        arguments = (losses, labels[image], weights[image], box_weights[image], pos_inds[image], gt_inds[image], levels)
        got, wanted = paa_gpu.paa_reassign(*arguments, num_classes=80), rule.paa_reassign(*arguments)
        assert all(map(torch.equal, got[:3], wanted[:3]))
        assert got[3] == wanted[3]


def test_levels_to_images(batch):
    levels = batch[1][0]
    assert all(map(torch.equal, paa_gpu.levels_to_images(levels), versions.levels_to_images(levels)))


def test_score_voting_with_the_arguments_of_the_method(generator):
    head = build(**SMALL)
    corner, extent = torch.rand(300, 2, generator=generator) * 100, 20 + torch.rand(300, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + extent], 1)
    scores = torch.rand(300, 81, generator=generator) * 0.1
    scores[:, -1] = 0
    best, labels = scores[:40].max(1)
    detections = torch.cat([boxes[:40], best[:, None]], 1)
    arguments = (detections, labels, boxes, scores, 0.05)
    wanted = head.score_voting(*arguments)
    for got in (paa_gpu.score_voting(*arguments), accelerate(head).score_voting(*arguments)):
        assert torch.equal(got[1], wanted[1])
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-4)
    nothing = boxes[:0], labels[:0]  # as 2.11 has it
    assert all(map(torch.equal, head.score_voting(*nothing, boxes, scores, 0.05), nothing))


def test_a_checkpoint_fits_every_head(generator):
    """Names and shapes of the parameters are the same in all versions, and in the head without mmdetection."""
    head = build(**SMALL)
    ours = paa_gpu.PAAHead(80, 32, 32, 1)
    ours.load_state_dict(head.state_dict())
    features = make_features(2, SIZE, 32, generator)
    for got, wanted in zip(ours(features), head(features), strict=True):
        assert all(map(torch.equal, got, wanted))
    accelerate(as_class(head, Float64PAAHead)).load_state_dict(ours.state_dict())
