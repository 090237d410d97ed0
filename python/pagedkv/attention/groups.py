"""Rows of a step that attention takes together. By the plan alone, once for all layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pagedkv._core import StepPlan
    from pagedkv.step import Step

__all__ = ["equal_counts", "groups", "shared_runs"]

SHARED_PART = 4  # what a run shares is read apart if it is at least a quarter of the longest row
PADDING = 256  # tokens: to read so many for nothing costs about what one more call does


def equal_counts(plan: StepPlan) -> Iterator[tuple[int, int, int]]:
    """Neighbouring rows with as many new tokens: (first row, past the last, tokens of each)."""
    counts = (plan.query_starts[1:] - plan.query_starts[:-1]).tolist()
    first = 0
    for row in range(1, len(counts) + 1):
        if row == len(counts) or counts[row] != counts[first]:
            yield first, row, counts[first]
            first = row


def shared_runs(step: Step) -> list[tuple[int, int, int]]:
    """Neighbouring rows that begin with the same blocks: (first row, past the last, blocks)."""
    return step.kept("shared runs", lambda: _shared_runs(step.plan))


def _shared_runs(plan: StepPlan) -> list[tuple[int, int, int]]:
    tables, runs, first = plan.block_tables, [], 0
    for row in range(1, len(tables) + 1):
        if row < len(tables) and tables[row, 0] == tables[first, 0]:
            continue
        differs = (tables[first + 1 : row] != tables[first]).any(axis=0)
        shared = int(differs.argmax()) if row - first > 1 else 0
        runs.append((first, row, shared))
        first = row
    return runs


def groups(step: Step, block_size: int) -> list[tuple[int, int, int]]:
    """Neighbouring rows that are gathered together: (first, past the last, shared blocks).

    Rows of one new token each: with the blocks that they share, if these are a good part of them,
    or without, if little of what they are padded to is padding. Others go alone.
    """
    return step.kept("groups", lambda: _groups(step, block_size))


def _groups(step: Step, block_size: int) -> list[tuple[int, int, int]]:
    counts, lens = np.diff(step.plan.query_starts), step.plan.seq_lens
    groups: list[tuple[int, int, int]] = []
    longest = total = 0  # of the last group, if more rows may join it
    for first, last, shared in shared_runs(step):
        worth = SHARED_PART * shared * block_size >= lens[first:last].max()
        if worth and counts[first:last].max() == 1:
            groups.append((first, last, shared))
            total = 0
            continue
        for row in range(first, last):
            length = int(lens[row])
            begin = groups[-1][0] if total and counts[row] == 1 else row
            together = max(longest, length) if begin < row else length
            padding = (row + 1 - begin) * together - total - length
            if begin < row and padding <= max(PADDING, (total + length) // 4):
                groups[-1] = begin, row + 1, 0
                longest, total = together, total + length
            else:
                groups.append((row, row + 1, 0))
                longest, total = length, length if counts[row] == 1 else 0
    return groups
