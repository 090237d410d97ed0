"""One step of a KVCache: its plan as tensors, closed by commit or rollback."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pagedkv.errors import InvalidState

if TYPE_CHECKING:
    from pagedkv._core import StepPlan
    from pagedkv.cache import KVCache

__all__ = ["Step"]

_SHARED_PART = 4  # what a run shares is read apart if it is at least a quarter of the longest row
_PADDING = 256  # tokens: to read so many for nothing costs about what one more call does


class Step:
    """Views of the cache's persistent buffers, valid until the next step; InvalidState after that.

    A context manager: leaving it commits, an exception rolls back. T is the number of new tokens,
    B the batch. `plan` is the StepPlan behind it; the tensors are on the cache's device.
    """

    def __init__(self, kv: KVCache, plan: StepPlan, close: Callable[[Step], None]) -> None:
        self.plan = plan
        self._kv = kv
        self._close = close
        self._open = True
        self._views: dict[str, torch.Tensor] = {}
        self._shared_lens: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        # Of attention's, which are the same for all layers: by first row, past the last, window.
        self.masks: dict[tuple[int, int, int | None], torch.Tensor | None] = {}

    def _view(self, name: str) -> torch.Tensor:
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = self._kv.machine.step_tensor(self.plan, name)
        return view

    def forget_views(self) -> None:
        """The buffers belong to another step from now on: reading raises InvalidState."""
        self._views.clear()
        self.masks.clear()

    @property
    def input_ids(self) -> torch.Tensor:
        """The new tokens' ids, int64 [T]. InvalidState if the step was opened without tokens."""
        if self.plan.input_ids is None:
            raise InvalidState("this step was opened without tokens, so it has no input_ids")
        return self._view("input_ids")

    @property
    def slots(self) -> torch.Tensor:
        """Where each new token's K and V go: block * block_size + offset, int64 [T]."""
        return self._view("slots")

    @property
    def positions(self) -> torch.Tensor:
        """Index of each new token in its sequence, int64 [T]."""
        return self._view("positions")

    @property
    def query_starts(self) -> torch.Tensor:
        """Row b's new tokens are [query_starts[b], query_starts[b + 1]), int32 [B + 1]."""
        return self._view("query_starts")

    @property
    def seq_lens(self) -> torch.Tensor:
        """Length of each sequence with its new tokens, int32 [B]."""
        return self._view("seq_lens")

    @property
    def block_tables(self) -> torch.Tensor:
        """Blocks of each sequence, int32 [B, W], padded with block 0; rows are strided."""
        return self._view("block_tables")

    @cached_property
    def shared_runs(self) -> list[tuple[int, int, int]]:
        """Neighbouring rows that begin with the same blocks: (first row, past the last, blocks)."""
        tables, runs, first = self.plan.block_tables, [], 0
        for row in range(1, len(tables) + 1):
            if row < len(tables) and tables[row, 0] == tables[first, 0]:
                continue
            differs = (tables[first + 1 : row] != tables[first]).any(axis=0)
            shared = int(differs.argmax()) if row - first > 1 else 0
            runs.append((first, row, shared))
            first = row
        return runs

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """Neighbouring rows that attention takes together: (first, past the last, shared blocks).

        Rows of one new token each: with the blocks that they share, if these are a good part of
        them, or without, if little of what they are padded to is padding. Others go alone.
        """
        counts, lens = np.diff(self.plan.query_starts), self.plan.seq_lens
        groups: list[tuple[int, int, int]] = []
        longest = total = 0  # of the last group, if more rows may join it
        for first, last, shared in self.shared_runs:
            worth = _SHARED_PART * shared * self._kv.spec.block_size >= lens[first:last].max()
            if worth and counts[first:last].max() == 1:
                groups.append((first, last, shared))
                total = 0
                continue
            for row in range(first, last):
                length = int(lens[row])
                begin = groups[-1][0] if total and counts[row] == 1 else row
                together = max(longest, length) if begin < row else length
                padding = (row + 1 - begin) * together - total - length
                if begin < row and padding <= max(_PADDING, (total + length) // 4):
                    groups[-1] = begin, row + 1, 0
                    longest, total = together, total + length
                else:
                    groups.append((row, row + 1, 0))
                    longest, total = length, length if counts[row] == 1 else 0
        return groups

    def shared_lens(
        self, first: int, last: int, num_shared: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths of a shared run and of rows' tails behind it, int32 [1] and [last - first].

        On the cache's device, made there, once for all layers.
        """
        found = self._shared_lens.get((first, last))
        if found is None:
            lens = self.seq_lens[first:last]
            found = lens.new_full((1,), num_shared), lens - num_shared
            self._shared_lens[first, last] = found
        return found

    @property
    def is_open(self) -> bool:
        return self._open

    def commit(self, lengths: Any = None) -> None:
        """Close the step; `lengths[b]` keeps only that much of row b. See BlockManager.commit."""
        self._kv.manager.commit(self.plan, lengths)
        self._closed()

    def rollback(self) -> None:
        """Close the step as if it had not been."""
        self._kv.manager.rollback(self.plan)
        self._closed()

    def _closed(self) -> None:
        self._open = False
        self._close(self)

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._open:
            return
        if kind is None:
            self.commit()
        else:
            self.rollback()
