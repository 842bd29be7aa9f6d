"""The fit alone: rows x length. It is checked against scikit-learn's iterations and means, then timed."""

from __future__ import annotations

import functools

import pytest
import torch

import paa_gpu

from . import cases, providers

CHECKED = 50


@functools.cache
def prepared(case):
    """The rows, and the iterations and means of scikit-learn for the first of them."""
    x = cases.losses(*cases.FITS[case])
    fits = providers.scikit_learn_fit(x[:CHECKED])
    means = torch.tensor([fit.means_[:, 0].tolist() for fit in fits], dtype=torch.float64)
    return x, [fit.n_iter_ for fit in fits], means + x[:CHECKED].amin(1, keepdim=True)


def check(got, case):
    _, n_iter, means = prepared(case)
    assert got.n_iter[:CHECKED].tolist() == n_iter
    torch.testing.assert_close(got.means[:CHECKED].cpu(), means, rtol=0, atol=1e-8)


@pytest.mark.parametrize("provider", ["library", "limit"])
@pytest.mark.parametrize("case", cases.FITS)
def test_fit(benchmark, provider, case):
    benchmark.group = f"fit {case}"
    x = prepared(case)[0]
    fit = paa_gpu.fit_gmm_1d(x)
    check(fit, case)
    if provider == "limit":
        benchmark(providers.fit_limit(torch.full((len(x),), x.shape[1]), fit.n_iter))
    else:
        benchmark(paa_gpu.fit_gmm_1d, x)


@pytest.mark.parametrize("case", ["7x45", "112x45"])
def test_scikit_learn(benchmark, case):
    benchmark.group = f"fit {case}"
    benchmark(providers.scikit_learn_fit, prepared(case)[0])


@pytest.mark.skipif(not providers.GMM_GPU, reason="gmm-gpu is not installed")
@pytest.mark.parametrize("case", cases.FITS)
def test_gmm_gpu(benchmark, case):
    benchmark.group = f"fit {case}"
    x, _, means = prepared(case)
    mixture = providers.gmm_gpu_fit(x)
    # It starts and stops otherwise, so it need not end in the same place: how far off is part of the result.
    got = torch.stack([mean[:CHECKED, 0] for mean in mixture.means], 1) + x[:CHECKED].amin(1, keepdim=True)
    benchmark.extra_info.update(largest_difference=float((got - means).abs().max()))
    benchmark(providers.gmm_gpu_fit, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times on a GPU need one")
@pytest.mark.parametrize("case", cases.FITS)
def test_fit_cuda(benchmark, case):
    benchmark.group = f"fit {case}"
    x = prepared(case)[0]
    check(paa_gpu.fit_gmm_1d(x.cuda()), case)
    benchmark.extra_info.update(providers.cuda_seconds(paa_gpu.fit_gmm_1d, [x]))
    on_device = x.cuda()
    benchmark(lambda: (paa_gpu.fit_gmm_1d(on_device), torch.cuda.synchronize()))
