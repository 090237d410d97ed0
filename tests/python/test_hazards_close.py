"""Hazards 24 and 46 of docs/hazards.md on a GPU: what may be in use is not given back."""

from __future__ import annotations

import gc
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from hazard_world import World  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda  # noqa: E402

OUT_OF_MEMORY = 2


def make_world() -> tuple[World, SimulatedCuda]:
    cuda = SimulatedCuda(1, schedule="lazy")
    return World(device=CudaDevice(cuda, copy_method="loop")), cuda


@pytest.mark.parametrize(
    ("refusal", "k"),
    [
        ("captured", 0),
        ("cudaGetDevice", 3),
        ("cudaEventSynchronize", 1),
        ("cudaStreamSynchronize", 1),
    ],
)
def test_hazard_24_close_cannot_wait(refusal: str, k: int) -> None:
    w, cuda = make_world()
    b = w.admit([4, 5, 6])
    w.kv.swap_out([w.admit([1, 2, 3])])
    if refusal == "captured":
        cuda.capture(0, True)
    else:
        cuda.fail(refusal, OUT_OF_MEMORY, k)
    live = cuda.num_live
    with pytest.raises((pk.InvalidState, pk.DeviceError), match=refusal):
        w.kv.close()
    assert w.kv.length(b) == 3  # it is open, and has its memory
    assert cuda.num_live == live
    cuda.capture(0, False)
    w.kv.close()
    with pytest.raises(pk.InvalidState, match="closed"):
        w.kv.create([1])
    assert cuda.num_pending == 0
    w.device.close()
    assert cuda.num_live == 0
    assert cuda.violations == []


def test_hazard_24_the_last_reference_goes_while_a_graph_is_captured() -> None:
    w, cuda = make_world()
    w.kv.swap_out([w.admit([1, 2, 3])])
    device, spec, live = w.device, w.kv.spec, cuda.num_live
    cuda.capture(0, True)
    del w
    gc.collect()
    assert cuda.num_pending > 0
    assert cuda.num_live == live
    cuda.capture(0, False)
    pk.KVCache(spec, num_device_blocks=1).close()  # the next one that is made
    assert cuda.num_pending == 0
    device.close()
    assert cuda.num_live == 0


class Closes:
    """A number whose conversion, within a command, closes the cache."""

    def __init__(self, kv: pk.KVCache) -> None:
        self.kv = kv

    def __index__(self) -> int:
        with pytest.raises(pk.ConcurrentUse):
            self.kv.close()
        return 7


@pytest.mark.parametrize("host_blocks", [0, 8])
@pytest.mark.parametrize("make", [lambda: "cpu", lambda: CudaDevice(SimulatedCuda(1))])
def test_hazard_24_close_from_inside_a_command_changes_nothing(make: Any, host_blocks: int) -> None:
    with World(device=make(), host_blocks=host_blocks) as w:
        a = w.admit([1, 2, 3])
        b = w.kv.create([Closes(w.kv), 8])
        assert w.kv.length(b) == 0
        w.step({a: [4]}, check=True)
        assert w.kv.poll() == []
        with w.kv.step([a], [5]) as step:
            with pytest.raises(pk.UnknownSequence):
                w.kv.length(Closes(w.kv))  # type: ignore[arg-type]
            assert step.is_open


@pytest.mark.parametrize(
    ("call", "k"),
    [("cudaGetDevice", k) for k in (1, 2, 3, 4)]
    + [("cudaEventQuery", 1), ("cudaEventSynchronize", 1)],
)
def test_hazard_46_a_refused_call_is_taken_for_the_end_of_the_work(call: str, k: int) -> None:
    w, cuda = make_world()
    with w:
        a = w.admit([1, 2, 3, 4])
        out = w.kv.swap_out([a])
        cuda.fail(call, OUT_OF_MEMORY, k)
        for _ in range(3):
            try:
                assert w.kv.poll() == []
                out.wait()
            except pk.DeviceError:
                continue
            break
        assert out.error is None
        w.overwrite()
        w.kv.swap_in([a]).wait()
        w.read(a)
        assert w.problems == cuda.violations == []
