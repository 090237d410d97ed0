"""A few blocks at a time: the CPU's way, which never has a whole sequence gathered.

Rows of one new token go through the extension's own kernel, where it has one for what is stored.

For others each run of blocks is gathered into memory that stays in the processor's cache and is
read from there: so K and V come from main memory once, where a whole gather reads, writes and reads
them again. What several runs give is joined by the log-sum-exp of each, as in Dao, "FlashAttention"
(2022). Rows that begin with the same many blocks read those once for all, as in "gather".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from pagedkv.attention.call import keys_and_values, widened
from pagedkv.attention.decode import decode, decode_with_sums, takes
from pagedkv.attention.groups import equal_counts, shared_runs

if TYPE_CHECKING:
    from pagedkv.attention.call import Call
    from pagedkv.step import Step

__all__ = ["attend", "is_faster", "refusal"]

RUN_BYTES = 4 << 20  # of K and V at a time: more than calls cost, less than processors cache
SHARED_BYTES = 1 << 20  # of K and V: so many are read once for all rows that share them
QUERY_TILE = 256  # new tokens at a time, so that scores stay small, too

# Output [H, G, n, output_dim] in float32 and the log-sum-exp of its scores [H, G, n].
Part = tuple[torch.Tensor, torch.Tensor]


def refusal(call: Call) -> str | None:
    if call.kv.device.type != "cpu":
        return f"is for a CPU, and this cache is on {call.kv.device}"
    if call.attn_mask is not None and call.firsts is None:
        return "takes no attn_mask but one that hides beginnings of rows of one new token"
    return None


def is_faster(call: Call) -> bool:
    """Than gathering all, where it can: it was with the kernel, and from two runs of blocks on."""
    if refusal(call) is not None:
        return False
    step = call.step
    if takes(call) and step.kept("one new token", lambda: _has_one_new_token(step)):
        return True
    lens = step.plan.seq_lens
    return len(lens) > 0 and int(lens.max()) * call.spec.token_bytes > 2 * RUN_BYTES


def _has_one_new_token(step: Step) -> bool:
    return any(count == 1 for _, _, count in equal_counts(step.plan))


def attend(call: Call) -> torch.Tensor:
    parts: list[torch.Tensor] = []  # [some tokens, Hq, output_dim], one behind the other
    has_kernel = takes(call)
    for first, last, shared, count in _runs(call):
        begin = _begin(call, first, last) if shared and call.window is None else sys.maxsize
        if begin < shared * call.kv.spec.block_size:
            parts.append(_beams(call, first, last, shared, begin))
        elif count == 1 and has_kernel:
            parts.append(decode(call, first, last))
        else:
            parts += _rows(call, first, last, count)
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out if out.dtype is call.q.dtype else out.to(call.q.dtype)


def _begin(call: Call, first: int, last: int) -> int:
    """The first token that rows [first, last) see, if it is one for all; else past any."""
    if call.firsts is None:
        return 0
    begin = int(call.firsts[first])
    return begin if bool((call.firsts[first:last] == begin).all()) else sys.maxsize


def _runs(call: Call) -> list[tuple[int, int, int, int]]:
    """Rows that go together: (first, past the last, shared blocks, new tokens of each).

    Of shared blocks only so many count that reading them once is worth more than one call is.
    """
    many = SHARED_BYTES // (call.spec.token_bytes * call.kv.spec.block_size)
    return call.step.kept(("runs", many), lambda: _make_runs(call.step, many))


def _make_runs(step: Step, many: int) -> list[tuple[int, int, int, int]]:
    runs: list[tuple[int, int, int, int]] = []
    for begin, end, count in equal_counts(step.plan):
        if count > 1:
            runs.append((begin, end, 0, count))
            continue
        first = begin
        for low, high, shared in shared_runs(step):
            if shared > many and begin <= low and high <= end:
                if first < low:
                    runs.append((first, low, 0, 1))
                runs.append((low, high, shared, 1))
                first = high
        if first < end:
            runs.append((first, end, 0, 1))
    return runs


def _rows(call: Call, first: int, last: int, count: int) -> Iterator[torch.Tensor]:
    """Rows [first, last) of `count` new tokens each, one row and one tile of queries at a time."""
    plan, heads = call.step.plan, call.spec.num_kv_heads
    for row in range(first, last):
        begin, length = int(plan.query_starts[row]), int(plan.seq_lens[row])
        for tile in range(0, count, QUERY_TILE):
            q = call.q[begin + tile : begin + min(tile + QUERY_TILE, count)]
            q = q.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
            seen = 0 if call.firsts is None else int(call.firsts[row])
            found, _ = _row(call, q, row, length - count + tile, seen)
            yield found.permute(2, 0, 1, 3).flatten(1, 2)


def _row(call: Call, q: torch.Tensor, row: int, at: int, first: int) -> Part:
    """Queries [H, G, n, query_dim] of one row, tokens from `at` on, to keys from `first` on."""
    num, end = q.shape[2], at + q.shape[2]
    window = end if call.window is None else call.window
    first = max(first, at - window + 1)
    part: Part | None = None
    # The newest keys first: each query sees one of them, itself, so that no sum is ever empty.
    for start, stop, k, v in _keys(call, row, first, at if num > 1 else end, end):
        mask = None
        is_causal = num > 1 and start == at
        if start < end - window or (is_causal and not _is_fused(call)):
            keys = torch.arange(start, stop, device=q.device)
            positions = torch.arange(at, end, device=q.device)[:, None]
            mask = (keys <= positions) & (keys > positions - window)
        new = _attend(call, q, k, v, mask, is_causal)
        part = new if part is None else _join(part, new)
    assert part is not None
    return part


def _beams(call: Call, first: int, last: int, shared: int, begin: int) -> torch.Tensor:
    """Rows [first, last) of one new token each that share blocks, and see tokens from `begin` on.

    What they share is read once for all of them.
    """
    plan, heads = call.step.plan, call.spec.num_kv_heads
    end, at = shared * call.kv.spec.block_size, int(plan.query_starts[first])
    q = call.q[at : at + last - first].unflatten(1, (heads, -1))
    part: Part
    if takes(call):
        found, sums = decode_with_sums(call, first, last, end)
        part = (
            found.unflatten(1, (heads, -1)).permute(1, 2, 0, 3),
            sums.unflatten(1, (heads, -1)).permute(1, 2, 0),
        )
    else:
        tails = [
            _row(call, q[i].unsqueeze(2), first + i, int(length) - 1, end)
            for i, length in enumerate(plan.seq_lens[first:last])
        ]
        part = torch.cat([t[0] for t in tails], 2), torch.cat([t[1] for t in tails], 2)
    together = q.permute(1, 2, 0, 3)  # [H, G, n, query_dim]
    for _, _, k, v in _keys(call, first, begin, end, end):
        part = _join(part, _attend(call, together, k, v))
    return part[0].permute(2, 0, 1, 3).flatten(1, 2)


def _keys(
    call: Call, row: int, first: int, at: int, end: int
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Runs of a row's keys and values: [at, end), then those of [first, at): (start, stop, k, v).

    k and v are [H, 1, stop - start, dim], in memory that the next run overwrites.
    """
    kv, size = call.kv, call.kv.spec.block_size
    run_tokens = max(1, RUN_BYTES // call.spec.token_bytes // size) * size
    table = call.step.block_tables[row : row + 1]
    bounds = [(at, end)] if end > at else []
    bounds += [
        (max(start, first), min(start + run_tokens, at))
        for start in range(first // size * size, at, run_tokens)
    ]
    for start, stop in bounds:
        block = start // size
        width = stop - block * size
        num_tokens = torch.tensor([width], dtype=torch.int32, device=kv.device)
        kept = kv.gather_blocks(call.layer, table, block, num_tokens, width)
        k, v = (
            t[0, :, None, start - block * size :].to(call.q.dtype)
            for t in keys_and_values(call.spec, kept)
        )
        yield start, stop, k, v


def _is_fused(call: Call) -> bool:
    """Whether torch has this in one kernel that gives the log-sum-exp, too.

    That kernel hides later keys by -inf before it multiplies by the scale: so for scale > 0 only.
    """
    layer = call.spec
    of_one_size = layer.k_dim == layer.v_dim or layer.kind == "latent"  # see keys_and_values
    return call.softcap is None and of_one_size and call.scale > 0


def _attend(
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
    if mask is None and _is_fused(call):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if not is_causal:  # the group's queries are rows of one product
            q, k, v = q.reshape(1, heads, group * num, dim), k.transpose(0, 1), v.transpose(0, 1)
        else:
            k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
        out, sums = flash(q, k, v, 0.0, is_causal, scale=call.scale)
        sums = sums.float().reshape(heads, group, num)
        return out.float().reshape(heads, group, num, dim)[..., : call.spec.output_dim], sums
    q, k, v = widened(q, k, v)
    scores = (q.reshape(heads, group * num, dim) @ k[:, 0].transpose(-1, -2)).float() * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.unflatten(1, (group, num))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    sums = scores.logsumexp(-1)
    weights = torch.exp(scores - sums[..., None].nan_to_num(neginf=0.0)).to(v.dtype)
    found = (weights.flatten(1, 2) @ v[:, 0]).float().unflatten(1, (group, num))
    return found[..., : call.spec.output_dim], sums


def _join(one: Part, other: Part) -> Part:
    """What both give together; `one` has seen a key."""
    sums = torch.logaddexp(one[1], other[1])
    weight = torch.exp(other[1] - sums)[..., None]
    return torch.lerp(one[0], other[0], weight), sums
