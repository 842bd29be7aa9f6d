"""`python -m paa_gpu compile`: later calls compile nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paa_gpu import __main__, ahead

#: Calls that differ from those of `ahead` in everything but their kind. Prints each loop that they compiled.
LATER = """
import importlib, pkgutil
import numpy as np, torch
import paa_gpu, paa_gpu.cpu
from paa_gpu import ahead, data, testing

def forms():
    modules = [importlib.import_module(f"paa_gpu.cpu.{module.name}") for module in pkgutil.iter_modules(paa_gpu.cpu.__path__)]
    loops = [(name, loop) for module in modules for name, loop in vars(module).items() if hasattr(loop, "signatures")]
    return {name: len(loop.signatures) for name, loop in loops}

ahead.run_compile()
before, rng = forms(), np.random.default_rng(5)
trees, predictions = data.load(), testing.make_predictions([(9, 70)], rng, num_classes=2)
paa_gpu.paa_reassign(*trees.arguments, num_classes=1, num_gt=trees.num_gt)
batch = testing.make_batch([500, 3], rng, level_sizes=(20_000, 5000, 1000, 100), dtype=torch.bfloat16)
paa_gpu.paa_reassign_batch(*batch.arguments, num_classes=80, topk=3, covariance_type="tied", separation="d", singleton="positive")
inds = [inds.flip(0).int() for inds in batch.pos_inds]
paa_gpu.paa_reassign_batch(*batch[:4], inds, batch.pos_gt_inds, batch.anchors, num_classes=80)
for shapes in ((9, 9),), ((9, 9), (5, 5), (3, 3), (2, 2), (1, 1)):
    head = testing.make_head_batch([7, 0, 5], rng, shapes, num_classes=80, per_location=2)
    paa_gpu.candidate_losses(*head, gamma=2, alpha=1, convention="torchvision")
paa_gpu.score_voting(*(column[0] for column in predictions), 0, 0, 1, 1, True)
boxes, scores = predictions.mlvl_bboxes[0], predictions.mlvl_nms_scores[0]
paa_gpu.batched_nms(boxes[None], scores[None].double(), None, 1, score_thr=0, class_agnostic=True)
paa_gpu.batched_nms(boxes[None], scores[None, :, 0], scores.argmax(1)[None].to(torch.uint8), 1, method="gaussian", sigma=1, min_score=0)
paa_gpu.weighted_boxes_fusion([[boxes / 300]], [[scores[:, 0]]], [[scores.argmax(1)]], iou_thr=1, skip_box_thr=0, weights=[2])
paa_gpu.assign_max_iou([[boxes], [boxes[:3]]], [boxes[:5].double(), boxes[:0].double()], pos_iou_thr=1, neg_iou_thr=0, gt_max_assign_all=False)
for x in (torch.rand(40, 7), torch.rand(100_000), [torch.rand(3), torch.rand(20_000)]):
    mixture = paa_gpu.fit_gmm_1d(x, covariance_type="tied", tol=1, reg_covar=1, n_components=5, init="kmeans")
    mixture.predict(x), mixture.bic(x)
print({name: number for name, number in forms().items() if number != before[name]})
print({name for name, number in before.items() if number == 0})
"""


def test_every_function_is_named(monkeypatch, capsys):
    """In the order of the report, each with its time."""
    made = []
    operations = [operation._replace(run=lambda *_, name=operation.name: made.append(name)) for operation in ahead.calls()]
    monkeypatch.setattr(ahead, "calls", lambda: operations)
    assert __main__.main(["compile"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(dict.fromkeys(operation.name for operation in operations))
    assert len(made) == len(operations) * len(ahead.DTYPES)


@pytest.mark.slow
def test_later_calls_compile_nothing():
    """Every loop has been compiled, and none again: neither for other sizes, nor for ints where numbers are meant."""
    run = subprocess.run([sys.executable, "-c", LATER], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-2:] == ["{}", "set()"]
