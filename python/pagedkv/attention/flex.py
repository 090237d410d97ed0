"""FlexAttention over the pool itself: the block tables are its block mask.

The pool is one sequence of N * P keys to it, so each layer's blocks have to be side by side: layout
"layer_major". Which token a key is, it has to ask: a block is equally deep in all sequences that
hold it, so one map from block to depth serves all rows, and the row's table says whether the block
is in it. Compiled on a GPU; on a CPU as torch runs it uncompiled, which computes the scores of the
whole pool: for tests, and small pools.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

from pagedkv.attention.groups import equal_counts

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from pagedkv.attention.call import Call
    from pagedkv.cache import KVCache
    from pagedkv.step import Step

__all__ = ["attend", "refusal"]

QUERY_TILE = 128  # queries that share one list of blocks
MOST_VARIANTS = 64  # of the compiled kernel


def refusal(call: Call) -> str | None:
    k, v = call.kv.k(call.layer), call.kv.v(call.layer)
    size = call.kv.spec.block_size
    if call.spec.kind == "latent":
        return "does not attend over latents"
    if not (k.is_contiguous() and v.is_contiguous()):
        return 'needs a layer\'s blocks side by side, as in layout "layer_major"'
    if call.attn_mask is not None:
        return "takes no attn_mask"
    if k.dtype != call.q.dtype:
        return f"needs queries and keys of one dtype: {call.q.dtype}, and stored are {k.dtype}"
    if call.kv.device.type == "cuda" and (size < 16 or size & (size - 1)):
        return f"needs a block_size that is a power of two from 16 on, and it is {size}"
    return None


def attend(call: Call) -> torch.Tensor:
    kv, step = call.kv, call.step
    pools = kv.read(call.layer)
    _clear_tails(pools[1], step, kv.spec.block_size)
    k, v = (t.flatten(0, 1).transpose(0, 1)[None] for t in pools)
    starts, on_gpu = step.plan.query_starts, kv.device.type == "cuda"
    out = call.q.new_empty(*call.q.shape[:2], v.shape[-1])
    for first, last, count in equal_counts(step.plan):
        tokens = slice(int(starts[first]), int(starts[last]))
        q = call.q[tokens].unflatten(0, (last - first, count)).transpose(1, 2)
        found = kernel(on_gpu)(
            q,
            k,
            v,
            score_mod=_score_mod(call.softcap),
            block_mask=_block_mask(call, first, last, count),
            scale=call.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options={"BLOCK_N": min(kv.spec.block_size, 64)} if on_gpu else None,
        )
        out[tokens] = found.transpose(1, 2).flatten(0, 1)
    return out


def _clear_tails(v: torch.Tensor, step: Step, size: int) -> None:
    """Zero what is behind the newest token in each row's last block, which is the row's alone.

    The kernel reads whole blocks and multiplies hidden values by 0, and 0 times NaN is NaN.
    """
    lens = step.seq_lens.long()
    last = step.block_tables.gather(1, ((lens - 1) // size)[:, None])[:, 0]
    seen = torch.arange(size, device=v.device) <= ((lens - 1) % size)[:, None]
    v[last] = torch.where(seen[..., None, None], v[last], 0)


@cache
def kernel(compiled: bool) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if compiled:
        return compile_kernel()

    def uncompiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        v = v.nan_to_num(0, 0, 0)  # the whole pool is read
        with warnings.catch_warnings():  # that it is not compiled
            warnings.simplefilter("ignore")
            return flex_attention(q, k, v, **options)

    return uncompiled


def compile_kernel(**options: Any) -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled with these options of torch.compile(), and never run uncompiled.

    Uncompiled it computes the scores of the whole pool. torch goes on so, with a warning, behind a
    limit of 8 variants: a window or none, a softcap or none, one row or more, one new token or
    more. Here it raises, and the limit is MOST_VARIANTS, where torch lets it be set (from 2.13 on).
    """
    from torch.nn.attention.flex_attention import flex_attention

    if "recompile_limit" in signature(torch.compile).parameters:  # from torch 2.13 on
        options["recompile_limit"] = MOST_VARIANTS
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, fullgraph=True, **options)
    return compiled


def _score_mod(softcap: float | None) -> Callable[..., torch.Tensor] | None:
    if softcap is None:
        return None
    return lambda score, b, h, query, key: softcap * torch.tanh(score / softcap)


def _block_mask(call: Call, first: int, last: int, count: int) -> BlockMask:
    kv, step, window = call.kv, call.step, call.window

    def make() -> BlockMask:
        depths = step.kept("depths", lambda: _depths(kv, step.block_tables))
        tables, lens = step.block_tables[first:last], step.seq_lens[first:last]
        return _make_block_mask(tables, lens - count, count, depths, kv.spec.block_size, window)

    return step.kept(("block mask", first, window), make)


def _depths(kv: KVCache, tables: torch.Tensor) -> torch.Tensor:
    """How many blocks are before each, int64 [N]; undefined for blocks of no row of the step."""
    depths = torch.empty(kv.manager.num_device_blocks + 1, dtype=torch.int64, device=kv.device)
    depths[tables.long()] = torch.arange(tables.shape[1], device=kv.device)
    return depths


def _make_block_mask(
    tables: torch.Tensor,
    begins: torch.Tensor,
    count: int,
    depths: torch.Tensor,
    size: int,
    window: int | None,
) -> BlockMask:
    """For rows of `count` new tokens each, from position begins[b] on, and tables [B, W]."""
    from torch.nn.attention.flex_attention import BlockMask

    num_rows, width = tables.shape

    def sees(b: Any, h: Any, query: Any, key: Any) -> Any:
        block = key // size
        depth = depths[block].clamp(0, width - 1)
        position, at = depth * size + key % size, begins[b] + query
        seen = (tables[b, depth] == block) & (block > 0) & (position <= at)
        return seen if window is None else seen & (position > at - window)

    tiles = torch.arange(0, count, QUERY_TILE, device=tables.device)
    newest = begins[:, None] + (tiles + QUERY_TILE).clamp(max=count)  # past the last key
    oldest = torch.zeros_like(newest)
    if window is not None:
        oldest = (begins[:, None] + tiles - window + 1).clamp(min=0) // size
    num_blocks = (newest + size - 1) // size - oldest  # [B, tiles]
    columns = (oldest[..., None] + torch.arange(width, device=tables.device)).clamp(max=width - 1)
    # The kernel wants lists as wide as the pool, and reads what num_blocks says: so they overlap.
    listed, num_pool_blocks = tables.gather(1, columns.flatten(1)), len(depths)
    memory = tables.new_empty(listed.numel() + num_pool_blocks)
    memory[: listed.numel()].view_as(listed).copy_(listed)
    stride = listed.shape[1]
    lists = memory.as_strided(
        (num_rows, 1, len(tiles), num_pool_blocks), (stride, stride, width, 1)
    )
    return BlockMask.from_kv_blocks(
        num_blocks.int()[:, None],
        lists,
        BLOCK_SIZE=(QUERY_TILE, size),
        mask_mod=sees,
        seq_lengths=(count, num_pool_blocks * size),
        compute_q_blocks=False,
    )
