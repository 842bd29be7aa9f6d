"""The mixture fit: against a direct EM in extended precision, and against scikit-learn."""

from __future__ import annotations

import extended_em
import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

import paa_gpu
from paa_gpu import testing
from paa_gpu.em import COVARIANCE_TYPES

LENGTHS = (1, 2, 3, 31, 32, 33, 45, 63, 64, 65, 1000, 4096)
SHAPES = tuple(shape for shape in testing.LOSS_SHAPES if shape != "one")


def draw_rows(rng, rows, size=45, scale=1.0):
    return [testing.make_losses(SHAPES[i % len(SHAPES)], size, rng) * scale for i in range(rows)]


def pad(rows, dtype=torch.float64):
    x = torch.full((len(rows), max(map(len, rows))), torch.nan, dtype=dtype)
    for row, values in zip(x, rows, strict=True):
        row[: len(values)] = torch.from_numpy(values)
    return x, torch.tensor([len(row) for row in rows])


def assert_close(got, wanted: extended_em.Fit, row: int, tolerance: float = 1e-9):
    """Parameters within the tolerance of max(1, |value|); the same number of iterations."""
    assert (int(got.n_iter[row]), bool(got.converged[row])) == (wanted.n_iter, wanted.converged)
    for name in ("weights", "means", "variances", "lower_bound"):
        value, want = getattr(got, name)[row].double().numpy(), np.asarray(getattr(wanted, name), float)
        assert np.all(np.abs(value - want) <= tolerance * np.maximum(1, np.abs(want))), (name, row, value, want)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_parameters_against_extended_precision(covariance_type, scale, rng):
    rows = draw_rows(rng, 60, scale=scale)
    got = paa_gpu.fit_gmm_1d(*pad(rows), covariance_type=covariance_type)
    for i, row in enumerate(rows):
        assert_close(got, extended_em.fit(row, covariance_type), i)


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_of_any_length(length, rng):
    rows = [testing.make_losses("bimodal", length, rng) for _ in range(3)]
    got = paa_gpu.fit_gmm_1d(torch.tensor(np.stack(rows)), torch.full((3,), length))
    assert got.valid.tolist() == [length >= 2] * 3
    for i, row in enumerate(rows):
        if length >= 2:
            assert_close(got, extended_em.fit(row), i)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_against_scikit_learn(covariance_type, rng):
    """Compared where scikit-learn's variances, E[x^2] - mean^2 but for "full", have the digits."""
    rows, left_out = draw_rows(rng, 200), 0
    got = paa_gpu.fit_gmm_1d(*pad(rows), covariance_type=covariance_type)
    for i, row in enumerate(rows):
        shifted = row - row.min()
        shape = {"full": (2, 1, 1), "diag": (2, 1), "spherical": (2,), "tied": (1, 1)}[covariance_type]
        oracle = GaussianMixture(
            2, covariance_type=covariance_type, weights_init=[0.5, 0.5], means_init=[[0.0], [shifted.max()]],
            precisions_init=np.ones(shape),
        ).fit(shifted[:, None])  # fmt: skip
        assert (got.n_iter[i], got.converged[i]) == (oracle.n_iter_, oracle.converged_)
        variances = np.broadcast_to(oracle.covariances_.reshape(-1), 2)
        if shifted.max() ** 2 * np.finfo(float).eps / variances.min() >= 1e-11:
            left_out += 1
            continue
        np.testing.assert_allclose(got.weights[i], oracle.weights_, rtol=0, atol=1e-9)
        np.testing.assert_allclose(got.means[i], oracle.means_[:, 0] + row.min(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got.variances[i], variances, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got.lower_bound[i], oracle.lower_bound_, rtol=1e-9, atol=1e-9)
        x = torch.from_numpy(row)[None]
        one = paa_gpu.fit_gmm_1d(x, covariance_type=covariance_type)
        np.testing.assert_allclose(one.score_samples(x)[0], oracle.score_samples(shifted[:, None]), atol=1e-8)
        np.testing.assert_allclose(one.predict_proba(x)[0], oracle.predict_proba(shifted[:, None]), atol=1e-8)
        assert one.predict(x)[0].tolist() == oracle.predict(shifted[:, None]).tolist()
        np.testing.assert_allclose(one.bic(x), oracle.bic(shifted[:, None]), rtol=1e-8)
        np.testing.assert_allclose(one.aic(x), oracle.aic(shifted[:, None]), rtol=1e-8)
    print(f"{covariance_type}: {left_out} of {len(rows)} rows left out")
    # Left out is what collapses onto reg_covar, tight clusters and a few pairs (measured: 30 to 47 rows).
    assert left_out <= len(rows) * 0.3


def test_values_close_together_keep_their_digits(rng):
    """Where scikit-learn's float32 fit raises "ill-defined empirical covariance", and E[x^2] - mean^2 has no digit left."""
    x = torch.from_numpy(1e4 + rng.normal(size=(5, 45)) * 1e-3).float()
    with pytest.raises(ValueError, match="ill-defined empirical covariance"):
        row = x[0].numpy()[:, None]
        initial = {"weights_init": [0.5, 0.5], "means_init": [row.min(0), row.max(0)], "precisions_init": [[1.0], [1.0]]}
        GaussianMixture(2, covariance_type="diag", **initial).fit(row)
    got = paa_gpu.fit_gmm_1d(x)
    for i, row in enumerate(x.double().numpy()):
        assert_close(got, extended_em.fit(row), i)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("each", [False, True], ids=["one for all rows", "one for each"])
def test_given_initial_values(covariance_type, each, rng):
    rows = draw_rows(rng, 14)
    shape = (len(rows),) if each else ()
    weights = rng.dirichlet([2, 2], shape)
    means = rng.normal(1, 1, (*shape, 2))
    precisions = rng.uniform(0.5, 4, (*shape, 1 if covariance_type == "tied" else 2))
    got = paa_gpu.fit_gmm_1d(
        *pad(rows), covariance_type=covariance_type, weights_init=torch.tensor(weights), means_init=torch.tensor(means),
        precisions_init=torch.tensor(precisions),
    )  # fmt: skip
    for i, row in enumerate(rows):
        initial = (weights[i], means[i], precisions[i]) if each else (weights, means, precisions)
        assert_close(got, extended_em.fit(row, covariance_type, 1e-3, 1e-6, 100, *initial), i)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("means_init", (1e39, 3)),
        ("precisions_init", (1e-46, 1)),
        ("precisions_init", (1e300, 1)),
        ("weights_init", (1 / 3, 2 / 3)),
    ],
)
@pytest.mark.parametrize("n_components", [2, 3])
def test_a_float32_fit_rounds_its_initial_values_first(name, values, n_components, rng):
    """What becomes infinite is not given; a precision that becomes 0 is none."""
    x = torch.from_numpy(rng.normal(size=(2, 20)))
    given = torch.tensor([*values, *[0.0 if name == "weights_init" else 1.0] * (n_components - 2)], dtype=torch.float64)
    options = {"precision": "float32", "n_components": n_components}
    got = paa_gpu.fit_gmm_1d(x, **{name: given}, **options)
    if given.float().isinf().any():
        assert got.valid.all()
        assert torch.equal(got.means, paa_gpu.fit_gmm_1d(x, **options).means)
    elif (given.float() == 0).any() and name == "precisions_init":
        assert not got.valid.any()
    else:
        assert got.valid.all()
        assert torch.equal(got.means, paa_gpu.fit_gmm_1d(x, **{name: given.float()}, **options).means)


def test_initial_values_one_by_one(rng):
    x = torch.from_numpy(rng.normal(size=(3, 20)))
    means = torch.tensor([-0.5, 0.5])
    got = paa_gpu.fit_gmm_1d(x, means_init=means)
    for i, row in enumerate(x.numpy()):
        assert_close(got, extended_em.fit(row, means=means.numpy()), i)


@pytest.mark.parametrize("options", [{"tol": 1e-8}, {"tol": 0.0, "max_iter": 7}, {"max_iter": 1}, {"reg_covar": 0.1}], ids=str)
def test_options(options, rng):
    rows = draw_rows(rng, 14)
    got = paa_gpu.fit_gmm_1d(*pad(rows), **options)
    for i, row in enumerate(rows):
        assert_close(got, extended_em.fit(row, **options), i)


def test_not_converged_is_no_error(rng):
    x = torch.from_numpy(rng.normal(size=(4, 50)))
    got = paa_gpu.fit_gmm_1d(x, tol=1e-12, max_iter=3)
    assert got.n_iter.tolist() == [3] * 4 and not got.converged.any() and got.valid.all()


def test_rows_that_cannot_be_fitted(rng):
    x = torch.from_numpy(rng.normal(size=(6, 8)))
    x[1, 3], x[2, 0], x[3, 7] = torch.nan, torch.inf, -torch.inf
    plain = paa_gpu.fit_gmm_1d(x[[0, 5]])
    got = paa_gpu.fit_gmm_1d(x, torch.tensor([8, 8, 8, 8, 1, 8]))
    assert got.valid.tolist() == [True, False, False, False, False, True]
    for value in (got.weights, got.means, got.variances, got.lower_bound):
        assert value[1:5].isnan().all()
    assert not got.converged[1:5].any() and (got.n_iter[1:5] == 0).all()
    for a, b in zip(plain[:7], got[:7], strict=True):
        assert torch.equal(a, b[[0, 5]])
    assert (got.predict(x)[1:5] == -1).all() and got.score_samples(x)[1:5].isnan().all()


@pytest.mark.parametrize("n_components", [2, 3])
@pytest.mark.parametrize("size", [5, 100])
def test_a_component_that_has_shrunk_to_a_point_is_no_fit(size, n_components):
    """Also if no iteration follows that would divide by its variance. scikit-learn raises an error."""
    equal = torch.full((1, size), 2.0)
    assert not paa_gpu.fit_gmm_1d(equal, n_components=n_components, reg_covar=0.0, max_iter=1).valid
    assert paa_gpu.fit_gmm_1d(equal, n_components=n_components, max_iter=1).valid


def test_padding_is_not_read(rng):
    rows = draw_rows(rng, 14)
    x, count = pad(rows)
    other = torch.where(x.isnan(), torch.tensor(-1e30, dtype=x.dtype), x)
    for a, b in zip(paa_gpu.fit_gmm_1d(x, count)[:7], paa_gpu.fit_gmm_1d(other, count.int())[:7], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [-5, 0, 1000])
def test_a_count_out_of_range_is_clamped(count):
    got = paa_gpu.fit_gmm_1d(torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([count]))
    assert got.valid.tolist() == [count > 0]


def test_a_list_of_ragged_rows_equals_each_alone(rng):
    rows = [torch.from_numpy(testing.make_losses("bimodal", n, rng)) for n in (45, 0, 2, 1000, 1, 7)]
    got = paa_gpu.fit_gmm_1d(rows)
    assert got.valid.tolist() == [True, False, True, True, False, True]
    labels, scores, resp = got.predict(rows), got.score_samples(rows), got.predict_proba(rows)
    bic, aic = got.bic(rows), got.aic(rows)
    for i, row in enumerate(rows):
        if len(row) < 2:
            assert bic[i].isnan()
            continue
        alone = paa_gpu.fit_gmm_1d(row[None])
        # The sums of a kernel that makes room for longer rows are ordered otherwise.
        for a, b in zip(got[:7], alone[:7], strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(labels[i], alone.predict(row[None])[0])
        torch.testing.assert_close(scores[i], alone.score_samples(row[None])[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(resp[i], alone.predict_proba(row[None])[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(bic[i], alone.bic(row[None])[0])
        torch.testing.assert_close(aic[i], alone.aic(row[None])[0])


def test_methods_leave_padding_out(rng):
    rows = draw_rows(rng, 7)
    x, count = pad(rows)
    x = x.nan_to_num(3.0)
    got = paa_gpu.fit_gmm_1d(x, count)
    padding = torch.arange(x.shape[1]) >= count[:, None]
    assert torch.equal(got.predict(x, count) == -1, padding)
    assert torch.equal(got.score_samples(x, count).isnan(), padding)
    torch.testing.assert_close(got.predict_proba(x, count).sum(-1)[~padding], torch.ones(int(count.sum()), dtype=x.dtype))
    as_list = [torch.from_numpy(row) for row in rows]
    torch.testing.assert_close(got.bic(x, count), got.bic(as_list))
    torch.testing.assert_close(got.aic(x, count), got.aic(as_list))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_losses_of_lower_precision_are_fitted_in_float64(dtype, rng):
    x = torch.from_numpy(rng.gamma(2, size=(5, 45))).to(dtype)
    for a, b in zip(paa_gpu.fit_gmm_1d(x)[:7], paa_gpu.fit_gmm_1d(x.double())[:7], strict=True):
        assert torch.equal(a, b)


def test_float32_fit_agrees_with_float64(rng):
    """Measured: of 2,100 rows of all shapes none takes another number of iterations, and weights and means agree to 7.3e-6."""
    rows = draw_rows(rng, 2100)
    x, count = pad(rows, torch.float32)
    single, double = paa_gpu.fit_gmm_1d(x, count, precision="float32"), paa_gpu.fit_gmm_1d(x, count)
    assert single.means.dtype == single.lower_bound.dtype == torch.float32
    assert single.valid.all()
    same = single.n_iter == double.n_iter
    error = max(
        float((getattr(single, name)[same].double() - getattr(double, name)[same]).abs().max()) for name in ("weights", "means")
    )
    print(f"float32: {int((~same).sum())} of {len(rows)} rows take another number of iterations; parameters within {error:.1e}")
    assert (~same).float().mean() <= 0.002
    assert error <= 3e-5


def test_views_need_no_copy_of_the_callers(rng):
    x = torch.from_numpy(rng.normal(size=(45, 10)))
    for a, b in zip(paa_gpu.fit_gmm_1d(x.T)[:7], paa_gpu.fit_gmm_1d(x.T.contiguous())[:7], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape):
    got = paa_gpu.fit_gmm_1d(torch.zeros(shape))
    assert got.weights.shape == (shape[0], 2) and not got.valid.any()
    assert got.predict(torch.zeros(shape)).shape == shape


def test_no_graph_is_recorded():
    got = paa_gpu.fit_gmm_1d(torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True))
    assert not any(value.requires_grad for value in got[:7])


@pytest.mark.parametrize("k", [2, 3])
def test_the_first_iteration_never_converges(k, rng):
    """It has no lower bound before it, whatever the tolerance."""
    got = paa_gpu.fit_gmm_1d(torch.from_numpy(rng.gamma(2, size=(1, 45))), tol=100.0, n_components=k)
    assert got.n_iter.tolist() == [2]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_initial_weights_at_the_edge(weights, rng):
    """scikit-learn's guard keeps the other component from a division by zero."""
    row = 50 * testing.make_losses("bimodal", 45, rng)
    got = paa_gpu.fit_gmm_1d(torch.from_numpy(row), weights_init=torch.tensor(weights))
    with np.errstate(divide="ignore"):
        assert_close(got, extended_em.fit(row, weights=np.array(weights)), 0)


@pytest.mark.parametrize("k", [2, 8])
def test_products_of_densities_fit_into_float32(k):
    assert paa_gpu.fit_gmm_1d(torch.full((1, 300), 0.5), n_components=k, precision="float32").valid.all()


def test_equal_values_that_are_large():
    """What pads a row does not count, although its distance from these values overflows."""
    assert paa_gpu.fit_gmm_1d(torch.full((1, 5), 1e200, dtype=torch.float64)).valid.all()


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("low", [True, False])
def test_a_component_that_is_a_point(low, k, precision):
    """Its variance is 0, also where values lie so far away that their density is no number any more.

    32 values of 64 have this mean in any arithmetic.
    """
    few, many = torch.arange(3.0), torch.zeros(32)
    row = torch.cat([many, few + 64] if low else [few, many + 64])
    for max_iter in (1, 100):
        options = {"n_components": k, "precision": precision, "max_iter": max_iter}
        assert not paa_gpu.fit_gmm_1d(row[None], reg_covar=0.0, **options).valid.any()
        assert paa_gpu.fit_gmm_1d(row[None], **options).valid.all()
