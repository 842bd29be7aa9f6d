"""`pytest -p fakecuda.plugin`: the tests find CUDA devices. Work that is left on a device at the end of a test is done, and its errors
are the test's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import devices


@pytest.fixture(autouse=True)
def devices_finish() -> Iterator[None]:
    yield
    devices.synchronize()
