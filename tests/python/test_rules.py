"""The rules of the block tree: who writes where, what is shared, what goes first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import pagedkv as pk
from small import admit, hit, late, state, table

# ----------------------------------------------------------------------- who writes in place


def test_rule_01_only_the_last_holder_at_the_end_writes_in_place() -> None:
    """Sharers of an open block copy it in batch order; the last one left keeps it."""
    m = pk.BlockManager(16, block_size=4)
    ids = m.fork(admit(m, [1, 2]), 3)
    [block] = table(m, ids[0])
    plan = m.append(ids, [7, 8, 9])
    assert plan.copies[:, 0].tolist() == [block, block]
    assert plan.copies[:, 2].tolist() == [2, 2]
    assert plan.slots[2] == block * 4 + 2
    m.commit(plan)
    assert table(m, ids[2]) == [block]
    assert len({table(m, i)[0] for i in ids}) == 3


def test_rule_01_a_truncated_holder_writes_in_place_only_where_it_was_alone() -> None:
    """Below the end of what is written, another holder still reads what would be overwritten."""
    m = pk.BlockManager(16, block_size=4)
    a = admit(m, [1, 2, 3])
    m.truncate([a], [1])
    m.commit(plan := m.append([a], [5]))
    assert plan.num_copies == 0
    [block] = table(m, a)
    b = m.fork(a, 2)[1]
    m.truncate([b], [1])
    both = m.append([a, b], [7, 8])
    assert both.copies[:, [0, 2]].tolist() == [[block, 2], [block, 1]]
    m.rollback(both)
    last = m.append([b, a], [8, 7])
    assert last.copies[:, [0, 2]].tolist() == [[block, 1]]
    assert last.slots[1] == block * 4 + 2
    m.commit(last)


def test_rule_01_a_published_block_is_copied_even_by_its_only_holder() -> None:
    """Its tokens are a prefix hit, which a write in place would make a false one."""
    m = pk.BlockManager(4, block_size=4)
    a = admit(m, [1, 2, 3, 4])
    m.truncate([a], [2])
    m.commit(plan := m.append([a], [9]))
    assert plan.num_copies == 1
    assert hit(m, [1, 2, 3, 4]) == 4


# ----------------------------------------------------------------------- copies


def test_rule_02_sources_stay_until_commit() -> None:
    """A step never writes into a block that it also copies from, even if nobody else needs it."""
    m = pk.BlockManager(3, block_size=4)
    ids = m.fork(admit(m, [1, 2]), 2)
    [block] = table(m, ids[0])
    m.truncate(ids, [1, 1])
    plan = m.append(ids, [7, 8])
    assert plan.copies[:, 0].tolist() == [block, block]
    assert set(plan.copies[:, 1]).isdisjoint(plan.copies[:, 0])
    assert len(set(plan.copies[:, 1])) == 2
    assert m.stats().device.num_active == 3
    m.commit(plan)
    assert m.stats().device.num_free == 1


def test_rule_02_a_source_is_no_room_for_its_own_copies() -> None:
    """With one block beside the source, two copies do not fit, though the source will be free."""
    m = pk.BlockManager(2, block_size=4)
    ids = m.fork(admit(m, [1, 2]), 2)
    m.truncate(ids, [1, 1])
    with pytest.raises(pk.OutOfBlocks) as error:
        m.append(ids, [7, 8])
    assert (error.value.tier, error.value.needed, error.value.available) == ("device", 2, 1)


# ----------------------------------------------------------------------- hits and a dry pool


def test_rule_03_a_hit_never_needs_more_blocks_than_a_miss() -> None:
    """A prompt as large as the pool hits itself again and again, in place once nothing is free."""
    m = pk.BlockManager(4, block_size=2)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    blocks = table(m, a := admit(m, prompt))
    for _ in range(3):
        m.release([a])
        a = m.create(prompt)
        assert m.num_cached(a) == 7
        m.commit(plan := m.append([a], [8]))
        assert plan.num_copies == 0
        assert table(m, a) == blocks
        assert hit(m, prompt) == 8


@pytest.mark.parametrize("how", ["a hit", "truncate"])
def test_rule_03_what_is_cached_below_a_taken_over_block_is_evicted(how: str) -> None:
    """It is room as any other, and hangs below the one block that there is no copy for."""
    m = pk.BlockManager(3, block_size=4)
    a = admit(m, list(range(12)))
    if how == "truncate":
        m.truncate([a], [2])
    else:
        m.release([a])
        a = m.create([0, 1, *range(50, 60)])
    assert (m.length(a), m.stats().device.num_cached) == (2, 2)
    m.commit(plan := m.append([a], list(range(50, 60)), counts=[10]))
    assert (plan.num_copies, m.stats().num_evicted_blocks) == (0, 2)
    assert (hit(m, list(range(12))), hit(m, [0, 1, *range(50, 60)])) == (2, 12)


def test_rule_03_what_others_need_is_not_taken_over() -> None:
    """Neither from another sequence nor from a block below."""
    m = pk.BlockManager(2, block_size=2)
    a = admit(m, [1, 2, 3, 4])
    b = m.fork(a, 2)[1]
    m.truncate([b], [3])
    with pytest.raises(pk.OutOfBlocks):
        m.append([b], [9])
    m.truncate([b], [1])
    with pytest.raises(pk.OutOfBlocks):
        m.append([b], [9])
    assert hit(m, [1, 2, 3, 4]) == 4


def test_rule_03_rollback_keeps_a_taken_over_block_private() -> None:
    """Its slots may have been written already."""
    m = pk.BlockManager(2, block_size=2)
    m.release([admit(m, [1, 2, 3, 4])])
    a = m.create([1, 2, 3, 4])
    m.rollback(m.append([a], [4]))
    assert (m.length(a), hit(m, [1, 2, 3, 4])) == (3, 2)


# ----------------------------------------------------------------------- commit


def test_rule_04_commit_publishes_and_merges_equal_blocks() -> None:
    """Two that computed the same prompt at the same time share it from then on."""
    m = pk.BlockManager(8, block_size=2)
    a, b = m.create([1, 2, 3, 4]), m.create([1, 2, 3, 4])
    plan = m.append([a, b], [1, 2, 3, 4, 1, 2, 3, 4], counts=[4, 4])
    assert len(set(plan.block_tables.ravel().tolist())) == 4
    assert hit(m, [1, 2, 3, 4]) == 0
    m.commit(plan)
    assert table(m, a) == table(m, b)
    assert (m.stats().device.num_free, m.stats().num_merged_blocks) == (6, 2)
    assert hit(m, [1, 2, 3, 4]) == 4


def test_rule_04_late_tokens_merge_while_the_path_is_one_sequence() -> None:
    m = pk.BlockManager(8, block_size=2)
    a, b = admit(m, [1, 2]), late(m, 4)
    below = table(m, b)[1]
    m.record([b], [1, 2, 3], counts=[3])
    assert table(m, b) == [*table(m, a), below]
    m.record([b], [4])
    assert hit(m, [1, 2, 3, 4]) == 4


def test_rule_04_late_tokens_of_a_shared_block_stay_private() -> None:
    """So do all blocks below; they are freed with their last holder. Contradictions are refused."""
    m = pk.BlockManager(8, block_size=2)
    ids = m.fork(late(m, 2), 2)
    m.record([ids[0]], [3, 4], counts=[2])
    with pytest.raises(pk.InvalidSpec, match=r"tokens\[1\] is 5"):
        m.record([ids[1]], [3, 5], counts=[2])
    m.commit(m.append([ids[0]], [5, 6], counts=[2]))
    assert hit(m, [3, 4, 5, 6]) == 0
    m.release(ids)
    assert m.stats().device.num_free == 8


@pytest.mark.parametrize("depth", [1, 2])
def test_rule_04_a_merge_above_a_fork_does_not_reach_the_other_rows(depth: int) -> None:
    """Late tokens of a block that two rows run through must leave both rows valid."""
    m = pk.BlockManager(8, block_size=1)
    a = admit(m, [7])
    ids = m.fork(late(m, depth + 1), 2)
    m.record([ids[0]], [7])
    assert table(m, ids[0]) == table(m, ids[1])
    plan = m.append(ids)
    assert plan.block_tables[0, : depth + 1].tolist() == plan.block_tables[1, : depth + 1].tolist()
    assert plan.block_tables[:, : depth + 1].min() > 0
    m.commit(plan)
    assert m.block_table(a).size == 1


# ----------------------------------------------------------------------- steps


def test_rule_05_one_step_is_open_at_a_time() -> None:
    """Every other change is refused, every question answered."""
    m = pk.BlockManager(8, block_size=2)
    a, b = admit(m, [1, 2, 3]), admit(m, [5])
    old = m.append([b], [6])
    m.commit(old)
    plan = m.append([a], [4])
    before = state(m)
    changes: list[Callable[[], object]] = [
        lambda: m.create([1]),
        lambda: m.create(),
        lambda: m.append([b], [6]),
        lambda: m.record([b], [6]),
        lambda: m.fork(b, 2),
        lambda: m.reorder([a, b], [1, 0]),
        lambda: m.truncate([b], [1]),
        lambda: m.release([b]),
        lambda: m.clear(),
        lambda: m.commit(old),
        lambda: m.rollback(old),
    ]
    for change in changes:
        with pytest.raises(pk.InvalidState):
            change()
    assert (m.length(a), m.num_cached(a), m.lookup([1, 2, 0]).num_tokens) == (4, 0, 2)
    assert (m.num_needed([b]), m.num_freed([b])) == (1, 1)
    assert state(m) == before
    m.commit(plan)
    with pytest.raises(pk.InvalidState):
        m.commit(plan)


def test_rule_05_rollback_is_as_if_the_step_had_not_been() -> None:
    """Paths, lengths and counts; only what was evicted stays so."""
    m = pk.BlockManager(5, block_size=2)
    ids = m.fork(admit(m, [1, 2, 3]), 2)
    m.release([admit(m, [8, 9])])
    before = state(m)
    m.rollback(m.append(ids, [4, 5, 6, 7], counts=[2, 2]))
    after = state(m)
    assert after[-1] == before[-1]
    assert after[1:3] == before[1:3]
    assert after[0].num_active == before[0].num_active
    assert (hit(m, [8, 9]), m.stats().num_evicted_blocks) == (0, 1)


def test_rule_05_commit_drops_rejected_tokens_before_it_publishes() -> None:
    m = pk.BlockManager(8, block_size=2)
    a = m.create([1, 2, 3, 4, 5])
    plan = m.append([a], [1, 2, 3, 4, 5], counts=[5])
    for wrong in ([6], [-1], [3, 3], []):
        with pytest.raises(pk.InvalidSpec, match="lengths"):
            m.commit(plan, wrong)
    m.commit(plan, [3])
    assert (m.length(a), hit(m, [1, 2, 3, 4])) == (3, 2)
    assert m.stats().device.num_active == 2
    m.commit(m.append([a], [7]))
    assert (hit(m, [1, 2, 3, 4]), hit(m, [1, 2, 3, 7])) == (3, 4)


# ----------------------------------------------------------------------- eviction


def test_rule_06_the_least_recently_used_leaf_goes_first() -> None:
    m = pk.BlockManager(4, block_size=1, max_model_len=8)
    old, new = admit(m, [3]), admit(m, [1, 2])
    m.release([old])
    m.release([new])
    a = admit(m, [7, 8])
    assert (hit(m, [3]), hit(m, [1, 2])) == (0, 2)
    m.commit(m.append([a], [9]))
    assert hit(m, [1, 2]) == 1
    m.commit(m.append([a], [9]))
    assert hit(m, [1, 2]) == 0
    with pytest.raises(pk.OutOfBlocks):
        m.append([a], [9])


@pytest.mark.parametrize("how", ["reorder", "truncate"])
def test_rule_06_what_is_abandoned_goes_before_what_is_released(how: str) -> None:
    """A beam that lost, or a rejected draft, is worth less than any finished request."""
    m = pk.BlockManager(5, block_size=1)
    m.release([admit(m, [3, 4])])
    a, b = m.fork(admit(m, [1]), 2)
    m.commit(m.append([a, b], [5, 6]))
    if how == "reorder":
        m.reorder([a, b], [0, 0])
    else:
        m.truncate([b], [1])
    assert hit(m, [1, 6]) == 2
    m.commit(m.append([a], [9]))
    assert (hit(m, [1, 6]), hit(m, [3, 4])) == (1, 2)


def test_rule_06_a_parent_that_was_given_up_goes_right_after_its_last_child() -> None:
    """A trunk with two leaves is given up, in turn with a request that ended before."""
    m = pk.BlockManager(5, block_size=1)
    m.release([admit(m, [8, 9])])
    a, b = m.fork(admit(m, [1]), 2)
    m.commit(m.append([a, b], [5, 6]))
    m.release([b])  # [1, 6] is the hottest of all
    m.truncate([a], [0])  # [1, 5] is the coldest, and [1] waits for both
    c = m.create([], salt="other")
    found = []
    for _ in range(5):
        m.commit(m.append([c], [7]))
        found.append((hit(m, [8, 9]), hit(m, [1, 5]), hit(m, [1, 6])))
        m.verify()
    assert found == [(2, 1, 2), (1, 1, 2), (0, 1, 2), (0, 1, 1), (0, 0, 0)]


def test_rule_06_long_paths_need_no_stack() -> None:
    """A path of 60,000 blocks is released, evicted and cleared."""
    m = pk.BlockManager(60_000, block_size=1, max_batch=2)
    tokens = np.arange(60_000, dtype=np.int32)
    for salt in ("evicted", "cleared"):
        a = m.create([], salt=salt)
        m.commit(m.append([a], tokens, counts=[len(tokens)]))
        m.release([a])
    assert m.stats().num_evicted_blocks == 60_000
    m.clear("cleared")
    assert m.stats().device.num_free == 60_000
    m.verify()
