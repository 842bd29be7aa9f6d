"""Tensors of any layout and kind: the same bits as for contiguous copies, and no graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_head import make_features, make_head, make_targets
from torch import Tensor

import paa_gpu
from paa_gpu import testing


def strided(tensor):
    """Every second element of a larger one."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def offset(tensor):
    """The middle of a larger one: its memory begins elsewhere, with other values on both sides."""
    around = torch.full_like(tensor, 3) if tensor.dtype != torch.bool else torch.ones_like(tensor)
    return torch.cat([around, tensor, around])[len(tensor) : 2 * len(tensor)]


def transposed(tensor):
    """The last two dimensions lie in the other order."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def repeated(tensor):
    """A view of the first row, which stands for all: stride 0."""
    return tensor[:1].expand(tensor.shape)


def constant(tensor):
    """A view of one element: every stride 0."""
    return tensor.flatten()[:1].reshape((1,) * tensor.dim()).expand(tensor.shape) if tensor.numel() else tensor


def inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


def with_gradient(tensor):
    return tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor


def int32(tensor):
    """Only where int32 is taken, see `takes_int32`."""
    return tensor.int() if tensor.dtype == torch.int64 else tensor


def apply(way, value):
    if isinstance(value, Tensor):
        return way(value)
    return [apply(way, item) for item in value] if isinstance(value, list) else value


def leaves(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)


rng = np.random.default_rng(0)
BATCH = testing.make_batch([4, 0, 3], rng, level_sizes=(60, 20, 0, 5), sizes=(2, 9), num_classes=4)
PREDICTIONS = testing.make_predictions([(6, 30), (0, 5), (3, 9)], rng, num_classes=3)
HEAD = testing.make_head_batch([20, 0, 9], rng)
BOXES = [testing.make_boxes(number, (130, 100), rng) for number in (4, 0, 3)]
ROWS = torch.from_numpy(rng.normal(size=(7, 45)))


def reassign_batch(separation):
    return lambda *tensors: paa_gpu.paa_reassign_batch(
        *tensors, BATCH.anchors, num_classes=4, num_gts=BATCH.num_gts, separation=separation
    )


def reassign(*tensors):
    return paa_gpu.paa_reassign(*tensors, [60, 20, 0, 5], num_classes=4, num_gt=4, separation="b")


def fit(x, count, weights, means, precisions):
    gmm = paa_gpu.fit_gmm_1d(x, count, weights_init=weights, means_init=means, precisions_init=precisions)
    return *gmm[:7], gmm.predict(x, count), gmm.predict_proba(x), gmm.score_samples(x), gmm.bic(x), gmm.aic(x)


def fit_rows(rows):
    gmm = paa_gpu.fit_gmm_1d(rows, covariance_type="tied")
    return *gmm[:7], gmm.predict(rows), gmm.score_samples(rows)


def assign(anchors, boxes, ignored, valid):
    return paa_gpu.assign_max_iou(anchors, boxes, ignored, valid, ignore_iof_thr=0.3)


FUNCTIONS = {
    "paa_reassign_batch": (reassign_batch("mmdet"), BATCH[:6]),
    "paa_reassign_batch-callable": (reassign_batch(paa_gpu.separation.separate), BATCH[:6]),
    "paa_reassign": (reassign, [column[0] for column in BATCH[:6]]),
    "select_candidates": (
        lambda *tensors: paa_gpu.select_candidates(*tensors, [60, 20, 0, 5], num_gt=4),
        [BATCH[0][0], BATCH[4][0], BATCH[5][0]],
    ),
    "fit_gmm_1d": (
        fit,
        [ROWS, torch.tensor([45, 2, 0, 1, 9, 30, 44]), torch.full((7, 2), 0.5), torch.rand(7, 2), torch.rand(7, 2)],
    ),
    "fit_gmm_1d-list": (fit_rows, [[row[: 3 + 5 * i] for i, row in enumerate(ROWS)]]),
    "score_voting_batch": (lambda *tensors: paa_gpu.score_voting_batch(*tensors, 0.05), PREDICTIONS),
    "score_voting": (lambda *tensors: paa_gpu.score_voting(*tensors, 0.05), [column[0] for column in PREDICTIONS]),
    "candidate_losses": (paa_gpu.candidate_losses, HEAD),
    "assign_max_iou": (assign, [HEAD.anchors, BOXES, BOXES[::-1], [label > 1 for label in HEAD.label]]),
    "levels_to_images": (paa_gpu.levels_to_images, [make_features(2)]),
    "reduce_mean": (paa_gpu.reduce_mean, [torch.arange(12.0).reshape(3, 4)]),
}
TAKES_GRADIENTS = {"levels_to_images"}  # a rearrangement, which a loss may follow


def takes_int32(name, place):
    """Whether the argument at this place may be int32: indices, and labels of detections; targets stay int64."""
    return (name, place) not in {
        *((f"paa_reassign{end}", 1) for end in ("", "_batch", "_batch-callable")),
        ("candidate_losses", 3),
    }


@pytest.mark.parametrize(
    "way", [strided, offset, transposed, repeated, constant, inference, with_gradient, int32], ids=lambda w: w.__name__
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_bits_as_for_contiguous_copies(name, way):
    function, arguments = FUNCTIONS[name]
    given = [apply(way, a) if way is not int32 or takes_int32(name, i) else a for i, a in enumerate(arguments)]
    before = [t.detach().clone() for t in leaves(given)]
    plain = [apply(lambda t: t.detach().clone(memory_format=torch.contiguous_format), a) for a in given]
    got, wanted = list(leaves(function(*given))), list(leaves(function(*plain)))
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert name in TAKES_GRADIENTS or not a.requires_grad
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert all(map(torch.equal, before, leaves(given)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_inference_mode(name):
    function, arguments = FUNCTIONS[name]
    wanted = list(leaves(function(*arguments)))
    with torch.inference_mode():
        got = list(leaves(function(*arguments)))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "way", [strided, offset, transposed, repeated, constant, inference, with_gradient, int32], ids=lambda w: w.__name__
)
def test_targets_and_features_of_the_head(way):
    """Features made in inference mode cannot be trained with, which torch itself says."""
    head, targets = make_head(), [{name: way(value) for name, value in target.items()} for target in make_targets([4, 0, 2])]
    features = make_features(3) if way is inference else [way(level) for level in make_features(3)]
    plain = [{name: value.detach().clone() for name, value in target.items()} for target in targets]
    got, wanted = head.loss(features, targets), head.loss([level.detach().contiguous() for level in features], plain)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)  # convolutions may take another way
