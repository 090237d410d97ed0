"""Operators for torch.compile and CUDA graphs: `torch.ops.pagedkv.write`, `gather`, `copy_blocks`.

They take one layer's keys and values as tensors [N, P, H, D], such as `kv.k(i)` and `kv.v(i)` or an
engine's own, and arrays that are where those are: `step.slots`, `step.block_tables`,
`step.seq_lens`. So nothing in them depends on the host, and a compiled or captured model has no
break. In a step of KVCache, `kv.write` does the same with fewer arguments, and checks that the step
is open.

torch.compile writes to pools where they are if each has a storage of its own, as those of a KVCache
have. Of a view that begins behind its storage's beginning, such as values in one tensor with keys,
torch (2.13) makes a copy: pass torch.from_dlpack(view), made outside of what is compiled.

With torch.compile(dynamic=True), torch._dynamo.mark_static() the pools: else their shapes are taken
for variable too, which torch (2.13) confuses for two views of one memory. Without `dynamic` torch
sees by itself what varies.

Before a capture, run one of them, outside of it, on each layer's pools, as a model's warm-up does:
the first use of a layer allocates, and uploads where its blocks are, which a capture refuses. That
stays for good, since a captured copy_blocks reads it at each replay.

On a GPU nobody can look at slots and tables before they are used: a slot outside the pool is an
illegal access there, where the CPU raises.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from threading import Lock

import torch

from pagedkv._core import CudaDevice, CudaPool, HostPool, LayerWriter, Pool
from pagedkv.checks import address, check_source, check_tables, refuse, require_on
from pagedkv.errors import InvalidSpec
from pagedkv.rows import gather_into, rows, rows_at

__all__ = ["copy_blocks", "gather", "write"]

_library = torch.library.Library("pagedkv", "DEF")
_library.define(
    "write(Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor k, Tensor v, Tensor slots) -> ()"
)
_library.define(
    "gather(Tensor k_pool, Tensor v_pool, Tensor block_tables, Tensor seq_lens, SymInt width)"
    " -> (Tensor, Tensor)"
)
_library.define("copy_blocks(Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor copies) -> ()")

write = torch.ops.pagedkv.write.default
gather = torch.ops.pagedkv.gather.default
copy_blocks = torch.ops.pagedkv.copy_blocks.default


class _Layer:
    """A layer's two pools, by their addresses alone: it outlives the tensors idly.

    No pool is ever given back: a captured graph may read its regions, which are on the device.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if k.device != v.device:
            raise InvalidSpec(
                f"k_pool is on {k.device} and v_pool on {v.device}: expected one device"
            )
        for part in (k, v):
            address(part, "the pool")
            if part.dim() != 4 or not part[:1].is_contiguous():
                shape, stride = part.shape, part.stride()
                raise InvalidSpec(
                    f"the pool is {list(shape)} with strides {list(stride)}, expected [N, P, H, D] "
                    "with the tokens of a block one behind the other"
                )
        if k.shape[:2] != v.shape[:2] or k.dtype != v.dtype:
            raise InvalidSpec(
                f"k_pool is {k.dtype} {list(k.shape)} and v_pool {v.dtype} {list(v.shape)}: they "
                "are not one layer's"
            )
        size = k.element_size()
        regions = [
            (p.data_ptr(), p.stride(0) * size, p.shape[2] * p.shape[3] * size) for p in (k, v)
        ]
        num_blocks, block_size = k.shape[:2]
        self.pool: Pool
        self.turn: AbstractContextManager[None]
        if k.is_cuda:
            self.turn = turn = _turn(k.device.index)
            self.pool = CudaPool(turn.device, regions, num_blocks, block_size, 0, 0, 0, 0)
        else:
            self.turn = nullcontext()
            self.pool = HostPool(regions, num_blocks, block_size)
        self.writer = LayerWriter(self.pool, 0, k, v)


class _Turn:
    """Operators on a GPU queue on the stream that their caller is on, one of them at a time.

    The device has one for all threads: without, another thread's might be taken in between.
    """

    def __init__(self, device: CudaDevice) -> None:
        self.device, self._lock = device, Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self.device.use_stream(torch._C._cuda_getCurrentRawStream(self.device.index))
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()


# By all that tells pools from others: the same memory may be seen in many ways, as pool[:n] is.
_layers: dict[tuple[object, ...], _Layer] = {}
_last_at: dict[tuple[int, int], _Layer] = {}  # by the addresses of its pools: quicker to find


@cache
def _turn(index: int) -> _Turn:
    return _Turn(CudaDevice(import_module("pagedkv._cuda").runtime(), index))


def _layer_of(k: torch.Tensor, v: torch.Tensor) -> _Layer:
    at = k.data_ptr(), v.data_ptr()
    seen = k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(), v.dtype, v.device
    layer = _layers.get((at, seen))
    if layer is None:
        layer = _layers[at, seen] = _Layer(k, v)
    _last_at[at] = layer
    return layer


def _write(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Token t of k and v [T, H, D] goes to slots[t] (int64 [T]) of a layer's pools [N, P, H, D]."""
    layer = _last_at.get((k_pool.data_ptr(), v_pool.data_ptr()))
    if layer is not None:  # most likely theirs
        with layer.turn:
            if layer.writer.write_into(k_pool, v_pool, k, v, slots):
                return
    layer = _layer_of(k_pool, v_pool)
    if slots.dtype is not torch.int64 or slots.dim() != 1 or not slots.is_contiguous():
        refuse("slots", slots, "contiguous int64 [T]")
    require_on("slots", slots, k_pool.device)
    num_tokens = len(slots)
    for name, source, pool in (("k", k, k_pool), ("v", v, v_pool)):
        check_source(source, name, pool, num_tokens)
        if source.dtype != pool.dtype:
            refuse(name, source, str(pool.dtype))
    k, v = rows(k), rows(v)
    with layer.turn:
        layer.pool.write(0, slots.data_ptr(), num_tokens, *rows_at(k), *rows_at(v))


def _gather(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole sequences, [B, H, width, D], zeros past each of seq_lens.

    block_tables is int32 [B, W], seq_lens int32 [B], none of them above `width`.
    """
    layer = _layer_of(k_pool, v_pool)
    check_tables(block_tables, seq_lens, "seq_lens", k_pool.device)
    found = []
    for region, part in enumerate((k_pool, v_pool)):
        out = part.new_empty(len(seq_lens), part.shape[2], width, part.shape[3])
        if out.numel():
            with layer.turn:
                gather_into(out, layer.pool, region, block_tables, seq_lens)
        found.append(out)
    return found[0], found[1]


def _copy_blocks(k_pool: torch.Tensor, v_pool: torch.Tensor, copies: torch.Tensor) -> None:
    """Rows of copies (int32 [n, 3]): source block, target block, tokens to copy."""
    layer = _layer_of(k_pool, v_pool)
    if copies.dtype != torch.int32 or copies.shape[1:] != (3,) or not copies.is_contiguous():
        refuse("copies", copies, "contiguous int32 [n, 3]")
    require_on("copies", copies, k_pool.device)
    if len(copies):
        with layer.turn:
            layer.pool.copy_blocks(copies.data_ptr(), len(copies))


def _nothing(*arguments: torch.Tensor) -> None:
    """What write and copy_blocks give back: all that they do is in the pools."""


def _gather_shapes(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = seq_lens.shape[0]
    k, v = (p.new_empty(num_rows, p.shape[2], width, p.shape[3]) for p in (k_pool, v_pool))
    return k, v


for _name, _function, _fake in (
    ("write", _write, _nothing),
    ("gather", _gather, _gather_shapes),
    ("copy_blocks", _copy_blocks, _nothing),
):
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"pagedkv::{_name}", _fake, lib=_library)
