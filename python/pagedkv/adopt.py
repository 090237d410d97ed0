"""An engine's own tensors as the device tier of a cache.

Each layer's keys and values come as views [N, P, H, D] (N blocks, that for padding among them, of P
tokens), whatever memory is behind them. Copies and swaps move runs of bytes, so what counts is
where a token's bytes are: in one run or several, each of which has to begin where that of the token
before ends. What several tensors have side by side is one run. So there may be

    [2, N, P, H, D]  t[0], t[1]                                   vLLM
    [N, 2, P, H, D]  t[:, 0], t[:, 1]                             FlashInfer, "NHD"
    [N, 2, H, P, D]  t[:, 0].transpose(1, 2), ...                 FlashInfer, "HND"
    [N, P, H, 2, D]  t[..., 0, :], t[..., 1, :]                   keys and values side by side
    [N, P, 576]      t[..., None, :512], t[..., None, 512:]       MLA, to be copied alone

and parts of larger tensors, such as one of all layers, with any stride from block to block. What
may not be is padding between tokens, which could be somebody else's. Writing and gathering need
[P, H, D] of each tensor to be contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pagedkv.errors import InvalidSpec, InvalidState
from pagedkv.layout import DevicePool, region
from pagedkv.spec import KVSpec

__all__ = ["Adopted", "adopt", "require_unmoved"]

Adopted = Sequence[tuple[torch.Tensor, torch.Tensor]]


class _Run(NamedTuple):
    """What every token has in one run of bytes, at address + block and token strides."""

    block_stride: int
    token_stride: int
    address: int
    num_bytes: int
    owner: str


def adopt(spec: KVSpec, tensors: Adopted, device: torch.device) -> DevicePool:
    """The pool that `tensors`, keys and values of each layer, are.

    Raises InvalidSpec, naming the layer, for tensors that are not what `spec` and `device` say,
    that overlap, or whose tokens are no runs as described above.
    """
    layers = _layers(spec, tensors, device)
    named = [
        (f"layer {i}'s {name}", t)
        for i, pair in enumerate(layers)
        for name, t in zip("kv", pair, strict=True)
    ]
    runs = _merged([run for name, t in named for run in _runs(name, t)])
    for run in runs:
        if run.token_stride != run.num_bytes and spec.block_size > 1:
            raise InvalidSpec(
                f"{run.owner} has tokens {run.token_stride} bytes apart (its stride 1) with a run "
                f"of {run.num_bytes} bytes in each: expected one run right behind the other"
            )
    blocks = [r._replace(num_bytes=r.num_bytes * spec.block_size) for r in runs]
    num_blocks = len(named[0][1])
    _refuse_overlap(blocks, num_blocks)
    in_rows = all(_is_in_rows(t) for _, t in named)
    return DevicePool(
        memory=tuple((k, v) for k, v in tensors),
        layers=layers,
        num_blocks=num_blocks,
        regions=tuple(region(t) for _, t in named)
        if in_rows
        else tuple((r.address, r.block_stride, r.num_bytes) for r in runs),
        block_runs=tuple(
            (r.address, r.block_stride, r.num_bytes)
            for r in _merged([b._replace(token_stride=0) for b in blocks])
        ),
        in_rows=in_rows,
    )


def require_unmoved(pool: DevicePool, spec: KVSpec, device: torch.device) -> None:
    """Raises InvalidState if the tensors that were adopted are not where they were: copies are."""
    try:
        now = adopt(spec, pool.memory, device)
    except InvalidSpec as error:
        raise InvalidState(f"the adopted tensors have changed: {error}") from error
    if (now.regions, now.block_runs) != (pool.regions, pool.block_runs):
        raise InvalidState("the adopted tensors have changed: they are in other memory now")


def _layers(
    spec: KVSpec, tensors: Adopted, device: torch.device
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    if not isinstance(tensors, Sequence) or len(tensors) != spec.num_layers:
        found = len(tensors) if isinstance(tensors, Sequence) else type(tensors).__name__
        raise InvalidSpec(
            f"tensors is {found}, expected (k, v) of each of {spec.num_layers} layers"
        )
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    num_blocks: int | None = None
    for i, (pair, layer) in enumerate(zip(tensors, spec.layers, strict=True)):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise InvalidSpec(f"tensors[{i}] is {type(pair).__name__}, expected (k, v)")
        parts = []
        for name, t, dim in zip("kv", pair, (layer.k_dim, layer.v_dim), strict=True):
            block = (spec.block_size, layer.num_kv_heads, dim)
            num_blocks = _checked(f"layer {i}'s {name}", t, num_blocks, device, layer.dtype, block)
            parts.append(t.detach())
        layers.append((parts[0], parts[1]))
    return tuple(layers)


def _checked(
    name: str,
    tensor: Any,
    num_blocks: int | None,
    device: torch.device,
    dtype: str,
    block: tuple[int, int, int],
) -> int:
    """The number of blocks, which is that of the tensors before if there were some."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise InvalidSpec(f"{name} is {type(tensor).__name__}, expected a dense tensor")
    if tensor.device != device:
        raise InvalidSpec(f"{name} is on {tensor.device}, expected {device}, as `device` says")
    if tensor.dtype != getattr(torch, dtype):
        raise InvalidSpec(f"{name} is {tensor.dtype}, expected {dtype}: view(torch.{dtype}) it")
    shape = tuple(tensor.shape)
    if shape[1:] != block or shape[0] < 2 or num_blocks not in (None, shape[0]):
        blocks = "N of 2 or more" if num_blocks is None else str(num_blocks)
        raise InvalidSpec(
            f"{name} is {list(shape)}, expected [{blocks}, {', '.join(map(str, block))}]: blocks, "
            "that for padding among them, tokens, heads, and elements"
        )
    return shape[0]


def _runs(name: str, tensor: torch.Tensor) -> list[_Run]:
    """The runs of bytes that one token has in one tensor, which touch or overlap no more."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    num_bytes, offsets = size, [0]
    for stride, length in sorted(zip(strides[2:], tensor.shape[2:], strict=True)):
        if length == 1:
            continue
        if stride == num_bytes and len(offsets) == 1:
            num_bytes *= length
        else:
            offsets = [o + i * stride for o in offsets for i in range(length)]
    at = tensor.data_ptr()
    return [_Run(strides[0], strides[1], at + o, num_bytes, name) for o in offsets]


def _merged(runs: list[_Run]) -> list[_Run]:
    """The same bytes in as few runs as they are."""
    merged: list[_Run] = []
    for run in sorted(runs):
        if merged and run[:2] == merged[-1][:2]:
            before = merged[-1]
            if before.address + before.num_bytes == run.address:
                merged[-1] = before._replace(num_bytes=before.num_bytes + run.num_bytes)
                continue
        merged.append(run)
    return merged


def _refuse_overlap(blocks: list[_Run], num_blocks: int) -> None:
    """No byte belongs to two blocks, or to two runs (of whole blocks) of one."""
    group: list[_Run] = []  # runs whose blocks lie among each other's
    end = 0
    for run in sorted(blocks, key=lambda r: r.address):
        if run.block_stride < run.num_bytes:
            raise InvalidSpec(
                f"{run.owner} has blocks {run.block_stride} bytes apart (its stride 0), of "
                f"{run.num_bytes} bytes each: expected blocks that do not overlap"
            )
        if group and run.address >= end:
            _refuse_overlap_of_one_stride(group)
            group = []
        if group and run.block_stride != group[0].block_stride:
            raise InvalidSpec(
                f"{run.owner} lies among the blocks of {group[0].owner}, which are "
                f"{group[0].block_stride} bytes apart (its stride 0) and not {run.block_stride}"
            )
        group.append(run)
        end = max(end, run.address + (num_blocks - 1) * run.block_stride + run.num_bytes)
    _refuse_overlap_of_one_stride(group)


def _refuse_overlap_of_one_stride(group: list[_Run]) -> None:
    """Each run has the same place in every stride, counted from the first run on."""
    first, stride = group[0].address, group[0].block_stride
    places = sorted(((run.address - first) % stride, run) for run in group)
    for (at, run), (after, other) in zip(places, [*places[1:], (stride, group[0])], strict=True):
        if at + run.num_bytes > after:
            raise InvalidSpec(f"{run.owner} and {other.owner} overlap in memory")


def _is_in_rows(tensor: torch.Tensor) -> bool:
    """Whether a block is contiguous [P, H, D]."""
    _, num_tokens, heads, dim = tensor.shape
    expected = (heads * dim, num_tokens), (dim, heads), (1, dim)
    found = zip(tensor.stride()[1:], expected, strict=True)
    return all(stride == right or length == 1 for stride, (right, length) in found)
