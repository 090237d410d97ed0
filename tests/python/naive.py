"""A block manager written to be obviously right: plain lists, everything counted anew each time.

It predicts what `BlockManager` does: hits, lengths, evictions, errors, counts. The only thing it
does not decide is which number a block has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pagedkv.errors import InvalidSpec, InvalidState, OutOfBlocks, UnknownSequence

MAX_CANDIDATES = 16  # children that a partial hit looks at, of those with the right first token


@dataclass(eq=False)
class Node:
    """Up to block_size tokens below `parent`; None for a token whose id is not known yet."""

    parent: Node | None
    tokens: list[int | None] = field(default_factory=list)
    published: bool = False
    children: list[Node] = field(default_factory=list)  # published ones only, the oldest first

    def path(self) -> list[Node]:
        """From below the root down to this node."""
        node, path = self, []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]


@dataclass(eq=False)
class Row:
    """A sequence."""

    tip: Node
    length: int = 0
    known: int = 0
    cached: int = 0
    admitted: bool = False


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


class NaiveManager:
    """See `BlockManager`, whose names these are."""

    def __init__(
        self, num_blocks: int, block_size: int, max_batch: int, max_model_len: int, watermark: int
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_batch = max_batch
        self.max_model_len = max_model_len
        self.watermark = watermark
        self.rows: dict[int, Row] = {}
        self.roots: dict[bytes, Node] = {}
        self.nodes: list[Node] = []  # every node that has a block
        self.cached: list[Node] = []  # those that nobody needs, the coldest first
        self.pins: list[Node] = []  # copy sources of the open step, once for each copy
        self.step: list[Entry] | None = None
        self.step_has_tokens = False
        self.next_id = 0
        self.num_evicted = self.num_merged = self.num_copies = 0
        self.num_steps = self.num_appended = self.num_hit = self.num_peak = 0

    # ------------------------------------------------------------------ who needs what

    def active(self) -> set[Node]:
        """Nodes on the path of a sequence or of a copy that has still to run."""
        tips = [row.tip for row in self.rows.values()] + self.pins
        return {node for tip in tips for node in tip.path()}

    def holders(self, node: Node) -> int:
        """Sequences that end at this node, copies of it to come, and children that are needed."""
        return (
            sum(row.tip is node for row in self.rows.values())
            + sum(pin is node for pin in self.pins)
            + sum(child.parent is node and child not in self.cached for child in self.nodes)
        )

    def hold(self, tip: Node) -> None:
        """Take a path that a sequence has just joined out of what may be evicted."""
        self.cached = [node for node in self.cached if node not in tip.path()]

    def leave(self, node: Node, *, hot: bool) -> None:
        """What nobody needs any more, from a node that was just left upwards."""
        coldest = 0
        while node.parent is not None and self.holders(node) == 0:
            if not node.published:
                self.nodes.remove(node)
            elif hot:
                self.cached.append(node)
            else:
                self.cached.insert(coldest, node)
                coldest += 1
            node = node.parent

    def unpublish(self, node: Node) -> None:
        assert node.parent is not None
        node.parent.children.remove(node)
        node.published = False

    def evict(self) -> None:
        coldest_leaf = next(node for node in self.cached if not node.children)
        self.unpublish(coldest_leaf)
        self.cached.remove(coldest_leaf)
        self.nodes.remove(coldest_leaf)
        self.num_evicted += 1

    def free(self) -> int:
        return self.num_blocks - len(self.nodes)

    def blocks(self, length: int) -> int:
        return -(-length // self.block_size)

    def verify(self) -> None:
        active = self.active()
        assert active.isdisjoint(self.cached)
        assert active | set(self.cached) == set(self.nodes)
        assert len(self.nodes) == len(set(self.nodes)) <= self.num_blocks
        for node in self.nodes:
            assert 0 < len(node.tokens) <= self.block_size
            assert node.parent is not None
            assert node.published == (node in node.parent.children)
            assert node.published or (node in active and not node.children)
            assert not node.published or (node.parent.published and None not in node.tokens)

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

    def walk(self, tokens: Sequence[int], salt: bytes) -> tuple[Node | None, int, int]:
        """The last node that a prompt hits, the tokens in full blocks, and those beyond."""
        node, rest, full = self.roots.get(salt), list(tokens[:-1]), 0
        if node is None:
            return None, 0, 0
        while len(rest) >= self.block_size:
            head = rest[: self.block_size]
            child = next((c for c in node.children if c.tokens == head), None)
            if child is None:
                break
            node, rest, full = child, rest[self.block_size :], full + self.block_size
        best, longest = node, 0
        alike = [c for c in reversed(node.children) if c.tokens[:1] == rest[:1]]
        for child in alike[:MAX_CANDIDATES]:
            run = common_run(child.tokens, rest)
            if run > longest:
                best, longest = child, run
        return best, full, longest

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

    def hide(self, node: Node) -> None:
        """Take a whole subtree out of what lookups find."""
        for child in list(node.children):
            self.hide(child)
        node.published = False
        node.children = []
        if node in self.cached:
            self.cached.remove(node)
            self.nodes.remove(node)

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
            alone = self.holders(e.tip) == 1 and not e.tip.children
            if needed > available and e.write == "copy" and e.tip.published and alone:
                e.write = "take over"
                needed -= 1
        if needed > max(available, 0):
            raise OutOfBlocks("device", needed, max(available, 0))
        while needed > self.free():
            self.evict()
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
            self.unpublish(e.tip)
        if e.write == "copy":
            self.pins.append(e.tip)
            row.tip = Node(e.tip.parent, e.tip.tokens[:offset])
            e.added.append(row.tip)
            plan.copies.append((e.tip, row.tip, offset))
        elif offset > 0:
            del e.tip.tokens[offset:]
        for token in tokens:
            if row.length % self.block_size == 0:
                row.tip = Node(row.tip)
                e.added.append(row.tip)
            row.tip.tokens.append(token)
            plan.positions.append(row.length)
            row.length += 1
            row.known += token is not None
        self.nodes += e.added
        plan.seq_lens.append(row.length)
        plan.query_starts.append(plan.query_starts[-1] + e.count)

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

    def publish(self, row: Row, first_block: int) -> None:
        """Publish a path's blocks from `first_block` on, each or the equal one that is there."""
        path = row.tip.path()[first_block:]
        for node, below in zip(path, [*path[1:], None], strict=True):
            if node.published:
                continue
            full = len(node.tokens) == self.block_size and None not in node.tokens
            assert node.parent is not None
            if not full or not node.parent.published or self.holders(node) != 1:
                return
            twin = next((c for c in node.parent.children if c.tokens == node.tokens), None)
            if twin is None:
                node.published = True
                node.parent.children.append(node)
                continue
            if below is None:
                row.tip = twin
            else:
                below.parent = twin
            self.nodes.remove(node)
            self.hold(twin)
            self.num_merged += 1

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


def common_run(a: Sequence[int | None], b: Sequence[int | None]) -> int:
    run = 0
    while run < min(len(a), len(b)) and a[run] == b[run]:
        run += 1
    return run
