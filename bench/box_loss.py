"""`python -m bench.box_loss`: the anchors that PAA keeps when it scores by L1 and when it scores by GIoU, and what is learned.

The model, pictures and schedule are those of `examples/retinanet_trees.py`, with fewer steps. A run has two box losses: one
scores candidates, the other trains. At some steps, the run looks at a fixed batch of crops of the training site, without learning
from it. A line says how many positives a box has, the share of boxes with exactly one, the IoU of their anchors and of their
predicted boxes, the size of their anchors relative to the box, and the share of them that were positive at the last look. It also
says how much each loss varies among the anchors of one box: its standard deviation, mean over the boxes. `found` is the mean over the
boxes of the test sites of the best IoU among the 100 detections of the highest scores in a crop. `top` is the mean IoU with a box of
as many of the best detections as there are boxes. You need `pip install paa-gpu[examples] deepforest pycocotools`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, generalized_box_iou_loss, nms, sigmoid_focal_loss

from paa_gpu.integrations import torchvision as integration
from paa_gpu.integrations.torchvision import matching, paa

COLUMNS = (
    "step", "positives", "single", "anchor IoU", "box IoU", "size", "kept", "std focal", "std box", "score", "found", "top"
)  # fmt: skip
MEASURED = paa._losses


def experiment() -> Any:
    """`examples/retinanet_trees.py`."""
    path = Path(__file__).parents[1] / "examples" / "retinanet_trees.py"
    spec = importlib.util.spec_from_file_location("retinanet_trees", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def weigh(weight: float) -> None:
    """PAA in this process weights the box loss of candidates."""
    paa._losses = lambda model: {**MEASURED(model), "loss_bbox_weight": weight}


def look(model: nn.Module, batch: tuple, last: Tensor | None, box_loss: str) -> tuple[dict[str, float], Tensor]:
    """What PAA assigns in a batch, and which of its anchors are positive."""
    images, targets = batch
    with torch.no_grad():
        trained = matching.training_batch(model.train(), list(images), targets)
        outputs, anchors = trained.head_outputs, trained.anchors
        sizes = [outputs["cls_logits"].shape[1] // sum(trained.locations) * count for count in trained.locations]
        if isinstance(model, integration.RetinaNetPAA):
            matches = paa._paa_matches(model, trained.targets, outputs, anchors, sizes)
        else:
            gts = [target["boxes"] for target in trained.targets]
            matches = torch.stack(matching.matches_of(model.proposal_matcher, gts, anchors))
    rows: dict[str, list[Tensor]] = {name: [] for name in COLUMNS[1:10] if name != "kept"}
    for target, own, logits, offsets, match in zip(
        trained.targets, anchors, outputs["cls_logits"], outputs["bbox_regression"], matches, strict=True
    ):
        gts, found = target["boxes"], (match >= 0).nonzero().flatten()
        boxes, truth = model.box_coder.decode_single(offsets, own), gts[match[found]]
        count = match[found].bincount(minlength=len(gts)).float()
        rows["positives"].append(count)
        rows["single"].append((count == 1).float())
        rows["anchor IoU"].append(box_iou(own[found], gts).gather(1, match[found, None])[:, 0])
        rows["box IoU"].append(box_iou(boxes[found], gts).gather(1, match[found, None])[:, 0])
        rows["size"].append((area(own[found]) / area(truth)).sqrt())
        rows["score"].append(logits[found, 0].sigmoid())
        focal = sigmoid_focal_loss(logits, torch.ones_like(logits))[:, 0]
        for gt, near in zip(gts, box_iou(gts, own) >= 0.1, strict=True):
            if near.sum() < 2:
                continue
            wanted = gt.expand(int(near.sum()), 4)
            if box_loss == "l1":
                loss = (offsets[near] - model.box_coder.encode_single(wanted, own[near])).abs().sum(1)
            else:
                loss = generalized_box_iou_loss(boxes[near], wanted)
            rows["std focal"].append(focal[near].std()[None])
            rows["std box"].append(loss.std()[None])
    positive = matches >= 0
    values = {name: float(torch.cat(row).mean()) for name, row in rows.items()}
    values["kept"] = float("nan") if last is None else float((positive & last).sum() / positive.sum())
    return values, positive


def area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


@torch.no_grad()
def learned(model: nn.Module, batch: tuple) -> dict[str, float]:
    """`found` and `top` of a batch."""
    trained = matching.training_batch(model.train(), list(batch[0]), batch[1])
    found, top = [], []
    for target, own, logits, offsets in zip(trained.targets, trained.anchors, *trained.head_outputs.values(), strict=True):
        boxes, scores = model.box_coder.decode_single(offsets, own), logits[:, 0]
        overlaps = box_iou(target["boxes"], boxes[nms(boxes, scores, 0.5)[:100]])
        found.append(overlaps.max(1).values)
        top.append(overlaps[:, : len(overlaps)].max(0).values)
    return {"found": float(torch.cat(found).mean()), "top": float(torch.cat(top).mean())}


def train(options: argparse.Namespace, run: tuple[str, str, float, int]) -> dict[str, Any]:
    """One run: how boxes are scored for the assignment, "IoU" for torchvision's own matching; the box loss, its weight, the seed."""
    scored, trained, weight, seed = run
    torch.set_num_threads(1)
    trees = experiment()
    pictures, tested = (list(trees.pictures(names).values()) for names in (trees.TRAINED, trees.TESTED))
    torch.manual_seed(seed)
    model = trees.detector(trained)
    if scored != "IoU":
        integration.use_paa(model, box_loss=scored)
        weigh(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps, pct_start=0.1)
    one = argparse.Namespace(**{**vars(options), "steps": 1, "batch": 8})
    (probe,), (held_out,) = trees.batches(pictures, one, 1000), trees.batches(tested, one, 1001)
    records: list[dict[str, float]] = []
    last = None
    for step, (images, targets) in enumerate(itertools.chain(trees.batches(pictures, options, seed), [(None, None)])):
        if step in options.looks:
            values, last = look(model, probe, last, trained if scored == "IoU" else scored)
            records.append({"step": step, **values, **learned(model, held_out)})
        if images is None:
            break
        losses = model.train()(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        schedule.step()
    ap50 = trees.evaluate(model, trees.pictures(trees.TESTED))["all"][0]
    return {"scored": scored, "trained": trained, "weight": weight, "seed": seed, "AP50": ap50, "records": records}


def main(options: argparse.Namespace) -> None:
    arms = [tuple(arm.split(",")) for arm in options.arms]
    records = []
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        runs = [(scored, trained, float(weight), seed) for seed in range(options.seeds) for scored, trained, weight in arms]
        for record in pool.imap_unordered(functools.partial(train, options), runs):
            records.append(record)
            print(
                f"scored by {record['scored']} x {record['weight']:g}, trained by {record['trained']}, seed {record['seed']}: "
                f"AP50 {record['AP50']:.3f} on the test sites"
            )
            print("".join(f"{name:>11}" for name in COLUMNS))
            for row in record["records"]:
                print("".join(f"{row[name]:11.3f}" for name in COLUMNS), flush=True)
            options.out.write_text(json.dumps(records))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--looks", type=int, nargs="+", default=[0, 25, 50, 100, 200, 300])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=["l1,l1,1", "giou,l1,1", "l1,giou,1", "giou,giou,1", "IoU,l1,1"])
    parser.add_argument("--out", type=Path, default=Path("box_loss.json"))
    main(parser.parse_args())
