"""KVCache on a GPU: the hazards that only a real one has, with work that is held back by spinning.

`pytest -m gpu` runs these alone. Contents are judged byte by byte, as on simulated devices.
"""

from __future__ import annotations

import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import adopted_layouts  # noqa: E402
import pagedkv as pk  # noqa: E402
from hazard_world import LAYOUTS, World  # noqa: E402
from test_programs import Program, run_all  # noqa: E402

pytestmark = pytest.mark.gpu
METHODS = ["loop", "batch", "kernel", "staged"]
SPIN = 20_000_000  # cycles: about 10 ms


def spin() -> None:
    """Hold the current stream back."""
    torch.cuda._sleep(SPIN)


class GpuWorld(World):
    def __init__(self, copy_method: str = "auto", **options: Any) -> None:
        super().__init__(device="cuda:0", copy_method=copy_method, **options)  # type: ignore[arg-type]
        self.streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]

    def all_problems(self) -> list[str]:
        return self.problems


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("copy_method", METHODS)
def test_a_swap_out_waits_for_the_write(layout: str, copy_method: str) -> None:
    with GpuWorld(copy_method, layout=layout) as w:
        a = w.admit([1, 2, 3])
        with w.kv.step([a], [4, 5], counts=[2]) as step:
            new = w.appended(a, [4, 5])
            spin()
            w.write(step, new.digests[-2:])
        w.texts[a] = new
        w.kv.swap_out([a])
        w.overwrite()
        w.kv.swap_in([a]).wait()
        w.read(a)
        assert w.problems == []


@pytest.mark.parametrize("copy_method", METHODS)
def test_a_block_is_reused_behind_the_copy_that_reads_it(layout: str, copy_method: str) -> None:
    with GpuWorld(copy_method, layout=layout) as w:
        a = w.admit([1, 2, 3, 4, 5])
        spin()  # the copy is queued behind it, and the step behind the copy
        w.kv.swap_out([a])
        w.overwrite()
        w.kv.swap_in([a]).wait()
        w.step({a: [6]}, check=True)
        assert w.problems == []


def test_a_swap_in_lands_behind_the_last_reader(layout: str) -> None:
    with GpuWorld(layout=layout, device_blocks=4) as w:
        a = w.admit_on_host([1, 2, 3, 4, 5])
        b = w.admit([11, 12, 13, 14, 15])
        with w.kv.step([b], [16]) as step:
            w.write(step, w.appended(b, [16]).digests[-1:])
            spin()
            found = [h.clone() for h in w.kv.gather(0, step)]
        w.texts[b], blocks = w.appended(b, [16]), set(w.kv.block_table(b).tolist())
        w.kv.release([b])
        w.kv.swap_in([a]).wait()
        assert blocks & set(w.kv.block_table(a).tolist())
        w.compare_row(0, (found[0], found[1]), 0, w.texts.pop(b), "the last reader")
        w.read(a)
        assert w.problems == []


def test_a_sequence_moves_between_streams(layout: str) -> None:
    with GpuWorld(layout=layout) as w:
        a = w.admit([1, 2, 3])
        for n in range(9):
            with torch.cuda.stream(w.streams[n % 3]):
                spin()
                w.step({a: [10 + n]})
                if n % 2:
                    w.kv.swap_out([a])
                    w.overwrite()
                    w.kv.swap_in([a]).wait()
        w.read(a)
        assert w.problems == []


def test_commands_do_not_wait_for_the_gpu() -> None:
    with GpuWorld(device_blocks=32, host_blocks=32) as w:
        a, b = w.admit([1, 2, 3, 4, 5]), w.admit([7, 8, 9])
        w.kv.swap_out([b])
        w.kv.swap_in([b]).wait()
        w.step({b: [9]})  # torch pins memory for such a step now, for which CUDA may wait
        assert w.kv._transfers is not None
        device, stream = w.kv._transfers.device, torch.cuda.current_stream()
        waits = device.num_host_waits
        torch.cuda._sleep(5 * SPIN)
        w.kv.swap_out([a])
        w.step({b: [10]})
        w.kv.swap_in([a])
        w.kv.poll()
        assert not stream.query()  # the spinning has not ended: nobody has waited for it
        assert device.num_host_waits == waits
        w.settle()
        assert w.problems == []


@pytest.mark.parametrize("name", ["copy-on-write", "gather"])
def test_steps_follow_each_other(name: str, layout: str) -> None:
    with GpuWorld(layout=layout) as w:
        a, b = w.fork(w.admit([1, 2, 3]), 2)
        spin()
        for n in range(5):
            w.step({a: [n], b: [n + 100]}, check=name == "gather")
        w.read(a, b)
        assert w.problems == []


def test_a_cache_closes_with_everything_under_way() -> None:
    for _ in range(3):
        with GpuWorld() as w:
            a = w.admit([1, 2, 3, 4, 5])
            spin()
            w.kv.swap_out([a])
            w.overwrite()


class GpuProgram(Program):
    def make_world(self, seed: int, **options: Any) -> World:
        self.gpu = GpuWorld(self.choose.choice(METHODS), **options)
        return self.gpu

    def step(self) -> None:
        if self.choose.random() < 0.2:
            torch.cuda._sleep(SPIN // 20)
        super().step()

    def stream(self) -> None:
        torch.cuda.set_stream(self.choose.choice(self.gpu.streams))

    def fail(self) -> None:
        """Nothing that fails here can be got over."""

    lose = fail

    def check_end(self) -> None:
        assert self.w.problems == []


def test_random_programs_on_a_gpu(runs: int, first_seed: int) -> None:
    before = torch.cuda.current_stream()
    try:
        run_all(GpuProgram, runs, first_seed)
    finally:
        torch.cuda.set_stream(before)


def test_a_fraction_of_the_free_memory() -> None:
    spec = pk.KVSpec(2, 2, 64, "float16", 16)
    free = torch.cuda.mem_get_info()[0]
    with pk.KVCache(spec, device="cuda:0", device_memory=0.05, max_model_len=1024) as kv:
        assert 0.04 * free < kv.pool_bytes <= 0.05 * free


def test_attention_is_that_of_the_cpu() -> None:
    spec = pk.KVSpec(2, 2, 64, "float32", 16)
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for device in ("cpu", "cuda:0"):
        generator.manual_seed(0)
        with pk.KVCache(spec, device=device, num_device_blocks=64, max_model_len=256) as kv:
            ids = kv.fork(kv.create(), 4)
            found = []
            for count in (40, 1, 1, 1):
                batch = ids[:1] if count > 1 else ids
                total = count * len(batch)
                q = torch.randn(total, 4, 64, generator=generator).to(device)
                k = torch.randn(total, 2, 64, generator=generator).to(device)
                with kv.step(batch, counts=[count] * len(batch)) as step:
                    kv.write(0, k, k, step)
                    found.append(kv.attention(0, q, step).cpu())
                if count > 1:
                    kv.reorder(ids, [0] * 4)
            outputs.append(found)
    for one, other in zip(*outputs, strict=True):
        assert (one - other).norm() / one.norm() < 1e-3


@pytest.mark.parametrize("copy_method", METHODS)
@pytest.mark.parametrize("make", adopted_layouts.LAYOUTS, ids=lambda f: str(f.__name__))
def test_adopted_tensors_are_tried_out_and_kept(
    make: Any, copy_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopted_layouts, "DEVICE", "cuda:0")
    layers = make()
    before = [t.clone() for pair in layers for t in pair]
    spec = adopted_layouts.spec_of(make)
    for host in (0, 5):
        options: dict[str, Any] = {"num_host_blocks": host, "copy_method": copy_method}
        with pk.KVCache(spec, device="cuda:0", tensors=layers, **options) as kv:
            kv.verify()
        after = [t for pair in layers for t in pair]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_pickled_plan_is_carried_out() -> None:
    """With forks, by one cache of each kind: the tables on the device, and what attention reads."""
    spec = pk.KVSpec(2, 2, 16, "float32", 4)
    manager = pk.BlockManager(40, block_size=4, max_batch=8)
    ids, random = [manager.create()], torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_device_blocks": 40, "max_batch": 8}
    with pk.KVCache(spec, **options) as cpu, pk.KVCache(spec, device="cuda:0", **options) as gpu:
        for n in range(12):
            counts = [6 if n == 0 else 1] * len(ids)
            q, k, v = (torch.randn(sum(counts), h, 16, generator=random) for h in (4, 2, 2))
            plan = manager.append(ids, counts=counts)
            found = []
            for kv in (cpu, gpu):
                with kv.apply(pickle.loads(pickle.dumps(plan))) as step:
                    assert step.block_tables.tolist() == plan.block_tables.tolist()
                    kv.write(0, k.to(kv.device), v.to(kv.device), step)
                    found.append(kv.attention(0, q.to(kv.device), step).cpu())
            torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
            manager.commit(plan)
            if n == 0:
                ids = manager.fork(ids[0], 4).tolist()
