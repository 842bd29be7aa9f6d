"""G fitted mixtures of 1-D Gaussians, read out: labels, responsibilities, log-densities, information criteria."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATS, INDICES, check_list, check_tensor

__all__ = ["GaussianMixture1D"]


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

    def _weighted_log_prob(self, x: Tensor | Sequence[Tensor], count: Tensor | None) -> tuple[Tensor, RowShape]:
        """log(weight) + log-density of each component, [..., 2]: NaN at padding."""
        values, shape = flatten_rows(x, count, self.weights.shape[0])
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
class RowShape:
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


def flatten_rows(x: Tensor | Sequence[Tensor], count: Tensor | None, rows: int | None = None) -> tuple[Tensor, RowShape]:
    """Check the data; a list becomes one flat tensor, so that rows of any lengths take no padding."""
    if isinstance(x, Tensor):
        check_tensor("x", x, (rows, None), FLOATS)
        if count is not None:
            check_tensor("count", count, (x.shape[0],), INDICES, x.device)
        return x, RowShape(count, None)
    check_list("x", x, "row", rows, "the fit")
    for i, row in enumerate(x):
        check_tensor(f"x[{i}]", row, (None,), FLOATS if i == 0 else (x[0].dtype,), x[0].device if i else None)
    if count is not None:
        raise ValueError(f"`count` must be None where `x` is a list, got {type(count).__name__}")
    return torch.cat(list(x)), RowShape(None, [row.shape[0] for row in x])
