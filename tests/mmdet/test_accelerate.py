"""`accelerate` and `restore`: which heads, subclasses that override methods, presets, copies and pickles, errors."""

from __future__ import annotations

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

import pytest
import torch
from heads import PAA, Float64PAAHead, TieRulePAAHead, as_class, assert_same_step, build, make_features, make_samples, step
from mmdet.models.dense_heads import LADHead, PAAHead
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

from paa_gpu import reference
from paa_gpu.integrations import mmdet as integration
from paa_gpu.integrations.mmdet import LADHeadGPU, PAAHeadGPU, accelerate, restore

ROOT = Path(__file__).parents[2]
SIZE = (256, 320)
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


class OwnLoss(PAAHead):
    """A loss of its own around the published one."""

    def loss_by_feat(self, *args, **kwargs):
        return {name: loss * 2 for name, loss in super().loss_by_feat(*args, **kwargs).items()}


class OwnLoop(PAAHead):
    """A loss that loops over the images itself, as the published one does."""

    loss_by_feat = PAAHead.loss_by_feat


class OwnAssignment(LADHead):
    get_label_assignment = LADHead.get_label_assignment


def under_the_tie_rule(head, own):
    """The published head in float64 under what a subclass adds."""
    return as_class(head, type("Head", (own, TieRulePAAHead), {}))


@pytest.fixture
def inputs(generator):
    return make_features(3, SIZE, 32, generator), make_samples([0, 7, 12], SIZE, 80, generator)


@pytest.mark.parametrize("own", [IgnoresABand, Reassigns, OwnLoss, OwnLoop])
def test_what_a_subclass_overrides_stays(own, inputs):
    head = build(**SMALL)
    accelerated = accelerate(as_class(head, own))
    assert isinstance(accelerated, own)
    assert isinstance(accelerated, PAAHeadGPU)
    got = step(accelerated, *inputs)
    assert_same_step(got, step(under_the_tie_rule(head, own), *inputs))
    if own is IgnoresABand:
        assert (got.label_weights == 0).any()


def test_how_often_the_library_is_called(inputs):
    """Once for the batch, or image by image where a subclass loops itself or replaces the method of one image."""
    head = build(**SMALL)
    calls = {PAAHead: 1, IgnoresABand: 1, OwnLoss: 1, OwnLoop: 3, Reassigns: 3}
    for own, expected in calls.items():
        with mock.patch.object(integration, "paa_reassign_batch", wraps=integration.paa_reassign_batch) as batch:
            step(accelerate(as_class(head, own)), *inputs)
        assert batch.call_count == expected, own


def test_a_method_set_on_the_object_counts_as_overridden(inputs):
    head, seen = accelerate(build(**SMALL)), []
    original = head.paa_reassign
    head.paa_reassign = lambda *args: seen.append(1) or original(*args)
    step(head, *inputs)
    assert len(seen) == 3


def test_a_subclass_of_lad_keeps_its_assignment(inputs):
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


@pytest.mark.parametrize("name", ["PAAHead", "LADHead"])
def test_registered_for_configurations(name, inputs):
    config = Config.fromfile(PAA)
    config.custom_imports = {"imports": ["paa_gpu.integrations.mmdet"]}
    head = config.model.bbox_head
    head.update(type=f"{name}GPU", preset="paper", train_cfg=config.model.train_cfg, test_cfg=config.model.test_cfg, **SMALL)
    built = MODELS.build(head)
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


@pytest.mark.parametrize("own", [PAAHead, IgnoresABand, LADHead])
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
    with mock.patch.object(integration, "paa_reassign_batch", side_effect=AssertionError):
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

    for function in (accelerate, restore):
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
        (None, "needs mmdetection 3.x: `pip install mmdet==3.3.0 mmengine==0.10.7` and mmcv 2.0 or 2.1"),
        ("2.28.2", "needs mmdetection 3.x, got mmdet 2.28.2"),
        ("30.0", "needs mmdetection 3.x, got mmdet 30.0"),
    ],
)
def test_other_versions(found, message, monkeypatch):
    """Nothing of the module can be used with another version: the import says so."""
    monkeypatch.setitem(sys.modules, "mmdet", found and types.SimpleNamespace(__version__=found))
    spec = importlib.util.spec_from_file_location("paa_gpu.integrations.again", integration.__file__)
    with pytest.raises(ImportError, match=re.escape(f"paa_gpu.integrations.mmdet {message}")):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_package_does_not_import_mmdetection():
    code = "import sys, paa_gpu, paa_gpu.integrations; assert not {'mmdet', 'mmcv', 'mmengine'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
