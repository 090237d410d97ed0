"""Gather, then torch's own kernels: everywhere, for everything.

Rows of a batch that begin with the same blocks (beams, samples) read them once for all: their
queries attend to the shared run together, each row to its own tail apart, and one softmax runs
over both. The idea is that of Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared
Prefixes" (2024), with the scores joined before the softmax instead of the outputs after it. Other
rows of one new token go together if their lengths are near each other; see `groups`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from pagedkv.attention.call import keys_and_values, widened
from pagedkv.attention.groups import groups

if TYPE_CHECKING:
    from pagedkv.attention.call import Call
    from pagedkv.step import Step

__all__ = ["attend", "refusal"]


def refusal(call: Call) -> str | None:
    return None


def attend(call: Call) -> torch.Tensor:
    kv, step, q, attn_mask = call.kv, call.step, call.q, call.attn_mask
    plan, softcap, window = step.plan, call.softcap, call.window
    out = q.new_empty(q.shape[0], q.shape[1], call.spec.output_dim)
    starts, lens = plan.query_starts, plan.seq_lens
    tables, lens_there = step.block_tables, step.seq_lens
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    for first, last, shared in groups(step, kv.spec.block_size):
        rows = slice(int(starts[first]), int(starts[last]))
        width, mask = int(lens[first:last].max()), None
        is_causal = attn_mask is None and softcap is None and _is_new(step, first, last, window)
        if attn_mask is not None:
            part = attn_mask[first:last] if attn_mask.shape[0] > 1 else attn_mask
            mask = part[..., :width]
            if lens[first:last].min() < width:
                mask = _within(mask, lens_there[first:last], width)
        elif not is_causal:
            mask = _mask_of_step(step, first, last, window)
        queries = q[rows].unflatten(0, (last - first, -1)).transpose(1, 2)
        if shared:
            found = _shared(call, queries, first, last, shared, mask)
        else:
            rows_lens = lens_there[first:last]
            kept = kv.gather_blocks(call.layer, tables[first:last], 0, rows_lens, width)
            k, v = keys_and_values(call.spec, kept)
            found = dense(queries, k, v, call.scale, softcap, mask, is_causal)
        out[rows] = found[..., : call.spec.output_dim].transpose(1, 2).flatten(0, 1)
    return out


def _within(mask: torch.Tensor, lens: torch.Tensor, longest: int) -> torch.Tensor:
    """A mask of the caller's, who need not know that shorter rows are read beside longer ones."""
    behind = (torch.arange(longest, device=mask.device) >= lens[:, None])[:, None, None]
    return mask & ~behind if mask.dtype == torch.bool else mask.masked_fill(behind, -torch.inf)


def _is_new(step: Step, first: int, last: int, window: int | None) -> bool:
    """Whether all of one row is new, and seen: kernels know that mask, and skip half the work."""
    length = int(step.plan.seq_lens[first])
    num_new = int(step.plan.query_starts[first + 1] - step.plan.query_starts[first])
    is_seen = window is None or window >= length
    return last - first == 1 and 1 < length == num_new and is_seen


def _mask_of_step(step: Step, first: int, last: int, window: int | None) -> torch.Tensor | None:
    """The causal mask of these rows, which is the same for all layers with this window."""
    plan = step.plan
    starts, lens, lens_there = (
        plan.query_starts,
        plan.seq_lens[first:last],
        step.seq_lens[first:last],
    )
    num_new = int(starts[first + 1] - starts[first])
    return step.kept(
        ("causal mask", first, last, window),
        lambda: _causal_mask(lens, lens_there, num_new, window),
    )


def _causal_mask(
    lens: np.ndarray[tuple[int], np.dtype[np.int32]],
    lens_there: torch.Tensor,
    num_new: int,
    window: int | None,
) -> torch.Tensor | None:
    """Which of the last `num_new` queries of each row see which keys, bool [B, 1, num_new, max].

    `lens_there` are the lengths on the device, where the mask is made, so that nobody waits.
    """
    longest, device = int(lens.max()), lens_there.device
    if num_new == 1 and int(lens.min()) == longest and (window is None or window >= longest):
        return None
    keys = torch.arange(longest, device=device)
    at = lens_there.long()[:, None] - num_new + torch.arange(num_new, device=device)
    visible = keys <= at[..., None]
    if window is not None:
        visible &= keys > at[..., None] - window
    return visible[:, None]


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    is_causal: bool = False,
) -> torch.Tensor:
    """q [B, Hq, n, D], k and v [B, H, S, D] -> [B, Hq, n, Dv]. `is_causal` is a mask, of n == S."""
    found: torch.Tensor
    if k.dtype != q.dtype:
        k, v = k.to(q.dtype), v.to(q.dtype)
    if softcap is None and q.shape[2] == 1 and (mask is None or mask.shape[1] == 1):
        # A group's queries as rows of one product: else torch copies K and V for each of them.
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        found = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
        return found.reshape(q.shape[0], q.shape[1], 1, -1)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    dtype, group = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = widened(q, k, v)
    scores = q.unflatten(1, (-1, group)).flatten(2, 3) @ k.transpose(-1, -2)
    weights = _weights(scores.unflatten(2, (group, -1)).flatten(1, 2), scale, softcap, mask)
    found = weights.unflatten(1, (-1, group)).flatten(2, 3) @ v
    return found.reshape(q.shape[0], q.shape[1], q.shape[2], -1).to(dtype)


def _weights(
    scores: torch.Tensor, scale: float, softcap: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    dtype = scores.dtype
    scores = scores.float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask
    return torch.softmax(scores, -1).to(dtype)


def _shared(
    call: Call, q: torch.Tensor, first: int, last: int, shared: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """One query each for rows whose first `shared` blocks are the same: q [n, Hq, 1, D]."""
    kv, step, num_shared = call.kv, call.step, shared * call.kv.spec.block_size
    tables, lens = step.block_tables[first:last], step.seq_lens[first:last]
    run, tails = step.kept(  # on the device, where nobody waits for them
        ("lengths of a shared run", first, last),
        lambda: (lens.new_full((1,), num_shared), lens - num_shared),
    )
    width = int(step.plan.seq_lens[first:last].max()) - num_shared
    kept_run = kv.gather_blocks(call.layer, tables[:1], 0, run, num_shared, part=0)
    kept_tail = kv.gather_blocks(call.layer, tables, shared, tails, width, part=1)
    (k_run, v_run), (k_tail, v_tail) = (
        keys_and_values(call.spec, t) for t in (kept_run, kept_tail)
    )
    if k_run.dtype != q.dtype:
        k_run, v_run, k_tail, v_tail = (t.to(q.dtype) for t in (k_run, v_run, k_tail, v_tail))
    q, k_run, v_run, k_tail, v_tail = widened(q, k_run, v_run, k_tail, v_tail)
    n, num_heads = q.shape[0], k_run.shape[1]
    grouped = q.reshape(n, num_heads, -1, q.shape[-1])  # [n, H, G, D]
    together = grouped.transpose(0, 1).flatten(1, 2)  # [H, n * G, D]
    scores = torch.cat(
        (
            (together @ k_run[0].transpose(-1, -2)).unflatten(1, (n, -1)).transpose(0, 1),
            grouped @ k_tail.transpose(-1, -2),
        ),
        dim=-1,
    )  # [n, H, G, S]
    if mask is not None and mask.shape[1] > 1:
        mask = mask.unflatten(1, (num_heads, -1)).squeeze(3)
    weights = _weights(scores, call.scale, call.softcap, mask)
    run_weights = weights[..., :num_shared].transpose(0, 1).flatten(1, 2)  # [H, n * G, S]
    found: torch.Tensor = (run_weights @ v_run[0]).unflatten(1, (n, -1)).transpose(0, 1)
    found = found + weights[..., num_shared:] @ v_tail
    return found.reshape(n, q.shape[1], 1, -1)
