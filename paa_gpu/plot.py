"""Pictures of what reassignment and score voting do. Needs matplotlib and Pillow: `pip install matplotlib pillow`.

`plot_fit`, `plot_mixture`, `plot_schemes` and `plot_anchors` draw into given axes. `plot_recording`, `plot_separation` and
`plot_voting` write a whole picture, 1,800 pixels wide. Shown 700 pixels wide, as on a page, its text has at least 9 points.

A row of `gmm` that is not valid, an image without boxes and a call without detections have no picture: a ValueError says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import Recording, Voting, picture
from .mixture import GaussianMixture1D
from .reassign import Reassignment
from .reference import overlaps
from .separation import SCHEMES, separate, tie_tolerance
from .topk import Candidates

__all__ = ["plot_anchors", "plot_fit", "plot_mixture", "plot_recording", "plot_schemes", "plot_separation", "plot_voting"]

# Okabe and Ito's colours. The colour-blind can tell them apart, and a shape or a word says the same.
BLUE, ORANGE, GREY, BLACK = "#0072B2", "#E69F00", "#666666", "#000000"

LOSS = "loss of a candidate (classification + regression, no unit)"
# A point is 1/72 inch, and a screen shows 96 pixels an inch: 7.2 inches become about 700 pixels, and 9 points stay 9 points.
WIDTH, DPI, POINTS = 7.2, 250, 9
#: A peak that is so many times as high as the other one is cut off.
STEEP = 30

#: The defaults of `score_voting`.
IOU_THR, SIGMA = 0.01, 0.025


def _check_fit(gmm: GaussianMixture1D, row: int, components: int | None = None) -> None:
    if components not in (None, gmm.means.shape[1]):
        raise ValueError(f"`gmm` must have {components} components, got {gmm.means.shape[1]}")
    if not gmm.valid[row]:
        raise ValueError(f"`row` must be one of `gmm` with a valid fit, got {row}")


def _check_any(name: str, what: str, number: int) -> None:
    if number == 0:
        raise ValueError(f"`{name}` must have at least one {what}, got none")


def _numbers(loss: Tensor) -> Tensor:
    """What matplotlib takes: it knows no bfloat16 and no graphs."""
    return loss.detach().double()


def plot_fit(axes: Any, loss: Tensor, gmm: GaussianMixture1D, row: int, positive: Tensor) -> None:
    """One ground truth: its candidates' losses, the two fitted Gaussians, and where the positives end.

    Args:
        axes: matplotlib axes.
        loss: Tensor[n] float, the candidates' losses, ascending.
        gmm: the fits. The row `row` is that of this ground truth.
        row: the row of `gmm`.
        positive: BoolTensor[n], which candidates are positive; without any there is no threshold to draw.
    """
    loss = _numbers(loss)
    top = _plot_components(axes, loss, gmm, row)
    base = -0.14 * top
    if positive.any():
        threshold = float(loss[positive].max())
        axes.vlines(threshold, 1.5 * base, 1.6 * top, color=BLACK, linestyle="--", linewidth=1)
        axes.annotate(
            f"threshold {threshold:.2f}:\nthe likeliest\nforeground candidate", (threshold, 1.57 * top), (6, 0),
            textcoords="offset points", va="top",
        )  # fmt: skip
    for mask, marker, colour, name in ((positive, "o", BLUE, "positive"), (~positive, "x", GREY, "negative")):
        number = int(mask.sum())
        axes.plot(loss[mask], [base] * number, marker, color=colour, markersize=6, label=f"{number} {name}")
    axes.set(xlabel=LOSS, ylabel="density, per unit of loss", ylim=(3.4 * base, 1.6 * top))
    axes.set_yticks([place for place in axes.get_yticks() if 0 <= place <= 1.6 * top])
    axes.legend(loc="lower center", ncols=2, frameon=False, handlelength=1, columnspacing=1.5, borderaxespad=0)


def plot_mixture(axes: Any, x: Tensor, gmm: GaussianMixture1D, row: int, bins: int = 100) -> None:
    """Any number of values as a histogram, and the fitted Gaussians times their weights over it.

    Args:
        axes: matplotlib axes.
        x: Tensor[n] floating, the values of a row.
        gmm: the fits. The row `row` is that of these values. The components are drawn in three colours, in turn.
        row: the row of `gmm`.
        bins: bars of the histogram.
    """
    _check_fit(gmm, row)
    values = x.detach().cpu().double().numpy()
    heights, _, _ = axes.hist(values, bins, density=True, color=GREY, alpha=0.35, label=f"{len(values):,} values")
    places, top = _places(values.min(), values.max(), *(part[row].tolist() for part in gmm[1:3])), float(heights.max())
    for k, parameters in enumerate(zip(*(values[row].tolist() for values in gmm[:3]), strict=True)):
        density, (weight, mean, variance) = _density(places, *parameters), parameters
        label = f"component {k}: weight {weight:.2f}, mean {mean:.2f}, deviation {variance**0.5:.2f}"
        axes.plot(places, density, ("-", "--", ":")[k % 3], color=(BLUE, ORANGE, BLACK)[k % 3], linewidth=2, label=label)
        top = max(top, min(float(density.max()), 2 * float(heights.max())))
    axes.set(xlabel="value", ylabel="density", ylim=(0, 1.35 * top))
    axes.legend(loc="upper right", frameon=False)


def plot_schemes(axes: Any, loss: Tensor, gmm: GaussianMixture1D, row: int) -> None:
    """One ground truth under every separation scheme. A line for each scheme shows its positive, ignored and negative candidates.

    Args:
        axes: matplotlib axes.
        loss: Tensor[n] float, the candidates' losses, ascending.
        gmm: the fits. The row `row` is that of this ground truth.
        row: the row of `gmm`.
    """
    _check_fit(gmm, row, components=2)
    loss = _numbers(loss)
    one = GaussianMixture1D._make([*(values[row, None] for values in gmm[:7]), gmm.covariance_type])
    foreground, score = torch.as_tensor(one.predict(loss[None])) == 0, torch.as_tensor(one.score_samples(loss[None]))
    everyone = torch.ones_like(foreground)
    kinds = (("o", BLUE, "positive"), ("D", ORANGE, "ignored"), ("x", GREY, "negative"))
    for line, scheme in enumerate(SCHEMES):
        positive, ignored = (masks[0] for masks in separate(foreground, score, loss[None], everyone, scheme))
        for (marker, colour, name), mask in zip(kinds, (positive, ignored, ~positive & ~ignored), strict=True):
            axes.plot(loss[mask], [line] * int(mask.sum()), marker, color=colour, label=name if line == 0 else None)
    previous, high, letter_width = -float("inf"), False, 0.02 * float(loss.max() - loss.min())
    for x, is_foreground in zip(loss.tolist(), foreground[0].tolist(), strict=True):
        letter, colour = ("F", BLUE) if is_foreground else ("B", GREY)
        high = x - previous < letter_width and not high  # neighbours that would cover one another take two heights
        axes.text(x, -1.25 if high else -0.8, letter, ha="center", va="center", color=colour, fontweight="bold")
        previous = x
    for letter, of, side, style in (("F: threshold", foreground, "right", "--"), ("B", ~foreground, "left", ":")):
        if of.any():
            among = score[0].masked_fill(~of[0], -torch.inf)
            best = float(loss[among >= among.max() - tie_tolerance(score.dtype)][0])
            axes.axvline(best, color=BLACK, linestyle=style, linewidth=1, zorder=1)
            axes.text(best, -1.9, f" likeliest {letter} ", ha=side, va="center")
    names = ["component", *(f'"{scheme}"' for scheme in SCHEMES)]
    axes.set(xlabel=LOSS, ylim=(len(SCHEMES) - 0.4, -2.5), yticks=range(-1, len(SCHEMES)), yticklabels=names)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def plot_anchors(axes: Any, image: Any, boxes: np.ndarray[Any, Any], centres: Tensor, chosen: Tensor, gt: int) -> None:
    """Ground truths as boxes, and anchors as dots at their centres. Ground truth `gt` and its anchors stand out.

    Args:
        axes: matplotlib axes.
        image: a Pillow image.
        boxes: Array[G, 4], x1, y1, x2, y2 in pixels of the image.
        centres: Tensor[n, 2], x, y in pixels.
        chosen: BoolTensor[n], the anchors of `gt`.
        gt: the ground truth to stand out.
    """
    _plot_image(axes, image)
    everyone = torch.from_numpy(boxes)
    _plot_boxes(axes, everyone, "white", linewidth=0.8)
    axes.plot(*centres[~chosen].T, ".", color=BLUE, markersize=0.6 if len(centres) > 2000 else 2.5)
    _plot_boxes(axes, everyone[gt, None], ORANGE, linewidth=2)
    axes.plot(*centres[chosen].T, ".", color=ORANGE, markersize=1 if len(centres) > 2000 else 3)


def plot_recording(recording: Recording, result: Reassignment, candidates: Candidates, path: str | Path) -> None:
    """The demonstration's picture: an image's potential positives, its positives, and the fit of one ground truth.

    Args:
        recording: the image.
        result: its reassignment, a batch of one.
        candidates: its `Candidates`.
        path: where the picture goes.
    """
    _check_any("recording", "box", recording.num_gt)
    positive = result.positive[0]
    gt = _telling(result.fit, candidates, positive)
    index = candidates.index[gt, : candidates.count[gt]]
    image, boxes = picture(recording), recording.gt["bboxes"]
    anchors = torch.cat(recording.anchors)[recording.pos_inds]
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    of_gt = recording.pos_gt_inds == gt

    with _text():
        figure, (before, after, fit) = _figure(3.4, 1, 3, width_ratios=[1, 1, 1.3])
        figure.suptitle(
            f"Which anchors are a detector's positives? {recording.num_gt} trees (boxes), the centres\n"
            "of anchors (dots), and one tree with its anchors in orange"
        )
        plot_anchors(before, image, boxes, centres, of_gt, gt)
        before.set_title(f"Before: {len(centres):,} anchors\noverlap a tree (IoU >= 0.1)")
        plot_anchors(after, image, boxes, centres[positive], of_gt[positive], gt)
        after.set_title(f"After: {int(positive.sum()):,} positives,\nthe lowest losses")
        plot_fit(fit, candidates.loss[gt, : len(index)], result.fit, gt, positive[index])
        fit.set_title(f"The orange tree: two Gaussians\nfitted to the losses of {len(index)} anchors")
        fit.set_xlabel("loss of a candidate")
        figure.savefig(path, dpi=DPI)


def plot_separation(loss: Tensor, gmm: GaussianMixture1D, row: int, path: str | Path) -> None:
    """A ground truth's fit, and below it what each separation scheme makes of it.

    Args:
        loss: Tensor[n] float, the candidates' losses, ascending.
        gmm: the fits. The row `row` is that of this ground truth.
        row: the row of `gmm`.
        path: where the picture goes.
    """
    with _text():
        figure, (fit, schemes) = _figure(5.2, 2, 1, sharex=True, height_ratios=[1, 1.15])
        loss = _numbers(loss)
        top = _plot_components(fit, loss, gmm, row)
        fit.set(ylabel="density, per unit of loss", ylim=(0, 1.35 * top))
        fit.tick_params(labelbottom=True)
        fit.set_title(f"The two Gaussians fitted to the losses of {len(loss)} candidates of one ground truth")
        plot_schemes(schemes, loss, gmm, row)
        schemes.set_title("Each candidate's likelier component (F or B), and what each scheme makes of it")
        figure.legend(*schemes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=DPI)


def plot_voting(recording: Recording, call: Voting, voted: Tensor, labels: Tensor, path: str | Path) -> None:
    """The demonstration's second picture: an image's detections before and after voting, and the voters of one of them.

    Args:
        recording: the image.
        call: its detections and the boxes before NMS.
        voted: Tensor[k, 5], the detections after voting, in the order of `call.det_bboxes`.
        labels: Tensor[k], their classes.
        path: where the picture goes.
    """
    _check_any("call", "detection", len(call.det_bboxes))
    image, det = picture(recording), call.det_bboxes
    distance = (voted[:, :4] - det[:, :4]).abs().amax(1)
    chosen = int((distance * (det[:, 4] > det[:, 4].median())).argmax())
    candidates = call.mlvl_nms_scores[:, labels[chosen]] > call.score_thr
    boxes, scores = call.mlvl_bboxes[candidates], call.mlvl_nms_scores[candidates, labels[chosen]]
    iou = overlaps(det[chosen : chosen + 1, :4], boxes, 0.0)[0]
    weights = torch.exp(-((1 - iou) ** 2) / SIGMA) * scores * (iou > IOU_THR)

    x1, y1, x2, y2 = det[chosen, :4].tolist()
    margin = 0.3 * max(x2 - x1, y2 - y1)
    region = torch.tensor([x1 - margin, y1 - margin, x2 + margin, y2 + margin])

    with _text():
        figure, (all_axes, one_axes) = _figure(4.7, 1, 2)
        figure.suptitle(f"Score voting: each of {len(det)} detections moves to the weighted mean of the boxes around it")
        _plot_image(all_axes, image)
        _plot_boxes(all_axes, voted[:, :4], ORANGE, linewidth=1)
        _plot_boxes(all_axes, region[None], BLACK, linewidth=1.5, linestyle="--")
        note = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        place = {"xytext": (0, 4), "textcoords": "offset points"}
        all_axes.annotate("shown on the right", (region[0], region[1]), **place, bbox=note)
        median, most = distance.median().item(), distance.max().item()
        all_axes.set_title(f"All detections after voting. They moved\nby {median:.1f} pixels (median), at most by {most:.1f}.")

        _plot_image(one_axes, image)
        opacity = (weights / max(weights.tolist(), default=1.0))[iou > IOU_THR].clamp(min=0.1).tolist()
        _plot_boxes(one_axes, boxes[iou > IOU_THR], BLACK, alpha=opacity)
        _plot_boxes(one_axes, det[chosen, None, :4], BLUE, linewidth=2, linestyle="--")
        _plot_boxes(one_axes, voted[chosen, None, :4], ORANGE, linewidth=2)
        _show(one_axes, region)
        number = int((iou > IOU_THR).sum())
        one_axes.set_title(f"One before (blue, dashed) and after (orange),\nand its {number} voters. Darker ones weigh more.")
        figure.savefig(path, dpi=DPI)


def _text() -> Any:
    """A context in which all text has `POINTS` points. The caller's settings stay as they are."""
    from matplotlib import rc_context

    names = (
        "font.size",
        "figure.titlesize",
        "axes.titlesize",
        "axes.labelsize",
        "xtick.labelsize",
        "ytick.labelsize",
        "legend.fontsize",
    )
    settings: Any = dict.fromkeys(names, POINTS)
    return rc_context(settings)


def _figure(height: float, rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """A figure `WIDTH` inches wide and its axes. It has no backend, so the caller's backend stays."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _places(low: float, high: float, means: Sequence[float], variances: Sequence[float]) -> Any:
    """Where to draw densities: at even distances, and closer where a component is narrow."""
    if not low < high:
        widest = max(variances) ** 0.5
        low, high = low - 6 * widest, high + 6 * widest
    near = [mean + variance**0.5 * np.linspace(-6, 6, 121) for mean, variance in zip(means, variances, strict=True)]
    places = np.concatenate([np.linspace(low, high, 600), *near])
    return np.unique(places.clip(low, high))


def _density(x: Any, weight: float, mean: float, variance: float) -> Any:
    """That of a Gaussian times its weight."""
    return weight * np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def _plot_components(axes: Any, loss: Tensor, gmm: GaussianMixture1D, row: int) -> float:
    """The weighted densities of both components. Returns up to which density to show them."""
    _check_fit(gmm, row, components=2)
    weights, means, variances = (values[row].tolist() for values in gmm[:3])
    low, high = float(loss.min()), float(loss.max())
    x = _places(low - 0.08 * (high - low), high + 0.08 * (high - low), means, variances)
    densities = [_density(x, *parameters) for parameters in zip(weights, means, variances, strict=True)]
    low, high = sorted(float(density.max()) for density in densities)
    top = min(high, STEEP * low)  # or the wide component would lie on the axis
    for name, colour, density in zip(("foreground", "background"), (BLUE, GREY), densities, strict=True):
        axes.fill_between(x, density, color=colour, alpha=0.25, linewidth=0)
        axes.plot(x, density, color=colour)
        peak = int(density.argmax())
        axes.annotate(
            name, (x[peak], min(density[peak], top)), (0, 5), textcoords="offset points", ha="center", color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
    return top


def _plot_image(axes: Any, image: Any) -> None:
    axes.imshow(image, alpha=0.75)
    _show(axes, torch.tensor([0, 0, image.width, image.height]))


def _show(axes: Any, region: Tensor) -> None:
    """The part of an image to be seen: x1, y1, x2, y2 in pixels."""
    x1, y1, x2, y2 = region.tolist()
    axes.set(xlim=(x1, x2), ylim=(y2, y1), xticks=[], yticks=[])
    axes.set_xlabel(f"{x2 - x1:.0f} x {y2 - y1:.0f} pixels")


def _plot_boxes(axes: Any, boxes: Tensor, colour: str, alpha: list[float] | None = None, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    for (x1, y1, x2, y2), opacity in zip(boxes.tolist(), alpha or [1.0] * len(boxes), strict=True):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, alpha=opacity, **style))


def _telling(gmm: GaussianMixture1D, candidates: Candidates, positive: Tensor) -> int:
    """A ground truth that explains itself: many positives and negatives, and two components of similar weight, far apart."""
    valid = candidates.index >= 0
    kept = positive[candidates.index.clamp(min=0)] & valid
    smaller = torch.minimum(kept.sum(1), (valid & ~kept).sum(1))
    distance = (gmm.means[:, 1] - gmm.means[:, 0]).abs() / gmm.variances.sum(1).sqrt()
    return int((distance * gmm.weights.amin(1)).masked_fill(~gmm.valid | (smaller < smaller.max() / 2), -1).argmax())
