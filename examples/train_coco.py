"""Train a detector on your own data in COCO's format, with a torchvision or timm backbone and `paa_gpu.PAAHead`.

    python examples/train_coco.py --images photos --annotations train.json --test-annotations test.json
    torchrun --nproc-per-node 2 examples/train_coco.py --images photos --annotations train.json   # several processes or GPUs

It shows a progress bar, and writes a checkpoint after each epoch (`--resume` continues from it). It prints COCO's average
precision, and draws detections on the first test image. You need `pip install -e .[examples]`, and timm for `--backbone
timm:convnext_tiny`. A backbone must take images of any size, and return maps [N, C, H, W]; transformers of timm often do not. If
EXIF turns a picture, the width and the height in the file of annotations say whether its boxes are turned, too.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import tv_tensors
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

from paa_gpu import PAAHead

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that public backbones were trained on
CHANNELS = 256
STRIDES = (8, 16, 32)  # of the levels that the pyramid takes from the backbone
SHOWN = 0.3  # detections with a higher score are drawn

Sample = tuple[Tensor, dict[str, Any]]


class Detector(nn.Module):
    """Features of strides 8 to 128, and the head. A call with targets returns losses. A call without them returns detections."""

    def __init__(self, backbone: str, num_classes: int, pretrained: bool) -> None:
        super().__init__()
        self.body, widths = make_body(backbone, pretrained)
        self.pyramid = FeaturePyramidNetwork(widths, CHANNELS, LastLevelP6P7(CHANNELS, CHANNELS))
        self.head = PAAHead(num_classes, CHANNELS)

    def forward(self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Any]], scales: Any = None) -> Any:
        body = self.body(images)
        levels = {str(i): level for i, level in enumerate(body.values() if isinstance(body, dict) else body)}
        features = list(self.pyramid(levels).values())
        return self.head.loss(features, targets, sizes) if self.training else self.head.predict(features, sizes, scales)


def make_body(name: str, pretrained: bool) -> tuple[nn.Module, list[int]]:
    """A module that returns levels of these strides, and their numbers of channels."""
    if name.startswith("timm:"):
        import timm

        body = timm.create_model(name.removeprefix("timm:"), pretrained=pretrained, features_only=True)
        levels = [i for i, stride in enumerate(body.feature_info.reduction()) if stride in STRIDES]
        body = timm.create_model(name.removeprefix("timm:"), pretrained=pretrained, features_only=True, out_indices=levels)
    else:
        network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
        if not isinstance(network, torchvision.models.ResNet):
            raise ValueError(f"--backbone must be a ResNet of torchvision, or timm:NAME, got {name}")
        body = create_feature_extractor(network, {"layer2": "0", "layer3": "1", "layer4": "2"})
    with torch.no_grad():
        maps = body.eval()(torch.zeros(1, 3, 128, 128))
    shapes = [tuple(level.shape) for level in (maps.values() if isinstance(maps, dict) else maps)]
    if [shape[2:] for shape in shapes] != [(128 // stride, 128 // stride) for stride in STRIDES]:
        raise ValueError(f"--backbone must return maps [N, C, H, W] of strides {STRIDES}, got {shapes} for 128 x 128 pixels")
    return body, [shape[1] for shape in shapes]


def read(annotations: str) -> COCO:
    """A COCO file, with what many files leave out."""
    coco = COCO(annotations)
    if not coco.imgs:
        raise ValueError(f"{annotations} must have images, got none")
    for number, annotation in enumerate(coco.dataset.get("annotations", []), 1):
        box, category = annotation.get("bbox") or [], annotation["category_id"]
        if len(box) != 4:
            raise ValueError(f"{annotations}: annotation {annotation['id']} must have a bbox [x, y, width, height], got {box}")
        if category not in coco.cats:
            known = sorted(coco.cats)
            raise ValueError(f"{annotations}: annotation {annotation['id']} must be of a category of {known}, got {category}")
        annotation["id"] = number  # an id must not occur twice, and a box with the id 0 would count as missed
        annotation.setdefault("iscrowd", 0)  # pycocotools needs these two
        annotation.setdefault("area", box[2] * box[3])
    coco.createIndex()  # by the new ids
    return coco


def load(folder: str, entry: dict[str, Any]) -> Image.Image:
    """The picture of an entry in a COCO file.

    Some tools draw boxes on a picture as EXIF turns it, others as it lies on the disk. So the size in the entry decides.
    """
    with Image.open(Path(folder) / entry["file_name"]) as picture:
        size = entry.get("width", picture.width), entry.get("height", picture.height)
        turned = picture if picture.size == size else ImageOps.exif_transpose(picture)
        if turned.size != size:
            raise ValueError(f"{entry['file_name']} must have the size {size} of its entry, got {picture.size}")
        return turned.convert("RGB")


class CocoBoxes(torch.utils.data.Dataset[Sample]):
    """The images of a COCO file, for training with their boxes. A class is the position of its category in the sorted ids."""

    def __init__(self, images: str, annotations: str, size: int, training: bool) -> None:
        self.folder, self.training = images, training
        self.coco = read(annotations)
        self.ids, self.categories = sorted(self.coco.imgs), sorted(self.coco.cats)
        self.names = {number: category.get("name") for number, category in self.coco.cats.items()}
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.ConvertBoundingBoxFormat("XYXY"),
                v2.RandomHorizontalFlip(0.5 if training else 0),
                v2.Resize(size, max_size=size * 5 // 3, antialias=True),
                v2.ClampBoundingBoxes(),  # the next step drops what reaches beyond the image, if only by a rounding
                v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: inputs[1].get("labels")),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        number = self.ids[index]
        image: Any = load(self.folder, self.coco.imgs[number])
        width, height = image.size
        annotations = self.coco.imgToAnns[number]
        used = [each for each in annotations if self.training and not each["iscrowd"]]  # a crowd is not one object
        bboxes = torch.tensor([each["bbox"] for each in used], dtype=torch.float32).view(-1, 4)
        boxes = tv_tensors.BoundingBoxes(bboxes, format="XYWH", canvas_size=(height, width))
        labels = torch.tensor([self.categories.index(each["category_id"]) for each in used], dtype=torch.int64)
        image, target = self.transform(image, {"boxes": boxes, "labels": labels})
        target["boxes"] = target["boxes"].as_subclass(Tensor)
        return image, {**target, "image_id": number, "scale": (image.shape[2] / width, image.shape[1] / height)}


def collate(samples: list[Sample]) -> tuple[Tensor, list[tuple[int, int]], list[dict[str, Any]]]:
    """One batch, and the size of each image. It is padded at the right and below, to the largest image and a multiple of 128."""
    sizes = [tuple(image.shape[1:]) for image, _ in samples]
    height, width = (-(-max(side) // 128) * 128 for side in zip(*sizes, strict=True))
    images = torch.zeros(len(samples), 3, height, width)
    for canvas, (image, _) in zip(images, samples, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return images, sizes, [target for _, target in samples]


def batches(loader: DataLoader[Any], device: torch.device) -> Iterator[Any]:
    """The batches of `collate`, on the device."""
    for images, sizes, targets in loader:
        for target in targets:
            target["boxes"], target["labels"] = target["boxes"].to(device), target["labels"].to(device)
        yield images.to(device, non_blocking=True), sizes, targets


def train_epoch(model: nn.Module, optimizer: Any, schedule: Any, loader: Any, device: torch.device, epoch: int) -> None:
    torch.manual_seed(1000 * epoch + rank())  # training that goes on draws what it would have drawn
    model.train()
    bar = tqdm(batches(loader, device), total=len(loader), desc=f"epoch {epoch + 1}", disable=rank() != 0)
    for step, batch in enumerate(bar):
        losses = model(*batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:  # to read a loss waits for the device
            bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()})


@torch.no_grad()
def detect(model: Detector, categories: list[int], loader: Any, device: torch.device) -> list[dict[str, Any]]:
    """The detections in COCO's format, in pixels of the images on the disk. `categories`: those of the training set."""
    model.eval()
    found = []
    for images, sizes, targets in tqdm(batches(loader, device), total=len(loader), desc="detect"):
        detections = model(images, sizes, targets, [target["scale"] for target in targets])
        for target, image in zip(targets, detections, strict=True):
            x1, y1, x2, y2 = image["boxes"].cpu().unbind(1)
            boxes = torch.stack([x1, y1, x2 - x1, y2 - y1], 1)
            for box, score, label in zip(boxes.tolist(), image["scores"].tolist(), image["labels"].tolist(), strict=True):
                found.append({"image_id": target["image_id"], "category_id": categories[label], "bbox": box, "score": score})
    return found


def evaluate(coco: COCO, found: list[dict[str, Any]]) -> float:
    """COCO's average precision, with its whole table printed."""
    if not found:
        print("no detections: average precision 0")
        return 0.0
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def draw(file: Path, images: str, coco: COCO, found: list[dict[str, Any]]) -> None:
    """The first image with its boxes (white) and the detections (orange)."""
    first = coco.imgs[min(coco.imgs)]
    picture = v2.functional.pil_to_tensor(load(images, first))
    drawn = [entry["bbox"] for entry in coco.imgToAnns[first["id"]] if min(entry["bbox"][2:]) > 0]
    shown = [entry["bbox"] for entry in found if entry["image_id"] == first["id"] and entry["score"] > SHOWN]
    for boxes, color in ((drawn, "white"), (shown, "#E69F00")):
        if boxes:
            corners = torchvision.ops.box_convert(torch.tensor(boxes), "xywh", "xyxy")
            picture = draw_bounding_boxes(picture, corners, colors=color, width=2)
    v2.functional.to_pil_image(picture).save(file)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `least` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return number


def data_sets(options: argparse.Namespace) -> tuple[CocoBoxes, CocoBoxes | None]:
    """What to train with, and what to evaluate with."""
    data = CocoBoxes(options.images, options.annotations, options.size, training=True)
    if options.test_annotations is None:
        return data, None
    test = CocoBoxes(options.images, options.test_annotations, options.size, training=False)
    if not test.names.items() <= data.names.items():
        raise ValueError(f"--test-annotations must have categories of --annotations, {data.names}, got {test.names}")
    return data, test


def main(argv: list[str] | None = None) -> float | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument("--annotations", required=True, help="COCO file to train with")
    parser.add_argument("--test-annotations", help="COCO file to evaluate with; none: no evaluation")
    parser.add_argument("--backbone", default="resnet18", help="a torchvision ResNet, or timm:NAME")
    parser.add_argument("--pretrained", action="store_true", help="start from public weights of the backbone")
    parser.add_argument("--epochs", type=at_least(0), default=12, help="0 with --resume: evaluate alone")
    parser.add_argument("--batch-size", type=at_least(1), default=4, help="images of each process")
    parser.add_argument("--size", type=at_least(32), default=480, help="the shorter side of an image, in pixels")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--workers", type=at_least(0), default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/coco"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    options = parser.parse_args(argv)

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)
    data, test = data_sets(options)
    sampler: Any = DistributedSampler(data) if dist.is_initialized() else None
    loader: Any = DataLoader(
        data, options.batch_size, shuffle=sampler is None, sampler=sampler, num_workers=options.workers, collate_fn=collate
    )
    detector = Detector(options.backbone, len(data.categories), options.pretrained).to(device)
    optimizer = torch.optim.AdamW(detector.parameters(), options.lr, weight_decay=0.05)
    checkpoint, start = options.out / "checkpoint.pt", 0
    if options.resume:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["categories"] != data.categories:
            raise ValueError(
                f"--annotations must have the categories of {checkpoint}, {state['categories']}, got {data.categories}"
            )
        detector.load_state_dict(state["detector"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    # Also where training goes on, the learning rate follows what --lr and --epochs are now.
    for group in optimizer.param_groups:
        group["initial_lr"] = options.lr
    steps = max(1, options.epochs * len(loader))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * max(0, 1 - step / steps) ** 0.9, last_epoch=start * len(loader) - 1
    )
    model: Any = DistributedDataParallel(detector, [device] if cuda else None) if dist.is_initialized() else detector
    options.out.mkdir(parents=True, exist_ok=True)
    for epoch in range(start, options.epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        train_epoch(model, optimizer, schedule, loader, device, epoch)
        if rank() == 0:
            state = {"detector": detector.state_dict(), "optimizer": optimizer.state_dict()}
            part = checkpoint.with_suffix(".part")  # whatever interrupts the save, the last checkpoint stays whole
            torch.save({**state, "epoch": epoch + 1, "categories": data.categories}, part)
            part.replace(checkpoint)
    precision = None
    if rank() == 0 and test is not None:
        found = detect(detector, data.categories, DataLoader(test, options.batch_size, collate_fn=collate), device)
        (options.out / "detections.json").write_text(json.dumps(found))
        precision = evaluate(test.coco, found)
        draw(options.out / "detections.png", options.images, test.coco, found)
    if dist.is_initialized():
        dist.destroy_process_group()
    return precision


if __name__ == "__main__":
    main()
