"""Hazards 1 to 12 of docs/hazards.md: two pieces of work on one block, and nothing between them."""

from __future__ import annotations

import pytest

import pagedkv as pk
from hazard_world import World, holds
from small import state

COMPUTE = "transfer_after_compute"
TRANSFER = "transfer_after_transfer"
STEP = "step_after_transfer"
STREAM = "stream_after_stream"


def test_hazard_01_a_block_is_reused_while_its_copy_to_the_host_reads_it() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3, 4, 5])
        w.device.hold_next()
        w.kv.swap_out([a])
        w.overwrite()
        w.kv.swap_in([a]).wait()
        w.read(a)

    holds(scenario, without=STEP)


def test_hazard_02_a_swap_out_begins_before_its_blocks_are_written() -> None:
    def scenario(w: World) -> None:
        a = w.create([1, 2, 3, 4, 5])
        w.step({a: [1, 2, 3, 4, 5]})
        w.kv.swap_out([a]).wait()  # nobody has waited for the writes
        w.overwrite()
        w.kv.swap_in([a]).wait()
        w.read(a)

    holds(scenario, without=COMPUTE)


def test_hazard_03_a_reader_runs_before_the_swap_in_has_landed() -> None:
    """Nobody can: until the transfer is told to have ended, its sequence is in no step."""

    def scenario(w: World) -> None:
        a = w.admit_on_host([1, 2, 3, 4, 5])
        b = w.fork(a, 2)[1]
        w.device.hold_next()
        transfer = w.kv.swap_in([a, b])
        for stream in (0, 1):
            w.device.use_compute_stream(stream)
            for i in (a, b):
                assert not w.kv.manager.is_resident(i)
                with pytest.raises(pk.NotResident) as error:
                    w.kv.step([i], [6])
                assert error.value.transfer == transfer.id
        assert w.kv.lookup([1, 2, 3, 4, 5]).num_tokens == 0
        transfer.wait()
        for stream, i in ((0, a), (1, b), (0, b)):
            w.device.use_compute_stream(stream)
            w.step({i: [6]}, check=True)

    holds(scenario, num_compute_streams=2)


def test_hazard_04_the_target_of_a_swap_in_is_still_read_by_its_last_owner() -> None:
    def scenario(w: World) -> None:
        c = w.admit_on_host([10, 11, 12, 13, 14, 15, 16])
        a = w.admit([1, 2, 3])
        b = w.fork(a, 2)[1]
        w.device.hold_next()
        w.step({b: [4]})  # copies a's last block
        w.release(a)
        w.kv.swap_out([b])
        w.kv.clear()
        w.kv.swap_in([c]).wait()  # into every block there is
        w.read(c)

    holds(scenario, without=COMPUTE, device_blocks=4)


def test_hazard_05_two_swap_outs_into_one_host_block() -> None:
    def scenario(w: World) -> None:
        a, b = w.admit([1]), w.admit([2])
        before = state(w.kv.manager)
        with pytest.raises(pk.OutOfBlocks, match="the host tier has 1 blocks"):
            w.kv.swap_out([a, b])
        assert state(w.kv.manager) == before
        w.device.hold_next()
        w.kv.swap_out([a])
        with pytest.raises(pk.OutOfBlocks):
            w.kv.swap_out([b])
        w.release(a)
        w.kv.swap_out([b])  # its block is taken over while the copy into it is under way
        w.overwrite()
        w.kv.swap_in([b]).wait()
        w.read(b)

    holds(scenario, host_blocks=1)


def test_hazard_06_a_host_block_is_reused_while_a_swap_in_reads_it() -> None:
    def scenario(w: World) -> None:
        a = w.admit_on_host([1, 2, 3])
        b = w.admit([11, 12, 13])
        w.device.hold_next()
        back = w.kv.swap_in([a])
        w.kv.swap_out([b]).wait()  # into the host blocks that a comes from
        back.wait()
        w.read(a)

    holds(scenario, without=TRANSFER, host_blocks=2)


def test_hazard_07_out_in_and_out_again_without_waiting() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3, 4, 5])
        for _ in range(6):
            w.kv.swap_out([a])
            w.kv.swap_in([a])
        assert w.device.num_host_waits == 0
        w.kv.swap_out([a])
        w.overwrite()
        w.kv.swap_in([a]).wait()
        w.read(a)

    holds(scenario, without=TRANSFER)
    # Full blocks stay on the device: take them away while the copies are under way.
    holds(lambda w: bounce(w, 4), without=STEP)


def bounce(w: World, times: int) -> None:
    a = w.admit([1, 2, 3, 4, 5])
    for token in range(times):
        w.kv.swap_out([a])
        w.overwrite()
        w.kv.swap_in([a]).wait()
        w.step({a: [token]}, check=True)


def test_hazard_08_copy_on_write_from_a_block_that_is_landing() -> None:
    """A fork of what is landing is as little resident as what it was forked from."""

    def scenario(w: World) -> None:
        a = w.admit_on_host([1, 2, 3])
        w.device.hold_next()
        back = w.kv.swap_in([a])
        b = w.fork(a, 2)[1]
        with pytest.raises(pk.NotResident):
            w.kv.step([a, b], [4, 5])
        back.wait()
        w.step({a: [4], b: [5]}, check=True)

    holds(scenario)


def test_hazard_09_the_source_of_copy_on_write_is_overwritten_before_the_copy() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3])
        b = w.fork(a, 2)[1]
        w.device.hold_next()
        w.step({b: [4]})
        w.release(a)
        w.device.use_compute_stream(1)
        w.overwrite()
        w.read(b)

    holds(scenario, without=STREAM, num_compute_streams=2)


def test_hazard_10_the_target_of_copy_on_write_has_a_reader_pending() -> None:
    def read_by_a_step(w: World) -> None:
        a = w.admit([1, 2, 3])
        b = w.fork(a, 2)[1]
        w.device.hold_next()
        w.step({b: [4, 5]})
        w.release(a)
        c = w.fork(b, 2)[1]
        w.device.use_compute_stream(1)
        w.step({c: [6, 7]})  # the block that was given back last is taken first: a's
        w.read(b, c)

    holds(read_by_a_step, without=STREAM, num_compute_streams=2, device_blocks=5)

    def read_by_a_swap_out(w: World) -> None:
        a, b = w.admit([1]), w.admit([11, 12, 13])
        c = w.fork(b, 2)[1]
        w.device.hold_next()
        w.kv.swap_out([a])
        w.step({c: [14]})  # copies b's last block over what was a's
        w.kv.swap_out([b, c])
        w.overwrite()
        w.kv.swap_in([a, b, c]).wait()
        w.read(a, b, c)

    holds(read_by_a_swap_out, without=STEP, device_blocks=4)


def test_hazard_11_of_many_readers_the_last_alone_is_remembered() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3])
        b, c = w.fork(a, 3)[1:]
        w.device.hold_next()
        w.step({b: [4]})  # reads a's last block, slowly
        w.device.use_compute_stream(1)
        w.step({c: [5]})  # so does this
        w.release(a)
        w.device.use_compute_stream(2)
        w.overwrite()
        w.read(b, c)

    holds(scenario, without=STREAM, num_compute_streams=3)

    def out_and_in(w: World) -> None:
        d = w.admit_on_host([21, 22, 23, 24, 25, 26, 27])
        a = w.admit([1, 2, 3])
        b = w.fork(a, 2)[1]
        w.device.hold_next()
        w.kv.swap_out([b])  # reads a's blocks, slowly
        w.step({w.fork(a, 2)[1]: [4]})  # so does this
        w.release(*(i for i in w.texts if i not in (b, d)))
        w.kv.clear()
        w.kv.swap_in([d]).wait()
        w.read(d)
        w.kv.swap_out([d])
        w.kv.swap_in([b]).wait()
        w.read(b)

    holds(out_and_in, without=TRANSFER, device_blocks=4)


def test_hazard_12_a_prefix_hit_comes_before_its_producers_write() -> None:
    def scenario(w: World) -> None:
        w.admit([1, 2, 3, 4, 5])
        w.device.use_compute_stream(1)
        b = w.create([1, 2, 3, 4, 9])
        assert w.kv.num_cached(b) == 4
        w.step({b: [9]}, check=True)

    holds(scenario, without=STREAM, num_compute_streams=2)
