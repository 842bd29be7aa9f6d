"""A direct EM in extended precision, the measure of every fit's parameters: section 2 of the specification in numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

REAL = np.longdouble


class Fit(NamedTuple):
    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    lower_bound: np.floating
    n_iter: int
    converged: bool


def log_densities(x: np.ndarray, weights: np.ndarray, means: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Weighted log-density of each component at each value, [n, 2]."""
    square = (x[:, None] - means) ** 2 / variances
    return np.log(weights) - (np.log(2 * np.pi * variances.astype(REAL)) + square) / 2


def fit(
    x: np.ndarray,
    covariance_type: str = "diag",
    tol: float = 1e-3,
    reg_covar: float = 1e-6,
    max_iter: int = 100,
    weights: np.ndarray | None = None,
    means: np.ndarray | None = None,
    precisions: np.ndarray | None = None,
) -> Fit:
    shift = np.min(x)  # an empty component is guarded by 10 eps, and so its mean depends on where zero is
    x = np.asarray(x, REAL) - shift
    weights = np.array([0.5, 0.5], REAL) if weights is None else np.asarray(weights, REAL)
    means = np.array([x.min(), x.max()], REAL) if means is None else np.asarray(means, REAL) - shift
    variances = np.ones(2, REAL) if precisions is None else 1 / np.broadcast_to(np.asarray(precisions, REAL), 2)
    previous = -np.inf
    for n_iter in range(1, max_iter + 1):
        log_p = log_densities(x, weights, means, variances)
        log_density = np.logaddexp(log_p[:, 0], log_p[:, 1])
        lower_bound = log_density.mean()
        resp = np.exp(log_p - log_density[:, None])
        n = resp.sum(0) + REAL(10 * np.finfo(np.float64).eps)
        means = (resp * x[:, None]).sum(0) / n
        square = (resp * (x[:, None] - means) ** 2).sum(0)
        variances = np.full(2, square.sum() / n.sum()) if covariance_type == "tied" else square / n
        variances = variances + REAL(reg_covar)
        weights = n / n.sum()
        if abs(lower_bound - previous) < tol:
            return Fit(weights, means + shift, variances, lower_bound, n_iter, True)
        previous = lower_bound
    return Fit(weights, means + shift, variances, lower_bound, max_iter, False)
