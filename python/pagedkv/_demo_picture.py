"""Draws the block tree as a chart of boxes: a column per block position, a row per sequence.

A box is one block in memory, as tall as the rows that share it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from pagedkv._core import Snapshot

_ROW, _COLUMN, _GAP_COLUMN = 0.52, 1.62, 0.62  # inches
_INK, _PALE_INK, _EDGE = "#1b1f24", "#6a737d", "#8b949e"
_CACHED = "#f3f4f6"
_DPI = 110
_MAX_TRUNK = 3  # blocks at the beginning of all rows that are drawn singly


@dataclass(frozen=True)
class Node:
    """A block in the chart: rows [top, top + height), in `column`.

    One without sharers is only cached; it stands for `num_alike` more that hang at its parent.
    """

    block: int
    column: int
    top: int
    height: int
    num_tokens: int
    num_sharers: int
    num_alike: int = 0


@dataclass(frozen=True)
class Layout:
    nodes: list[Node]
    row_of: dict[int, int]  # sequence id -> its row
    num_rows: int
    num_columns: int


def lay_out(tree: Snapshot) -> Layout:
    """Give every sequence, and every cached leaf, a row; every node spans the rows beyond it.

    A beam search leaves many cached ends: of those that hang at one node, the longest is drawn.
    """
    parents = tree.parents.tolist()
    ends: dict[int, list[int]] = {}
    for sequence, node in zip(
        tree.sequence_ids.tolist(), tree.sequence_nodes.tolist(), strict=True
    ):
        ends.setdefault(node, []).append(sequence)
    # Parents come before children, so backwards each node's values are complete when they are read.
    sharers = [len(ends.get(node, ())) for node in range(len(parents))]
    depth = [1] * len(parents)
    children: dict[int, list[int]] = {node: [] for node in range(-1, len(parents))}
    for node in reversed(range(len(parents))):
        parent = parents[node]
        children[parent].append(node)
        if parent >= 0:
            sharers[parent] += sharers[node]
            depth[parent] = max(depth[parent], depth[node] + 1)

    nodes: list[Node] = []
    row_of: dict[int, int] = {}
    num_rows = 0
    # Depth first with a stack, since paths can be long. A node comes up twice: to begin, and, with
    # the row where it began, to end.
    stack: list[tuple[int, int, int, int | None]] = [(-1, -1, 0, None)]
    while stack:
        node, column, alike, begin = stack.pop()
        if begin is not None:
            height, filled = num_rows - begin, int(tree.num_tokens[node])
            block = int(tree.blocks[node])
            nodes.append(Node(block, column, begin, height, filled, sharers[node], alike))
            continue
        if node >= 0:
            stack.append((node, column, alike, num_rows))
            for sequence in ends.get(node, ()):
                row_of[sequence] = num_rows
                num_rows += 1
            num_rows += not children[node] and node not in ends
        # What most sequences share goes on top, and onto the stack last.
        live = sorted((c for c in children[node] if sharers[c]), key=lambda c: sharers[c])
        cached = [c for c in children[node] if not sharers[c]]
        if cached:
            longest = max(cached, key=lambda c: depth[c])
            stack.append((longest, column + 1, len(cached) - 1, None))
        stack += [(child, column + 1, 0, None) for child in live]
    return Layout(nodes, row_of, num_rows, 1 + max((n.column for n in nodes), default=-1))


def draw_tree(
    tree: Snapshot,
    out: Path,
    *,
    title: str,
    subtitle: str,
    block_size: int,
    label: str,
    text_of: Callable[[int], str],
) -> None:
    """Write the picture of `tree` to `out`, as a PNG.

    Args:
        label: what a sequence is called, for example "beam".
        text_of: the text of a block's tokens.
    """
    layout = lay_out(tree)
    columns, hidden = _columns(layout)
    width, height = sum(w for _, w in columns.values()) + 1.5, layout.num_rows * _ROW
    figure = Figure(figsize=(width, height + 1.75), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.15 / width, 0.85 / (height + 1.75), 1, height / (height + 1.75)))
    axes.set(xlim=(0, width), ylim=(layout.num_rows, 0))
    axes.axis("off")
    with matplotlib.rc_context({"hatch.linewidth": 0.6, "hatch.color": "#c9ced4"}):
        colour_of = _colours(layout)
        for node in layout.nodes:
            if node.column in columns:
                left, wide = columns[node.column]
                _draw_node(axes, node, left, wide, block_size, colour_of, text_of(node.block))
        if hidden:
            left, wide = columns[-1]
            axes.text(
                left + wide / 2 - 0.03,
                layout.num_rows / 2,
                f"…\n{hidden} more\nblocks\n…",
                ha="center",
                va="center",
                fontsize=8,
                color=_PALE_INK,
            )
        _draw_labels(axes, layout, columns, label)
        _draw_legend(figure, layout, colour_of, label)
        inch = 1 / (height + 1.75)
        figure.text(
            0.18 / width,
            1 - 0.32 * inch,
            title,
            fontsize=13,
            weight="bold",
            color=_INK,
            va="center",
        )
        figure.text(
            0.18 / width, 1 - 0.62 * inch, subtitle, fontsize=9, color=_PALE_INK, va="center"
        )
        figure.savefig(out, format="png")


def _columns(layout: Layout) -> tuple[dict[int, tuple[float, float]], int]:
    """Left edge and width of each column drawn (-1: the gap), and how many the gap stands for."""
    per_column = [0] * layout.num_columns
    for node in layout.nodes:
        per_column[node.column] += 1
    trunk = next((i for i, n in enumerate(per_column) if n > 1), layout.num_columns)
    hidden = range(1, trunk - 1) if trunk > _MAX_TRUNK else range(0)
    columns: dict[int, tuple[float, float]] = {}
    left = 0.0
    for column in range(layout.num_columns):
        if column in hidden:
            if column == hidden.start:
                columns[-1] = (left, _GAP_COLUMN)
                left += _GAP_COLUMN
            continue
        columns[column] = (left, _COLUMN)
        left += _COLUMN
    return columns, len(hidden)


def _colours(layout: Layout) -> dict[int, Any]:
    """A colour for each number of sharers: the more, the darker."""
    counts = sorted({node.num_sharers for node in layout.nodes} - {0})
    shades = matplotlib.colormaps["GnBu"]
    most = max(counts, default=1)
    return {n: shades(0.18 + 0.77 * (n - 1) / max(most - 1, 1)) for n in counts}


def _draw_node(
    axes: Any,
    node: Node,
    left: float,
    wide: float,
    block_size: int,
    colour_of: dict[int, Any],
    text: str,
) -> None:
    """A box with the block's text. Only as much of it is filled as the block holds tokens."""
    x, y = left + 0.03, node.top + 0.06
    w, h = wide - 0.06, node.height - 0.12
    colour = colour_of.get(node.num_sharers, _CACHED)
    hatch = None if node.num_sharers else "////"
    axes.add_patch(Rectangle((x, y), w, h, facecolor="white", edgecolor="none"))
    filled = w * node.num_tokens / block_size
    axes.add_patch(Rectangle((x, y), filled, h, facecolor=colour, hatch=hatch, linewidth=0))
    axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=_EDGE, linewidth=0.8))
    red, green, blue = to_rgb(colour)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
    ink = "white" if dark else _INK if node.num_sharers else _PALE_INK
    lines = textwrap.wrap(" ".join(text.split()), width=27, max_lines=3, placeholder=" …")
    axes.text(
        x + 0.06,
        y + h / 2,
        "\n".join(lines),
        va="center",
        fontsize=7.5,
        color=ink,
        parse_math=False,
    )


def _draw_labels(
    axes: Any, layout: Layout, columns: dict[int, tuple[float, float]], label: str
) -> None:
    """The name of each row, right of its last block."""
    last = [layout.nodes[0]] * layout.num_rows
    for node in layout.nodes:
        for row in range(node.top, node.top + node.height):
            last[row] = max(last[row], node, key=lambda n: n.column)
    names = {row: f"{label} {i + 1}" for i, row in enumerate(sorted(layout.row_of.values()))}
    for row, node in enumerate(last):
        left, wide = columns[node.column]
        more = f",\nand {node.num_alike} more" if node.num_alike else ""
        name, colour = names.get(row, f"cached{more}"), _INK if row in names else _PALE_INK
        axes.text(left + wide + 0.06, row + 0.5, name, va="center", fontsize=9, color=colour)


def _draw_legend(figure: Figure, layout: Layout, colour_of: dict[int, Any], label: str) -> None:
    edge: dict[str, Any] = {"edgecolor": _EDGE, "linewidth": 0.8}
    handles = [
        Patch(
            facecolor=colour_of[n],
            label=f"shared by {n} {label}s" if n > 1 else f"one {label}'s own",
            **edge,
        )
        for n in sorted(colour_of, reverse=True)
    ]
    if any(node.num_sharers == 0 for node in layout.nodes):
        cached = f"cached: no {label}'s now; a later request finds it again by its tokens"
        handles.append(Patch(facecolor=_CACHED, hatch="////", label=cached, **edge))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.005, 0.005),
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        handlelength=1.4,
        columnspacing=1.2,
    )
