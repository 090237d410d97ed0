"""An interrupt (Ctrl-C) between any two lines of pagedkv leaves a cache that works.

Each command is run again and again, with the interrupt one line further on each time.
"""

from __future__ import annotations

import gc
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from linecache import getline
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda, SimulatedDevice  # noqa: E402

PACKAGE = str(Path(pk.__file__).parent)
SPEC = pk.KVSpec(1, 1, 8, "float32", 4)
DEVICES: dict[str, Callable[[], Any]] = {
    "cpu": lambda: "cpu",
    "simulated": lambda: SimulatedDevice(0, schedule="lazy"),
    "cuda": lambda: CudaDevice(SimulatedCuda(0, schedule="lazy")),
}
OTHERS: list[int] = []  # sequences that a command below makes for itself


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line of pagedkv that is run.

    Not where Python has none come: between the end of a `with` block and its __exit__. Nor while
    the collector finalizes older caches, where Python would lose it.
    """

    def __init__(self, n: int) -> None:
        self.left = n
        self.lines: dict[FrameType, int] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and self.left > 0:
            before, self.lines[frame] = self.lines.get(frame, 0), frame.f_lineno
            text = getline(frame.f_code.co_filename, frame.f_lineno).strip()
            self.left -= not (before > frame.f_lineno and text.startswith("with "))
            if self.left == 0:
                self.lines.clear()
                raise KeyboardInterrupt
        return self

    def run(self, work: Callable[[], object]) -> bool:
        """Whether the interrupt came before `work` had ended."""
        before = sys.gettrace()
        gc.disable()
        sys.settrace(self)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
            gc.enable()
        return self.left == 0


def at_each_line() -> Iterator[Interrupt]:
    """One line further on each time, until the work had ended before the interrupt came."""
    for n in range(1, 10_000):
        interrupt = Interrupt(n)  # if a test fails: n is the line
        yield interrupt
        if interrupt.left > 0:
            return
    pytest.fail("there is no end to it")


def cache_on(device: str) -> pk.KVCache:
    return pk.KVCache(SPEC, device=DEVICES[device](), num_device_blocks=12, num_host_blocks=12)


def step(kv: pk.KVCache, ids: Any) -> None:
    with kv.step(ids, [1] * len(ids)) as open_step:
        k = torch.ones(len(ids), 1, 8)
        kv.write(0, k, k, open_step)


def swap(kv: pk.KVCache, ids: Any) -> None:
    kv.swap_out(ids).wait()
    kv.swap_in(ids).wait()


def chain(kv: pk.KVCache, ids: Any) -> None:
    """Transfers that wait for those before them."""
    kv.swap_out(ids)
    back = [kv.swap_in(ids[:1]), kv.swap_in(ids[1:])]
    again = kv.swap_out(ids[:1])
    for transfer in (*back, again):
        transfer.wait()
    kv.resume(ids)
    kv.wait(ids)


def crowded(kv: pk.KVCache, ids: Any) -> None:
    """Steps that take the blocks of transfers that are still under way."""
    kv.swap_out(ids[:1])
    kv.swap_out(ids[1:])
    OTHERS[:] = [kv.create()]
    with kv.step(OTHERS, [1] * 44, counts=[44]):
        pass
    kv.release(OTHERS)
    back = kv.swap_in(ids[1:])
    kv.resume(ids)
    back.wait()
    kv.wait(ids)


def cancel(kv: pk.KVCache, ids: Any) -> None:
    out = kv.swap_out(ids)
    out.cancel()
    with suppress(pk.TransferError):
        out.wait()
    kv.resume(ids)


def recompute(kv: pk.KVCache, ids: Any) -> None:
    kv.preempt(ids, mode="recompute")
    kv.resume(ids)


def beside(kv: pk.KVCache, ids: Any) -> None:
    """A transfer that ends while a step is open."""
    out = kv.swap_out(ids[:1])
    step(kv, ids[1:])
    while not out.done:
        kv.poll()
    kv.resume(ids[:1])
    kv.wait(ids[:1])


@pytest.mark.parametrize("device", list(DEVICES))
@pytest.mark.parametrize("work", [step, swap, chain, crowded, cancel, recompute, beside])
def test_a_cache_that_was_interrupted_works(work: Callable[..., None], device: str) -> None:
    for interrupt in at_each_line():
        with cache_on(device) as kv:
            ids = np.array([kv.create([5, 6, 7, s]) for s in range(2)])
            with kv.step(ids, [5, 6, 7, 0, 5, 6, 7, 1], counts=[4, 4]):
                pass
            interrupt.run(lambda: work(kv, ids))  # noqa: B023
            kv.rollback()
            usable(kv, ids)


@pytest.mark.parametrize("device", list(DEVICES))
def test_a_worker_that_was_interrupted_carries_out_all_of_it(device: str) -> None:
    """It applies again what it cannot know to have applied; a plan that it has, it says so of."""

    def apply(kv: pk.KVCache, plan: Any) -> None:
        if isinstance(plan, pk.StepPlan):
            with kv.apply(plan) as open_step:
                k = torch.arange(plan.num_tokens * 8.0).reshape(-1, 1, 8)
                kv.write(0, k, k, open_step)
        else:
            kv.apply(plan).wait()

    for interrupt in at_each_line():
        manager = pk.BlockManager(12, 12, block_size=4)
        id = manager.create([5, 6, 7, 8, 9])
        with cache_on(device) as kv:
            came = False
            for command in ("step", "swap_out", "swap_in", "step"):
                if command == "step":
                    plan: Any = manager.append([id], [5, 6, 7, 8, 9], [5])
                else:
                    plan = getattr(manager, command)([id])
                value = pickle.loads(pickle.dumps(plan))
                if not came and interrupt.run(lambda: apply(kv, value)):  # noqa: B023
                    came = True
                    kv.rollback()
                    with suppress(pk.InvalidState):
                        apply(kv, value)
                elif came:
                    apply(kv, value)
                while kv.under_way() or kv.poll():
                    kv.poll()
                manager.commit(plan) if command == "step" else manager.complete(plan)
            with kv.apply(manager.append([id], [1])) as open_step:
                keys = kv.gather(0, open_step)[0][0, 0, :, 0].tolist()
            assert keys[:10] == [0, 8, 16, 24, 32] * 2


@pytest.mark.parametrize("device", list(DEVICES))
def test_a_close_that_was_interrupted_is_done_by_the_next(device: str) -> None:
    for interrupt in at_each_line():
        kv = cache_on(device)
        ids = [kv.create(), kv.create()]
        step(kv, ids)
        out, open_step = kv.swap_out(ids[:1]), kv.step(ids[1:], [2])
        interrupt.run(kv.close)
        kv.close()
        assert out.done
        assert not open_step.is_open
        with pytest.raises(pk.InvalidState, match="this cache is closed"):
            kv.create()


def test_rows_that_were_interrupted_work() -> None:
    """PagedCache's rows, as a model's layers call it; reset() is all that is needed."""
    pytest.importorskip("transformers")
    from pagedkv.integrations.transformers import PagedCache

    def forward(cache: Any, batch: int, count: int) -> Any:
        k = torch.arange(batch * count * 8.0).reshape(batch, 1, count, 8)
        return cache.update(k, k, 0)[0]

    def work(cache: Any) -> None:
        forward(cache, 1, 5)
        forward(cache, 2, 1)  # forks
        cache.reorder_cache(torch.tensor([1, 1]))
        forward(cache, 2, 1)
        cache.crop(6)

    for interrupt in at_each_line():
        with pk.KVCache(SPEC, num_device_blocks=12) as kv:
            cache = PagedCache(kv)
            interrupt.run(lambda: work(cache))  # noqa: B023
            cache.reset()
            assert kv.stats().device.num_active == 0
            forward(cache, 2, 5)
            keys = forward(cache, 2, 1)
            assert keys[0, 0, :, 0].tolist() == [0, 8, 16, 24, 32, 0]
            cache.reset()
            kv.verify()


def usable(kv: pk.KVCache, ids: Any) -> None:
    """All that was begun comes to an end, and all commands do what they do in a new cache."""
    with suppress(pk.UnknownSequence):
        kv.release(OTHERS)
    OTHERS.clear()
    for id in ids.tolist():
        with suppress(pk.TransferError):
            kv.wait([id])
    with suppress(pk.TransferError):
        kv.poll()
    for transfer in kv.under_way():
        with suppress(pk.TransferError):
            transfer.wait()
    for _ in range(3):  # what failed is told once
        with suppress(pk.TransferError):
            kv.poll()
    assert kv.under_way() == []
    kv.verify()
    for id in ids.tolist():  # each is where it was, or dropped, or on the host
        kv.resume([id])
        kv.wait([id])
    lens = [kv.length(id) for id in ids.tolist()]
    assert all(0 <= length <= 5 for length in lens)
    for work in (step, swap, recompute):
        work(kv, ids)
    kv.release(ids)
    kv.clear()
    stats = kv.stats()
    assert (stats.device.num_active, stats.host.num_active) == (0, 0)
    kv.verify()
