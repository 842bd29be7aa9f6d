from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "mmdet_paa.py"


def test_the_example_trains(monkeypatch, capsys, generator):
    assert len(EXAMPLE.read_text().splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "4"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"'loss': ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_the_example_without_mmdetection_trains_and_draws(monkeypatch, capsys, tmp_path):
    """Three steps of small crops; what 500 make of it, only a person can judge."""
    picture = tmp_path / "trees.png"
    monkeypatch.setattr(sys, "argv", ["train_trees.py", "--steps", "3", "--size", "64", "--out", str(picture)])
    runpy.run_path(str(EXAMPLES / "train_trees.py"), run_name="__main__")
    assert re.search(r"\d+ boxes find \d+ of 61 trees", capsys.readouterr().out)
    assert picture.stat().st_size > 10_000
