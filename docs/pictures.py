"""`python docs/pictures.py`: the pictures of the documentation, drawn by the code of the gallery page, small enough to keep.

Photographs become JPEGs 1,300 pixels wide, drawings PNGs of 64 colours.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

import pages

PHOTOGRAPHS = ("anchors", "demo", "voting")
WIDTH = 1300


def keep(drawn: Path) -> None:
    """A drawn picture, as the documentation has it."""
    picture = Image.open(drawn).convert("RGB")
    if drawn.stem in PHOTOGRAPHS:
        picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
        picture.save(DOCS / f"{drawn.stem}.jpg", quality=60, optimize=True, progressive=True)
    else:
        picture.quantize(64, dither=Image.Dither.NONE).save(DOCS / drawn.name, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pages.run(pages.blocks(DOCS / "gallery.md"), {})
        for drawn in sorted(Path(folder).glob("*.png")):
            keep(drawn)
