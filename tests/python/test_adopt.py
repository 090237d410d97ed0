"""An engine's own tensors as a device tier: every layout, every byte, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from adopted_layouts import (  # noqa: E402
    LAYOUTS,
    SPEC,
    D,
    H,
    L,
    Layers,
    N,
    P,
    flashinfer_hnd,
    noise,
    spec_of,
    vllm,
)
from pagedkv.adopt import adopt  # noqa: E402
from pagedkv.layout import DevicePool  # noqa: E402
from pagedkv.spec import DTYPE_BYTES  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda, SimulatedDevice  # noqa: E402
from pagedkv.tryout import try_copies  # noqa: E402

CPU = torch.device("cpu")
DEVICES: dict[str, Callable[[], Any]] = {
    "cpu": lambda: "cpu",
    "simulated": lambda: SimulatedDevice(3),
    "cuda": lambda: CudaDevice(SimulatedCuda(3)),
}


def memory_of(layers: Layers) -> list[Any]:
    """All bytes behind the tensors, those between their own too."""
    return [
        torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for pair in layers for t in pair
    ]


def content(layers: Layers) -> list[Any]:
    return [t.clone() for t in memory_of(layers)]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Mirror:
    """A naive copy of each block of the tensors, moved as plans say, token by token."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.device = [[t[b].clone() for t in self.parts] for b in range(N)]
        self.host: dict[int, list[Any]] = {}

    @property
    def parts(self) -> list[Any]:
        return [t for pair in self.layers for t in pair]

    def copies(self, copies: Any) -> None:
        for source, target, num_tokens in copies.tolist():
            for to, of in zip(self.device[target], self.device[source], strict=True):
                to[:num_tokens] = of[:num_tokens]

    def transfer(self, plan: Any) -> None:
        for source, target, _ in plan.copies.tolist():
            if plan.direction == "out":
                self.host[target] = [t.clone() for t in self.device[source]]
            else:
                self.device[target] = [t.clone() for t in self.host[source]]

    def write(self, slots: Any, value: float) -> None:
        """The engine's own kernel: into the tensors, and here."""
        for slot in slots.tolist():
            for i, tensor in enumerate(self.parts):
                tensor[slot // P, slot % P] = value + i
                self.device[slot // P][i][slot % P] = value + i

    def check(self, blocks: Any) -> None:
        for b in blocks:
            for tensor, expected in zip(self.parts, self.device[b], strict=True):
                assert torch.equal(tensor[b], expected), f"block {b}"


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda f: f.__name__)
def test_a_layout_is_taken_for_what_it_is(make: Callable[[], Layers]) -> None:
    pool = adopt(spec_of(make), make(), CPU)
    assert (pool.in_rows, len(pool.block_runs)) == LAYOUTS[make]
    assert pool.num_blocks == N
    assert sum(run[2] for run in pool.block_runs) == spec_of(make).block_bytes
    assert sum(token for _, _, token in pool.regions) == spec_of(make).token_bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", LAYOUTS, ids=lambda f: f.__name__)
def test_copies_and_swaps_move_what_the_tensors_hold(
    make: Callable[[], Layers], device: str
) -> None:
    """A scheduler's plans on the engine's tensors, which it writes itself, and a naive twin."""
    layers = make()
    before = content(layers)
    manager = pk.BlockManager(N - 1, N - 1, block_size=P, max_batch=8)
    kv = pk.KVCache(
        spec_of(make), tensors=layers, device=DEVICES[device](), num_host_blocks=N - 1, max_batch=8
    )
    assert same(content(layers), before)
    mirror, value = Mirror(layers), 1.0

    def step(ids: Any, counts: list[int]) -> None:
        nonlocal value
        plan = manager.append(ids, counts=counts)
        with kv.apply(plan):
            kv._pool.synchronize()  # the engine's kernels below run at once
            mirror.copies(plan.copies)
            mirror.write(plan.slots, value)
        manager.commit(plan)
        value += 10

    def move(plan: Any) -> None:
        kv._pool.synchronize()
        transfer = kv.apply(plan)
        mirror.transfer(plan)
        transfer.wait()
        manager.complete(plan)

    first = manager.create()
    step([first], [P + 2])
    beams = manager.fork(first, 3)
    step(beams, [1, 1, 1])
    step(beams, [1, 2, 1])
    manager.reorder(beams, [1, 1, 0])
    step(beams, [1, 1, 1])
    move(manager.swap_out(beams))
    other = manager.create()
    step([other], [2 * P + 1])  # where they were
    move(manager.swap_in(beams))
    step([*beams, other], [1, 1, 1, 1])
    held = {int(b) for i in (*beams, other) for b in manager.block_table(i)}
    assert len(held) > 4
    mirror.check(held)
    manager.verify()
    kv.close()


@pytest.mark.parametrize("make", [m for m, (rows, _) in LAYOUTS.items() if rows])
@pytest.mark.parametrize("device", DEVICES)
def test_write_gather_and_attention_work_where_tokens_are_rows(
    make: Callable[[], Layers], device: str
) -> None:
    spec, layers = spec_of(make), make()
    given = {"max_batch": 4}
    adopted = pk.KVCache(spec, tensors=layers, device=DEVICES[device](), **given)
    own = pk.KVCache(spec, num_device_blocks=N - 1, device=DEVICES[device](), **given)
    shape = spec.layers[0]
    found = []
    for kv in (adopted, own):
        outputs = []
        random = torch.Generator().manual_seed(1)
        seq = kv.create()
        for ids, count in (([seq], 7), (kv.fork(seq, 1), 1)):
            with kv.step(ids, counts=[count]) as step:
                for layer in range(L):
                    k = torch.randn(count, shape.num_kv_heads, shape.k_dim, generator=random)
                    v = torch.randn(count, shape.num_kv_heads, shape.v_dim, generator=random)
                    q = torch.randn(count, 2, shape.k_dim, generator=random)
                    kv.write(layer, k, v, step)
                    outputs.append(kv.attention(layer, q, step).clone())
        found.append(outputs)
        table = kv.block_table(seq)
        for layer in range(L):
            outputs += [t(layer)[table].flatten(0, 1)[:8].clone() for t in (kv.k, kv.v)]
    assert same(*found)
    adopted.close()
    own.close()


def test_where_tokens_are_no_rows_write_and_attention_say_so() -> None:
    with pk.KVCache(SPEC, tensors=flashinfer_hnd()) as kv, kv.step([kv.create()]) as step:
        k = torch.zeros(1, H, D)
        for call in (
            lambda: kv.write(0, k, k, step),
            lambda: kv.gather(0, step),
            lambda: kv.attention(0, k, step),
        ):
            with pytest.raises(pk.InvalidSpec, match="contiguous"):
                call()


def test_the_tensors_are_the_engines() -> None:
    """The cache shows them as they came, and they outlive it."""
    layers = vllm()
    kv = pk.KVCache(SPEC, tensors=layers)
    assert kv.manager.num_device_blocks == N - 1
    for i, (k, v) in enumerate(layers):
        assert (kv.k(i).data_ptr(), kv.v(i).data_ptr()) == (k.data_ptr(), v.data_ptr())
        assert kv.k(i).stride() == k.stride()
    kv.close()
    layers[0][0].zero_()


@pytest.mark.parametrize("num_blocks", [2, 3])
@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("host", [0, 1, 2])
def test_the_smallest_pools_are_tried_out(num_blocks: int, block_size: int, host: int) -> None:
    spec = pk.KVSpec(1, 1, 4, "float32", block_size)
    shape = num_blocks, block_size, 1, 4
    layers = [(torch.randn(shape), torch.randn(shape))]
    before = content(layers)
    with pk.KVCache(spec, tensors=layers, num_host_blocks=host):
        assert same(content(layers), before)


# ---- what is refused -------------------------------------------------------------------------


def replaced(make: Callable[[], Layers], layer: int, part: int, tensor: Any) -> Layers:
    layers = [list(pair) for pair in make()]
    layers[layer][part] = tensor
    return [(k, v) for k, v in layers]


def overlapping(blocks_apart: int) -> Layers:
    """Layer 1's values begin that many blocks behind layer 0's keys, in the same memory."""
    memory = noise(3 * N, P, H, D)
    layers = vllm()
    return [(memory[:N], layers[0][1]), (layers[1][0], memory[blocks_apart : blocks_apart + N])]


def half_overlapping() -> Layers:
    memory = noise(N, 3, P * H * D)
    k = memory[:, 0].view(N, P, H, D)
    v = memory.view(N, -1)[:, P * H * D // 2 :][:, : P * H * D].unflatten(1, (P, H, D))
    return [(k, v), vllm()[1]]


def among_others() -> Layers:
    memory = noise(N * 4, P, H, D)
    return [(memory[::4], memory[1 : 2 * N + 1 : 2]), vllm()[1]]


BAD: list[tuple[str, Callable[[], Any], str]] = [
    ("too few layers", lambda: vllm()[:1], "tensors is 1"),
    ("no list", lambda: noise(2, N, P, H, D), "tensors is Tensor"),
    ("no pair", lambda: [noise(2, N, P, H, D), noise(2, N, P, H, D)], r"tensors\[0\] is Tensor"),
    ("no tensor", lambda: replaced(vllm, 1, 0, np.zeros((N, P, H, D))), "layer 1's k is ndarray"),
    ("dtype", lambda: replaced(vllm, 1, 1, noise(N, P, H, D).float()), "layer 1's v is torch.fl"),
    ("device", lambda: replaced(vllm, 0, 1, noise(N, P, H, D).to("meta")), "layer 0's v is on m"),
    ("sparse", lambda: replaced(vllm, 0, 1, noise(N, P, H, D).to_sparse()), "layer 0's v is"),
    ("heads", lambda: replaced(vllm, 1, 0, noise(N, P, H + 1, D)), r"layer 1's k is \[12, 4, 3"),
    ("hnd as it is", lambda: replaced(vllm, 0, 0, noise(N, H, P, D)), r"layer 0's k is \[12, 2"),
    ("blocks", lambda: replaced(vllm, 1, 0, noise(N + 1, P, H, D)), "layer 1's k .*expected .12,"),
    ("one block", lambda: [(k[:1], v[:1]) for k, v in vllm()], "layer 0's k .*N of 2 or more"),
    ("three dims", lambda: replaced(vllm, 0, 0, noise(N, P, H * D)), "layer 0's k is"),
    ("expanded", lambda: replaced(vllm, 1, 1, noise(1, P, H, D).expand(N, P, H, D)),
     "layer 1's v has blocks 0 bytes apart"),
    ("padded tokens", lambda: replaced(vllm, 1, 0, noise(N, P, H + 1, D)[:, :, :H]),
     "layer 1's k has tokens 48 bytes apart .*stride 1"),
    ("padded heads", lambda: replaced(vllm, 0, 1, noise(N, P, H, D + 4)[..., :D]),
     "layer 0's v has tokens 48 bytes apart"),
    ("every other element", lambda: replaced(vllm, 0, 1, noise(N, P, H, 2 * D)[..., ::2]),
     "layer 0's v has tokens"),
    ("keys as values", lambda: [(k, k) for k, _ in vllm()], "layer .'s k and layer .'s v overlap"),
    ("layers twice", lambda: vllm()[:1] * 2, "layer [01]'s [kv] and layer [01]'s [kv] overlap"),
    ("shifted by a block", lambda: overlapping(1), "layer 0's k and layer 1's v overlap"),
    ("only the last block", lambda: overlapping(N - 1), "layer 0's k and layer 1's v overlap"),
    ("half a block", half_overlapping, "layer 0's [kv] and layer 0's [kv] overlap"),
    ("other strides among", among_others, "layer 0's v lies among the blocks of layer 0's k"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "named"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_other_tensors_are_refused_by_name(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(pk.InvalidSpec, match=named):
        pk.KVCache(SPEC, tensors=make())


def test_neighbours_do_not_overlap() -> None:
    adopt(SPEC, overlapping(N), CPU)  # one behind the other


def test_tensors_are_instead_of_memory() -> None:
    for more in ({"num_device_blocks": 5}, {"device_memory": "1MiB"}):
        with pytest.raises(pk.InvalidSpec, match="tensors and another"):
            pk.KVCache(SPEC, tensors=vllm(), **more)


# ---- the byte test itself --------------------------------------------------------------------


def off(runs: Any, i: int, field: int, by: int) -> Any:
    changed = [list(run) for run in runs]
    changed[i][field] += by
    return tuple(tuple(run) for run in changed)


@pytest.mark.parametrize("field", [0, 1, 2])
@pytest.mark.parametrize("part", ["regions", "block_runs"])
@pytest.mark.parametrize("make", LAYOUTS, ids=lambda f: f.__name__)
def test_one_number_wrong_is_noticed_and_everything_put_back(
    make: Callable[[], Layers], part: str, field: int
) -> None:
    """Addresses, strides and sizes that are off by a little: each alone shows in the bytes."""
    spec, layers = spec_of(make), make()
    right = adopt(spec, layers, CPU)
    parts = [t for pair in layers for t in pair]
    before = [t[:3].clone() for t in parts]
    i = len(getattr(right, part)) - 1
    wrong = off(getattr(right, part), i, field, (-2, 2, -2)[field])
    memory = DevicePool(
        layers, right.layers, N, wrong if part == "regions" else right.regions,
        wrong if part == "block_runs" else right.block_runs, right.in_rows,
    )  # fmt: skip
    with pytest.raises(pk.InvalidSpec, match=r"layer \d's [kv] does not hold"):
        try_out(memory)
    for tensor, kept in zip(parts, before, strict=True):
        assert torch.equal(tensor[:3], kept)
    try_out(right)


def try_out(memory: DevicePool) -> None:
    from pagedkv._core import HostDevice, HostPool, TransferEngine
    from pagedkv.machine import Machine

    pool = HostPool(list(memory.regions), N, P)
    engine = TransferEngine(HostDevice(), memory.block_runs, N - 1, N - 1, owner=memory)
    try_copies(memory, pool, engine, N - 1, Machine())
    engine.close()


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_bytes_that_are_no_number_are_put_back(dtype: str) -> None:
    size = DTYPE_BYTES[dtype]
    memory = torch.randint(0, 256, (N, 2, H, P, D * size), dtype=torch.uint8)
    kept = memory.clone()
    views = memory.view(getattr(torch, dtype)).transpose(2, 3)
    spec = pk.KVSpec(1, H, D, dtype, P)
    with pk.KVCache(spec, tensors=[(views[:, 0], views[:, 1])], num_host_blocks=4):
        assert torch.equal(memory, kept)
