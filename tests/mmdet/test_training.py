"""Training: losses, gradients and labels of accelerated heads against the published ones."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from heads import assert_same_outside, assert_same_step, build, compare, make_features, make_samples, step, variants
from synchronisations import Synchronisations

from paa_gpu import reference
from paa_gpu.integrations import mmdet as integration

SIZE = (256, 320)
SMALL = {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1}


def test_the_published_configuration(generator):
    """80 classes, 5 levels, 256 channels; images of 0, 1, 7 and 200 boxes in one batch."""
    head = build()
    assert (head.num_classes, head.prior_generator.num_levels, head.feat_channels) == (80, 5, 256)
    size = (160, 192)
    compare(variants(head), make_features(4, size, 256, generator), make_samples([0, 1, 7, 200], size, 80, generator))


@pytest.mark.parametrize("boxes", [[0], [0, 0], [1, 1], [1, 0], [7, 7], [200]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"topk": 3, "covariance_type": "tied", "num_classes": 5}], ids=["published", "other"])
def test_batches(boxes, changes, generator):
    head = build(**SMALL, **changes)
    compare(
        variants(head), make_features(len(boxes), SIZE, 32, generator), make_samples(boxes, SIZE, head.num_classes, generator)
    )


def test_boxes_beyond_the_valid_part_and_ignored(generator):
    """Images of different size in one batch, and boxes to ignore."""
    samples = [*make_samples([7], (256, 192), 80, generator), *make_samples([5], SIZE, 80, generator)]
    for sample, other in zip(samples, make_samples([3, 2], (256, 192), 80, generator), strict=True):
        sample.ignored_instances = other.gt_instances
    head = build(**SMALL)
    head.assigner.ignore_iof_thr = 0.5
    compare(variants(head), make_features(2, SIZE, 32, generator), samples)


def test_thirty_steps(generator):
    """Every step from the same weights: the same labels outside ties; and the loss falls."""
    head = build(**SMALL, num_classes=4)
    heads = variants(head)
    features, samples = make_features(2, SIZE, 32, generator), make_samples([3, 12], SIZE, 4, generator)
    optimizer = torch.optim.SGD(heads.accelerated.parameters(), lr=0.02, momentum=0.9)
    totals = []
    for _ in range(30):
        for other in heads[:3]:
            other.load_state_dict(heads.accelerated.state_dict())
        got = compare(heads, features, samples)
        optimizer.step()
        totals.append(float(sum(got.losses.values())))
    assert max(totals[-5:]) < 0.8 * totals[0]


def test_goes_on_where_scikit_learn_raises(generator):
    """Large losses that lie close together: float32 squares cancel, and the published head stops training. In float64 its variances
    are still rounded, so the oracle, which fits shifted losses, says what is right."""
    head = build(**SMALL, loss_bbox={"type": "GIoULoss", "loss_weight": 1e-3})
    torch.nn.init.constant_(head.atss_cls.weight, 0)
    torch.nn.init.constant_(head.atss_cls.bias, -33.3)
    heads = variants(head)
    features, samples = make_features(2, SIZE, 32, generator), make_samples([7, 3], SIZE, 80, generator)
    with pytest.raises(ValueError, match="ill-defined empirical covariance"):
        step(heads.published, features, samples)
    got = step(heads.accelerated, features, samples)
    assert all(loss.isfinite() for loss in got.losses.values())
    with mock.patch.object(heads.published, "paa_reassign", functools.partial(reference.paa_reassign, num_classes=80)):
        assert_same_step(got, step(heads.published, features, samples))


def test_mixed_dtypes_of_losses(generator):
    """As under autocast, where the losses of an image without boxes have the scores' dtype, the others float32."""
    head = build(**SMALL)
    single = type(head).get_pos_loss
    features, samples = make_features(3, SIZE, 32, generator), make_samples([0, 7, 0], SIZE, 80, generator)
    with mock.patch.object(
        type(head), "get_pos_loss", lambda *args: (single(*args)[0].half() if not len(args[-1]) else single(*args)[0],)
    ):
        compare(variants(head), features, samples)


def test_autocast(generator):
    """bfloat16 features and scores, as AmpOptimWrapper has them."""
    heads = variants(build(**SMALL))
    features, samples = make_features(2, SIZE, 32, generator), make_samples([0, 7], SIZE, 80, generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(heads, features, samples)


# --- one call for the whole batch, no synchronisation in it ---


def synchronisations(head, features, samples):
    with Synchronisations() as mode:
        head.loss(features, samples)
    return mode.count


@pytest.mark.parametrize("boxes", [[1], [7, 0, 1], [7] * 6], ids=str)
def test_one_call_and_one_synchronisation(boxes, generator):
    """The batch goes through `paa_reassign_batch` once, with `num_gts`, and is read once; the rest waits as often as the rest of the
    published loss does."""
    heads = variants(build(**SMALL))
    features, samples = make_features(len(boxes), SIZE, 32, generator), make_samples(boxes, SIZE, 80, generator)
    with mock.patch.object(integration, "paa_reassign_batch", wraps=integration.paa_reassign_batch) as batch:
        ours = synchronisations(heads.accelerated, features, samples)
    assert [call.kwargs["num_gts"] for call in batch.call_args_list] == [boxes]
    with mock.patch.object(heads.published, "paa_reassign", lambda losses, *targets: (*targets[:3], 1)):
        rest = synchronisations(heads.published, features, samples)
    published = synchronisations(heads.float64, features, samples)
    print(f"{ours} synchronisations, of which outside the assignment {rest}; published {published}")
    assert ours == rest + 1 < published


def test_the_check_can_fail(generator):
    """One candidate fewer a level is seen, and labels of other anchors."""
    heads = variants(build(**SMALL))
    features, samples = make_features(1, SIZE, 32, generator), make_samples([60], SIZE, 80, generator)
    got = step(heads.accelerated, features, samples)
    with mock.patch.object(heads.accelerated, "topk", 8), pytest.raises(AssertionError):
        assert_same_step(step(heads.accelerated, features, samples), got)
    with pytest.raises(AssertionError):
        assert_same_outside(torch.zeros_like(got.labels, dtype=torch.bool), 0, got.labels, got.labels.roll(1))
