"""How long the random tests run: `--runs=N` programs each. What fails prints how to repeat it."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

# The models here are tiny: more threads gain nothing, and cost tenfold where the cores are shared,
# as they wait for each other spinning. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from bad import Here
from pagedkv.info import collect


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runs", type=int, default=60, help="random programs in each such test")
    parser.addoption("--first-seed", type=int, default=0, help="of these programs")


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile(
        "runs",
        max_examples=config.getoption("--runs"),
        stateful_step_count=50,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("runs")


def has_gpu() -> bool:
    if find_spec("torch") is None or not collect().cuda.devices:
        return False
    return bool(import_module("torch").cuda.is_available())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_gpu():
        return
    skip = pytest.mark.skip(reason="no CUDA device, or built without _cuda")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture
def runs(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--runs"))


@pytest.fixture
def first_seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--first-seed"))


@pytest.fixture
def here() -> Here:
    return Here()
