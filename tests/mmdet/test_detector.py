"""The complete detectors, PAA and LAD: backbone, neck and head of a published configuration, each made small."""

from __future__ import annotations

import copy

import api
import pytest
import torch
from api import LADHead, PAAHead
from heads import LAD, PAA, assert_same_detections, make_samples, small, under_the_tie_rule

from paa_gpu.integrations.mmdet import LADHeadGPU, PAAHeadGPU, accelerate, restore

SIZE = (256, 320)
CONFIGS = [PAA] if LADHead is None else [PAA, LAD]


def build(config):
    """The detector of a published configuration; some scores of an image are above the threshold."""
    detector = api.build_detector(small(config))
    torch.nn.init.normal_(detector.bbox_head.atss_cls.weight, std=0.09)
    torch.nn.init.constant_(detector.bbox_head.atss_cls.bias, -8)
    return detector


def heads_of(detector):
    """The head, and the teacher's, which `modules()` does not list."""
    return [detector.bbox_head] + ([detector.teacher_model.bbox_head] if hasattr(detector, "teacher_model") else [])


def with_the_tie_rule(detector):
    """The published detector with the library's rule for ties in the head that assigns: in LAD the teacher's."""
    detector = copy.deepcopy(detector)
    owner = getattr(detector, "teacher_model", detector)
    owner.bbox_head = under_the_tie_rule(owner.bbox_head)
    return detector


def step(detector, images, samples):
    """Losses and gradients of everything that is trained."""
    losses = api.detector_loss(detector, images, samples)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters() if parameter.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("config", CONFIGS)
def test_a_training_step(config, generator):
    """Losses within 1e-6, gradients from the head to the backbone within 1e-4 of the largest of each parameter."""
    model = build(config)
    accelerated = accelerate(copy.deepcopy(model))
    assert {type(head) for head in heads_of(accelerated)} == {LADHeadGPU if config == LAD else PAAHeadGPU}
    images, samples = torch.randn(2, 3, *SIZE, generator=generator), make_samples([7, 3], SIZE, 80, generator)
    losses, gradients = step(accelerated, images, samples)
    wanted_losses, wanted = step(with_the_tie_rule(model), images, samples)
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-6, atol=0)
    assert gradients.keys() == wanted.keys()
    assert {name.partition(".")[0] for name in gradients} == {"backbone", "neck", "bbox_head"}
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_detections(config, generator):
    model = build(config)
    model.eval()  # LAD's returns nothing
    images, samples = torch.randn(2, 3, *SIZE, generator=generator), make_samples([0, 0], SIZE, 80, generator)
    got = api.detector_predict(accelerate(copy.deepcopy(model)), images, copy.deepcopy(samples))
    for ours, theirs in zip(got, api.detector_predict(model, images, samples), strict=True):
        assert len(theirs.labels) > 0
        assert_same_detections(ours, theirs)


@pytest.mark.parametrize("config", CONFIGS)
def test_accelerated_and_restored(config):
    model = build(config)
    names = list(model.state_dict())
    assert list(accelerate(model).state_dict()) == names
    assert {type(head) for head in heads_of(restore(model))} == {LADHead if config == LAD else PAAHead}
