from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "mmdet_paa.py"


def test_the_example_trains(monkeypatch, capsys, generator):
    assert len(EXAMPLE.read_text().splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "4"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"'loss': ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
