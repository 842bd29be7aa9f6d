from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_experiment_runs(tmp_path):
    """Two steps of tiny crops; what it finds is in the documentation."""
    picture = tmp_path / "trees.png"
    command = [sys.executable, "examples/retinanet_trees.py", "--quick", "--out", str(picture)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 10_000
    content = json.loads(picture.with_suffix(".json").read_text())
    arms = {record["arm"]: record for record in content["records"]}
    assert sorted(arms) == ["IoU", "PAA", "PAA, voting"]
    assert len(arms["PAA"]["losses"]) == content["options"]["steps"] == 2
    # The same weights and the same crops: the first step's losses differ by the assignment only.
    assert arms["IoU"]["losses"][0] != arms["PAA"]["losses"][0]
    assert 0 <= arms["PAA"]["curve"][-1]["all"][0] <= 1


def test_a_look_at_the_anchors_runs(tmp_path):
    """One step of tiny crops for each way to match; what a longer run shows is in the documentation."""
    file = tmp_path / "box_loss.json"
    command = [sys.executable, "-m", "bench.box_loss", "--steps", "1", "--looks", "0", "1", "--size", "96", "--seeds", "1"]
    done = subprocess.run(
        [*command, "--arms", "l1,l1,1", "giou,l1,1", "IoU,l1,1", "--out", str(file)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = {record["scored"]: record["records"][0] for record in json.loads(file.read_text())}
    # The same weights and crops: only the anchors that are kept differ.
    assert first["l1"]["found"] == first["giou"]["found"] == first["IoU"]["found"]
    assert first["giou"]["anchor IoU"] > first["l1"]["anchor IoU"]
    assert first["l1"]["std box"] > first["giou"]["std box"]
