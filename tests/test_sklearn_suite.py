"""scikit-learn's own tests of `GaussianMixture`, from the installed package, with the class swapped and one feature.

Each test runs as it stands but for the class and, where its data have several features, for the replacements below. A
replacement that finds nothing, and a test of the lists that is no longer there, fail: the lists are then stale. New tests of a
new version run by themselves.
"""

from __future__ import annotations

import ast
import inspect
import types

import numpy as np
import pytest
import sklearn
from sklearn.mixture.tests import test_gaussian_mixture as upstream
from sklearn.utils.fixes import parse_version

from paa_gpu.integrations.sklearn import GaussianMixture

#: Of these each must have no class in it.
OF_PRIVATE_FUNCTIONS = (
    "test_suffstat_sk_full",
    "test_suffstat_sk_tied",
    "test_suffstat_sk_diag",
    "test_gaussian_suffstat_sk_spherical",
    "test_compute_log_det_cholesky",
    "test_gaussian_mixture_log_probabilities",
)

DOES_NOT_APPLY = {
    **dict.fromkeys(OF_PRIVATE_FUNCTIONS, "tests private functions of scikit-learn, not the estimator"),
    "test_gaussian_mixture_all_init_does_not_estimate_gaussian_parameters": "counts calls of a private function",
    "test_gaussian_mixture_precisions_init_diag": "takes the order of the components from scikit-learn's random k-means",
    "test_regularisation": "as many components as samples, where scikit-learn does not raise either with one feature",
    "test_gaussian_mixture_array_api_compliance": "needs SCIPY_ARRAY_API in the environment; test_sklearn.py takes tensors",
    "test_gaussian_mixture_raises_where_array_api_not_implemented": "k-means starts work for tensors here",
}

#: The version of scikit-learn that some of these came with. Python 3.10 has older ones.
SINCE = {
    "test_gaussian_mixture_array_api_compliance": "1.8",
    "test_gaussian_mixture_raises_where_array_api_not_implemented": "1.8",
}

#: What makes the data of a test, or of a class that makes them, have one feature.
ONE_FEATURE = {
    # With one feature the two means may fall together, where scikit-learn's own class does not pass either.
    "RandomData": [
        ("n_features=2,", "n_features=1,"),
        (
            "rng.rand(n_components, n_features).astype(dtype) * scale",
            "((rng.rand(n_components, n_features) / 2 + np.arange(n_components)[:, None]) * scale / 2).astype(dtype)",
        ),
    ],
    "test_gaussian_mixture_attributes": [("rng.rand(10, 2)", "rng.rand(10, 1)")],
    "test_gaussian_mixture_fit_predict_n_init": [("randn(1000, 5)", "randn(1000, 1)")],
    "test_multiple_init": [("50, 5, 2", "50, 1, 2")],
    "test_gaussian_mixture_n_parameters": [
        ("50, 5, 2", "50, 1, 2"),
        ('{"spherical": 13, "diag": 21, "tied": 26, "full": 41}', '{"spherical": 5, "diag": 5, "tied": 4, "full": 5}'),
    ],
    "test_gaussian_mixture_aic_bic": [("50, 3, 2", "50, 1, 2"), ("fast_logdet(np.cov(X.T, bias=1))", "np.log(np.var(X))")],
    "test_warm_start": [("500, 2, 2", "500, 1, 2")],
    "test_sample": [("np.diag(np.cov(X_s[y_s == k].T))", "np.var(X_s[y_s == k])")],
    # The lower bounds of all iterations are kept only where they are taken one by one.
    "test_gaussian_mixture_setting_best_params": [
        ("size=(n_samples, 3)", "size=(n_samples, 1)"),
        ("means_init=means_init", "means_init=means_init[:, :1]"),
        ('"lower_bounds_",', ""),
    ],
    "test_max_iter_zero": [("[[20, 30], [30, 25]]", "[[20], [30]]")],
    "test_gaussian_mixture_precisions_init": [("n_features=3", "n_features=1")],
    "test_gaussian_mixture_single_component_stable": [("np.zeros(2), np.identity(2)", "np.zeros(1), np.identity(1)")],
}


def one_dimensional() -> types.ModuleType:
    """The upstream module with our class and the replacements."""
    source = inspect.getsource(upstream)
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in ONE_FEATURE:
            text = "".join(lines[node.lineno - 1 : node.end_lineno])
            for old, new in ONE_FEATURE[node.name]:
                assert old in text, f"stale: no {old!r} in {node.name} of the installed scikit-learn"
                text = text.replace(old, new)
            changed = text.splitlines(keepends=True)
            assert len(changed) == node.end_lineno - node.lineno + 1
            lines[node.lineno - 1 : node.end_lineno] = changed
    module = types.ModuleType(upstream.__name__)
    exec(compile("".join(lines), upstream.__file__, "exec"), module.__dict__)
    module.GaussianMixture = GaussianMixture
    return module


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def global_dtype(request):
    return request.param


@pytest.fixture
def global_random_seed():
    return 42


def test_the_lists_are_not_stale():
    names = {name for name in vars(upstream) if name.startswith("test_")}
    installed = parse_version(sklearn.__version__)
    assert {name for name in DOES_NOT_APPLY if installed >= parse_version(SINCE.get(name, "0"))} <= names
    assert set(ONE_FEATURE) - {"RandomData"} <= names - set(DOES_NOT_APPLY)
    for name in OF_PRIVATE_FUNCTIONS:
        assert "GaussianMixture(" not in inspect.getsource(getattr(upstream, name))


globals().update(
    {name: test for name, test in vars(one_dimensional()).items() if name.startswith("test_") and name not in DOES_NOT_APPLY}
)
