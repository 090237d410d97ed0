"""LayerWriter takes what a layer keeps, and leaves all else to the way that asks more."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv import ops  # noqa: E402
from pagedkv._core import HostPool, LayerWriter  # noqa: E402

T, H, D = 3, 2, 8
Make = Callable[[], Any]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


TAKEN: dict[str, Make] = {
    "dense": lambda: randn(T, H, D),
    "of a larger one": lambda: randn(T + 2, H, D)[1 : 1 + T],
    "needing a gradient": lambda: randn(T, H, D).requires_grad_(),
}
LEFT: dict[str, Make] = {
    "a parameter": lambda: torch.nn.Parameter(randn(T, H, D)),
    "double": lambda: randn(T, H, D).double(),
    "bfloat16": lambda: randn(T, H, D).bfloat16(),
    "heads first": lambda: randn(H, T, D).transpose(0, 1),
    "elements apart": lambda: randn(T, D, H).transpose(1, 2),
    "one head for all": lambda: randn(T, 1, D).expand(T, H, D),
    "every other token": lambda: randn(2 * T, H, D)[::2],
    "negated lazily": lambda: torch.view_as_complex(randn(T, H, D, 2)).conj().imag,
}
REFUSED: dict[str, Make] = {
    "fewer tokens": lambda: randn(T - 1, H, D),
    "heads and elements exchanged": lambda: randn(T, D, H),
    "too long": lambda: randn(T, H, D + 1),
    "flat": lambda: randn(T * H * D),
    "with one dimension more": lambda: randn(T, H, D, 1),
    "integers": lambda: torch.ones(T, H, D, dtype=torch.int32),
    "on another device": lambda: randn(T, H, D).to("meta"),
    "numpy's": lambda: np.zeros((T, H, D), np.float32),
    "nothing": lambda: None,
}


def cache() -> pk.KVCache:
    return pk.KVCache(pk.KVSpec(2, H, D, "float32", 4), num_device_blocks=9)


@pytest.mark.parametrize("with_writer", [True, False])
@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_all_that_can_be_written_is(
    monkeypatch: pytest.MonkeyPatch, name: str, with_writer: bool
) -> None:
    """Also where torch does not say how to look at its tensors."""
    with cache() as kv:
        if not with_writer:
            monkeypatch.setattr(kv, "_writers", {})
        k, v = {**TAKEN, **LEFT}[name](), randn(T, H, D)
        sequence = kv.create()
        with kv.step([sequence], counts=[T]) as step:
            for pair in ((k, v), (v, k)):
                kv.write(1, *pair, step)
                stored = [p.flatten(0, 1)[step.slots] for p in (kv.k(1), kv.v(1))]
                assert all(torch.equal(s, x.float()) for s, x in zip(stored, pair, strict=True))
            assert not kv.k(0).flatten(0, 1)[step.slots].equal(k.float())


@pytest.mark.parametrize("name", [*TAKEN, *LEFT, *REFUSED])
def test_it_takes_what_the_layer_keeps(name: str) -> None:
    memory = torch.zeros(2, 5, 4, H, D)
    k, v = memory
    writer = LayerWriter(pool_of(k, v), 0, k, v)  # which keeps the pool alive
    slots, good = torch.arange(4, 4 + T), randn(T, H, D)
    odd = {**TAKEN, **LEFT, **REFUSED}[name]()
    for pair in ((odd, good), (good, odd)):
        memory.zero_()
        assert writer.write(slots.data_ptr(), T, *pair) == (name in TAKEN)
        assert writer.write_into(k, v, *pair, slots) == (name in TAKEN)
        assert bool(memory.any()) == (name in TAKEN)


def pool_of(k: torch.Tensor, v: torch.Tensor) -> HostPool:
    regions = [(t.data_ptr(), 4 * t.stride(0), 4 * H * D) for t in (k, v)]
    return HostPool(regions, k.shape[0], k.shape[1])


def test_pools_and_slots_have_to_be_those_that_it_knows() -> None:
    memory = torch.zeros(2, 5, 4, H, D)
    k, v = memory
    writer = LayerWriter(pool_of(k, v), 0, k, v)
    slots, new = torch.arange(T), randn(T, H, D)
    others = [
        (v, k, slots),
        (k, v[1:], slots),
        (k[:4], v, slots),
        (k.view(5, 4, D, H), v, slots),
        (k.view(torch.int32), v, slots),
        (k[::2], v[::2], slots),
        (k, v, slots.int()),
        (k, v, torch.arange(2 * T)[::2]),
        (k, v, slots[None]),
        (k, v, slots.numpy()),
    ]
    for k_pool, v_pool, at in others:
        assert not writer.write_into(k_pool, v_pool, new, new, at)
    assert not memory.any()
    assert writer.write_into(k.view(5, 4, H, D), v, new, new, slots)
    assert torch.equal(k[0, :T], new)


def test_the_same_memory_seen_differently_is_another_layer() -> None:
    memory = torch.zeros(2, 4, 4, H, D)
    k, v = memory
    wide = randn(1, 2 * H, D)
    for _ in range(2):
        memory.zero_()
        ops.write(k, v, wide[:, :H].contiguous(), wide[:, H:].contiguous(), torch.tensor([5]))
        assert torch.equal(k[1, 1], wide[0, :H])
        assert torch.equal(v[1, 1], wide[0, H:])
        pools = k.view(4, 2, 2 * H, D), v.view(4, 2, 2 * H, D)
        ops.write(*pools, wide, wide, torch.tensor([5]))
        assert torch.equal(pools[0][2, 1], wide[0])


def test_tokens_outside_the_pool_are_refused() -> None:
    k, v = torch.zeros(2, 5, 4, H, D)
    writer, new = LayerWriter(pool_of(k, v), 0, k, v), randn(1, H, D)
    with pytest.raises(ValueError, match="outside the pool"):
        writer.write_into(k, v, new, new, torch.tensor([20]))


def test_a_library_that_says_nothing_or_of_another_version_is_not_asked() -> None:
    class Api(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_uint32) for name in ("major", "minor")),
            *((name, ctypes.c_void_p) for name in ("before", "a", "b", "c", "look_at", "d")),
        )

    name, new_capsule = b"dlpack_exchange_api", ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
    apis = [Api(2, 0, None, 1, 1, 1, 1, 1), Api(1, 3, None, 1, 1, 1, None, 1)]
    found = [new_capsule(ctypes.addressof(api), name, None) for api in apis]
    k = torch.zeros(5, 4, H, D)
    for capsule in [*found, new_capsule(ctypes.addressof(apis[0]), b"another", None), None, 7]:
        odd = type("Odd", (), {"__dlpack_c_exchange_api__": capsule})()
        writer = LayerWriter(pool_of(k, k), 0, odd, odd)
        assert not writer.write(0, 1, odd, odd)
        assert not writer.write_into(odd, odd, odd, odd, odd)
