"""The reassignment: every named batch, checked, then timed."""

from __future__ import annotations

import pytest

from . import cases, providers


@pytest.mark.parametrize("case", cases.BATCHES)
@pytest.mark.parametrize(
    "provider", [providers.library, providers.library_one_by_one, providers.published], ids=lambda p: p.__name__
)
def test_reassign(benchmark, case, provider):
    benchmark.group = f"reassign {case}"
    batch = cases.BATCHES[case]()
    if provider is not providers.published:
        providers.check_agreement(batch, provider)
    benchmark(provider, batch)
