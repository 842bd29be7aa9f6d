from __future__ import annotations

import api
import pytest
import torch

if api.IS_3X:
    from mmengine.registry import init_default_scope

collect_ignore = []
if api.IS_3X:
    init_default_scope("mmdet")
if api.VERSION != (3, 3):  # tests of `paa_gpu.PAAHead` and of the documentation, for which one version is enough
    collect_ignore += [
        "test_bench_head.py",
        "test_checkpoint.py",
        "test_docs.py",
        "test_example.py",
        "test_head.py",
        "test_head_steps.py",
    ]
if api.VERSION != (3, 3):  # 2.x has no Runner of mmengine; onedl's data sets need imgaug, which needs numpy below 2
    collect_ignore.append("test_runner.py")
if api.LADHead is None:
    collect_ignore.append("test_lad.py")


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers that a test draws alone: seeded with its name. Modules are initialised from torch's own."""
    return torch.Generator().manual_seed(sum(request.node.name.encode()))
