"""Two caches on two devices in one process: heads split over them, one scheduler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda  # noqa: E402

BLOCKS, HOST_BLOCKS = 30, 30


class Shards:
    """Two devices with a head each, and one with both, which the two are compared to."""

    def __init__(self, seed: int, adopt: bool) -> None:
        self.cuda = SimulatedCuda(seed, num_devices=2)
        self.devices = [CudaDevice(self.cuda, i, copy_method="batch") for i in range(2)]
        self.manager = pk.BlockManager(BLOCKS, HOST_BLOCKS, block_size=4, max_batch=8)
        options: dict[str, Any] = {"num_host_blocks": HOST_BLOCKS, "max_batch": 8}
        self.shards = []
        for device in self.devices:
            pool: dict[str, Any] = {"num_device_blocks": BLOCKS, "layout": "layer_major"}
            if adopt:  # as FlashInfer has them
                tensors = [torch.zeros(BLOCKS + 1, 2, 4, 1, 8) for _ in range(2)]
                pool = {"tensors": [(t[:, 0], t[:, 1]) for t in tensors]}
            spec = pk.KVSpec(2, 1, 8, "float32", 4)
            self.shards.append(pk.KVCache(spec, device=device, **pool, **options))
        whole = pk.KVSpec(2, 2, 8, "float32", 4)
        self.whole = pk.KVCache(whole, num_device_blocks=BLOCKS, **options)
        self.random = torch.Generator().manual_seed(seed)
        self.ids: Any = np.zeros(0, np.int64)

    def close(self) -> None:
        for kv in (*self.shards, self.whole):
            kv.close()
        for device in self.devices:
            device.close()

    def step(self, ids: Any, count: int) -> None:
        """Layer by layer, now on this device, now on that one."""
        plan = self.manager.append(ids, counts=[count] * len(ids))
        steps = [kv.apply(plan) for kv in (*self.shards, self.whole)]
        for step in steps:
            assert step.block_tables.tolist() == plan.block_tables.tolist()
            assert step.slots.tolist() == plan.slots.tolist()
        total = count * len(ids)
        for layer in range(2):
            q, k, v = (torch.randn(total, h, 8, generator=self.random) for h in (4, 2, 2))
            outputs = []
            for rank, kv in enumerate(self.shards):
                kv.write(layer, k[:, rank : rank + 1], v[:, rank : rank + 1], steps[rank])
            for rank, kv in enumerate(self.shards):
                mine = q[:, 2 * rank : 2 * rank + 2]
                outputs.append(kv.attention(layer, mine, steps[rank]).clone())
            self.whole.write(layer, k, v, steps[2])
            expected = self.whole.attention(layer, q, steps[2])
            torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-5, rtol=1e-5)
        for step in steps:
            step.commit()
        self.manager.commit(plan)

    def move(self, plan: Any) -> None:
        for transfer in [kv.apply(plan) for kv in (*self.shards, self.whole)]:
            transfer.wait()
        self.manager.complete(plan)

    def check(self) -> None:
        for kv in self.shards:
            kv.machine.land()
        for i in self.ids:
            table, length = self.manager.block_table(int(i)), self.manager.length(int(i))
            for layer in range(2):
                for part in ("k", "v"):
                    found, right = (
                        torch.cat([getattr(kv, part)(layer)[table] for kv in caches], 2)
                        for caches in (self.shards, [self.whole])
                    )
                    assert torch.equal(*(t.flatten(0, 1)[:length] for t in (found, right)))


@pytest.fixture(params=[False, True], ids=["own", "adopted"])
def shards(request: pytest.FixtureRequest) -> Iterator[Shards]:
    shards = Shards(11, request.param)
    before = [kv.machine.device for kv in shards.shards]
    assert [d.index for d in shards.devices] == [0, 1]
    yield shards
    assert shards.cuda.violations == []
    assert before == [kv.machine.device for kv in shards.shards]
    shards.close()
    assert shards.cuda.num_live == 0


def test_heads_on_two_devices_are_one_cache(shards: Shards) -> None:
    manager = shards.manager
    shards.ids = np.array([manager.create()])
    shards.step(shards.ids, 6)
    shards.ids = manager.fork(int(shards.ids[0]), 4)
    for n in range(12):
        shards.step(shards.ids, 1)
        if n % 3 == 2:
            manager.reorder(shards.ids, [1, 1, 3, 0])
        if n % 4 == 3:
            shards.move(manager.swap_out(shards.ids))
            other = manager.create()
            shards.step([other], 25)  # where they were
            manager.release([other])
            shards.move(manager.swap_in(shards.ids))
        shards.check()
    assert manager.stats().num_copies > 3
    manager.verify()


def test_a_failure_on_one_device_is_not_the_others(shards: Shards) -> None:
    manager = shards.manager
    shards.ids = np.array([manager.create()])
    shards.step(shards.ids, 9)
    plan = manager.swap_out(shards.ids)
    shards.cuda.fail("cudaMemcpyBatchAsync", 2)  # the next one, on whichever device
    ends = []
    for kv in shards.shards:
        transfer = kv.apply(plan)
        with contextlib.suppress(pk.TransferError):
            transfer.wait()
        ends.append(transfer.error is None)
    assert ends == [False, True]
    assert manager.abort(plan).sequences.tolist() == shards.ids.tolist()
    manager.verify()


def test_the_same_block_numbers_mean_each_devices_own_blocks() -> None:
    """Two managers, whose sequences stand in equal blocks of two devices."""
    cuda = SimulatedCuda(3, num_devices=2)
    spec = pk.KVSpec(1, 1, 4, "float32", 4)
    caches = [
        pk.KVCache(spec, device=CudaDevice(cuda, i), num_device_blocks=8, num_host_blocks=8)
        for i in range(2)
    ]
    sequences = [kv.create() for kv in caches]
    for n in range(10):
        for rank, (kv, seq) in enumerate(zip(caches, sequences, strict=True)):
            with kv.step([seq]) as step:
                k = torch.full((1, 1, 4), 100.0 * rank + n)
                kv.write(0, k, -k, step)
            if n % 4 == 3:
                kv.swap_out([seq])
        for kv, seq in zip(caches, sequences, strict=True):
            if n % 4 == 3:
                kv.swap_in([seq]).wait()
    assert np.array_equal(*(kv.block_table(s) for kv, s in zip(caches, sequences, strict=True)))
    for rank, (kv, seq) in enumerate(zip(caches, sequences, strict=True)):
        kv.machine.land()
        held = kv.k(0)[kv.block_table(seq)].flatten(0, 1)[:10, 0, 0]
        assert held.tolist() == [100.0 * rank + n for n in range(10)]
        kv.close()
    assert cuda.violations == []
