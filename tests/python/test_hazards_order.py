"""Hazards of order: who reads or writes a block before, or while, somebody else does.

The rows are those of docs/hazards.md. Each scenario runs under every schedule and in both layouts;
where a fence prevents the hazard, it also runs without, and must then go wrong.
"""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from world import World, holds  # noqa: E402


def intrude(world: World) -> None:
    """Write into every block that the device can give, and let go of them."""
    device = world.kv.stats().device
    room = (device.num_free + device.num_cached) * world.kv.spec.block_size
    other = world.admit(list(range(1000, 1000 + room)))
    world.read(other)
    world.release(other)
    world.kv.clear()


def test_hazard_01_device_block_reused_while_its_copy_reads_it() -> None:
    def scenario(world: World) -> None:
        a = world.admit([1, 2, 3])
        world.read(a)
        world.kv.swap_out([a])
        intrude(world)
        world.kv.swap_in([a]).wait()
        world.read(a)

    holds(scenario, device_blocks=2, without=["step_after_transfer"])


def test_hazard_02_swap_out_before_the_block_is_written() -> None:
    def scenario(world: World) -> None:
        a = world.admit([1, 2, 3])
        world.kv.swap_out([a]).wait()
        intrude(world)
        world.kv.swap_in([a]).wait()
        world.read(a)

    holds(scenario, without=["transfer_after_compute"])


def test_hazard_04_swap_in_over_a_block_that_is_still_read() -> None:
    """The late reader is a copy-on-write whose source nobody holds any more."""

    def scenario(world: World) -> None:
        moved = world.admit([9])
        world.kv.swap_out([moved]).wait()
        a = world.admit([1])
        world.read(a)
        a, b = world.fork(a, 2)
        world.device.hold_next()
        world.step({b: [2]})
        world.release(a)
        world.kv.swap_in([moved]).wait()
        world.read(b, moved)

    holds(scenario, device_blocks=2, without=["transfer_after_compute"])


def test_hazard_06_host_block_reused_while_a_swap_in_reads_it() -> None:
    def scenario(world: World) -> None:
        a, b = world.admit([1, 2]), world.admit([3, 4])
        world.kv.swap_out([a]).wait()
        intrude(world)
        back = world.kv.swap_in([a])  # from the only host block, which is free to go now
        world.kv.swap_out([b]).wait()
        back.wait()
        world.read(a)
        world.kv.swap_in([b]).wait()
        world.read(b)

    holds(scenario, host_blocks=1, without=["transfer_after_transfer"])


def test_hazard_07_out_and_in_and_out_without_the_host_waiting() -> None:
    def scenario(world: World) -> None:
        choose = random.Random(7)
        a, b = world.admit([1, 2, 3]), world.admit([4, 5, 6])
        for _ in range(12):
            for i in (a, b):
                if world.kv.manager.tier(i) == "device":
                    world.kv.swap_out([i])
                    if choose.random() < 0.5:
                        intrude(world)
                else:
                    world.kv.swap_in([i])
                if choose.random() < 0.3 and world.kv.ready([i]):
                    world.step({i: [choose.randrange(9)]})

    waits = ["transfer_after_transfer", "transfer_after_compute"]
    holds(scenario, device_blocks=14, host_blocks=14, without=waits)


def test_hazard_09_copy_on_write_source_overwritten_before_the_copy_runs() -> None:
    def scenario(world: World) -> None:
        a, b = world.fork(world.admit([1]), 2)
        world.device.hold_next()
        world.step({b: [2]})
        world.device.use_compute_stream(1)
        world.release(a)
        c = world.admit([7, 8])
        world.read(c, b)

    holds(scenario, device_blocks=2, num_compute_streams=2, without=["stream_after_stream"])


def test_hazard_10_copy_on_write_target_is_still_read() -> None:
    """By the swap-out of the sequence that it was taken from."""

    def scenario(world: World) -> None:
        a, b = world.admit([1]), world.admit([5])
        world.read(a, b)
        world.kv.swap_out([a])
        b, c = world.fork(b, 2)
        world.step({c: [6]})
        world.read(b, c)
        world.release(c)
        world.kv.swap_in([a]).wait()
        world.read(a, b)

    holds(scenario, device_blocks=2, without=["step_after_transfer"])


def test_hazard_11_an_older_and_slower_reader_is_waited_for_too() -> None:
    """Two streams read block A, the compute stream later than the copy out; then A is landed on."""

    def scenario(world: World) -> None:
        moved = world.admit([9])
        world.kv.swap_out([moved]).wait()
        a, b = world.fork(world.admit([1]), 2)
        world.device.hold_next()
        world.step({b: [2]})
        world.kv.swap_out([a])
        world.kv.swap_in([moved]).wait()
        world.read(b, moved)
        world.release(moved)
        world.kv.swap_in([a]).wait()
        world.read(a)

    holds(
        scenario,
        device_blocks=2,
        without=["transfer_after_compute", "transfer_after_transfer"],
    )


def test_hazard_12_prefix_hit_before_its_producer_has_written() -> None:
    def scenario(world: World) -> None:
        world.device.hold_next()
        world.admit([1, 2, 3])
        world.device.use_compute_stream(1)
        b = world.create([1, 2, 8])
        assert world.kv.num_cached(b) == 2
        world.step({b: [8]}, check=True)

    holds(scenario, num_compute_streams=2, without=["stream_after_stream"])


def test_hazard_16_preempt_while_the_next_step_is_queued() -> None:
    def swapped(world: World) -> None:
        a = world.admit([1, 2, 3])
        world.device.hold_next()
        world.step({a: [4, 5]})
        assert world.kv.preempt([a], mode="swap") is not None
        intrude(world)
        world.resume([a])
        while not world.kv.ready([a]):
            world.kv.poll()
        world.read(a)

    def recomputed(world: World) -> None:
        a = world.admit([1, 2, 3])
        world.device.hold_next()
        world.step({a: [4, 5]})
        assert world.kv.preempt([a], mode="recompute") is None
        world.forget([a])
        intrude(world)
        world.resume([a])
        assert world.kv.length(a) == 0
        world.step({a: [1, 2, 3, 4, 5]}, check=True)

    holds(swapped, device_blocks=3, without=["transfer_after_compute", "step_after_transfer"])
    holds(recomputed, device_blocks=3)


def test_hazard_17_a_sequence_moves_to_another_stream() -> None:
    def scenario(world: World) -> None:
        a = world.admit([1])
        for turn in range(6):
            world.device.use_compute_stream(turn % 3)
            world.device.hold_next()
            world.step({a: [turn]})
            _, b = world.fork(a, 2)
            world.release(b)
        world.device.use_compute_stream(2)
        world.read(a)

    holds(scenario, num_compute_streams=3, without=["stream_after_stream"])


def test_hazard_17_swap_out_follows_every_stream_that_wrote() -> None:
    def scenario(world: World) -> None:
        a = world.admit([1, 2, 3])
        world.device.use_compute_stream(1)
        world.kv.swap_out([a]).wait()
        intrude(world)
        world.kv.swap_in([a]).wait()
        world.read(a)

    holds(scenario, num_compute_streams=2, without=["stream_after_stream"])


def test_hazard_19_arguments_rewritten_before_the_work_that_they_describe_ran() -> None:
    """The step's persistent buffers, the caller's tensors, and the descriptors of transfers."""

    def scenario(world: World) -> None:
        a, b = world.create([1, 2, 3]), world.create([4, 5, 6])
        world.device.hold_next()
        with world.kv.step([a], [1, 2, 3], counts=[3]) as step:
            new = world.appended(a, [1, 2, 3])
            world.write(step, new.digests)  # its tensors are gone when it returns
            slots = step.plan.slots
        world.texts[a] = new
        world.kv.swap_out([a])
        world.step({b: [4, 5, 6]})  # in the buffers of the step before
        assert slots.base is not None
        intrude(world)
        world.kv.swap_in([a]).wait()
        world.read(a, b)

    holds(scenario)


def test_hazard_28_writer_into_a_fresh_block_that_has_a_queued_copy() -> None:
    """The copy and the write are of one step, and on one stream; on two nothing would order them."""

    def scenario(world: World) -> None:
        a, b = world.fork(world.admit([1]), 2)
        world.device.hold_next()
        world.step({b: [2]}, check=True)
        world.read(a, b)

    holds(scenario)
    with World(num_compute_streams=2) as world:
        a, b = world.fork(world.admit([1]), 2)
        with world.kv.step([b], [2]) as step:
            world.device.use_compute_stream(1)
            world.write(step, world.appended(b, [2]).digests[-1:])
        assert "not ordered" in world.device.violations[0]
