"""Hazards 13, 14, 16 to 21, 24 to 28 of docs/hazards.md: names, streams, ends and failures."""

from __future__ import annotations

import contextlib
import itertools
import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from hazard_world import NUM_LAYERS, World, holds  # noqa: E402
from pagedkv.testing import SimulatedDevice  # noqa: E402

COMPUTE = "transfer_after_compute"
STEP = "step_after_transfer"
STREAM = "stream_after_stream"


def failing(w: World, transfer: pk.Transfer) -> None:
    """Wait for a transfer, whose copy fails; keep the texts up to date."""
    with pytest.raises(pk.TransferError, match="a copy failed half-way"):
        transfer.wait()
    w.forget(transfer.dropped)


# ------------------------------------------------------------------ names of blocks and sequences


def test_hazard_13_device_block_host_block_and_another_caches_block_have_one_number() -> None:
    for schedule in ("eager", "lazy", "random"):
        device = SimulatedDevice(1, schedule=schedule)
        with World(device=device) as one, World(device=device) as two:
            worlds = (one, two)
            ids = [w.admit([10 * n + t for t in range(5)]) for n, w in enumerate(worlds)]
            assert ids[0] == ids[1]
            first, second = (w.kv.swap_out([i]) for w, i in zip(worlds, ids, strict=True))
            assert first.id == second.id  # transfers are numbered alike, too
            for w in worlds:
                # Device blocks went to the host blocks of the same numbers.
                nodes = w.kv.manager.snapshot()
                pairs = zip(nodes.blocks.tolist(), nodes.host_blocks.tolist(), strict=True)
                assert {b for b, h in pairs if b > 0 and b == h}
                w.overwrite()
            for w, i in zip(worlds, ids, strict=True):
                w.kv.swap_in([i]).wait()
                w.read(i)
                w.settle()
                assert w.all_problems() == []


def test_hazard_14_an_admission_evicts_what_it_is_going_to_hit() -> None:
    def on_the_device(w: World) -> None:
        w.release(w.admit([1, 2, 3, 4, 5, 6]))
        b = w.create([1, 2, 3, 4, 5, 6, 7, 8])  # three of its blocks are cached, one is free
        assert w.kv.num_cached(b) == 6
        w.step({b: [7, 8]}, check=True)
        with pytest.raises(pk.OutOfBlocks):
            w.step({b: [9]})
        w.read(b)

    holds(on_the_device, device_blocks=4, max_model_len=12)

    def out_of_the_device(w: World) -> None:
        a = w.admit_on_host([1, 2, 3, 4])
        w.kv.swap_in([a]).wait()  # its two blocks stay cached on the host, which has one more
        b = w.admit([8, 8])
        transfer = w.kv.swap_out([b, a])
        assert transfer.num_bytes == w.kv.spec.block_bytes
        transfer.wait()
        w.overwrite()
        w.kv.swap_in([a, b]).wait()
        w.read(a, b)

    holds(out_of_the_device, host_blocks=3)

    def into_the_device(w: World) -> None:
        a = w.admit_on_host([1, 2, 3, 4, 5, 6, 7])
        w.release(a)
        w.release(w.admit([1, 2, 3, 4]))  # two of the four cached on the device
        b = w.create([1, 2, 3, 4, 5, 6, 7, 8])
        w.fetch(b).wait()
        w.step({b: w.texts[b].rest}, check=True)

    holds(into_the_device, device_blocks=4)


def test_hazard_16_preempted_while_its_next_step_is_queued() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3, 4, 5])
        w.device.hold_next()
        w.step({a: [6]})
        w.kv.preempt([a], "swap").wait()
        w.overwrite()
        w.resume([a])
        while not w.kv.ready([a]):
            w.kv.poll()
        w.step({a: [7]}, check=True)

    holds(scenario, without=COMPUTE)
    with World() as w:
        a = w.admit([1, 2, 3])
        with w.kv.step([a], [4]), pytest.raises(pk.InvalidState, match="is open"):
            w.kv.preempt([a], "swap")


# ------------------------------------------------------------------ streams and buffers


def test_hazard_17_a_sequence_moves_to_another_stream() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3])
        for n, stream in enumerate((1, 2, 1, 0, 2)):
            w.device.use_compute_stream(stream)
            w.device.hold_next()
            w.step({a: [10 + n]}, check=stream == 2)
        w.read(a)

    holds(scenario, without=STREAM, num_compute_streams=3)


@pytest.mark.parametrize("streams", list(itertools.product(range(3), repeat=3)))
def test_hazard_18_streams_of_every_kind(streams: tuple[int, int, int]) -> None:
    """Here there is one kind, in any number; the engine asks which is current at every call."""
    written, swapped, back = streams

    def scenario(w: World) -> None:
        w.device.use_compute_stream(written)
        a = w.admit([1, 2, 3, 4, 5])
        w.device.use_compute_stream(swapped)
        w.kv.swap_out([a])
        w.overwrite()
        w.device.use_compute_stream(back)
        w.kv.swap_in([a]).wait()
        w.step({a: [6]}, check=True)

    crossing = written != swapped
    holds(scenario, without=STREAM if crossing else COMPUTE, num_compute_streams=3)
    with pytest.raises(pk.InvalidSpec, match="no such stream"):
        SimulatedDevice(num_compute_streams=3).use_compute_stream(3)


def test_hazard_19_a_descriptor_is_rewritten_before_its_upload_ran() -> None:
    """The plan's buffers and the caller's tensors are read when the work is queued, not later."""

    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3])
        b = w.fork(a, 2)[1]
        w.device.hold_next()
        with w.kv.step([b], [4]) as step:
            plan = step.plan
            new = w.appended(b, [4])
            part = torch.frombuffer(bytearray(new.digests[-1]), dtype=torch.float32)
            rows = part.view(NUM_LAYERS, 2, 1, 1, 4)
            for layer in range(NUM_LAYERS):
                w.kv.write(layer, rows[layer, 0], rows[layer, 1], step)
            rows.zero_()
        w.texts[b] = new
        w.admit([21, 22, 23, 24, 25])  # its plan is in the same buffers
        with pytest.raises(pk.InvalidState):
            _ = plan.slots
        w.read(a, b)

    holds(scenario)


def test_hazard_20_a_block_number_is_used_after_a_swap_moved_its_content() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3, 4, 5])
        with w.kv.step([a], [6]) as step:
            old = step.plan
            step.rollback()
        before = w.kv.manager.block_table(a).tolist()
        w.kv.swap_out([a])
        with pytest.raises(pk.NotResident):
            w.kv.manager.block_table(a)
        hold = w.admit([31, 32, 33, 34, 35])
        w.kv.swap_in([a]).wait()
        after = w.kv.manager.block_table(a).tolist()
        assert set(after).isdisjoint(w.kv.manager.block_table(hold).tolist())
        with w.kv.step([]), pytest.raises(pk.InvalidState):
            _ = old.block_tables
        assert len(after) == len(before)
        w.read(a, hold)
        with w.kv.step([a], [6]) as step:
            assert step.block_tables[0, : len(after)].tolist() == after
            step.rollback()

    holds(scenario, device_blocks=7)


@pytest.mark.parametrize("seed", range(4))
def test_hazard_21_a_block_is_counted_in_the_wrong_tier(seed: int) -> None:
    choose = random.Random(seed)
    with World(schedule="random", seed=seed) as w:
        ids = [w.admit([n, 1, 2]) for n in range(2)]
        for turn in range(60):
            i = choose.choice(ids)
            call: Any = choose.choice([w.kv.swap_out, w.kv.swap_in, w.kv.poll, w.overwrite])
            with contextlib.suppress(pk.InvalidState, pk.OutOfBlocks):
                call([i]) if call in (w.kv.swap_out, w.kv.swap_in) else call()
            w.kv.manager.verify()
            stats = w.kv.stats()
            for tier in (stats.device, stats.host):
                assert tier.num_free + tier.num_active + tier.num_cached == tier.num_blocks == 8
            if turn % 10 == 0:
                w.settle()
        assert w.all_problems() == []


# ------------------------------------------------------------------ ends and failures


def test_hazard_24_memory_goes_while_work_is_in_flight() -> None:
    for schedule, seed in [("eager", 0), ("lazy", 0), *(("random", s) for s in range(5))]:
        w = World(schedule=schedule, seed=seed, device_blocks=12, host_blocks=12)
        ids = [w.admit([n, n, n]) for n in range(4)]
        w.kv.swap_out(ids[:2])
        w.kv.swap_in(ids[:1])
        w.step({ids[3]: [9]})
        assert w.device.host_bytes > 0
        w.kv.close()
        assert w.device.num_pending == w.device.num_events == w.device.host_bytes == 0
        assert w.device.violations == []  # what is freed and used later is one


def test_hazard_25_a_batch_breaks_off_half_way() -> None:
    """Whatever was copied counts for nothing, and its blocks wait for the copies all the same."""

    def out(w: World) -> None:
        ids = [w.admit([10 * n, 1, 2]) for n in range(3)]
        w.device.fail_copy()
        transfer = w.kv.swap_out(ids)
        w.overwrite()  # the blocks of the torn copy are taken while it is under way
        failing(w, transfer)
        assert sorted(transfer.dropped) == ids
        assert w.kv.stats().host.num_free == 8
        w.kv.swap_out([w.admit([41, 42, 43])]).wait()
        w.resume(ids)

    holds(out, without=STEP)

    def back(w: World) -> None:
        ids = [w.admit_on_host([10 * n, 1, 2]) for n in range(3)]
        w.device.fail_copy()
        transfer = w.kv.swap_in(ids)
        w.release(ids.pop())
        w.overwrite()
        failing(w, transfer)
        for i in ids:
            w.resume([i])
            assert len(w.texts[i].tokens) == 2  # of the full block, which the host still has

    holds(back)


def test_hazard_26_a_copy_fails_and_nobody_hears_of_it() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3, 4, 5])
        w.device.fail_copy()
        transfer = w.kv.swap_out([a])
        while not transfer.done:
            pass
        with pytest.raises(pk.TransferError, match="a copy failed half-way"):
            w.kv.poll()
        assert w.kv.poll() == []  # once
        transfer.wait()
        assert isinstance(transfer.error, pk.TransferError)
        assert transfer.dropped == (a,)
        w.forget(transfer.dropped)
        w.resume([a])
        assert len(w.texts[a].tokens) == 4  # the source is intact
        w.read(a)

    holds(scenario)


def test_hazard_27_the_consumer_is_no_stream() -> None:
    """Who reads memory from the host waits first: wait() is what says so, not a fence."""
    with World(schedule="lazy") as w:
        for pool in (w.kv.k(0), w.kv.v(0)):
            pool.zero_()  # what was in this memory before may have been another test's same bytes
        a = w.admit([1])
        w.device.hold_next()
        wanted = w.texts[a].content(0, 0)
        found = [w.kv.k(0)[int(w.kv.manager.block_table(a)[0]), 0, 0]]
        assert found[0].numpy().tobytes() != wanted  # queued, not yet there
        out = w.kv.swap_out([a])
        out.wait()
        w.overwrite()
        back = w.kv.swap_in([a])
        assert not back.done
        back.wait()
        found = [w.kv.k(0)[int(w.kv.manager.block_table(a)[0]), 0, 0]]
        assert found[0].numpy().tobytes() == wanted
        w.settle()
        assert w.all_problems() == []


def test_hazard_28_somebody_else_writes_a_block_that_has_a_copy_queued() -> None:
    def by_copy_on_write(w: World) -> None:
        a = w.admit([1, 2, 3])
        b = w.fork(a, 2)[1]
        w.device.hold_next()  # the copy, which comes before the writes of the same step
        w.step({b: [4]}, check=True)
        w.read(a)

    holds(by_copy_on_write)

    def by_a_swap_in(w: World) -> None:
        a = w.admit_on_host([1, 2, 3, 4, 5])
        w.device.hold_next()
        w.kv.swap_in([a])
        w.release(a)  # its blocks are free while the copies into them are under way
        b = w.create(range(40, 56))
        w.step({b: w.texts[b].rest})
        while w.kv.stats().num_transfers:
            w.kv.poll()
        w.read(b)

    holds(by_a_swap_in, without=STEP)
