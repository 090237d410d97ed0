"""Rules 7 to 11 of the tree, on BlockManager: two tiers, and the transfers between them."""

from __future__ import annotations

import pytest

import pagedkv as pk
from small import admit, flush, grow, hit, on_host, state, table
from small import two_tiers as manager

# ------------------------------------------------------------------ 7. residency


def test_rule_7_a_shared_block_moves_once_and_the_others_stay() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4, 5])
    b, c = (int(i) for i in m.fork(a, 3)[1:])
    plan = m.swap_out([b])
    assert plan.direction == "out"
    assert plan.num_copies == 3
    assert sorted(plan.copies[:, 0].tolist()) == sorted(table(m, a))
    assert plan.copies[:, 2].tolist() == [2, 2, 1]
    m.complete(plan)
    assert (m.tier(a), m.tier(b), m.tier(c)) == ("device", "host", "device")
    second = m.swap_out([c])
    assert second.num_copies == 0
    m.complete(second)
    assert m.stats().device.num_active == m.stats().host.num_active == 3
    m.verify()


def test_rule_7_a_node_held_on_the_host_is_not_written() -> None:
    m = manager()
    a = admit(m, [1, 2, 3])
    b = int(m.fork(a, 2)[1])
    on_host(m, [b])
    plan = grow(m, [a])
    assert plan.num_copies == 1  # a has its last block alone on the device, and copies it still
    m.complete(m.swap_in([b]))
    assert m.length(b) == 3
    m.verify()


def test_rule_7_a_clean_host_copy_is_not_copied_again() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4, 5])
    on_host(m, [a])
    back = m.swap_in([a])
    assert back.num_copies == 1  # the full blocks were still cached on the device
    m.complete(back)
    again = m.swap_out([a])
    assert again.num_copies == 1  # and their host copies are clean: the open block alone moves
    m.complete(again)
    m.verify()


def test_rule_7_a_path_is_in_one_tier() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4, 5])
    out = m.swap_out([a])
    for under_way in (True, False):  # no transfer brings it here, least of all the one away
        if not under_way:
            m.complete(out)
        for call in (
            lambda: m.append([a], [1]),
            lambda: m.record([a], [1]),
            lambda: m.block_table(a),
            lambda: m.num_needed([a]),
        ):
            with pytest.raises(pk.NotResident, match="swap it in") as error:
                call()
            assert error.value.transfer is None
    with pytest.raises(pk.InvalidState, match="host tier already"):
        m.swap_out([a])
    m.complete(m.swap_in([a]))
    with pytest.raises(pk.InvalidState, match="device tier already"):
        m.swap_in([a])
    assert grow(m, [a]).seq_lens.tolist() == [6]


def test_rule_7_references_survive_forks_reorders_and_releases_on_the_host() -> None:
    m = manager()
    a, b = admit(m, [1, 2, 3]), admit(m, [1, 2, 9, 9, 9])
    plan = m.swap_out([a, b])
    c = int(m.fork(a, 2)[1])
    m.reorder([a, b], [1, 0])
    m.release([b])  # was a
    m.truncate([a], [4])
    m.complete(plan)
    assert (m.length(a), m.length(c), m.tier(c)) == (4, 3, "host")
    m.verify()
    m.complete(m.swap_in([a, c]))
    assert table(m, a)[0] == table(m, c)[0]
    m.release([a, c])
    assert m.stats().device.num_active == m.stats().host.num_active == 0


# ------------------------------------------------------------------ 8. transfers hold no references


def test_rule_8_blocks_are_given_out_before_the_copy_that_frees_them_has_ended() -> None:
    m = manager(device=3)
    a = admit(m, [1, 2, 3, 4, 5])
    out = m.swap_out([a])
    b = m.create()
    plan = m.append([b], counts=[6])  # all three blocks, two of them cached, one free
    assert plan.wait_for.tolist() == [out.id]
    assert sorted(plan.block_tables[0].tolist()) == sorted(out.copies[:, 0].tolist())
    m.commit(plan)
    m.complete(out)
    assert grow(m, [b][:0]).wait_for.tolist() == []


def test_rule_8_a_swapped_out_full_block_is_an_ordinary_cached_block() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4, 5])
    out = m.swap_out([a])
    tier = m.stats().device
    assert (tier.num_active, tier.num_cached, tier.num_free) == (0, 2, 10)
    assert hit(m, [1, 2, 3, 4]) == 4  # while it is being read
    m.complete(out)


def test_rule_8_a_transfer_waits_for_the_last_one_on_its_blocks() -> None:
    m = manager(device=3, host=3)
    a = admit(m, [1, 2, 3, 4, 5])
    out = m.swap_out([a])
    back = m.swap_in([a])
    assert back.wait_for.tolist() == [out.id]
    for end in (m.complete, m.abort):
        with pytest.raises(pk.InvalidState, match=f"cannot end before transfer {out.id}"):
            end(back)
    again = m.swap_out([a])  # without the host having waited for anything
    assert back.id in again.wait_for.tolist()
    for plan in (out, back, again):
        m.complete(plan)
    m.verify()


def test_rule_8_a_block_that_is_being_read_is_written_after_that() -> None:
    m = manager()
    a = admit(m, [1, 2, 3])
    b = int(m.fork(a, 2)[1])
    out = m.swap_out([b])
    m.release([b])  # the host copy goes, the copying goes on
    plan = grow(m, [a])
    assert plan.num_copies == 0
    assert plan.wait_for.tolist() == [out.id]
    m.complete(out)
    assert grow(m, [a]).wait_for.tolist() == []


# ------------------------------------------------------------------ 9. landing blocks


def test_rule_9_landing_blocks_are_no_hits_and_their_sequence_is_not_resident() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4, 5])
    on_host(m, [a])
    flush(m)
    back = m.swap_in([a])
    assert back.num_copies == 3
    assert hit(m, [1, 2, 3, 4]) == 0
    b = m.create([1, 2, 3, 4, 5])
    assert m.num_cached(b) == 0
    with pytest.raises(pk.NotResident) as error:
        m.append([a], [6])
    assert error.value.transfer == m.waits_for(a) == back.id
    m.complete(back)
    assert hit(m, [1, 2, 3, 4]) == 4
    assert grow(m, [a]).seq_lens.tolist() == [6]


def test_rule_9_a_landing_block_hides_no_shorter_hit() -> None:
    m = manager(block_size=4)
    a = admit(m, [1, 2, 3, 4])
    on_host(m, [a])
    flush(m)
    admit(m, [1, 2, 9, 9])
    back = m.swap_in([a])
    assert (hit(m, [1, 2, 3]), m.num_cached(m.create([1, 2, 3, 7]))) == (2, 2)
    m.complete(back)
    assert (hit(m, [1, 2, 3]), m.num_cached(m.create([1, 2, 3, 7]))) == (3, 3)


def test_rule_9_who_joins_a_landing_block_waits_for_its_transfer() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4])
    b = admit(m, [1, 2, 7])
    on_host(m, [a, b])
    flush(m)
    first, second = m.swap_in([a]), m.swap_in([b])
    assert (first.num_copies, second.num_copies) == (2, 1)
    assert second.wait_for.tolist() == [first.id]
    m.complete(first)
    with pytest.raises(pk.NotResident):
        m.append([b], [8])
    m.complete(second)
    assert table(m, a)[0] == table(m, b)[0]


def test_rule_9_nobody_who_runs_is_made_to_wait_by_a_merge() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4])
    on_host(m, [a])
    flush(m)
    back = m.swap_in([a])
    b = admit(m, [1, 2, 3, 4, 5])  # the same content, computed while it lands
    assert set(table(m, b)).isdisjoint(back.copies[:, 1].tolist())
    assert grow(m, [b]).seq_lens.tolist() == [6]
    m.complete(back)
    m.verify()


def test_rule_9_what_only_the_host_has_takes_over_the_new_block() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4])
    on_host(m, [a])
    flush(m)
    b = admit(m, [1, 2, 3, 4, 5])
    assert m.stats().num_merged_blocks == 0
    back = m.swap_in([a])
    assert back.num_copies == 0
    m.complete(back)
    assert table(m, a) == table(m, b)[:2]


# ------------------------------------------------------------------ 10. abort


def test_rule_10_a_failed_swap_in_leaves_the_host_copy_and_drops_the_sequence() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4, 5])
    on_host(m, [a])
    flush(m)
    back = m.swap_in([a])
    aborted = m.abort(back)
    assert (aborted.sequences.tolist(), aborted.transfers.tolist()) == ([a], [])
    assert m.is_dropped(a)
    assert m.stats().device.num_active == m.stats().device.num_cached == 0
    assert m.lookup([1, 2, 3, 4, 5]).num_host_tokens == 4
    for call in (lambda: m.append([a], [1]), lambda: m.fork(a, 2), lambda: m.swap_out([a])):
        with pytest.raises(pk.NotResident, match="restore"):
            call()
    m.restore([a])
    assert m.length(a) == 0
    m.complete(m.fetch(a))
    assert m.length(a) == 4
    m.verify()


def test_rule_10_a_failed_swap_out_leaves_the_device_copy() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4, 5])
    assert m.abort(m.swap_out([a])).sequences.tolist() == [a]
    assert m.stats().host.num_free == 12
    m.restore([a])
    assert m.length(a) == 4  # the full blocks; the open one is to be computed again
    assert grow(m, [a], 5).seq_lens.tolist() == [5]


def test_rule_10_what_read_the_failed_blocks_is_void_and_waited_for_until_it_ends() -> None:
    m = manager(device=3)
    a = admit(m, [1, 2, 3, 4, 5])
    out = m.swap_out([a])
    back = m.swap_in([a])  # the open block, out of the host block that `out` fills
    aborted = m.abort(out)
    assert (aborted.sequences.tolist(), aborted.transfers.tolist()) == ([a], [back.id])
    m.release([a])
    plan = m.append([m.create()], counts=[6])
    assert plan.wait_for.tolist() == [back.id]  # it may be copying still
    m.commit(plan)
    m.complete(back)
    with pytest.raises(pk.InvalidState, match="not in flight"):
        m.complete(back)
    m.verify()


def test_rule_10_others_are_untouched() -> None:
    m = manager()
    a, b = admit(m, [1, 2, 3]), admit(m, [5, 6, 7])
    on_host(m, [a, b])
    flush(m)
    first, second = m.swap_in([a]), m.swap_in([b])
    m.abort(first)
    m.complete(second)
    assert grow(m, [b]).seq_lens.tolist() == [4]
    assert m.is_resident(b)
    assert not m.is_resident(a)


# ------------------------------------------------------------------ 11. host hits are explicit


def test_rule_11_fetch_brings_the_host_part_of_a_hit() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4, 5, 6, 7])
    on_host(m, [a])
    m.release([a])
    flush(m)
    b = admit(m, [1, 2, 9])
    prompt = [1, 2, 3, 4, 5, 6, 7]
    found = m.lookup(prompt)
    assert (found.num_full_blocks, found.num_host_tokens) == (1, 4)
    c = m.create(prompt)
    assert m.num_cached(c) == 2
    m.rollback(m.append([c], prompt[2:], counts=[5]))  # leaves what fetch() may bring
    plan = m.fetch(c)
    assert (plan.direction, plan.num_copies, m.num_cached(c)) == ("in", 2, 6)
    with pytest.raises(pk.NotResident):
        m.append([c], [7])
    m.complete(plan)
    assert grow(m, [c], 7).seq_lens.tolist() == [7]
    assert table(m, c)[0] == table(m, b)[0]


def test_rule_11_two_requests_join_one_transfer() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4, 5])
    on_host(m, [a])
    m.release([a])
    flush(m)
    b, c = m.create([1, 2, 3, 4, 5]), m.create([1, 2, 3, 4, 6])
    first, second = m.fetch(b), m.fetch(c)
    assert (first.num_copies, second.num_copies) == (2, 0)
    assert second.wait_for.tolist() == [first.id]
    m.complete(first)
    m.complete(second)
    assert table(m, b) == table(m, c)


def test_rule_11_a_fetch_that_does_not_fit_changes_nothing() -> None:
    m = manager(device=3)
    a = admit(m, [1, 2, 3, 4, 5])
    on_host(m, [a])
    m.release([a])
    flush(m)
    filler = m.create()
    m.commit(m.append([filler], counts=[4]))
    b = m.create([1, 2, 3, 4, 5])
    before = state(m)
    with pytest.raises(pk.OutOfBlocks) as error:
        m.fetch(b)
    assert (error.value.tier, error.value.needed, error.value.available) == ("device", 2, 1)
    assert state(m) == before
    m.release([filler])
    m.complete(m.fetch(b))
    assert m.length(b) == 4
