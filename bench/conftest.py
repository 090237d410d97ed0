"""Benchmarks. By default each runs once at a small size, as a test; `--full` measures.

    pytest bench --full --benchmark-enable --benchmark-json=bench.json
    python bench/report.py bench.json

Times are thread CPU time. Every figure is measured three times; the report takes the least of the
three medians. Rounds that need a fresh state have it made outside the timed region; each timed
region then holds one call, so that the row "clock" (two readings of the clock around nothing) is
part of it, and the report takes it off.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))

from bars import BARS

# A row that is renamed in one place only would silently leave the report.
ROWS = {bar.row for bar in BARS}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="measure at full size")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" in metafunc.fixturenames:
        metafunc.parametrize("run", range(3 if metafunc.config.getoption("--full") else 1))


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture
def num_blocks(full: bool) -> int:
    return 100_000 if full else 4_000


@pytest.fixture
def measure(benchmark: Any, full: bool, run: int) -> Callable[..., Any]:
    """measure(name, call, setup=None, rounds=..., iterations=..., per=1): one row of the report.

    `setup` runs before every round and may return (args, kwargs) of the call; without it a round
    is `iterations` calls. `per` divides the time, for figures per block or per operation.
    """

    def measure(
        name: str,
        call: Callable[..., Any],
        setup: Callable[[], Any] | None = None,
        rounds: int = 40,
        iterations: int = 1,
        per: int = 1,
    ) -> Any:
        assert name in ROWS, f"bars.py does not know {name!r}"
        benchmark.extra_info.update(
            row=name, run=run, per=per * (1 if setup else iterations), clock=int(setup is not None)
        )
        benchmark._timer = time.thread_time
        gc.collect()
        gc.freeze()
        if not full:
            rounds, iterations = 2, min(iterations, 4)
        if setup is not None:
            return benchmark.pedantic(call, setup=setup, rounds=rounds)

        def repeat() -> Any:
            for _ in range(iterations):
                result = call()
            return result

        return benchmark.pedantic(repeat, rounds=rounds)

    return measure
