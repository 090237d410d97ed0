"""A few blocks at a time: the CPU's way for long sequences, which never has a whole one gathered.

Each run of blocks is gathered into memory that stays in the processor's cache and is read from
there: so K and V come from main memory once, where a whole gather reads, writes and reads them
again. What several runs give is joined by the log-sum-exp of each, as in Dao, "FlashAttention"
(2022). Rows that begin with the same blocks read those once for all, as in "gather".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from pagedkv.attention.call import equal_counts

if TYPE_CHECKING:
    from pagedkv.attention.call import Call
    from pagedkv.cache import KVCache
    from pagedkv.step import Step

__all__ = ["attend", "is_faster", "refusal"]

RUN_BYTES = 4 << 20  # of K and V at a time: more than calls cost, less than processors cache
QUERY_TILE = 256  # new tokens at a time, so that scores stay small, too

# Output [H, G, n, v_dim] in float32 and the log-sum-exp of its scores [H, G, n].
Part = tuple[torch.Tensor, torch.Tensor]


def refusal(kv: KVCache, call: Call) -> str | None:
    if kv.device.type != "cpu":
        return f"is for a CPU, and this cache is on {kv.device}"
    return None if call.attn_mask is None else "takes no attn_mask"


def is_faster(kv: KVCache, call: Call, step: Step) -> bool:
    """Than gathering all: from two runs of blocks on it was, or was as fast."""
    layer, lens = kv.spec.layers[call.layer], step.plan.seq_lens
    return len(lens) > 0 and int(lens.max()) * (layer.k_bytes + layer.v_bytes) > 2 * RUN_BYTES


def attend(kv: KVCache, call: Call, step: Step) -> torch.Tensor:
    layer, starts = kv.spec.layers[call.layer], step.plan.query_starts
    heads = layer.num_kv_heads
    q = call.q.unflatten(1, (heads, -1))  # [T, H, G, k_dim]
    out = call.q.new_empty(*q.shape[:3], layer.v_dim)
    if step.plan.num_tokens == step.plan.batch_size:
        runs = [(first, last, shared, 1) for first, last, shared in step.shared_runs]
    else:
        runs = [(first, last, 0, count) for first, last, count in equal_counts(step.plan)]
    for first, last, shared, count in runs:
        if shared and call.window is None:
            out[first:last] = _beams(kv, call, step, q[first:last], first, shared)
            continue
        for row in range(first, last):
            begin = int(starts[row])
            for tile in range(begin, begin + count, QUERY_TILE):
                end = min(tile + QUERY_TILE, begin + count)
                at = int(step.plan.seq_lens[row]) - count + tile - begin
                found, _ = _row(kv, call, step, q[tile:end].permute(1, 2, 0, 3), row, at)
                out[tile:end] = found.permute(2, 0, 1, 3)
    return out.flatten(1, 2)


def _row(
    kv: KVCache, call: Call, step: Step, q: torch.Tensor, row: int, at: int, first: int = 0
) -> Part:
    """Queries [H, G, n, k_dim] of one row, whose tokens are at `at` on, to keys from `first` on."""
    num, end = q.shape[2], at + q.shape[2]
    window = end if call.window is None else call.window
    first = max(first, at - window + 1)
    part: Part | None = None
    # The newest keys first: each query sees one of them, itself, so that no sum is ever empty.
    for start, stop, k, v in _keys(kv, call, step, row, first, at if num > 1 else end, end):
        mask = None
        is_causal = num > 1 and start == at
        if start < end - window or (is_causal and not _is_fused(kv, call)):
            keys, positions = torch.arange(start, stop), torch.arange(at, end)[:, None]
            mask = (keys <= positions) & (keys > positions - window)
        new = _attend(kv, call, q, k, v, mask, is_causal)
        part = new if part is None else _join(part, new)
    assert part is not None
    return part


def _beams(
    kv: KVCache, call: Call, step: Step, q: torch.Tensor, first: int, shared: int
) -> torch.Tensor:
    """Rows [n, H, G, k_dim] with one new token each, from `first` on, that share blocks."""
    begin = shared * kv.spec.block_size
    tails = [
        _row(kv, call, step, q[i].unsqueeze(2), first + i, int(length) - 1, begin)
        for i, length in enumerate(step.plan.seq_lens[first : first + len(q)])
    ]
    part: Part = torch.cat([t[0] for t in tails], 2), torch.cat([t[1] for t in tails], 2)
    together = q.permute(1, 2, 0, 3)  # [H, G, n, k_dim]
    for _, _, k, v in _keys(kv, call, step, first, 0, begin, begin):
        part = _join(part, _attend(kv, call, together, k, v))
    return part[0].permute(2, 0, 1, 3)


def _keys(
    kv: KVCache, call: Call, step: Step, row: int, first: int, at: int, end: int
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Runs of a row's keys and values: [at, end), then those of [first, at): (start, stop, k, v).

    k and v are [H, 1, stop - start, dim], in memory that the next run overwrites.
    """
    layer, size = kv.spec.layers[call.layer], kv.spec.block_size
    step_tokens = max(1, RUN_BYTES // (layer.k_bytes + layer.v_bytes) // size) * size
    table = step.block_tables[row : row + 1]
    bounds = [(at, end)] if end > at else []
    bounds += [
        (max(start, first), min(start + step_tokens, at))
        for start in range(first // size * size, at, step_tokens)
    ]
    for start, stop in bounds:
        block = start // size
        width = stop - block * size
        num_tokens = torch.tensor([width], dtype=torch.int32)
        gathered = kv.gather_blocks(call.layer, table, block, num_tokens, width)
        k, v = (t[0, :, None, start - block * size :].to(call.q.dtype) for t in gathered)
        yield start, stop, k, v


def _is_fused(kv: KVCache, call: Call) -> bool:
    """Whether torch has this in one kernel that gives the log-sum-exp, too."""
    layer = kv.spec.layers[call.layer]
    return call.softcap is None and layer.k_dim == layer.v_dim


def _attend(
    kv: KVCache,
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> Part:
    """Queries [H, G, n, D] to keys [H, 1, S, D] and values [H, 1, S, Dv].

    `mask` [n, S] says all; without one a key is seen by all, or, if it is causal, by those behind.
    """
    heads, group, num, dim = q.shape
    if mask is None and _is_fused(kv, call):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if not is_causal:  # the group's queries are rows of one product
            q, k, v = q.reshape(1, heads, group * num, dim), k.transpose(0, 1), v.transpose(0, 1)
        else:
            k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
        out, sums = flash(q, k, v, 0.0, is_causal, scale=call.scale)
        return out.float().reshape(heads, group, num, dim), sums.reshape(heads, group, num)
    scores = (q.reshape(heads, group * num, dim) @ k[:, 0].transpose(-1, -2)).float() * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.unflatten(1, (group, num))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    sums = scores.logsumexp(-1)
    weights = torch.exp(scores - sums[..., None].nan_to_num(neginf=0.0)).to(v.dtype)
    return (weights.flatten(1, 2) @ v[:, 0]).float().unflatten(1, (group, num)), sums


def _join(one: Part, other: Part) -> Part:
    """What both give together; `one` has seen a key."""
    sums = torch.logaddexp(one[1], other[1])
    weight = torch.exp(other[1] - sums)[..., None]
    return torch.lerp(one[0], other[0], weight), sums
