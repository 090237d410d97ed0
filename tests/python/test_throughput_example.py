"""examples/throughput.py, with a transformers that gives up."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.generation.continuous_batching import ContinuousBatchingManager

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import throughput
from engine import Request

FAILED = SimpleNamespace(request_id="a", error="no room", is_finished=lambda: True)


@pytest.mark.parametrize(
    ("is_running", "results", "says"),
    [(False, [None], "ended before its requests"), (True, [None, FAILED], "no room")],
    ids=["it ended", "a request failed"],
)
def test_what_transformers_does_not_end_is_an_error(
    is_running: bool, results: list[Any], says: str
) -> None:
    manager = create_autospec(ContinuousBatchingManager, instance=True)
    manager.is_running.return_value = is_running
    manager.get_result.side_effect = results
    network = MagicMock()
    network.continuous_batching_context_manager.return_value.__enter__.return_value = manager
    network.continuous_batching_context_manager.return_value.__exit__.return_value = False
    with pytest.raises(RuntimeError, match=says):
        throughput.continuous_batching(network, [Request([1, 2], 3)])
