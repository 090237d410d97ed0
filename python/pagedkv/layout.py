"""The tensors of a KVCache: one allocation, and each layer's keys and values as views of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from pagedkv.errors import InvalidSpec
from pagedkv.spec import KVSpec, LayerSpec

__all__ = ["DevicePool", "Layout"]

Layout = Literal["block_major", "layer_major"]
_Part = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class DevicePool:
    """The device tier of a cache.

    Attributes:
        memory: all of it, uint8 [num_blocks * block_bytes].
        layers: per layer, keys and values as views [num_blocks, block_size, heads, dim].
        block_runs: the contiguous runs that a block consists of, as (address in block 0, distance
            between blocks, bytes): what a transfer copies.
    """

    memory: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    block_runs: tuple[tuple[int, int, int], ...]

    @property
    def regions(self) -> list[tuple[int, int, int]]:
        """Per layer its keys' and its values' part of every block, which steps read and write.

        As (address in block 0, distance between blocks, bytes of a token).
        """
        return [
            (t.data_ptr(), t.stride(0) * t.element_size(), t.stride(1) * t.element_size())
            for layer in self.layers
            for t in layer
        ]

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
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        except (RuntimeError, MemoryError) as error:
            raise InvalidSpec(
                f"the pool of {num_bytes} bytes does not fit in the memory of {device}"
            ) from error
        if layout == "block_major":
            rows = memory.view(num_blocks, spec.block_bytes)
            layers = _views(spec, lambda offset, size: rows[:, offset : offset + size])
            return cls(memory, layers, ((memory.data_ptr(), spec.block_bytes, spec.block_bytes),))
        layers = _views(
            spec,
            lambda offset, size: memory[offset * num_blocks :][: size * num_blocks].view(-1, size),
        )
        return cls(memory, layers, tuple(_run(t) for layer in layers for t in layer))


def _views(spec: KVSpec, part: _Part) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Keys and values of each layer, from the part of every block that `part(offset, size)` is."""
    layers, offset = [], 0

    def view(layer: LayerSpec, token_bytes: int, dim: int) -> torch.Tensor:
        nonlocal offset
        size = spec.block_size * token_bytes
        typed = part(offset, size).view(getattr(torch, layer.dtype))
        offset += size
        shape = (spec.block_size, layer.num_kv_heads, dim)
        found: torch.Tensor = typed.unflatten(1, shape)
        return found

    for layer in spec.layers:
        k = view(layer, layer.k_bytes, layer.k_dim)
        layers.append((k, view(layer, layer.v_bytes, layer.v_dim)))
    return tuple(layers)


def _run(view: torch.Tensor) -> tuple[int, int, int]:
    size = view.element_size()
    return view.data_ptr(), view.stride(0) * size, view[0].numel() * size
