"""Does PAA help? The same small RetinaNet with torchvision's IoU matching and with PAA: `python examples/retinanet_trees.py`.

The aerial photographs come from the package `deepforest`. The model trains on one site (YELL), and is tested on two others (OSBS
and SOAP). Both arms of a seed start from the same weights. They see the same crops in the same order, for the same number of
steps, at the same learning rate. Only the assignment differs. After each run, the example writes a JSON file with all numbers. At
the end it draws a picture. You need `pip install ".[examples]" deepforest pycocotools`, and half an hour of CPU time.
"""

import argparse
import importlib.util
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from tqdm import tqdm

from paa_gpu.integrations.torchvision import use_paa

TRAINED = {"YELL 528": "2019_YELL_2_528000_4978000_image_crop2.png", "YELL 541": "2019_YELL_2_541000_4977000_image_crop.png"}
TESTED = {"OSBS 029": "OSBS_029.png", "SOAP 061": "SOAP_061.png"}
CHANNELS = 64
ARMS = {"IoU": "IoU matching", "PAA": "PAA", "PAA, voting": "PAA and score voting"}
COLORS = {"IoU": "#0072B2", "PAA": "#D55E00", "PAA, voting": "#E69F00"}
Picture = tuple[Tensor, Tensor]


def folder() -> Path:
    """The folder of the pictures of `deepforest`. The package is not imported."""
    package = importlib.util.find_spec("deepforest")
    if package is None:
        raise SystemExit("the annotated photographs come with the package `deepforest`: pip install deepforest")
    return Path(package.submodule_search_locations[0]) / "data"


def read(path: Path) -> Picture:
    """A picture [3, H, W] in [0, 1] and its boxes [G, 4]: trees, alive or dead."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
    corners = ElementTree.parse(path.with_suffix(".xml")).iter("bndbox")
    boxes = [[float(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")] for box in corners]
    return pixels, torch.tensor(boxes)


def detector(box_loss: str) -> RetinaNet:
    """ResNet-18 up to stride 16 and a pyramid of 64 channels, with random weights.

    The anchors have half of torchvision's sizes, because the crowns are small.
    """
    body = resnet18(norm_layer=lambda channels: nn.GroupNorm(16, channels))
    backbone = BackboneWithFPN(body, {"layer2": "0", "layer3": "1"}, [128, 256], CHANNELS, LastLevelP6P7(CHANNELS, CHANNELS))
    sizes = tuple(tuple(side * 2 ** (i / 3) for i in range(3)) for side in (16, 32, 64, 128))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    # Crowns keep their size in pixels.
    model = RetinaNet(backbone, 1, anchor_generator=anchors, score_thresh=0.02, _skip_resize=True)
    model.head.regression_head._loss_type = box_loss
    return model


def crop(picture: Picture, size: int, random: torch.Generator) -> Picture:
    """A random square of a picture, mirrored and turned at random. It keeps boxes with more than 30 % of their area inside."""
    image, boxes = picture
    y, x = (int(torch.randint(side - size + 1, (), generator=random)) for side in image.shape[1:])
    inside = (boxes - torch.tensor([x, y, x, y])).clamp(0, size)
    area, whole = ((box[:, 2:] - box[:, :2]).prod(1) for box in (inside, boxes))
    inside, image = inside[area > 0.3 * whole], image[:, y : y + size, x : x + size]
    flipped, turned = (torch.rand(2, generator=random) < 0.5).tolist()
    if flipped:
        image, inside = image.flip(2), torch.stack([size - inside[:, 2], inside[:, 1], size - inside[:, 0], inside[:, 3]], 1)
    if turned:
        image, inside = image.transpose(1, 2), inside[:, [1, 0, 3, 2]]
    return image, inside


def labelled(boxes: Tensor) -> dict[str, Tensor]:
    return {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}


def batches(pictures: list[Picture], options: argparse.Namespace, seed: int):
    """Crops. Larger pictures give more."""
    random = torch.Generator().manual_seed(seed)
    areas = torch.tensor([float(image.shape[1] * image.shape[2]) for image, _ in pictures])
    for _ in range(options.steps):
        chosen = areas.multinomial(options.batch, replacement=True, generator=random).tolist()
        images, boxes = zip(*(crop(pictures[i], options.size, random) for i in chosen), strict=True)
        yield list(images), [labelled(box) for box in boxes]


@torch.no_grad()
def detect(model: RetinaNet, image: Tensor) -> dict[str, Tensor]:
    """The model's detections in a picture at its own size. In training, crops have this size too."""
    sides = image.shape[1:]
    model.eval().transform.min_size, model.transform.max_size = (min(sides),), max(sides)
    (found,) = model([image])
    return found


def evaluate(model: RetinaNet, pictures: dict[str, Picture]) -> dict[str, list[float]]:
    """AP at an IoU of 0.5, and averaged over 0.5 to 0.95, for all pictures together and for each."""
    found = {name: detect(model, image) for name, (image, _) in pictures.items()}
    truth = {name: labelled(boxes) for name, (_, boxes) in pictures.items()}
    result = {}
    for which, names in {"all": list(pictures), **{name: [name] for name in pictures}}.items():
        metric = MeanAveragePrecision(backend="pycocotools")
        metric.update([found[name] for name in names], [truth[name] for name in names])
        result[which] = [float(metric.compute()[key]) for key in ("map_50", "map")]
    return result


def train(arm: str, seed: int, options: argparse.Namespace) -> list[dict]:
    """The records of one run: the losses of each step, AP at some steps, and the detections of the last model."""
    torch.set_num_threads(1)
    trained, tested = pictures(TRAINED), pictures(TESTED)
    torch.manual_seed(seed)
    model = detector(options.box_loss)
    if arm == "PAA":
        use_paa(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps, pct_start=0.1)
    curve, totals, begin = [], [], time.process_time()
    bar = tqdm(batches(list(trained.values()), options, seed), f"{arm}, seed {seed}", options.steps, mininterval=5)
    for step, (images, targets) in enumerate(bar, 1):
        losses = model.train()(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        schedule.step()
        totals.append([loss.item() for loss in losses.values()])
        if step % max(1, options.steps // options.points) == 0:
            curve.append({"step": step, **evaluate(model, tested)})
            bar.set_postfix(AP50=f"{curve[-1]['all'][0]:.3f}")
    record = {"arm": arm, "seed": seed, "curve": curve, "losses": totals, "cpu_seconds": time.process_time() - begin}
    record["trained on"] = evaluate(model, {"YELL 541": part(trained["YELL 541"], 600)})["all"]
    record["found"] = {name: best(detect(model, image), len(boxes)) for name, (image, boxes) in tested.items()}
    if arm == "IoU":
        return [record]
    use_paa(model, score_voting=True)
    voted = {"arm": "PAA, voting", "seed": seed, "curve": [{**curve[-1], **evaluate(model, tested)}]}
    return [record, voted]


def best(found: dict[str, Tensor], count: int) -> list[list[float]]:
    """The detections of the highest scores."""
    return found["boxes"][found["scores"].argsort(descending=True)[:count]].tolist()


def pictures(names: dict[str, str]) -> dict[str, Picture]:
    return {name: read(folder() / file) for name, file in names.items()}


def part(picture: Picture, size: int) -> Picture:
    """The upper left square of a picture, and the boxes that are wholly in it."""
    image, boxes = picture
    return image[:, :size, :size], boxes[(boxes[:, 2:] <= size).all(1)]


def summary(records: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over the seeds of the last AP of each arm."""
    last = {arm: np.array([record["curve"][-1]["all"] for record in records if record["arm"] == arm]) for arm in ARMS}
    return {arm: {"mean": ap.mean(0).tolist(), "std": ap.std(0, ddof=1).tolist()} for arm, ap in last.items() if len(ap) > 1}


def draw(file: Path, records: list[dict], tested: dict[str, Picture]) -> None:
    """The curves, and the detections of the first seed side by side."""
    first = {record["arm"]: record["found"] for record in records if record["seed"] == 0 and "found" in record}
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 9})
    figure, axes = plt.subplots(2, 1 + len(first), figsize=(7.2, 5.4), layout="constrained")
    for axis, place, name in zip(axes[:, 0], (0, 1), ("AP at IoU 0.5", "AP at IoU 0.5 to 0.95"), strict=True):
        for arm, color in COLORS.items():
            curves = [record["curve"] for record in records if record["arm"] == arm]
            if not curves:
                continue
            steps = [point["step"] for point in curves[0]]
            ap = np.array([[point["all"][place] for point in curve] for curve in curves])
            axis.plot(steps, ap.mean(0), color=color, marker="o", markersize=3, label=ARMS[arm])
            axis.fill_between(steps, ap.min(0), ap.max(0), color=color, alpha=0.12)
        axis.set(xlabel="step", ylabel=name, ylim=(0, None))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS), frameon=False)
    figure.suptitle("Pictures of sites that no model was trained on. Curves: mean and range over the seeds. White: trees")
    for column, arm in enumerate(sorted(first), 1):
        for axis, (name, (image, boxes)) in zip(axes[:, column], tested.items(), strict=True):
            axis.imshow(image.permute(1, 2, 0))
            for corners, color in ((boxes.tolist(), "white"), (first[arm][name], COLORS[arm])):
                for x1, y1, x2, y2 in corners:
                    axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=0.8))
            axis.set(title=f"{ARMS[arm]}\n{name}, the best {len(boxes)}", xticks=[], yticks=[])
    figure.savefig(file, dpi=150)


def main(options: argparse.Namespace) -> list[dict]:
    runs = [(arm, seed, options) for seed in range(options.seeds) for arm in ("IoU", "PAA")]
    records: list[dict] = []
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, *run) for run in runs]):
            records += future.result()
            for record in future.result():
                tqdm.write(f"{record['arm']}, seed {record['seed']}: AP50 {record['curve'][-1]['all'][0]:.3f}")
            content = {"options": {**vars(options), "out": options.out.name}, "summary": summary(records), "records": records}
            options.out.with_suffix(".json").write_text(json.dumps(content))
    draw(options.out, records, pictures(TESTED))
    for arm, values in summary(records).items():
        (ap50, ap), (spread50, spread) = values["mean"], values["std"]
        print(f"{ARMS[arm]:22} AP50 {ap50:.3f} ± {spread50:.3f}   AP {ap:.3f} ± {spread:.3f}")
    return records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=192, help="side of the crops, in pixels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--box-loss", choices=("giou", "l1"), default="giou", help="torchvision's, of RetinaNet v2 or v1")
    parser.add_argument("--points", type=int, default=8, help="of the curve")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("retinanet_trees.png"), help="the picture; numbers beside it, as JSON")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds, options.size, options.points = 2, 1, 96, 1
    main(options)
