"""The benchmarks: every provider of every case gives the same answer, so that none can rot; and what is made of saved results."""

from __future__ import annotations

import json
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from kernel_execution import compiled_only
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from bench import cases, compare, host, plot, providers, ratios, scaling
from paa_gpu import reference, testing

#: The recordings have tests of their own in the suite.
MARKS = {"recorded": pytest.mark.long, "crowded": pytest.mark.slow, "1000_detections": pytest.mark.slow}


def named(names):
    return [pytest.param(name, marks=MARKS.get(name, ())) for name in names]


@pytest.mark.parametrize("case", named(cases.REASSIGN))
def test_providers_of_the_reassignment_agree(case):
    call = cases.REASSIGN[case]()
    wanted = providers.oracle(call)
    providers.check(providers.library(call), wanted)
    providers.check(providers.library_one_by_one(call), wanted)
    labels = sum(image[0].shape[0] for image in wanted)
    published = providers.published(call)
    # It rounds squares to float32, which moves a few boundaries.
    assert sum(int((ours[0] != theirs[0]).sum()) for ours, theirs in zip(published, wanted, strict=True)) <= 1e-4 * labels
    providers.reassign_limit(call)()


def test_a_wrong_answer_is_no_agreement():
    wanted = providers.oracle(cases.Call(cases.one_box()))
    ((label, label_weight, bbox_weight, num_pos),) = wanted
    with pytest.raises(AssertionError, match="oracle"):
        providers.check([(label + 1, label_weight, bbox_weight, num_pos)], wanted)
    with pytest.raises(AssertionError, match="oracle"):
        providers.check([(label, label_weight, bbox_weight, num_pos + 1)], wanted)


@pytest.mark.parametrize("case", named(cases.VOTING))
def test_providers_of_score_voting_agree(case):
    providers.check_voting(*cases.VOTING[case]())


def test_what_the_ratios_compare_stays_where_its_tensors_are():
    """A tensor that the published loops make anywhere else would not reach those of a GPU."""
    call = cases.Call(cases.one_box())
    wanted, losses, assignment = (
        providers.oracle(call),
        testing.make_head_batch([20, 3], np.random.default_rng(0)),
        cases.assignment(7),
    )
    with torch.device("meta"):
        providers.check(providers.oracle(call.to("cpu")), wanted)
        assert providers.published(call)[0][0].device.type == "cpu"
        providers.check_voting(*cases.predictions(7))
        providers.check_losses(losses)
        providers.check_assignment(*assignment)


@pytest.mark.parametrize("number", [0, 7])
def test_a_wrong_assignment_is_noticed(number):
    anchors, boxes = cases.assignment(number)
    providers.check_assignment(anchors, boxes)
    moved = [level + 1000 for level in anchors]
    wrong = reference.assign_max_iou(moved, [torch.ones(1, 4)])
    other = mock.patch.object(reference, "assign_max_iou", lambda *_: wrong)
    with other, pytest.raises(AssertionError, match="matrix of overlaps"):
        providers.check_assignment(anchors, boxes)


def test_a_ratio_is_printed(capsys, monkeypatch):
    """All steps but for those of the recordings and of large inputs, which have the same form."""
    monkeypatch.setattr(providers, "interleaved", lambda calls, **_: [call() is None or 1.0 for call in calls])
    ratios.batch("one_box")
    ratios.losses()
    ratios.assignment()
    ratios.voting_of_classes(10)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0].partition(" (")[0] for line in lines] == [
        "paa_reassign_batch", "candidate_losses", "assign_max_iou", "assign_max_iou", "score_voting"
    ]  # fmt: skip


def saved(**medians):
    """A saved result, with these medians of the library and a spread of 1 ms."""
    return {
        "machine_info": {"cpu": "a processor", "cores": 2, "cuda": None, "python_version": "3", "versions": {"torch": "2"}},
        "commit_info": {"id": "0123456789"},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [
            {
                "name": f"test_reassign[{case}-{provider}]",
                "group": f"reassign {case}",
                "params": {"case": case, "provider": provider},
                "extra_info": {},
                "stats": {"median": seconds * factor, "iqr": 1e-3},
            }
            for case, seconds in medians.items()
            for provider, factor in (("published", 300), ("library", 1), ("limit", 0.25))
        ],
    }


def test_comparison_names_what_got_slower_by_more_than_the_spread(tmp_path, capsys):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(saved(steady=0.010, slower=0.010, gone=1.0)))
    after.write_text(json.dumps(saved(steady=0.0105, slower=0.020, new=1.0)))
    assert compare.main([str(before), str(after)]) == 1
    lines = capsys.readouterr().out.splitlines()
    slower = [line for line in lines if "test_reassign[slower-library]" in line]
    assert slower == ["2.00x slower  test_reassign[slower-library]: 10.000 ms -> 20.000 ms, spread 1.000 ms"]
    assert not any("[steady-library]" in line for line in lines)
    assert f"only in {before}: test_reassign[gone-library]" in lines
    assert f"only in {after}: test_reassign[new-library]" in lines
    assert compare.main([str(before), str(before)]) == 0


def test_the_table_compares_with_whatever_was_there_before():
    lines = plot.table({"losses": {"library": 0.001, "unfused": 0.1}, "fit": {"scikit_learn": 2.0, "library": 0.02}}).splitlines()
    assert lines[0] == "| case | scikit-learn | unfused torch | paa_gpu | speed-up | times bare numpy |"
    assert lines[2:] == ["| losses |  | 100 ms | 1 ms | 100x |  |", "| fit | 2 s |  | 20 ms | 100x |  |"]


def test_the_table_of_the_readme_fits_a_phone():
    seconds = {"published": 3.0, "library": 0.01, "limit": 0.005}
    lines = plot.short_table(dict.fromkeys(plot.HEADLINE, seconds)).splitlines()
    assert len(lines) - 2 <= 8
    assert all(line.count("|") - 1 <= 6 for line in lines)


def test_table_and_pictures_of_saved_results(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"above\n{plot.START}\nold\n{plot.END}\nbelow\n")
    suite, grown = tmp_path / "suite.json", tmp_path / "scaling.json"
    suite.write_text(json.dumps(saved(recorded=0.02, crowded=0.001)))
    points = [{"x": x, "seconds": 1e-3 * x, "instructions": 7.0} for x in (1, 10, 100)]
    grown.write_text(json.dumps({**saved(), "axes": {"boxes": points}}))
    plot.main([str(suite), str(grown)])
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("above\n")
    assert readme.endswith("\nbelow\n")
    assert "old" not in readme
    assert "| assign one image of 600 boxes | 300 ms | 1 ms | 300x | 4.0 |" in readme
    assert "recorded" not in readme, "the README shows the cases of HEADLINE only"
    assert "2026-01-02, commit 0123456" in readme
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| reassign recorded | 6 s | 20 ms | 5 ms | 300x | 4.0 |" in page
    assert "2026-01-02, commit 0123456" in page
    assert "| boxes | 1 to 100 | 1.00 | nan | 0.00 | nan |" in page
    for name in ("benchmarks.png", "scaling.png"):
        with Image.open(tmp_path / "docs" / name) as picture:
            assert picture.width > 1000
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


@compiled_only
def test_a_point_of_the_scaling_is_measured():
    point = scaling.measure(scaling.images(1))
    assert point["seconds"] > 0
    # The targets at least: a label, a weight and four more of every anchor.
    assert point["bytes"] >= sum(cases.COCO_LEVELS) * (8 + 4 + 16)
    assert {"instructions", "sectors"} <= point.keys()


def test_the_host_code_of_every_call_runs_without_launches():
    """How long it takes is for `python -m bench.host` to say, on a quiet machine."""
    for name, call in host.calls().items():
        launches = []
        with mock.patch.object(host, "_return_at_once", lambda *_, launches=launches, **__: launches.append(1)):
            measured = host.multiples({name: call}, rounds=1)
        assert launches and measured[name] > 1, name


def test_the_loss_has_as_many_operations_for_maps_of_few_cells():
    """So that those few cells show what Python does for an image of 800 x 1333 pixels."""
    counts = []
    for shapes in (host.FEW, cases.HEAD_SHAPES):
        with host.launches_return_at_once(), host.as_with_results(), Operations() as operations:
            host.head_loss(shapes)()
        counts.append(operations.by)
    assert counts[0] == counts[1] and sum(counts[0].values()) > 100


class Operations(TorchDispatchMode):
    """Counts what torch is asked for."""

    def __init__(self):
        super().__init__()
        self.by = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.by[func.name()] += 1
        return func(*args, **(kwargs or {}))
