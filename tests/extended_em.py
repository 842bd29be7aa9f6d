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
    """Weighted log-density of each component at each value, [n, k]."""
    square = (x[:, None] - means) ** 2 / variances
    return np.log(weights) - (np.log(2 * np.pi * variances.astype(REAL)) + square) / 2


def centres(x: np.ndarray, k: int, init: str, positions: np.ndarray | None = None) -> np.ndarray:
    """The k centres of a start, of x less its minimum: the least sum of squares over all divisions of up to 64 values in two."""
    x = np.sort(np.asarray(x, REAL) - np.min(x)) if init != "random" else np.asarray(x, REAL) - np.min(x)
    if init == "random":
        return np.sort(x[positions])
    centre = x[(2 * np.arange(k) + 1) * len(x) // (2 * k)]
    if init == "quantile":
        return centre
    if k == 2 and len(x) <= 64:
        parts = [(x[:i], x[i:]) for i in range(1, len(x)) if x[i] > x[i - 1]]
        if not parts:
            return np.zeros(2, REAL)
        best = min(parts, key=lambda part: sum(((side - side.mean()) ** 2).sum() for side in part))
        return np.array([side.mean() for side in best])
    if k == 2:
        centre = np.array([0, 2 * x.mean()])
    before = None
    for _ in range(50):
        owner = members(x, centre)
        if before is not None and (owner == before).all():
            break
        before = owner
        centre = np.array([x[owner == j].mean() if (owner == j).any() else centre[j] for j in range(k)])
    return centre


def members(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The nearest of ascending centres for each value; the lower one where equal."""
    return (x[:, None] > (centre[1:] + centre[:-1]) / 2).sum(1)


def start(x: np.ndarray, centre: np.ndarray, covariance_type: str = "diag", reg_covar: float = 1e-6) -> dict[str, np.ndarray]:
    """Weights, means and precisions after one M-step on the division between centres, which are those of x less its minimum."""
    shift, k = np.min(x), len(centre)
    x = np.asarray(x, REAL) - shift
    resp = (members(x, centre)[:, None] == np.arange(k)).astype(REAL)
    n = resp.sum(0) + REAL(10 * np.finfo(np.float64).eps)
    means = (resp * x[:, None]).sum(0) / n
    square = (resp * (x[:, None] - means) ** 2).sum(0)
    variances = np.full(k, square.sum() / n.sum()) if covariance_type == "tied" else square / n
    return {"weights": n / n.sum(), "means": means + shift, "precisions": 1 / (variances + REAL(reg_covar))}


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
    k = next((len(given) for given in (weights, means) if given is not None), 2)
    weights = np.full(k, 1 / REAL(k)) if weights is None else np.asarray(weights, REAL)
    means = np.linspace(x.min(), x.max(), k) if means is None else np.asarray(means, REAL) - shift
    variances = np.ones(k, REAL) if precisions is None else 1 / np.broadcast_to(np.asarray(precisions, REAL), k)
    previous = -np.inf
    for n_iter in range(1, max_iter + 1):
        log_p = log_densities(x, weights, means, variances)
        log_density = np.logaddexp.reduce(log_p, 1)
        lower_bound = log_density.mean()
        resp = np.exp(log_p - log_density[:, None])
        n = resp.sum(0) + REAL(10 * np.finfo(np.float64).eps)
        means = (resp * x[:, None]).sum(0) / n
        square = (resp * (x[:, None] - means) ** 2).sum(0)
        variances = np.full(k, square.sum() / n.sum()) if covariance_type == "tied" else square / n
        variances = variances + REAL(reg_covar)
        weights = n / n.sum()
        if abs(lower_bound - previous) < tol:
            return Fit(weights, means + shift, variances, lower_bound, n_iter, True)
        previous = lower_bound
    return Fit(weights, means + shift, variances, lower_bound, max_iter, False)
