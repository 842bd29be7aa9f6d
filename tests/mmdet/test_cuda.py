"""The accelerated head on a GPU, against the published one there. Needs a GPU, but for the test of what stands in for mmcv."""

from __future__ import annotations

from typing import Any

import heads
import pytest
import torch
from api import loss, predict
from mmcv.ops import sigmoid_focal_loss
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
from torch.nn.functional import one_hot

DEVICE = "cuda"
SIZE = (128, 160)


@pytest.fixture(autouse=True)
def same_bits_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def there(samples: list[Any]) -> list[Any]:
    for sample in samples:
        for name in ("bboxes", "labels"):
            setattr(sample.gt_instances, name, getattr(sample.gt_instances, name).to(DEVICE))
    return samples


def batch(generator: torch.Generator, boxes: list[int]) -> tuple[list[torch.Tensor], list[Any]]:
    features = heads.make_features(len(boxes), SIZE, 32, generator)
    return [level.to(DEVICE) for level in features], there(heads.make_samples(boxes, SIZE, 80, generator))


def small() -> Any:
    return heads.build(in_channels=32, feat_channels=32, stacked_convs=1).to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("boxes", [[7, 3], [0, 20], [0, 0]], ids=str)
def test_a_training_step(boxes, generator):
    heads.compare(heads.variants(small()), *batch(generator, boxes))


@pytest.mark.gpu
def test_the_loss_waits_for_nothing(generator):
    head = heads.accelerate(small())
    features, samples = batch(generator, [7, 3])
    loss(head, features, samples)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(head, features, samples)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@torch.no_grad()
def test_detections(generator):
    published, _, _, accelerated = heads.variants(small().eval())
    torch.nn.init.normal_(published.atss_cls.weight, std=0.2)
    accelerated.load_state_dict(published.state_dict())
    features, samples = batch(generator, [0, 0])
    for got, wanted in zip(predict(accelerated, features, samples), predict(published, features, samples), strict=True):
        assert len(wanted.labels) > 0
        heads.assert_same_detections(got, wanted)


def test_the_focal_loss_that_stands_in_for_mmcv(generator):
    scores = torch.randn(50, 4, generator=generator)
    target = torch.randint(5, (50,), generator=generator)
    first, second = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    got = sigmoid_focal_loss(first, target, 2.0, 0.25, None, "none")
    wanted = py_sigmoid_focal_loss(second, one_hot(target, 5)[:, :4], gamma=2.0, alpha=0.25, reduction="none")
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(first.grad, second.grad)
