"""`make bench-mmdet` on small inputs. It checks before it times, and prints what the documentation quotes."""

from __future__ import annotations

import re

from heads import build

from bench import head as bench


def test_it_runs(monkeypatch, capsys):
    small = build(in_channels=32, feat_channels=32, stacked_convs=1)
    monkeypatch.setattr("sys.argv", ["bench.head", "--size", "128", "160", "--rounds", "1", "--loaded"])
    monkeypatch.setattr(bench, "BATCHES", ((2, 3),))
    monkeypatch.setattr(bench, "CHANNELS", 32)
    monkeypatch.setattr(bench.heads, "build", lambda **_: small)
    bench.main()
    out = capsys.readouterr().out
    waits = dict(re.findall(r"^  (published|accelerated, before|accelerated) .* (\d+) waits", out, re.MULTILINE))
    assert int(waits["published"]) > int(waits["accelerated, before"]) > int(waits["accelerated"]) == 0
    assert re.search(r"published / accelerated: [\d.]+ of the loss", out)
    assert "predict, images with" in out
