"""Batched 1-D Gaussian mixtures, fitted by the same EM as scikit-learn's `GaussianMixture`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _ops
from ._checks import FLOATS, check_int, check_non_negative, check_option, check_tensor, refuse, values_of
from .cpu._arrays import Array
from .mixture import GaussianMixture1D, flatten_rows

__all__ = ["COVARIANCE_TYPES", "GaussianMixture1D", "fit_gmm_1d"]

COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")


#: Components at most: what a thread of the kernels has registers for.
MAX_COMPONENTS = 8


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
    *,
    n_components: int = 2,
    init: str = "minmax",
    n_init: int = 1,
    generator: torch.Generator | int | None = None,
) -> GaussianMixture1D:
    """Fit a 1-D Gaussian mixture to each row.

    The fit equals that of scikit-learn's `GaussianMixture(n_components, covariance_type=..., weights_init=..., ...)` to each row
    minus its minimum. But it takes variances from centred second moments, so values close together lose no digits.

    Args:
        x: Tensor[G, K] float16, bfloat16, float32 or float64, of any strides; or Tensor[N], one row; or a list of G 1-D tensors
            of one dtype and any lengths. A list is never padded. A table with one column needs `count`. Without `count` it raises
            an error, because it most likely holds N samples of one mixture.
        count: Tensor[G] int64 or int32, the number of values in each row of a padded `x`. The rest is not read. None: K.
        covariance_type: "full", "diag" and "spherical" are the same model in one dimension; "tied" shares one variance.
        tol: a row stops when its lower bound changes by less than this.
        reg_covar: added to the variances.
        max_iter: the most iterations. A row that has not converged by then raises no error; its `converged` is False. On a GPU,
            a call with a row of more than 16,384 values takes so many launches, even if all rows converge earlier. In a list,
            shorter rows have a launch of their own.
        weights_init, means_init, precisions_init: Tensor[k] for all rows, or Tensor[G, k], where k = n_components (tied
            precisions: Tensor[1] or Tensor[G, 1]). They replace the values of the start. If one of a row's initial values is not
            finite, the row ignores them all. So a warm start recovers from a row that was not valid. A float32 fit rounds them
            to float32 first.
        precision: of the fit. "float64"; "float32"; "mixed"; or "auto". "mixed" gives tensors of float64. Kernels then fit in
            float32 if `x` is at most 64 wide (a list: its longest row of up to 16,384 values), with two components, the start
            "minmax", no initial values and no tied variance. They fit a row once more in float64 if float32 is not sure of
            `n_iter` (`docs/options.md`). "auto" is "mixed" on GPUs with slow float64, and "float64" elsewhere. For CPU tensors,
            both are "float64".
        n_components: 1 to 8.
        init: where the fit starts. "minmax", as in PAA: equal weights, means at even distances from the minimum to the maximum,
            and precisions of 1. The others divide the row into groups, and make one M-step, as scikit-learn does. Each value
            belongs to the nearest of k centres:
            "quantile": the centres are the values of rank (2 j + 1) n // 2 k, j = 0 ... k - 1;
            "kmeans": two centres in a row of up to 64 values are those with the least sum of squares. If only rounding tells two
            divisions apart, as of three evenly spaced values, the one with the smaller low group counts. For other rows, Lloyd's
            iteration finds the centres. It starts from the row's mean as the boundary between two groups, and from the quantiles
            for more groups. It stops when no value changes its group, or after 50 times;
            "random": the centres are k values of the row, drawn without replacement.
        n_init: with "random", the number of starts of each row. The one with the highest lower bound is kept, or the first
            within 1e-9 of it (in float32: the first that equals it). The other values of `init` have one start.
        generator: with "random", a seed in [0, 2^63), or a `torch.Generator` that draws the seed (None: torch's own for the
            CPU). The same seed draws the same positions on every device: Philox, counted by row, start and component.

    Returns:
        `GaussianMixture1D` on the device of `x`. A row is not `valid` if it has fewer than 2 values, fewer values than
        components, or a value that is not finite. It is not `valid` either if the fit ends in a parameter that is not finite or a
        variance of 0. This happens for equal values with `reg_covar=0`, and for squares beyond the range of a float32 fit.

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype or device; unknown `covariance_type`, `precision` or `init`;
            negative `tol` or `reg_covar`; `max_iter`, `n_components` or `n_init` out of range. For CPU tensors also initial
            weights that are negative or do not sum to 1, and precisions that are not positive. On a GPU, such a row is not
            `valid`.

    The function records no graph, and does not wait for the device.

    Source: PAA, section 3.2, equation 5; scikit-learn, `GaussianMixture`; S. Lloyd, Least squares quantization in PCM, 1982; J.
    Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011 (Philox).
    """
    if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == 1 and x.shape[0] > 0 and count is None:
        raise ValueError(
            f"`x` must have one row per mixture, got shape [{x.shape[0]}, 1]: for N samples of one mixture pass Tensor[N], or "
            "use paa_gpu.integrations.sklearn.GaussianMixture"
        )
    values, shape = flatten_rows(x, count)
    rows = values.shape[0] if shape.lengths is None else len(shape.lengths)
    check_option("covariance_type", covariance_type, COVARIANCE_TYPES)
    check_non_negative("tol", tol)
    check_non_negative("reg_covar", reg_covar)
    check_int("max_iter", max_iter, 1)
    check_option("precision", precision, _ops.PRECISIONS)
    check_int("n_components", n_components, 1, MAX_COMPONENTS)
    check_option("init", init, _ops.INITS)
    check_int("n_init", n_init, 1)
    weights = _initial("weights_init", weights_init, rows, n_components, values.device)
    means = _initial("means_init", means_init, rows, n_components, values.device)
    shared = 1 if covariance_type == "tied" else n_components
    precisions = _initial("precisions_init", precisions_init, rows, shared, values.device)
    _check_initial(weights, means, precisions)
    fit = _ops.fit_gmm_1d(
        values.detach(),
        shape.count,
        shape.lengths,
        weights,
        means,
        precisions,
        covariance_type,
        float(tol),
        float(reg_covar),
        max_iter,
        precision,
        n_components,
        init,
        n_init if init == "random" else 1,
        _seed(generator, init == "random"),
    )
    return GaussianMixture1D._make([*fit, covariance_type])


def _initial(name: str, value: Any, rows: int, size: int, device: torch.device) -> Tensor | None:
    """Initial values [size] or [G, size] as [1, size] or [G, size]."""
    if value is None:
        return None
    one_for_all = isinstance(value, Tensor) and value.dim() == 1
    check_tensor(name, value, (size,) if one_for_all else (rows, size), FLOATS, device)
    detached: Tensor = value.detach().resolve_neg()
    return detached[None] if one_for_all else detached


def _check_initial(weights: Tensor | None, means: Tensor | None, precisions: Tensor | None) -> None:
    """Refuse initial values that make no mixture, if they can be read. Rows with values that are not finite ignore theirs."""
    given = [value for value in (weights, means, precisions) if value is not None]
    rows: list[Any] = [values_of(value) for value in given]
    if not rows or any(values is None for values in rows):
        return
    finite: Array = functools.reduce(np.logical_and, [np.isfinite(value).all(1) for value in rows])
    if weights is not None:
        wrong: Array = abs(rows[0].sum(1, dtype=np.float64) - 1) > _ops.sum_tolerance(weights)
        refuse((rows[0] < 0).any(1) & finite, "weights_init", rows[0], "not be negative", "in row {}")
        refuse(wrong & finite, "weights_init", rows[0], "sum to 1", "in row {}")
    if precisions is not None:
        refuse((rows[-1] <= 0).any(1) & finite, "precisions_init", rows[-1], "be positive", "in row {}")


def _seed(generator: torch.Generator | int | None, needed: bool) -> int:
    """A number in [0, 2^63). A generator gives another one each time. Reading a GPU's generator does not wait."""
    if generator is None or isinstance(generator, torch.Generator):
        if not needed:
            return 0
        if generator is not None and generator.device.type == "cuda":
            offset = generator.get_offset()
            generator.set_offset(offset + 4)  # CUDA's own counts in steps of four
            return (generator.initial_seed() + 0x9E3779B97F4A7C15 * offset) % 2**63
        return int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
    if isinstance(generator, bool) or not isinstance(generator, int):
        raise TypeError(f"`generator` must be a torch.Generator, an int or None, got {type(generator).__name__}")
    if not 0 <= generator < 2**63:
        raise ValueError(f"`generator` must be in [0, 2^63), got {generator}")
    return generator
