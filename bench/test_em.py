"""The fit alone: rows x length, checked against scikit-learn's iterations and means, then timed."""

from __future__ import annotations

import pytest
import torch

import paa_gpu
from paa_gpu import reference

from . import cases


def scikit_learn(x):
    return [reference.fit((row - row.min()).numpy(), "diag") for row in x]


@pytest.mark.parametrize("case", cases.FITS)
def test_fit(benchmark, case):
    benchmark.group = f"fit {case}"
    x = cases.losses(*cases.FITS[case])
    got, wanted = paa_gpu.fit_gmm_1d(x), scikit_learn(x[:50])
    assert got.n_iter[:50].tolist() == [fit.n_iter_ for fit in wanted]
    means = torch.tensor([fit.means_[:, 0].tolist() for fit in wanted], dtype=torch.float64) + x[:50].amin(1, keepdim=True)
    torch.testing.assert_close(got.means[:50], means, rtol=0, atol=1e-8)
    benchmark(paa_gpu.fit_gmm_1d, x)


@pytest.mark.parametrize("case", ["7x45", "112x45"])
def test_scikit_learn(benchmark, case):
    benchmark.group = f"fit {case}"
    x = cases.losses(*cases.FITS[case])
    benchmark(scikit_learn, x)
