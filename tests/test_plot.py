"""The pictures: what they show of the data, and that the caller's matplotlib stays as it is. How they look, only a person can judge."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import paa_gpu
from paa_gpu import data, plot
from paa_gpu.separation import SCHEMES


@pytest.fixture(scope="module")
def call():
    """A recording, its reassignment and its candidates."""
    trees = data.load()
    columns = [[tensor] for tensor in trees.arguments[:6]]
    result = paa_gpu.paa_reassign_batch(*columns, trees.anchors, num_classes=1, num_gts=[trees.num_gt])
    arguments = trees.pos_losses, trees.pos_inds, trees.pos_gt_inds, trees.anchors
    return trees, result, paa_gpu.select_candidates(*arguments, num_gt=trees.num_gt)


def candidates_of(call, gt):
    """Losses of a ground truth's candidates, and which of them are positive."""
    _, result, candidates = call
    index = candidates.index[gt, : candidates.count[gt]]
    return candidates.loss[gt, : len(index)], result.positive[0][index]


def marked(axes):
    """Numbers of markers by (height, marker)."""
    lines = [line for line in axes.get_lines() if line.get_marker() not in ("None", "")]
    return {(line.get_ydata()[0], line.get_marker()): len(line.get_xdata()) for line in lines if len(line.get_xdata())}


def test_the_fit_counts_positives_and_negatives(call):
    axes = Figure().subplots()
    loss, positive = candidates_of(call, 23)
    plot.plot_fit(axes, loss, call[1].fit, 23, positive)
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [f"{int(positive.sum())} positive", f"{int((~positive).sum())} negative"]
    assert any(f"threshold {float(loss[positive].max()):.2f}" in text.get_text() for text in axes.texts)


def test_a_narrow_component_keeps_its_height():
    """No even distance meets it."""
    losses = torch.tensor([0.5] * 6 + [2.0, 4, 5, 6, 7, 8, 9, 10])
    gmm = paa_gpu.fit_gmm_1d(losses[None])
    weight, variance = float(gmm.weights[0, 0]), float(gmm.variances[0, 0])
    assert variance < 1e-5
    for draw in (
        lambda axes: plot.plot_fit(axes, losses, gmm, 0, losses < 1),
        lambda axes: plot.plot_mixture(axes, losses, gmm, 0),
    ):
        axes = Figure().subplots()
        draw(axes)
        highest = max(float(np.max(line.get_ydata())) for line in axes.get_lines() if len(line.get_xdata()) > 100)
        assert highest == pytest.approx(weight / math.sqrt(2 * math.pi * variance), rel=0.01)
        assert axes.get_ylim()[1] < 0.1 * highest  # or nothing of the other component could be seen


def test_equal_losses_have_a_picture():
    losses = torch.full((5,), 2.0)
    axes, gmm = Figure().subplots(), paa_gpu.fit_gmm_1d(losses[None])
    plot.plot_fit(axes, losses, gmm, 0, losses < 3)
    assert any(len(line.get_xdata()) > 100 and max(line.get_ydata()) > 100 for line in axes.get_lines())


@pytest.mark.parametrize("components", [1, 3])
def test_a_fit_of_other_than_two_components_has_no_foreground(components):
    losses = torch.arange(9.0)
    gmm = paa_gpu.fit_gmm_1d(losses[None], n_components=components)
    for draw in (
        lambda axes: plot.plot_fit(axes, losses, gmm, 0, losses < 4),
        lambda axes: plot.plot_schemes(axes, losses, gmm, 0),
    ):
        with pytest.raises(ValueError, match=f"^`gmm` must have 2 components, got {components}$"):
            draw(Figure().subplots())


def test_the_fit_of_a_ground_truth_without_positives(call):
    axes = Figure().subplots()
    loss, positive = candidates_of(call, 23)
    plot.plot_fit(axes, loss, call[1].fit, 23, torch.zeros_like(positive))
    assert not any("threshold" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, lambda loss: loss.clone().requires_grad_()], ids=["bfloat16", "graph"])
def test_losses_of_any_kind(change, call, tmp_path):
    loss, positive = candidates_of(call, 3)
    loss = change(loss)
    gmm = paa_gpu.fit_gmm_1d(loss[None])
    axes = Figure().subplots()
    plot.plot_fit(axes, loss, gmm, 0, positive)
    assert sum(marked(axes).values()) == len(loss)
    plot.plot_schemes(Figure().subplots(), loss, gmm, 0)
    plot.plot_separation(loss, gmm, 0, tmp_path / "picture.png")


def test_the_schemes_show_what_reassignment_does(call):
    """Ground truth 23, of whose candidates all five schemes make something else."""
    trees, _, candidates = call
    axes = Figure().subplots()
    loss, _ = candidates_of(call, 23)
    plot.plot_schemes(axes, loss, call[1].fit, 23)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["component", *(f'"{scheme}"' for scheme in SCHEMES)]
    shown, seen = marked(axes), set()
    for line, scheme in enumerate(SCHEMES):
        columns = [[tensor] for tensor in trees.arguments[:6]]
        got = paa_gpu.paa_reassign_batch(*columns, trees.anchors, num_classes=1, num_gts=[trees.num_gt], separation=scheme)
        index = candidates.index[23, : len(loss)]
        positive, ignored = (int(mask[0][index].sum()) for mask in (got.positive, got.ignored))
        wanted = {"o": positive, "D": ignored, "x": len(loss) - positive - ignored}
        assert {marker: shown.get((line, marker), 0) for marker in "oDx"} == wanted, scheme
        seen.add(tuple(wanted.items()))
    assert len(seen) == len(SCHEMES)


def test_letters_and_lines_say_which_component_is_which(call):
    axes, fit = Figure().subplots(), call[1].fit
    loss, positive = candidates_of(call, 23)
    plot.plot_schemes(axes, loss, fit, 23)
    letters = [text for text in axes.texts if text.get_text() in "FB"]
    gmm = fit._replace(**{name: getattr(fit, name)[23, None] for name in fit._fields[:7]})
    wanted = ["F" if label == 0 else "B" for label in gmm.predict(loss[None])[0].tolist()]
    assert [text.get_text() for text in sorted(letters, key=lambda text: text.get_position()[0])] == wanted
    threshold = next(text for text in axes.texts if "F: threshold" in text.get_text())
    # "mmdet" takes everything up to it.
    assert threshold.get_position()[0] == pytest.approx(float(loss[positive].max()))


def test_the_legend_of_a_mixture_has_its_parameters():
    values = torch.cat([torch.linspace(0, 1, 50), torch.linspace(10, 14, 50)])
    axes, gmm = Figure().subplots(), paa_gpu.fit_gmm_1d(values)
    plot.plot_mixture(axes, values, gmm, 0)
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    for k, (weight, mean, variance) in enumerate(zip(*(part[0].tolist() for part in gmm[:3]), strict=True)):
        assert f"component {k}: weight {weight:.2f}, mean {mean:.2f}, deviation {math.sqrt(variance):.2f}" in texts


def test_anchors_of_a_ground_truth_stand_out(call):
    centres, chosen = torch.rand(30, 2) * 100, torch.arange(30) < 7
    axes = Figure().subplots()
    plot.plot_anchors(axes, Image.new("RGB", (100, 100)), np.array([[0.0, 0, 50, 50], [20, 20, 90, 90]]), centres, chosen, 1)
    dots = {line.get_color(): torch.tensor(np.stack(line.get_data(), 1)) for line in axes.lines if line.get_marker() == "."}
    assert torch.equal(dots[plot.ORANGE].float(), centres[chosen]) and torch.equal(dots[plot.BLUE].float(), centres[~chosen])


def test_what_has_no_picture(call, tmp_path):
    trees, result, candidates = call
    loss, positive = candidates_of(call, 3)
    gmm = result.fit._replace(valid=result.fit.valid.clone().index_fill_(0, torch.tensor([3]), False))
    draw = (
        lambda axes: plot.plot_fit(axes, loss, gmm, 3, positive),
        lambda axes: plot.plot_mixture(axes, loss, gmm, 3),
        lambda axes: plot.plot_schemes(axes, loss, gmm, 3),
        lambda axes: plot.plot_separation(loss, gmm, 3, tmp_path / "none.png"),
    )
    for function in draw:
        axes = Figure().subplots()
        with pytest.raises(ValueError, match="`row` must be one of `gmm` with a valid fit, got 3"):
            function(axes)
        assert not axes.lines and not axes.patches
    with pytest.raises(ValueError, match="`recording` must have at least one box, got none"):
        no_boxes = trees._replace(gt={**trees.gt, "bboxes": trees.gt["bboxes"][:0]})
        plot.plot_recording(no_boxes, result, candidates, tmp_path / "none.png")
    voting = data.load_voting()[-1]
    with pytest.raises(ValueError, match="`call` must have at least one detection, got none"):
        nothing = voting._replace(det_bboxes=voting.det_bboxes[:0], det_labels=voting.det_labels[:0])
        plot.plot_voting(trees, nothing, nothing.det_bboxes, nothing.det_labels, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_a_row_that_is_not_valid_is_not_shown(call, tmp_path):
    trees, result, candidates = call
    shown = plot._telling(result.fit, candidates, result.positive[0])
    row = torch.tensor([shown])
    bad = result.fit._replace(
        valid=result.fit.valid.index_fill(0, row, False), means=result.fit.means.index_fill(0, row, torch.nan)
    )
    assert plot._telling(bad, candidates, result.positive[0]) != shown
    plot.plot_recording(trees, result._replace(fit=bad), candidates, tmp_path / "recording.png")


def test_detections_without_voters(call, tmp_path):
    voting = data.load_voting()[-1]
    alone = voting._replace(mlvl_nms_scores=voting.mlvl_nms_scores * 0)
    voted, labels = paa_gpu.score_voting(*alone.arguments, keep_order=True)
    plot.plot_voting(call[0], alone, voted, labels, tmp_path / "voting.png")
    assert (tmp_path / "voting.png").exists()


def test_the_pictures(call, tmp_path, monkeypatch):
    trees, result, candidates = call
    backend, save, drawn = matplotlib.get_backend(), Figure.savefig, []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **options: (drawn.append(figure), save(figure, *args, **options))
    )
    voting = data.load_voting()[-1]
    voted, labels = paa_gpu.score_voting(*voting.arguments, keep_order=True)
    plot.plot_recording(trees, result, candidates, tmp_path / "recording.png")
    plot.plot_separation(candidates_of(call, 23)[0], result.fit, 23, tmp_path / "separation.png")
    plot.plot_voting(trees, voting, voted, labels, tmp_path / "voting.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.width == 1800
    for figure in drawn:
        points = 700 / 96 / figure.get_figwidth()  # on a page 700 pixels wide, for a point of the figure
        assert min(text.get_fontsize() * points for text in figure.findobj(Text) if text.get_text()) >= 9
    assert len(drawn) == 3
    assert matplotlib.get_backend() == backend


def test_colours_are_far_apart_for_the_colour_blind():
    """In each picture, after a simulation of protan and deutan vision (Viénot, Brettel, Mollon 1999), in linear RGB."""
    views = (
        [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],  # protanopia
        [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],  # deuteranopia
    )
    for first, second in (("BLUE", "ORANGE"), ("BLUE", "GREY"), ("ORANGE", "GREY")):
        for view in views:
            colours = [
                torch.tensor([int(to_hex(getattr(plot, name))[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2
                for name in (first, second)
            ]
            seen = [torch.tensor(view) @ colour for colour in colours]
            assert float((seen[0] - seen[1]).norm()) > 0.15, (first, second)
