"""Defects that managers like this one have had."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import pagedkv as pk
from small import admit, hit, state, table


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("together", [True, False])
def test_two_holders_of_one_open_block_never_get_the_same_slot(length: int, together: bool) -> None:
    m = pk.BlockManager(16, block_size=4)
    ids = m.fork(admit(m, list(range(length))), 2).tolist()
    slots = []
    for batch in [ids] if together else [ids[:1], ids[1:]]:
        m.commit(plan := m.append(batch, [9 + ids.index(i) for i in batch]))
        slots += plan.slots.tolist()
    assert len(set(slots)) == 2
    assert len({table(m, i)[0] for i in ids}) == 2


@pytest.mark.parametrize("k", range(4))
def test_one_parent_may_feed_all_beams(k: int) -> None:
    """The references it gives are taken before any is dropped."""
    m = pk.BlockManager(8, block_size=2)
    beams = m.fork(admit(m, [1]), 4)
    m.commit(m.append(beams, [2, 3, 4, 5]))
    m.commit(m.append(beams, [6, 6, 6, 6]))
    winner = table(m, beams[k])
    m.reorder(beams, [k, k, k, k])
    assert [table(m, i) for i in beams] == [winner] * 4
    plan = m.append(beams, [7, 8, 9, 10])
    assert len(set(plan.slots.tolist())) == 4
    m.commit(plan)


def test_stale_ids_raise() -> None:
    """Also when another sequence lives where the released one did."""
    m = pk.BlockManager(8, block_size=2)
    stale = admit(m, [1, 2, 3])
    m.release([stale])
    fresh = admit(m, [4, 5])
    assert fresh != stale
    before = state(m)
    calls: list[Callable[[int], object]] = [
        m.length,
        m.num_cached,
        m.block_table,
        lambda i: m.append([i]),
        lambda i: m.append([fresh, i]),
        lambda i: m.record([i], [1]),
        lambda i: m.fork(i, 2),
        lambda i: m.reorder([i, fresh], [1, 0]),
        lambda i: m.truncate([i], [0]),
        lambda i: m.release([i]),
        lambda i: m.num_needed([i]),
        lambda i: m.num_freed([i]),
    ]
    for call in calls:
        for i in (stale, 0, -1, 2**63 - 1, -(2**63)):
            with pytest.raises(pk.UnknownSequence, match=str(i)):
                call(i)
    assert state(m) == before


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_partly_filled_block_is_no_hit(length: int) -> None:
    """Its holder goes on writing it. Of a full one, a part may be hit, and is copied."""
    m = pk.BlockManager(8, block_size=4)
    a = admit(m, [1, 2, 3, 4][:length])
    assert hit(m, [1, 2, 3, 4]) == 0
    m.commit(m.append([a], [1, 2, 3, 4][length:], counts=[4 - length]))
    found = m.lookup([1, 2, 3, 4][: length + 1])
    assert (found.num_full_blocks, found.num_partial_tokens) == (0, length)
    b = m.create([1, 2, 3, 4][: length + 1])
    m.commit(plan := m.append([b], [9]))
    assert plan.copies.tolist() == [[table(m, a)[0], table(m, b)[0], length]]


def test_truncate_into_a_published_block_then_append() -> None:
    """The truncated one copies; whoever shares or finds the block is not touched."""
    m = pk.BlockManager(8, block_size=2)
    a, b = m.fork(admit(m, [1, 2, 3, 4]), 2)
    blocks = table(m, a)
    m.truncate([a], [3])
    plan = m.append([a], [9])
    assert plan.copies.tolist() == [[blocks[1], plan.block_tables[0, 1], 1]]
    m.commit(plan)
    assert table(m, b) == blocks
    assert table(m, a)[0] == blocks[0]
    assert table(m, a)[1] != blocks[1]
    assert (hit(m, [1, 2, 3, 4]), hit(m, [1, 2, 3, 9])) == (4, 4)
