"""A block manager written to be obviously right: plain lists, everything counted anew each time.

It predicts what `BlockManager` does: hits, lengths, evictions, errors, counts. The only thing it
does not decide is which number a block has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from naive_tree import NaiveTree, Node, Row
from pagedkv.errors import InvalidSpec, InvalidState, OutOfBlocks, UnknownSequence


@dataclass
class Entry:
    """One row of the open step, and what rollback puts back."""

    row: Row
    tip: Node
    length: int
    known: int
    count: int
    write: str  # extend, in place, copy, take over
    added: list[Node] = field(default_factory=list)


@dataclass
class NaivePlan:
    """What the naive manager knows of a StepPlan; copies are (source, target, tokens)."""

    positions: list[int]
    seq_lens: list[int]
    query_starts: list[int]
    copies: list[tuple[Node, Node, int]]


class NaiveManager(NaiveTree):
    """See `BlockManager`, whose names these are."""

    def __init__(
        self, num_blocks: int, block_size: int, max_batch: int, max_model_len: int, watermark: int
    ) -> None:
        super().__init__(num_blocks, block_size)
        self.max_batch = max_batch
        self.max_model_len = max_model_len
        self.watermark = watermark
        self.step: list[Entry] | None = None
        self.step_has_tokens = False
        self.next_id = 0
        self.num_copies = self.num_steps = self.num_appended = self.num_hit = self.num_peak = 0

    # ------------------------------------------------------------------ checking arguments

    def get(self, sequence: int) -> Row:
        if sequence not in self.rows:
            raise UnknownSequence(sequence)
        return self.rows[sequence]

    def batch(self, ids: Sequence[int], *others: Sequence[int] | None) -> list[Row]:
        rows = [self.get(i) for i in ids]
        if len(set(ids)) < len(ids):
            raise InvalidSpec("a sequence is named twice")
        if any(other is not None and len(other) != len(ids) for other in others):
            raise InvalidSpec("batch arguments differ in length")
        return rows

    def require(self, ok: bool) -> None:
        if not ok:
            raise InvalidSpec("out of range")

    def require_closed(self) -> None:
        if self.step is not None:
            raise InvalidState("a step is open")

    # ------------------------------------------------------------------ sequences

    def create(self, tokens: Sequence[int] | None = None, salt: bytes = b"") -> int:
        self.require_closed()
        if tokens is None:
            row = Row(Node(None))  # a root that nobody finds
        else:
            self.require(len(tokens) <= self.max_model_len)
            self.roots.setdefault(salt, Node(None, published=True))
            tip, full, run = self.walk(tokens, salt)
            assert tip is not None
            row = Row(tip, *[full + run] * 3)
            self.hold(tip)
            self.num_hit += full + run
        self.next_id += 1
        self.rows[self.next_id] = row
        self.num_peak = max(self.num_peak, len(self.active()))
        return self.next_id

    def lookup(self, tokens: Sequence[int], salt: bytes = b"") -> tuple[int, int]:
        _, full, run = self.walk(tokens, salt)
        return full // self.block_size, run

    def fork(self, sequence: int, n: int) -> list[int]:
        self.require_closed()
        row = self.get(sequence)
        self.require(n >= 1)
        ids = [sequence, *range(self.next_id + 1, self.next_id + n)]
        self.next_id += n - 1
        for i in ids[1:]:
            self.rows[i] = Row(row.tip, row.length, row.known, row.cached, row.admitted)
        return ids

    def reorder(self, ids: Sequence[int], parents: Sequence[int]) -> None:
        self.require_closed()
        rows = self.batch(ids, parents)
        self.require(all(0 <= p < len(ids) for p in parents))
        new = [Row(**vars(rows[p])) for p in parents]
        self.pins += [row.tip for row in new]
        for row, want in zip(rows, new, strict=True):
            old = row.tip
            vars(row).update(vars(want))
            self.leave(old, hot=False)
        self.pins.clear()

    def truncate(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        self.require_closed()
        rows = self.batch(ids, lengths)
        self.require(all(0 <= n <= row.length for row, n in zip(rows, lengths, strict=True)))
        for row, length in zip(rows, lengths, strict=True):
            old = row.tip
            for _ in range(self.blocks(row.length) - self.blocks(length)):
                assert row.tip.parent is not None
                row.tip = row.tip.parent
            row.length = length
            row.known, row.cached = min(row.known, length), min(row.cached, length)
            self.leave(old, hot=False)

    def release(self, ids: Sequence[int]) -> None:
        self.require_closed()
        self.batch(ids)
        for i in ids:
            self.leave(self.rows.pop(i).tip, hot=True)

    def clear(self, salt: bytes | None = None) -> None:
        self.require_closed()
        for name in list(self.roots) if salt is None else [salt]:
            if name in self.roots:
                self.hide(self.roots.pop(name))

    # ------------------------------------------------------------------ steps

    def decide(self, ids: Sequence[int], counts: Sequence[int] | None) -> tuple[list[Entry], int]:
        """How each row of a batch writes, and the blocks that takes."""
        rows = self.batch(ids, counts)
        counts = [1] * len(ids) if counts is None else counts
        self.require(len(ids) <= self.max_batch and all(n >= 1 for n in counts))
        fits = (r.length + n <= self.max_model_len for r, n in zip(rows, counts, strict=True))
        self.require(all(fits))
        entries, needed, left = [], 0, list(self.pins)
        for row, count in zip(rows, counts, strict=True):
            tip, offset = row.tip, row.length % self.block_size
            needed += self.blocks(row.length + count) - self.blocks(row.length)
            write = "in place"
            if offset == 0:
                write = "extend"
            elif tip.published or self.holders(tip) > 1:
                last_at_the_end = offset == len(tip.tokens) and (
                    self.holders(tip) - sum(node is tip for node in left) == 1
                )
                if not last_at_the_end:
                    write = "copy"
                    left.append(tip)
                    needed += 1
            entries.append(Entry(row, tip, row.length, row.known, count, write))
        return entries, needed

    def num_needed(self, ids: Sequence[int], counts: Sequence[int] | None = None) -> int:
        return self.decide(ids, counts)[1]

    def num_freed(self, ids: Sequence[int]) -> int:
        self.batch(ids)
        kept = [row.tip for i, row in self.rows.items() if i not in ids] + self.pins
        return len(self.active() - {node for tip in kept for node in tip.path()})

    def append(
        self,
        ids: Sequence[int],
        tokens: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
    ) -> NaivePlan:
        self.require_closed()
        entries, needed = self.decide(ids, counts)
        total = sum(e.count for e in entries)
        if tokens is not None:
            self.require(len(tokens) == total and all(e.known == e.length for e in entries))
        available = self.free() + len(self.cached)
        if any(not e.row.admitted for e in entries):
            available -= self.watermark
        for e in entries:
            alone = self.holders(e.tip) == 1
            if needed > available and e.write == "copy" and e.tip.published and alone:
                e.write = "take over"
                needed -= 1
        if needed > max(available, 0):
            raise OutOfBlocks("device", needed, max(available, 0))
        plan = NaivePlan([], [], [0], [])
        source: Iterator[int | None] = iter([None] * total if tokens is None else tokens)
        for e in entries:
            self.write(e, [next(source) for _ in range(e.count)], plan)
        self.step, self.step_has_tokens = entries, tokens is not None
        self.num_copies += len(plan.copies)
        self.num_peak = max(self.num_peak, len(self.active()))
        return plan

    def write(self, e: Entry, tokens: Sequence[int | None], plan: NaivePlan) -> None:
        row, offset = e.row, e.length % self.block_size
        if e.write == "take over":
            self.take_over(e.tip)
        if e.write == "copy":
            self.pins.append(e.tip)
            row.tip = self.add(e, Node(e.tip.parent, e.tip.tokens[:offset]))
            plan.copies.append((e.tip, row.tip, offset))
        elif offset > 0:
            del e.tip.tokens[offset:]
        for token in tokens:
            if row.length % self.block_size == 0:
                row.tip = self.add(e, Node(row.tip))
            row.tip.tokens.append(token)
            plan.positions.append(row.length)
            row.length += 1
            row.known += token is not None
        plan.seq_lens.append(row.length)
        plan.query_starts.append(plan.query_starts[-1] + e.count)

    def add(self, e: Entry, node: Node) -> Node:
        if self.free() == 0:
            self.evict()
        self.nodes.append(node)
        e.added.append(node)
        return node

    def rollback(self) -> None:
        assert self.step is not None
        for e in self.step:
            self.nodes = [node for node in self.nodes if node not in e.added]
            e.row.tip, e.row.length, e.row.known = e.tip, e.length, e.known
            if e.write in ("in place", "take over"):
                del e.tip.tokens[e.length % self.block_size :]
        self.pins.clear()
        self.step = None

    def commit(self, lengths: Sequence[int] | None = None) -> None:
        if self.step is None:
            raise InvalidState("no step is open")
        step = self.step
        if lengths is not None:
            self.require(len(lengths) == len(step))
            pairs = list(zip(step, lengths, strict=True))
            self.require(all(e.length <= n <= e.row.length for e, n in pairs))
            for e, length in pairs:
                self.shorten(e.row, length)
        for e in step:
            e.row.admitted = True
            self.num_appended += e.row.length - e.length
            if e.write == "copy":
                self.pins.remove(e.tip)
                self.leave(e.tip, hot=True)
        for e in step:
            if self.step_has_tokens:
                self.publish(e.row, e.length // self.block_size)
        self.num_steps += 1
        self.step = None

    def shorten(self, row: Row, length: int) -> None:
        """Drop new tokens of a row, which nobody else can hold."""
        for _ in range(self.blocks(row.length) - self.blocks(length)):
            assert row.tip.parent is not None
            self.nodes.remove(row.tip)
            row.tip = row.tip.parent
        if length % self.block_size > 0:
            del row.tip.tokens[length % self.block_size :]
        row.length, row.known = length, min(row.known, length)

    def record(
        self, ids: Sequence[int], tokens: Sequence[int], counts: Sequence[int] | None = None
    ) -> None:
        self.require_closed()
        rows = self.batch(ids, counts)
        counts = [1] * len(ids) if counts is None else counts
        self.require(all(1 <= n <= r.length - r.known for r, n in zip(rows, counts, strict=True)))
        self.require(sum(counts) == len(tokens))
        told: dict[tuple[Node, int], int] = {}
        rest = iter(tokens)
        for row, count in zip(rows, counts, strict=True):
            for position in range(row.known, row.known + count):
                block, offset = divmod(position, self.block_size)
                node, token = row.tip.path()[block], next(rest)
                before = told.setdefault((node, offset), token)
                self.require(before == token and node.tokens[offset] in (None, token))
        for (node, offset), token in told.items():
            node.tokens[offset] = token
        for row, count in zip(rows, counts, strict=True):
            first_block = row.known // self.block_size
            row.known += count
            self.publish(row, first_block)
