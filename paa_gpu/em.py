"""Batched two-component 1-D Gaussian mixtures, fitted by EM as scikit-learn's `GaussianMixture` does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._checks import FLOATS, INDICES, check_int, check_list, check_non_negative, check_option, check_tensor

__all__ = ["COVARIANCE_TYPES", "GaussianMixture1D", "fit_gmm_1d"]

COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")


class GaussianMixture1D(NamedTuple):
    """G fitted mixtures of two 1-D Gaussians. Component 0 is the one that started at the row's minimum.

    A row is valid if it has at least 2 values, all finite. Otherwise its parameters and lower bound are NaN, `n_iter` is 0 and
    `converged` False. The methods take the data as `fit_gmm_1d` does: Tensor[G, K] with an optional `count`, or a list of G 1-D
    tensors, and answer in the same form. At padding and in rows that are not valid, floats are NaN and labels -1.
    """

    weights: Tensor  #: Tensor[G, 2], summing to 1
    means: Tensor  #: Tensor[G, 2]
    variances: Tensor  #: Tensor[G, 2]; equal ones where tied
    lower_bound: Tensor  #: Tensor[G], mean log-density before the last M-step
    n_iter: Tensor  #: Tensor[G] int64, EM iterations
    converged: Tensor  #: Tensor[G] bool, whether the lower bound changed by less than `tol` within `max_iter` iterations
    valid: Tensor  #: Tensor[G] bool
    covariance_type: str = "diag"  #: of the fit

    def predict(self, x: Tensor | Sequence[Tensor], count: Tensor | None = None) -> Tensor | list[Tensor]:
        """The likelier component of each value, 0 or 1 (0 where equal): int64, shape of `x`."""
        log_prob, shape = self._weighted_log_prob(x, count)
        label = (log_prob[..., 1] > log_prob[..., 0]).long()
        return shape.restore(label.masked_fill(log_prob[..., 0].isnan(), -1))

    def predict_proba(self, x: Tensor | Sequence[Tensor], count: Tensor | None = None) -> Tensor | list[Tensor]:
        """The responsibility of each component for each value: shape of `x` and a last dimension of 2 that sums to 1."""
        log_prob, shape = self._weighted_log_prob(x, count)
        return shape.restore(log_prob.softmax(-1))

    def score_samples(self, x: Tensor | Sequence[Tensor], count: Tensor | None = None) -> Tensor | list[Tensor]:
        """The log-density of the mixture at each value: shape of `x`."""
        log_prob, shape = self._weighted_log_prob(x, count)
        return shape.restore(log_prob.logsumexp(-1))

    def bic(self, x: Tensor | Sequence[Tensor], count: Tensor | None = None) -> Tensor:
        """Bayesian information criterion of each row on its values: Tensor[G]; lower is better."""
        log_likelihood, size = self._log_likelihood(x, count)
        return -2 * log_likelihood + self._n_parameters() * size.log()

    def aic(self, x: Tensor | Sequence[Tensor], count: Tensor | None = None) -> Tensor:
        """Akaike information criterion of each row on its values: Tensor[G]; lower is better."""
        log_likelihood, _ = self._log_likelihood(x, count)
        return -2 * log_likelihood + 2 * self._n_parameters()

    def _n_parameters(self) -> int:
        """Two means, one free weight, and the variances."""
        return 4 if self.covariance_type == "tied" else 5

    def _weighted_log_prob(self, x: Tensor | Sequence[Tensor], count: Tensor | None) -> tuple[Tensor, _Shape]:
        """log(weight) + log-density of each component, [..., 2]: NaN at padding."""
        values, shape = _flatten(x, count, self.weights.shape[0])
        if shape.lengths is None:
            weights, means, variances = (p[:, None] for p in (self.weights, self.means, self.variances))
        else:
            row = torch.repeat_interleave(shape.size(values), output_size=values.shape[0])
            weights, means, variances = self.weights[row], self.means[row], self.variances[row]
        values = values.detach().to(self.weights.dtype)[..., None]
        log_prob = weights.log() - ((2 * math.pi * variances).log() + (values - means) ** 2 / variances) / 2
        if shape.count is not None:
            position = torch.arange(values.shape[1], device=values.device)
            log_prob = log_prob.masked_fill((position >= shape.count[:, None])[..., None], torch.nan)
        return log_prob, shape

    def _log_likelihood(self, x: Tensor | Sequence[Tensor], count: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sum of the log-densities of each row's values, and how many there are."""
        log_prob, shape = self._weighted_log_prob(x, count)
        score, size = log_prob.logsumexp(-1), shape.size(log_prob)
        if shape.lengths is not None:
            total = torch.segment_reduce(score, "sum", lengths=size)
        elif shape.count is not None:
            position = torch.arange(score.shape[1], device=score.device)
            total = score.masked_fill(position >= shape.count[:, None], 0).sum(1)
        else:
            total = score.sum(1)
        return torch.where(self.valid, total, torch.nan), size.to(score.dtype)


@dataclass(frozen=True)
class _Shape:
    """How rows were given: padded, with or without counts, or as a list."""

    count: Tensor | None
    lengths: list[int] | None

    def size(self, values: Tensor) -> Tensor:
        """Values of each row."""
        if self.lengths is not None:
            return torch.tensor(self.lengths, device=values.device)
        if self.count is not None:
            return self.count.clamp(0, values.shape[1]).long()
        return torch.full((values.shape[0],), values.shape[1], device=values.device)

    def restore(self, result: Tensor) -> Tensor | list[Tensor]:
        """A result per value, in the form the values were given."""
        return result if self.lengths is None else list(torch.split(result, self.lengths))


def _flatten(x: Tensor | Sequence[Tensor], count: Tensor | None, rows: int | None = None) -> tuple[Tensor, _Shape]:
    """Check the data; a list becomes one flat tensor, so that rows of any lengths take no padding."""
    if isinstance(x, Tensor):
        check_tensor("x", x, (rows, None), FLOATS)
        if count is not None:
            check_tensor("count", count, (x.shape[0],), INDICES, x.device)
        return x, _Shape(count, None)
    check_list("x", x, "row", rows, "the fit")
    for i, row in enumerate(x):
        check_tensor(f"x[{i}]", row, (None,), FLOATS if i == 0 else (x[0].dtype,), x[0].device if i else None)
    if count is not None:
        raise ValueError(f"`count` must be None where `x` is a list, got {type(count).__name__}")
    return torch.cat(list(x)), _Shape(None, [row.shape[0] for row in x])


def _initial(name: str, value: Any, rows: int, size: int, device: torch.device) -> Tensor | None:
    """Initial values [size] or [G, size] as [1, size] or [G, size]."""
    if value is None:
        return None
    one_for_all = isinstance(value, Tensor) and value.dim() == 1
    check_tensor(name, value, (size,) if one_for_all else (rows, size), FLOATS, device)
    detached: Tensor = value.detach()
    return detached[None] if one_for_all else detached


def fit_gmm_1d(
    x: Tensor | Sequence[Tensor],
    count: Tensor | None = None,
    covariance_type: str = "diag",
    tol: float = 1e-3,
    reg_covar: float = 1e-6,
    max_iter: int = 100,
    weights_init: Tensor | None = None,
    means_init: Tensor | None = None,
    precisions_init: Tensor | None = None,
    precision: str = "float64",
) -> GaussianMixture1D:
    """Fit a two-component 1-D Gaussian mixture to each row.

    Equivalent to scikit-learn's `GaussianMixture(2, covariance_type=..., weights_init=..., ...)` fitted to each row minus its
    minimum, with the variances from centred second moments, so that values close together lose no digits.

    Args:
        x: Tensor[G, K] float16, bfloat16, float32 or float64, any strides; or a list of G 1-D tensors of one dtype and any
            lengths, which are kept flat, never padded.
        count: Tensor[G] int64 or int32, values of each row of a padded `x`; what follows is not read. None: K.
        covariance_type: "full", "diag" and "spherical" are the same model in one dimension; "tied" shares one variance.
        tol: a row stops when its lower bound changes by less.
        reg_covar: added to the variances.
        max_iter: iterations at most; a row that has not converged by then is no error, `converged` says so.
        weights_init, means_init, precisions_init: Tensor[2], or Tensor[G, 2] for each row (tied precisions: Tensor[1] or
            Tensor[G, 1]). None: weights (0.5, 0.5), means (minimum, maximum), precisions (1, 1).
        precision: "float64" or "float32", of the fit and its results.

    Returns:
        `GaussianMixture1D` on the device of `x`. A row with fewer than 2 values or a non-finite one is not `valid`.

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype or device; unknown `covariance_type` or `precision`; negative `tol`
            or `reg_covar`; `max_iter` < 1.

    No graph is recorded, and nothing synchronises. Source: PAA, section 3.2, equation 5; scikit-learn, `GaussianMixture`.
    """
    values, shape = _flatten(x, count)
    rows = values.shape[0] if shape.lengths is None else len(shape.lengths)
    check_option("covariance_type", covariance_type, COVARIANCE_TYPES)
    check_non_negative("tol", tol)
    check_non_negative("reg_covar", reg_covar)
    check_int("max_iter", max_iter, 1)
    check_option("precision", precision, _ops.PRECISIONS)
    precisions = 1 if covariance_type == "tied" else 2
    fit = _ops.fit_gmm_1d(
        values.detach(),
        shape.count,
        shape.lengths,
        _initial("weights_init", weights_init, rows, 2, values.device),
        _initial("means_init", means_init, rows, 2, values.device),
        _initial("precisions_init", precisions_init, rows, precisions, values.device),
        covariance_type,
        float(tol),
        float(reg_covar),
        max_iter,
        precision,
    )
    return GaussianMixture1D._make([*fit, covariance_type])
