"""The tensors of a KVCache: one allocation, and each layer's keys and values as views of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from pagedkv.errors import InvalidSpec
from pagedkv.spec import KVSpec, LayerSpec
from pagedkv.units import parse_bytes

__all__ = ["DevicePool", "Layout", "num_usable_blocks", "region"]

_ALIGNMENT = 64  # bytes: of a cache line, which is what torch gives and numpy does not

Layout = Literal["block_major", "layer_major"]
_Part = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class DevicePool:
    """The device tier of a cache.

    Attributes:
        memory: what keeps all of it alive.
        layers: per layer, keys and values as views [num_blocks, block_size, heads, dim].
        num_blocks: that for padding among them.
        regions: runs that every token has, as (address in block 0, distance between blocks, bytes
            of a token), where each token follows the one before: what steps read and write.
        block_runs: the contiguous runs that a block consists of, as (address in block 0, distance
            between blocks, bytes): what a transfer copies.
        in_rows: whether the regions are each layer's keys and values, in this order, as write and
            gather need it.
    """

    memory: Any
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    num_blocks: int
    regions: tuple[tuple[int, int, int], ...]
    block_runs: tuple[tuple[int, int, int], ...]
    in_rows: bool = True

    @classmethod
    def allocate(
        cls, spec: KVSpec, num_blocks: int, layout: Layout, device: torch.device
    ) -> DevicePool:
        """Memory for `num_blocks` blocks, that for padding among them, untouched.

        Raises InvalidSpec for an unknown layout, or if there is not so much memory.
        """
        if layout not in ("block_major", "layer_major"):
            raise InvalidSpec(f'layout is {layout!r}, expected "block_major" or "layer_major"')
        num_bytes = num_blocks * spec.block_bytes
        try:
            memory = _empty(num_bytes, layout, device)
        except (RuntimeError, MemoryError) as error:
            raise InvalidSpec(
                f"the pool of {num_bytes} bytes does not fit in the memory of {device}"
            ) from error
        if layout == "block_major":
            rows = memory.view(num_blocks, spec.block_bytes)
            layers = _views(spec, lambda offset, size: rows[:, offset : offset + size])
            block_runs = [(memory.data_ptr(), spec.block_bytes, spec.block_bytes)]
        else:
            layers = _views(
                spec,
                lambda offset, size: memory[offset * num_blocks :][: size * num_blocks].view(
                    num_blocks, size
                ),
            )
            block_runs = [_run(t) for layer in layers for t in layer]
        regions = tuple(region(t) for layer in layers for t in layer)
        return cls(memory, layers, num_blocks, regions, tuple(block_runs))


def _empty(num_bytes: int, layout: Layout, device: torch.device) -> torch.Tensor:
    """Bytes, untouched.

    Whole blocks come from numpy on a CPU, which has them mapped in pieces of 2 MiB: writes to one
    token of each of many sequences then find their way quicker. A first block in pieces would touch
    as many of those as it has layers.
    """
    if device.type == "cpu" and layout == "block_major":
        memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        return torch.from_numpy(memory[-memory.ctypes.data % _ALIGNMENT :][:num_bytes])
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def region(view: torch.Tensor) -> tuple[int, int, int]:
    """Of keys or values [N, P, H, D] whose tokens are rows, what a pool has to know."""
    size, (_, _, num_heads, dim) = view.element_size(), view.shape
    return view.data_ptr(), view.stride(0) * size, num_heads * dim * size


def _views(spec: KVSpec, part: _Part) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Keys and values of each layer, from the part of every block that `part(offset, size)` is.

    Each has a storage of its own, which begins where it begins. torch.compile (2.13) copies what an
    operator writes to, all of it, if it is a part of a larger storage.
    """
    layers, offset = [], 0

    def view(layer: LayerSpec, token_bytes: int, dim: int) -> torch.Tensor:
        nonlocal offset
        size = spec.block_size * token_bytes
        alone: torch.Tensor = from_dlpack(to_dlpack(part(offset, size)))
        offset += size
        typed = alone.view(getattr(torch, layer.dtype))
        return typed.view(-1, spec.block_size, layer.num_kv_heads, dim)

    for layer in spec.layers:
        k = view(layer, layer.k_bytes, layer.k_dim)
        layers.append((k, view(layer, layer.v_bytes, layer.v_dim)))
    return tuple(layers)


def _run(view: torch.Tensor) -> tuple[int, int, int]:
    size = view.element_size()
    return view.data_ptr(), view.stride(0) * size, view[0].numel() * size


def num_usable_blocks(
    spec: KVSpec, tier: str, memory: int | str | None, num_blocks: int | None
) -> int | None:
    """What the arguments {tier}_memory and num_{tier}_blocks say; None if neither is given."""
    if memory is None:
        return num_blocks
    if num_blocks is not None:
        raise InvalidSpec(f"expected one of {tier}_memory and num_{tier}_blocks, found both")
    found = spec.num_blocks(parse_bytes(memory, f"{tier}_memory"))
    if found < 1:
        raise InvalidSpec(
            f"{tier}_memory is {memory!r}, expected at least {spec.pool_bytes(1)} bytes: one "
            "block, and one for padding"
        )
    return found
