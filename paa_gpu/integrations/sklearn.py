"""scikit-learn's `GaussianMixture` for data of one feature, fitted and read by this library.

Code that fits losses, scores or counts changes one line:

    from paa_gpu.integrations.sklearn import GaussianMixture  # instead of sklearn.mixture
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    from sklearn import config_context, get_config, mixture
    from sklearn.base import _fit_context
    from sklearn.cluster import kmeans_plusplus
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("paa_gpu.integrations.sklearn needs scikit-learn 1.7 or newer: pip install scikit-learn") from error

from ..em import MAX_COMPONENTS, fit_gmm_1d
from ..mixture import GaussianMixture1D

__all__ = ["GaussianMixture"]

Array = np.ndarray[Any, Any]

# scikit-learn's guard against an empty component.
EMPTY_COMPONENT = 10 * np.finfo(np.float64).eps

# Weights of a solution sum to 1 but for rounding, in float32 too.
ROUNDING = 1e-5

INITIAL = ("weights_init", "means_init", "precisions_init")

NOT_CONVERGED = (
    "Best performing initialization did not converge. Try different init parameters, or increase max_iter, tol, or check for "
    "degenerate data."
)
FEW_VALUES = "Number of distinct clusters ({}) found smaller than n_clusters ({}). Possibly due to duplicate points in X."
NOT_FINITE = "Input X contains NaN or infinity.\n{} does not accept them."
ILL_DEFINED = (
    "Fitting the mixture model failed because some components have ill-defined empirical covariance (for instance caused by "
    "singleton or collapsed samples). Try to decrease the number of components, increase reg_covar, or scale the input data."
)


def _tensor(values: Any, device: torch.device) -> Tensor:
    """An argument or an attribute, which somebody may have set to an array of any strides and byte order."""
    if isinstance(values, Tensor):
        return values.to(device)
    array = np.asarray(values)
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C")).to(device)


class _Best(NamedTuple):
    """The best of the fits."""

    weights: Tensor  # Tensor[n_components], like the two below
    means: Tensor
    variances: Tensor
    lower_bound: float
    n_iter: int
    converged: bool
    lower_bounds: list[float] | None  # of each iteration, where it was taken alone


def _fits(fit: GaussianMixture1D, dtype: torch.dtype) -> Tensor:
    """Which rows are fits whose variances are numbers in this dtype too: BoolTensor[rows]."""
    variances = fit.variances.to(dtype)
    return fit.valid & (variances.isfinite() & (variances > 0)).all(1)


def _distinct(x: Tensor, most: int) -> int:
    """The number of distinct values, but at most `most`; that is also what a row with a NaN has, which `fit` refuses later."""
    smallest = [x.min()]
    while len(smallest) < most:
        smallest.append(x.masked_fill(x <= smallest[-1], torch.inf).min())
    return int((torch.stack(smallest) != torch.inf).sum())


class _Data(NamedTuple):
    x: Tensor  # Tensor[N] float32 or float64
    tensors: bool  # whether results are tensors, or numpy arrays


class GaussianMixture(mixture.GaussianMixture):
    """scikit-learn's estimator for one feature: the same arguments, methods, attributes, shapes, checks and warnings.

    Data are a Tensor or array of shape [N, 1], as in scikit-learn, or [N]. Results and attributes are numpy arrays of
    scikit-learn's dtypes. If `X` is a CUDA tensor, they are tensors on its device. Then only numbers come to the CPU:
    `converged_`, `n_iter_`, `lower_bound_`, and for "kmeans" how many values are distinct. They are also tensors for CPU tensors
    under scikit-learn's `config_context(array_api_dispatch=True)`. The fit is `fit_gmm_1d` in float64, for every dtype of `X`.

    `init_params` chooses the start. `weights_init`, `means_init` and `precisions_init` replace its values:

    * "kmeans": `fit_gmm_1d(init="kmeans")`. The division does not depend on `random_state`. The components are in ascending
      order. scikit-learn's seeds may divide otherwise. `n_init` counts as 1, because all fits would be the same.
    * "random", "random_from_data", "k-means++": the same random numbers as in scikit-learn, so the same seed gives the same fit.
      With float32 data, scikit-learn's fit has rounding errors, and may end elsewhere. All `n_init` starts are fitted in one
      call. They are drawn on the CPU, from a copy of CUDA data.

    There are five differences from scikit-learn:

    * `lower_bounds_` exists only with `verbose`, or at a warm start, because only then iterations run one by one.
    * Values close together lose no digits. So rounding cannot make a variance negative, and a fit does not fail for that reason.
    * With `reg_covar=0`, a component whose values are all equal raises the error about ill-defined covariance. In scikit-learn,
      rounding decides.
    * A component that loses all its values ends at the smallest value of `X`, and not at 0.
    * CUDA tensors are not checked for NaN and infinity before the work. `fit` raises the error after it. For such values,
      `predict` returns -1 and `predict_proba` NaN.

    Raises:
        ValueError: more than one feature, more than 8 components, or an error of scikit-learn.
    """

    def fit(self, X: Any, y: Any = None) -> GaussianMixture:
        """Fit the mixture to X, [N, 1] or [N]."""
        self._fit(X)
        return self

    def fit_predict(self, X: Any, y: Any = None) -> Any:
        """Fit the mixture to X, and return the likeliest component of each value: int64 [N]."""
        return self._answer("predict", self._fit(X))

    def predict(self, X: Any) -> Any:
        """The likeliest component of each value: int64 [N]."""
        return self._answer("predict", self._data(X))

    def predict_proba(self, X: Any) -> Any:
        """The responsibility of each component for each value: [N, n_components]."""
        return self._answer("predict_proba", self._data(X))

    def low_probability(self, X: Any) -> Any:
        """The responsibility of the component with the smallest mean, `predict_proba(X)[:, means_.argmin()]`: [N]."""
        return self._answer("low_probability", self._data(X))

    def score_samples(self, X: Any) -> Any:
        """The log-density of the mixture at each value: [N]."""
        return self._answer("score_samples", self._data(X))

    def score(self, X: Any, y: Any = None) -> float:
        """The mean log-density of the values."""
        return float(self._answer("score", self._data(X)))

    def bic(self, X: Any) -> float:
        """Bayesian information criterion on X; lower is better."""
        return float(self._answer("bic", self._data(X)))

    def aic(self, X: Any) -> float:
        """Akaike information criterion on X; lower is better."""
        return float(self._answer("aic", self._data(X)))

    def sample(self, n_samples: int = 1) -> tuple[Any, Any]:
        """Draw values [n_samples, 1] and their components [n_samples], the same as scikit-learn for the same `random_state`."""
        check_is_fitted(self)
        if not isinstance(self.means_, Tensor):
            drawn: tuple[Any, Any] = super().sample(n_samples)
            return drawn
        host, device = copy.copy(self), self.means_.device
        for name in ("weights_", "means_", "covariances_"):
            setattr(host, name, getattr(self, name).cpu().numpy())
        values, labels = host.sample(n_samples)
        return torch.from_numpy(values).to(device), torch.from_numpy(labels).to(device)

    @property
    def lower_bounds_(self) -> list[float]:
        """The lower bound of each iteration, if iterations ran one by one."""
        kept: list[float] | None = getattr(self, "_lower_bounds", None)
        if kept is None:
            raise AttributeError("`lower_bounds_` is kept where `verbose` is at least 1, and at a warm start; use `lower_bound_`")
        return kept

    # The fit ----------------------------------------------------------------------------------------------------------------

    @_fit_context(prefer_skip_nested_validation=True)
    def _fit(self, X: Any) -> _Data:
        """Fit, set the attributes, and return the data."""
        if self.n_components > MAX_COMPONENTS:
            raise ValueError(
                f"`n_components` must be at most {MAX_COMPONENTS}, got {self.n_components}: use sklearn.mixture.GaussianMixture"
            )
        data = self._data(X, reset=True)
        self._check_initial(len(data.x))
        again = self.warm_start and hasattr(self, "converged_")
        if again and len(self.weights_) != self.n_components:
            raise ValueError(
                f"`n_components` must be {len(self.weights_)}, as in the solution that `warm_start` goes on from, "
                f"got {self.n_components}"
            )
        if self.max_iter == 0:
            self._keep_start(data, again)
            return data
        best = self._continue(data.x) if again else self._fit_starts(data.x, self._starts(data.x))
        self.converged_, self.n_iter_, self.lower_bound_ = best.converged, best.n_iter, best.lower_bound
        self._lower_bounds = best.lower_bounds
        self._set_solution(data, best.weights, best.means, best.variances)
        if not self.converged_:
            warnings.warn(NOT_CONVERGED, ConvergenceWarning, stacklevel=4)
        return data

    def _check_initial(self, n_samples: int) -> None:
        """Check the given initial values as scikit-learn does. They become arrays."""
        for name in INITIAL:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.detach().cpu().numpy())
        if n_samples < self.n_components:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, n_samples = {n_samples}"
            )
        # Newer versions are told the namespace of the arrays.
        namespace = {"xp": np} if "xp" in inspect.signature(self._check_parameters).parameters else {}
        with config_context(array_api_dispatch=False):  # under which scikit-learn's own fit lacks some starts
            self._check_parameters(np.broadcast_to(np.float64(0), (n_samples, 1)), **namespace)

    def _starts(self, x: Tensor) -> dict[str, Any]:
        """The start for `fit_gmm_1d`: a name and given values, or initial values [n_init, n_components]."""
        given = {
            name: _tensor(getattr(self, name), x.device).to(torch.float64).reshape(1, -1)
            for name in INITIAL
            if getattr(self, name) is not None
        }
        if len(given) == len(INITIAL):
            return {"init": "minmax", **given}
        if self.init_params == "kmeans":
            distinct = _distinct(x, self.n_components)
            if distinct < self.n_components:
                warnings.warn(FEW_VALUES.format(distinct, self.n_components), ConvergenceWarning, stacklevel=5)
            return {"init": "kmeans", **given}
        rng, values = check_random_state(self.random_state), x.cpu().numpy()
        drawn = [self._estimate(values, self._responsibilities(values, rng)) for _ in range(self.n_init)]
        columns = (torch.from_numpy(np.stack(column)).to(x.device) for column in zip(*drawn, strict=True))
        return {name: given.get(name, column).expand(self.n_init, -1) for name, column in zip(INITIAL, columns, strict=True)}

    def _responsibilities(self, x: Array, rng: np.random.RandomState) -> Array:
        """The responsibilities that scikit-learn draws, [N, n_components]."""
        if self.init_params == "random":
            uniform: Array = rng.uniform(size=(len(x), self.n_components)).astype(x.dtype)
            uniform /= uniform.sum(1, keepdims=True)
            return uniform
        if self.init_params == "random_from_data":
            chosen = rng.choice(len(x), size=self.n_components, replace=False)
        else:
            _, chosen = kmeans_plusplus(x[:, None], self.n_components, random_state=rng)
        one = np.zeros((len(x), self.n_components))
        one[chosen, np.arange(self.n_components)] = 1
        return one

    def _estimate(self, x: Array, resp: Array) -> tuple[Array, Array, Array]:
        """Weights, means and precisions of one M-step in float64."""
        x, resp = x.astype(np.float64), resp.astype(np.float64)
        n = resp.sum(0) + EMPTY_COMPONENT
        means = x @ resp / n
        squares = np.array([resp[:, k] @ (x - means[k]) ** 2 for k in range(len(n))])
        if self.covariance_type == "tied":
            # scikit-learn takes the squares of all values, of those too that no component was drawn for.
            variances = np.array([(squares.sum() + (1 - resp.sum(1)) @ x**2) / n.sum()])
        else:
            variances = squares / n
        return n / n.sum(), means, 1 / (variances + self.reg_covar)

    def _options(self, max_iter: int) -> dict[str, Any]:
        return {
            "covariance_type": self.covariance_type,
            "tol": float(self.tol),
            "reg_covar": float(self.reg_covar),
            "max_iter": int(max_iter),
            "n_components": int(self.n_components),
        }

    def _fit_starts(self, x: Tensor, starts: dict[str, Any]) -> _Best:
        """The best of all starts, fitted in one call. Iterations run one by one if they are printed, or if scikit-learn would
        count them differently."""
        more = self._more_at_first(len(x))
        if self.verbose:
            return self._iterate(x, self._split(starts), -np.inf, more)
        rows = 1 if "init" in starts else self.n_init
        fit = fit_gmm_1d(x[None].expand(rows, -1), **self._options(self.max_iter), **starts)
        valid = _fits(fit, x.dtype)
        numbers = torch.stack([fit.lower_bound, fit.n_iter.double(), fit.converged.double(), valid.double()], 1).tolist()
        # The first lower bound decides whether the second iteration is the last one.
        if more and any(row[1] <= 2 for row in numbers):
            return self._iterate(x, self._split(starts), -np.inf, more)._replace(lower_bounds=None)
        best = max((row for row in range(rows) if numbers[row][3]), key=lambda row: numbers[row][0], default=None)
        if best is None:
            raise ValueError(self._failure(x))
        lower_bound, n_iter, converged, _ = numbers[best]
        return _Best(fit.weights[best], fit.means[best], fit.variances[best], lower_bound, int(n_iter), bool(converged), None)

    def _more_at_first(self, n_samples: int) -> float:
        """What to add to the first lower bound to get scikit-learn's. It puts only the drawn values into components, and divides
        their number by that of all values. So its first weights do not sum to 1."""
        drawn = self.init_params in ("random_from_data", "k-means++") and self.weights_init is None
        return float(np.log(self.n_components / n_samples)) if drawn else 0.0

    def _continue(self, x: Tensor) -> _Best:
        """The fit from the last solution on."""
        start, more = self._as_start(self._mixture(x.double())), 0.0
        total = float(start["weights_init"].sum())
        if abs(total - 1) > ROUNDING:  # after a fit without iterations, see `_more_at_first`
            start["weights_init"], more = start["weights_init"] / total, float(np.log(total))
        return self._iterate(x, [start], self.lower_bound_, more)

    def _iterate(self, x: Tensor, starts: Sequence[dict[str, Any]], before: float, more: float) -> _Best:
        """The best of the starts. Iterations run one by one, with scikit-learn's messages.

        `before`: the lower bound before the first iteration; `more`: what is added to the first lower bound of each start.
        """
        found = []
        for init, start in enumerate(starts):
            self._print_verbose_msg_init_beg(init)
            lower_bounds, converged, last = list[float](), False, before
            while not converged and len(lower_bounds) < self.max_iter:
                fit = fit_gmm_1d(x[None], **self._options(1), **start)
                if not _fits(fit, x.dtype):
                    raise ValueError(self._failure(x))
                lower_bounds.append(float(fit.lower_bound) + (0.0 if lower_bounds else more))
                change, last = lower_bounds[-1] - last, lower_bounds[-1]
                self._print_verbose_msg_iter_end(len(lower_bounds), change)
                converged = abs(change) < self.tol
                start = self._as_start(fit)
            self._print_verbose_msg_init_end(last, converged)
            found.append(_Best(fit.weights[0], fit.means[0], fit.variances[0], last, len(lower_bounds), converged, lower_bounds))
        return max(found, key=lambda best: best.lower_bound)

    def _split(self, starts: dict[str, Any]) -> list[dict[str, Any]]:
        """The starts one by one."""
        if "init" in starts:
            return [starts]
        return [{name: values[row, None] for name, values in starts.items()} for row in range(self.n_init)]

    def _failure(self, x: Tensor) -> str:
        return ILL_DEFINED if bool(x.isfinite().all()) else NOT_FINITE.format(type(self).__name__)

    # Attributes and data ----------------------------------------------------------------------------------------------------

    def _keep_start(self, data: _Data, again: bool) -> None:
        """No iteration: scikit-learn's own start, the last of all."""
        if not again:
            values, rng = data.x.cpu().numpy()[:, None], check_random_state(self.random_state)
            with config_context(array_api_dispatch=False):
                for _ in range(self.n_init):
                    self._initialize_parameters(values, rng)
            fit = self._mixture(data.x)
            self._set_solution(data, *(values[0] for values in fit[:3]))
        self.converged_, self.n_iter_, self.lower_bound_, self._lower_bounds = False, 0, -np.inf, []

    def _set_solution(self, data: _Data, weights: Tensor, means: Tensor, variances: Tensor) -> None:
        """The attributes of a solution, [n_components] each, in scikit-learn's shapes and its dtype."""
        if self.covariance_type == "tied":
            variances = variances[:1]
        shape = {"full": (-1, 1, 1), "tied": (1, 1), "diag": (-1, 1), "spherical": (-1,)}[self.covariance_type]
        found = {
            "weights_": weights,
            "means_": means[:, None],
            "covariances_": variances.reshape(shape),
            "precisions_": (1 / variances).reshape(shape),
            "precisions_cholesky_": variances.rsqrt().reshape(shape),
        }
        for name, values in found.items():
            values = values.to(data.x.dtype)
            setattr(self, name, values if data.tensors else values.numpy())

    def _as_start(self, fit: GaussianMixture1D) -> dict[str, Tensor]:
        """A mixture of one row as initial values of `fit_gmm_1d`."""
        variances = fit.variances[:, :1] if self.covariance_type == "tied" else fit.variances
        return dict(zip(INITIAL, (fit.weights, fit.means, 1 / variances), strict=True))

    def _mixture(self, x: Tensor) -> GaussianMixture1D:
        """The attributes as a mixture of one row, on the device of x and in the wider dtype of the two."""
        check_is_fitted(self)
        weights, means, cholesky = (
            _tensor(values, x.device) for values in (self.weights_, self.means_, self.precisions_cholesky_)
        )
        dtype = torch.promote_types(x.dtype, weights.dtype)
        weights, means, cholesky = (values.to(dtype).reshape(1, -1) for values in (weights, means, cholesky))
        known = torch.ones(1, dtype=torch.bool, device=x.device)
        return GaussianMixture1D(
            weights, means, cholesky.expand_as(means) ** -2, means[:, 0], known.long(), known, known, self.covariance_type
        )

    def _answer(self, name: str, data: _Data) -> Any:
        """The result of the mixture's method of this name for the data."""
        answer = getattr(self._mixture(data.x), name)(data.x[None])[0]
        return answer if data.tensors else answer.numpy()

    def _data(self, X: Any, reset: bool = False) -> _Data:
        """The values, after scikit-learn's checks. `reset` is True for a fit."""
        if not reset:
            check_is_fitted(self)
        if not hasattr(X, "shape"):
            X = np.asarray(X)
        if len(X.shape) == 1:  # tables of polars have no `ndim`
            X = X.to_frame() if hasattr(X, "to_frame") else X[:, None]
        if reset and len(X.shape) == 2 and X.shape[1] != 1:
            raise ValueError(
                f"`X` must have one feature, [N, 1] or [N], got shape {list(X.shape)}: use sklearn.mixture.GaussianMixture"
            )
        if isinstance(X, Tensor):
            X = X.detach().resolve_conj().resolve_neg()
            if X.is_cuda or get_config()["array_api_dispatch"]:
                return _Data(self._check_tensor(X, reset), True)
            X = (X.float() if X.dtype == torch.bfloat16 else X).numpy()
        X = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=2 if reset else 1)
        column = np.require(X[:, 0], requirements=["W", "A"])
        return _Data(torch.from_numpy(column if column.strides[0] >= 0 else column.copy()), False)

    def _check_tensor(self, X: Tensor, reset: bool) -> Tensor:
        """The checks of `validate_data`, for a tensor. They do not wait for its values."""
        if X.ndim != 2 or X.shape[1] != 1:
            raise ValueError(f"`X` must have one feature, [N, 1] or [N], got shape {list(X.shape)}")
        if X.is_complex():
            raise ValueError(f"Complex data not supported\n{X}\n")
        least = 2 if reset else 1
        if len(X) < least:
            raise ValueError(
                f"Found array with {len(X)} sample(s) (shape={tuple(X.shape)}) while a minimum of {least} is required."
            )
        if X.is_cpu and not X.isfinite().all():
            raise ValueError(NOT_FINITE.format(type(self).__name__))
        if reset:
            self.n_features_in_ = 1
        return (X if X.dtype in (torch.float32, torch.float64) else X.float() if X.is_floating_point() else X.double())[:, 0]
