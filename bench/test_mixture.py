"""Fitting and reading mixtures with DivideMix's arguments and the k-means start. Checked against scikit-learn, then timed."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from . import cases, providers

#: Rows that are checked.
CHECKED = 3


@functools.cache
def rows(case):
    return cases.MIXTURES[case]()


def check(answers, case):
    """Iterations and probabilities must be scikit-learn's from the same start."""
    for row, (n_iter, low) in zip(rows(case)[:CHECKED], answers, strict=False):
        start = providers.two_means_start(row.numpy())
        oracle = GaussianMixture(2, **providers.DIVIDEMIX, **start).fit(row[:, None].numpy())
        assert n_iter == oracle.n_iter_
        np.testing.assert_allclose(low, oracle.predict_proba(row[:, None].numpy())[:, oracle.means_.argmin()], atol=1e-5)


@pytest.mark.parametrize("provider", ["library", "estimator", "limit"])
@pytest.mark.parametrize("case", cases.MIXTURES)
def test_mixture(benchmark, provider, case):
    benchmark.group = f"mixture {case}"
    x = providers.mixture_input(rows(case))
    if provider == "estimator" and len(x) > 1:
        pytest.skip("the estimator fits one mixture")
    fit, low = providers.mixture_library(x)
    check(zip(fit.n_iter.tolist(), low, strict=True), case)
    if provider == "limit":
        benchmark(providers.mixture_limit(rows(case), fit.n_iter))
    elif provider == "estimator":
        check([providers.mixture_estimator(x[0])], case)
        benchmark(providers.mixture_estimator, x[0])
    else:
        benchmark(providers.mixture_library, x)


@pytest.mark.parametrize("case", cases.MIXTURES)
def test_scikit_learn(benchmark, case):
    benchmark.group = f"mixture {case}"
    benchmark.pedantic(providers.mixture_scikit_learn, (rows(case),), rounds=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times on a GPU need one")
@pytest.mark.parametrize("case", cases.MIXTURES)
def test_mixture_cuda(benchmark, case):
    benchmark.group = f"mixture {case}"
    on_device = providers.mixture_input([row.cuda() for row in rows(case)])
    fit, low = providers.mixture_library(on_device)
    check(zip(fit.n_iter.tolist(), (row.cpu() for row in low), strict=True), case)
    benchmark(lambda: (providers.mixture_library(on_device), torch.cuda.synchronize()))
