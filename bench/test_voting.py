"""Score voting: recorded and made predictions, checked, then timed."""

from __future__ import annotations

import functools

import pytest
import torch

import paa_gpu

from . import cases, providers


@functools.cache
def prepared(case):
    arguments = cases.VOTING[case]()
    providers.check_voting(*arguments)
    return arguments


@pytest.mark.parametrize("provider", ["published", "library"])
@pytest.mark.parametrize("case", cases.VOTING)
def test_score_voting(benchmark, provider, case):
    benchmark.group = f"voting {case}"
    arguments = prepared(case)
    benchmark.extra_info.update(detections=len(arguments[1]), boxes=len(arguments[2]), classes=arguments[3].shape[1])
    benchmark(providers.published_voting if provider == "published" else paa_gpu.score_voting, *arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times on a GPU need one")
@pytest.mark.parametrize("case", cases.VOTING)
def test_score_voting_cuda(benchmark, case):
    benchmark.group = f"voting {case}"
    arguments = prepared(case)
    on_device = [providers.move(argument, "cuda") for argument in arguments]
    got, wanted = paa_gpu.score_voting(*on_device), paa_gpu.score_voting(*arguments)
    torch.testing.assert_close(got[0].cpu(), wanted[0], rtol=0, atol=1e-3)
    assert torch.equal(got[1].cpu(), wanted[1])
    benchmark.extra_info.update(providers.cuda_seconds(paa_gpu.score_voting, arguments))
    benchmark(lambda: (paa_gpu.score_voting(*on_device), torch.cuda.synchronize()))
