"""Reading mixtures out: against scikit-learn and the formula in extended precision, in every form of the input."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from extended_em import REAL, log_densities
from sklearn.mixture import GaussianMixture
from synchronisations import Synchronisations

import paa_gpu
from paa_gpu.mixture import GaussianMixture1D

READERS = ("predict", "predict_proba", "low_probability", "score_samples")
COMPONENTS = (1, 2, 3, 8)


def mixtures(rng, rows, components, dtype=torch.float64, covariance_type="diag"):
    """Parameters of `rows` mixtures, as a fit holds them."""
    weights, means = rng.dirichlet(np.full(components, 2), rows), rng.normal(0, 2, (rows, components))
    variances = rng.uniform(0.1, 2, (rows, components))
    if covariance_type == "tied":
        variances[:] = variances[:, :1]
    flag = torch.ones(rows, dtype=torch.bool)
    parameters = (torch.from_numpy(values).to(dtype) for values in (weights, means, variances))
    return GaussianMixture1D(*parameters, torch.zeros(rows, dtype=dtype), flag.long(), flag, flag, covariance_type)


def wanted(gmm, row, x):
    """What the readers answer for the values x of a row, in extended precision."""
    weights, means, variances = (values[row].double().numpy().astype(REAL) for values in gmm[:3])
    with np.errstate(invalid="ignore", divide="ignore"):
        log_p = log_densities(np.asarray(x, REAL), weights, means, variances)
        best = log_p.max(1, keepdims=True)
        share = np.exp(log_p - best)
        score = (best + np.log(share.sum(1, keepdims=True)))[:, 0]
        share /= share.sum(1, keepdims=True)
    score[np.isneginf(best[:, 0])] = -np.inf
    nobody = np.isnan(share).any(1)
    return {
        "predict": np.where(nobody, -1, log_p.argmax(1)),
        "predict_proba": share,
        "low_probability": share[:, means.argmin()],
        "score_samples": score,
    }


def assert_row(gmm, row, x, answers, tolerance=1e-14):
    """The answers for one row: within the tolerance of max(1, |value|)."""
    want_of = wanted(gmm, row, x)
    for name, got in answers.items():
        want = want_of[name]
        if name == "predict":
            assert got.tolist() == want.tolist(), name
            continue
        assert np.isfinite(want).tolist() == got.isfinite().numpy().tolist(), name
        finite = np.isfinite(want)
        error = np.abs(got.double().numpy() - want)[finite] / np.maximum(1, np.abs(want[finite]))
        assert error.max(initial=0) <= tolerance, (name, error.max())
        assert np.array_equal(got.numpy()[~finite], want[~finite].astype(float), equal_nan=True), name


def read(gmm, *data):
    return {name: getattr(gmm, name)(*data) for name in READERS}


def of_row(answers, row, stop=None):
    return {name: answer[row][:stop] for name, answer in answers.items()}


@pytest.mark.parametrize("components", COMPONENTS)
@pytest.mark.parametrize("length", [1, 45, 300, 40_000])
def test_against_extended_precision(components, length, rng):
    """One block of values, several, and several spans."""
    x = torch.from_numpy(rng.normal(0, 3, (3, length)))
    gmm = mixtures(rng, 3, components)
    answers = read(gmm, x)
    for row in range(3):
        assert_row(gmm, row, x[row].numpy(), of_row(answers, row))


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("components", [1, 2, 5])
def test_against_scikit_learn(components, covariance_type, rng):
    x = rng.normal(0, 2, 400)
    gmm = mixtures(rng, 1, components, covariance_type=covariance_type)
    shape = {"full": (-1, 1, 1), "tied": (1, 1), "diag": (-1, 1), "spherical": (-1,)}[covariance_type]
    oracle = GaussianMixture(components, covariance_type=covariance_type)
    oracle.weights_, oracle.means_ = gmm.weights[0].numpy(), gmm.means[0].numpy()[:, None]
    variances = gmm.variances[0, :1] if covariance_type == "tied" else gmm.variances[0]
    oracle.precisions_cholesky_ = variances.rsqrt().numpy().reshape(shape)
    rows, column = torch.from_numpy(x)[None], x[:, None]
    close = {"rtol": 1e-12, "atol": 1e-12}
    assert gmm.predict(rows)[0].tolist() == oracle.predict(column).tolist()
    np.testing.assert_allclose(gmm.predict_proba(rows)[0], oracle.predict_proba(column), **close)
    low = oracle.predict_proba(column)[:, oracle.means_.argmin()]
    np.testing.assert_allclose(gmm.low_probability(rows)[0], low, **close)
    np.testing.assert_allclose(gmm.score_samples(rows)[0], oracle.score_samples(column), **close)
    np.testing.assert_allclose(gmm.bic(rows)[0], oracle.bic(column), **close)
    np.testing.assert_allclose(gmm.aic(rows)[0], oracle.aic(column), **close)


@pytest.mark.parametrize("components", [2, 3])
def test_every_form_of_the_input(components, rng):
    """Padded with counts out of range, a list with an empty row, strided, transposed: the values alone decide."""
    gmm = mixtures(rng, 5, components)
    x = torch.from_numpy(rng.normal(0, 3, (5, 20_000)))
    count = torch.tensor([20_000, 7, 0, -3, 90_000])
    sizes = count.clamp(0, 20_000).tolist()
    plain = read(gmm, x)
    padded = read(gmm, torch.where(torch.arange(20_000) < count[:, None], x, torch.inf), count.int())
    listed = read(gmm, [row[:size] for row, size in zip(x, sizes, strict=True)])
    for name in READERS:
        for row, size in enumerate(sizes):
            assert torch.equal(padded[name][row, :size], plain[name][row, :size])
            assert torch.equal(listed[name][row], plain[name][row, :size])
            rest = padded[name][row, size:]
            assert (rest == -1).all() if name == "predict" else rest.isnan().all()
    for way in (x.T.contiguous().T, torch.stack([x, x], -1)[..., 0], torch.cat([x, x], 1)[:, :20_000]):
        assert not way.is_contiguous()
        for name, answer in read(gmm, way).items():
            assert torch.equal(answer, plain[name]), name
    for row, size in enumerate(sizes):
        alone = gmm._replace(**{name: getattr(gmm, name)[row, None] for name in gmm._fields[:7]})
        # The order of the sums is that of the table's spans.
        for aic in (gmm.aic(x, count), gmm.aic([v[:s] for v, s in zip(x, sizes, strict=True)])):
            torch.testing.assert_close(aic[row], alone.aic([x[row, :size]])[0], rtol=1e-13, atol=0, equal_nan=True)
            assert aic[row].isnan() == (size == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fit_dtype", [torch.float32, torch.float64], ids=str)
def test_dtypes(dtype, fit_dtype, rng):
    """Answers have the dtype of the fit; values are converted to it."""
    gmm = mixtures(rng, 3, 2, fit_dtype)
    for x in (torch.from_numpy(rng.normal(size=(3, 50))).to(dtype), torch.from_numpy(rng.normal(size=(50, 3))).to(dtype).T):
        answers = read(gmm, x)
        assert {answers[name].dtype for name in READERS[1:]} == {gmm.bic(x).dtype} == {fit_dtype}
        assert answers["predict"].dtype == torch.int64
        for row in range(3):
            single = fit_dtype == torch.float32
            assert_row(gmm, row, x[row].to(fit_dtype).double().numpy(), of_row(answers, row), 1e-5 if single else 1e-14)


def test_values_that_are_not_finite_belong_to_nobody(rng):
    for components in COMPONENTS:
        gmm = mixtures(rng, 1, components)
        x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1e200, 0.0]], dtype=torch.float64)
        # 1e200 is finite: its label is the first component, as scikit-learn's is.
        assert gmm.predict(x)[0, :4].tolist() == [-1, -1, -1, 0] and gmm.predict(x)[0, 4] >= 0
        assert gmm.predict_proba(x)[0, :4].isnan().all() and gmm.low_probability(x)[0, :4].isnan().all()
        score = gmm.score_samples(x)[0].tolist()
        assert score[:2] == [-torch.inf] * 2 and np.isnan(score[2]) and score[3] == -torch.inf and np.isfinite(score[4])
        assert gmm.bic(x).isnan().all()


def test_one_row_alone(rng):
    gmm, x = mixtures(rng, 1, 2), torch.from_numpy(rng.normal(size=30))
    for name, answer in read(gmm, x).items():
        assert torch.equal(answer, getattr(gmm, name)(x[None])[0])
    assert gmm.bic(x).shape == (1,)


def test_a_row_that_is_not_valid(rng):
    gmm = paa_gpu.fit_gmm_1d([torch.rand(9), torch.rand(1), torch.rand(9)])
    x = torch.rand(3, 7)
    assert (gmm.predict(x)[1] == -1).all() and (gmm.predict(x)[[0, 2]] >= 0).all()
    for values in (gmm.predict_proba(x), gmm.low_probability(x), gmm.score_samples(x), gmm.bic(x), gmm.aic(x)):
        assert values[1].isnan().all() and values[[0, 2]].isfinite().all()


def test_far_values_keep_their_small_probabilities(rng):
    """Down to 1e-300, in float32 1e-37: not one minus the other."""
    gmm = mixtures(rng, 1, 2)._replace(
        weights=torch.tensor([[0.5, 0.5]]).double(),
        means=torch.tensor([[0.0, 1.0]]).double(),
        variances=torch.ones(1, 2).double(),
    )
    x = torch.tensor([[-600.0, -40.0, 0.5, 41.0, 601.0]]).double()
    want = 1 / (1 + np.exp(x[0].numpy().astype(REAL) - REAL(0.5)))
    np.testing.assert_allclose(gmm.predict_proba(x)[0, :, 0].numpy(), want.astype(float), rtol=1e-12)
    np.testing.assert_allclose(gmm.predict_proba(x)[0, :, 1].numpy(), want[::-1].astype(float), rtol=1e-12)
    single = gmm._replace(**{name: getattr(gmm, name).float() for name in ("weights", "means", "variances")})
    np.testing.assert_allclose(single.low_probability(x[:, 1:4])[0].numpy(), want[1:4].astype(float), rtol=1e-4)


@pytest.mark.parametrize("components", COMPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_label_of_a_value_far_away(components, dtype, rng):
    """All densities are zero there, so the first component is as likely as the others. It has a label, but no probability."""
    gmm = mixtures(rng, 2, components)
    gmm = gmm._replace(**{name: getattr(gmm, name).to(dtype) for name in ("weights", "means", "variances")})
    gmm.weights[1], gmm.means[1], gmm.variances[1] = torch.nan, torch.nan, torch.nan
    x = torch.tensor([[torch.finfo(dtype).max ** 0.75, torch.inf, -torch.inf, torch.nan]] * 2, dtype=dtype)
    assert gmm.predict(x).tolist() == [[0, -1, -1, -1], [-1, -1, -1, -1]]
    assert gmm.predict_proba(x).isnan().all()


def test_a_component_of_weight_zero(rng):
    gmm = mixtures(rng, 1, 2)._replace(weights=torch.tensor([[0.0, 1.0]]).double())
    x = torch.from_numpy(rng.normal(size=(1, 9)))
    assert (gmm.predict(x) == 1).all()
    assert (gmm.predict_proba(x) == torch.tensor([0.0, 1.0])).all() and (gmm.low_probability(x) == gmm.means.argmin()).all()


def test_equal_components_give_the_first(rng):
    gmm = mixtures(rng, 1, 3)
    gmm = gmm._replace(
        weights=gmm.weights[:, :1].expand(1, 3), means=torch.zeros(1, 3).double(), variances=torch.ones(1, 3).double()
    )
    assert (gmm.predict(torch.randn(1, 9)) == 0).all()
    torch.testing.assert_close(
        gmm.low_probability(torch.randn(1, 9)), torch.full((1, 9), 1 / 3, dtype=torch.float64), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("components", COMPONENTS)
def test_sorted(components, rng):
    gmm, x = mixtures(rng, 6, components), torch.from_numpy(rng.normal(0, 3, (6, 30)))
    ordered = gmm.sorted()
    assert (ordered.means.diff(dim=1) > 0).all()
    torch.testing.assert_close(ordered.score_samples(x), gmm.score_samples(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ordered.predict_proba(x)[..., 0], gmm.low_probability(x), rtol=1e-13, atol=1e-15)
    assert torch.equal(gmm.means.gather(1, gmm.predict(x)), ordered.means.gather(1, ordered.predict(x)))
    assert ordered[3:] == gmm[3:]


def test_any_number_of_threads_gives_the_same_bits(rng):
    gmm, x = mixtures(rng, 1, 2), torch.from_numpy(rng.normal(0, 3, (1, 300_000)))
    threads, answers = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            answers.append([*read(gmm, x).values(), gmm.bic(x)])
    finally:
        torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(map(torch.equal, answers[0], other))


@pytest.mark.parametrize("layout", ["float64", "float32", "transposed"])
def test_memory_is_that_of_the_answer(layout, rng):
    """Nothing of the size of the values beside it: 4 MB here, where a span takes 0.3 MB."""
    x = {
        "float64": lambda: torch.zeros(10, 50_000, dtype=torch.float64),
        "float32": lambda: torch.zeros(10, 50_000),
        "transposed": lambda: torch.zeros(50_000, 10).double().T,
    }[layout]()
    gmm = mixtures(rng, 10, 2)
    for name, factor in (("predict_proba", 2), ("low_probability", 1), ("predict", 1), ("score_samples", 1), ("bic", 0)):
        getattr(gmm, name)(x)
        tracemalloc.start()
        getattr(gmm, name)(x)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= factor * 8 * x.numel() + 1.5e6, (name, peak)


def test_nothing_to_read(rng):
    gmm = mixtures(rng, 2, 2)
    for name, shape in (("predict", (2, 0)), ("predict_proba", (2, 0, 2)), ("score_samples", (2, 0))):
        assert getattr(gmm, name)(torch.zeros(2, 0)).shape == shape
        assert [len(row) for row in getattr(gmm, name)([torch.zeros(0)] * 2)] == [0, 0]
    none = mixtures(rng, 0, 2)
    assert none.predict(torch.zeros(0, 5)).shape == (0, 5) and none.bic(torch.zeros(0, 5)).shape == (0,)


@pytest.mark.parametrize("name", ["predict", "predict_proba", "low_probability", "score_samples", "score", "bic", "aic"])
def test_nothing_waits(name, rng):
    gmm = mixtures(rng, 3, 2)
    rows = [torch.from_numpy(rng.normal(size=number)) for number in (4, 1, 9)]
    table, count = torch.stack([rows[2]] * 3), torch.tensor([4, 1, 9])
    with Synchronisations() as waits:
        getattr(gmm, name)(rows)
        getattr(gmm, name)(table, count)
    assert waits.count == 0


def test_no_graph(rng):
    x = torch.rand(2, 9, requires_grad=True)
    gmm = mixtures(rng, 2, 2)
    assert not any(answer.requires_grad for answer in (*read(gmm, x).values(), gmm.bic(x)))


@pytest.mark.parametrize("k", [2, 3])
def test_far_values_in_float32(k):
    """Their densities are no numbers any more."""
    one, flag = torch.ones(1), torch.ones(1, dtype=torch.bool)
    means = torch.tensor([[0.0, 1.0, 1.0][:k]])
    gmm = GaussianMixture1D(torch.full((1, k), 1 / k), means, torch.ones(1, k), one, one.long(), flag, flag)
    assert gmm.low_probability(torch.tensor([[-600.0, -150.0, 150.0, 601.0]])).tolist() == [[1.0, 1.0, 0.0, 0.0]]
