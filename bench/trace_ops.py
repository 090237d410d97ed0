"""A seeded trace of single operations: 92 % appends, 3 % admissions, 1 % forks, 4 % releases."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pagedkv import BlockManager


class Operation(NamedTuple):
    kind: str
    sequence: int
    argument: tuple[int, int, int] | int | None  # of an admission: prefix, its length, fresh tokens


def operations(n: int, seed: int = 1) -> Iterator[Operation]:
    """Admissions draw one of 256 prefixes by a Zipf law; at most 512 sequences live at once."""
    rng, live, count, next_id = random.Random(seed), [], 0, 0
    weights = [1 / (rank + 1) for rank in range(256)]
    while count < n:
        x = rng.random()
        if not live or (x < 0.03 and len(live) < 512):
            prefix = rng.choices(range(256), weights=weights)[0]
            length = 16 * (4 + prefix % 61)
            yield Operation("admit", next_id, (prefix, length, rng.randrange(1, 256)))
        elif x < 0.04 and len(live) < 512:
            yield Operation("fork", next_id, rng.choice(live))
        elif x < 0.08:
            i = rng.randrange(len(live))
            live[i], live[-1] = live[-1], live[i]
            yield Operation("release", live.pop(), None)
            count += 1
            continue
        else:
            yield Operation("append", rng.choice(live), None)
            count += 1
            continue
        live.append(next_id)
        next_id += 1
        count += 1


class Replay:
    """Runs operations on a manager, one append and commit each, as an unbatched caller would."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.ids: dict[int, np.ndarray] = {}
        self.prefixes = [
            np.random.default_rng(p).integers(0, 32_000, 1024, np.int32) for p in range(256)
        ]
        self.fresh = np.random.default_rng(999).integers(0, 32_000, 1 << 16, np.int32)
        self.tokens = [np.array([t], np.int32) for t in range(1000)]

    def run(self, ops: list[Operation]) -> None:
        m, ids, new = self.manager, self.ids, self.tokens
        for k, (kind, sequence, argument) in enumerate(ops):
            if kind == "append":
                m.commit(m.append(ids[sequence], new[k % 1000]))
            elif kind == "admit":
                prefix, length, fresh = argument
                at = (k * 257) & 0x7FFF
                prompt = np.concatenate(
                    (self.prefixes[prefix][:length], self.fresh[at : at + fresh])
                )
                id = m.create(prompt)
                rest = prompt[m.num_cached(id) :]
                ids[sequence] = np.array([id])
                m.commit(m.append(ids[sequence], rest, counts=np.array([len(rest)])))
            elif kind == "fork":
                ids[sequence] = m.fork(int(ids[argument][0]), 2)[1:]
            else:
                m.release(ids.pop(sequence))
