"""Short words for the tests of BlockManager: small pools, one sequence at a time."""

from __future__ import annotations

from typing import Any

import pagedkv as pk


def admit(m: pk.BlockManager, tokens: list[int], salt: bytes = b"") -> int:
    """A new sequence with all of `tokens`, committed."""
    i = m.create(tokens, salt=salt)
    rest = tokens[m.num_cached(i) :]
    m.commit(m.append([i], rest, counts=[len(rest)]))
    return i


def late(m: pk.BlockManager, n: int) -> int:
    """A new sequence of n tokens that are not known yet."""
    i = m.create([])
    m.commit(m.append([i], counts=[n]))
    return i


def table(m: pk.BlockManager, i: int) -> list[int]:
    m.verify()
    return list(m.block_table(i).tolist())


def hit(m: pk.BlockManager, tokens: list[int], salt: bytes | str | None = None) -> int:
    """How many of these tokens a prompt of them and one more would find."""
    m.verify()
    return int(m.lookup([*tokens, 0], salt=salt).num_tokens)


def state(m: pk.BlockManager) -> tuple[Any, ...]:
    """All that can be seen of a manager but its totals."""
    snapshot, stats = m.snapshot(), m.stats()
    names = ("parents", "blocks", "num_tokens", "counts", "published")
    rows = ("sequence_ids", "sequence_nodes", "sequence_lengths")
    arrays = [getattr(snapshot, name).tolist() for name in names + rows]
    tables = [table(m, int(i)) for i in snapshot.sequence_ids]
    return stats.device, stats.num_sequences, stats.num_logical_blocks, arrays, tables


def two_tiers(device: int = 12, host: int = 12, block_size: int = 2) -> pk.BlockManager:
    return pk.BlockManager(device, host, block_size=block_size, max_batch=8)


def grow(m: pk.BlockManager, ids: list[int], token: int = 50) -> Any:
    """One more token for each, committed; the plan as a value."""
    plan = m.append(ids, [token] * len(ids))
    value = plan.copy()
    m.commit(plan)
    return value


def on_host(m: pk.BlockManager, ids: list[int]) -> None:
    m.complete(m.swap_out(ids))


def flush(m: pk.BlockManager) -> None:
    """Evict all that is cached on the device."""
    room = m.stats().device.num_free + m.stats().device.num_cached
    filler = m.create()
    m.commit(m.append([filler], counts=[room * m.block_size]))
    m.release([filler])
