"""pagedkv through its Python API: buffers in, all outputs of a step read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pagedkv import BlockManager
from workloads import BLOCK_SIZE, Driver, main


def read(m: BlockManager, plan: Any) -> None:
    """What an engine takes from a plan; then the step is closed."""
    _ = plan.input_ids, plan.slots, plan.positions, plan.query_starts, plan.seq_lens
    _ = plan.block_tables, plan.copies
    m.commit(plan)


class PagedKV(Driver):
    """A handle is an array of one id."""

    def open(self, num_blocks: int, workload: str) -> None:
        host = num_blocks if workload == "swap" else 0
        self.m = BlockManager(num_blocks, host, block_size=BLOCK_SIZE, max_model_len=140_000)
        self.tokens = [np.array([t]) for t in range(1000)]

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

    def admit(self, prompt: np.ndarray) -> np.ndarray:
        m = self.m
        sequence = m.create(prompt)
        rest, ids = prompt[m.num_cached(sequence) :], np.array([sequence])
        read(m, m.append(ids, rest, np.array([len(rest)])))
        return ids

    def release(self, handle: np.ndarray) -> None:
        self.m.release(handle)

    def append(self, handle: np.ndarray, token: int) -> None:
        self.m.commit(self.m.append(handle, self.tokens[token]))

    def fork(self, handle: np.ndarray) -> np.ndarray:
        return self.m.fork(int(handle[0]), 2)[1:]

    def decode(self, handles: list[Any]) -> Callable[[], Any]:
        m, ids, new = self.m, np.concatenate(handles), np.full(len(handles), 7)
        return lambda: read(m, m.append(ids, new))

    def beam_step(self, handle: np.ndarray, beams: int) -> Callable[[], Any]:
        m, parent, new = self.m, int(handle[0]), np.arange(beams)

        def step() -> None:
            rows = m.fork(parent, beams + 1)[1:]
            read(m, m.append(rows, new))
            m.release(rows)

        return step

    def swap(self, handle: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
        m = self.m

        def carry_out(plan: Any) -> None:
            _ = plan.copies, plan.wait_for
            if plan.num_copies != 128:
                raise AssertionError(f"{plan.num_copies} blocks were swapped")
            m.complete(plan)

        def out() -> None:  # the host's copy is dropped, so that all blocks have to be copied
            carry_out(m.swap_out(handle))
            m.clear()

        return out, lambda: carry_out(m.swap_in(handle))

    def pool(self, batch: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        """No bare pool is offered: an empty sequence grows by `batch` blocks, and is emptied."""
        m, count, nothing = self.m, np.array([batch * BLOCK_SIZE]), np.array([0])
        idle: list[np.ndarray] = []

        def take() -> np.ndarray:
            ids = idle.pop() if idle else np.array([m.create()])
            m.commit(m.append(ids, None, count))
            return ids

        def give(ids: np.ndarray) -> None:
            m.truncate(ids, nothing)
            idle.append(ids)

        return take, give


if __name__ == "__main__":
    main(PagedKV())
