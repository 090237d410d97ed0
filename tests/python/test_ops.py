"""The operators of torch.ops.pagedkv, beside indexing that says the same, eager and compiled."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from hazard_world import LAYOUTS  # noqa: E402
from pagedkv import ops  # noqa: E402

N, P, H, D = 9, 4, 2, 8
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


def pools(layout: str, device: str, dtype: Any = torch.float32, v_dim: int = D) -> Any:
    """Keys and values of one of three layers, [N, P, H, D], all values different."""
    torch.manual_seed(0)
    shape = (3, N, P * H * (D + v_dim)) if layout == "layer_major" else (N, 3, P * H * (D + v_dim))
    memory = torch.randn(shape, device=device).to(dtype)
    layer = memory[1] if layout == "layer_major" else memory[:, 1]
    split = P * H * D
    return (
        layer[:, :split].unflatten(1, (P, H, D)),
        layer[:, split:].unflatten(1, (P, H, v_dim)),
        memory,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_gather_and_copy_are_what_indexing_says(layout: str, dtype: Any, device: str) -> None:
    k_pool, v_pool, memory = pools(layout, device, dtype, v_dim=4)
    expected = memory.clone()
    k_twin, v_twin = (
        torch.as_strided(expected, t.shape, t.stride(), t.storage_offset())
        for t in (k_pool, v_pool)
    )
    generator = torch.Generator().manual_seed(1)
    for turn in range(20):
        slots = torch.randperm(N * P, generator=generator)[: 1 + turn % 7]
        k = torch.randn(len(slots), H, D, generator=generator).to(device, dtype)
        v = torch.randn(len(slots), 4, H, generator=generator).to(device, dtype).transpose(1, 2)
        ops.write(k_pool, v_pool, k, v, slots.to(device))
        k_twin[slots // P, slots % P], v_twin[slots // P, slots % P] = k, v

        pair = torch.randperm(N, generator=generator)[:4]
        count = torch.randint(0, P + 1, (2,), generator=generator)
        copies = torch.stack((pair[:2], pair[2:], count), 1).to(device, torch.int32)
        ops.copy_blocks(k_pool, v_pool, copies)
        for source, target, n in copies.tolist():
            k_twin[target, :n], v_twin[target, :n] = k_twin[source, :n], v_twin[source, :n]
        assert torch.equal(memory, expected)

        tables = torch.randint(0, N, (3, 5), generator=generator, dtype=torch.int32)
        lens = torch.randint(0, 5 * P + 1, (3,), generator=generator, dtype=torch.int32)
        width = int(lens.max())
        found = ops.gather(k_pool, v_pool, tables.to(device), lens.to(device), width)
        for pool, out in zip((k_pool, v_pool), found, strict=True):
            assert out.shape == (3, H, width, pool.shape[3])
            dense = pool[tables.long()].flatten(1, 2)[:, :width].transpose(1, 2)
            seen = (torch.arange(width) < lens[:, None]).to(device)[:, None, :, None]
            assert torch.equal(out, dense * seen)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    k_pool, v_pool, _ = pools("block_major", device)
    k = torch.randn(3, H, D, device=device)
    slots = torch.tensor([4, 5, 30], device=device)
    tables = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32, device=device)
    lens = torch.tensor([7, 2], dtype=torch.int32, device=device)
    torch.library.opcheck(ops.write, (k_pool, v_pool, k, k, slots))
    torch.library.opcheck(ops.gather, (k_pool, v_pool, tables, lens, 7))
    copies = torch.tensor([[1, 2, 3]], dtype=torch.int32, device=device)
    torch.library.opcheck(ops.copy_blocks, (k_pool, v_pool, copies))


def layer(k_pool: Any, v_pool: Any, x: Any, slots: Any, tables: Any, lens: Any, width: int) -> Any:
    """A model's use: projections before, attention behind."""
    torch.ops.pagedkv.write(k_pool, v_pool, x * 2, x + 1, slots)
    k, v = torch.ops.pagedkv.gather(k_pool, v_pool, tables, lens, width)
    scores = torch.einsum("bhd,bhtd->bht", x[: len(lens)], k)
    return torch.einsum("bht,bhtd->bhd", scores.softmax(-1), v)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_whole_for_all_shapes(layout: str, dynamic: bool | None) -> None:
    k_pool, v_pool, memory = pools(layout, "cpu")
    if dynamic:
        torch._dynamo.mark_static(k_pool)
        torch._dynamo.mark_static(v_pool)
    twin_k, twin_v, twin = pools(layout, "cpu")
    torch._dynamo.reset()
    num_graphs = 0

    def inspect(graph: Any, example_inputs: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, example_inputs)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=inspect)
    for num_tokens, width in ((6, 7), (5, 12), (10, 9), (3, 16)):
        x = torch.randn(num_tokens, H, D)
        slots = torch.randperm(N * P)[:num_tokens]
        tables = torch.randint(0, N, (2, 4), dtype=torch.int32)
        lens = torch.tensor([width, 2], dtype=torch.int32)
        found = compiled(k_pool, v_pool, x, slots, tables, lens, width)
        expected = layer(twin_k, twin_v, x, slots, tables, lens, width)
        torch.testing.assert_close(found, expected)
        assert torch.equal(memory, twin)
    assert num_graphs == (1 if dynamic else 2)  # the second is the one for all shapes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_writes_to_the_layers_of_a_cache_where_they_are(layout: Any) -> None:
    from torch._inductor.utils import run_and_get_code

    spec = pk.KVSpec(2, H, D, "float32", P)
    with pk.KVCache(spec, num_device_blocks=50, layout=layout) as kv:
        ids, x = kv.fork(kv.create(), 2), torch.randn(6, H, D)
        with kv.step(ids, counts=[2, 4]) as step:
            shared = x, step.slots, step.block_tables, step.seq_lens, 4

            def both(k0: Any, v0: Any, k1: Any, v1: Any) -> Any:
                return layer(k0, v0, *shared), layer(k1, v1, *shared)

            pools = [t for pair in kv.pools() for t in pair]
            torch._dynamo.reset()
            _, (code,) = run_and_get_code(torch.compile(both, fullgraph=True), *pools)
            assert large_buffers(code, spec.num_blocks(kv.pool_bytes) * P * H * D) == []
            for i in range(2):
                k, v = kv.gather(i, step)
                assert torch.equal(k[1], (x[2:] * 2).transpose(0, 1))
                assert torch.equal(v[1], (x[2:] + 1).transpose(0, 1))


def test_compiled_writes_to_a_cache_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        kv = pk.KVCache(pk.KVSpec(1, H, D, "float32", P), num_device_blocks=4)
    torch._dynamo.reset()
    compiled = torch.compile(ops.write, fullgraph=True, backend="aot_eager")
    with kv.step([kv.create()], counts=[3]) as step:
        k = torch.randn(3, H, D)
        compiled(kv.k(0), kv.v(0), k, -k, step.slots)
        assert torch.equal(kv.gather(0, step)[0][0], k.transpose(0, 1))


def large_buffers(code: str, num_elements: int) -> list[str]:
    """Shapes of what compiled code allocates that holds so many elements, or more."""
    return [
        shape
        for shape in re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)
        if torch.Size(int(n) for n in shape.split(",") if n.strip()).numel() >= num_elements
    ]


def test_the_code_that_inductor_makes_passes_the_pools_on() -> None:
    from torch._inductor.utils import run_and_get_code

    k_pool, v_pool, memory = pools("block_major", "cpu")
    torch._dynamo.reset()
    x, slots = torch.randn(2, H, D), torch.tensor([4, 5])
    tables, lens = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    arguments = (k_pool, v_pool, x, slots, tables, lens, 4)
    _, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), *arguments)
    view = r"reinterpret_tensor\(arg0_1, [^)]*\)[^)]*\)[^)]*\)"  # of the memory as it came in
    assert len(re.findall(rf"pagedkv\.write\.default\({view}, {view}, buf", code)) == 1
    assert large_buffers(code, N * P * H * D) == []
    assert torch.equal(memory[1, 1, : H * D].view(H, D), x[0] * 2)


def test_in_a_step_they_do_what_the_cache_does() -> None:
    spec = pk.KVSpec(2, H, D, "float32", P)
    with pk.KVCache(spec, num_device_blocks=20, max_batch=4) as kv:
        ids = kv.fork(kv.create(), 3)
        k = torch.randn(6, H, D)
        with kv.step(ids, counts=[1, 2, 3]) as step:
            ops.write(kv.k(1), kv.v(1), k, -k, step.slots)
            found = ops.gather(kv.k(1), kv.v(1), step.block_tables, step.seq_lens, 3)
            for one, other in zip(found, kv.gather(1, step), strict=True):
                assert torch.equal(one, other)
            assert torch.equal(found[0][2], k[3:].transpose(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.tensor([1, 2], dtype=torch.int32)}, "slots is torch.int32"),
        ({"slots": torch.tensor([1, 2, 3])}, "k is torch.float32"),
        ({"slots": torch.arange(4)[::2]}, "contiguous int64"),
        ({"k": torch.zeros(2, H, D, dtype=torch.float16)}, "k is torch.float16"),
        ({"v": torch.zeros(2, H, D + 1)}, "v is torch.float32"),
        ({"v_pool": torch.zeros(N, P + 1, H, D)}, "not one layer"),
        ({"v_pool": torch.zeros(N, P, H, D, dtype=torch.float16)}, "not one layer"),
        ({"k_pool": torch.zeros(N, P, D, H).transpose(2, 3)}, "one behind the other"),
        ({"slots": torch.tensor([1, 2], device="meta")}, "slots is on meta, expected cpu"),
        ({"v": torch.zeros(2, H, D, device="meta")}, "v is on meta, expected cpu"),
    ],
)
def test_wrong_arguments_name_themselves(change: dict[str, Any], message: str) -> None:
    k_pool, v_pool, memory = pools("block_major", "cpu")
    before = memory.clone()
    k = torch.zeros(2, H, D)
    arguments = {"k_pool": k_pool, "v_pool": v_pool, "k": k, "v": k, "slots": torch.tensor([1, 2])}
    with pytest.raises(pk.InvalidSpec, match=message):
        ops._write(*(arguments | change).values())  # what both kinds of device call
    assert torch.equal(memory, before)


def test_pools_of_one_head_may_have_any_stride_of_it() -> None:
    """As FlashInfer's "HND" has it, seen as [N, P, H, D]."""
    memory = torch.zeros(N, 1, P, D)
    pool = memory.transpose(1, 2)
    ops.write(pool, pool.clone(), torch.ones(1, 1, D), torch.ones(1, 1, D), torch.tensor([P + 2]))
    assert memory[1, 0, 2].eq(1).all()
    assert memory.sum() == D


RACE = """
import threading, numpy as np, torch, pagedkv as pk, pagedkv.ops as ops
kv = pk.KVCache(pk.KVSpec(1, 8, 64, "float32"), num_device_blocks=200)
sequences = kv.fork(kv.create(), 4)
step = kv.step(sequences, counts=np.array([700] * 4))
step.commit()
step, k, q = kv.step(sequences), kv.k(0), torch.zeros(4, 16, 64)
tables, lens, slots = step.block_tables, step.seq_lens, torch.arange(900)
copies = torch.ones(3, 3, dtype=torch.int32)
new, stop, refused = torch.zeros(900, 8, 64), threading.Event(), 0
def toggle():
    while not stop.is_set():
        lens[3], slots[-1], tables[3, 9], copies[2, 1] = 3000, 10**9, 10**6, 10**6
        lens[3], slots[-1], tables[3, 9], copies[2, 1] = 100, 899, 39, 5
thread = threading.Thread(target=toggle)
thread.start()
calls = (
    lambda: ops.gather(k, k, tables, lens, 701),
    lambda: ops.write(k, k, new, new, slots),
    lambda: ops.copy_blocks(k, k, copies),
    lambda: kv.attention(0, q, step, backend="blockwise"),
)
for i in range(2000):
    try:
        calls[i % 4]()
    except ValueError:
        refused += 1
stop.set()
thread.join()
print(refused)
"""


def test_arrays_that_another_thread_changes_lead_nowhere_outside_the_pool() -> None:
    """Also after they were checked: results are wrong then, and nothing crashes."""
    run = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert 0 < int(run.stdout) < 2000  # so the threads did meet


def test_a_layer_keeps_its_pool_however_many_follow() -> None:
    """As a captured graph needs it, which reads what the pool has on the device."""
    memory = torch.zeros(5000 + P * H * D)

    def pool(at: int) -> Any:
        part = memory[at : at + P * H * D].view(1, P, H, D)
        return ops._layer_of(part, part).pool

    first = pool(0)
    assert all(pool(at) is not first for at in range(1, 5000))
    assert pool(0) is first


def test_one_memory_may_be_seen_in_many_ways() -> None:
    """A call costs the same whichever of them it is: nobody looks at the others."""
    pool = torch.zeros(300, P, H, D)
    table, length = torch.ones(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    num_calls = []  # of functions, within an operator's

    def look(seen: Any) -> None:
        num_calls.append(0)

        def count(*event: Any) -> None:
            num_calls[-1] += 1

        sys.setprofile(count)
        ops.gather(seen, seen, table, length, 1)
        sys.setprofile(None)

    views = [pool[:n] for n in range(2, 300)]
    for _ in range(2):  # the first time, each has to be looked at
        for seen in views:
            look(seen)
    assert len(set(num_calls[len(views) :])) == 1
    with pytest.raises(ValueError, match="outside the pool"):
        ops.gather(views[0], views[0], table + 1, length, 1)


def test_what_is_outside_the_pool_is_refused_on_the_cpu() -> None:
    k_pool, v_pool, memory = pools("block_major", "cpu")
    before = memory.clone()
    k, one = torch.zeros(1, H, D), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="outside the pool"):
        ops.write(k_pool, v_pool, k, k, torch.tensor([N * P]))
    with pytest.raises(ValueError, match="outside the pool"):
        ops.copy_blocks(k_pool, v_pool, torch.tensor([[0, N, 1]], dtype=torch.int32))
    with pytest.raises(ValueError, match="past the table"):
        ops.gather(k_pool, v_pool, one[:, None], one * (P + 1), P + 1)
    with pytest.raises(pk.InvalidSpec, match="copies"):
        ops.copy_blocks(k_pool, v_pool, torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(pk.InvalidSpec, match="block_tables"):
        ops.gather(k_pool, v_pool, one, one, 1)
    with pytest.raises(pk.InvalidSpec, match="seq_lens"):
        ops.gather(k_pool, v_pool, one[:, None], one.long(), 1)
    assert torch.equal(memory, before)


def test_threads_take_turns_at_a_gpu_each_on_its_own_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Device:
        index, stream = 0, -1

        def use_stream(self, stream: int) -> None:
            self.stream = stream

    device, wrong = Device(), []
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda _: threading.get_ident(), raising=False
    )
    turn = ops._Turn(device)  # type: ignore[arg-type]

    def work() -> None:
        for _ in range(200):
            with turn:
                time.sleep(0)  # others may come in here
                wrong.extend([device.stream] * (device.stream != threading.get_ident()))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
