"""The separation schemes of PAA: which candidates of a fitted ground truth are positive, ignored or negative.

Figure 3 of the paper draws four boundaries, (a) to (d). Here each is a row of `SCHEMES`. Every implementation reads the row.
`separate` defines its meaning, with torch operations on a padded batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_option

__all__ = ["SCHEMES", "Scheme", "separate", "tie_tolerance"]


class Scheme(NamedTuple):
    """One row of the table. The threshold is the foreground candidate with the highest score."""

    stop_at_threshold: bool  #: positives end with the threshold candidate
    foreground_only: bool  #: background candidates among the positives are not positive
    ignore_foreground: bool  #: foreground candidates that are not positive are ignored
    ignore_before_background: bool  #: candidates between the threshold and the best background candidate are ignored
    all_without_foreground: bool  #: a ground truth without foreground keeps all its candidates


#: The built-in schemes.
SCHEMES = {
    #                stop_at_threshold, foreground_only, ignore_foreground, ignore_before_background, all_without_foreground
    "mmdet": Scheme(True, True, False, False, False),  # figure 3c, in mmdetection's version
    "paper": Scheme(True, False, False, False, True),  # figure 3c, in the version of the authors' repository
    "a": Scheme(False, True, False, False, False),
    "b": Scheme(True, False, False, True, False),
    "d": Scheme(True, True, True, False, False),
}


def tie_tolerance(dtype: torch.dtype) -> float:
    """Scores (log-densities) this close to the highest count as equal to it. Only rounding decides between them.

    A foreground of two candidates is symmetric about its mean. So their float64 scores differ only in the last bits. In a
    float32 fit, 1e-9 is below the spacing of the scores, so only equal scores tie.
    """
    return 1e-9 if dtype == torch.float64 else 0.0


def _first_best(score: Tensor, among: Tensor) -> Tensor:
    """Position, along dim 1, of the first candidate of `among` that ties with the highest score; K where there is none."""
    score = score.masked_fill(~among, -torch.inf)
    tied = among & (score >= score.amax(1, keepdim=True) - tie_tolerance(score.dtype))
    position = torch.arange(score.shape[1], device=score.device).expand_as(score)
    return position.masked_fill(~tied, score.shape[1]).amin(1, keepdim=True)


def separate(assignment: Tensor, score: Tensor, loss: Tensor, mask: Tensor, scheme: str = "mmdet") -> tuple[Tensor, Tensor]:
    """Apply a built-in scheme to a padded batch of fitted ground truths.

    It has the signature of a `separation` function. So your own scheme can start from a built-in one::

        def cautious(assignment, score, loss, mask):
            positive, ignored = paa_gpu.separation.separate(assignment, score, loss, mask, "mmdet")
            return positive & (loss < 2), ignored | (positive & (loss >= 2))

    Args:
        assignment: BoolTensor[G, K], True where the candidate belongs to the foreground component.
        score: Tensor[G, K], log-density of the mixture at each candidate. Ties (see `tie_tolerance`) go to the first.
        loss: Tensor[G, K], ascending along a row. The built-in schemes do not use it.
        mask: BoolTensor[G, K], True at candidates, False at padding and in rows without a fit.
        scheme: a key of `SCHEMES`.

    Returns:
        `(positive, ignored)`, two BoolTensor[G, K]. A candidate that is neither is negative.

    Raises:
        ValueError: an unknown scheme.

    Source: PAA, section 3.2 and figure 3.
    """
    check_option("scheme", scheme, SCHEMES)
    rule = SCHEMES[scheme]
    if assignment.shape[1] == 0:
        return assignment & mask, assignment & mask
    foreground, background = assignment & mask, ~assignment & mask
    position = torch.arange(mask.shape[1], device=mask.device)
    threshold = _first_best(score, foreground)
    has_foreground = foreground.any(1, keepdim=True)

    positive = foreground if rule.foreground_only else mask
    if rule.stop_at_threshold:
        positive = positive & (position <= threshold)
    if not rule.all_without_foreground:
        positive = positive & has_foreground

    ignored = torch.zeros_like(mask)
    if rule.ignore_foreground:
        ignored = foreground & ~positive
    if rule.ignore_before_background:
        ignored = mask & has_foreground & (position > threshold) & (position < _first_best(score, background))
    return positive, ignored
