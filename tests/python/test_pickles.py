"""Plans as pickles: whole, and damaged on their way. Needs no torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pagedkv as pk

BAD_STATES: list[tuple[str, Callable[[list[Any]], Any]]] = [
    ("no arrays", lambda a: []),
    ("an array too few", lambda a: a[:-1]),
    ("int32 slots", lambda a: [*a[:1], a[1].astype(np.int32), *a[2:]]),
    ("a list", lambda a: [*a[:1], a[1].tolist(), *a[2:]]),
    ("fewer positions", lambda a: [*a[:2], a[2][:-1], *a[3:]]),
    ("fewer starts", lambda a: [*a[:3], a[3][:-1], *a[4:]]),
    ("starts past the tokens", lambda a: [*a[:3], a[3] + np.int32(9), *a[4:]]),
    ("starts backwards", lambda a: [*a[:3], np.array([0, 3, 2], np.int32), *a[4:]]),
    ("fewer rows", lambda a: [*a[:5], a[5][:-1], *a[6:]]),
    ("flat tables", lambda a: [*a[:5], a[5].ravel(), *a[6:]]),
    ("strided tables", lambda a: [*a[:5], np.repeat(a[5], 2, 1)[:, ::2], *a[6:]]),
    ("copies of two", lambda a: [*a[:6], a[6].reshape(-1, 3)[:, :2].copy(), *a[7:]]),
    ("many copies", lambda a: [*a[:6], np.zeros((9, 3), np.int32), *a[7:]]),
    ("an update of no row", lambda a: [*a[:7], np.array([[2, 0, 1]], np.int32), a[8]]),
    ("an update backwards", lambda a: [*a[:7], np.array([[0, 1, 0]], np.int32), a[8]]),
    ("floats to wait for", lambda a: [*a[:8], np.zeros(1)]),
]


@pytest.mark.parametrize("change", [b[1] for b in BAD_STATES], ids=[b[0] for b in BAD_STATES])
def test_damaged_pickles_are_refused(change: Any) -> None:
    manager = pk.BlockManager(20, block_size=4)
    seq = manager.create()
    manager.commit(manager.append([seq], [1, 2], counts=[2]))
    plan = manager.append(manager.fork(seq, 2), [3, 4])
    make, (step, after, arrays) = plan.__reduce__()
    again = make(step, after, arrays)
    assert again == plan
    assert (again.num_copies, again.after) == (1, 1)
    with pytest.raises(pk.InvalidSpec, match=r"plan|pickle"):
        make(step, after, tuple(change(list(arrays))))


def test_arrays_that_travel_apart_may_arrive_in_read_only_memory() -> None:
    """Such as that of a message: torch takes arrays that can be written in."""
    manager = pk.BlockManager(20, block_size=4)
    plan = manager.append([manager.create()], [1, 2], counts=[2])
    parts: list[pickle.PickleBuffer] = []
    data = pickle.dumps(plan, protocol=5, buffer_callback=parts.append)
    again = pickle.loads(data, buffers=[bytes(part) for part in parts])
    assert again == plan
    assert again.block_tables.flags.writeable


def test_what_a_scheduler_reports_travels() -> None:
    manager = pk.BlockManager(20, block_size=4, num_host_blocks=5)
    tokens = np.arange(9)
    ids = [manager.create(tokens, salt="a"), manager.create(tokens)]
    manager.commit(manager.append(ids[1:], tokens, counts=[9]))
    manager.complete(manager.swap_out(ids[1:]).id)
    stats, hit = manager.stats(), manager.lookup(tokens)
    assert stats.host.num_active == 3
    assert pickle.loads(pickle.dumps(stats)) == copy.deepcopy(stats) == stats
    assert pickle.loads(pickle.dumps(hit)) == hit
    snapshot = manager.snapshot()
    again = pickle.loads(pickle.dumps(snapshot))
    assert again == manager.snapshot() == snapshot
    names = [name for name in dir(snapshot) if not name.startswith("_")]
    assert "published" in names
    for name in names:
        before, after = getattr(snapshot, name), getattr(again, name)
        assert after.dtype == before.dtype
        assert after.tolist() == before.tolist()
    assert snapshot.published.tolist() == [True, True, False]
    manager.release(ids)
    assert manager.snapshot() != snapshot


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_manager_cannot_be_pickled_by_any_protocol(protocol: int) -> None:
    with pytest.raises(TypeError, match="a BlockManager cannot be copied or pickled"):
        pickle.dumps(pk.BlockManager(4), protocol)
