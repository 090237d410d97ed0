"""Hazards 29 to 34 of docs/hazards.md: the host's memory, events, threads and processes."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

import pagedkv as pk
from hazard_world import World, holds
from pagedkv.testing import SimulatedDevice
from small import state


def test_hazard_29_pageable_memory_makes_copies_block_the_host() -> None:
    """No command waits for a copy, on a machine where nothing ends unless somebody does."""
    with World(device_blocks=16, host_blocks=16) as w:
        device, a, b = w.device, w.admit([1, 2, 3, 4, 5]), w.admit([7, 8, 9])
        shared = w.fork(b, 2)[1]
        w.kv.swap_out([a])
        w.overwrite()  # steps whose blocks the copies still read
        w.kv.swap_in([a])
        w.kv.preempt([b], "swap")
        w.step({shared: [10]})
        w.kv.preempt([shared], "recompute")
        w.resume([b, shared])
        w.fetch(w.create([1, 2, 3, 4, 5, 6]))
        w.kv.poll()
        assert not w.kv.ready([a])
        w.kv.under_way()[-1].cancel()
        w.release(b)
        w.kv.clear()
        assert device.num_pending > 0
        assert device.num_host_waits == 0
        w.kv.under_way()[0].wait()
        assert device.num_host_waits > 0  # so that what blocks would have been counted
        w.forget(i for i in w.texts if w.kv.is_dropped(i))
        w.settle()
        assert w.all_problems() == []


def test_hazard_29_no_command_waits_for_the_host_devices_workers() -> None:
    """Only a step can, that gets a block which a copy uses: its stream is the calling thread."""
    with World(device="cpu", device_blocks=16, host_blocks=16) as w:
        transfers: Any = w.kv._transfers
        a, b = w.admit([1, 2, 3, 4, 5]), w.admit([7, 8, 9])
        for _ in range(50):
            w.kv.swap_out([a, b])
            w.kv.swap_in([b])
            w.kv.swap_in([a])
            w.kv.poll()
        assert transfers.device.num_host_waits == 0
        w.settle()
        assert w.problems == []


def test_hazard_30_tensors_are_freed_before_their_copies_end() -> None:
    w = World()
    a = w.admit([1, 2, 3, 4, 5])
    w.kv.swap_out([a])
    device = w.device
    assert device.num_pending > 0
    del w
    gc.collect()
    device.close()
    assert device.num_pending == device.host_bytes == device.num_events == 0
    assert device.violations == []


def test_hazard_31_an_event_is_recycled_while_somebody_waits_for_it() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3, 4, 5])
        for n in range(12):
            w.kv.swap_out([a])
            w.overwrite()
            w.kv.swap_in([a]).wait()
            w.step({a: [n]} if n < 3 else {}, check=True)
            assert w.device.num_events <= 16  # two of each transfer, at most 8 in flight

    holds(scenario, without="step_after_transfer")


@pytest.mark.parametrize("schedule", ["lazy", "random", "eager"])
@pytest.mark.parametrize("max_events", range(8))
def test_hazard_31_events_run_out(max_events: int, schedule: str) -> None:
    """Typed errors, nothing lost, and what the device took ends, with however few events."""
    device = SimulatedDevice(3, schedule=schedule, max_events=max_events, num_compute_streams=2)
    num_refused, refusals = 0, set()
    with World(device=device, device_blocks=24, host_blocks=24) as w:
        ids = [w.admit([10 * n, 1, 2]) for n in range(6)]
        transfers = []
        for n in range(40):
            device.use_compute_stream(n // 3 % 2)
            for i in ids:
                try:
                    away = w.kv.tier(i) == "host"
                    transfers.append((w.kv.swap_in if away else w.kv.swap_out)([i]))
                    if w.kv.ready([i]):
                        w.step({i: [n]})
                    w.kv.poll()
                except (pk.TransferError, pk.NotResident, pk.OutOfBlocks):
                    num_refused += 1
                except pk.DeviceError as error:
                    refusals.add(str(error))
                w.forget(i for i in ids if w.kv.is_dropped(i))
                w.kv.manager.verify()
        while w.kv.stats().num_transfers:
            with contextlib.suppress(pk.TransferError):
                w.kv.poll()
        w.forget(i for i in ids if w.kv.is_dropped(i))
        assert all(transfer.done for transfer in transfers)
        assert len({transfer.id for transfer in transfers}) == len(transfers)
        assert device.num_events == 0
        if max_events == 0:
            assert all(transfer.error for transfer in transfers)
        device.use_compute_stream(0)
        w.kv.release(ids)
        w.texts.clear()
        w.kv.clear()
        assert (w.kv.stats().device.num_free, w.kv.stats().host.num_free) == (24, 24)
    assert num_refused > 0 or max_events > 2
    assert all("event" in refusal for refusal in refusals)
    assert w.all_problems() == []
    assert device.host_bytes == device.num_events == device.num_pending == 0


def test_hazard_32_another_thread_or_another_device() -> None:
    def work(w: World, first: int) -> None:
        a = w.admit(range(first, first + 5))
        w.kv.swap_out([a])
        w.overwrite()
        w.kv.swap_in([a]).wait()
        w.settle()

    with World() as one, World(schedule="random") as two:
        threads = [threading.Thread(target=work, args=x) for x in ((one, 1), (two, 101))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        for w in (one, two):
            assert len(w.texts) == 1
            assert w.all_problems() == []


def test_hazard_33_locks_and_probes_that_change_what_they_look_at() -> None:
    with World(device="cpu") as w:
        a, b = w.admit([1, 2, 3, 4, 5]), w.admit([1, 2, 3, 9])
        w.kv.swap_out([b])
        w.kv.swap_in([b]).wait()  # so that the host has hits
        before = state(w.kv.manager)
        w.kv.lookup([1, 2, 3, 4, 5])
        w.kv.ready([a])
        w.kv.tier(b)
        w.kv.length(b)
        w.kv.num_freed([a])
        w.kv.num_needed([a], [7])
        w.kv.block_table(a)
        w.kv.stats()
        w.kv.verify()
        w.kv.poll()
        assert state(w.kv.manager) == before


def swap_for_ever(kv: pk.KVCache, i: int, until: threading.Event) -> None:
    while not until.is_set():
        (kv.swap_out if kv.tier(i) == "device" else kv.swap_in)([i]).wait()


def poll_for_ever(kv: pk.KVCache, i: int, until: threading.Event) -> None:
    while not until.is_set():
        kv.poll()
        kv.ready([i])


def step_for_ever(kv: pk.KVCache, i: int, until: threading.Event) -> None:
    while not until.is_set():
        with kv.step([i], [7]):
            pass
        kv.truncate([i], [2])


def close_at_once(kv: pk.KVCache, i: int, until: threading.Event) -> None:
    time.sleep(0.02)
    kv.close()
    until.set()


@pytest.mark.parametrize("work", [swap_for_ever, poll_for_ever, step_for_ever])
@pytest.mark.parametrize("other", [swap_for_ever, poll_for_ever, step_for_ever, close_at_once])
def test_hazard_33_two_threads_that_work_and_wait(work: Any, other: Any) -> None:
    """Nobody waits for the other; who comes second meets a typed error, and all can be closed."""
    spec = pk.KVSpec(1, 1, 64, "float32", 16)  # copies are long enough to be waited for
    kv = pk.KVCache(spec, num_device_blocks=600, num_host_blocks=600)
    ids = [kv.create([]) for _ in range(2)]
    with kv.step(ids, np.arange(8000, dtype=np.int64), counts=[4000, 4000]):
        pass
    until, met = threading.Event(), []

    def run(what: Any, i: int) -> None:
        while not until.is_set():
            try:
                what(kv, i, until)
            except (pk.ConcurrentUse, pk.InvalidState, pk.NotResident, pk.OutOfBlocks):
                pass
            except BaseException as error:
                if "the cache was closed before its end" not in str(error):
                    met.append(error)

    threads = [threading.Thread(target=run, args=x) for x in ((work, ids[0]), (other, ids[1]))]
    faulthandler.dump_traceback_later(60, exit=True)  # the watchdog: a deadlock is told
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads take turns in the midst of Python code
    try:
        for thread in threads:
            thread.start()
        time.sleep(0.15)
        until.set()
        for thread in threads:
            thread.join()
        kv.close()
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.setswitchinterval(interval)
    assert met == []


def from_another_thread(call: Any) -> list[BaseException]:
    """What the call raised there."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return raised


class Meddled:
    """A manager; whoever calls `command` is met there by another thread."""

    def __init__(self, manager: pk.BlockManager, command: str, meanwhile: Any) -> None:
        self._manager = manager
        self._command = command
        self._meanwhile = meanwhile
        self.raised: list[BaseException] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._manager, name)
        if name != self._command:
            return found

        def met(argument: Any) -> Any:
            self.raised += from_another_thread(self._meanwhile)
            return found(argument)

        return met


@pytest.mark.parametrize("call", ["poll", "done", "wait", "cancel", "swap", "close"])
@pytest.mark.parametrize("command", ["complete", "swap_out"])
def test_hazard_33_another_thread_comes_between_engine_and_manager(command: str, call: str) -> None:
    """It is refused, so that no end is told twice and no plan is left without a transfer."""
    with World() as w:
        a, b, c = w.admit([1, 2, 3]), w.admit([11, 12]), w.admit([21])
        first = w.kv.swap_out([a])
        calls = {
            "poll": w.kv.poll,
            "done": lambda: first.done,
            "wait": first.wait,
            "cancel": first.cancel,
            "swap": lambda: w.kv.swap_out([c]),
            "close": w.kv.close,
        }
        transfers: Any = w.kv._transfers
        honest = w.kv.manager
        meddled: Any = Meddled(honest, command, calls[call])
        transfers._manager = w.kv.manager = meddled
        second = w.kv.swap_out([b])
        second.wait()
        first.wait()
        transfers._manager = w.kv.manager = honest
        assert meddled.raised
        assert {type(error) for error in meddled.raised} == {pk.ConcurrentUse}
        assert not first.error
        assert not second.error
        w.kv.swap_in([a, b]).wait()
        w.settle()
        assert w.all_problems() == []


SCRIPT = """
import os
import pagedkv as pk
kv = pk.KVCache(pk.KVSpec(1, 1, 4, "float32", 2), device={device}, num_device_blocks=8,
                num_host_blocks=8)
a = kv.create([1, 2, 3])
with kv.step([a], [1, 2, 3], counts=[3]):
    pass
transfer = kv.swap_out([a])
{then}
"""
SIMULATED = "pk._core.SimulatedDevice(0, schedule='lazy')"
FORK = """
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    transfer.wait()
"""


@pytest.mark.parametrize("device", ["'cpu'", SIMULATED])
@pytest.mark.parametrize("then", ["", "kv.close()", FORK], ids=["exit", "close", "fork"])
def test_hazard_34_the_process_ends_with_copies_in_flight(device: str, then: str) -> None:
    script = SCRIPT.format(device=device, then=then)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
