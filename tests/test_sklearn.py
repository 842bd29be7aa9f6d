"""The estimator for scikit-learn's users: the same answers as `sklearn.mixture.GaussianMixture` of one feature."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn import mixture
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from paa_gpu.em import COVARIANCE_TYPES
from paa_gpu.integrations import sklearn as integration
from paa_gpu.integrations.sklearn import GaussianMixture

ATTRIBUTES = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_")
SHAPES = {"full": (-1, 1, 1), "tied": (1, 1), "diag": (-1, 1), "spherical": (-1,)}

#: What scikit-learn's estimator does not refuse: arguments, data, message.
OWN_ERRORS = [
    ({}, np.zeros((9, 2)), "`X` must have one feature, [N, 1] or [N], got shape [9, 2]: use sklearn.mixture.GaussianMixture"),
    ({"n_components": 9}, np.zeros(9), "`n_components` must be at most 8, got 9: use sklearn.mixture.GaussianMixture"),
]


def two_clusters(rng, size=300):
    return np.where(rng.random(size) < 0.6, rng.normal(0.3, 0.1, size), rng.normal(1.2, 0.3, size))[:, None]


def assert_same(ours, theirs, x, rtol=1e-9):
    """Every attribute and answer."""
    close = {"rtol": rtol, "atol": rtol}
    assert (ours.n_iter_, ours.converged_, ours.n_features_in_) == (theirs.n_iter_, theirs.converged_, theirs.n_features_in_)
    for name in ATTRIBUTES:
        got, want = getattr(ours, name), getattr(theirs, name)
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        np.testing.assert_allclose(got, want, **close, err_msg=name)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), **close)
    assert ours.predict(x).tolist() == theirs.predict(x).tolist()
    for name in ("score_samples", "score", "bic", "aic"):
        np.testing.assert_allclose(getattr(ours, name)(x), getattr(theirs, name)(x), **close, err_msg=name)
    assert {type(getattr(ours, name)(x)) for name in ("score", "bic", "aic")} == {float}


@pytest.mark.filterwarnings("ignore:Best performing")
@pytest.mark.parametrize("init_params", ["random", "random_from_data", "k-means++"])
@pytest.mark.parametrize("n_init", [1, 3])
def test_a_warm_start_after_no_iteration(init_params, n_init, rng):
    """The last of several starts, as in scikit-learn."""
    x, found = two_clusters(rng), []
    for estimator in (GaussianMixture, mixture.GaussianMixture):
        options = {"init_params": init_params, "random_state": 0, "n_init": n_init, "warm_start": True}
        found.append(estimator(2, max_iter=0, **options).fit(x))
    assert_same(*found, x)
    assert_same(*(each.set_params(max_iter=50).fit(x) for each in found), x)
    assert found[0].lower_bounds_ == pytest.approx(found[1].lower_bounds_, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Best performing")
@pytest.mark.parametrize("init_params", ["random", "random_from_data", "k-means++"])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize(("n_components", "n_init"), [(1, 1), (2, 1), (2, 4), (3, 2)])
def test_random_starts_are_those_of_scikit_learn(init_params, covariance_type, n_components, n_init, rng):
    """Seed by seed; the lower bound of an equal start says that it is the same of several."""
    x = two_clusters(rng)
    options = {"covariance_type": covariance_type, "init_params": init_params, "n_init": n_init, "random_state": 3, "tol": 1e-2}
    ours = GaussianMixture(n_components, **options).fit(x)
    theirs = mixture.GaussianMixture(n_components, **options).fit(x)
    assert_same(ours, theirs, x, rtol=1e-7)
    np.testing.assert_allclose(ours.lower_bound_, theirs.lower_bound_, rtol=1e-9)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_the_k_means_start(covariance_type, rng):
    """Of two components every seed of scikit-learn nears the division that ours is, and stops short of it; the order is theirs."""
    x, options = two_clusters(rng), {"covariance_type": covariance_type, "tol": 1e-8, "max_iter": 2000}
    ours = GaussianMixture(2, **options, n_init=3).fit(x)
    theirs = mixture.GaussianMixture(2, **options, n_init=3, random_state=0).fit(x)
    assert ours.means_[0] < ours.means_[1]
    order = theirs.means_[:, 0].argsort()
    close = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(ours.means_, theirs.means_[order], **close)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x)[:, order], **close)
    np.testing.assert_allclose(ours.lower_bound_, theirs.lower_bound_, rtol=1e-6)
    np.testing.assert_allclose(ours.low_probability(x), ours.predict_proba(x)[:, ours.means_.argmin()], rtol=1e-14)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("given", ["weights_init", "means_init", "precisions_init", "all"])
def test_given_initial_values(covariance_type, given, rng):
    """They replace what the start has, one by one; as arrays, lists, or tensors."""
    x, shape = two_clusters(rng), SHAPES[covariance_type]
    values = {
        "weights_init": np.array([0.3, 0.7]),
        "means_init": np.array([[0.1], [1.0]]),
        "precisions_init": np.array([4.0] if covariance_type == "tied" else [4.0, 2.0]).reshape(shape),
    }
    chosen = values if given == "all" else {given: values[given]}
    options = {"covariance_type": covariance_type, "init_params": "random", "random_state": 0}
    theirs = mixture.GaussianMixture(2, **options, **chosen).fit(x)
    assert_same(GaussianMixture(2, **options, **chosen).fit(x), theirs, x, rtol=1e-7)
    as_tensors = {name: torch.from_numpy(value) for name, value in chosen.items()}
    assert_same(GaussianMixture(2, **options, **as_tensors).fit(x), theirs, x, rtol=1e-7)


def test_every_form_of_the_data(rng):
    """[N] and [N, 1], lists, tensors, other memory, other dtypes: the same fit, and arrays in return."""
    x = two_clusters(rng, 80).astype(np.float32).astype(np.float64)
    want = GaussianMixture(2).fit(x)
    read_only = x.copy()
    read_only.flags.writeable = False
    forms = [
        x[:, 0], x.tolist(), x[:, 0].tolist(), torch.from_numpy(x), torch.from_numpy(x[:, 0]), read_only, x[::-1].copy()[::-1],
        np.stack([x, x], 1)[:, 0], np.asfortranarray(x), x.astype(">f8"), torch.from_numpy(x).requires_grad_(),
    ]  # fmt: skip
    for form in forms:
        got = GaussianMixture(2).fit(form)
        for name in ATTRIBUTES:
            assert np.array_equal(getattr(got, name), getattr(want, name))
        answers = got.predict_proba(form), got.predict(form), got.score_samples(form), got.fit_predict(form)
        assert {type(answer) for answer in answers} == {np.ndarray}
        assert np.array_equal(answers[0], want.predict_proba(x))
    counts = np.arange(40) % 7
    assert np.array_equal(GaussianMixture(2).fit(counts).means_, GaussianMixture(2).fit(counts.astype(float)).means_)
    assert GaussianMixture(2).fit(torch.from_numpy(counts)).means_.dtype == np.float64
    assert GaussianMixture(2).fit(torch.from_numpy(x).bfloat16()).means_.dtype == np.float32


def test_float32_has_the_dtypes_of_scikit_learn(rng):
    x = two_clusters(rng).astype(np.float32)
    ours, theirs = GaussianMixture(2).fit(x), mixture.GaussianMixture(2, random_state=0).fit(x)
    for name in ATTRIBUTES:
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype == np.float32
    for name in ("predict_proba", "score_samples", "predict"):
        assert getattr(ours, name)(x).dtype == getattr(theirs, name)(x).dtype
    assert ours.predict_proba(x.astype(np.float64)).dtype == theirs.predict_proba(x.astype(np.float64)).dtype


def test_tensors_in_return_where_scikit_learn_gives_them(rng):
    """For CUDA tensors, and for others under array_api_dispatch, as here."""
    x = torch.from_numpy(two_clusters(rng))
    want = GaussianMixture(2, random_state=0).fit(x)
    with mock.patch.object(integration, "get_config", lambda: {"array_api_dispatch": True}):
        got = GaussianMixture(2, random_state=0).fit(x)
        for name in ATTRIBUTES:
            assert isinstance(getattr(got, name), torch.Tensor) and np.array_equal(getattr(got, name), getattr(want, name))
        for data in (x, x[:, 0]):
            for name in ("predict", "predict_proba", "score_samples", "low_probability", "fit_predict"):
                answer = getattr(got, name)(data)
                assert isinstance(answer, torch.Tensor) and np.array_equal(answer, getattr(want, name)(x)), name
        values, labels = got.sample(9)
        assert isinstance(values, torch.Tensor) and isinstance(labels, torch.Tensor)
        assert np.array_equal(values, want.sample(9)[0]) and np.array_equal(labels, want.sample(9)[1])
        assert got.set_params(warm_start=True).fit(x).n_iter_ == 1
        assert isinstance(GaussianMixture(2, max_iter=0).fit(x).means_, torch.Tensor)
        for bad, message in [
            (torch.zeros(5, 2), "`X` must have one feature, [N, 1] or [N], got shape [5, 2]"),
            (torch.zeros(1), "Found array with 1 sample(s) (shape=(1, 1)) while a minimum of 2 is required."),
            (torch.tensor([0.0, torch.nan, 1.0]), "Input X contains NaN or infinity."),
            (torch.tensor([0.0, 2.0, 1.0]) + 1j, "Complex data not supported"),
        ]:
            with pytest.raises(ValueError, match="^" + re.escape(message)):
                GaussianMixture(2).fit(bad)
    assert isinstance(got.predict(x.numpy()), np.ndarray)


def test_errors(rng):
    x = two_clusters(rng)
    for options, data, message in [
        *OWN_ERRORS,
        ({"n_components": 5}, x[:3], "Expected n_samples >= n_components but got n_components = 5, n_samples = 3"),
        ({}, np.array([1.0, np.nan, 2.0]), "Input X contains NaN."),
        ({}, np.array([1.0, np.inf, 2.0]), "Input X contains infinity or a value too large for dtype('float64')."),
        ({}, x[:1], "Found array with 1 sample(s) (shape=(1, 1)) while a minimum of 2 is required by GaussianMixture."),
        ({"reg_covar": 0.0, "n_components": 2}, np.full(9, 0.5), "Fitting the mixture model failed because some components have"),
        ({"tol": -1.0}, x, "The 'tol' parameter of GaussianMixture must be a float in the range [0.0, inf). Got -1.0 instead."),
        (
            {"weights_init": [0.5, 0.6], "n_components": 2},
            x,
            "The parameter 'weights' should be normalized, but got sum(weights) =",
        ),
        ({"means_init": [0.5, 0.6], "n_components": 2}, x, "The parameter 'means' should have the shape of (2, 1), but got (2,)"),
    ]:
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            GaussianMixture(**options).fit(data)
    with pytest.raises(NotFittedError, match="This GaussianMixture instance is not fitted yet"):
        GaussianMixture().predict(x)
    with pytest.raises(ValueError, match="X has 2 features, but GaussianMixture is expecting 1 features as input"):
        GaussianMixture().fit(x).predict(np.zeros((9, 2)))
    with pytest.raises(AttributeError, match=r"^`lower_bounds_` is kept where `verbose` is at least 1"):
        GaussianMixture().fit(x).lower_bounds_  # noqa: B018


def test_tensors_whose_memory_has_the_other_sign(rng):
    x = torch.from_numpy(two_clusters(rng)[:, 0])
    negative = torch.complex(x, -x).conj().imag
    assert negative.is_neg() and torch.equal(negative, x)
    ours, wanted = GaussianMixture(2).fit(negative), GaussianMixture(2).fit(x)
    assert np.array_equal(ours.means_, wanted.means_) and np.array_equal(ours.predict(negative), wanted.predict(x))


@pytest.mark.parametrize(("scale", "options"), [(1e25, {}), (1e-23, {"reg_covar": 0.0})])
@pytest.mark.parametrize("verbose", [0, 1])
def test_variances_that_float32_does_not_hold_are_refused(scale, options, verbose):
    x = (np.array([[1.0], [3], [2.9], [1.1]]) * scale).astype(np.float32)
    for estimator, message in ((mixture.GaussianMixture, None), (GaussianMixture, "ill-defined empirical covariance")):
        with np.errstate(all="ignore"), pytest.raises(ValueError, match=message):
            estimator(2, **options, verbose=verbose).fit(x)


DISPATCH = """
import numpy as np, sklearn, torch
from paa_gpu.integrations.sklearn import GaussianMixture

x = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 1)))
for options in ({}, {"init_params": "k-means++", "random_state": 0}, {"max_iter": 0, "random_state": 0}):
    wanted = GaussianMixture(2, **options).fit(x)
    with sklearn.config_context(array_api_dispatch=True):
        got = GaussianMixture(2, **options).fit(x)
        labels = got.predict(x)
    assert isinstance(got.means_, torch.Tensor) and isinstance(labels, torch.Tensor)
    assert np.array_equal(got.means_, wanted.means_) and np.array_equal(labels, wanted.predict(x))
"""


@pytest.mark.slow
def test_scikit_learns_own_switch_for_tensors():
    subprocess.run([sys.executable, "-c", DISPATCH], env={**os.environ, "SCIPY_ARRAY_API": "1"}, check=True)


@pytest.mark.filterwarnings("ignore:Best performing")
@pytest.mark.parametrize("init_params", ["random_from_data", "k-means++"])
@pytest.mark.parametrize(
    "options", [{"tol": 1e-2}, {"tol": 5.0}, {"max_iter": 1}, {"max_iter": 2}, {"tol": 1e-2, "n_init": 3}, {"weights_init": [0.5, 0.5]}],
    ids=str,
)  # fmt: skip
def test_iterations_are_counted_from_the_first_lower_bound_of_scikit_learn(init_params, options):
    """Its weights do not sum to 1 before the first iteration."""
    for seed in range(5):
        x = np.random.default_rng(seed).normal(0, 0.05, (100, 1))
        kwargs = {"init_params": init_params, "random_state": seed, "reg_covar": 0.1, **options}
        ours, theirs = (estimator(2, **kwargs).fit(x) for estimator in (GaussianMixture, mixture.GaussianMixture))
        assert_same(ours, theirs, x)
        assert ours.lower_bound_ == pytest.approx(theirs.lower_bound_, rel=1e-9) and not hasattr(ours, "lower_bounds_")


def test_a_warning_where_it_does_not_converge(rng):
    with pytest.warns(ConvergenceWarning, match="Best performing initialization did not converge") as warned:
        GaussianMixture(2, max_iter=2, tol=1e-9).fit(two_clusters(rng))
    assert warned[0].filename == __file__


def test_the_protocol_of_estimators(rng):
    x = two_clusters(rng)
    ours = GaussianMixture(2, covariance_type="tied", tol=1e-4, random_state=1)
    assert ours.get_params() == mixture.GaussianMixture(2, covariance_type="tied", tol=1e-4, random_state=1).get_params()
    assert clone(ours).get_params() == ours.get_params() and not hasattr(clone(ours.fit(x)), "means_")
    assert ours.set_params(n_init=2) is ours and ours.n_init == 2
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert np.array_equal(other.predict_proba(x), ours.predict_proba(x))
    assert isinstance(ours, mixture.GaussianMixture)
    assert repr(ours).startswith("GaussianMixture(covariance_type='tied', n_components=2")
    assert make_pipeline(StandardScaler(), ours).fit(x).predict(x).shape == (300,)
    assert cross_val_score(GaussianMixture(2), x).shape == (5,)


def test_attributes_that_somebody_sets(rng):
    """A mixture that was never fitted here, from a file for instance."""
    theirs = mixture.GaussianMixture(2, random_state=0).fit(two_clusters(rng))
    ours = GaussianMixture(2)
    vars(ours).update({name: value for name, value in vars(theirs).items() if name.endswith("_")})
    x = two_clusters(rng)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours.score_samples(x), theirs.score_samples(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change", [lambda values: values[::-1].copy()[::-1], lambda values: values.astype(">f8")], ids=["reversed", "byte order"]
)
def test_arrays_of_any_layout(change, rng):
    """Initial values, and attributes that somebody sets."""
    x, start = two_clusters(rng), np.array([[0.0], [4.0]])
    wanted, got = GaussianMixture(2, means_init=start).fit(x), GaussianMixture(2, means_init=change(start)).fit(x)
    for name in ("weights_", "means_", "precisions_cholesky_"):
        setattr(got, name, change(getattr(got, name)))
    np.testing.assert_array_equal(got.predict_proba(x), wanted.predict_proba(x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_label_of_a_value_far_away(dtype, rng):
    """No component has a density there."""
    x, far = two_clusters(rng).astype(dtype), np.array([[np.sqrt(np.finfo(dtype).max) * 10], [0.0]], dtype)
    ours, theirs = (kind(2, means_init=[[0], [4]]).fit(x) for kind in (GaussianMixture, mixture.GaussianMixture))
    assert ours.predict(far).tolist() == theirs.predict(far).tolist()


@pytest.mark.filterwarnings("ignore:Best performing")
@pytest.mark.parametrize("covariance_type", ["diag", "tied"])
def test_warm_start(covariance_type, rng):
    """Call after call: iterations, lower bounds and parameters."""
    x = two_clusters(rng)
    options = {"covariance_type": covariance_type, "warm_start": True, "max_iter": 2, "init_params": "random", "random_state": 0}
    ours, theirs = GaussianMixture(2, **options), mixture.GaussianMixture(2, **options)
    for call in range(8):
        assert_same(ours.fit(x), theirs.fit(x), x, rtol=1e-6)
        np.testing.assert_allclose(ours.lower_bound_, theirs.lower_bound_, rtol=1e-9)
        if call:
            np.testing.assert_allclose(ours.lower_bounds_, theirs.lower_bounds_, rtol=1e-9)
    assert ours.set_params(max_iter=0).fit(x).n_iter_ == 0
    assert not ours.converged_
    with pytest.raises(ValueError, match=r"^`n_components` must be 2, as in the solution that `warm_start` goes on from, got 3$"):
        ours.set_params(n_components=3).fit(x)


def test_starts_that_are_no_fit_are_left_out():
    """Two of these three end in a point."""
    x = np.repeat(np.random.default_rng(15).normal(size=4), [6, 1, 1, 4])[:, None]
    fit = GaussianMixture(2, reg_covar=0.0, init_params="random", random_state=15, n_init=3).fit(x)
    assert np.isfinite(fit.means_).all()


def test_integers_are_no_rounded_numbers():
    assert GaussianMixture(2).fit(torch.tensor([2**24 + 1, 2**24 + 3, 3 * 2**24 + 1])).means_.dtype == np.float64


def test_the_error_of_cuda_data_with_one_nan():
    assert "NaN or infinity" in GaussianMixture()._failure(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize("init_params", ["kmeans", "random"])
def test_verbose_says_what_scikit_learn_says(init_params, rng, capsys):
    x, options = two_clusters(rng), {"verbose": 1, "verbose_interval": 2, "init_params": init_params, "random_state": 0}
    quiet = GaussianMixture(2, **{**options, "verbose": 0}).fit(x)
    ours = GaussianMixture(2, **options).fit(x)
    said = capsys.readouterr().out
    theirs = mixture.GaussianMixture(2, **options).fit(x)
    assert said == capsys.readouterr().out and said.startswith("Initialization 0\n  Iteration 2\n")
    assert (ours.n_iter_, len(ours.lower_bounds_)) == (quiet.n_iter_, theirs.n_iter_)
    np.testing.assert_allclose(ours.means_, quiet.means_, rtol=1e-10)
    np.testing.assert_allclose(ours.lower_bounds_, theirs.lower_bounds_, rtol=1e-7)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_samples_are_those_of_scikit_learn(covariance_type, rng):
    x = two_clusters(rng)
    ours = GaussianMixture(2, covariance_type=covariance_type, random_state=0).fit(x)
    theirs = mixture.GaussianMixture(2, covariance_type=covariance_type, random_state=0).fit(x)
    vars(theirs).update({name: getattr(ours, name) for name in ATTRIBUTES})
    for got, want in zip(ours.sample(50), theirs.sample(50), strict=True):
        assert np.array_equal(got, want)


def test_no_warning_of_its_own(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaussianMixture(2).fit(two_clusters(rng)).predict(two_clusters(rng))


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_tables_keep_the_name_of_their_column(package, rng):
    frame, values = pytest.importorskip(package).DataFrame, rng.normal(size=40)
    ours, theirs = (
        estimator(2, random_state=0).fit(frame({"loss": values})) for estimator in (GaussianMixture, mixture.GaussianMixture)
    )
    assert ours.feature_names_in_.tolist() == theirs.feature_names_in_.tolist() == ["loss"]
    assert len(ours.predict(frame({"loss": values}))) == 40
    for estimator in (ours, theirs):
        with pytest.raises(ValueError, match="feature names should match"):
            estimator.predict(frame({"score": values}))
    assert GaussianMixture(2).fit(frame({"loss": values})["loss"]).feature_names_in_.tolist() == ["loss"]


def test_a_column_without_ndim(rng):
    """As polars' are, also where polars is not installed."""
    table = pytest.importorskip("pandas").DataFrame({"loss": rng.normal(size=40)})
    column = mock.Mock(spec=["shape", "to_frame"], shape=(40,), to_frame=lambda: table)
    assert GaussianMixture(2).fit(column).feature_names_in_.tolist() == ["loss"]


@pytest.mark.parametrize(("values", "k"), [([1.0], 2), ([1.0, 2.0], 3), ([0.0, 1.0, 5.0], 4)])
def test_a_warning_of_too_few_values(values, k):
    """With a component for each value there is none."""
    row, said = np.repeat(values, 20)[:, None], []
    for estimator in (GaussianMixture, mixture.GaussianMixture):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            estimator(k, random_state=0).fit(row)
            estimator(len(values), random_state=0).fit(row)
        said.append({str(warning.message) for warning in caught if "distinct" in str(warning.message)})
    assert said[0] == said[1]
    assert len(said[0]) == 1


def test_distinct_values_of_what_only_the_fit_refuses():
    """A CUDA tensor is not read before. No warning of too few values comes before the error."""
    assert integration._distinct(torch.tensor([1.0, torch.nan, 1.0]), 2) == 2
    assert [integration._distinct(torch.tensor([1.0, 2.0, 1.0]), most) for most in (1, 2, 3)] == [1, 2, 2]
