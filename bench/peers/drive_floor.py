"""Floors: what no manager could leave out of a workload, with nothing of a manager in it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from workloads import BLOCK_SIZE, Driver, main

EVICTED = 128  # blocks of a prompt of 2048 tokens


class Floor(Driver):
    """A memcpy of what the step takes and gives, and what else a method says; no block has a state.

    The pool is a slice of a Python list of ints. The trace is its replay, with prompts copied and
    every token appended to one list. The bytes are the token ids in one array, 4 bytes each.
    """

    def open(self, num_blocks: int, workload: str) -> None:
        self.blocks = range(num_blocks)
        self.workload = workload
        self.oldest_first = OrderedDict.fromkeys(self.blocks if workload == "evict" else ())
        self.ids = np.empty(num_blocks * BLOCK_SIZE, np.int32)  # takes up what is written to
        self.end = 0
        self.appended: list[int] = []

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

    def admit(self, prompt: np.ndarray) -> Any:
        """Evicting, an ordered dict gives up the 128 blocks that were used longest ago."""
        if self.workload == "evict":
            pop = self.oldest_first.popitem
            return prompt.copy(), [pop(last=False)[0] for _ in range(EVICTED)]
        if self.workload == "resident":
            begin, self.end = self.end, self.end + len(prompt)
            self.ids[begin : self.end] = prompt
            return None
        return prompt.copy()

    def release(self, handle: Any) -> None:
        if self.workload == "evict":
            self.oldest_first.update(dict.fromkeys(handle[1]))

    def append(self, handle: np.ndarray, token: int) -> None:
        self.appended.append(token)

    def fork(self, handle: np.ndarray) -> np.ndarray:
        return handle

    def copy(self, num_bytes: int) -> Callable[[], Any]:
        source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
        return lambda: np.copyto(target, source)

    def decode(self, handles: list[Any]) -> Callable[[], Any]:
        """Per row a token, a slot, a position of 8 bytes; a length and one block of 4."""
        return self.copy(len(handles) * (3 * 8 + 2 * 4))

    def beam_step(self, handle: Any, beams: int) -> Callable[[], Any]:
        """The same per row, and its table of 128 blocks of 4 bytes."""
        return self.copy(beams * (3 * 8 + 4 + 128 * 4))

    def swap(self, handle: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """128 pairs of blocks, of 4 bytes each."""
        return self.copy(128 * 8), self.copy(128 * 8)

    def pool(self, batch: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        free = list(self.blocks)

        def take() -> list[int]:
            taken = free[-batch:]
            del free[-batch:]
            return taken

        return take, free.extend


if __name__ == "__main__":
    main(Floor())
