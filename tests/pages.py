"""The documentation's Python: every ```python block of every page, run page by page in one namespace.

A block that needs mmdetection, DeepForest, torchvision or a GPU is left out where that is missing. `make test-mmdet` and
`make test-torchvision` have the former two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def installed(name: str) -> bool:
    """Not merely a folder of that name, as tests/mmdet is."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


#: What a block may need: how that shows in it, and whether it is here.
NEEDS = {
    "mmdetection": (r"import mmdet|\bmmdet\.|# mmdet", installed("mmdet")),
    "DeepForest": (r"\bdeepforest\b", installed("deepforest")),
    "torchvision": (r"\btorchvision\b", installed("torchvision")),
    "a GPU": (r"# needs a GPU", torch.cuda.is_available()),
}


class Block(NamedTuple):
    page: Path
    line: int  #: of its first line in the page
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def missing(self) -> list[str]:
        """What the block needs and is not at hand."""
        return [name for name, (mark, here) in NEEDS.items() if not here and re.search(mark, self.code)]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [Block(page, text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def given() -> dict[str, Any]:
    """What the pages have from somewhere: a batch's features and targets, and two detectors of torchvision where that is here."""
    box = {"boxes": torch.tensor([[8.0, 8, 90, 90]]), "labels": torch.tensor([17])}
    batch = {
        "__name__": "page",
        "features": [torch.rand(2, 256, 128 // stride, 128 // stride) for stride in (8, 16, 32, 64, 128)],
        "targets": [box] * 2,
        "image_sizes": [(128, 128)] * 2,
    }
    if not installed("torchvision"):
        return batch
    import torchvision_models

    return {**batch, "retinanet": torchvision_models.retinanet(), "detector": torchvision_models.faster_rcnn()}


def run(page_blocks: Sequence[Block], namespace: dict[str, Any]) -> None:
    """Run them one after the other; errors name the page and the line."""
    for block in page_blocks:
        code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
        exec(code, namespace)
