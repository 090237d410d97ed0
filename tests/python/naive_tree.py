"""The tree of blocks, written to be obviously right: every count is taken anew each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

MAX_CANDIDATES = 16  # newest children, which a partial hit looks at


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


class NaiveTree:
    """Sequences, the nodes that have a block, and which of them nobody needs."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.rows: dict[int, Row] = {}
        self.roots: dict[bytes, Node] = {}
        self.nodes: list[Node] = []
        self.cached: list[Node] = []  # those that nobody needs, the coldest first
        self.waiting: list[Node] = []  # those of them that go as soon as their last child has gone
        self.pins: list[Node] = []  # copy sources of the open step, once for each copy
        self.num_evicted = self.num_merged = 0

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
        self.waiting = [node for node in self.waiting if node in self.cached]

    def leave(self, node: Node, *, hot: bool) -> None:
        """What nobody needs any more, from a node that was just left upwards."""
        while node.parent is not None and self.holders(node) == 0:
            if not node.published:
                self.nodes.remove(node)
            elif hot:
                self.cached.append(node)
            else:
                self.cached.insert(0, node)
                if node.children:
                    self.waiting.append(node)
            node = node.parent

    def unpublish(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        parent.children.remove(node)
        node.published = False
        if parent in self.waiting and not parent.children:
            self.waiting.remove(parent)
            self.cached.remove(parent)
            self.cached.insert(0, parent)

    def evict(self) -> None:
        leaf = next(node for node in self.cached if not node.children)
        assert all(colder in self.waiting for colder in self.cached[: self.cached.index(leaf)])
        self.cached.remove(leaf)
        self.nodes.remove(leaf)
        self.unpublish(leaf)
        self.num_evicted += 1

    def take_over(self, node: Node) -> None:
        """Hide a node that one sequence needs; what is cached below it goes."""
        before = len(self.nodes)
        self.hide(node)
        self.unpublish(node)
        self.num_evicted += before - len(self.nodes)

    def free(self) -> int:
        return self.num_blocks - len(self.nodes)

    def blocks(self, length: int) -> int:
        return -(-length // self.block_size)

    def verify(self) -> None:
        active = self.active()
        assert active.isdisjoint(self.cached)
        assert all(node in self.cached and node.children for node in self.waiting)
        assert active | set(self.cached) == set(self.nodes)
        assert len(self.nodes) == len(set(self.nodes)) <= self.num_blocks
        for node in self.nodes:
            assert 0 < len(node.tokens) <= self.block_size
            assert node.parent is not None
            assert node.published == (node in node.parent.children)
            assert node.published or (node in active and not node.children)
            assert not node.published or (node.parent.published and None not in node.tokens)

    # ------------------------------------------------------------------ prefix hits

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
        for child in node.children[: -MAX_CANDIDATES - 1 : -1]:
            run = common_run(child.tokens, rest)
            if run > longest:
                best, longest = child, run
        return best, full, longest

    def publish(self, row: Row, first_block: int) -> None:
        """Publish a path's blocks from `first_block` on, each or the equal one that is there.

        What others share from there on stays private, and so does all below it.
        """
        path = row.tip.path()[first_block:]
        for k, (node, below) in enumerate(zip_longest(path, path[1:])):
            if node.published:
                continue
            full = len(node.tokens) == self.block_size and None not in node.tokens
            assert node.parent is not None
            alone = all(self.holders(n) == 1 for n in path[k:])
            if not (full and alone and node.parent.published):
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

    def hide(self, node: Node) -> None:
        """Take a whole subtree out of what lookups find."""
        for child in list(node.children):
            self.hide(child)
        node.published = False
        node.children = []
        if node in self.cached:
            self.cached.remove(node)
            self.nodes.remove(node)
            self.waiting = [other for other in self.waiting if other is not node]


def common_run(a: Sequence[int | None], b: Sequence[int | None]) -> int:
    run = 0
    while run < min(len(a), len(b)) and a[run] == b[run]:
        run += 1
    return run
