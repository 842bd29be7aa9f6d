"""Pictures of what reassignment does. Needs matplotlib and Pillow: `pip install paa-gpu[demo]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import Recording, Voting, picture
from .em import GaussianMixture1D
from .reassign import Reassignment
from .reference import overlaps
from .topk import Candidates

# Okabe and Ito's colours, told apart by the colour-blind.
BLUE, ORANGE, GREY, BLACK = "#0072B2", "#E69F00", "#999999", "#000000"


def plot_fit(axes: Any, loss: Tensor, gmm: GaussianMixture1D, row: int, positive: Tensor) -> None:
    """One ground truth: its candidates' losses, the two fitted Gaussians, and where the positives end.

    Args:
        axes: matplotlib axes.
        loss: Tensor[n] float, the candidates' losses, ascending.
        gmm: the fit; `row` of it is this ground truth.
        row: the row of `gmm`.
        positive: BoolTensor[n], which candidates are positive.
    """
    weights, means, variances = (values[row].tolist() for values in gmm[:3])
    low, high = float(loss.min()), float(loss.max())
    x = np.linspace(low - 0.08 * (high - low), high + 0.08 * (high - low), 600)
    names, sides, top = ("foreground", "background"), ("right", "left"), 0.0
    for name, colour, side, *parameters in zip(names, (BLUE, ORANGE), sides, weights, means, variances, strict=True):
        weight, mean, variance = parameters
        density = weight * np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        axes.fill_between(x, density, color=colour, alpha=0.25, linewidth=0)
        axes.plot(x, density, color=colour)
        peak = int(density.argmax())
        axes.annotate(
            f"{name}\ncomponent", (x[peak], density[peak]), (0, 4), textcoords="offset points", ha=side, color=colour,
            fontweight="bold",
        )  # fmt: skip
        top = max(top, float(density.max()))
    threshold = float(loss[positive].max())
    axes.axvline(threshold, color=BLACK, linestyle="--", linewidth=1)
    axes.annotate(
        f"threshold {threshold:.2f}: the positives end with\nthe most likely foreground candidate",
        (threshold, 1.38 * top), (6, 0), textcoords="offset points", va="top",
    )  # fmt: skip
    base = -0.07 * top
    axes.plot(
        loss[positive], [base] * int(positive.sum()), "o", color=BLUE, markersize=6, label=f"{int(positive.sum())} positives"
    )
    axes.plot(
        loss[~positive],
        [base] * int((~positive).sum()),
        "x",
        color=GREY,
        markersize=6,
        label=f"{int((~positive).sum())} negatives",
    )
    axes.set(
        xlabel=f"losses of the {len(loss)} candidates (classification + regression)", ylabel="density", ylim=(3 * base, 1.4 * top)
    )
    axes.legend(loc="lower center", ncols=2, frameon=False)


def plot_anchors(axes: Any, image: Any, boxes: np.ndarray[Any, Any], centres: Tensor, chosen: Tensor, gt: int) -> None:
    """Ground truths as boxes, anchors as dots at their centres; those of ground truth `gt` stand out.

    Args:
        axes: matplotlib axes.
        image: Array[H, W, 3], or a Pillow image.
        boxes: Array[G, 4], x1, y1, x2, y2 in pixels of the image.
        centres: Tensor[n, 2], x, y in pixels.
        chosen: BoolTensor[n], the anchors of `gt`.
        gt: the ground truth to stand out.
    """
    from matplotlib.patches import Rectangle

    axes.imshow(image, alpha=0.75)
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        style: dict[str, Any] = (
            {"edgecolor": ORANGE, "linewidth": 2.5, "zorder": 4} if i == gt else {"edgecolor": "white", "linewidth": 0.8}
        )
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))
    axes.plot(*centres[~chosen].T, ".", color=BLUE, markersize=2.5)
    axes.plot(*centres[chosen].T, ".", color=ORANGE, markersize=4.5)
    axes.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])


def plot_recording(recording: Recording, result: Reassignment, candidates: Candidates, path: Path) -> None:
    """The demonstration's picture: an image's potential positives, its positives, and the fit of one ground truth.

    Args:
        recording: the image.
        result: its reassignment, a batch of one.
        candidates: its `Candidates`.
        path: where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    positive = result.positive[0]
    gt = _telling(result.fit, candidates, positive)
    index = candidates.index[gt, : candidates.count[gt]]
    image, boxes = picture(recording), recording.gt["bboxes"]
    anchors = torch.cat(recording.anchors)[recording.pos_inds]
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    of_gt = recording.pos_gt_inds == gt

    figure, (before, after, fit) = pyplot.subplots(1, 3, figsize=(18, 6.4), width_ratios=[1, 1, 1.15], layout="constrained")
    figure.suptitle(
        f"Probabilistic anchor assignment of {recording.num_gt} trees: white boxes are ground truths, "
        "dots the centres of anchors; one ground truth and its anchors in orange", fontsize=13,
    )  # fmt: skip
    plot_anchors(before, image, boxes, centres, of_gt, gt)
    before.set_title(f"Before: {len(centres):,} potential positives (IoU at least 0.1)")
    plot_anchors(after, image, boxes, centres[positive], of_gt[positive], gt)
    after.set_title(f"After: {int(positive.sum()):,} positives")
    plot_fit(fit, candidates.loss[gt, : len(index)], result.fit, gt, positive[index])
    fit.set_title(f"The orange ground truth: two Gaussians fitted to its losses, {int(result.fit.n_iter[gt])} iterations")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def plot_voting(recording: Recording, call: Voting, voted: Tensor, labels: Tensor, path: Path) -> None:
    """The demonstration's second picture: an image's detections before and after voting, and the voters of one of them.

    Args:
        recording: the image.
        call: its detections and the boxes before NMS.
        voted: Tensor[k, 5], the detections after voting, in the order of `call.det_bboxes`.
        labels: Tensor[k], their classes.
        path: where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    image, det = picture(recording), call.det_bboxes
    distance = (voted[:, :4] - det[:, :4]).abs().amax(1)
    chosen = int((distance * (det[:, 4] > det[:, 4].median())).argmax())
    candidates = call.mlvl_nms_scores[:, labels[chosen]] > call.score_thr
    boxes, scores = call.mlvl_bboxes[candidates], call.mlvl_nms_scores[candidates, labels[chosen]]
    iou = overlaps(det[chosen : chosen + 1, :4], boxes, 0.0)[0]
    weights = torch.exp(-((1 - iou) ** 2) / 0.025) * scores * (iou > 0.01)

    figure, (all_axes, one_axes) = pyplot.subplots(1, 2, figsize=(16, 7.6), layout="constrained")
    figure.suptitle(
        f"Score voting: each of {len(det)} detections moves to the weighted mean of the boxes around it; "
        "blue before, orange after", fontsize=13,
    )  # fmt: skip
    for axes in (all_axes, one_axes):
        axes.imshow(image, alpha=0.75)
        axes.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])
    _plot_boxes(all_axes, det[:, :4], BLUE)
    _plot_boxes(all_axes, voted[:, :4], ORANGE)
    median, most = distance.median().item(), distance.max().item()
    all_axes.set_title(f"All detections: they move by {median:.1f} pixels (median), at most {most:.1f}")

    opacity = (weights / weights.max())[iou > 0.01].clamp(min=0.1).tolist()
    _plot_boxes(one_axes, boxes[iou > 0.01], BLACK, alpha=opacity)
    _plot_boxes(one_axes, det[chosen, None, :4], BLUE, linewidth=3)
    _plot_boxes(one_axes, voted[chosen, None, :4], ORANGE, linewidth=3)
    x1, y1, x2, y2 = det[chosen, :4].tolist()
    margin = 0.5 * max(x2 - x1, y2 - y1)
    one_axes.set(xlim=(x1 - margin, x2 + margin), ylim=(y2 + margin, y1 - margin))
    one_axes.set_title(f"One of them and its {int((iou > 0.01).sum())} voters, the more opaque the more they weigh")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _plot_boxes(axes: Any, boxes: Tensor, colour: str, linewidth: float = 1.2, alpha: list[float] | None = None) -> None:
    from matplotlib.patches import Rectangle

    for (x1, y1, x2, y2), opacity in zip(boxes.tolist(), alpha or [1.0] * len(boxes), strict=True):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=linewidth, alpha=opacity))


def _telling(gmm: GaussianMixture1D, candidates: Candidates, positive: Tensor) -> int:
    """A ground truth with many positives and negatives, and two components of like weight that lie apart."""
    valid = candidates.index >= 0
    kept = positive[candidates.index.clamp(min=0)] & valid
    smaller = torch.minimum(kept.sum(1), (valid & ~kept).sum(1))
    distance = (gmm.means[:, 1] - gmm.means[:, 0]).abs() / gmm.variances.sum(1).sqrt()
    return int((distance * gmm.weights.amin(1)).masked_fill(smaller < smaller.max() / 2, -1).argmax())
