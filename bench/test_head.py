"""The two steps before the reassignment. They are checked against their unfused forms, then timed beside them."""

from __future__ import annotations

import pytest
import torch

import paa_gpu
from paa_gpu import reference

from . import cases, providers

PROVIDERS = {"library": paa_gpu, "unfused": reference}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_candidate_losses(benchmark, provider):
    batch = cases.potential_positives()
    providers.check_losses(batch)
    benchmark.group = "candidate losses"
    options = {"dtype": torch.float32} if provider == "unfused" else {}
    benchmark(PROVIDERS[provider].candidate_losses, *batch, **options)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("boxes", [7, 200])
def test_assign_max_iou(benchmark, provider, boxes):
    arguments = cases.assignment(boxes)
    providers.check_assignment(*arguments)
    benchmark.group = f"assignment of {boxes} boxes"
    benchmark(PROVIDERS[provider].assign_max_iou, *arguments)
