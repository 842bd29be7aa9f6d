"""`PAAHead` without torchvision and mmdetection: what it accepts, what it computes, and training over several processes.

That the losses and detections are the published ones is shown in tests/mmdet.
"""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from synchronisations import Synchronisations
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import paa_gpu
from paa_gpu import PAAHead

pytestmark = pytest.mark.usefixtures("one_thread")

STRIDES = (8, 16)
SIZE = (64, 96)


def make_head(**options: Any) -> PAAHead:
    torch.manual_seed(0)
    return PAAHead(3, 8, 8, 1, norm_groups=4, strides=STRIDES, **options)


def make_features(images: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 8, SIZE[0] // stride, SIZE[1] // stride, generator=generator) for stride in STRIDES]


def make_targets(boxes: list[int], seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for number in boxes:
        corner = torch.rand(number, 2, generator=generator) * 40
        extent = 10 + torch.rand(number, 2, generator=generator) * 40
        labels = torch.randint(3, (number,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + extent], 1), "labels": labels})
    return targets


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters()]


# --- use ---


@pytest.mark.parametrize("boxes", [[0, 0], [4, 0, 2]], ids=str)
def test_every_parameter_gets_a_gradient(boxes):
    """Without boxes too, where it is zero for the regression: DistributedDataParallel waits for all of them."""
    head = make_head()
    losses = head.loss(make_features(len(boxes)), make_targets(boxes))
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_iou"}
    sum(losses.values()).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(head))
    assert (losses["loss_bbox"] == 0) == (losses["loss_iou"] == 0) == (sum(boxes) == 0)
    assert bool(head.atss_reg.weight.grad.any()) == (sum(boxes) > 0)


def test_inputs_are_not_modified():
    features, targets = make_features(2), make_targets([3, 1])
    before = [tensor.clone() for tensor in [*features, *(value for target in targets for value in target.values())]]
    make_head().loss(features, targets)
    after = [*features, *(value for target in targets for value in target.values())]
    assert all(map(torch.equal, before, after))


def test_every_option_reaches_the_assignment(monkeypatch):
    """None of them has its default."""
    assignment = {
        "pos_iou_thr": 0.2, "neg_iou_thr": 0.15, "min_pos_iou": 0.05, "match_low_quality": False, "ignore_iof_thr": 0.3
    }  # fmt: skip
    reassignment = {
        "topk": 4, "covariance_type": "tied", "separation": "paper", "singleton": "positive", "precision": "float32"
    }  # fmt: skip
    weights = {"gamma": 1.5, "alpha": 0.3, "bbox_loss_weight": 1.7, "target_stds": (0.2, 0.3, 0.4, 0.5)}
    head, seen = make_head(**assignment, **reassignment, **weights), []
    original = paa_gpu.head.assign_targets
    monkeypatch.setattr(
        paa_gpu.head, "assign_targets", lambda *args, **options: seen.append((args, options)) or original(*args, **options)
    )
    targets = make_targets([3, 1])
    targets[1]["ignored_boxes"] = torch.tensor([[0.0, 0, 30, 30]])
    head.loss(make_features(2), targets)
    ((arguments, options),) = seen
    assert options["num_classes"] == head.num_classes
    assert (options["assignment"], options["reassignment"]) == (assignment, reassignment)
    assert options["losses"] == {"gamma": 1.5, "alpha": 0.3, "loss_bbox_weight": 1.7, "stds": (0.2, 0.3, 0.4, 0.5)}
    assert [boxes.tolist() for boxes in arguments[5]] == [[], [[0.0, 0, 30, 30]]]
    defaults = inspect.signature(paa_gpu.PAAHead).parameters
    assert all(defaults[name].default != value for name, value in {**assignment, **reassignment, **weights}.items())


@pytest.mark.parametrize(("option", "loss"), [("bbox_loss_weight", "loss_bbox"), ("iou_loss_weight", "loss_iou")])
def test_weights_of_losses(option, loss):
    """They are factors. All potential positives are positive, because the weight of a box loss also decides which are."""
    batch = make_features(1), make_targets([1])
    head = make_head(topk=1000, separation=lambda assignment, score, loss, mask: (mask, torch.zeros_like(mask)))
    before = head.loss(*batch)
    setattr(head, option, 2.5 * getattr(head, option))
    after = head.loss(*batch)
    for name, value in after.items():
        torch.testing.assert_close(value, before[name] * (2.5 if name == loss else 1))


def test_a_callers_separation_is_asked():
    """Labels may be int32, boxes float64."""
    seen = []

    def separation(assignment, score, loss, mask):
        seen.append(mask.sum())
        return assignment, torch.zeros_like(mask)

    targets = [{"boxes": target["boxes"].double(), "labels": target["labels"].int()} for target in make_targets([3, 1])]
    make_head(separation=separation).loss(make_features(2), targets)
    assert seen[0] > 0


def test_image_sizes_leave_out_what_is_beyond():
    """The losses of an image within a larger batch are those of the image alone."""
    head, features, targets = make_head(), make_features(1), make_targets([3])
    with torch.no_grad():
        alone = head.loss(features, targets)
        outputs = head(features)
        padded = [tuple(nn.functional.pad(level, (0, 4, 0, 2), value=3.0) for level in levels) for levels in outputs]
        head.forward = lambda _: tuple(list(levels) for levels in padded)
        wide = head.loss(features, targets, [SIZE])
    torch.testing.assert_close(wide, alone)


@pytest.mark.parametrize("boxes", [1, 10_000])
def test_every_anchor_is_a_potential_positive(boxes):
    """Of one box, and of many more boxes than anchors."""
    head, seen = make_head(pos_iou_thr=0.0), []
    original = head._assign
    head._assign = lambda *args: seen.append(original(*args)) or seen[0]
    for loss in head.loss(make_features(1), make_targets([boxes])).values():
        assert loss.isfinite()
        assert loss > 0
    assert (seen[0].gt_inds > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_levels_to_images(dtype):
    levels = [level.to(dtype) for level in make_features(2)]
    for image, got in enumerate(paa_gpu.levels_to_images(levels)):
        assert got.is_contiguous()
        assert torch.equal(got, torch.cat([level[image].flatten(1).T for level in levels]))


def test_torchvision_is_not_imported():
    code = "import sys, paa_gpu; paa_gpu.PAAHead(1, 8, 8, norm_groups=4); print({'torchvision', 'triton', 'numba'} & set(sys.modules))"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout == "set()\n"


@pytest.fixture
def default_dtype():
    """`torch.set_default_dtype`, until the end of the test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_torch_change_nothing(dtype, default_dtype):
    """Neither the dtype nor the device that torch gives to what names none."""
    head, features, targets = make_head(alpha=0.3), make_features(2), make_targets([3, 1])

    def results() -> list[Tensor]:
        detections = head.predict(features, [(64, 80), SIZE], padded=True)
        return [*head.loss(features, targets, [(64, 80), SIZE]).values(), *detections.values()]

    wanted = results()
    default_dtype(dtype)
    with torch.device("meta"):
        got = results()
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in wanted]
    assert all(map(torch.equal, got, wanted))


# --- synchronisation; that of `predict` is in test_predict ---


@pytest.mark.parametrize("boxes", [[0], [4, 0, 2]], ids=str)
def test_training_never_waits(boxes):
    """No value is read between features and gradients, and no shape depends on one."""
    head, features, targets = make_head(), make_features(len(boxes)), make_targets(boxes)
    with Synchronisations() as mode:
        sum(head.loss(features, targets, [SIZE] * len(boxes)).values()).backward()
    assert mode.count == 0


WAITS = [
    (lambda x, mask: x.sum().item(), 1), (lambda x, mask: x.nonzero(), 1), (lambda x, mask: x[mask], 1),
    (lambda x, mask: bool(mask.any()), 1), (lambda x, mask: x.tolist(), 1), (lambda x, mask: x.cpu(), 1),
    (lambda x, mask: x.numpy(), 1), (lambda x, mask: x.new_tensor([1, 2]), 1), (lambda x, mask: torch.tensor([1, 2]), 1),
    (lambda x, mask: x.index_put_((mask,), torch.zeros_like(x)[:2]), 1), (lambda x, mask: x.unique(), 1), (lambda x, mask: x.repeat_interleave(x), 1),
    (lambda x, mask: list(range(x[0])), 1), (lambda x, mask: torch.tensor([1, 2], device=x.device), 1),
    # what does not wait
    (lambda x, mask: nn.functional.one_hot(x, 4), 0), (lambda x, mask: x.masked_fill(mask, 7), 0),
    (lambda x, mask: x.__setitem__(mask, 7), 0), (lambda x, mask: torch.where(mask, x, 0), 0),
    (lambda x, mask: torch.nonzero_static(mask, size=2), 0), (lambda x, mask: torch.tensor([1, 2], device="cpu"), 0),
]  # fmt: skip


@pytest.mark.parametrize(("call", "count"), WAITS)
def test_what_is_counted(call, count):
    """By this test, as it is the one that asks."""
    x = torch.arange(4)
    mask = x > 1
    with Synchronisations() as mode:
        call(x, mask)
    assert mode.count == count
    assert set(mode.by) <= {("tests/test_head.py", "<lambda>")}


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch 2.9 asks CUDA's driver to pad fake tensors, 2.14 does not")
def test_training_on_fake_cuda_tensors():
    """From the towers' outputs on: without values nothing can be read. A label that is out of range is not refused there either."""
    head = make_head()
    with FakeTensorMode(), torch.device("cuda"):
        features = [torch.empty(level.shape) for level in make_features(2)]
        outputs = [[torch.empty(2, channels, *level.shape[2:]) for level in features] for channels in (3, 4, 1)]
        head.forward = lambda _: outputs
        targets = [{"boxes": torch.empty(number, 4), "labels": torch.empty(number, dtype=torch.int64)} for number in (3, 0)]
        losses = head.loss(features, targets, [SIZE, SIZE])
    assert {(loss.shape, loss.device.type) for loss in losses.values()} == {((), "cuda")}


# --- errors ---


def test_settings_that_change_after_a_call():
    """What is kept for the sizes of the maps belongs to the settings."""
    head, batch = make_head(), (make_features(1), make_targets([2]))
    before = head.loss(*batch)["loss_bbox"]
    head.anchor_scale, head.strides = head.anchor_scale / 4, list(head.strides)
    changed = head.loss(*batch)["loss_bbox"]
    assert changed == copy.deepcopy(head).loss(*batch)["loss_bbox"] != before


def test_gradients_of_a_function():
    """`torch.func.grad` gives those of `backward`: a transform has no values, so labels are not checked."""
    model, batch = Loss(), (make_features(1), make_targets([2]))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    got = torch.func.grad(lambda parameters: torch.func.functional_call(model, parameters, batch))(parameters)
    model(*batch).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def test_levels_that_differ():
    levels = make_features(2)
    with pytest.raises(ValueError, match=r"`mlvl_tensor\[1\]` must have shape \[2, 8, any, any\], got \[1, 8, 4, 6\]"):
        paa_gpu.levels_to_images([levels[0], levels[1][:1]])
    with pytest.raises(TypeError, match=r"`mlvl_tensor\[1\]` must be float32, got float64"):
        paa_gpu.levels_to_images([levels[0], levels[1].double()])


# --- several processes ---


class Loss(nn.Module):
    """What DistributedDataParallel wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = make_head()

    def forward(self, features: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        return sum(self.head.loss(features, targets).values())


BATCHES = [[5, 0, 2], [0, 0, 0], [9, 1, 0]]  # boxes; the first process has one image, the second two


def train_one_of_two(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    wrapped = DistributedDataParallel(Loss())
    results = []
    for seed, boxes in enumerate(BATCHES):
        wrapped.zero_grad()
        wrapped([level[own] for level in make_features(3, seed)], make_targets(boxes, seed)[own]).backward()
        results.append([gradient.clone() for gradient in gradients(wrapped)])
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Of one process with the joined batch: with images, boxes and positives shared unevenly."""
    torch.multiprocessing.spawn(train_one_of_two, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for seed, boxes in enumerate(BATCHES):
        alone = Loss()
        alone(make_features(3, seed), make_targets(boxes, seed)).backward()
        for first, second, wanted in zip(ranks[0][seed], ranks[1][seed], gradients(alone), strict=True):
            assert torch.equal(first, second)
            assert (first - wanted).abs().max() <= 1e-5 * wanted.abs().max()
