"""The work that every system of compare.py does: the same tokens, sizes and seeds for all.

A driver is a script beside this file. Called with the name of one workload, it does that one in its
process and prints JSON on its last line: {"values": [...]}, the seconds or bytes of each repetition
per unit of work, or {"cannot": "why"}. Times are thread CPU time, less that of two readings of the
clock. What a round needs fresh is made outside the timed region; so are prompts, in whatever form
the system takes its tokens in.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trace_ops import operations

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Size:
    num_blocks: int = 100_000
    batch: int = 256  # of a decode step
    rounds: int = 40
    trace: int = 100_000  # operations
    allocated: int = 65_536  # blocks, for each figure of the bare pool


SIZES = {"full": Size(), "small": Size(5_000, 8, 4, 600, 4_096)}
VOCABULARY = 32_000


class NotSeen(Exception):
    """A workload of this size is too small to say anything."""


class Driver:
    """What a system has to offer; `cannot` says of the workloads that it has no means for why.

    A handle is whatever the system calls a sequence. Methods that `cannot` excuses are not called.
    """

    cannot: dict[str, str] = {}  # noqa: RUF012

    def open(self, num_blocks: int, workload: str) -> None:
        """A new, empty manager of blocks of 16 tokens, for prompts of up to 4096."""
        raise NotImplementedError

    def prompt(self, tokens: np.ndarray) -> Any:
        """Token ids in the form that the system takes them in."""
        return tokens.tolist()

    def admit(self, prompt: Any) -> Any:
        """A handle of a new sequence: prefix looked up, blocks found or taken, contents known."""
        raise NotImplementedError

    def release(self, handle: Any) -> None:
        """Give the sequence up; its full blocks stay cached."""
        raise NotImplementedError

    def append(self, handle: Any, token: int) -> None:
        raise NotImplementedError

    def fork(self, handle: Any) -> Any:
        raise NotImplementedError

    def decode(self, handles: list[Any]) -> Callable[[], Any]:
        """A call that appends one token to each and reads every block table."""
        raise NotImplementedError

    def beam_step(self, handle: Any, beams: int) -> Callable[[], Any]:
        """A call: fork `beams` rows, append to each, all copy on write, give the rows up."""
        raise NotImplementedError

    def swap(self, handle: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Calls that move the sequence's blocks out and in again: bookkeeping, pairs to copy."""
        raise NotImplementedError

    def before_swap(self) -> None:
        """Not timed: drop what is left on the host, so that all blocks have to be copied again."""

    def pool(self, batch: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        """Calls that take `batch` blocks in one go, and give back what the first returned."""
        raise NotImplementedError


def tokens(n: int, seed: int) -> np.ndarray:
    """int64 [n]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, n)


def clock() -> float:
    """Seconds between two readings of the clock around nothing."""
    readings = []
    for _ in range(1000):
        begin = time.thread_time()
        readings.append(time.thread_time() - begin)
    return statistics.median(readings)


def timed(
    call: Callable[[Any], Any],
    rounds: int,
    setup: Callable[[], Any] = lambda: None,
    after: Callable[[Any], Any] = lambda result: None,
) -> list[float]:
    """Seconds of call(setup()) in each round; after(result) is not timed."""
    after(call(setup()))  # warms up
    gc.collect()
    gc.freeze()
    off, seconds = clock(), []
    for _ in range(rounds):
        argument = setup()
        begin = time.thread_time()
        result = call(argument)
        seconds.append(max(time.thread_time() - begin - off, 0.0))
        after(result)
    return seconds


def decode(driver: Driver, size: Size) -> list[float]:
    driver.open(size.num_blocks, "decode")
    prompts = [driver.prompt(tokens(1024 + i % BLOCK_SIZE, i)) for i in range(size.batch)]
    step = driver.decode([driver.admit(prompt) for prompt in prompts])
    return timed(lambda _: step(), 2 * size.rounds)


def admission(driver: Driver, size: Size, hit: int, full: bool = False) -> list[float]:
    """Admit 2048 tokens of which `hit` are cached; with `full`, into a pool of cached blocks."""
    driver.open(size.num_blocks, "evict" if full else "admit")
    shared, seeds = tokens(hit, 5), iter(range(10_000, 10_000_000))

    def fresh() -> Any:
        return driver.prompt(np.concatenate([shared, tokens(2048 - hit, next(seeds))]))

    for _ in range(size.num_blocks // 128 + 2 if full else 2):
        driver.release(driver.admit(fresh()))
    return timed(driver.admit, 2 * size.rounds, fresh, driver.release)


def beam(driver: Driver, size: Size) -> list[float]:
    driver.open(size.num_blocks, "beam")
    step = driver.beam_step(driver.admit(driver.prompt(tokens(2040, 3))), 8)
    return timed(lambda _: step(), 2 * size.rounds)


def swap(driver: Driver, size: Size, back: bool) -> list[float]:
    driver.open(size.num_blocks, "swap")
    out, into = driver.swap(driver.admit(driver.prompt(tokens(2048, 1))))
    prepare = driver.before_swap

    def swapped_out() -> None:
        prepare()
        out()

    if back:
        return timed(lambda _: into(), size.rounds, swapped_out)
    return timed(lambda _: out(), size.rounds, prepare, lambda _: into())


def pool(driver: Driver, size: Size, batch: int) -> list[float]:
    driver.open(size.num_blocks, "pool")
    take, give = driver.pool(batch)
    count = size.allocated // 16 // batch or 1

    def take_and_give(_: Any) -> None:
        for taken in [take() for _ in range(count)]:
            give(taken)

    return [s / (count * batch) for s in timed(take_and_give, size.rounds // 2)]


def trace(driver: Driver, size: Size) -> list[float]:
    """Seconds per operation of the trace, one by one as an unbatched caller would."""
    driver.open(size.num_blocks, "trace")
    prefixes, fresh = [tokens(1024, p) for p in range(256)], tokens(1 << 16, 999)
    ops: list[tuple[str, int, Any]] = []
    for k, (kind, sequence, argument) in enumerate(operations(size.trace)):
        if kind == "admit":
            prefix, length, more = argument  # type: ignore[misc]
            at = (k * 257) & 0x7FFF
            ids = np.concatenate([prefixes[prefix][:length], fresh[at : at + more]])
            ops.append((kind, sequence, driver.prompt(ids)))
        else:
            ops.append((kind, sequence, argument))
    live: dict[int, Any] = {}

    def replay(_: Any) -> None:
        for k, (kind, sequence, argument) in enumerate(ops):
            if kind == "append":
                driver.append(live[sequence], k % 1000)
            elif kind == "admit":
                live[sequence] = driver.admit(argument)
            elif kind == "fork":
                live[sequence] = driver.fork(live[argument])
            else:
                driver.release(live.pop(sequence))

    gc.collect()
    gc.freeze()
    begin = time.thread_time()
    replay(None)
    return [(time.thread_time() - begin) / len(ops)]


def resident(driver: Driver, size: Size) -> list[float]:
    """Bytes that the process grows by per block of a pool full of cached prompts of 2048."""

    def fill(count: int, seed: int) -> None:
        for i in range(count):
            driver.release(driver.admit(driver.prompt(tokens(2048, seed + i))))

    driver.open(256, "resident")
    fill(2, 0)  # imports, and what the first use allocates
    gc.collect()
    before = resident_bytes()
    driver.open(size.num_blocks, "resident")
    fill(size.num_blocks // 128, 100)
    gc.collect()
    grown = resident_bytes() - before
    if grown <= 0:
        raise NotSeen("the process did not grow: too few blocks")
    return [grown / size.num_blocks]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Workload:
    name: str
    unit: str
    run: Callable[[Driver, Size], list[float]]
    what: str


WORKLOADS = {
    "decode": Workload("decode step, 256 x 1k", "us", decode, "one token each, tables read"),
    "admit": Workload(
        "admit 2048, no hit", "us", lambda d, s: admission(d, s, 0), "looked up, taken, published"
    ),
    "hit": Workload(
        "admit 2048, hit 1536", "us", lambda d, s: admission(d, s, 1536), "of another's prefix"
    ),
    "evict": Workload(
        "admit 2048, evicting 128",
        "us",
        lambda d, s: admission(d, s, 0, full=True),
        "into a pool full of cached blocks",
    ),
    "beam": Workload("beam step, 8 x 2040", "us", beam, "fork 8, append, 8 copies, release"),
    "swap_out": Workload(
        "swap out, 128 blocks", "us", lambda d, s: swap(d, s, False), "bookkeeping alone"
    ),
    "swap_in": Workload(
        "swap in, 128 blocks", "us", lambda d, s: swap(d, s, True), "bookkeeping alone"
    ),
    "pool_1": Workload("block, batch 1", "ns", lambda d, s: pool(d, s, 1), "taken and given back"),
    "pool_16": Workload(
        "block, batch 16", "ns", lambda d, s: pool(d, s, 16), "taken and given back"
    ),
    "pool_256": Workload(
        "block, batch 256", "ns", lambda d, s: pool(d, s, 256), "taken and given back"
    ),
    "pool_4096": Workload(
        "block, batch 4096", "ns", lambda d, s: pool(d, s, 4096), "taken and given back"
    ),
    "trace": Workload("trace, per operation", "us", trace, "one sequence at a time"),
    "resident": Workload("bytes per cached block", "B", resident, "what the process grew by"),
}


def main(driver: Driver) -> None:
    """Do the workload that the command line names, and print what came of it as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--size", choices=list(SIZES), default="full")
    options = parser.parse_args()
    if (why := driver.cannot.get(options.workload)) is not None:
        print(json.dumps({"cannot": why}))
        return
    swallowed: list[str] = []
    sys.unraisablehook = lambda raised: swallowed.append(repr(raised.exc_value))
    try:
        values = WORKLOADS[options.workload].run(driver, SIZES[options.size])
    except NotSeen as why:
        print(json.dumps({"cannot": str(why)}))
        return
    if swallowed:  # what a destructor raised: the work is not done as it should be
        raise RuntimeError(f"{len(swallowed)} times in a destructor: {swallowed[0]}")
    print(json.dumps({"values": values}))
