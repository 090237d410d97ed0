"""Hazards 35 to 44 of docs/hazards.md: sharing, and what cannot be had."""

from __future__ import annotations

import numpy as np
import pytest

import pagedkv as pk
from hazard_world import World, holds
from small import state


def test_hazard_35_a_partly_filled_block_is_shared_as_if_full() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3, 4])
        b = w.create([1, 2, 3, 9, 9])
        w.step({b: w.texts[b].rest}, check=True)
        c = w.fork(b, 2)[1]
        w.step({b: [5]})
        w.step({c: [6]})
        w.read(a, b, c)

    holds(scenario)


def test_hazard_36_out_of_blocks_half_way() -> None:
    with World(device_blocks=4, host_blocks=2) as w:
        a, b = w.admit([1, 2, 3]), w.admit([4, 5, 6])
        c = w.create([7])
        before = state(w.kv.manager)
        for call in (
            lambda: w.kv.step([a, b, c], [1] * 7, counts=[1, 5, 1]),
            lambda: w.kv.swap_out([a, b]),
        ):
            with pytest.raises(pk.OutOfBlocks):
                call()
            assert state(w.kv.manager) == before
        w.kv.swap_out([a]).wait()
        w.overwrite()
        w.step({c: [7]})
        held = w.kv.stats()
        with pytest.raises(pk.OutOfBlocks):
            w.kv.swap_in([a])
        assert w.kv.stats() == held
        w.settle()
        assert w.all_problems() == []


def test_hazard_37_transfers_hold_every_block() -> None:
    def scenario(w: World) -> None:
        a, polls = w.admit([1, 2, 3]), 0
        w.kv.swap_out([a])
        b = w.admit([11, 12, 13])
        for turn in range(10):
            inside, outside = (a, b) if turn % 2 else (b, a)
            w.kv.swap_out([inside])
            w.kv.swap_in([outside])
            while not w.kv.ready([outside]):
                w.kv.poll()
                polls += 1
            w.read(outside)
        assert polls < 10 * 200

    holds(scenario, device_blocks=2, host_blocks=4)


def test_hazard_38_k_v_and_layers_are_published_torn() -> None:
    def scenario(w: World) -> None:
        a = w.admit_on_host([1, 2, 3, 4, 5])
        w.device.hold_next()
        w.kv.swap_in([a])
        assert not w.kv.ready([a])
        while not w.kv.ready([a]):
            w.kv.poll()
        w.read(a)

    holds(scenario)


def test_hazard_39_one_slow_transfer_keeps_others_from_being_seen() -> None:
    with World(schedule="eager") as w:
        b = w.admit_on_host([11, 12, 13])
        a = w.admit([1, 2, 3, 4])  # full blocks: they stay cached, and nobody takes them over
        w.device.hold_next()
        slow = w.kv.swap_out([a])
        quick = w.kv.swap_in([b])
        assert quick.done
        assert not slow.done
        w.step({b: [14]}, check=True)
        w.settle()
        assert w.all_problems() == []


def test_hazard_40_appended_to_after_its_swap_out_began() -> None:
    def scenario(w: World) -> None:
        a = w.admit([1, 2, 3])
        w.kv.swap_out([a])
        with pytest.raises(pk.NotResident):
            w.kv.step([a], [4])
        w.kv.swap_in([a]).wait()
        w.step({a: [4]}, check=True)

    holds(scenario)


def test_hazard_41_fork_and_then_both_append() -> None:
    def scenario(w: World) -> None:
        a, b = w.fork(w.admit([1, 2, 3]), 2)
        w.step({a: [4], b: [5]}, check=True)
        tables = [w.kv.manager.block_table(i).tolist() for i in (a, b)]
        assert tables[0][0] == tables[1][0]
        assert tables[0][1] != tables[1][1]

    holds(scenario)


@pytest.mark.parametrize("k", range(4))
def test_hazard_42_one_parent_feeds_all_beams(k: int) -> None:
    def scenario(w: World) -> None:
        ids = [w.admit([10 * n, 1, 2]) for n in range(4)]
        w.reorder(ids, [k] * 4)
        w.step({i: [n] for n, i in enumerate(ids)}, check=True)

    holds(scenario, device_blocks=12)


def test_hazard_43_a_failed_store_is_a_hit() -> None:
    for fails in (False, True):
        with World() as w:
            a = w.admit([1, 2, 3, 4, 5])
            if fails:
                w.device.fail_copy()
            transfer = w.kv.swap_out([a])
            while not transfer.done:
                pass
            w.overwrite()
            found = w.kv.lookup([1, 2, 3, 4, 5])
            assert (found.num_tokens, found.num_host_tokens) == (0, 0 if fails else 4)


def test_hazard_44_a_count_that_underflows_is_repaired() -> None:
    """None can from here: what is given back twice is refused.

    In C++ it is a BrokenInvariant, which poisons the manager: see tests/cpp/test_gate.cpp.
    """
    m = pk.BlockManager(4, 4, block_size=2)
    i = m.create([])
    m.commit(m.append([i], counts=[3]))
    out = m.swap_out([i])
    m.complete(out)
    with pytest.raises(pk.InvalidState):
        m.complete(out)
    m.release([i])
    with pytest.raises(pk.UnknownSequence):
        m.release([i])
    assert np.array([m.stats().device.num_free, m.stats().host.num_free]).tolist() == [4, 4]
    m.verify()
