"""`python -m paa_gpu check` on these devices, on the one that is not the current one."""

from __future__ import annotations

import pytest
import torch

from paa_gpu import diagnose

PAIRS = list(zip(diagnose.operations(0), diagnose.operations(1), strict=True))


def checks(number: int) -> diagnose.DeviceChecks:
    return diagnose.DeviceChecks(*PAIRS[number], diagnose.Cuda("cuda:1"), repeats=2)


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=[operation.name for operation, _ in PAIRS])
class TestEveryOperation:
    def test_waits_for_nothing(self, number):
        assert checks(number).waiting() is None
        assert torch.cuda.current_device() == 0

    def test_is_captured(self, number):
        assert checks(number).captured_graph() is None

    def test_sees_the_earlier_work_of_its_stream(self, number):
        assert checks(number).busy_stream() is None

    @pytest.mark.long
    def test_gives_the_same_bits(self, number):
        assert checks(number).repetitions() is None

    @pytest.mark.long
    def test_gives_the_results_of_the_cpu(self, number):
        assert checks(number).results() is None
