"""Batched two-component 1-D Gaussian mixtures, fitted by EM as scikit-learn's `GaussianMixture` does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._checks import FLOATS, check_int, check_non_negative, check_option, check_tensor
from .mixture import GaussianMixture1D, flatten_rows

__all__ = ["COVARIANCE_TYPES", "GaussianMixture1D", "fit_gmm_1d"]

COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")


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
    values, shape = flatten_rows(x, count)
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
