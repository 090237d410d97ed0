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

# In inches: the height of a row, the widths of a block, of the gap that stands for blocks left out
# and of the labels, the margins above and below, and the room that the title needs.
_ROW, _COLUMN, _GAP_COLUMN, _LABELS = 0.52, 1.62, 0.62, 1.5
_ABOVE, _BELOW, _MIN_WIDTH = 0.95, 0.5, 9.5
_GAP = -1  # the gap, among the columns
_INK, _PALE_INK, _EDGE = "#1b1f24", "#6a737d", "#8b949e"
_CACHED = "#f3f4f6"
_DPI = 110
_MAX_TRUNK = 3  # blocks at the beginning of all rows that are drawn singly


@dataclass(frozen=True)
class Node:
    """A block in the chart: rows [top, top + height), in `column`.

    One without sharers is only cached, and `num_alike` others beside its path are not drawn.
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
    nodes: list[Node]  # children before parents
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
            stack.append((longest, column + 1, alike + len(cached) - 1, None))
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
    width = max(sum(wide for _, wide in columns.values()) + _LABELS, _MIN_WIDTH)
    height = layout.num_rows * _ROW + _ABOVE + _BELOW
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    # Across in inches, down in rows.
    axes.set(xlim=(-0.15, width - 0.15))
    axes.set(ylim=(layout.num_rows + _BELOW / _ROW, -_ABOVE / _ROW))
    axes.axis("off")
    colour_of = _colours(layout)
    with matplotlib.rc_context({"hatch.linewidth": 0.6, "hatch.color": "#c9ced4"}):
        for node in layout.nodes:
            if node.column in columns:
                left, wide = columns[node.column]
                _draw_node(axes, node, left, wide, block_size, colour_of, text_of(node.block))
        if hidden:
            left, wide = columns[_GAP]
            style: dict[str, Any] = {
                "ha": "center",
                "va": "center",
                "fontsize": 8,
                "color": _PALE_INK,
            }
            middle = layout.num_rows / 2
            axes.text(left + wide / 2, middle, f"…\n{hidden} more\nblocks\n…", **style)
        _draw_labels(axes, layout, columns, label)
        _draw_legend(figure, layout, colour_of, label)
        axes.text(0.03, -0.6 / _ROW, title, fontsize=13, weight="bold", color=_INK)
        axes.text(0.03, -0.3 / _ROW, subtitle, fontsize=9, color=_PALE_INK)
        figure.savefig(out, format="png")


def _columns(layout: Layout) -> tuple[dict[int, tuple[float, float]], int]:
    """Left edge and width of each column drawn and of the gap; how many the gap stands for."""
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
                columns[_GAP] = (left, _GAP_COLUMN)
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
    lines = textwrap.wrap(" ".join(text.split()), width=25, max_lines=3, placeholder=" …")
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
    last: dict[int, Node] = {}
    for node in layout.nodes:  # the last of a row comes first
        for row in range(node.top, node.top + node.height):
            last.setdefault(row, node)
    names = {row: f"{label} {i + 1}" for i, row in enumerate(sorted(layout.row_of.values()))}
    for row, node in last.items():
        left, wide = columns[node.column if node.column in columns else _GAP]
        more = f",\nand {node.num_alike} more" if node.num_alike else ""
        name, colour = names.get(row, f"cached{more}"), _INK if row in names else _PALE_INK
        axes.text(left + wide + 0.06, row + 0.5, name, va="center", fontsize=9, color=colour)


def _draw_legend(figure: Figure, layout: Layout, colour_of: dict[int, Any], label: str) -> None:
    edge: dict[str, Any] = {"edgecolor": _EDGE, "linewidth": 0.8}
    counts = sorted(colour_of, reverse=True)
    names = {n: f"by {n}" for n in counts} | {1: f"one {label}'s own"}
    if counts and counts[0] > 1:
        names[counts[0]] = f"shared by {counts[0]} {label}s"
    handles = [Patch(facecolor=colour_of[n], label=names[n], **edge) for n in counts]
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
