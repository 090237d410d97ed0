"""BlockManager through its Python API: what the control plane costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv import BlockManager

Measure = Callable[..., Any]
BLOCK_SIZE = 16


def tokens(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 32_000, n)


def admit(m: BlockManager, prompt: np.ndarray) -> int:
    """create + append + commit of one prompt, its outputs read."""
    sequence = m.create(prompt)
    rest = prompt[m.num_cached(sequence) :]
    read(m, m.append(np.array([sequence]), rest, np.array([len(rest)])))
    return sequence


def read(m: BlockManager, plan: Any) -> None:
    """What an engine takes from a plan; then the step is closed."""
    _ = plan.input_ids, plan.slots, plan.positions, plan.query_starts, plan.seq_lens
    _ = plan.block_tables, plan.copies
    m.commit(plan)


def batch(m: BlockManager, size: int, length: int) -> np.ndarray:
    return np.array([admit(m, tokens(length + i % BLOCK_SIZE, i)) for i in range(size)])


def iter_forever(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items


def test_clock(measure: Measure) -> None:
    measure("clock", lambda: None, setup=lambda: None, rounds=2000)


def test_empty_call(measure: Measure) -> None:
    m = BlockManager(10)
    sequence = m.create()
    measure("empty call", lambda: m.length(sequence), iterations=1000)


def test_array(measure: Measure) -> None:
    measure("np.array([id])", lambda: np.array([7]), iterations=1000)


def test_one_step(measure: Measure) -> None:
    """append + commit of one token, no output read: what any step costs."""
    m = BlockManager(100_000, max_model_len=140_000)
    ids, new = np.array([admit(m, tokens(40, 1))]), tokens(1, 2)
    measure("one sequence, one step", lambda: m.commit(m.append(ids, new)), iterations=256)


def test_list_of_blocks(measure: Measure, num_blocks: int) -> None:
    """The floor of a pool in Python: a list of ints, 256 taken off its end and put back."""
    free = list(range(num_blocks))

    def whole_life() -> None:
        taken = free[-256:]
        del free[-256:]
        free.extend(taken)

    measure("block, a list of ints", whole_life, iterations=64, per=256)


@pytest.mark.parametrize(("name", "size"), [("100k", 100_000), ("1M", 1_000_000)])
def test_scattered_path(measure: Measure, full: bool, name: str, size: int) -> None:
    """Walks a path whose nodes lie all over the pool: what a read of memory costs that waits."""
    size = size if full else 300
    m = BlockManager(size, max_batch=1, max_model_len=16 * size)
    one = np.array([1])
    ids = [m.create() for _ in range(size)]
    for id in ids:
        m.commit(m.append(np.array([id]), None, one))
    m.release(np.array(ids)[np.random.default_rng(1).permutation(size)])
    path = m.create()
    m.commit(m.append(np.array([path]), counts=np.array([size * 8])))
    measure(
        f"node of a scattered path, {name} blocks",
        lambda: m.block_table(path),
        rounds=5,
        per=size // 2,
    )


def test_decode(measure: Measure, num_blocks: int, full: bool) -> None:
    m = BlockManager(num_blocks, max_model_len=4096)
    ids = batch(m, 256 if full else 16, 2000)
    new = tokens(len(ids), 1)
    measure("decode step, 256 x 2k", lambda: read(m, m.append(ids, new)), iterations=16)
    m.verify()


def test_decode_churn(measure: Measure, num_blocks: int, full: bool) -> None:
    m = BlockManager(num_blocks, max_model_len=4096)
    ids = batch(m, 256 if full else 16, 2000)
    new, at, seed = tokens(len(ids), 1), [0], [10_000]

    def replace() -> None:  # one leaves and one enters in the middle; only the step is timed
        at[0] = (at[0] + 37) % len(ids)
        m.release(ids[at[0] : at[0] + 1])
        seed[0] += 1
        ids[at[0]] = admit(m, tokens(2000, seed[0]))

    call = lambda: read(m, m.append(ids, new))  # noqa: E731
    measure("decode step, one in, one out", call, setup=replace, rounds=200)
    m.verify()


def test_counts_only(measure: Measure, num_blocks: int) -> None:
    m = BlockManager(num_blocks)
    counts = np.array([256 * BLOCK_SIZE])

    def whole_life() -> None:
        ids = np.array([m.create()])
        read(m, m.append(ids, None, counts))
        m.release(ids)

    measure("block, taken by counts and released", whole_life, iterations=16, per=256)


def test_metadata(full: bool, measure: Measure, benchmark: Any) -> None:
    m = BlockManager(100_000 if full else 1_000)
    stats = m.stats()
    benchmark.extra_info["value"] = stats.metadata_bytes / stats.device.num_blocks
    measure("metadata bytes per block", m.stats)
    assert stats.metadata_bytes / stats.device.num_blocks < 170


def test_resident(full: bool, measure: Measure, benchmark: Any) -> None:
    size = 1_000_000 if full else 100_000
    command = [sys.executable, str(Path(__file__).parent / "resident.py"), str(size)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    benchmark.extra_info["value"] = float(run.stdout)
    measure("resident bytes per cached block", lambda: None)
    assert 100 < float(run.stdout) < 250
