"""Score voting: recorded calls, checked, then timed."""

from __future__ import annotations

import pytest

import paa_gpu
from paa_gpu import data

from . import providers

CALLS = {call.name: call for path in (data.BUNDLED, data.voting_paths()[-1]) for call in data.load_voting(path)}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("provider", [paa_gpu.score_voting, providers.published_voting], ids=lambda p: p.__name__)
def test_score_voting(benchmark, case, provider):
    benchmark.group = f"score voting {case}"
    arguments = CALLS[case].arguments
    providers.check_voting(*arguments)
    benchmark(provider, *arguments)
