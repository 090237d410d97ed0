"""Forks, beams and copy-on-write: what rows that share blocks cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagedkv import BlockManager
from test_manager import admit, iter_forever, read, tokens

Measure = Callable[..., Any]


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
