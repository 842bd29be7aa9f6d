"""Candidate selection: for every ground truth, the potential positives with the smallest losses of each pyramid level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import _ops
from ._checks import FLOATS, INDICES, check_int, check_tensor, level_sizes_of

__all__ = ["Candidates", "select_candidates"]


class Candidates(NamedTuple):
    """The candidates of G ground truths, at most K each. A row ascends by (loss, anchor index)."""

    loss: Tensor  #: Tensor[G, K], dtype of the losses; +inf at padding
    #: Tensor[G, K] int64 into `pos_inds`; -1 at padding
    index: Tensor  # type: ignore[assignment]
    #: Tensor[G] int64, the number of candidates of each ground truth; the rest of a row is padding
    count: Tensor  # type: ignore[assignment]


def select_candidates(
    pos_losses: Tensor,
    pos_inds: Tensor,
    pos_gt_inds: Tensor,
    level_sizes: Sequence[int] | Sequence[Tensor],
    *,
    num_gt: int,
    topk: int = 9,
) -> Candidates:
    """Select the candidates of every ground truth of one image.

    Args:
        pos_losses: Tensor[P] float16, bfloat16, float32 or float64, loss of each potential positive.
        pos_inds: Tensor[P] int64 or int32, anchor index of each potential positive; unique, in any order.
        pos_gt_inds: Tensor[P] int64 or int32, ground truth of each potential positive.
        level_sizes: anchors of each pyramid level (or the anchors, Tensor[A_l, 4] each); level l owns the anchor indices
            from sum(level_sizes[:l]) on.
        num_gt: G, ground truths of the image. One without potential positives has no candidates.
        topk: the most candidates of a ground truth on each level.

    Returns:
        `Candidates`, K = min(P, sum of min(topk, size of the level)).

    Raises:
        TypeError, ValueError: wrong type, rank, shape, dtype, device; `topk` < 1; a negative `num_gt` or level size.

    Order: -inf < finite (-0.0 equals 0.0) < +inf < NaN of either sign. Equal losses are ordered by anchor index. A potential
    positive is left out if its anchor or ground truth is out of range. Nothing waits for the device.

    Source: PAA, section 3.2, algorithm 1.
    """
    check_tensor("pos_losses", pos_losses, (None,), FLOATS)
    size, device = pos_losses.shape[0], pos_losses.device
    check_tensor("pos_inds", pos_inds, (size,), INDICES, device)
    check_tensor("pos_gt_inds", pos_gt_inds, (size,), INDICES, device)
    sizes = level_sizes_of("level_sizes", level_sizes)
    check_int("num_gt", num_gt, 0)
    check_int("topk", topk, 1)
    return Candidates(*_ops.select_candidates([pos_losses.detach()], [pos_inds], [pos_gt_inds], sizes, [num_gt], topk))
