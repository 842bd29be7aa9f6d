"""Subclasses of torchvision's detectors, and of this library's classes for them: whose methods run, and what comes back."""

from __future__ import annotations

import copy
import functools
import re
import threading

import pytest
import torch
import torchvision_models as models
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.ssd import SSD

from paa_gpu.integrations._classes import restore_class
from paa_gpu.integrations.torchvision import AcceleratedRetinaNet, RetinaNetPAA, accelerate, restore, use_paa

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batch() -> tuple[list[torch.Tensor], list[dict]]:
    return models.batch(torch.Generator().manual_seed(0))


def made(kind: type, build=models.retinanet) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    model = build()
    model.__class__ = kind
    return model


def train(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    return model.train()(*copy.deepcopy(batch))


class OfAccelerated(AcceleratedRetinaNet):
    pass


class Sharded:
    """Stands for `FSDPModule`: `fully_shard` derives a class from it and the module's."""


def sharded(model: nn.Module) -> nn.Module:
    model.__class__ = type(f"FSDP{type(model).__name__}", (Sharded, type(model)), {})
    return model


def test_use_paa_on_subclasses_of_accelerated_classes(batch):
    wanted = train(use_paa(made(RetinaNet)), batch)
    assert wanted != train(made(RetinaNet), batch)
    for model in (made(OfAccelerated), sharded(accelerate(made(RetinaNet))), sharded(use_paa(made(RetinaNet), 3))):
        before = type(model)
        assert train(use_paa(model), batch) == wanted
        assert isinstance(model, before) and isinstance(model, RetinaNetPAA)
    model = use_paa(made(OfAccelerated))
    assert type(restore(model)) is OfAccelerated
    assert "paa_options" not in vars(model)


@pytest.mark.parametrize("change", [accelerate, use_paa])
def test_restore_refuses_a_class_that_was_derived_since(change, batch):
    """Nobody but `fully_shard` could take its own class back. An error comes before anything is modified."""
    two = nn.ModuleList([change(made(RetinaNet)), sharded(change(made(RetinaNet)))])
    kinds, wanted = [type(model) for model in two], train(two[1], batch)
    message = (
        f"`model.1` must have the class that `accelerate` or `use_paa` gave it, got FSDP{kinds[0].__name__}, a class derived"
    )
    with pytest.raises(TypeError, match=message):
        restore(two)
    assert [type(model) for model in two] == kinds
    assert ("paa_options" in vars(two[1])) == ("paa_options" in vars(two[0])) == (change is use_paa)
    assert train(two[1], batch) == wanted
    model = change(sharded(made(RetinaNet)))  # the other order
    assert type(restore(model)).__name__ == "FSDPRetinaNet"


class Pairs(RetinaNet):
    def eager_outputs(self, losses, detections):
        return losses, detections


class SSDPairs(SSD):
    def eager_outputs(self, losses, detections):
        return losses, detections


@pytest.mark.parametrize(
    ("change", "kind", "build"),
    [(accelerate, Pairs, models.retinanet), (use_paa, Pairs, models.retinanet), (accelerate, SSDPairs, models.ssd)],
)
def test_outputs_of_ones_own(change, kind, build, batch):
    published = type(build())
    wanted = train(change(made(published, build)), batch)
    assert train(change(made(kind, build)), batch) == (wanted, [])
    model = change(made(published, build))
    model.eager_outputs = lambda losses, detections: [losses, detections]
    assert train(model, batch) == [wanted, []]


class InFloat(RetinaNet):
    def compute_loss(self, targets, head_outputs, anchors):
        assert all(isinstance(output, torch.Tensor) for output in head_outputs.values())
        return super().compute_loss(targets, {name: output.float() for name, output in head_outputs.items()}, anchors)


class Rebuilt(RetinaNet):
    def compute_loss(self, targets, head_outputs, anchors):
        outputs = {name: head_outputs[name] for name in ("cls_logits", "bbox_regression")}
        return super().compute_loss(targets=[*targets], head_outputs=outputs, anchors=[*anchors])


@pytest.mark.parametrize("kind", [InFloat, Rebuilt])
@pytest.mark.parametrize("change", [accelerate, use_paa])
def test_a_subclass_may_transform_what_it_hands_on(kind, change, batch):
    assert train(change(made(kind)), batch) == train(change(made(RetinaNet)), batch)


class Apart(RetinaNet):
    """The losses of each image on its own."""

    def compute_loss(self, targets, head_outputs, anchors):
        rows = [{name: output[i : i + 1] for name, output in head_outputs.items()} for i in range(len(targets))]
        losses = [super(Apart, self).compute_loss([targets[i]], rows[i], [anchors[i]]) for i in range(len(targets))]
        return {name: sum(loss[name] for loss in losses) / len(targets) for name in losses[0]}


class Fewer(RetinaNet):
    def compute_loss(self, targets, head_outputs, anchors):
        outputs = {name: output[:, 1:] for name, output in head_outputs.items()}
        return super().compute_loss(targets, outputs, [own[1:] for own in anchors])


def test_a_subclass_may_split_the_batch_but_not_the_anchors(batch):
    wanted, got = (train(use_paa(made(kind)), batch) for kind in (RetinaNet, Apart))
    assert all(torch.allclose(got[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match=r"`anchors\[0\]` must have \d+ anchors as the levels of `anchor_generator` have, got"):
        train(use_paa(made(Fewer)), batch)
    assert train(use_paa(made(RetinaNet)), batch) == wanted  # the error leaves nothing behind


class Teacher(RetinaNet):
    """Its loss asks another model that trains by PAA."""

    def compute_loss(self, targets, head_outputs, anchors):
        vars(self)["taught"] = vars(self)["teacher"](self.images, [{**target} for target in targets])
        return super().compute_loss(targets, head_outputs, anchors)


def test_models_within_and_beside_each_other(batch):
    wanted = train(use_paa(made(RetinaNet)), batch)
    model, teacher = use_paa(made(Teacher)), use_paa(made(RetinaNet), 2).train()
    vars(model)["teacher"], model.images = teacher, batch[0]
    assert train(model, batch) == wanted
    assert model.taught != wanted
    both, results = threading.Barrier(2), []

    class Waits(RetinaNet):
        def compute_loss(self, targets, head_outputs, anchors):
            both.wait(60)  # each thread is between the two methods
            return super().compute_loss(targets, head_outputs, anchors)

    model = use_paa(made(Waits)).train()
    halves = [models.batch(torch.Generator().manual_seed(seed), (3,)) for seed in (1, 2)]
    wanted = [train(use_paa(made(RetinaNet)), half) for half in halves]
    assert len({*(tuple(image[0].shape) for image, _ in halves)}) == 2
    threads = [threading.Thread(target=lambda i=i: results.append((i, model(*copy.deepcopy(halves[i]))))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [losses for _, losses in sorted(results, key=lambda result: result[0])] == wanted


class Alone(RetinaNet):
    def compute_loss(self, targets, head_outputs, anchors):
        return RetinaNet.compute_loss(self, targets, head_outputs, anchors)  # past the library


def test_a_loss_that_goes_past_the_library(batch):
    model = use_paa(made(Alone))
    with pytest.raises(
        RuntimeError, match=r"`Alone.compute_loss` must call super\(\).compute_loss\(targets, head_outputs, anchors\)"
    ):
        train(model, batch)
    assert train(restore(model), batch) == train(made(RetinaNet), batch)


class Other(RetinaNet):
    def compute_loss(self, targets, head_outputs, anchors):
        return self.other.compute_loss(targets, head_outputs, anchors)


def test_a_loss_of_another_model(batch):
    """Its levels are not those of this step."""
    model = use_paa(made(Other))
    vars(model)["other"] = use_paa(made(RetinaNet)).train()
    with pytest.raises(RuntimeError, match=r"`compute_loss` must be called by model\(images, targets\) of the same model"):
        train(model, batch)


def test_what_scripting_says():
    for model in (accelerate(models.retinanet()), accelerate(models.faster_rcnn()), use_paa(models.retinanet())):
        with pytest.raises(TypeError, match=r"`model` must be restored before torch.jit.script: restore\(model\), got \w+"):
            torch.jit.script(model)
        torch.jit.script(restore(model))


def wrapped(model: nn.Module, method: str) -> nn.Module:
    """As those do who run a model under autocast by setting its `forward`."""
    setattr(model, method, torch.autocast("cpu", torch.bfloat16)(getattr(model, method)))
    return model


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (made(RetinaNet), use_paa, "`model.forward` must be the method of its class, got one that was set on the object: call use_paa first"),
        (nn.Sequential(made(RetinaNet)), use_paa, "`model.0.forward` must be the method"),
        (accelerate(made(RetinaNet)), use_paa, "`model.forward` must be the method"),
        (made(SSD, models.ssd), accelerate, "`model.forward` must be the method of its class, got one that was set on the object: call accelerate"),
        (use_paa(made(RetinaNet)), restore, "`model.forward` must be the method of its class, got one that was set on the object: delete it"),
    ],
    ids=["RetinaNet", "in a model", "accelerated", "SSD", "restore"],
)  # fmt: skip
def test_a_method_that_was_wrapped_before(model, change, message):
    """The wrapper calls the method of the old class."""
    wrapped(model[0] if isinstance(model, nn.Sequential) else model, "forward")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=re.escape(message)):
        change(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_method_that_is_wrapped_afterwards(batch):
    wanted = train(use_paa(made(RetinaNet)), batch)
    model = use_paa(made(RetinaNet))
    model.forward = functools.partial(model.forward)
    assert train(use_paa(model), batch) == wanted  # the options again
    del model.forward
    assert type(restore(model)) is RetinaNet
    ssd = wrapped(accelerate(made(SSD, models.ssd)), "forward")
    assert accelerate(ssd) is ssd


def test_what_this_library_does_not_replace_may_be_wrapped(batch):
    model = made(RetinaNet)
    model.forward = functools.partial(model.forward)
    assert train(accelerate(model), batch) == train(made(RetinaNet), batch)
    assert type(restore(model)) is RetinaNet


def test_another_class_may_have_an_attribute_of_this_name():
    class Other(nn.Module):
        published = nn.Linear

    module = Other()
    restore_class(module)
    assert type(module) is Other
