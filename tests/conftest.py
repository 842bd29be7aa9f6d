from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from paa_gpu import data

# The first example of a property compiles. `make test` takes the same examples every time, `make fuzz` others, and many more.
settings.register_profile(
    "suite", max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("fuzz", settings.get_profile("suite"), max_examples=1200, derandomize=False, print_blob=True)
settings.load_profile("suite")


#: They run in processes of `python -m fakecuda`.
collect_ignore = [] if "FAKECUDA_DEVICES" in os.environ else ["fakecuda/tests"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--execution",
        default="cpu",
        help="what the operators run for CPU tensors in the whole run: cpu (default, numba); interpreter (with TRITON_INTERPRET=1); "
        "a compute capability such as 90, for the kernels as compiled; or cuda, for a GPU",
    )
    parser.addoption("--ptxrun", default="", help="settings of ptxrun for kernels as compiled: weak=1,seed=5")


def pytest_configure(config: pytest.Config) -> None:
    if text := config.getoption("--ptxrun"):
        import ptxrun
        from kernel_execution import SETTINGS

        SETTINGS.update(ptxrun.settings(text))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")


@pytest.fixture(scope="session", autouse=True)
def suite_execution(request: pytest.FixtureRequest) -> Iterator[None]:
    execution = request.config.getoption("--execution")
    if execution == "cpu":
        yield
        return
    from kernel_execution import execute  # Triton, where it is needed

    with execute(execution):
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of kernels run in all ways of this pytest run (see `kernel_execution`)."""
    if "execution" in metafunc.fixturenames:
        from kernel_execution import EXECUTIONS  # Triton, where it is needed

        metafunc.parametrize("execution", EXECUTIONS)


@pytest.fixture
def session(execution: str | int) -> Iterator[Any]:
    """The operators run their kernels: what `kernel_execution.execute` gives."""
    from kernel_execution import execute

    with execute(execution) as session:
        yield session


def recording_paths() -> list:
    return data.paths()


@pytest.fixture(params=recording_paths(), ids=lambda path: path.stem)
def recording(request: pytest.FixtureRequest) -> data.Recording:
    return data.load(request.param)


@pytest.fixture(autouse=True)
def global_seed(request: pytest.FixtureRequest) -> None:
    """torch's own random numbers (`torch.rand`, fresh modules): seeded with the test's name, so that a run repeats the last one."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread. Two workers of pytest with two threads each would wait for one another on two cores."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that a test draws alone: seeded with its name."""
    return np.random.default_rng(list(request.node.name.encode()))
