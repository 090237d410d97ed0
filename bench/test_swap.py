"""Swap: what the bookkeeping costs, and what copies cost the steps beside them."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagedkv import BlockManager
from test_manager import BLOCK_SIZE, admit, tokens

torch = pytest.importorskip("torch")

from pagedkv import KVCache, KVSpec  # noqa: E402

Measure = Callable[..., Any]
LENGTH = 128 * BLOCK_SIZE


def test_swap_out(measure: Measure, full: bool) -> None:
    num_blocks = 100_000 if full else 2_000
    m = BlockManager(num_blocks, num_blocks, max_model_len=4096)
    at = [0]

    def fresh() -> tuple[tuple[np.ndarray], dict[str, Any]]:
        at[0] += 1
        return (np.array([admit(m, tokens(LENGTH, at[0]))]),), {}

    def out(ids: np.ndarray) -> None:
        plan = m.swap_out(ids)
        _ = plan.copies, plan.wait_for
        plans.append((plan, ids))

    plans: list[Any] = []

    def setup() -> tuple[tuple[np.ndarray], dict[str, Any]]:
        for plan, ids in plans:
            m.complete(plan)
            m.release(ids)
        plans.clear()
        return fresh()

    measure("swap out of 128 blocks", out, setup=setup, rounds=100)
    m.verify()


def test_swap_in_evicting(measure: Measure, full: bool) -> None:
    num_blocks = 100_000 if full else 1_000
    m = BlockManager(num_blocks, num_blocks, max_model_len=4096)
    prompt, seeds = tokens(LENGTH + 1, 0), iter(range(1, 1_000_000))
    ids = np.array([admit(m, prompt[:-1])])
    while m.stats().device.num_free:
        m.release(np.array([admit(m, tokens(LENGTH, next(seeds)))]))

    def setup() -> None:
        """Its blocks on the device are the coldest, and a prompt takes them; more are cached."""
        if plans:
            m.complete(plans.pop())
        m.complete(m.swap_out(ids))
        twin = np.array([m.create(prompt)])
        m.truncate(twin, np.array([0]))
        m.release(np.concatenate([twin, [admit(m, tokens(LENGTH, next(seeds)))]]))

    plans: list[Any] = []

    def back() -> None:
        plan = m.swap_in(ids)
        _ = plan.copies, plan.wait_for
        plans.append(plan)

    evicted = m.stats().num_evicted_blocks
    measure("swap in of 128 blocks, evicting", back, setup=setup, rounds=100)
    assert plans[0].num_copies == 128
    assert m.stats().num_evicted_blocks > evicted + 128
    m.verify()


def test_complete(measure: Measure, full: bool) -> None:
    m = BlockManager(2_000, 2_000, max_model_len=4096)
    ids = np.array([admit(m, tokens(LENGTH, 0))])
    plans: list[Any] = []

    def setup() -> None:
        m.release(np.array([admit(m, tokens(LENGTH, len(plans)))]))
        if m.tier(int(ids[0])) == "host":
            m.complete(m.swap_in(ids))
        m.clear()
        plans.append(m.swap_out(ids))

    measure("complete a swap of 128 blocks", lambda: m.complete(plans[-1]), setup=setup, rounds=50)


# ---- wall-clock, as ratios within one run: the copies, and the steps beside them


def copy_beside(source: Any, target: Any, num_threads: int) -> list[threading.Thread]:
    """Threads that copy one tensor to the other with torch's memcpy, which lets Python go on."""
    parts = zip(source.chunk(num_threads), target.chunk(num_threads), strict=True)
    threads = [threading.Thread(target=t.copy_, args=(s,)) for s, t in parts]
    for thread in threads:
        thread.start()
    return threads


@pytest.fixture(scope="module")
def big(full: bool) -> Any:
    """A cache of `n` blocks of 2 MiB (full size), one sequence in all of them."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its threads would wait for each other, whoever has the cores
    spec = KVSpec(16 if full else 2, 8, 128, "float32", block_size=16 if full else 2)
    n = 256 if full else 8
    with KVCache(
        spec,
        num_device_blocks=n + 16,
        num_host_blocks=n,
        max_model_len=(n + 16) * spec.block_size,
        max_batch=1,
    ) as kv:
        ids = kv.fork(kv.create(), 1)
        with kv.step(ids, counts=[n * spec.block_size]):
            pass
        yield kv, ids, n
    torch.set_num_threads(num_threads)


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@pytest.fixture(scope="module")
def ratios(big: Any, full: bool) -> dict[str, float]:
    """Medians of interleaved rounds, each over the plain copy of the same bytes."""
    kv, ids, n = big
    source = torch.ones(n * kv.spec.block_bytes, dtype=torch.uint8)
    target = torch.ones_like(source)
    other = kv.fork(kv.create(), 1)
    layer = kv.spec.layers[0]
    q = torch.ones(1, layer.num_kv_heads, layer.k_dim)

    def decode() -> None:
        with kv.step(other) as step:
            for i in range(kv.spec.num_layers):
                kv.write(i, q, q, step)
                kv.attention(i, q, step)

    def plain() -> None:
        for thread in copy_beside(source, target, 2):
            thread.join()

    def beside(name: str) -> None:
        times[name].append(seconds(decode))
        kv.truncate(other, [16])  # in the blocks that it has

    times: dict[str, list[float]] = {name: [] for name in ("plain", "out", "in", "memcpy", "swap")}
    with kv.step(other, counts=[16]):
        pass
    decode()
    kv.swap_out(ids).wait()  # the first touch of host memory is another matter
    kv.swap_in(ids).wait()
    device = kv._transfers.device
    for _ in range(9 if full else 1):
        times["plain"].append(seconds(plain))
        times["out"].append(seconds(lambda: kv.swap_out(ids).wait()))
        times["in"].append(seconds(lambda: kv.swap_in(ids).wait()))
        threads = [*copy_beside(source, target, 2), *copy_beside(target, source, 2)]
        while any(thread.is_alive() for thread in threads):
            beside("memcpy")
        for move in (kv.swap_out, kv.swap_in):
            transfer, waits = move(ids), device.num_host_waits
            while not transfer.done:
                beside("swap")
            assert device.num_host_waits == waits
    medians = {name: statistics.median(values or [1.0]) for name, values in times.items()}
    return {
        "swap out over memcpy, time": medians["out"] / medians["plain"],
        "swap in over memcpy, time": medians["in"] / medians["plain"],
        "decode beside a swap over beside memcpy": medians["swap"] / medians["memcpy"],
    }


@pytest.mark.parametrize(
    "row",
    [
        "swap out over memcpy, time",
        "swap in over memcpy, time",
        "decode beside a swap over beside memcpy",
    ],
)
def test_wall_clock(row: str, ratios: dict[str, float], measure: Measure, benchmark: Any) -> None:
    benchmark.extra_info["value"] = ratios[row]
    measure(row, lambda: None, rounds=1)
