"""Starts, numbers of components, and what is not a fit: against scikit-learn and against a direct EM from a direct division."""

from __future__ import annotations

import itertools
import warnings

import extended_em
import numba
import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from test_em import assert_close, pad
from torch._subclasses.fake_tensor import FakeTensorMode

import paa_gpu
from paa_gpu import testing
from paa_gpu.cpu import starts

SHAPES = ("bimodal", "unimodal", "outlier", "heavy", "float16")


def clusters(k, size, rng):
    """k clusters, which overlap little, in random order."""
    owner = rng.integers(k, size=size)
    return rng.uniform(-1, 1) + owner + rng.normal(size=size) * rng.uniform(0.05, 0.15, k)[owner]


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("k", range(1, 9))
def test_components_against_scikit_learn(k, covariance_type, rng):
    """From the same start: the same number of iterations, the same parameters and labels."""
    x = clusters(k, 60 + 20 * k, rng)
    weights, means, precisions = rng.dirichlet([5] * k), np.sort(rng.uniform(x.min(), x.max(), k)), rng.uniform(1, 9, k)
    tied = covariance_type == "tied"
    shape = {"full": (k, 1, 1), "diag": (k, 1), "spherical": (k,), "tied": (1, 1)}[covariance_type]
    precisions = precisions[:1] if tied else precisions
    shifted = x - x.min()
    oracle = GaussianMixture(
        k, covariance_type=covariance_type, weights_init=weights, means_init=(means - x.min())[:, None],
        precisions_init=precisions.reshape(shape),
    ).fit(shifted[:, None])  # fmt: skip
    row = torch.from_numpy(x)
    got = paa_gpu.fit_gmm_1d(
        row, covariance_type=covariance_type, n_components=k, weights_init=torch.tensor(weights),
        means_init=torch.tensor(means), precisions_init=torch.tensor(precisions),
    )  # fmt: skip
    assert (int(got.n_iter[0]), bool(got.converged[0]), bool(got.valid[0])) == (oracle.n_iter_, oracle.converged_, True)
    np.testing.assert_allclose(got.weights[0], oracle.weights_, atol=1e-9)
    np.testing.assert_allclose(got.means[0], oracle.means_[:, 0] + x.min(), atol=1e-9)
    np.testing.assert_allclose(got.variances[0], np.broadcast_to(oracle.covariances_.reshape(-1), k), atol=1e-9)
    np.testing.assert_allclose(got.lower_bound[0], oracle.lower_bound_, atol=1e-9)
    assert got.predict(row).tolist() == oracle.predict(shifted[:, None]).tolist()
    np.testing.assert_allclose(got.predict_proba(row), oracle.predict_proba(shifted[:, None]), atol=1e-8)
    np.testing.assert_allclose(got.bic(row)[0], oracle.bic(shifted[:, None]), rtol=1e-9)
    np.testing.assert_allclose(got.aic(row)[0], oracle.aic(shifted[:, None]), rtol=1e-9)


@pytest.mark.parametrize("init", ["minmax", "quantile", "kmeans"])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("covariance_type", ["diag", "tied"])
def test_starts(covariance_type, k, init, rng):
    rows = [testing.make_losses(shape, size, rng) for shape, size in itertools.product(SHAPES, (9, 64, 65, 300))]
    got = paa_gpu.fit_gmm_1d(*pad(rows), covariance_type=covariance_type, n_components=k, init=init)
    for i, row in enumerate(rows):
        if init == "minmax":
            mean = np.linspace(row.min(), row.max(), k) if k > 1 else np.array([(row.min() + row.max()) / 2])
            initial = {"means": mean}
        else:
            initial = extended_em.start(row, extended_em.centres(row, k, init), covariance_type)
        assert_close(got, extended_em.fit(row, covariance_type, **initial), i)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_kmeans_against_scikit_learn(k, rng):
    """Where the clusters are plain, its k-means finds the same division from any seed, and everything after it is the same."""
    rows = [clusters(k, size, rng) for size in (40, 60, 500, 5000)]
    got = paa_gpu.fit_gmm_1d(*pad(rows), n_components=k, init="kmeans")
    for i, row in enumerate(rows):
        oracle = GaussianMixture(k, random_state=0).fit((row - row.min())[:, None])
        order = np.argsort(oracle.means_[:, 0])
        assert (int(got.n_iter[i]), bool(got.converged[i])) == (oracle.n_iter_, oracle.converged_)
        np.testing.assert_allclose(got.weights[i], oracle.weights_[order], atol=1e-9)
        np.testing.assert_allclose(got.means[i], oracle.means_[order, 0] + row.min(), atol=1e-9)
        np.testing.assert_allclose(got.variances[i], oracle.covariances_[order].reshape(-1), atol=1e-9)


def low_half(weights, means, variances, x):
    """Whether the component with the smaller mean is the likelier one."""
    log_p = np.log(weights) - (np.log(variances) + (x[:, None] - means) ** 2 / variances) / 2
    low = np.argmin(means)
    return log_p[:, low] > log_p[:, 1 - low]


@pytest.mark.parametrize("size", [4000, pytest.param(50_000, marks=pytest.mark.long)])
def test_flips_at_one_half_against_scikit_learns_seeds(size, rng):
    """The usual call of methods for noisy labels: about as many samples change sides between it and a seed of scikit-learn as
    between two of its seeds. They are few."""
    usual = {"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}
    ours, theirs = [], []
    for noise, symmetric, late in itertools.product((0.2, 0.4, 0.6, 0.8), (True, False), (False, True)):
        x = testing.make_noisy_label_losses(size, noise, rng, symmetric=symmetric, late=late)
        fit = paa_gpu.fit_gmm_1d(torch.from_numpy(x), init="kmeans", **usual)
        mine = low_half(*(part[0].numpy() for part in fit[:3]), x)
        seeds = []
        for seed in range(4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                oracle = GaussianMixture(2, random_state=seed, **usual).fit(x[:, None])
            seeds.append(low_half(oracle.weights_, oracle.means_[:, 0], oracle.covariances_[:, 0, 0], x))
        ours += [int((mine != seed).sum()) for seed in seeds]
        theirs += [int((a != b).sum()) for a, b in itertools.combinations(seeds, 2)]
    print(
        f"{size} losses, flips in the mean and at most: ours and a seed {np.mean(ours)}, {max(ours)}; two seeds {np.mean(theirs)}, {max(theirs)}"
    )
    assert np.mean(ours) <= 2 * np.mean(theirs)
    assert max(ours) <= size / 100


def evenly_spaced() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose two best divisions have the same sum of squares but for rounding, and their lengths."""
    lengths = [3, 5, 7, 29]
    rows = [[first + step * i * (i < n) for i in range(29)] for first in (0.1, 0.3) for step in (0.1, 0.3, 0.9) for n in lengths]
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(lengths * 6)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_of_two_best_divisions_the_smaller_low_group_counts(dtype):
    x, count = evenly_spaced()
    far = 1e3  # so that nothing changes its group in the one iteration
    fit = paa_gpu.fit_gmm_1d(x * far, count, init="kmeans", max_iter=1, precision=dtype)
    torch.testing.assert_close(fit.weights[:, 0].double() * count, count // 2, atol=0.2, rtol=0, check_dtype=False)


def test_given_values_override_the_start_one_by_one(rng):
    """As in scikit-learn: the rest is that of its k-means start."""
    row = clusters(2, 50, rng)
    x, shifted = torch.from_numpy(row), (row - row.min())[:, None]
    for given in ({"weights_init": [0.3, 0.7]}, {"means_init": [0.1, 0.9]}, {"precisions_init": [3.0, 5.0]}):
        name, value = next(iter(given.items()))
        mine = torch.tensor(value, dtype=torch.float64) + (row.min() if name == "means_init" else 0)
        theirs = np.array(value) if name == "weights_init" else np.array(value).reshape(2, 1, 1)[:, :, 0]
        theirs = theirs.reshape(2, 1, 1) if name == "precisions_init" else theirs
        got = paa_gpu.fit_gmm_1d(x, init="kmeans", max_iter=1, tol=0.0, **{name: mine})
        same = False
        for seed in range(4):  # its k-means numbers the groups at random
            oracle = GaussianMixture(2, max_iter=1, tol=0.0, random_state=seed, **{name: theirs})
            with pytest.warns(UserWarning, match="converge"):
                oracle.fit(shifted)
            same |= np.allclose(got.means[0], oracle.means_[:, 0] + row.min(), atol=1e-9)
        assert same, name


def test_philox_has_its_published_values():
    """Random123's known answers: key and counter all zeros, and all ones. The library's counter ends in a zero."""
    assert starts.philox(0, 0, 0, 0) == philox(0, 0, 0, 0) == 0x6627E8D5
    ones = 2**32 - 1
    assert philox(2**64 - 1, ones, ones, ones, ones) == 0x408F276D
    assert starts.philox(2**63 - 1, 7, 8, 9) == philox(2**63 - 1, 7, 8, 9)


def philox(seed, c0, c1, c2, c3=0):
    counter, key = [c0, c1, c2, c3], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(b >> 32) ^ counter[1] ^ key[0], b % 2**32, (a >> 32) ^ counter[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter[0]


def positions(seed, row, attempt, size, k):
    """Floyd's sample without replacement."""
    chosen = []
    for j in range(k):
        bound = size - k + j
        drawn = philox(seed, j, attempt, row) * (bound + 1) >> 32
        chosen.append(bound if drawn in chosen else drawn)
    return chosen


@numba.njit
def drawn_positions(seed, row, attempt, size, k):
    """Those of the library."""
    chosen = np.empty(k, np.int64)
    starts.draw(seed, row, attempt, size, chosen)
    return chosen


def test_drawn_positions_are_distinct_and_fair():
    seen = np.zeros(5)
    for row in range(2000):
        drawn = drawn_positions(3, row, 0, 5, 3)
        assert drawn.tolist() == positions(3, row, 0, 5, 3)
        assert len(set(drawn)) == 3 and min(drawn) >= 0 and max(drawn) < 5
        seen[drawn] += 1
    assert abs(seen - 1200).max() < 6 * np.sqrt(2000 * 0.6 * 0.4)


@pytest.mark.parametrize("k", [2, 3])
def test_the_best_of_random_starts(k, rng):
    rows = [testing.make_losses(shape, 30, rng) for shape in SHAPES]
    x = torch.from_numpy(np.stack(rows))
    got = paa_gpu.fit_gmm_1d(x, n_components=k, init="random", n_init=6, generator=2**40 + 5)
    for i, row in enumerate(rows):
        drawn = [positions(2**40 + 5, i, attempt, 30, k) for attempt in range(6)]
        begin = [extended_em.start(row, extended_em.centres(row, k, "random", np.array(position))) for position in drawn]
        fits = [extended_em.fit(row, **initial) for initial in begin]
        highest = max(fit.lower_bound for fit in fits)
        assert_close(got, next(fit for fit in fits if fit.lower_bound >= highest - 1e-9), i)


def test_of_equally_good_starts_the_first_is_kept(rng):
    """They end within 1e-9 of one another, after different numbers of iterations."""
    options, later = {"tol": 1e-11, "max_iter": 5000}, 0
    for shape in SHAPES:
        row = testing.make_losses(shape, 30, rng)
        got = paa_gpu.fit_gmm_1d(torch.from_numpy(row)[None], init="random", n_init=6, generator=3, **options)
        drawn = [np.array(positions(3, 0, attempt, 30, 2)) for attempt in range(6)]
        fits = [
            extended_em.fit(row, **options, **extended_em.start(row, extended_em.centres(row, 2, "random", p))) for p in drawn
        ]
        best = [fit for fit in fits if fit.lower_bound >= max(fit.lower_bound for fit in fits) - 1e-9]
        highest = max(best, key=lambda fit: fit.lower_bound)
        later += highest.n_iter != best[0].n_iter
        assert got.n_iter.tolist() == [best[0].n_iter]
    assert later


def test_seeds(rng):
    x = torch.from_numpy(rng.normal(size=(20, 50)))

    def fit(generator, **options):
        return paa_gpu.fit_gmm_1d(x, n_components=3, init="random", generator=generator, **options).means

    assert torch.equal(fit(7), fit(7)) and not torch.equal(fit(7), fit(8))
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    assert torch.equal(fit(first), fit(second)) and not torch.equal(fit(first), fit(torch.Generator().manual_seed(1)))
    torch.manual_seed(4)
    wanted = fit(None)
    torch.manual_seed(4)
    assert torch.equal(fit(None), wanted)
    state = torch.get_rng_state()
    paa_gpu.fit_gmm_1d(x, init="kmeans", n_init=10)  # draws nothing
    assert torch.equal(torch.get_rng_state(), state)
    one, more = (paa_gpu.fit_gmm_1d(x, init="random", n_init=n, generator=1).lower_bound for n in (1, 10))
    assert (more >= one).all() and (more > one).any()


# What is not a fit ---------------------------------------------------------------------------------------------------------

CLUSTERS = torch.tensor([[0.1, 0.2, 0.15, 0.9, 1.0, 1.1]], dtype=torch.float64)


def assert_void(fit, row=0):
    assert (bool(fit.valid[row]), int(fit.n_iter[row]), bool(fit.converged[row])) == (False, 0, False)
    for value in (fit.weights, fit.means, fit.variances, fit.lower_bound):
        assert value[row].isnan().all()


@pytest.mark.parametrize("n_components", [1, 2, 3])
@pytest.mark.parametrize("max_iter", [1, 100])
@pytest.mark.parametrize("init", ["minmax", "quantile", "kmeans", "random"])
def test_equal_values_without_regularisation(init, max_iter, n_components):
    """scikit-learn raises."""
    x = torch.cat([torch.full((1, 20), 0.5), torch.arange(20.0)[None] ** 1.5])
    fit = paa_gpu.fit_gmm_1d(x, reg_covar=0.0, init=init, max_iter=max_iter, n_components=n_components, generator=0)
    assert_void(fit)
    assert fit.valid[1] and fit.means[1].isfinite().all()


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("init", ["minmax", "kmeans"])
@pytest.mark.parametrize("n_components", [2, 3])
def test_values_of_any_size_are_fitted_or_not_valid(n_components, init, precision):
    x = torch.tensor([[1.0, 1.1, 1.2, 5.0, 5.1, 5.3, 5.4]], dtype=torch.float64)
    valid = []
    for power in range(-44, 39):
        fit = paa_gpu.fit_gmm_1d(
            (x * 10.0**power).to(getattr(torch, precision)), precision=precision, init=init, n_components=n_components
        )
        valid.append(bool(fit.valid[0]))
        if not valid[-1]:
            assert_void(fit)
        else:
            assert all(value.isfinite().all() for value in fit[:4]), power
            assert (fit.variances > 0).all()
            assert ((fit.means >= x.min() * 10.0**power * 0.99) | (fit.weights < 1e-3)).all()
            assert (fit.means <= x.max() * 10.0**power * 1.01).all()
    assert all(valid[:60]) and (precision == "float64") == valid[-1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["weights_init", "means_init", "precisions_init"])
@pytest.mark.parametrize("init", ["minmax", "kmeans"])
def test_a_warm_start_recovers(init, name, bad):
    """From a row of an earlier fit that was not valid a row starts as if nothing had been given."""
    x = CLUSTERS.expand(2, -1)
    wanted = paa_gpu.fit_gmm_1d(x, init=init)
    good = {"weights_init": [0.5, 0.5], "means_init": [0.15, 1.0], "precisions_init": [9.0, 9.0]}
    given = {key: torch.tensor([value, value], dtype=torch.float64) for key, value in good.items()}
    given[name][0, 1] = bad
    got = paa_gpu.fit_gmm_1d(x, init=init, **given)
    assert got.valid.all()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got[:7], wanted[:7], strict=True))
    alone = paa_gpu.fit_gmm_1d(x[1:], init=init, **{key: value[1:] for key, value in given.items()})
    assert all(torch.equal(a[1], b[0]) for a, b in zip(got[:7], alone[:7], strict=True))


def test_initial_values_that_make_no_mixture_where_nobody_may_wait():
    """The operator, which is all that a CUDA tensor meets: the row is not valid."""
    x = CLUSTERS.expand(4, -1).contiguous()
    weights = torch.tensor([[0.5, 0.5], [5.0, 5.0], [1.5, -0.5], [0.4, 0.6]])
    precisions = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    for k in (2, 3):
        more = [torch.cat([part, torch.full((4, k - 2), fill)], 1) for part, fill in ((weights, 0.0), (precisions, 1.0))]
        fit = paa_gpu._ops.fit_gmm_1d(x, None, None, more[0], None, more[1], "diag", 1e-3, 1e-6, 100, "float64", k)
        assert fit[-1].tolist() == [True, False, False, False]


def test_weights_of_narrow_types_sum_to_one_within_their_digits():
    x = CLUSTERS.float()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        weights = torch.tensor([1 / 3, 2 / 3]).to(dtype)
        assert paa_gpu.fit_gmm_1d(x, weights_init=weights).valid.all()


def test_fewer_values_than_components():
    x = torch.arange(12.0).view(2, 6)
    fit = paa_gpu.fit_gmm_1d(x, torch.tensor([3, 4]), n_components=4)
    assert fit.valid.tolist() == [False, True]
    assert_void(fit)


def test_predict_of_what_is_not_finite():
    fit = paa_gpu.fit_gmm_1d(CLUSTERS)
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.2]])
    assert fit.predict(x).tolist() == [[-1, -1, -1, 0]]
    assert fit.predict_proba(x).isnan().all(-1).tolist() == [[True, True, True, False]]


def test_random_starts_under_another_default_device():
    """They are drawn on the CPU, from torch's generator or a given one."""
    wanted = paa_gpu.fit_gmm_1d(CLUSTERS, init="random", generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        got = paa_gpu.fit_gmm_1d(CLUSTERS, init="random", generator=generator)
        assert paa_gpu.fit_gmm_1d(CLUSTERS, init="random").valid.all()
    assert torch.equal(got.means, wanted.means)


def test_initial_values_that_cannot_be_read():
    """Under a transform, and without values, they are not checked. A view with the negative bit has values."""
    start = torch.complex(torch.zeros(2), torch.tensor([-0.1, -0.9])).conj().imag
    assert start.is_neg()
    wanted = paa_gpu.fit_gmm_1d(CLUSTERS, means_init=start.clone().resolve_neg())
    assert torch.equal(paa_gpu.fit_gmm_1d(CLUSTERS, means_init=start).means, wanted.means)
    x, start = CLUSTERS.clone(), start.resolve_neg()
    torch.func.grad(lambda x: x.sum() + paa_gpu.fit_gmm_1d(x, means_init=start).means.detach().sum())(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert paa_gpu.fit_gmm_1d(torch.empty(2, 9), means_init=torch.empty(2)).means.shape == (2, 2)


def test_a_fit_without_rows_reads_a_list_without_rows():
    fit = paa_gpu.fit_gmm_1d(torch.empty(0, 5))
    assert fit.predict([]) == fit.predict_proba([]) == []
    assert fit.score([]).shape == fit.bic([]).shape == (0,)


def test_one_row_alone():
    x = CLUSTERS[0]
    fit = paa_gpu.fit_gmm_1d(x)
    wanted = paa_gpu.fit_gmm_1d(x[None])
    assert all(torch.equal(a, b) for a, b in zip(fit[:7], wanted[:7], strict=True))
    for method in ("predict", "predict_proba", "score_samples"):
        assert torch.equal(getattr(fit, method)(x), getattr(wanted, method)(x[None])[0])
    assert torch.equal(fit.bic(x), wanted.bic(x[None]))


def test_a_start_that_is_no_fit_does_not_win():
    row = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]], dtype=torch.float64)
    options = {"init": "random", "reg_covar": 0.0, "max_iter": 1}
    without_fit = [seed for seed in range(60) if not paa_gpu.fit_gmm_1d(row, generator=seed, **options).valid]
    assert without_fit
    for seed in without_fit:
        assert paa_gpu.fit_gmm_1d(row, generator=seed, n_init=8, **options).valid


@pytest.mark.parametrize("k", [2, 3])
def test_given_values_of_each_row_with_several_starts(k, rng):
    rows = torch.from_numpy(rng.normal(size=(4, 30)))
    given = {
        "weights_init": torch.from_numpy(rng.dirichlet([3.0] * k, 4)),
        "means_init": torch.from_numpy(rng.normal(size=(4, k))),
        "precisions_init": torch.from_numpy(rng.uniform(1, 4, (4, k))),
        "n_components": k,
    }
    several, one = (paa_gpu.fit_gmm_1d(rows, **given, **more) for more in ({"init": "random", "n_init": 3, "generator": 1}, {}))
    assert all(map(torch.equal, several[:7], one[:7]))


def test_one_value_is_no_fit_of_one_component():
    rows = torch.tensor([[3.0, 1.0], [3.0, 4.0]])
    assert paa_gpu.fit_gmm_1d(rows, torch.tensor([1, 2]), n_components=1).valid.tolist() == [False, True]


def test_a_start_that_is_not_finite_starts_anew(rng):
    """Of any number of components, from what `init` says."""
    row = torch.tensor([[0.1, 0.2, 0.15, 0.9, 1.0, 1.1, 5.0, 5.2]], dtype=torch.float64)
    given = {
        "weights_init": torch.tensor([torch.nan, 0.5, 0.5]),
        "means_init": torch.arange(3.0),
        "precisions_init": torch.ones(3),
    }
    broken, none = (paa_gpu.fit_gmm_1d(row, init="kmeans", n_components=3, **initial) for initial in (given, {}))
    assert all(map(torch.equal, broken[:7], none[:7]))


def test_one_component_starts_in_the_middle():
    row = np.array([0.0, 1.0, 5.0])
    got = paa_gpu.fit_gmm_1d(torch.from_numpy(row), n_components=1, max_iter=1)
    assert_close(got, extended_em.fit(row, max_iter=1, weights=np.ones(1), means=np.array([2.5])), 0)


def test_a_quantile_is_a_value_of_the_row():
    """The next number above it would move the boundary past the value behind it."""
    row = torch.tensor([0.0, 0, 0, 1 + 2.0**-52, 2, 2, 2, 3], dtype=torch.float64)
    got = paa_gpu.fit_gmm_1d(row * 1024, init="quantile", max_iter=1)
    assert got.weights[0].cpu().numpy() == pytest.approx([0.375, 0.625], abs=1e-3)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_smaller_low_group_counts_in_any_order(dtype):
    x, count = evenly_spaced()
    rows = [row[:n].flip(0) * 1e3 for row, n in zip(x, count.tolist(), strict=True)]
    fit = paa_gpu.fit_gmm_1d(rows, init="kmeans", max_iter=1, precision=dtype)
    torch.testing.assert_close(fit.weights[:, 0].double() * count, count // 2, atol=0.2, rtol=0, check_dtype=False)


def test_a_group_that_has_no_values_keeps_its_centre():
    """Of five quantiles three are equal, so two groups are empty."""
    row = np.array([0.0] + [5.0] * 12 + [6, 7, 9])
    start = extended_em.start(row, extended_em.centres(row, 5, "kmeans"))
    got = paa_gpu.fit_gmm_1d(torch.from_numpy(row), n_components=5, init="kmeans", max_iter=1)
    np.testing.assert_allclose(got.means[0], [0, 5, 0, 6.49997, 9], atol=1e-4)
    assert_close(got, extended_em.fit(row, "diag", 1e-3, 1e-6, 1, *start.values()), 0)
