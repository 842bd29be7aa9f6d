"""The map of CONTRIBUTING against the tree, and files that have grown too long to be read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 500  # lines


def tracked(*patterns: str) -> set[str]:
    """What git tracks, without links."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return {path for path in listed if not (ROOT / path).is_symlink() and (ROOT / path).exists()}


def on_the_map() -> list[str]:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    table = contributing[contributing.index("## The map") : contributing.index("## Commands")]
    return re.findall(r"`((?:paa_gpu|kernels|tests|bench|docs|examples)/[\w./-]*)`", table)


def test_every_file_of_the_library_is_on_the_map_once():
    listed = [path for path in on_the_map() if path.endswith(".py") and path.startswith(("paa_gpu/", "kernels/"))]
    assert len(listed) == len(set(listed)), "a file stands on the map twice"
    assert set(listed) == {path for path in tracked("paa_gpu/*.py", "kernels/*.py") if not path.endswith("__init__.py")}


def test_what_the_map_shows_exists():
    assert not [path for path in on_the_map() if not (ROOT / path).exists()]


def test_no_file_is_too_long_to_be_read():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in tracked("*.py", "*.cpp", "*.h")}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_the_names_that_it_sends_readers_to_are_there():
    """A name in one pair of quotes, `of` or `in`, a file in another."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`(\w+)`\s+(?:of|in)\s+`([\w./]+\.py)`", text)
    missing = [place for place in named if not re.search(rf"^(def |class )?{place[0]}\b", (ROOT / place[1]).read_text(), re.M)]
    assert len(named) >= 6 and missing == []
