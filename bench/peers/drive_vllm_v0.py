"""vLLM 0.6.2's BlockSpaceManagerV1: Python, the last with fork, copy-on-write and swap."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import distribution
from typing import Any

from left_out import bare_package, leave_out

UNUSED = "lora pooling_params prompt_adapter spec_decode sampling_params logger inputs"
leave_out(*(f"vllm.{name}" for name in UNUSED.split()))
bare_package("vllm", str(distribution("vllm").locate_file("vllm")))

from vllm.core.block_manager_v1 import BlockSpaceManagerV1
from vllm.sequence import Logprob, Sequence, SequenceGroup, SequenceStatus

from workloads import BLOCK_SIZE, Driver, main


class VllmV0(Driver):
    """A handle is a SequenceGroup of one sequence."""

    def open(self, num_blocks: int, workload: str) -> None:
        """Prefix caching where the workload needs it: without, as by default, it is quicker."""
        caching, self.count = workload in ("admit", "evict", "resident", "trace"), 0
        host = num_blocks if workload == "swap" else 16
        self.m = BlockSpaceManagerV1(
            BLOCK_SIZE, num_blocks, host, watermark=0.0, enable_caching=caching
        )
        self.caching = caching

    def sequence(self, tokens: list[int]) -> Any:
        self.count += 1
        inputs = {"prompt_token_ids": tokens, "prompt": ""}
        return Sequence(self.count, inputs, BLOCK_SIZE)

    def admit(self, prompt: list[int]) -> Any:
        sequence = self.sequence(prompt)
        group = SequenceGroup(str(self.count), [sequence], 0.0)
        self.m.allocate(group)
        sequence.status = SequenceStatus.RUNNING
        if self.caching:  # what the scheduler does after the prefill, so that it can be found
            self.m.access_all_blocks_in_seq(sequence, time.monotonic())
            self.m.mark_blocks_as_computed(group, len(prompt))
        return group

    def release(self, handle: Any) -> None:
        self.m.free(handle.seqs[0])

    def append(self, handle: Any, token: int) -> None:
        handle.seqs[0].append_token_id(token, {token: Logprob(0.0)})
        self.m.append_slots(handle.seqs[0], 0)

    def fork(self, handle: Any) -> Any:
        self.count += 1
        parent = handle.seqs[0]
        child = self.sequence(list(parent.get_token_ids()))
        child.status = SequenceStatus.RUNNING
        self.m.fork(parent, child)
        return SequenceGroup(str(self.count), [child], 0.0)

    def decode(self, handles: list[Any]) -> Callable[[], Any]:
        m, logprob = self.m, {7: Logprob(0.0)}

        def step() -> None:
            for group in handles:
                sequence = group.seqs[0]
                sequence.append_token_id(7, logprob)
                m.can_append_slots(group, 0)
                m.append_slots(sequence, 0)
                m.get_block_table(sequence)

        return step

    def beam_step(self, handle: Any, beams: int) -> Callable[[], Any]:
        """Its scheduler copies the rows' own objects besides; here they are made beforehand."""
        m, parent, logprob = self.m, handle.seqs[0], {7: Logprob(0.0)}
        rows = [self.sequence(list(parent.get_token_ids())) for _ in range(beams)]
        for row in rows:
            row.status = SequenceStatus.RUNNING
            row.append_token_id(7, logprob)

        def step() -> None:
            for row in rows:
                m.fork(parent, row)
            copies = [pair for row in rows for pair in m.append_slots(row, 0)]
            if len(copies) != beams:
                raise AssertionError(f"{len(copies)} copies")
            for row in rows:
                m.free(row)

        return step

    def swap(self, handle: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        m, sequence = self.m, handle.seqs[0]

        def out() -> None:
            if len(m.swap_out(handle)) != 128:
                raise AssertionError("not all blocks were swapped")
            sequence.status = SequenceStatus.SWAPPED

        def into() -> None:
            m.swap_in(handle)
            sequence.status = SequenceStatus.RUNNING

        return out, into

    def pool(self, batch: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        """One block a call is all that it has."""
        pool = self.m.gpu_allocator
        if batch == 1:
            return pool.allocate, pool.free

        def give(blocks: list[Any]) -> None:
            for block in blocks:
                pool.free(block)

        return lambda: [pool.allocate() for _ in range(batch)], give


if __name__ == "__main__":
    main(VllmV0())
