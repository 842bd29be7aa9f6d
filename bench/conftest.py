"""All cores for torch and for this library; saved results name the machine's processor and versions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .machine import describe


@pytest.fixture(autouse=True)
def all_cores() -> Iterator[None]:
    """Ignore `OMP_NUM_THREADS=1`, which scikit-learn's loops need: more threads make them slower and erratic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(describe())


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Statistics without the time of every round."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
