"""Prefixes: admission with and without a hit, lookup, and eviction of what is cached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagedkv import BlockManager
from test_manager import admit, batch, iter_forever, tokens

Measure = Callable[..., Any]


@pytest.mark.parametrize(("name", "hit"), [("no hit", 0), ("hit 1536", 1536)])
def test_admission(measure: Measure, num_blocks: int, name: str, hit: int) -> None:
    m = BlockManager(num_blocks, max_model_len=4096)
    shared, seed, admitted = tokens(1536, 5), [100], [admit(m, tokens(2048, 6))]
    admit(m, np.concatenate([shared, tokens(512, 7)]))

    def fresh() -> tuple[tuple[np.ndarray], dict[str, Any]]:
        m.release(np.array(admitted))
        admitted.clear()
        seed[0] += 1
        return (np.concatenate([shared[:hit], tokens(2048 - hit, seed[0])]),), {}

    measure(f"admit 2048, {name}", lambda p: admitted.append(admit(m, p)), setup=fresh, rounds=300)
    m.verify()


@pytest.mark.parametrize(("name", "size"), [("10k", 10_000), ("100k", 100_000), ("1M", 1_000_000)])
def test_eviction(measure: Measure, full: bool, name: str, size: int) -> None:
    size = size if full else 300
    m = BlockManager(size, max_model_len=4096)
    seed, admitted = [0], []

    def fresh() -> tuple[tuple[np.ndarray], dict[str, Any]]:
        if admitted:
            m.release(np.array(admitted))
            admitted.clear()
        seed[0] += 1
        return (tokens(2048, seed[0]),), {}

    while m.stats().device.num_free >= 128:
        admitted.append(admit(m, fresh()[0][0]))
    measure(
        f"admit 2048 into {name} cached", lambda p: admitted.append(admit(m, p)), fresh, rounds=300
    )
    assert m.stats().num_evicted_blocks > 0
    m.verify()


@pytest.mark.parametrize("depth", [500, 4000])
def test_eviction_of_a_branching_trunk(measure: Measure, full: bool, depth: int) -> None:
    """Tree search: a path that grew a leaf at every depth, all given up, evicted one by one."""
    name = f"evict one of a trunk, a leaf at {depth} depths"
    depth = depth if full else depth // 100
    m = BlockManager(2 * depth + 1, block_size=1, max_model_len=2 * depth)
    trunk = m.create([])
    m.commit(m.append([trunk], tokens(depth, 1), counts=[depth]))
    for at in range(depth, 0, -1):
        leaf = m.fork(trunk, 2)[1:]
        m.truncate(leaf, [at])
        m.commit(m.append(leaf, [50_000 + at]))
        m.truncate(leaf, [at])
        m.release(leaf)
    m.truncate([trunk], [0])
    last, more = np.array([m.create([], salt="other")]), np.array([1])
    m.commit(m.append(last, more))
    measure(name, lambda: m.commit(m.append(last, more)), rounds=depth // 2, iterations=2)
    assert m.stats().num_evicted_blocks > 0
    m.verify()


def test_lookup_miss(measure: Measure, num_blocks: int) -> None:
    m = BlockManager(num_blocks, max_model_len=4096)
    ids = batch(m, num_blocks * 3 // 4 // 128, 2030)
    m.release(ids)
    prompts = iter_forever([tokens(2048, 9_000 + i).astype(np.int32) for i in range(256)])
    measure("lookup, miss", lambda: m.lookup(next(prompts)), iterations=256)
