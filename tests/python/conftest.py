"""How long the random tests run: `--runs=N` programs each, and hypothesis' profiles."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# What fails prints the seed, or the blob that @reproduce_failure takes.
for name, size in (("dev", 40), ("ci", 400)):
    settings.register_profile(
        name,
        max_examples=size,
        stateful_step_count=40,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile("dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--runs", type=int, default=60, help="random programs that each such test runs"
    )
    parser.addoption("--first-seed", type=int, default=0, help="of the random programs")


@pytest.fixture
def runs(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--runs"))


@pytest.fixture
def first_seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--first-seed"))
