from __future__ import annotations

import numpy as np
import pytest

from paa_gpu import data


def recording_paths() -> list:
    return data.paths()


@pytest.fixture(params=recording_paths(), ids=lambda path: path.stem)
def recording(request: pytest.FixtureRequest) -> data.Recording:
    return data.load(request.param)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that a test draws alone: seeded with its name."""
    return np.random.default_rng(list(request.node.name.encode()))
