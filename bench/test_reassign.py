"""The reassignment: every named call, checked against the oracle, then timed."""

from __future__ import annotations

import functools

import pytest
import torch

import paa_gpu

from . import cases, providers


@functools.cache
def prepared(case):
    call = cases.REASSIGN[case]()
    return call, providers.oracle(call)


# The first parameter varies fastest: the providers of a case take their turns one after the other.
@pytest.mark.parametrize("provider", ["published", "library", "library_one_by_one", "limit"])
@pytest.mark.parametrize("case", cases.REASSIGN)
def test_reassign(benchmark, provider, case):
    benchmark.group = f"reassign {case}"
    call, wanted = prepared(case)
    benchmark.extra_info.update(images=len(call.batch.num_gts), boxes=sum(call.batch.num_gts), topk=call.topk)
    if provider == "limit":
        benchmark(providers.reassign_limit(call))
        return
    run = getattr(providers, provider)
    if provider != "published":  # which differs in some positives, from squares rounded to float32
        providers.check(run(call), wanted)
    benchmark(run, call)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times on a GPU need one")
@pytest.mark.parametrize("case", cases.REASSIGN)
def test_reassign_cuda(benchmark, case):
    benchmark.group = f"reassign {case}"
    call, wanted = prepared(case)
    *tensors, levels = call.batch.arguments

    def run(*columns):
        return paa_gpu.paa_reassign_batch(*columns, levels, **call.options)

    got = run(*providers.move(tensors, "cuda"))
    providers.check(list(zip(got.label, got.label_weight, got.bbox_weight, got.num_pos.tolist(), strict=True)), wanted)
    benchmark.extra_info.update(providers.cuda_seconds(run, tensors))
    columns = providers.move(tensors, "cuda")
    benchmark(lambda: (run(*columns), torch.cuda.synchronize()))
