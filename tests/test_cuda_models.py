"""What users run on a GPU, as a whole: detectors of torchvision, our head's predictions, the estimator. Skipped without a GPU."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torchvision_models as models
from kernel_execution import map_tensors
from test_cuda import capture, churn_memory
from test_em_long import long_row
from test_head import SIZE, make_features, make_head, make_targets
from test_predict import OPTIONS, SIZES
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import box_iou

import paa_gpu
from paa_gpu.integrations import torchvision as integration
from paa_gpu.integrations.sklearn import GaussianMixture
from paa_gpu.integrations.torchvision import matching, paa

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def there(value: Any) -> Any:
    return map_tensors(lambda tensor: tensor.to(DEVICE), value)


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name].cpu(), value.cpu(), rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text
        )


# --- our head ---


@pytest.fixture
def outputs() -> tuple[paa_gpu.PAAHead, list[list[torch.Tensor]]]:
    """A head, and its outputs for three images. Convolutions of a GPU may compute with fewer bits, so both devices get these."""
    head = make_head(**OPTIONS)
    with torch.no_grad():
        return head, head(make_features(3))


@torch.no_grad()
def test_predictions_are_those_of_the_cpu(outputs):
    head, maps = outputs
    head.forward = lambda _: maps
    wanted = head.predict(make_features(3), SIZES, padded=True)
    assert (wanted["count"] > 5).all()
    head, maps = head.to(DEVICE), there(maps)
    assert_close(head.predict(there(make_features(3)), SIZES, padded=True), wanted)
    listed = head.predict(there(make_features(3)), SIZES)
    assert [len(image["labels"]) for image in listed] == wanted["count"].tolist()


@torch.no_grad()
def test_a_captured_prediction_which_waits_for_nothing():
    head, features = make_head(**OPTIONS).to(DEVICE), there(make_features(3))
    head.predict(features, SIZES, padded=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        head.predict(features, SIZES, padded=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, captured = capture(lambda: head.predict(features, SIZES, padded=True))
    for level, other in zip(features, there(make_features(3, seed=1)), strict=True):
        level.copy_(other)
    wanted = head.predict(features, SIZES, padded=True)
    for _ in range(3):
        churn_memory()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured["count"], wanted["count"]) and (wanted["count"] > 0).any()
    assert_close(captured, wanted)


@torch.no_grad()
def test_a_compiled_prediction(outputs):
    head, maps = outputs
    head, maps = head.to(DEVICE), there(maps)
    head.forward = lambda _: maps

    def predict(features):
        return head.predict(features, SIZES, padded=True)

    features = there(make_features(3))
    assert_close(torch.compile(predict, fullgraph=True)(features), predict(features))


@pytest.mark.long
def test_a_compiled_training_step():
    """Losses, and gradients of the maps, by kernels that TorchInductor makes around ours."""
    head, targets = make_head().to(DEVICE), there(make_targets([3, 1]))
    features = [level.requires_grad_() for level in there(make_features(2))]

    def loss(features):
        return sum(head.loss(features, targets).values())

    (got, got_gradients), (wanted, wanted_gradients) = (
        (total, torch.autograd.grad(total, features)) for total in (torch.compile(loss, fullgraph=True)(features), loss(features))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(got_gradients, wanted_gradients, rtol=1e-4, atol=1e-6)
    assert wanted_gradients[0].abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(dtype):
    head, features, targets = make_head().to(DEVICE), there(make_features(2)), there(make_targets([4, 2]))
    with torch.autocast(DEVICE, dtype):
        losses = head.loss(features, targets, [SIZE, SIZE])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


# --- torchvision ---


@pytest.mark.parametrize("name", models.MODELS)
def test_losses_are_those_of_torchvision(name, monkeypatch):
    model = models.MODELS[name]().to(DEVICE).train()
    counts = (7, 0, 3) if name not in ("MaskRCNN", "KeypointRCNN") else (7, 1, 3)
    batch = there(models.batch(torch.Generator().manual_seed(0), counts, 2 if name == "KeypointRCNN" else 3))

    def losses() -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return {name: loss.detach() for name, loss in model(*copy.deepcopy(batch)).items()}

    wanted, called = losses(), []
    integration.accelerate(model)
    monkeypatch.setattr(Matcher, "__call__", lambda *_: called.append(0))
    monkeypatch.setattr(SSDMatcher, "__call__", lambda *_: called.append(0))
    assert_close(losses(), wanted)
    assert not called


def test_matches_are_those_of_torchvision():
    anchors, boxes = there(list(models.batch(torch.Generator().manual_seed(0), (900, 60))[1]))
    anchors, boxes = anchors["boxes"], boxes["boxes"]
    matcher = Matcher(0.5, 0.4, True)
    wanted = matcher(box_iou(boxes, anchors))
    assert len(wanted.unique()) > 8
    assert torch.equal(matching.matches_of(matcher, [boxes], [anchors])[0], wanted)


def test_paa_assigns_as_on_the_cpu(monkeypatch):
    model = integration.use_paa(models.retinanet()).to(DEVICE).train()
    taken, calls = paa._paa_matches, []

    def recorded(*arguments):
        matches = taken(*arguments)
        calls.append((arguments, matches))
        return matches

    monkeypatch.setattr(paa, "_paa_matches", recorded)
    sum(model(*there(models.batch(torch.Generator().manual_seed(0)))).values()).backward()
    (((_, *arguments, sizes), matches),) = calls
    wanted = taken(copy.deepcopy(model).cpu(), *map_tensors(lambda tensor: tensor.detach().cpu(), arguments), sizes)
    assert (wanted >= 0).sum() >= 10
    assert torch.equal(matches.cpu(), wanted)


# --- mixtures ---


@pytest.mark.parametrize("init", ["minmax", "kmeans"])
@pytest.mark.parametrize("size", [1000, 50_000, 1_000_000])
def test_long_rows(size, init):
    x = torch.from_numpy(long_row(size, np.random.default_rng(0)))[None]
    got, wanted = (paa_gpu.fit_gmm_1d(values, init=init) for values in (x.to(DEVICE), x))
    assert torch.equal(got.n_iter.cpu(), wanted.n_iter) and got.converged.cpu().equal(wanted.converged)
    for name in ("means", "variances", "weights"):
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(wanted, name), rtol=1e-9, atol=1e-9)


def test_the_estimator_stays_on_the_device():
    x = torch.from_numpy(long_row(5000, np.random.default_rng(0)))[:, None]
    got, wanted = GaussianMixture(2, random_state=0).fit(x.to(DEVICE)), GaussianMixture(2, random_state=0).fit(x.numpy())
    probability = got.predict_proba(x.to(DEVICE))
    assert probability.device.type == got.means_.device.type == DEVICE
    assert got.n_iter_ == wanted.n_iter_
    np.testing.assert_allclose(probability.cpu(), wanted.predict_proba(x.numpy()), atol=1e-7)
