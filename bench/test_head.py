"""The two steps before the reassignment: checked against their unfused forms, then timed beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import paa_gpu
from paa_gpu import reference, testing

SHAPES = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))  # levels of an 800 x 1333 image
PROVIDERS = {"library": paa_gpu, "unfused": reference}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_candidate_losses(benchmark, provider):
    """Two images, 80 classes, 2,000 potential positives each."""
    batch = testing.make_head_batch([2000, 2000], np.random.default_rng(0), SHAPES, num_classes=80)
    for a, b in zip(paa_gpu.candidate_losses(*batch), reference.candidate_losses(*batch), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)
    benchmark.group = "candidate losses"
    options = {"dtype": torch.float32} if provider == "unfused" else {}
    benchmark(PROVIDERS[provider].candidate_losses, *batch, **options)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("boxes", [7, 200])
def test_assign_max_iou(benchmark, provider, boxes):
    """One image."""
    arguments = testing.make_anchors(SHAPES), [testing.make_boxes(boxes, (1333, 800), np.random.default_rng(0))]
    got, wanted = paa_gpu.assign_max_iou(*arguments), reference.assign_max_iou(*arguments)
    assert torch.equal(got.gt_inds[0], wanted[0][0]) and torch.equal(got.max_overlaps[0], wanted[1][0])
    benchmark.group = f"assignment of {boxes} boxes"
    benchmark(PROVIDERS[provider].assign_max_iou, *arguments)
