"""G fitted mixtures of 1-D Gaussians, and what they tell: labels, responsibilities, log-densities, information criteria."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from . import _ops
from ._checks import FLOATS, INDICES, LIST, check_list, check_tensor, type_name
from ._staging import on_device

__all__ = ["GaussianMixture1D"]

Rows = Tensor | Sequence[Tensor]


class GaussianMixture1D(NamedTuple):
    """G fitted mixtures of k 1-D Gaussians. The components keep the order in which they started. The default k is 2.

    A row is valid if it has at least 2 values, at least k values, and only finite ones, and if its fit ends in finite parameters
    and variances above zero. Otherwise its parameters and lower bound are NaN, `n_iter` is 0 and `converged` is False.

    The methods take data in the same forms as `fit_gmm_1d`: Tensor[G, K] of any strides with an optional `count`, Tensor[N] for
    one row, or a list of G 1-D tensors. The data must be on the device of the fit. The result has the form of the data. Its
    floats have the dtype of the fit. Probabilities are NaN and labels are -1 at padding, in rows that are not valid, and for
    values that are not finite in the dtype of the fit. If the square of a value is not finite, its probabilities may be NaN too,
    and its label is then the first one, as in scikit-learn.

    Each method is one launch, or two if it sums over a row, or one compiled loop. It needs no memory of the size of `x` besides
    its result. A list is first joined into one tensor. No graph is recorded, and nothing waits for the device. Names and meaning
    are those of scikit-learn's `GaussianMixture`.
    """

    weights: Tensor  #: Tensor[G, k], each row sums to 1
    means: Tensor  #: Tensor[G, k]
    variances: Tensor  #: Tensor[G, k]; with "tied", all of a row are equal
    lower_bound: Tensor  #: Tensor[G], mean log-density before the last M-step
    n_iter: Tensor  #: Tensor[G] int64, EM iterations
    converged: Tensor  #: Tensor[G] bool, whether the lower bound changed by less than `tol` within `max_iter` iterations
    valid: Tensor  #: Tensor[G] bool
    covariance_type: str = "diag"  #: of the fit

    @overload
    def predict(self, x: Tensor, count: Tensor | None = None) -> Tensor: ...
    @overload
    def predict(self, x: Sequence[Tensor], count: None = None) -> list[Tensor]: ...
    def predict(self, x: Rows, count: Tensor | None = None) -> Tensor | list[Tensor]:
        """The likeliest component of each value: int64, shape of `x`. Of equal ones, the first."""
        return self._read("predict", x, count)

    @overload
    def predict_proba(self, x: Tensor, count: Tensor | None = None) -> Tensor: ...
    @overload
    def predict_proba(self, x: Sequence[Tensor], count: None = None) -> list[Tensor]: ...
    def predict_proba(self, x: Rows, count: Tensor | None = None) -> Tensor | list[Tensor]:
        """The responsibility of each component for each value: shape of `x` and a last dimension of k that sums to 1."""
        return self._read("predict_proba", x, count)

    @overload
    def low_probability(self, x: Tensor, count: Tensor | None = None) -> Tensor: ...
    @overload
    def low_probability(self, x: Sequence[Tensor], count: None = None) -> list[Tensor]: ...
    def low_probability(self, x: Rows, count: Tensor | None = None) -> Tensor | list[Tensor]:
        """The responsibility of the component with the smallest mean: shape of `x`. Of equal means, the first.

        For losses, this is the probability that a sample is clean: scikit-learn's `predict_proba(x)[:, means_.argmin()]`.
        """
        return self._read("low_probability", x, count)

    @overload
    def score_samples(self, x: Tensor, count: Tensor | None = None) -> Tensor: ...
    @overload
    def score_samples(self, x: Sequence[Tensor], count: None = None) -> list[Tensor]: ...
    def score_samples(self, x: Rows, count: Tensor | None = None) -> Tensor | list[Tensor]:
        """The log-density of the mixture at each value: shape of `x`; -inf at an infinite value."""
        return self._read("score_samples", x, count)

    def score(self, x: Rows, count: Tensor | None = None) -> Tensor:
        """The mean log-density of each row's values: Tensor[G]; NaN without values."""
        log_likelihood, size = self._log_likelihood(x, count)
        return log_likelihood / size

    def bic(self, x: Rows, count: Tensor | None = None) -> Tensor:
        """Bayesian information criterion of each row on its values: Tensor[G]; lower is better. NaN without values."""
        log_likelihood, size = self._log_likelihood(x, count)
        return -2 * log_likelihood + self._n_parameters() * size.log()

    def aic(self, x: Rows, count: Tensor | None = None) -> Tensor:
        """Akaike information criterion of each row on its values: Tensor[G]; lower is better. NaN without values."""
        log_likelihood, _ = self._log_likelihood(x, count)
        return -2 * log_likelihood + 2 * self._n_parameters()

    def sorted(self) -> GaussianMixture1D:
        """The same mixtures. The components of each row are in ascending order of their means. Equal ones keep their order."""
        order = self.means.argsort(dim=-1, stable=True)
        weights, means, variances = (values.gather(-1, order) for values in self[:3])
        return self._replace(weights=weights, means=means, variances=variances)

    def _n_parameters(self) -> int:
        """The number of free parameters: the means, all weights but one, and the variances."""
        components = self.weights.shape[1]
        return 2 * components - 1 + (1 if self.covariance_type == "tied" else components)

    def _read(self, what: str, x: Rows, count: Tensor | None) -> Tensor | list[Tensor]:
        values, shape = flatten_rows(x, count, self.weights)
        return shape.restore(_ops.read_mixture(values.detach(), shape.count, shape.lengths, *self[:3], what))

    def _log_likelihood(self, x: Rows, count: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of the log-densities of each row's values (NaN if it has none, or is not valid), and the number of values."""
        values, shape = flatten_rows(x, count, self.weights)
        total: Tensor = _ops.read_mixture(values.detach(), shape.count, shape.lengths, *self[:3], "log_likelihood")
        size = shape.size(values).to(total.dtype)
        return torch.where(self.valid & (size > 0), total, torch.nan), size


@dataclass(frozen=True)
class RowShape:
    """The form of the rows: padded, with or without counts; a list; or one row alone."""

    count: Tensor | None
    lengths: list[int] | None
    alone: bool = False

    def size(self, values: Tensor) -> Tensor:
        """Values of each row."""
        if self.lengths is not None:
            return on_device(self.lengths, torch.int64, values.device)
        if self.count is not None:
            return self.count.clamp(0, values.shape[1]).long()
        return torch.full((values.shape[0],), values.shape[1], device=values.device)

    def restore(self, result: Tensor) -> Tensor | list[Tensor]:
        """One result for each value, in the form of the values."""
        if self.alone:
            return result[0]
        return result if self.lengths is None else list(torch.split(result, self.lengths))


def flatten_rows(x: Rows, count: Tensor | None, fit: Tensor | None = None) -> tuple[Tensor, RowShape]:
    """Check the data, which has a row for each row of `fit`, on its device. A list becomes one flat tensor, without padding."""
    rows, device = (None, None) if fit is None else (fit.shape[0], fit.device)
    if isinstance(x, Tensor):
        alone = x.dim() == 1 and rows in (None, 1)
        check_tensor("x", x, (None,) if alone else (rows, None), FLOATS, device)
        x = x[None] if alone else x
        if count is not None:
            check_tensor("count", count, (x.shape[0],), INDICES, x.device)
        return x, RowShape(count, None, alone)
    if not isinstance(x, LIST):
        raise TypeError(f"`x` must be a Tensor or a list of Tensors, got {type_name(x)}")
    check_list("x", x, "row", rows, "the fit")
    for i, row in enumerate(x):
        check_tensor(f"x[{i}]", row, (None,), FLOATS if i == 0 else (x[0].dtype,), x[0].device if i else device)
    if count is not None:
        raise ValueError(f"`count` must be None where `x` is a list, got {type(count).__name__}")
    # Without rows there is a fit, which has none.
    values = _ops.joined(x) if len(x) or fit is None else fit.new_empty(0)
    return values, RowShape(None, [row.shape[0] for row in x])
