"""Commands between tiers: all or nothing, refused where they must be, and plans that are values."""

from __future__ import annotations

import pickle

import pytest

import pagedkv as pk
from small import admit, flush, on_host, state
from small import two_tiers as manager


def test_a_full_tier_refuses_and_nothing_has_changed() -> None:
    m = manager(device=6, host=2)
    a, b = admit(m, [1, 2, 3]), admit(m, [4, 5, 6, 7])
    before = state(m)
    with pytest.raises(pk.OutOfBlocks) as error:
        m.swap_out([a, b])
    assert (error.value.tier, error.value.needed, error.value.available) == ("host", 4, 2)
    assert state(m) == before
    on_host(m, [a])
    filler = m.create()
    m.commit(m.append([filler], counts=[8]))
    with pytest.raises(pk.OutOfBlocks) as error:
        m.swap_in([a])
    assert (error.value.tier, error.value.available) == ("device", 0)
    m.verify()


def test_a_batch_does_not_evict_its_own_hits() -> None:
    m = manager(device=8, host=3)
    a = admit(m, [1, 2, 3, 4])
    on_host(m, [a])
    m.complete(m.swap_in([a]))  # its two blocks stay cached on the host, which has one more
    b = admit(m, [8, 8])
    plan = m.swap_out([b, a])
    assert plan.num_copies == 1
    m.complete(plan)
    m.verify()


def test_commands_between_tiers_need_a_host_tier_and_no_open_step() -> None:
    m = pk.BlockManager(4, block_size=2)
    a = admit(m, [1])
    for call in (lambda: m.swap_out([a]), lambda: m.swap_in([a]), lambda: m.fetch(a)):
        with pytest.raises(pk.InvalidState, match="num_host_blocks is 0"):
            call()
    m = manager()
    a = admit(m, [1, 2, 3])
    out = m.swap_out([a])
    plan = m.append([m.create()], [1])
    for call in (
        lambda: m.swap_out([a]),
        lambda: m.swap_in([a]),
        lambda: m.fetch(a),
        lambda: m.complete(out),
        lambda: m.abort(out),
        lambda: m.drop([a]),
        lambda: m.restore([a]),
    ):
        with pytest.raises(pk.InvalidState, match="is open"):
            call()
    m.commit(plan)
    m.complete(out)


def test_a_dropped_sequence_takes_back_what_is_still_a_hit() -> None:
    m = manager()
    a = admit(m, [1, 2, 3, 4, 5])
    b = int(m.fork(a, 2)[1])
    m.drop([a, b])
    assert m.stats().device.num_active == 0
    assert (m.length(a), m.is_dropped(a)) == (0, True)
    m.restore([a])
    assert m.length(a) == 4
    flush(m)
    m.restore([b])
    assert m.length(b) == 4  # a holds it
    with pytest.raises(pk.InvalidState, match="was not dropped"):
        m.restore([b])
    late = m.create([])
    m.commit(m.append([late], counts=[3]))
    m.drop([late])
    m.restore([late])
    assert m.length(late) == 0
    m.verify()


def test_transfer_plans_are_values() -> None:
    m = manager()
    plan = m.swap_out([admit(m, [1, 2, 3])])
    twin = pickle.loads(pickle.dumps(plan))
    assert twin == plan
    assert hash(twin) == hash(plan)
    assert (twin.id, twin.direction, twin.copies.tolist()) == (1, "out", plan.copies.tolist())
    assert repr(plan) == "<TransferPlan id=1 direction=out num_copies=2>"
    copies = plan.copies
    del plan, m
    assert copies.tolist() == twin.copies.tolist()
