"""Saved results name the machine's processor and versions."""

from __future__ import annotations

from typing import Any

from .machine import describe


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(describe())


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Statistics without the time of every round."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
