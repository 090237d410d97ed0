"""The rules of the block tree, one test each, and defects that managers like this one have had."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pagedkv as pk
import pytest


def admit(m: pk.BlockManager, tokens: list[int], salt: bytes = b"") -> int:
    """A new sequence with all of `tokens`, committed."""
    i = m.create(tokens, salt=salt)
    rest = tokens[m.num_cached(i) :]
    m.commit(m.append([i], rest, counts=[len(rest)]))
    return i


def table(m: pk.BlockManager, i: int) -> list[int]:
    m.verify()
    return list(m.block_table(i).tolist())


def cached(m: pk.BlockManager) -> int:
    m.verify()
    return int(m.stats().device.num_cached)


def hit(m: pk.BlockManager, tokens: list[int], salt: bytes = b"") -> int:
    """Tokens that a prompt of `tokens` and one more would find."""
    return int(m.lookup([*tokens, 0], salt=salt).num_tokens)


def state(m: pk.BlockManager) -> tuple[Any, ...]:
    """All that can be seen of a manager, its counts of work done apart."""
    snapshot, stats = m.snapshot(), m.stats()
    names = ("parents", "blocks", "num_tokens", "counts", "published")
    rows = ("sequence_ids", "sequence_nodes", "sequence_lengths")
    arrays = [getattr(snapshot, name).tolist() for name in names + rows]
    tables = [m.block_table(int(i)).tolist() for i in snapshot.sequence_ids]
    return stats.device, stats.num_logical_blocks, stats.num_steps, arrays, tables


# ---------------------------------------------------------------------- the rules


def test_rule_01_only_the_last_holder_at_the_end_writes_in_place() -> None:
    """Sharers of an open block copy it in batch order; the last one left keeps it."""
    m = pk.BlockManager(16, block_size=4)
    ids = m.fork(admit(m, [1, 2]), 3)
    [block] = table(m, ids[0])
    plan = m.append(ids, [7, 8, 9])
    assert plan.copies[:, 0].tolist() == [block, block]
    assert plan.slots[2] == block * 4 + 2
    m.commit(plan)
    assert len({table(m, i)[0] for i in ids}) == 3
    assert table(m, ids[2]) == [block]


def test_rule_01_a_truncated_holder_writes_in_place_only_if_it_was_alone() -> None:
    """Below the fill, another holder still reads what a write would destroy."""
    m = pk.BlockManager(16, block_size=4)
    a = admit(m, [1, 2, 3])
    m.truncate([a], [1])
    assert m.append([a], [5]).num_copies == 0
    m.rollback(m.append([a]) if False else _open_plan(m))
