"""The recipes of `docs/mixtures.md`: the decisions are those of the published lines, which call scikit-learn row by row."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn import mixture

import paa_gpu
from paa_gpu import testing
from paa_gpu.integrations.sklearn import GaussianMixture

DIVIDEMIX = {"n_components": 2, "max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}


def clean(estimator, losses):
    """DivideMix's lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gmm = estimator.fit(losses[:, None])
    return gmm.predict_proba(losses[:, None])[:, gmm.means_.argmin()] > 0.5


@pytest.mark.parametrize("noise", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_noisy_labels(noise, symmetric, rng):
    """No more samples change sides than between two seeds of scikit-learn, or three in a thousand, which tol leaves open."""
    losses = testing.make_noisy_label_losses(5000, noise, rng, symmetric=symmetric)
    ours = clean(GaussianMixture(**DIVIDEMIX), losses)
    theirs = [clean(mixture.GaussianMixture(**DIVIDEMIX, random_state=seed), losses) for seed in range(4)]
    among = max(int((a != b).sum()) for a in theirs for b in theirs)
    flips = [int((ours != other).sum()) for other in theirs]
    print(f"noise {noise}, symmetric {symmetric}: {flips} flips, {among} among the seeds")
    assert min(flips) <= max(among, 15)
    low = GaussianMixture(**DIVIDEMIX)
    assert np.array_equal(low.fit(torch.from_numpy(losses)).low_probability(torch.from_numpy(losses)) > 0.5, ours)


def test_one_mixture_for_each_class(rng):
    """FINE's: rows of different lengths in one call are the estimator's fits one by one."""
    rows = [torch.from_numpy(testing.make_noisy_label_losses(size, 0.3, rng)) for size in (100, 400, 37, 1000)]
    fit = paa_gpu.fit_gmm_1d(rows, init="kmeans", max_iter=10, tol=1e-2, reg_covar=5e-4)
    for row, low in zip(rows, fit.low_probability(rows), strict=True):
        assert np.array_equal(low > 0.5, clean(GaussianMixture(**DIVIDEMIX), row.numpy()))


def published_threshold(scores):
    """Consistent-Teacher's rule: the start of PAA, then the likeliest score of the high component."""
    column = scores[:, None]
    start = {"weights_init": [0.5, 0.5], "means_init": [[scores.min()], [scores.max()]], "precisions_init": [[[1.0]], [[1.0]]]}
    gmm = mixture.GaussianMixture(2, **start).fit(column)
    high, density = gmm.predict(column) == 1, gmm.score_samples(column)
    if not high.any():
        return None
    density[~high] = -np.inf
    return scores[high & (scores >= scores[density.argmax()])].min()


def test_thresholds_of_pseudo_labels(rng):
    rows = [
        np.clip(np.concatenate([rng.normal(0.15, 0.06, 2 * n), rng.normal(level, 0.08, n)]), 0, 1)
        for level, n in ((0.9, 300), (0.75, 200), (0.7, 60), (0.8, 20))
    ]
    scores = [torch.from_numpy(row) for row in rows]
    gmm, found = paa_gpu.fit_gmm_1d(scores), 0
    for row, score, label, density in zip(rows, scores, gmm.predict(scores), gmm.score_samples(scores), strict=True):
        want, high = published_threshold(row), label == 1
        if want is None:
            assert not high.any()
            continue
        best = score[density.masked_fill(~high, -torch.inf).argmax()]
        assert float(score[high & (score >= best)].min()) == want
        found += 1
    assert found >= 3


def test_which_cells_have_which_guide(rng):
    """Cell Ranger's calls, guide by guide: tied, ten starts."""
    counts = rng.poisson(0.4, (12, 1500))
    has_guide = rng.random(counts.shape) < 0.03
    counts[has_guide] += rng.negative_binomial(4, 0.03, int(has_guide.sum()))
    rows = torch.from_numpy(np.log10(1 + counts))
    calls = paa_gpu.fit_gmm_1d(rows, covariance_type="tied", init="kmeans").sorted().predict(rows).numpy() == 1
    for row, called in zip(rows.numpy()[:, :, None], calls, strict=True):
        gmm = mixture.GaussianMixture(n_components=2, n_init=10, covariance_type="tied", random_state=0).fit(row)
        assert np.array_equal(called, gmm.predict(row) == gmm.means_.argmax())
    assert (calls == has_guide).mean() > 0.99
