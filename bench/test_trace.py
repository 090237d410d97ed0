"""A long mixed trace, one operation at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagedkv import BlockManager
from trace_ops import Operation, Replay, operations


def test_trace(measure: Callable[..., Any], full: bool) -> None:
    n = 1_000_000 if full else 3_000
    ops: list[Operation] = list(operations(n))
    replays: list[Replay] = []

    def fresh() -> tuple[tuple[Replay], dict[str, Any]]:
        replays.append(Replay(BlockManager(100_000, max_model_len=16_384)))
        return (replays[-1],), {}

    measure("trace, per operation", lambda r: r.run(ops), setup=fresh, rounds=1, per=n)
    replays[-1].manager.verify()
    assert replays[-1].manager.stats().num_hit_tokens > 0
