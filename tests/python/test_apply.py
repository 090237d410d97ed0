"""A worker's cache carries out pickled plans of a manager elsewhere: once each, and in order."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv.attention.groups import shared_runs  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda, SimulatedDevice  # noqa: E402

SPEC = pk.KVSpec(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32", block_size=4)
BLOCKS, HOST_BLOCKS, BATCH = 40, 20, 8
DEVICES: dict[str, Callable[[], Any]] = {
    "cpu": lambda: "cpu",
    "simulated": lambda: SimulatedDevice(5),
    "cuda": lambda: CudaDevice(SimulatedCuda(5)),
}
ARRAYS = ["input_ids", "slots", "positions", "query_starts", "seq_lens", "block_tables"]


@pytest.fixture
def manager() -> pk.BlockManager:
    return pk.BlockManager(BLOCKS, HOST_BLOCKS, block_size=4, max_batch=BATCH)


@pytest.fixture(params=DEVICES)
def worker(request: pytest.FixtureRequest) -> Iterator[pk.KVCache]:
    with make_worker(DEVICES[request.param]()) as kv:
        yield kv


def make_worker(device: Any = "cpu", **options: Any) -> pk.KVCache:
    size = {"num_device_blocks": BLOCKS, "num_host_blocks": HOST_BLOCKS, "max_batch": BATCH}
    return pk.KVCache(SPEC, device=device, **size | options)


def sent(plan: Any) -> Any:
    return pickle.loads(pickle.dumps(plan))


def committed(manager: pk.BlockManager, ids: Any, counts: Any = None) -> Any:
    """A plan as it comes out of a pipe."""
    counts = [1] * len(ids) if counts is None else counts
    plan = manager.append(ids, np.zeros(sum(counts), np.int64), counts=counts)
    value = sent(plan)
    manager.commit(plan)
    return value


def history(step: Any, texts: dict[int, list[float]], ids: Any) -> Any:
    """New keys [T, H, D]: each token is a number that nobody else has, and its text grows by it."""
    new = []
    for row, i in enumerate(ids):
        for _ in range(int(step.plan.query_starts[row + 1] - step.plan.query_starts[row])):
            number = 1.0 + sum(len(t) for t in texts.values()) + 1000 * step.plan.step
            texts[int(i)].append(number)
            new.append(number)
    return torch.tensor(new)[:, None, None].expand(-1, 2, 4)


def check(manager: pk.BlockManager, kv: pk.KVCache, texts: dict[int, list[float]]) -> None:
    kv._pool.synchronize()
    for i, text in texts.items():
        table = torch.from_numpy(manager.block_table(i)).long()
        for layer in range(2):
            k = kv.k(layer)[table].flatten(0, 1)[: len(text)]
            v = kv.v(layer)[table].flatten(0, 1)[: len(text)]
            assert k[:, 0, 0].tolist() == text, f"sequence {i}"
            assert torch.equal(k, -v)


def test_a_random_program_of_plans_leaves_the_right_content(worker: pk.KVCache) -> None:
    """Forks, reorders, truncations, swaps, rollbacks; the worker hears of the plans alone."""
    manager = pk.BlockManager(BLOCKS, HOST_BLOCKS, block_size=4, max_batch=BATCH)
    random = np.random.default_rng(7)
    texts: dict[int, list[float]] = {}
    num_gaps = num_copies = num_swaps = 0
    for _ in range(250):
        action = int(random.integers(8))
        ids = list(texts)
        if not ids or (action == 0 and len(ids) < 6):
            texts[manager.create()] = []
        elif action == 1 and len(ids) < 7:
            i = int(random.choice(ids))
            texts[int(manager.fork(i, 2)[1])] = list(texts[i])
        elif action == 2:
            parents = random.integers(0, len(ids), len(ids))
            manager.reorder(np.array(ids), parents)
            old = [list(texts[ids[p]]) for p in parents]
            texts.update(zip(ids, old, strict=True))
        elif action == 3:
            i = int(random.choice(ids))
            length = int(random.integers(len(texts[i]) + 1))
            manager.truncate([i], [length])
            del texts[i][length:]
        elif action == 4 and len(ids) > 2:
            i = int(random.choice(ids))
            manager.release([i])
            del texts[i]
        elif action == 5:
            i = int(random.choice(ids))
            for move in (manager.swap_out, manager.swap_in):
                plan = move([i])
                worker.apply(sent(plan)).wait()
                manager.complete(plan)
                num_swaps += plan.num_copies
        else:
            batch = [int(i) for i in random.permutation(ids)[: 1 + random.integers(len(ids))]]
            counts = random.integers(1, 6, len(batch)).tolist()
            if manager.num_needed(batch, counts) > manager.stats().device.num_free:
                continue
            plan = manager.append(batch, np.zeros(sum(counts), np.int64), counts=counts)
            fate = int(random.integers(4))
            if fate > 0:
                carry_out(worker, sent(plan), texts if fate > 1 else {i: [] for i in ids}, batch)
            if fate < 2:  # never heard of, or carried out in vain
                manager.rollback(plan)
                num_gaps += 1
                continue
            num_copies += plan.num_copies
            manager.commit(plan)
        check(manager, worker, texts)
    assert min(num_gaps, num_copies, num_swaps) > 5
    manager.verify()


def carry_out(worker: pk.KVCache, plan: Any, texts: dict[int, list[float]], ids: Any) -> None:
    with worker.apply(plan) as step:
        for name in ARRAYS:
            assert getattr(step, name).tolist() == getattr(plan, name).tolist(), name
        k = history(step, texts, ids)
        for layer in range(2):
            worker.write(layer, k, -k, step)


def test_attention_on_a_worker_is_attention_on_one_cache(worker: pk.KVCache) -> None:
    manager = pk.BlockManager(BLOCKS, block_size=4, max_batch=BATCH)
    with pk.KVCache(SPEC, num_device_blocks=BLOCKS, max_batch=BATCH) as one:
        random = torch.Generator().manual_seed(0)
        here, there = one.create(), manager.create()
        for n, count in enumerate((6, 1, 1, 3)):
            if n == 1:
                mine, theirs = one.fork(here, 3), manager.fork(there, 3)
            ids, others = ([here], [there]) if n == 0 else (mine, theirs)
            counts = [count] * len(ids)
            q, k, v = (torch.randn(sum(counts), h, 4, generator=random) for h in (4, 2, 2))
            plan = manager.append(others, counts=counts)
            with one.step(ids, counts=counts) as a, worker.apply(sent(plan)) as b:
                assert a.block_tables.tolist() == b.block_tables.tolist()
                assert shared_runs(a) == shared_runs(b)
                for layer in range(2):
                    one.write(layer, k, v, a)
                    worker.write(layer, k, v, b)
                    assert torch.equal(one.attention(layer, q, a), worker.attention(layer, q, b))
            manager.commit(plan)


# ---- order -------------------------------------------------------------------------------------


def test_a_step_comes_once(manager: pk.BlockManager, worker: pk.KVCache) -> None:
    plans = [committed(manager, [manager.create()]) for _ in range(3)]
    assert [(p.step, p.after) for p in plans] == [(1, 0), (2, 1), (3, 2)]
    for plan in plans[:2]:
        with worker.apply(plan):
            pass
        with pytest.raises(pk.InvalidState, match=f"expected step {plan.step + 1} or a later one"):
            worker.apply(plan)
    with pytest.raises(pk.InvalidState, match="step 1 was carried out here before"):
        worker.apply(plans[0])
    with worker.apply(plans[2]):
        pass


def test_a_committed_step_may_not_be_left_out(manager: pk.BlockManager, worker: pk.KVCache) -> None:
    one, two, three = (committed(manager, [manager.create()]) for _ in range(3))
    with pytest.raises(pk.InvalidState, match=r"step 2 comes after step 1.*last one here was"):
        worker.apply(two)
    with worker.apply(one):
        pass
    with pytest.raises(pk.InvalidState, match="step 3 comes after step 2, which was not"):
        worker.apply(three)
    for plan in (two, three):
        with worker.apply(plan):
            pass


@pytest.mark.parametrize("heard", [False, True])
def test_a_step_that_was_rolled_back_may_be_left_out_or_not(
    manager: pk.BlockManager, worker: pk.KVCache, heard: bool
) -> None:
    seq = manager.create()
    with worker.apply(committed(manager, [seq])):
        pass
    for _ in range(2):
        plan = manager.append([seq])
        if heard:
            worker.apply(sent(plan)).commit()
        manager.rollback(plan)
    last = committed(manager, [seq])
    assert (last.step, last.after) == (4, 1)
    with worker.apply(last):
        pass


def test_a_step_that_failed_here_is_tried_again_or_missed(
    manager: pk.BlockManager, worker: pk.KVCache
) -> None:
    seq = manager.create()
    plan, late = committed(manager, [seq]), committed(manager, [seq])
    with pytest.raises(ZeroDivisionError), worker.apply(plan):
        _ = 1 / 0
    with pytest.raises(pk.InvalidState, match="step 2 comes after step 1"):
        worker.apply(late)
    for again in (plan, late):
        with worker.apply(again):
            pass


def test_the_next_plan_ends_a_step_that_nobody_closed(
    manager: pk.BlockManager, worker: pk.KVCache
) -> None:
    """For an engine whose own kernels read the plan: apply() is all that it calls."""
    seq = manager.create()
    first = worker.apply(committed(manager, [seq]))
    assert first.is_open
    assert first.is_applied
    second = worker.apply(committed(manager, [seq]))
    assert not first.is_open
    with pytest.raises(pk.InvalidState, match="not open"):
        worker.write(0, torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), first)
    with pytest.raises(pk.InvalidState, match="before the next"):
        _ = first.slots
    assert second.slots.tolist() == [5]
    transfer = worker.apply(sent(manager.swap_out([seq])))
    assert not second.is_open
    transfer.wait()
    assert transfer.done


def test_transfers_come_once_and_in_order(manager: pk.BlockManager, worker: pk.KVCache) -> None:
    a, b = manager.create(), manager.create()
    step = committed(manager, [a, b], [5, 3])
    out = [manager.swap_out([i]) for i in (a, b)]
    for plan in out:
        assert sent(plan) == plan
        assert plan.after == 1
    with pytest.raises(pk.InvalidState, match="transfer 1 comes after step 1, which was not"):
        worker.apply(sent(out[0]))
    with worker.apply(step):
        pass
    with pytest.raises(pk.InvalidState, match="transfer 2 comes too early: expected transfer 1"):
        worker.apply(sent(out[1]))
    worker.apply(sent(out[0]))
    with pytest.raises(pk.InvalidState, match=r"transfer 1 was applied here before: expected .* 2"):
        worker.apply(sent(out[0]))
    worker.apply(sent(out[1])).wait()
    while worker.under_way():
        worker.poll()


def test_a_step_waits_for_a_transfer_that_has_to_be_there(
    manager: pk.BlockManager, worker: pk.KVCache
) -> None:
    a = manager.create()
    with worker.apply(committed(manager, [a], [7])):
        pass
    out = sent(manager.swap_out([a]))
    filler = committed(manager, [manager.create()], [BLOCKS * 4])
    assert filler.wait_for.tolist() == [1]
    with pytest.raises(pk.InvalidState, match="waits for transfer 1, which was not applied here"):
        worker.apply(filler)
    worker.apply(out)
    with worker.apply(filler):
        pass


# ---- what goes wrong -------------------------------------------------------------------------


def test_a_failed_copy_is_the_schedulers_to_abort() -> None:
    manager = pk.BlockManager(BLOCKS, HOST_BLOCKS, block_size=4)
    device = SimulatedDevice(3)
    with make_worker(device) as worker:
        a = manager.create()
        with worker.apply(committed(manager, [a], [6])):
            pass
        out = manager.swap_out([a])
        device.fail_copy()
        transfer = worker.apply(sent(out))
        with pytest.raises(pk.TransferError, match="transfer 1 failed"):
            transfer.wait()
        assert transfer.error is not None
        assert worker.poll() == []  # it was told
        assert manager.abort(out).sequences.tolist() == [a]
        manager.verify()
        assert not device.violations


def test_blocks_that_are_not_here_are_refused_and_nothing_is_done(worker: pk.KVCache) -> None:
    large = pk.BlockManager(BLOCKS * 4, HOST_BLOCKS * 4, block_size=4, max_batch=BATCH)
    filler = large.create()
    committed(large, [filler], [BLOCKS * 4 + 2])
    beams = large.fork(filler, 2)
    copies = committed(large, beams)
    assert copies.copies[0, :2].max() > BLOCKS
    for pool in (pool for i in range(2) for pool in (worker.k(i), worker.v(i))):
        pool.zero_()
    worker._order.last_step = 1  # as if the first had been carried out
    for _ in range(2):
        with pytest.raises(pk.InvalidSpec):
            worker.apply(copies)
    worker._order.last_step = 2
    out = large.swap_out(beams)
    with pytest.raises(pk.InvalidSpec, match="outside its tier"):
        worker.apply(sent(out))
    assert worker.under_way() == []
    assert not any(t.any() for i in range(2) for t in (worker.k(i), worker.v(i)))


@pytest.mark.parametrize("plan", [None, 1, "plan", np.zeros(3)])
def test_what_is_no_plan_is_refused(plan: Any) -> None:
    with make_worker() as worker, pytest.raises(pk.InvalidSpec, match="expected a StepPlan"):
        worker.apply(plan)


def test_a_worker_that_has_no_host_tier_says_so(manager: pk.BlockManager) -> None:
    seq = manager.create()
    with make_worker(num_host_blocks=None) as worker:
        worker.apply(committed(manager, [seq]))
        with pytest.raises(pk.InvalidState, match="no host tier"):
            worker.apply(sent(manager.swap_out([seq])))


def test_own_steps_and_transfers_and_others_do_not_mix(manager: pk.BlockManager) -> None:
    seq = manager.create()
    plan, out = committed(manager, [seq]), manager.swap_out([seq])
    with make_worker() as worker:
        own = worker.create()
        with worker.step([own]), pytest.raises(pk.InvalidState, match="a step is open"):
            worker.apply(plan)
        worker.swap_out([own]).wait()
        with pytest.raises(pk.InvalidState, match="of its own manager"):
            worker.apply(sent(out))
    with make_worker() as worker:
        with worker.apply(plan) as step, pytest.raises(pk.InvalidSpec, match="lengths"):
            step.commit([1])
        worker.apply(out).wait()
        own = worker.create()
        with worker.step([own]):
            pass
        with pytest.raises(pk.InvalidState, match="of another manager"):
            worker.swap_out([own])
        assert worker.tier(own) == "device"


def test_a_closed_worker_refuses(manager: pk.BlockManager) -> None:
    worker = make_worker()
    step = worker.apply(committed(manager, [manager.create()]))
    worker.close()
    assert not step.is_open
    with pytest.raises(pk.InvalidState, match="closed"):
        worker.apply(committed(manager, [manager.create()]))


@pytest.mark.parametrize("block_size", [1, 2, 8, 16])
def test_a_plan_of_other_blocks_is_refused(worker: pk.KVCache, block_size: int) -> None:
    other = pk.BlockManager(BLOCKS, block_size=block_size)
    plan = other.append(np.array([other.create()]), counts=np.array([11]))
    with pytest.raises(pk.InvalidSpec, match="a manager with block_size=4"):
        worker.apply(sent(plan))
    manager = pk.BlockManager(BLOCKS, block_size=4)
    worker.apply(sent(manager.append(np.array([manager.create()]), counts=np.array([11]))))
