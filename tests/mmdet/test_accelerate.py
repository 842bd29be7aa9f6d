"""`accelerate` and `restore`: which heads, subclasses that override methods, presets, copies and pickles, errors."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import api
import pytest
import torch
from api import LADHead, PAAHead
from heads import PAA, Float64PAAHead, TieRulePAAHead, as_class, assert_same_step, build, make_features, make_samples, step
from torch import nn

from paa_gpu import reference, targets
from paa_gpu.integrations.mmdet import LADHeadGPU, PAAHeadGPU, accelerate, explain, restore, versions
from paa_gpu.integrations.mmdet import heads as integration

ROOT = Path(__file__).parents[2]
SIZE = (256, 320)
needs_lad = pytest.mark.skipif(LADHead is None, reason="mmdetection before 2.19 has no LADHead")
SMALL = {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1}


class IgnoresABand(PAAHead):
    """The foreground after the threshold is ignored, and so is what lies on the level of stride 8."""

    def gmm_separation_scheme(self, gmm_assignment, scores, pos_inds_gmm):
        assert gmm_assignment.dtype == pos_inds_gmm.dtype == torch.int64
        foreground = pos_inds_gmm[gmm_assignment == 0]
        positive, _ = super().gmm_separation_scheme(gmm_assignment, scores, pos_inds_gmm)
        low = pos_inds_gmm < 32 * 40
        ignored = torch.cat([foreground[len(positive) :], pos_inds_gmm[low]])
        return positive[~torch.isin(positive, ignored)], ignored


class Reassigns(PAAHead):
    """A method of one image, in terms of the published one; counts more positives than there are."""

    def paa_reassign(self, pos_losses, *args):
        *targets, num_pos = super().paa_reassign(pos_losses.double() * 2, *args)
        return (*targets, num_pos + 1)


LOSS = "loss_by_feat" if api.IS_3X else "loss"


def doubled(self, *args, **kwargs):
    """A loss of its own around the published one."""
    return {name: loss * 2 for name, loss in getattr(super(OwnLoss, self), LOSS)(*args, **kwargs).items()}


OwnLoss = type("OwnLoss", (PAAHead,), {LOSS: doubled})
OwnLoop = type("OwnLoop", (PAAHead,), {LOSS: getattr(PAAHead, LOSS)})  # loops over the images itself, as the published one does


class OwnTargets(PAAHead):
    """Potential positives of its own: those of the smallest level only."""

    def get_targets(self, *args, **kwargs):
        *targets, pos_inds, gt_inds = super().get_targets(*args, **kwargs)
        kept = [inds < 32 * 40 for inds in pos_inds]
        return (*targets, *([inds[keep] for inds, keep in zip(column, kept, strict=True)] for column in (pos_inds, gt_inds)))


def under_the_tie_rule(head, own):
    """The published head in float64 under what a subclass adds."""
    return as_class(head, type("Head", (own, TieRulePAAHead), {}))


@pytest.fixture
def inputs(generator):
    return make_features(3, SIZE, 32, generator), make_samples([0, 7, 12], SIZE, 80, generator)


@pytest.mark.parametrize("own", [IgnoresABand, Reassigns, OwnLoss, OwnLoop, OwnTargets])
def test_what_a_subclass_overrides_stays(own, inputs):
    head = build(**SMALL)
    accelerated = accelerate(as_class(head, own))
    assert isinstance(accelerated, own)
    assert isinstance(accelerated, PAAHeadGPU)
    got = step(accelerated, *inputs)
    assert_same_step(got, step(under_the_tie_rule(head, own), *inputs))
    if own is IgnoresABand:
        assert (got.label_weights == 0).any()


PATHS = {
    PAAHead: ("the whole loss", 1, []),
    IgnoresABand: ("the assignment of the batch", 1, ["it has a `gmm_separation_scheme` of its own"]),
    OwnTargets: ("the assignment of the batch", 1, ["it has a `get_targets` of its own"]),
    OwnLoss: ("the whole loss", 1, []),
    OwnLoop: ("the assignment of each image", 3, [f"it has a `{LOSS}` of its own"]),
    Reassigns: ("the assignment of each image", 3, ["it has a `paa_reassign` of its own"]),
}


@pytest.mark.parametrize("own", PATHS, ids=lambda own: own.__name__)
def test_how_often_the_library_is_called(own, inputs):
    """Once for the batch, or image by image where a subclass loops itself or replaces the method of one image."""
    head, calls = accelerate(as_class(build(**SMALL), own)), []
    with contextlib.ExitStack() as stack:
        for module, name in ((integration, "paa_reassign_batch"), (targets, "reassignment_of")):
            stack.enter_context(mock.patch.object(module, name, counted(getattr(module, name), calls)))
        step(head, *inputs)
    assert len(calls) == PATHS[own][1]


def counted(function, calls):
    return lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs)


@pytest.mark.parametrize("own", [own for own in PATHS if own is not OwnLoss], ids=lambda own: own.__name__)
def test_explain(own):
    (entry,) = explain(accelerate(as_class(build(**SMALL), own)))
    assert entry[1:] == (PATHS[own][0], PATHS[own][2])
    assert str(entry) == "\n  ".join([f"{entry.head}: {entry.accelerated}", *entry.reasons])


def test_explain_a_loss_around_the_published_one():
    """Whether a method of its own calls the published one cannot be seen."""
    (entry,) = explain(accelerate(as_class(build(**SMALL), OwnLoss)))
    assert entry.reasons == [f"it has a `{LOSS}` of its own"]


def test_explain_a_head_that_is_not_accelerated():
    head = build(**SMALL)
    assert explain(head) == [("PAAHead", "nothing", ["it is not accelerated: accelerate(model)"])]
    assert explain(nn.Sequential(accelerate(head)))[0].head == "0: PAAHeadGPU"


def with_assigner(**options):
    def change(head):
        for name, value in options.items():
            setattr(head.assigner, name, value)

    return change


class Assigner(type(build(**SMALL).assigner)):
    pass


OBSTACLES = [
    (with_assigner(neg_iou_thr=(0.0, 0.1)), "`neg_iou_thr` of its assigner is a range"),
    (with_assigner(ignore_iof_thr=0.5, ignore_wrt_candidates=False), "`ignore_wrt_candidates` of its assigner is False"),
    (lambda head: setattr(head.assigner, "__class__", Assigner), "its assigner is Assigner, not mmdetection's MaxIoUAssigner"),
    (lambda head: setattr(head.assigner.iou_calculator, "dtype", "fp16"), "its IoU calculator computes in half precision"),
    (lambda head: delattr(head.assigner, "iou_calculator"), "its IoU calculator is object, not mmdetection's BboxOverlaps2D"),
    (lambda head: setattr(head, "sampler", nn.Identity()), "its sampler is Identity, not mmdetection's PseudoSampler"),
    (lambda head: setattr(head.bbox_coder, "means", (0.0, 0.0, 0.0, 0.1)), "its box coder has means, or clamps centres"),
    (lambda head: setattr(head, "loss_bbox", nn.L1Loss()), "its box loss is L1Loss, not mmdetection's GIoULoss"),
    (lambda head: setattr(head.loss_bbox, "eps", 1e-7), "`eps` of its box loss is 1e-07, not 1e-6"),
    (lambda head: setattr(head.loss_cls, "reduction", "sum"), "the reduction of a loss is not a mean"),
    (lambda head: setattr(head.loss_centerness, "class_weight", [1.0]), "its IoU loss is a softmax, or has class weights"),
    (lambda head: setattr(head, "reg_decoded_bbox", False), "`reg_decoded_bbox` is False"),
    (lambda head: delattr(head, "assigner"), "it has no assigner (`train_cfg`)"),
    (lambda head: setattr(head.assigner, "assign", lambda *args: None), "its assigner has its own `assign`"),
    (lambda head: setattr(head.loss_bbox, "forward", lambda *args: None), "its box loss has its own `forward`"),
    (lambda head: head.loss_bbox.register_forward_hook(lambda *args: None), "its box loss has hooks"),
    (lambda head: head.loss_centerness.register_full_backward_hook(lambda *args: None), "its IoU loss has hooks"),
    (lambda head: setattr(head, "get_anchors", lambda *args: None), "it has a `get_anchors` of its own"),
]


@pytest.mark.parametrize(("change", "reason"), OBSTACLES, ids=[reason for _, reason in OBSTACLES])
def test_explain_what_stands_in_the_way(change, reason):
    head = accelerate(build(**SMALL))
    change(head)
    assert explain(head)[0][1:] == ("the assignment of the batch", [reason])


def test_several_anchors_a_location():
    head = build(**SMALL)
    generator = versions.prior_generator(head)
    generator.base_anchors = [boxes.repeat(2, 1) for boxes in generator.base_anchors]
    assert explain(accelerate(head))[0].reasons == ["it has several anchors a location"]


def test_a_range_of_the_assigner_takes_the_published_way(inputs):
    """Its own assigner decides, with the accelerated reassignment."""
    head = build(**SMALL)
    head.assigner.neg_iou_thr = (0.02, 0.1)
    assert_same_step(step(accelerate(copy.deepcopy(head)), *inputs), step(as_class(head, TieRulePAAHead), *inputs))


def test_a_method_set_on_the_object_counts_as_overridden(inputs):
    head, seen = accelerate(build(**SMALL)), []
    original = head.paa_reassign
    head.paa_reassign = lambda *args: seen.append(1) or original(*args)
    step(head, *inputs)
    assert len(seen) == 3


def test_hooks_of_the_losses_run(inputs):
    """Forward and backward, as for the published head."""
    head, seen = build(**SMALL), []
    for name in ("loss_cls", "loss_bbox", "loss_centerness"):
        getattr(head, name).register_forward_hook(lambda module, args, out: out * 10)
        getattr(head, name).register_full_backward_hook(lambda module, *args, name=name: seen.append(name))
    assert_same_step(step(accelerate(copy.deepcopy(head)), *inputs), step(as_class(head, TieRulePAAHead), *inputs))
    assert seen.count("loss_bbox") == seen.count("loss_centerness") == 2 and seen.count("loss_cls") >= 2


def test_a_method_replaced_in_the_published_class_counts_as_overridden(inputs, monkeypatch):
    head, seen, original = accelerate(build(**SMALL)), [], PAAHead.gmm_separation_scheme
    monkeypatch.setattr(PAAHead, "gmm_separation_scheme", lambda *args: seen.append(1) or original(*args))
    step(head, *inputs)
    assert len(seen) > 3


@pytest.mark.parametrize("replaced", [False, True], ids=["in place", "replaced"])
def test_anchors_that_somebody_changes(inputs, replaced):
    used, head = accelerate(build(**SMALL)), accelerate(build(**SMALL))
    used.load_state_dict(head.state_dict())
    step(used, *inputs)
    for each in (used, head):
        base = versions.prior_generator(each).base_anchors
        base[0] = base[0] * 2 if replaced else base[0].mul_(2)
    assert_same_step(step(used, *inputs), step(head, *inputs))


def test_an_attribute_of_another_meaning():
    """What marks an accelerated class, its own subclass may use."""

    class Mine(PAAHead):
        published = True

    head = accelerate(as_class(build(**SMALL), Mine))
    assert isinstance(head, PAAHeadGPU) and type(restore(head)) is Mine


@needs_lad
def test_a_subclass_of_lad_keeps_its_assignment(inputs):
    class OwnAssignment(LADHead):
        get_label_assignment = LADHead.get_label_assignment

    assert accelerate(as_class(build(type="LADHead", **SMALL), OwnAssignment)).get_label_assignment.__func__ is (
        LADHead.get_label_assignment
    )


# --- presets ---


def test_the_authors_conventions(generator):
    head, inputs = build(**SMALL), (make_features(1, SIZE, 32, generator), make_samples([100], SIZE, 80, generator))
    options = {"num_classes": 80, "covariance_type": "full", "separation": "paper", "singleton": "positive"}
    wanted = copy.deepcopy(head)
    wanted.paa_reassign = functools.partial(reference.paa_reassign, **options)
    got = step(accelerate(head, preset="paper"), *inputs)
    assert_same_step(got, step(wanted, *inputs))
    assert not torch.equal(got.labels, step(accelerate(head, preset="mmdet"), *inputs).labels)


def test_a_preset_stays_until_another_is_given():
    head = accelerate(build(**SMALL), preset="paper")
    assert accelerate(head).preset == "paper"
    assert accelerate(head, preset="mmdet").preset == "mmdet"
    assert accelerate(restore(accelerate(head, preset="paper"))).preset == "mmdet"


# --- from a configuration ---


@pytest.mark.parametrize("name", ["PAAHead", pytest.param("LADHead", marks=needs_lad)])
def test_registered_for_configurations(name, inputs):
    built = build(PAA, type=f"{name}GPU", preset="paper", **SMALL)
    assert type(built) is {"PAAHead": PAAHeadGPU, "LADHead": LADHeadGPU}[name]
    assert built.preset == "paper"
    published = build(type=name, **SMALL)
    published.load_state_dict(built.state_dict())
    assert type(restore(built)) is type(published)


def test_the_registered_head_trains_as_the_accelerated_one(inputs):
    head = build(type="PAAHeadGPU", **SMALL)
    other = build(**SMALL)
    other.load_state_dict(head.state_dict())
    assert_same_step(step(head, *inputs), step(accelerate(other), *inputs))


# --- accelerate twice, restore, copy, pickle ---


@pytest.mark.parametrize("own", [PAAHead, IgnoresABand, pytest.param(LADHead, marks=needs_lad)])
def test_twice_and_back(own):
    head = as_class(build(**SMALL), own)
    before, names, own_state = type(head), list(head.state_dict()), set(vars(head))
    once = accelerate(head)
    kind = type(once)
    assert once is head
    assert type(accelerate(head)) is kind
    assert list(head.state_dict()) == names
    assert type(restore(head)) is before
    assert type(restore(head)) is before
    assert set(vars(head)) == own_state


@pytest.mark.parametrize("own", [PAAHead, IgnoresABand])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))], ids=["deepcopy", "pickle"])
def test_copies_are_accelerated(own, copied, inputs):
    head = accelerate(as_class(build(**SMALL), own), preset="paper")
    other = copied(head)
    assert type(other) is type(head)
    assert other.preset == "paper"
    assert_same_step(step(other, *inputs), step(head, *inputs))
    assert type(restore(other)) is own
    assert type(head) is not own


def test_restored_heads_do_what_they_did(inputs):
    head = as_class(build(**SMALL), Float64PAAHead)
    published = copy.deepcopy(head)
    restore(accelerate(head))
    with mock.patch.object(targets, "reassignment_of", side_effect=AssertionError):
        assert_same_step(step(head, *inputs), step(published, *inputs))


def test_a_class_on_top_of_ours_stays():
    class Mine(PAAHeadGPU):
        pass

    head = as_class(build(**SMALL), Mine)
    assert type(restore(accelerate(head))) is Mine


# --- errors ---


def test_no_such_head():
    class Detector(nn.Sequential):
        pass

    for function in (accelerate, restore, explain):
        with pytest.raises(
            ValueError, match=r"`model_or_head` must be or contain a PAAHead or LADHead of mmdetection, got Detector"
        ):
            function(Detector(nn.Conv2d(1, 1, 1)))
        with pytest.raises(TypeError, match=r"`model_or_head` must be a Module, got dict"):
            function({})


def test_unknown_preset():
    head = build(**SMALL)
    with pytest.raises(ValueError, match=r'`preset` must be "mmdet" or "paper", got \'figure\''):
        accelerate(head, preset="figure")
    assert type(head) is PAAHead
    with pytest.raises(ValueError, match="`preset` must be"):
        build(type="PAAHeadGPU", preset="figure", **SMALL)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            None,
            "needs mmdetection 2.11 to 3.x: `pip install mmdet==3.3.0 mmengine==0.10.7` and mmcv 2.0 or 2.1, or "
            "`pip install onedl-mmdetection`",
        ),
        ("2.10.0", "needs mmdetection 2.11 to 3.x, got mmdet 2.10.0"),
        ("30.0", "needs mmdetection 2.11 to 3.x, got mmdet 30.0"),
    ],
)
def test_other_versions(found, message, monkeypatch):
    """Nothing of the module can be used with another version: the import says so."""
    monkeypatch.setitem(sys.modules, "mmdet", found and types.SimpleNamespace(__version__=found))
    spec = importlib.util.spec_from_file_location("paa_gpu.integrations.again", versions.__file__)
    with pytest.raises(ImportError, match=re.escape(f"paa_gpu.integrations.mmdet {message}")):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_package_does_not_import_mmdetection():
    code = "import sys, paa_gpu, paa_gpu.integrations; assert not {'mmdet', 'mmcv', 'mmengine'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
