"""Recorded calls of the published head on real images. One is in the package, for the demonstration. A checkout has more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
BUNDLED = HERE / "g01_OSBS_029_late.npz"


class Recording(NamedTuple):
    """The arguments of one recorded call of `PAAHead.paa_reassign`, and its known results."""

    name: str  #: the file's, without its ending
    pos_losses: Tensor  #: Tensor[P] float32
    label: Tensor  #: Tensor[A] int64
    label_weight: Tensor  #: Tensor[A] float32
    bbox_weight: Tensor  #: Tensor[A, 4] float32
    pos_inds: Tensor  #: Tensor[P] int64
    pos_gt_inds: Tensor  #: Tensor[P] int64
    anchors: list[Tensor]  #: Tensor[A_l, 4] float32 of each level
    num_classes: int  #: of the detector
    published: Tensor  #: BoolTensor[P], the positives of the recorded call
    gt: dict[str, np.ndarray[Any, Any]]  #: `bboxes`, `npos64`, `iter64`, `tie` and others, an entry per box
    meta: dict[str, Any]  #: image, crop, stage, sizes, times

    @property
    def num_gt(self) -> int:
        return len(self.gt["bboxes"])

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """The positional arguments of `paa_reassign`."""
        return self[1:8]


class Voting(NamedTuple):
    """The arguments of one recorded call of `PAAHead.score_voting`, and its results."""

    name: str  #: the recording's, the score threshold and the most detections
    det_bboxes: Tensor  #: Tensor[k, 5] float32
    det_labels: Tensor  #: Tensor[k] int64
    mlvl_bboxes: Tensor  #: Tensor[N, 4] float32
    mlvl_nms_scores: Tensor  #: Tensor[N, C + 1] float32; the last column is the background, zeros
    score_thr: float  #: boxes with a higher score vote
    out_bboxes: Tensor  #: Tensor[k, 5] float32
    out_labels: Tensor  #: Tensor[k] int64

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """The positional arguments of `score_voting`."""
        return self[1:6]


def paths() -> list[Path]:
    """The recordings on this machine: the one in the package, and those of a checkout."""
    checkout = sorted((HERE.parents[1] / "tests" / "data").glob("g*.npz"))
    return [BUNDLED, *checkout]


def voting_paths() -> list[Path]:
    """The recordings of score voting on this machine: those of `paths`, and in a checkout also those with 80 classes."""
    return [*paths(), *sorted((HERE.parents[1] / "tests" / "data").glob("voting*.npz"))]


def _read(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    with np.load(path) as file:
        stored = {name: file[name] for name in file.files}
    return stored, json.loads(str(stored["meta"]))


def load_voting(path: Path | str = BUNDLED) -> list[Voting]:
    """Read the calls of `score_voting` of a recording: at most three score thresholds and numbers of detections.

    Args:
        path: one of `voting_paths()`. The default is the recording in the package.

    Raises:
        FileNotFoundError, KeyError, ValueError: no such file, or one that is no recording.
    """
    path = Path(path)
    stored, meta = _read(path)
    mlvl_bboxes = torch.from_numpy(stored["mlvl_bboxes"])
    background = np.zeros((len(mlvl_bboxes), 1), np.float32)
    scores = torch.from_numpy(np.hstack([stored["mlvl_nms_scores"], background]))
    calls = []
    for score_thr, most in meta["voting"]:
        key = f"{score_thr}_{most}"
        det_bboxes, det_labels, out_bboxes, out_labels = (
            torch.from_numpy(stored[f"{name}_{key}"]) for name in ("det_bboxes", "det_labels", "out_bboxes", "out_labels")
        )
        calls.append(
            Voting(
                f"{path.stem}_{key}", det_bboxes, det_labels.long(), mlvl_bboxes, scores, score_thr, out_bboxes, out_labels.long()
            )
        )
    return calls


def load(path: Path | str = BUNDLED) -> Recording:
    """Read a recording.

    Args:
        path: one of `paths()`. The default is the recording in the package.

    Raises:
        FileNotFoundError, KeyError, ValueError: no such file, or one that is no recording.
    """
    path = Path(path)
    stored, meta = _read(path)
    anchors = [_anchors(height, width, stride) for (height, width), stride in zip(meta["feat_hw"], meta["strides"], strict=True)]
    pos_inds = torch.from_numpy(np.cumsum(stored["pos_inds_delta"].astype(np.int64)))
    pos_gt_inds = torch.from_numpy(stored["pos_gt_inds"].astype(np.int64))
    # From numpy, which no default device or dtype of torch changes; so are the anchors.
    label = torch.from_numpy(np.full(sum(map(len, anchors)), meta["num_classes"], np.int64))
    label[pos_inds] = torch.from_numpy(stored["gt_labels"].astype(np.int64))[pos_gt_inds]
    bbox_weight = torch.from_numpy(np.zeros((len(label), 4), np.float32))
    bbox_weight[pos_inds] = 1
    return Recording(
        name=path.stem,
        pos_losses=torch.from_numpy(stored["pos_losses"]),
        label=label,
        label_weight=torch.from_numpy(np.ones(len(label), np.float32)),
        bbox_weight=bbox_weight,
        pos_inds=pos_inds,
        pos_gt_inds=pos_gt_inds,
        anchors=anchors,
        num_classes=meta["num_classes"],
        published=torch.from_numpy(np.unpackbits(stored["out_pos_bits"])[: len(pos_inds)].astype(bool)),
        gt={name.removeprefix("gt_"): array for name, array in stored.items() if name.startswith("gt_")},
        meta=meta,
    )


def _anchors(height: int, width: int, stride: int) -> Tensor:
    """The recorded head's anchors: one square of side 8 strides per cell, row after row."""
    y, x = torch.from_numpy(np.indices((height, width), np.float32))
    return torch.stack([x - 4, y - 4, x + 4, y + 4], -1).reshape(-1, 4) * float(stride)


def picture(recording: Recording) -> Any:
    """The recording's image as the network saw it, for Pillow. Images other than the one in the package need a checkout."""
    from PIL import Image

    file, scale = {
        "OSBS_029": (HERE / "OSBS_029_800x800.jpg", 2),
        "YELL_541": (HERE.parents[1] / "tests" / "data" / "YELL_541_1249x1035.jpg", 1),
    }[recording.meta["image"]]
    left, upper, right, lower = (scale * corner for corner in recording.meta["crop_xyxy"])
    return (
        Image.open(file)
        .convert("RGB")
        .crop((left, upper, right, lower))
        .resize(recording.meta["input_wh"], Image.Resampling.BILINEAR)
    )
