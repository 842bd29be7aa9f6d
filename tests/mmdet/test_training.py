"""Training: losses, gradients and labels of accelerated heads against the published ones."""

from __future__ import annotations

import functools
from unittest import mock

import api
import pytest
import torch
from api import PAAHead
from heads import as_class, assert_same_outside, assert_same_step, build, compare, make_features, make_samples, step, variants
from synchronisations import Synchronisations

from paa_gpu import reference, targets
from paa_gpu.integrations.mmdet import accelerate, explain, versions
from paa_gpu.integrations.mmdet import heads as integration

SIZE = (256, 320)
SMALL = {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1}


def test_the_published_configuration(generator):
    """80 classes, 5 levels, 256 channels; images of 0, 1, 7, 60 and 200 boxes in one batch."""
    head = build()
    assert (head.num_classes, len(versions.prior_generator(head).strides), head.feat_channels) == (80, 5, 256)
    size = (160, 192)
    compare(variants(head), make_features(5, size, 256, generator), make_samples([0, 1, 7, 60, 200], size, 80, generator))


@pytest.mark.parametrize("boxes", [[0], [0, 0], [1, 1], [1, 0], [7, 60], [200]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"topk": 3, "covariance_type": "tied", "num_classes": 5}], ids=["published", "other"])
def test_batches(boxes, changes, generator):
    head = build(**SMALL, **changes)
    compare(
        variants(head), make_features(len(boxes), SIZE, 32, generator), make_samples(boxes, SIZE, head.num_classes, generator)
    )


SETTINGS = [
    {}, {"allowed_border": 0}, {"allowed_border": 32, "pos_weight": 2.5}, {"ignore_iof_thr": 0.5, "gpu_assign_thr": 3},
    {"match_low_quality": False, "pos_iou_thr": 0.3, "neg_iou_thr": 0.2}, {"gt_max_assign_all": False, "min_pos_iou": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_other_settings(settings, generator):
    """Images of different size in one batch, and boxes to ignore."""
    samples = [*make_samples([7], (250, 190), 80, generator), *make_samples([5, 0], SIZE, 80, generator)]
    for sample, other in zip(samples, make_samples([3, 2, 0], (256, 192), 80, generator), strict=True):
        sample.ignored_instances = other.gt_instances
    head = build(**SMALL)
    for name, value in settings.items():
        if name in ("allowed_border", "pos_weight"):
            head.train_cfg[name] = value
        else:
            assert hasattr(head.assigner, name)
            setattr(head.assigner, name, value)
    heads = variants(head)
    assert [entry.accelerated for entry in explain(heads.accelerated)] == ["the whole loss"]
    compare(heads, make_features(3, SIZE, 32, generator), samples)


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
    features, samples = make_features(2, SIZE, 32, generator), make_samples([30, 20], SIZE, 80, generator)
    with pytest.raises(ValueError, match="ill-defined empirical covariance"):
        step(heads.published, features, samples)
    got = step(heads.accelerated, features, samples)
    assert all(loss.isfinite() for loss in got.losses.values())
    with mock.patch.object(heads.published, "paa_reassign", functools.partial(reference.paa_reassign, num_classes=80)):
        assert_same_step(got, step(heads.published, features, samples))


class HalfWithoutBoxes(PAAHead):
    """As under autocast, where the losses of an image without boxes have the scores' dtype, the others float32."""

    def get_pos_loss(self, *args):
        (losses,) = super().get_pos_loss(*args)
        return (losses if len(losses) else losses.half(),)


def test_mixed_dtypes_of_losses(generator):
    head = build(**SMALL)
    features, samples = make_features(3, SIZE, 32, generator), make_samples([0, 7, 0], SIZE, 80, generator)
    compare(variants(head)._replace(accelerated=accelerate(as_class(head, HalfWithoutBoxes))), features, samples)


@pytest.mark.skipif(not api.IS_3X, reason="2.x casts to float32 what is in half precision")
@pytest.mark.parametrize(("boxes", "dtype"), [([0, 7], torch.bfloat16), ([60], torch.bfloat16), ([7], torch.float16)], ids=str)
def test_autocast(boxes, dtype, generator):
    """Scores in half precision and boxes in float32, as AmpOptimWrapper has them: labels and losses of the published arithmetic in
    half precision, and nothing waits."""
    heads = variants(build(**SMALL))
    features, samples = make_features(len(boxes), SIZE, 32, generator), make_samples(boxes, SIZE, 80, generator)
    with torch.autocast("cpu", dtype=dtype):
        cls_scores, bbox_preds, _ = heads.published(features)
        assert (cls_scores[0].dtype, bbox_preds[0].dtype) == (dtype, torch.float32)
        compare(heads, features, samples)
        assert synchronisations(heads.accelerated, features, samples).count == 0


@pytest.mark.skipif(not api.IS_3X, reason="2.x casts to float32 what is in half precision")
def test_autocast_without_boxes(generator):
    """The published zeros have the dtype of the scores, ours float32."""
    heads = variants(build(**SMALL))
    features, samples = make_features(1, SIZE, 32, generator), make_samples([0], SIZE, 80, generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = (api.loss(head, features, samples) for head in (heads.accelerated, heads.published))
    assert {loss.dtype for loss in got.values()} == {torch.float32}
    assert {name: loss.item() for name, loss in got.items()} == {
        name: pytest.approx(loss.item()) for name, loss in wanted.items()
    }


# --- one call for the whole batch, no synchronisation ---


def synchronisations(head, features, samples):
    with Synchronisations() as mode:
        api.loss(head, features, samples)
    return mode


@pytest.mark.parametrize("boxes", [[1], [7, 0, 1], [7] * 6], ids=str)
def test_nothing_waits(boxes, generator):
    """The batch is reassigned once, with the numbers of its boxes, and nothing is read."""
    heads = variants(build(**SMALL))
    features, samples = make_features(len(boxes), SIZE, 32, generator), make_samples(boxes, SIZE, 80, generator)
    api.loss(heads.accelerated, features, samples)
    with mock.patch.object(targets, "reassignment_of", wraps=targets.reassignment_of) as batch:
        ours = synchronisations(heads.accelerated, features, samples)
    assert [call.args[2] for call in batch.call_args_list] == [boxes]
    published = synchronisations(heads.float64, features, samples)
    print(f"{ours.count} synchronisations, published {published.count}: {published.by.most_common(8)}")
    assert ours.count == 0 < published.count, ours.by


def test_one_synchronisation_where_the_rest_is_the_heads_own(generator):
    """Its assigner and losses wait as often as those of the published head do."""
    heads = variants(build(**SMALL))
    head = accelerate(as_class(heads.published, HalfWithoutBoxes))
    features, samples = make_features(2, SIZE, 32, generator), make_samples([7, 1], SIZE, 80, generator)
    with mock.patch.object(integration, "paa_reassign_batch", wraps=integration.paa_reassign_batch) as batch:
        ours = synchronisations(head, features, samples)
    assert [call.kwargs["num_gts"] for call in batch.call_args_list] == [[7, 1]]
    with mock.patch.object(heads.published, "paa_reassign", lambda losses, *targets: (*targets[:3], 1)):
        rest = synchronisations(heads.published, features, samples)
    assert ours.count == rest.count + 1


@pytest.mark.parametrize("preset", ["mmdet", "paper"])
def test_a_compiled_step_is_that_of_eager(preset, generator):
    """A compiler that traces the head finds no methods of its own in it, which would have priority over the preset."""
    head = accelerate(build(**SMALL), preset=preset)
    features, samples = make_features(2, SIZE, 32, generator), make_samples([7, 12], SIZE, 80, generator)
    wanted = api.loss(head, features, samples)
    with mock.patch.object(integration, "paa_reassign_batch", wraps=integration.paa_reassign_batch) as batch:
        got = torch.compile(lambda: api.loss(head, features, samples), backend="eager")()
    assert not batch.called  # the whole loss is accelerated
    for name, loss in wanted.items():
        torch.testing.assert_close(got[name], loss)


def test_the_check_can_fail(generator):
    """One candidate fewer a level is seen, and labels of other anchors."""
    heads = variants(build(**SMALL))
    features, samples = make_features(1, SIZE, 32, generator), make_samples([60], SIZE, 80, generator)
    got = step(heads.accelerated, features, samples)
    with mock.patch.object(heads.accelerated, "topk", 8), pytest.raises(AssertionError):
        assert_same_step(step(heads.accelerated, features, samples), got)
    with pytest.raises(AssertionError):
        assert_same_outside(torch.zeros_like(got.labels, dtype=torch.bool), 0, got.labels, got.labels.roll(1))
