"""The rules of the manager around the tree: batches, tables, plans, lookups."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest

import pagedkv as pk
from small import admit, hit, late, state, table

# ----------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m, a, b: m.append([a, b], [0] * 12, counts=[2, 10]), pk.OutOfBlocks),
        (lambda m, a, b: m.append([a, b], [0, 0, 0], counts=[1, 1]), pk.InvalidSpec),
        (lambda m, a, b: m.append([a, b], counts=[1, 33]), pk.InvalidSpec),
        (lambda m, a, b: m.append([a, b, a]), pk.InvalidSpec),
        (lambda m, a, b: m.append([a, b, b + 12345]), pk.UnknownSequence),
        (lambda m, a, b: m.record([a, b], [0, 0]), pk.InvalidSpec),
        (lambda m, a, b: m.truncate([a, b], [1, 9]), pk.InvalidSpec),
        (lambda m, a, b: m.reorder([a, b], [1, 2]), pk.InvalidSpec),
        (lambda m, a, b: m.release([a, b, -1]), pk.UnknownSequence),
    ],
)
def test_rule_12_all_or_nothing(call: Callable[..., object], error: type[pk.KVError]) -> None:
    """What is wrong with the last of a batch leaves the first as it was, eviction included."""
    m = pk.BlockManager(6, block_size=2, max_model_len=32)
    a, b = m.fork(admit(m, [1, 2, 3]), 2)
    m.release([admit(m, [8, 9])])
    before = state(m)
    with pytest.raises(error):
        call(m, a, b)
    assert state(m) == before
    assert hit(m, [8, 9]) == 2
    assert m.append([a, b]).num_copies == 1


def test_rule_12_the_watermark_is_left_by_first_appends_only() -> None:
    m = pk.BlockManager(4, block_size=1, watermark=2)
    a, b = admit(m, [1]), m.create([2, 3])
    with pytest.raises(pk.OutOfBlocks):
        m.append([b], [2, 3], counts=[2])
    m.commit(m.append([a], [5, 6], counts=[2]))
    with pytest.raises(pk.OutOfBlocks):
        m.append([b], [2])


# ----------------------------------------------------------------------- tables


def test_rule_13_only_changed_cells_are_sent() -> None:
    m = pk.BlockManager(64, block_size=2, max_batch=4)
    a, b = m.fork(admit(m, [1, 2, 3, 4, 5, 6]), 2)

    def step() -> list[list[int]]:
        m.commit(plan := m.append([a, b], [7, 8]))
        return list(plan.table_updates.tolist())

    assert step() == [[0, 3, 4], [1, 0, 4]]  # b is new in the batch: the whole row
    assert step() == []  # no new block
    assert step() == [[0, 4, 5], [1, 4, 5]]
    m.reorder([a, b], [0, 0])
    assert step()[-1] == [1, 3, 5]  # from where the two paths part; a's row is as it was
    m.truncate([a, b], [4, 4])
    assert step() == [[0, 2, 5], [1, 2, 5]]  # and padding where there were blocks
    a, b = b, a
    assert [first for _, first, _ in step()] == [0, 0]


def test_rule_13_a_merge_sends_the_row_from_the_merged_block() -> None:
    m = pk.BlockManager(16, block_size=2)
    a, b = m.fork(admit(m, [1, 2]), 2)
    m.commit(m.append([a, b], [3, 4, 3, 4], counts=[2, 2]))
    plan = m.append([a, b], [5, 6])
    assert plan.table_updates.tolist() == [[0, 2, 3], [1, 1, 3]]
    assert plan.block_tables[0, :2].tolist() == plan.block_tables[1, :2].tolist()


# ----------------------------------------------------------------------- plans


def test_rule_14_a_plan_is_a_view_until_the_next_append() -> None:
    m = pk.BlockManager(16, block_size=2)
    a = m.create([1, 2])
    plan = m.append([a], [1, 2], counts=[2])
    address = plan.slots.__array_interface__["data"][0]
    kept, pickled = plan.copy(), pickle.loads(pickle.dumps(plan))
    assert plan == kept == pickled
    m.commit(plan)
    assert plan.slots.tolist() == kept.slots.tolist()
    later = m.append([a], [3])
    assert later.slots.__array_interface__["data"][0] == address
    assert later != kept
    names = ("slots", "positions", "input_ids", "query_starts", "seq_lens", "block_tables")
    for name in (*names, "copies", "table_updates", "wait_for", "num_tokens", "batch_size"):
        with pytest.raises(pk.InvalidState):
            getattr(plan, name)
        assert np.array_equal(getattr(pickled, name), getattr(kept, name))
    for value in (kept, pickled):
        with pytest.raises(pk.InvalidState):
            m.commit(value)
    m.commit(later)


def test_rule_14_nobody_writes_into_the_managers_buffers() -> None:
    """Tables are kept up to date in place: what stood there would be in later steps."""
    m = pk.BlockManager(8, 8, block_size=2)
    a = m.create([1])
    plan = m.append([a], [1])
    names = ("slots", "positions", "input_ids", "query_starts", "seq_lens", "block_tables")
    for name in (*names, "copies", "table_updates", "wait_for"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(plan, name)[...] = 5
        getattr(plan.copy(), name)[...] = 5
    m.commit(plan)
    with pytest.raises(ValueError, match="read-only"):
        m.swap_out([a]).copies[0, 0] = 5


def test_rule_14_a_plan_shows_its_own_transfers_however_many_there_are() -> None:
    m = pk.BlockManager(4, 16, block_size=2)
    for last in range(4):
        plan = m.append([a := m.create()], counts=[8])  # of all blocks, which the last one reads
        assert plan.wait_for.tolist() == [last][: last > 0]
        m.commit(plan)
        m.swap_out([a])


def test_rule_14_another_managers_plan_is_refused() -> None:
    m, other = pk.BlockManager(4), pk.BlockManager(4)
    plan, foreign = m.append([m.create()]), other.append([other.create()])
    for close in (m.commit, m.rollback):
        with pytest.raises(pk.InvalidState):
            close(foreign)
    m.commit(plan)


# ----------------------------------------------------------------------- without tokens


def test_rule_15_anonymous_sequences_share_by_fork_only() -> None:
    """Never a hit, even with tokens; written in place by a sole holder; freed at the end."""
    m = pk.BlockManager(8, block_size=2)
    a = m.create()
    m.commit(m.append([a], [1, 2, 3], counts=[3]))
    assert hit(m, [1, 2]) == 0
    m.truncate([a], [1])
    plan = m.append([a])
    assert (plan.num_copies, plan.input_ids) == (0, None)
    m.commit(plan)
    ids = m.fork(a, 2)
    m.commit(m.append(ids))
    m.release(ids)
    assert m.stats().device.num_free == 8


def test_rule_15_known_tokens_cannot_follow_unknown_ones() -> None:
    m = pk.BlockManager(8, block_size=2)
    a = late(m, 3)
    with pytest.raises(pk.InvalidSpec, match="record"):
        m.append([a], [4])
    m.record([a], [1, 2, 3], counts=[3])
    m.commit(m.append([a], [4]))
    assert hit(m, [1, 2, 3, 4]) == 4


# ----------------------------------------------------------------------- lookup


def test_rule_16_partial_hits_look_at_the_newest_children() -> None:
    """Sixteen of them; whole blocks are found however many siblings they have."""
    m = pk.BlockManager(64, block_size=3)
    blocks = [table(m, admit(m, [7, k, 0]))[0] for k in range(20)]
    assert [hit(m, [7, k, 0]) for k in range(20)] == [3] * 20
    assert [hit(m, [7, k, 9]) for k in range(20)] == [1] * 4 + [2] * 16
    assert table(m, m.create([7, 99, 0, 0])) == [blocks[-1]]  # a tie: the newest
    assert hit(m, [8, 0, 0]) == 0


def test_rule_16_salts_never_meet() -> None:
    m = pk.BlockManager(16, block_size=2)
    admit(m, [1, 2, 3, 4], salt=b"a")
    assert [hit(m, [1, 2, 3, 4], salt) for salt in (b"a", "a")] == [4, 4]
    assert [hit(m, [1, 2, 3, 4], salt) for salt in (None, b"", "", b"a\0", "A")] == [0] * 5
    admit(m, [5, 6])
    assert [hit(m, [5, 6], salt) for salt in (None, b"", "")] == [2, 2, 2]


def test_rule_16_roots_without_children_go() -> None:
    """As many salts as there are requests take no memory."""
    m = pk.BlockManager(4, block_size=2)
    for k in range(2000):
        m.release([admit(m, [1, 2], salt=str(k).encode())])
        if k == 100:
            memory = m.stats().metadata_bytes
    assert m.stats().metadata_bytes == memory
    assert hit(m, [1, 2], "1999") == 2


def test_rule_16_clear_hides_one_salt_or_all() -> None:
    """Blocks in use live on, but neither they nor what is appended to them are hits again."""
    m = pk.BlockManager(16, block_size=2)
    a = admit(m, [1, 2], salt=b"a")
    m.release([admit(m, [3, 4], salt=b"a"), admit(m, [5, 6])])
    m.clear("a")
    assert [hit(m, [1, 2], b"a"), hit(m, [3, 4], b"a"), hit(m, [5, 6])] == [0, 0, 2]
    m.commit(m.append([a], [8, 9], counts=[2]))
    assert hit(m, [1, 2, 8, 9], b"a") == 0
    m.clear()
    m.release([a])
    assert (hit(m, [5, 6]), m.stats().device.num_free) == (0, 16)
