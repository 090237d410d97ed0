"""Whether copies and swaps of adopted tensors arrive where the tensors say, byte by byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedkv._core import BlockManager
from pagedkv.errors import DeviceError, InvalidSpec

if TYPE_CHECKING:
    from pagedkv._core import Pool, TransferEngine, TransferPlan
    from pagedkv.layout import DevicePool
    from pagedkv.machine import Machine

__all__ = ["try_copies"]

_BLOCKS = 0, 1, 2  # padding, and what a manager gives first


def try_copies(
    memory: DevicePool,
    pool: Pool,
    engine: TransferEngine | None,
    num_host_blocks: int,
    machine: Machine,
) -> None:
    """Copy and swap two blocks of noise; what they held, and block 0, is then put back.

    The copies are planned by a manager of two blocks and act on addresses, the noise goes through
    the tensors' own indices: so the two have to mean the same bytes. With one usable block, or one
    token in a block, a cache never copies on write, and that is not tried.

    Raises InvalidSpec naming the tensor if a byte is not where it should be.
    """
    with torch.inference_mode():  # where engines make such tensors, and alone may write to them
        trial = _Trial(memory)
        try:
            machine.follow()
            if len(trial.blocks) == 3 and trial.block_size > 1:
                trial.copy(pool)
            if engine is not None and num_host_blocks:
                trial.swap(engine, num_host_blocks)
        finally:
            trial.put_back()


class _Trial:
    def __init__(self, memory: DevicePool) -> None:
        self.tensors = [t for layer in memory.layers for t in layer]
        self.blocks = _BLOCKS[: memory.num_blocks]
        self.block_size = self.tensors[0].shape[1]
        self._kept = [t[: len(self.blocks)].clone() for t in self.tensors]
        self._random = torch.Generator().manual_seed(0)
        self._expected: list[torch.Tensor] = []  # bytes of each tensor's blocks

    def put_back(self) -> None:
        for tensor, kept in zip(self.tensors, self._kept, strict=True):
            tensor[: len(kept)] = kept

    def copy(self, pool: Pool) -> None:
        """Copy-on-write of half a block, and of all but a token."""
        for num_tokens in {max(1, self.block_size // 2), self.block_size - 1}:
            manager = BlockManager(2, block_size=self.block_size, max_batch=2)
            ids = manager.fork(_admit(manager, num_tokens), 2)
            plan = manager.append(ids)
            [(source, target, _)] = plan.copies.tolist()
            copies = torch.from_numpy(plan.copies.copy()).to(self.tensors[0].device)
            self._fill()
            pool.copy_blocks(copies.data_ptr(), len(copies))
            pool.synchronize()
            for expected in self._expected:
                expected[target, :num_tokens] = expected[source, :num_tokens]
            self._compare(f"a copy of {num_tokens} tokens")

    def swap(self, engine: TransferEngine, num_host_blocks: int) -> None:
        """Out, something else in its place, and in again."""
        num_blocks = min(len(self.blocks) - 1, num_host_blocks)
        manager = BlockManager(num_blocks, num_blocks, block_size=self.block_size)
        count = num_blocks * self.block_size
        ids = np.array([_admit(manager, count)])
        self._fill()
        _carry_out(engine, manager, plan_out := manager.swap_out(ids))
        gone = self._expected
        self._compare("a swap out")
        self._fill()
        _carry_out(engine, manager, plan_in := manager.swap_in(ids))
        host = {there: here for here, there, _ in plan_out.copies.tolist()}
        for expected, old in zip(self._expected, gone, strict=True):
            for there, target, _ in plan_in.copies.tolist():
                expected[target] = old[host[there]]
        self._compare("a swap out and in")

    def _fill(self) -> None:
        """Noise in every byte, which another place has by chance only."""
        self._expected = []
        for tensor in self.tensors:
            shape = (len(self.blocks), *tensor.shape[1:3], tensor.shape[3] * tensor.element_size())
            noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=self._random)
            tensor[: len(noise)] = noise.view(tensor.dtype).to(tensor.device)
            self._expected.append(noise)

    def _compare(self, what: str) -> None:
        for i, (tensor, expected) in enumerate(zip(self.tensors, self._expected, strict=True)):
            part = tensor[: len(expected)]
            # Not contiguous(), which leaves any stride to a dimension of one.
            copy = torch.empty(part.shape, dtype=part.dtype, device="cpu").copy_(part)
            found = copy.view(torch.uint8)
            wrong = (found != expected).nonzero().tolist()
            if wrong:
                block, token, head, byte = wrong[0]
                raise InvalidSpec(
                    f"layer {i // 2}'s {'kv'[i % 2]} does not hold what it should after {what}: "
                    f"{len(wrong)} bytes differ, first block {block}, token {token}, head {head}, "
                    f"byte {byte}. Its memory is not what its strides {list(tensor.stride())} say, "
                    "or somebody wrote to it meanwhile"
                )


def _admit(manager: BlockManager, num_tokens: int) -> int:
    sequence = manager.create()
    manager.commit(manager.append(np.array([sequence]), counts=np.array([num_tokens])))
    return sequence


def _carry_out(engine: TransferEngine, manager: BlockManager, plan: TransferPlan) -> None:
    engine.submit(plan)
    engine.wait(plan.id)
    ended: list[tuple[int, str | None, float]] = []
    while not ended:  # more than once on a device that was short of an event
        engine.poll(ended)
    if ended[0][1] is not None:
        raise DeviceError(f"the adopted tensors could not be tried out: {ended[0][1]}")
    manager.complete(plan)
