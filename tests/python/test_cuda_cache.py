"""KVCache on a GPU whose CUDA is simulated: its whole path, but for CUDA's own calls."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from hazard_world import LAYOUTS, World  # noqa: E402
from pagedkv.machine import RESERVED_BYTES  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda  # noqa: E402
from test_programs import Program, run_all  # noqa: E402

OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700
CALLS = [
    "cudaStreamWaitEvent",
    "cudaEventRecord",
    "cudaEventCreate",
    "cudaMemcpyAsync",
    "cudaMemcpyBatchAsync",
    "copy_blocks",
    "scatter_kv",
    "gather_kv",
    "transfer_blocks",
    "update_tables",
    "cudaGetDevice",
    "cudaSetDevice",
    "cudaEventSynchronize",
    "cudaStreamSynchronize",
    "cudaEventElapsedTime",
]
METHODS = ["loop", "batch", "kernel", "staged"]


class CudaWorld(World):
    def __init__(
        self,
        seed: int = 0,
        schedule: Literal["eager", "lazy", "random"] = "random",
        copy_method: str = "auto",
        **options: Any,
    ) -> None:
        self.cuda = SimulatedCuda(seed, schedule=schedule)
        self.streams = [0, 2, self.cuda.make_stream()]
        device = CudaDevice(self.cuda, copy_method=copy_method)
        super().__init__(device=device, **options)

    def all_problems(self) -> list[str]:
        return self.problems + self.cuda.violations


class ClosedInTheEnd(CudaWorld):
    """Whose close() may be refused, which is not the last word."""

    def __exit__(self, *error: Any) -> None:
        for _ in CALLS:  # each may have a failure to come
            with contextlib.suppress(pk.DeviceError):
                self.kv.close()
        self.kv.close()


class CudaProgram(Program):
    """Calls of CUDA fail instead of copies, and the caller is on any kind of stream."""

    def make_world(self, seed: int, **options: Any) -> World:
        schedule: Any = self.choose.choice(["lazy", "random", "random", "eager"])
        method = self.choose.choice(METHODS)
        self.cuda_world = ClosedInTheEnd(seed, schedule, method, **options)
        return self.cuda_world

    def fail(self) -> None:
        if self.choose.random() < 0.3:
            self.cuda_world.cuda.fail(self.choose.choice(CALLS), OUT_OF_MEMORY)

    def lose(self) -> None:
        if self.choose.random() < 0.1:
            self.cuda_world.cuda.fail("cudaEventRecord", ILLEGAL_ADDRESS)
            self.lost = True

    def stream(self) -> None:
        if not self.lost:
            self.w.device.use_stream(self.choose.choice(self.cuda_world.streams))

    def may_be_refused(self, error: pk.DeviceError) -> bool:
        return "simulated error" in str(error)

    def nothing_fails(self) -> None:
        for call in CALLS:
            self.cuda_world.cuda.fail(call, OUT_OF_MEMORY, 1 << 30)

    def look_at_all(self) -> None:
        self.nothing_fails()
        super().look_at_all()

    def check_end(self) -> None:
        assert self.w.all_problems() == []
        self.nothing_fails()
        self.w.device.close()
        assert self.lost or self.cuda_world.cuda.num_live == 1  # the caller's stream


def test_random_programs_on_simulated_cuda(runs: int, first_seed: int) -> None:
    run_all(CudaProgram, runs, first_seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("copy_method", METHODS)
@pytest.mark.parametrize("schedule", ["lazy", "random", "eager"])
def test_out_and_in_beside_steps_that_take_the_blocks(
    schedule: Any, copy_method: str, layout: Any
) -> None:
    with CudaWorld(3, schedule, copy_method, layout=layout) as w:
        a, b = w.admit([1, 2, 3, 4, 5]), w.admit([1, 2, 3, 9])
        for n in range(6):
            w.device.use_stream(w.streams[n % 3])
            w.kv.swap_out([a])
            w.overwrite()
            w.step({b: [n]}, check=True)
            w.kv.swap_in([a]).wait()
            w.step({a: [n]}, check=True)
            w.truncate(b, 4)
        w.settle()
        assert w.all_problems() == []
        called = {"loop": "cudaMemcpyAsync", "batch": "cudaMemcpyBatchAsync"}
        assert w.cuda.num_calls(called.get(copy_method, "transfer_blocks")) > 0


@pytest.mark.parametrize("seed", range(10))
def test_the_caller_changes_streams_in_the_midst_of_a_step(seed: int) -> None:
    """Opened on one stream, written on another, moved from the first: each continues the other."""
    with CudaWorld(seed, "random" if seed else "lazy", "batch") as w:
        a = w.create([])
        for n in range(5):
            w.device.use_stream(w.streams[n % 3])
            with w.kv.step([a], [n, n], counts=[2]) as step:
                new = w.appended(a, [n, n])
                w.device.use_stream(w.streams[(n + 1) % 3])
                w.write(step, new.digests[-2:])
                w.device.use_stream(w.streams[n % 3])
            w.texts[a] = new
            w.kv.swap_out([a])
            w.overwrite()
            w.kv.swap_in([a]).wait()
            w.device.use_stream(w.streams[(n + 2) % 3])
            w.read(a)
        assert w.all_problems() == []


def test_a_step_is_on_the_device_as_its_plan_says() -> None:
    with CudaWorld(1, "lazy", max_model_len=40, device_blocks=60) as w:
        ids = [w.admit([n, 1, 2]) for n in range(5)]
        addresses = set()
        for n in range(20):
            with w.kv.step(ids, [n] * 5) as step:
                for name in [
                    "input_ids",
                    "slots",
                    "positions",
                    "query_starts",
                    "seq_lens",
                    "block_tables",
                ]:
                    on_device, host = getattr(step, name), getattr(step.plan, name)
                    assert on_device.tolist() == host.tolist(), name
                addresses.add((step.slots.data_ptr(), step.block_tables.data_ptr()))
        assert len(addresses) == 1  # as a captured graph needs it
        assert w.cuda.violations == []


def test_a_step_of_beams_goes_up_in_one_copy_however_many_layers_attend() -> None:
    with CudaWorld(1, "eager", device_blocks=60) as w:
        a = w.admit(list(range(11)))
        ids = w.kv.fork(a, 4)
        for n in range(3):
            before = w.cuda.num_calls("cudaMemcpyAsync")
            with w.kv.step(ids, [n] * 4) as step:
                k = torch.randn(4, 1, 4)
                for layer in (0, 1):
                    w.kv.write(layer, k, k, step)
                    w.kv.attention(layer, k, step)
            assert w.cuda.num_calls("cudaMemcpyAsync") == before + 1
        assert w.cuda.violations == []


def test_a_plan_that_was_not_begun_is_applied_as_it_is() -> None:
    spec = pk.KVSpec(2, 1, 4, "float32", 4)
    caches = [
        pk.KVCache(spec, num_device_blocks=30, max_batch=4, device=device)
        for device in ("cpu", CudaDevice(SimulatedCuda(1)))
    ]
    for kv in caches:
        seq = kv.create()
        with kv.step([seq], counts=[6]) as step:
            for layer in (0, 1):
                k = torch.arange(24.0).view(6, 1, 4) + 100 * layer
                kv.write(layer, k, -k, step)
        ids = kv.fork(seq, 3)
        with kv.step(ids[:1]) as step:  # a copy of its own, of which the GPU has the row
            for layer in (0, 1):
                kv.write(layer, torch.ones(1, 1, 4), torch.ones(1, 1, 4), step)
        plan = kv.manager.append(ids[1:])
        assert plan.num_copies == 1
        kv.apply(plan)
        kv.machine.land()
        kv.manager.commit(plan)
    for layer in (0, 1):
        one, other = (kv.k(layer)[1:5] for kv in caches)
        assert torch.equal(one[:, :2], other[:, :2])
    for kv in caches:
        kv.close()


def test_a_larger_step_than_the_device_keeps_arrays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.machine.MAX_STEP_TOKENS", 4)
    with CudaWorld(1, "lazy", device_blocks=60, max_batch=2) as w:
        a = w.create([])
        w.step({a: list(range(20))}, check=True)
        with w.kv.step([a], [7] * 6, counts=[6]) as step:
            assert step.slots.tolist() == step.plan.slots.tolist()
            w.write(step, [b"\0" * 64] * 6)
        assert w.all_problems() == []


def test_while_a_graph_is_captured_nothing_is_moved_or_asked() -> None:
    with CudaWorld(1, "lazy") as w:
        a, b = w.admit([1, 2, 3]), w.admit([4, 5, 6])
        transfer = w.kv.swap_out([a])
        w.cuda.capture(0, True)
        asked = w.cuda.num_calls("cudaEventQuery")
        assert w.kv.poll() == []
        assert w.kv.ready([b])
        for call in (lambda: w.kv.swap_out([b]), lambda: w.kv.swap_in([a]), transfer.wait):
            with pytest.raises(pk.InvalidState, match="captured"):
                call()
        assert w.cuda.num_calls("cudaEventQuery") == asked
        assert (w.kv.tier(a), w.kv.tier(b)) == ("host", "device")
        w.cuda.capture(0, False)
        transfer.wait()
        w.kv.swap_in([a]).wait()
        w.read(a, b)
        assert w.all_problems() == []


def test_a_gather_that_is_captured_has_memory_of_its_own() -> None:
    """A graph would write to the cache's own after that was replaced by a larger one."""
    with CudaWorld(1, "lazy") as w:
        asked: Any = 0, (1, 2, 8, 4), torch.float32
        kept = w.kv._workspace(*asked)
        w.cuda.capture(0, True)
        captured = w.kv._workspace(*asked)
        w.cuda.capture(0, False)
        assert captured.data_ptr() != kept.data_ptr()
        assert w.kv._workspace(*asked).data_ptr() == kept.data_ptr()


@pytest.mark.parametrize("max_model_len", [None, 4000, 100_000])
def test_all_of_the_memory_has_room_for_what_steps_need(
    max_model_len: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = RESERVED_BYTES + (8 << 20)  # K and V are small: tables of 8 MiB of them are large
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    spec = pk.KVSpec(1, 1, 4, "float16", 16)
    options: dict[str, Any] = {"max_batch": 64, "max_model_len": max_model_len}

    def cache(fraction: float) -> pk.KVCache:
        gpu = CudaDevice(SimulatedCuda(1))
        return pk.KVCache(spec, device=gpu, device_memory=fraction, **options)

    with cache(1.0) as kv:
        steps = kv.machine._step_memory.nbytes  # type: ignore[attr-defined]
        assert (free - RESERVED_BYTES) / 4 < kv.pool_bytes <= free - RESERVED_BYTES - 2 * steps
    with cache(0.5) as half:
        assert half.pool_bytes < 0.51 * kv.spec.pool_bytes(kv.manager.num_device_blocks)
    options["max_batch"] = 65535
    with pytest.raises(pk.InvalidSpec, match=r"the arrays of steps, .* leave no room for a block"):
        cache(1.0)
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(pk.InvalidSpec, match=r"a fraction up to 1\.0"):
            cache(fraction)


def test_each_write_of_a_step_asks_cuda_for_no_more_than_its_launch() -> None:
    with CudaWorld(1, "lazy") as w:
        a = w.create([])
        with w.kv.step([a], [7]) as step:
            names = ("cudaGetDevice", "cudaStreamIsCapturing", "scatter_kv")
            w.write(step, [b"\0" * 64])
            before = [w.cuda.num_calls(name) for name in names]
            w.write(step, [b"\0" * 64])
            calls = [w.cuda.num_calls(name) - n for name, n in zip(names, before, strict=True)]
            assert calls == [2, 0, 2]  # of two layers


def test_a_transfer_whose_time_cannot_be_told_has_succeeded_all_the_same() -> None:
    with CudaWorld(1, "lazy") as w:
        a = w.admit([1, 2, 3])
        w.cuda.fail("cudaEventElapsedTime", 1)
        out = w.kv.swap_out([a])
        out.wait()
        assert out.seconds is None
        w.overwrite()
        w.kv.swap_in([a]).wait()
        w.read(a)
        assert w.all_problems() == []


def test_a_lost_device() -> None:
    w = CudaWorld(1, "lazy")
    a, b = w.admit([1, 2, 3]), w.admit([4, 5, 6])
    transfer = w.kv.swap_out([a])
    w.cuda.fail("cudaEventQuery", ILLEGAL_ADDRESS)
    with pytest.raises(pk.TransferError, match="restart"):
        transfer.wait()
    with pytest.raises(pk.DeviceError, match="lost"):
        w.kv.step([b], [7])
    assert w.kv.length(b) == 3
    w.kv.manager.verify()
    w.kv.close()
    assert transfer.done


def test_memory_that_cannot_be_pinned_is_used_as_it_is() -> None:
    cuda = SimulatedCuda(schedule="lazy")
    device = CudaDevice(cuda)
    cuda.limit_pinned(4 << 20)
    with World(device=device) as w:
        a = w.admit([1, 2, 3, 4])
        with pytest.warns(RuntimeWarning, match="could not be pinned"):
            w.kv.swap_out([a])
        w.kv.swap_in([a]).wait()
        w.read(a)
        assert w.problems == []
        assert device.num_pageable_bytes > 0


def test_copies_are_measured_and_shown() -> None:
    cuda = SimulatedCuda(schedule="eager")
    device = CudaDevice(cuda)
    device.calibrate()
    with World(device=device) as w:
        table = w.kv.copy_methods()
        assert table.count("out ") == table.count("in ") == 15
    with pytest.raises(pk.InvalidSpec, match="copy_method"):
        CudaDevice(cuda, copy_method="fast")
    with pytest.raises(pk.InvalidSpec, match="no call that is made"):
        cuda.fail("cudaMemcpy", OUT_OF_MEMORY)
    with pytest.raises(pk.InvalidSpec, match="batch"):
        CudaDevice(SimulatedCuda(has_batch=False), copy_method="batch")


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(pk.DeviceError, match="simulated error 101"):
        CudaDevice(SimulatedCuda(num_devices=2), 2)
    if not torch.cuda.is_available():
        with pytest.raises(pk.DeviceError, match="CUDA"):
            pk.KVCache(pk.KVSpec(1, 1, 4, "float32", 2), device="cuda", num_device_blocks=4)


def test_two_devices_in_one_process() -> None:
    cuda = SimulatedCuda(5, num_devices=2)
    with World(device=CudaDevice(cuda, 0)) as one, World(device=CudaDevice(cuda, 1)) as two:
        for n in range(10):
            for w, first in ((one, 0), (two, 100)):
                a = w.admit([first + n, 1, 2, 3])
                w.kv.swap_out([a])
                w.overwrite()
                w.kv.swap_in([a]).wait()
                w.read(a)
                w.release(a)
        assert one.problems + two.problems + cuda.violations == []


def test_what_queued_work_reads_stays_until_it_was_read() -> None:
    spec = pk.KVSpec(1, 1, 4, "float32", 4)
    kv = pk.KVCache(spec, device=CudaDevice(SimulatedCuda(schedule="lazy")), num_device_blocks=4)
    with kv.step([kv.create()]) as step:
        k, v = torch.ones(1, 1, 4), torch.ones(1, 1, 4)
        kv.write(0, k, v, step)
        held = weakref.ref(k), weakref.ref(v)
        del k, v
        assert None not in [ref() for ref in held]
        assert kv.gather(0, step)[0].tolist() == [[[[1, 1, 1, 1]]]]  # which waits for it
        assert [ref() for ref in held] == [None, None]


def test_closing_gives_everything_back() -> None:
    cuda = SimulatedCuda()
    device = CudaDevice(cuda)
    before = cuda.num_live
    w = World(device=device)
    w.kv.swap_out([w.admit([1, 2, 3])])
    w.kv.close()
    w.kv.close()
    device.close()
    assert cuda.num_live == 0 < before
