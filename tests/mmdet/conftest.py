from __future__ import annotations

import pytest
import stand_in  # noqa: F401  # before mmcv's operators
import torch
from mmdet.utils import register_all_modules

register_all_modules()


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers that a test draws alone: seeded with its name. Modules are initialised from torch's own."""
    seed = sum(request.node.name.encode())
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
