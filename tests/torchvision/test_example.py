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
