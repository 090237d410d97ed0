"""A machine that fails: typed errors, once, and a cache that goes on or closes."""

from __future__ import annotations

import gc
import os
import threading

import pytest

import pagedkv as pk
from hazard_world import World
from pagedkv.testing import SimulatedDevice

SPEC = pk.KVSpec(2, 1, 4, "float32", 2)


def test_host_memory_that_cannot_be_had() -> None:
    device = SimulatedDevice()
    device.fail_allocate()
    with pytest.raises(pk.DeviceError, match="no host memory"):
        World(device=device)
    with World(device=device) as w:  # the next one is to be had
        w.admit([1, 2, 3])
    assert device.host_bytes == 0
    # Refused by the machine, or by the arithmetic before it; typed either way.
    with pytest.raises((pk.DeviceError, pk.InvalidSpec)):
        pk.KVCache(SPEC, num_device_blocks=4, host_memory=1 << 60)


@pytest.mark.parametrize("ask", ["poll", "wait"])
@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_failed_copy_is_told_once_and_leaks_nothing(ask: str, direction: str) -> None:
    with World() as w:
        a = w.admit([1, 2, 3, 4, 5]) if direction == "out" else w.admit_on_host([1, 2, 3, 4, 5])
        w.device.fail_copy()
        transfer = (w.kv.swap_out if direction == "out" else w.kv.swap_in)([a])
        while not transfer.done:
            pass
        with pytest.raises(pk.TransferError, match="failed half-way"):
            w.kv.poll() if ask == "poll" else transfer.wait()
        assert w.kv.poll() == []
        transfer.wait()
        assert transfer.dropped == (a,)
        w.forget([a])
        assert w.kv.resume([a]).tolist() == [4]
        w.texts[a].hold(4)
        while not w.kv.ready([a]):
            w.kv.poll()
        w.step({a: [5]}, check=True)
        w.release(a)
        w.kv.clear()
        stats = w.kv.stats()
        assert stats.device.num_free == stats.host.num_free == 8
        assert w.all_problems() == []


def test_a_lost_device() -> None:
    w = World()
    a, b = w.admit([1, 2, 3]), w.admit([4, 5, 6])
    transfer = w.kv.swap_out([a])
    w.device.lose()
    with pytest.raises(pk.TransferError, match="lost"):
        transfer.wait()
    with pytest.raises(pk.DeviceError, match="lost"):
        w.kv.step([b], [7])
    assert w.kv.length(b) == 3
    refused = w.kv.swap_out([b])
    with pytest.raises(pk.TransferError, match="lost"):
        w.kv.poll()
    assert refused.dropped == (b,)
    w.kv.manager.verify()
    w.kv.close()
    assert w.device.host_bytes == 0


def test_cancel_before_and_after_the_copies_began() -> None:
    with World(device_blocks=12, host_blocks=12) as w:
        ids = [w.admit([n]) for n in range(10)]
        transfers = [w.kv.swap_out([i]) for i in ids]
        assert not transfers[0].cancel()
        assert transfers[9].cancel()
        assert transfers[9].dropped == (ids[9],)
        while w.kv.stats().num_transfers:
            w.kv.poll()  # raises nothing: it was asked for
        assert w.kv.stats().host.num_active == 9
        w.kv.manager.verify()


def test_an_exception_in_the_callers_step() -> None:
    with World() as w:
        a = w.admit([1, 2, 3])
        w.kv.swap_out([w.admit([11, 12, 13])])
        with pytest.raises(ZeroDivisionError), w.kv.step([a], [4]):
            raise ZeroDivisionError
        assert w.kv.length(a) == 3
        w.step({a: [4]}, check=True)
        w.settle()
        assert w.all_problems() == []


def test_close_twice_and_use_after() -> None:
    w = World()
    a = w.admit([1, 2, 3])
    transfer = w.kv.swap_out([a])
    w.kv.close()
    w.kv.close()
    for call in (
        lambda: w.kv.create([1]),
        lambda: w.kv.step([a], [1]),
        lambda: w.kv.swap_in([a]),
        lambda: w.kv.ready([a]),
        lambda: w.kv.k(0),
    ):
        with pytest.raises(pk.InvalidState, match="closed"):
            call()
    assert transfer.done
    with pytest.raises(pk.TransferError, match="closed"):
        transfer.wait()
    assert w.device.num_pending == w.device.num_events == 0


def test_an_unclosed_cache_is_collected_with_copies_in_flight() -> None:
    w = World()
    w.kv.swap_out([w.admit([1, 2, 3])])
    device = w.device
    del w
    gc.collect()
    assert device.host_bytes == device.num_events == 0
    assert device.violations == []


def test_a_forked_child_leaves_its_parents_copies_alone() -> None:
    with World(device="cpu") as w:
        a = w.admit([1, 2, 3, 4, 5])
        transfer = w.kv.swap_out([a])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with pytest.raises(pk.NotResident):  # copies count as failed here: it is dropped
                    w.kv.swap_in([a]).wait()
                with pytest.raises(pk.NotResident):
                    w.kv.step([a], [9])
                w.kv.close()  # forgets
                w.kv.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        transfer.wait()
        w.overwrite()
        w.kv.swap_in([a]).wait()
        w.read(a)
        assert w.problems == []


def test_two_threads_at_once() -> None:
    """One works; what the other meets is ConcurrentUse, or nothing."""
    with World() as w:
        a, found = w.admit([1, 2, 3]), []

        def look() -> None:
            for _ in range(300):
                try:
                    w.kv.manager.lookup([1, 2, 3])
                except BaseException as error:
                    found.append(error)

        other = threading.Thread(target=look)
        other.start()
        for _ in range(20):
            try:
                w.kv.swap_out([a]).wait()
                w.kv.swap_in([a]).wait()
            except pk.ConcurrentUse:
                break
        other.join(30)
        assert not other.is_alive()
        assert [e for e in found if not isinstance(e, pk.ConcurrentUse)] == []
