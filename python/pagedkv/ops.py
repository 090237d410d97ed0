"""Operators for torch.compile and CUDA graphs: `torch.ops.pagedkv.write`, `gather`, `copy_blocks`.

They take one layer's keys and values as tensors [N, P, H, D], such as `kv.k(i)` and `kv.v(i)` or an
engine's own, and arrays that are where those are: `step.slots`, `step.block_tables`,
`step.seq_lens`. So nothing in them depends on the host, and a compiled or captured model has no
break. In a step of KVCache, `kv.write` does the same with fewer arguments, and checks that the step
is open.

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

from functools import cache
from importlib import import_module
from typing import NamedTuple, NoReturn

import torch

from pagedkv._core import CudaDevice, CudaPool, HostPool, Pool
from pagedkv.errors import InvalidSpec

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


class _Layer(NamedTuple):
    """A layer's two pools, by their addresses alone: it outlives the tensors idly.

    No pool is ever given back: a captured graph may read its regions, which are on the device.
    """

    pool: Pool
    device: CudaDevice | None
    k_token: tuple[int, ...]  # heads, dim
    v_token: tuple[int, ...]
    item_bytes: int


@cache
def _layer(
    k_at: int,
    v_at: int,
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    dtype: torch.dtype,
    v_dtype: torch.dtype,
    index: int | None,
) -> _Layer:
    regions, size = [], dtype.itemsize
    for at, shape, stride in ((k_at, k_shape, k_stride), (v_at, v_shape, v_stride)):
        if len(shape) != 4 or stride[1:] != (shape[2] * shape[3], shape[3], 1):
            raise InvalidSpec(
                f"the pool is {list(shape)} with strides {list(stride)}, expected [N, P, H, D] "
                "with the tokens of a block one behind the other"
            )
        regions.append((at, stride[0] * size, shape[2] * shape[3] * size))
    if k_shape[:2] != v_shape[:2] or dtype != v_dtype:
        raise InvalidSpec(
            f"k_pool is {dtype} {list(k_shape)} and v_pool {v_dtype} {list(v_shape)}: they are not "
            "one layer's"
        )
    size_of = k_shape[0], k_shape[1]
    device = None if index is None else _device(index)
    pool: Pool = HostPool(regions, *size_of)
    if device is not None:
        pool = CudaPool(device, regions, *size_of, 0, 0, 0, 0)
    return _Layer(pool, device, tuple(k_shape[2:]), tuple(v_shape[2:]), size)


@cache
def _device(index: int) -> CudaDevice:
    return CudaDevice(import_module("pagedkv._cuda").runtime(), index)


def _layer_of(k: torch.Tensor, v: torch.Tensor) -> _Layer:
    at = k.data_ptr(), v.data_ptr(), k.shape, v.shape, k.stride(), v.stride(), k.dtype, v.dtype
    if not k.is_cuda:
        return _layer(*at, None)
    layer = _layer(*at, k.device.index)
    if layer.device is not None:
        layer.device.use_stream(torch._C._cuda_getCurrentRawStream(layer.device.index))
    return layer


def _refuse(what: str, tensor: torch.Tensor, expected: str) -> NoReturn:
    raise InvalidSpec(
        f"{what} is {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}, "
        f"expected {expected}"
    )


def _write(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Token t of k and v [T, H, D] goes to slots[t] (int64 [T]) of a layer's pools [N, P, H, D]."""
    pool, _, k_token, v_token, size = _layer_of(k_pool, v_pool)
    (num_tokens,) = slots.shape
    if slots.dtype != torch.int64 or slots.stride() != (1,):
        _refuse("slots", slots, "contiguous int64 [T]")
    if k.shape != (num_tokens, *k_token) or k.dtype != k_pool.dtype:
        _refuse("k", k, f"{k_pool.dtype} {[num_tokens, *k_token]}")
    if v.shape != (num_tokens, *v_token) or v.dtype != v_pool.dtype:
        _refuse("v", v, f"{v_pool.dtype} {[num_tokens, *v_token]}")
    k_stride, v_stride = k.stride(), v.stride()
    if k_stride[1:] != (k_token[1], 1):
        k = k.contiguous()
        k_stride = k.stride()
    if v_stride[1:] != (v_token[1], 1):
        v = v.contiguous()
        v_stride = v.stride()
    k_at, v_at = k.data_ptr(), v.data_ptr()
    pool.write(0, slots.data_ptr(), num_tokens, k_at, k_stride[0] * size, v_at, v_stride[0] * size)


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
    pool = _layer_of(k_pool, v_pool).pool
    if seq_lens.dtype != torch.int32 or seq_lens.stride() != (1,):
        _refuse("seq_lens", seq_lens, "contiguous int32 [B]")
    rows = block_tables.dim() == 2 and len(block_tables) == len(seq_lens)
    if not rows or block_tables.dtype != torch.int32 or block_tables.stride(1) != 1:
        _refuse("block_tables", block_tables, f"int32 [{len(seq_lens)}, W] of contiguous rows")
    found = []
    for region, part in enumerate((k_pool, v_pool)):
        out = part.new_empty(len(seq_lens), part.shape[2], width, part.shape[3])
        if out.numel():
            pool.gather(
                region,
                block_tables.data_ptr(),
                block_tables.stride(0),
                len(block_tables),
                block_tables.shape[1],
                0,
                seq_lens.data_ptr(),
                part.shape[2],
                width,
                out.data_ptr(),
            )
        found.append(out)
    return found[0], found[1]


def _copy_blocks(k_pool: torch.Tensor, v_pool: torch.Tensor, copies: torch.Tensor) -> None:
    """Rows of copies (int32 [n, 3]): source block, target block, tokens to copy."""
    pool = _layer_of(k_pool, v_pool).pool
    if copies.dtype != torch.int32 or copies.shape[1:] != (3,) or not copies.is_contiguous():
        _refuse("copies", copies, "contiguous int32 [n, 3]")
    if len(copies):
        pool.copy_blocks(copies.data_ptr(), len(copies))


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
