"""How transfers end for those who hold one: told once, lost never, and no loop left waiting."""

from __future__ import annotations

import time
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from hazard_world import World  # noqa: E402
from pagedkv.preemption import PreemptRequest  # noqa: E402


def test_wait_tells_of_a_cancelled_transfer_and_poll_does_not() -> None:
    with World(device_blocks=40, host_blocks=40) as world:
        ids = [world.admit([100 + n]) for n in range(12)]
        last = [world.kv.swap_out([i]) for i in ids][-1]
        assert last.cancel()
        while world.kv.stats().num_transfers:
            world.kv.poll()
        with pytest.raises(pk.TransferError, match="cancelled"):
            last.wait()
        last.wait()


def test_wait_tells_of_a_transfer_that_needed_one_that_failed() -> None:
    with World() as world:
        a = world.admit([1, 2, 3])
        world.device.fail_copy()
        out, back = world.kv.swap_out([a]), world.kv.swap_in([a])
        with pytest.raises(pk.TransferError, match="void"):
            back.wait()
        with pytest.raises(pk.TransferError, match="failed half-way"):
            world.kv.poll()
        assert world.kv.poll() == []
        out.wait()
        world.kv.manager.verify()


def test_ends_wait_for_a_step_that_is_open_on_the_manager_itself() -> None:
    """Of which no cache is told: to look never raises and never blocks, and wait() says why not."""
    with World(schedule="eager") as world:
        a, b = world.admit([1, 2, 3]), world.create([9])
        out = world.kv.swap_out([a])
        plan = world.kv.manager.append([b], [9])
        assert world.kv.manager.open_step == plan.step
        assert world.kv.poll() == []
        assert not out.done
        assert not world.kv.ready([a])
        with pytest.raises(pk.InvalidState, match="a step is open"):
            out.wait()
        assert world.kv.stats().num_transfers == 1
        world.kv.manager.rollback(plan)
        assert world.kv.manager.open_step == 0
        assert world.kv.poll() == [out]
        assert world.kv.stats().num_transfers == 0


def test_an_end_that_the_manager_refuses_is_told_again() -> None:
    """As another thread has entered it since the cache asked."""

    class Refusing:
        open_step = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(manager, name)

        def complete(self, transfer: int) -> None:
            raise pk.ConcurrentUse("another thread is inside")

    with World(schedule="eager") as world:
        manager, out = world.kv.manager, world.kv.swap_out([world.admit([1, 2, 3])])
        transfers: Any = world.kv._transfers
        transfers._manager = Refusing()
        with pytest.raises(pk.ConcurrentUse):
            world.kv.poll()
        assert world.kv.stats().num_transfers == 1
        transfers._manager = manager
        assert world.kv.poll() == [out]
        assert world.kv.stats().num_transfers == 0


def test_close_ends_what_is_under_way_for_its_holders() -> None:
    world = World()
    out = world.kv.swap_out([world.admit([1, 2, 3])])
    world.kv.close()
    assert out.done
    with pytest.raises(pk.TransferError, match="closed"):
        out.wait()
    assert world.device.violations == []
    assert world.device.num_events == 0


def test_a_close_that_is_refused_leaves_the_cache_open() -> None:
    kv = pk.KVCache(pk.KVSpec(1, 1, 4, "float32", 2), num_device_blocks=4, num_host_blocks=4)
    assert kv._transfers is not None
    with kv._transfers.alone(), pytest.raises(pk.ConcurrentUse):  # as another thread is
        kv.close()
    kv.release([kv.create([1])])
    kv.close()
    with pytest.raises(pk.InvalidState, match="closed"):
        kv.create([1])


def test_seconds_are_those_of_the_copies_however_late_somebody_looks() -> None:
    spec = pk.KVSpec(num_layers=2, num_kv_heads=2, head_dim=64, dtype="float32", block_size=16)
    asked = []

    def cost_model(request: PreemptRequest) -> Literal["swap"]:
        asked.append(request)
        return "swap"

    with pk.KVCache(spec, num_device_blocks=64, num_host_blocks=64, cost_model=cost_model) as kv:
        a = kv.create([])
        with kv.step([a], [7] * 1000, counts=[1000]):
            pass
        out = kv.swap_out([a])
        time.sleep(0.2)
        out.wait()
        assert out.ended is not None
        assert out.seconds is not None
        assert 0 < out.seconds <= out.ended - out.begun - 0.1
        back = kv.swap_in([a])
        back.wait()
        assert back.seconds
        kv.preempt([a])
        assert asked[0].out_bandwidth == pytest.approx(out.num_bytes / out.seconds, rel=1e-3)
        assert asked[0].in_bandwidth == pytest.approx(back.num_bytes / back.seconds, rel=1e-3)


def test_a_device_without_a_clock_tells_no_seconds() -> None:
    with World() as world:
        out = world.kv.swap_out([world.admit([1, 2, 3])])
        out.wait()
        assert out.seconds is None
        assert world.kv._transfers is not None
        assert world.kv._transfers.bandwidth("out") is not None
        assert world.kv._transfers.bandwidth("in") is None
