"""Floors: what no manager could leave out of a workload, with nothing of a manager in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from workloads import Driver, main

NO_FLOOR = "no floor is measured for it"


class Floor(Driver):
    """A memcpy of what the step takes and gives; for the pool, a slice of a Python list of ints."""

    cannot = dict.fromkeys(("evict", "resident", "trace"), NO_FLOOR)

    def open(self, num_blocks: int, workload: str) -> None:
        self.free = list(range(num_blocks))

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

    def admit(self, prompt: np.ndarray) -> np.ndarray:
        return prompt.copy()

    def release(self, handle: np.ndarray) -> None:
        pass

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
        free = self.free

        def take() -> list[int]:
            taken = free[-batch:]
            del free[-batch:]
            return taken

        return take, free.extend


if __name__ == "__main__":
    main(Floor())
