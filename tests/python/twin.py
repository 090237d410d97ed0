"""The real manager and the naive one side by side, and a pool of slots that only plans write.

Each command runs on both. Then every length, hit, count, table and error is compared, and the
content of every slot that a live sequence can read is what its tokens say it must be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from naive import NaiveManager, NaivePlan
from naive_tree import Node
from pagedkv._core import BlockManager
from pagedkv.errors import KVError, OutOfBlocks

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    num_blocks: int
    block_size: int
    max_batch: int = 8
    max_model_len: int = 64
    watermark: int = 0


@dataclass
class Told:
    """What the caller knows of a sequence: its true tokens, and what its slots must hold."""

    real: int  # its id in the real manager
    root: int  # what its first digest starts from: differs where nothing may be shared
    tokens: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)

    def like(self, real: int) -> Told:
        return Told(real, self.root, list(self.tokens), list(self.digests))

    def grow(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            self.digests.append(hash((self.digests[-1] if self.digests else self.root, token)))

    def cut(self, length: int) -> None:
        del self.tokens[length:], self.digests[length:]


def outcome(call: Callable[[], T]) -> tuple[T | None, tuple[Any, ...] | None]:
    """A value, or what is to be compared of an error."""
    try:
        return call(), None
    except OutOfBlocks as e:
        return None, (type(e), e.tier, e.needed, e.available)
    except KVError as e:
        return None, (type(e),)


class Twin:
    """Commands name sequences by the naive manager's ids, and return None or False on an error."""

    def __init__(self, config: Config) -> None:
        c = self.config = config
        self.naive = NaiveManager(
            c.num_blocks, c.block_size, c.max_batch, c.max_model_len, c.watermark
        )
        self.real = BlockManager(
            c.num_blocks,
            block_size=c.block_size,
            max_batch=c.max_batch,
            max_model_len=c.max_model_len,
            watermark=c.watermark,
        )
        self.told: dict[int, Told] = {}
        self.pool: dict[int, int] = {}  # slot -> digest
        self.block: dict[Node, int] = {}
        width = -(-c.max_model_len // c.block_size)
        self.uploaded = np.zeros((c.max_batch, width), np.int32)
        self.plan: Any = None
        self.before: dict[int, Told] = {}  # of the open step's rows
        self.unwritten: set[int] = set()  # its rows, if its plan has not been carried out

    def reals(self, ids: Sequence[int]) -> np.ndarray:
        return np.array([self.told[i].real for i in ids], np.int64)

    def both(self, naive: Callable[[], Any], real: Callable[[], Any]) -> tuple[Any, Any] | None:
        """One command on both. None: an error, the same one, and nothing may have changed."""
        stats = without_bytes(self.real.stats())
        want, expected = outcome(naive)
        got, error = outcome(real)
        assert error == expected, f"error {error}, expected {expected}"
        if error is None:
            return want, got
        assert without_bytes(self.real.stats()) == stats
        self.check()
        return None

    # ------------------------------------------------------------------ sequences

    def create(self, tokens: Sequence[int] | None, salt: bytes = b"") -> int | None:
        given = None if tokens is None else np.array(tokens, np.int32)
        name = None if tokens is None else salt
        made = self.both(
            lambda: self.naive.create(tokens, salt), lambda: self.real.create(given, salt=name)
        )
        if made is None:
            return None
        sequence, real = made
        root = hash(("nobody else's", sequence)) if tokens is None else hash(salt)
        told = self.told[sequence] = Told(real, root)
        told.grow((tokens or [])[: self.naive.rows[sequence].length])
        self.check()
        return int(sequence)

    def lookup(self, tokens: Sequence[int], salt: bytes = b"") -> int:
        full, run = self.naive.lookup(tokens, salt)
        hit = self.real.lookup(np.array(tokens, np.int64), salt=salt)
        assert (hit.num_full_blocks, hit.num_partial_tokens) == (full, run)
        assert hit.num_tokens == full * self.config.block_size + run
        return int(hit.num_tokens)

    def fork(self, sequence: int, n: int) -> list[int]:
        source = self.told[sequence]
        made = self.both(
            lambda: self.naive.fork(sequence, n), lambda: self.real.fork(source.real, n)
        )
        if made is None:
            return []
        ids, reals = made
        assert reals[0] == source.real
        for i, real in zip(ids[1:], reals[1:].tolist(), strict=True):
            self.told[i] = source.like(real)
        self.check()
        return list(ids)

    def reorder(self, ids: Sequence[int], parents: Sequence[int]) -> None:
        done = self.both(
            lambda: self.naive.reorder(ids, parents),
            lambda: self.real.reorder(self.reals(ids), np.array(parents, np.int32)),
        )
        if done is not None:
            new = [
                self.told[ids[p]].like(self.told[i].real) for i, p in zip(ids, parents, strict=True)
            ]
            self.told.update(zip(ids, new, strict=True))
            self.check()

    def truncate(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        done = self.both(
            lambda: self.naive.truncate(ids, lengths),
            lambda: self.real.truncate(self.reals(ids), np.array(lengths, np.int64)),
        )
        if done is not None:
            for i, length in zip(ids, lengths, strict=True):
                self.told[i].cut(length)
            self.check()

    def release(self, ids: Sequence[int]) -> None:
        if self.both(lambda: self.naive.release(ids), lambda: self.real.release(self.reals(ids))):
            for i in ids:
                del self.told[i]
            self.check()

    def clear(self, salt: bytes | None) -> None:
        if self.both(lambda: self.naive.clear(salt), lambda: self.real.clear(salt)):
            self.check()

    def ask(self, ids: Sequence[int], counts: Sequence[int] | None) -> None:
        reals = self.reals(ids)
        assert self.real.num_freed(reals) == self.naive.num_freed(ids)
        if self.plan is None:
            given = None if counts is None else np.array(counts, np.int64)
            self.both(
                lambda: self.naive.num_needed(ids, counts),
                lambda: self.real.num_needed(reals, given),
            )
        self.check()

    # ------------------------------------------------------------------ steps

    def append(
        self,
        ids: Sequence[int],
        tokens: Sequence[int],
        counts: Sequence[int] | None,
        *,
        known: bool,
        run: bool = True,
    ) -> bool:
        """Open a step. `known`: tell the tokens now; `run`: let the pool carry out the plan."""
        given = list(tokens) if known else None
        done = self.both(
            lambda: self.naive.append(ids, given, counts),
            lambda: self.real.append(
                self.reals(ids),
                None if given is None else np.array(given, np.int32),
                counts=None if counts is None else np.array(counts, np.int32),
            ),
        )
        if done is None:
            return False
        want, self.plan = done
        self.before = {i: self.told[i].like(self.told[i].real) for i in ids}
        rest = iter(tokens)
        for i, count in zip(ids, [1] * len(ids) if counts is None else counts, strict=True):
            self.told[i].grow([next(rest) for _ in range(count)])
        self.check_plan(ids, given, want, self.plan)
        if run:
            self.carry_out(ids, self.plan)
        self.unwritten = set() if run else set(ids)
        self.check()
        return True

    def carry_out(self, ids: Sequence[int], plan: Any) -> None:
        size, before = self.config.block_size, dict(self.pool)
        for source, target, num in plan.copies.tolist():
            for o in range(num):
                self.pool[target * size + o] = before.get(source * size + o, 0)
        starts = plan.query_starts.tolist()
        slots, positions = plan.slots.tolist(), plan.positions.tolist()
        for row, i in enumerate(ids):
            for t in range(starts[row], starts[row + 1]):
                self.pool[slots[t]] = self.told[i].digests[positions[t]]

    def commit(self, lengths: Sequence[int] | None = None) -> None:
        given = None if lengths is None else np.array(lengths, np.int32)
        self.naive.commit(lengths)
        self.real.commit(self.plan, given)
        for i, length in zip(self.before, lengths or [], strict=False):
            self.told[i].cut(length)
        self.plan = None
        self.check()

    def rollback(self) -> None:
        self.naive.rollback()
        self.real.rollback(self.plan)
        self.told.update(self.before)
        self.plan = None
        self.unwritten = set()
        self.check()

    def record(self, ids: Sequence[int], tokens: Sequence[int], counts: Sequence[int]) -> bool:
        """Tell tokens; False if both say that they contradict what was told before."""
        done = self.both(
            lambda: self.naive.record(ids, tokens, counts),
            lambda: self.real.record(
                self.reals(ids), np.array(tokens, np.int64), counts=np.array(counts, np.int64)
            ),
        )
        self.check()
        return done is not None

    # ------------------------------------------------------------------ comparing

    def check_plan(
        self, ids: Sequence[int], tokens: list[int] | None, want: NaivePlan, plan: Any
    ) -> None:
        size = self.config.block_size
        assert plan.positions.tolist() == want.positions
        assert plan.seq_lens.tolist() == want.seq_lens
        assert plan.query_starts.tolist() == want.query_starts
        assert (None if tokens is None else plan.input_ids.tolist()) == tokens
        assert (plan.batch_size, plan.num_tokens) == (len(ids), len(want.positions))
        tables = plan.block_tables
        widths = [-(-n // size) for n in want.seq_lens]
        assert tables.shape == (len(ids), max(widths, default=0))
        for row, i in enumerate(ids):
            table = self.real.block_table(self.told[i].real).tolist()
            padding = [0] * (tables.shape[1] - widths[row])
            assert tables[row].tolist() == table + padding
            self.learn(self.naive.rows[i].tip, table)
            for t in range(want.query_starts[row], want.query_starts[row + 1]):
                block, offset = divmod(int(plan.slots[t]), size)
                assert block == table[want.positions[t] // size]
                assert offset == want.positions[t] % size
        assert len(set(plan.slots.tolist())) == plan.num_tokens
        copies = plan.copies.tolist()
        assert copies == [[self.block[s], self.block[t], n] for s, t, n in want.copies]
        targets = [target for _, target, _ in copies]
        assert len(set(targets)) == len(targets)
        assert set(targets).isdisjoint(source for source, _, _ in copies)
        assert all(0 < n < size for _, _, n in copies)
        self.upload(plan, widths)

    def upload(self, plan: Any, widths: Sequence[int]) -> None:
        """A table that only ever takes the cells said to have changed is the whole table."""
        for row, first, last in plan.table_updates.tolist():
            assert 0 <= first < last <= self.uploaded.shape[1]
            cells = plan.block_tables[row, first:last]
            self.uploaded[row, first:last] = 0
            self.uploaded[row, first : first + len(cells)] = cells
        for row, width in enumerate(widths):
            assert self.uploaded[row, :width].tolist() == plan.block_tables[row, :width].tolist()
            assert not self.uploaded[row, width:].any()

    def learn(self, tip: Node, table: Sequence[int]) -> None:
        """A node has one block for life, and no two nodes have the same."""
        path = tip.path()
        assert len(path) == len(table)
        for node, block in zip(path, table, strict=True):
            assert self.block.setdefault(node, block) == block, "the path is another one"

    def check(self) -> None:
        """Compare everything, and read every slot of every sequence."""
        naive, real, size = self.naive, self.real, self.config.block_size
        naive.verify()
        real.verify()
        live = set(naive.nodes)
        self.block = {node: block for node, block in self.block.items() if node in live}
        for i, row in naive.rows.items():
            told = self.told[i]
            assert (row.length, row.cached) == (real.length(told.real), real.num_cached(told.real))
            table = real.block_table(told.real).tolist()
            self.learn(row.tip, table)
            assert len(told.digests) == row.length
            if i in self.unwritten:
                continue
            for position, digest in enumerate(told.digests):
                slot = table[position // size] * size + position % size
                assert self.pool.get(slot) == digest, f"slot {slot} of sequence {i} is not its own"
        assert len(set(self.block.values())) == len(self.block)
        assert all(1 <= block <= self.config.num_blocks for block in self.block.values())
        self.check_stats()

    def check_stats(self) -> None:
        naive, stats = self.naive, self.real.stats()
        tier = stats.device
        assert (tier.num_free, tier.num_cached) == (naive.free(), len(naive.cached))
        assert tier.num_free + tier.num_active + tier.num_cached == tier.num_blocks
        assert tier.num_blocks == naive.num_blocks
        want = {
            "num_sequences": len(naive.rows),
            "num_logical_blocks": sum(naive.blocks(row.length) for row in naive.rows.values()),
            "num_peak_blocks": naive.num_peak,
            "num_steps": naive.num_steps,
            "num_appended_tokens": naive.num_appended,
            "num_hit_tokens": naive.num_hit,
            "num_copies": naive.num_copies,
            "num_merged_blocks": naive.num_merged,
            "num_evicted_blocks": naive.num_evicted,
        }
        assert {name: getattr(stats, name) for name in want} == want


def without_bytes(stats: Any) -> list[Any]:
    """All counts but that of the memory they live in, which may grow when a call fails."""
    names = ("num_sequences", "num_logical_blocks", "num_peak_blocks", "num_steps", "num_copies")
    more = ("num_appended_tokens", "num_hit_tokens", "num_merged_blocks", "num_evicted_blocks")
    return [stats.device, stats.host, *(getattr(stats, name) for name in names + more)]
