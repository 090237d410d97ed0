"""A cache is there once, and as long as somebody has it, whoever has its steps and transfers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda, SimulatedDevice  # noqa: E402

SPEC = pk.KVSpec(1, 1, 4, "float32", 4)


@pytest.fixture(autouse=True)
def _no_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def cache_on(device: Any) -> tuple[pk.KVCache, int]:
    kv = pk.KVCache(SPEC, device=device, num_device_blocks=8, num_host_blocks=8)
    id = kv.create([])
    with kv.step([id], [1, 2, 3], [3]) as step:
        kv.write(0, torch.ones(3, 1, 4), torch.ones(3, 1, 4), step)
    return kv, id


def nothing(kv: pk.KVCache, id: int) -> Any:
    return None


def open_step(kv: pk.KVCache, id: int) -> Any:
    step = kv.step([id], [4])
    return step, step.slots_at, step.csr(), step.kept("a value", lambda: step.seq_lens)


def swap(kv: pk.KVCache, id: int) -> Any:
    return kv.swap_out([id])


def both(kv: pk.KVCache, id: int) -> Any:
    return swap(kv, id), open_step(kv, kv.create([]))


@pytest.mark.parametrize("make", [lambda: "cpu", lambda: SimulatedDevice(0, schedule="lazy")])
@pytest.mark.parametrize("begin", [nothing, open_step, swap, both])
def test_a_cache_goes_with_its_last_reference(
    begin: Callable[[pk.KVCache, int], Any], make: Callable[[], Any]
) -> None:
    """Not when the garbage collector comes by: its memory is large."""
    kv, id = cache_on(make())
    kept = begin(kv, id)
    gone = weakref.ref(kv), weakref.ref(kv.machine)  # which has what the cache has
    del kv
    assert [ref() for ref in gone] == [None, None]
    del kept


@pytest.mark.parametrize("begin", [nothing, open_step, swap, both])
def test_what_a_cache_had_of_a_gpu_goes_with_it(begin: Callable[[pk.KVCache, int], Any]) -> None:
    cuda = SimulatedCuda(0, schedule="eager")
    kv, id = cache_on(CudaDevice(cuda))
    kept = begin(kv, id)
    assert cuda.num_live > 0
    del kv
    assert cuda.num_live == 0
    assert cuda.violations == []
    del kept


def test_a_step_whose_cache_is_gone_says_so() -> None:
    kv, id = cache_on("cpu")
    step = kv.step([id], [4])
    slots = step.slots
    del kv
    assert not step.is_open
    assert step.slots is slots  # which were read before
    for call in (step.commit, step.rollback, step.csr, lambda: step.seq_lens):
        with pytest.raises(pk.InvalidState, match="cache of step 2 is gone"):
            call()
    with pytest.raises(ZeroDivisionError), step:  # as of a cache that was closed
        _ = 1 / 0


def test_a_step_whose_cache_was_closed_in_a_forked_child_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kv, id = cache_on("cpu")
    step = kv.step([id], [4])
    monkeypatch.setattr(kv, "_process", -1)  # where nothing is rolled back: it is the parent's
    kv.close()
    assert not step.is_open
    with pytest.raises(pk.InvalidState):
        kv.write(0, torch.ones(1, 1, 8), torch.ones(1, 1, 8), step)


def test_a_transfer_whose_cache_is_gone_has_ended() -> None:
    kv, id = cache_on(SimulatedDevice(0, schedule="lazy"))
    out = kv.swap_out([id])
    del kv
    assert out.done
    assert not out.cancel()
    assert out.error is not None
    with pytest.raises(pk.TransferError, match="closed before its end"):
        out.wait()
    out.wait()


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_has_no_copies(twin: Any) -> None:
    with pytest.raises(TypeError, match=r"a KVCache cannot be copied or pickled: fork\(\)"):
        twin(cache_on("cpu")[0])
