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
    read(m, m.append(np.array([sequence]), rest, counts=np.array([len(rest)])))
    return sequence


def read(m: BlockManager, plan: Any) -> None:
    """What an engine takes from a plan; then the step is closed."""
    _ = plan.input_ids, plan.slots, plan.positions, plan.query_starts, plan.seq_lens
    _ = plan.block_tables, plan.copies
    m.commit(plan)


@pytest.fixture
def num_blocks(full: bool) -> int:
    return 100_000 if full else 4_000


def batch(m: BlockManager, size: int, length: int) -> np.ndarray:
    return np.array([admit(m, tokens(length + i % BLOCK_SIZE, i)) for i in range(size)])


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
        m.commit(m.append(np.array([id]), counts=one))
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


LENGTHS = pytest.mark.parametrize(("name", "length"), [("2k", 2040), ("128k", 131_000)])


@LENGTHS
def test_beam(
    measure: Measure, num_blocks: int, full: bool, name: str, length: int, benchmark: Any
) -> None:
    """Beams that diverged over 128 tokens; each shares its last block with a twin, so all copy."""
    m = BlockManager(num_blocks, max_model_len=140_000)
    length = length if full else 200
    beams = m.fork(admit(m, tokens(length - 128, 3)), 8)
    chunk, new, counts = tokens(8 * 128, 5), tokens(8, 4), np.full(8, 128)
    parents = iter_forever([np.random.default_rng(i).integers(0, 8, 8) for i in range(64)])
    twins: list[np.ndarray] = []

    def diverge() -> None:
        for ids in twins:
            m.release(ids)
        m.truncate(beams, np.full(8, length - 128))
        m.reorder(beams, np.zeros(8, np.int64))
        m.commit(m.append(beams, chunk, counts=counts))
        twins[:] = [m.fork(int(beam), 2)[1:] for beam in beams]

    def step() -> None:
        m.reorder(beams, next(parents))
        read(m, m.append(beams, new))

    diverge()
    copied = m.stats().num_copies
    step()
    benchmark.extra_info["copies"] = m.stats().num_copies - copied
    measure(f"beam step, 8 x {name}", step, setup=diverge, rounds=200)
    m.verify()


@LENGTHS
def test_beam_search(measure: Measure, num_blocks: int, full: bool, name: str, length: int) -> None:
    """One step after the other, as a search makes them: beams soon descend from a few."""
    m = BlockManager(num_blocks, max_model_len=140_000)
    beams = m.fork(admit(m, tokens(length if full else 200, 3)), 8)
    new = tokens(8, 4)
    parents = iter_forever([np.random.default_rng(i).integers(0, 8, 8) for i in range(64)])

    def step() -> None:
        m.reorder(beams, next(parents))
        read(m, m.append(beams, new))

    measure(f"beam search, a step of 8 x {name}", step, iterations=64)
    m.verify()


def iter_forever(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items


def test_fork(measure: Measure, num_blocks: int, full: bool) -> None:
    m = BlockManager(num_blocks, max_model_len=140_000)
    sequence = admit(m, tokens(131_000 if full else 500, 3))
    children: list[np.ndarray] = []

    def give_back() -> None:
        while children:
            m.release(children.pop()[1:])

    call = lambda: children.append(m.fork(sequence, 2))  # noqa: E731
    measure("fork(id, 2) at 128k", call, setup=give_back, rounds=400)


def test_first_step_of_forks(measure: Measure, num_blocks: int, full: bool) -> None:
    m = BlockManager(num_blocks, max_model_len=140_000)
    sequence = admit(m, tokens(131_000 if full else 500, 3))
    new, beams = tokens(8, 4), [m.fork(sequence, 8)]
    m.commit(m.append(beams[0], new))

    def fork_again() -> None:
        m.release(beams[0][1:])
        beams[0] = m.fork(sequence, 8)

    call = lambda: read(m, m.append(beams[0], new))  # noqa: E731
    measure("first step of 8 forks at 128k", call, setup=fork_again, rounds=200)


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


def test_counts_only(measure: Measure, num_blocks: int) -> None:
    m = BlockManager(num_blocks)
    counts = np.array([256 * BLOCK_SIZE])

    def whole_life() -> None:
        ids = np.array([m.create()])
        read(m, m.append(ids, counts=counts))
        m.release(ids)

    measure("block, taken by counts and released", whole_life, iterations=16, per=256)


def test_lookup_miss(measure: Measure, num_blocks: int) -> None:
    m = BlockManager(num_blocks, max_model_len=4096)
    ids = batch(m, num_blocks * 3 // 4 // 128, 2030)
    m.release(ids)
    prompts = iter_forever([tokens(2048, 9_000 + i).astype(np.int32) for i in range(256)])
    measure("lookup, miss", lambda: m.lookup(next(prompts)), iterations=256)


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
