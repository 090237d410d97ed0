"""Attention over paged K and V: gather, then torch's own kernels.

Rows of a batch that begin with the same blocks (beams, samples) read them once for all: their
queries attend to the shared run together, each row to its own tail apart, and one softmax runs
over both. The idea is that of Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared
Prefixes" (2024), with the scores joined before the softmax instead of the outputs after it. Other
rows of one new token go together if their lengths are near each other; see `Step.groups`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from pagedkv.errors import InvalidSpec

if TYPE_CHECKING:
    from pagedkv.cache import KVCache
    from pagedkv.step import Step

__all__ = ["attend"]


def attend(
    kv: KVCache,
    layer: int,
    q: torch.Tensor,
    step: Step,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each new token to its sequence up to itself.

    Args:
        q: queries [T, Hq, k_dim], Hq a multiple of the layer's KV heads.
        scale: of the scores, by default k_dim ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap).
        window: a token sees itself and the window - 1 tokens before it.
        attn_mask: bool (True: visible) or additive float, broadcastable to
            [B, Hq, query length, max(seq_lens)], in place of the causal rule; every row of the
            step must then have the same number of new tokens.

    Returns [T, Hq, v_dim] in q's dtype.

    Raises:
        InvalidSpec: q has another shape than [T, Hq, k_dim].
    """
    plan, spec = step.plan, kv.spec.layers[layer]
    if q.dim() != 3 or q.shape[0] != plan.num_tokens or q.shape[2] != spec.k_dim:
        raise InvalidSpec(
            f"q is {list(q.shape)}, expected [{plan.num_tokens}, query heads, {spec.k_dim}]"
        )
    if q.shape[1] % spec.num_kv_heads:
        raise InvalidSpec(
            f"q has {q.shape[1]} heads, expected a multiple of {spec.num_kv_heads} KV heads"
        )
    scale = spec.k_dim**-0.5 if scale is None else scale
    k_scale, v_scale = kv.scales[layer]
    if k_scale != 1:
        q = q * k_scale  # first: what is stored may be so large that products with it overflow
    out = q.new_empty(q.shape[0], q.shape[1], spec.v_dim)
    starts, lens = plan.query_starts, plan.seq_lens
    tables, lens_there = step.block_tables, step.seq_lens
    for first, last, shared in step.groups:
        rows = slice(int(starts[first]), int(starts[last]))
        mask = None
        if attn_mask is not None:
            part = attn_mask[first:last] if attn_mask.shape[0] > 1 else attn_mask
            mask = part[..., : int(lens[first:last].max())]
        else:
            mask = _mask_of_step(step, first, last, window)
        queries = q[rows].unflatten(0, (last - first, -1)).transpose(1, 2)
        if shared:
            found = _shared(kv, layer, queries, step, first, last, shared, scale, softcap, mask)
        else:
            width = int(lens[first:last].max())
            k, v = kv.gather_blocks(layer, tables[first:last], 0, lens_there[first:last], width)
            found = _dense(queries, k, v, scale, softcap, mask)
        out[rows] = found.transpose(1, 2).flatten(0, 1)
    return out if v_scale == 1 else out.mul_(v_scale)


def _mask_of_step(step: Step, first: int, last: int, window: int | None) -> torch.Tensor | None:
    """The causal mask of rows first to last, made once for all layers."""
    key = first, last, window
    if key not in step.masks:
        starts, rows = step.plan.query_starts, slice(first, last)
        num_new = int(starts[first + 1] - starts[first])
        lens, lens_there = step.plan.seq_lens[rows], step.seq_lens[rows]
        step.masks[key] = _causal_mask(lens, lens_there, num_new, window)
    return step.masks[key]


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


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """q [B, Hq, n, D], k and v [B, H, S, D] -> [B, Hq, n, Dv]."""
    if k.dtype != q.dtype:
        k, v = k.to(q.dtype), v.to(q.dtype)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    group = q.shape[1] // k.shape[1]
    scores = q.unflatten(1, (-1, group)).flatten(2, 3) @ k.transpose(-1, -2)
    weights = _weights(scores.unflatten(2, (group, -1)).flatten(1, 2), scale, softcap, mask)
    found: torch.Tensor = weights.unflatten(1, (-1, group)).flatten(2, 3) @ v
    return found.reshape(q.shape[0], q.shape[1], q.shape[2], -1)


def _weights(
    scores: torch.Tensor, scale: float, softcap: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    dtype = scores.dtype
    scores = scores.float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        visible = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if visible else scores + mask
    return torch.softmax(scores, -1).to(dtype)


def _shared(
    kv: KVCache,
    layer: int,
    q: torch.Tensor,
    step: Step,
    first: int,
    last: int,
    shared: int,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """One query each for rows whose first `shared` blocks are the same: q [n, Hq, 1, D]."""
    num_shared = shared * kv.spec.block_size
    tables, longest = step.block_tables[first:last], int(step.plan.seq_lens[first:last].max())
    run, tails = step.shared_lens(first, last, num_shared)
    k_run, v_run = kv.gather_blocks(layer, tables[:1], 0, run, num_shared, part=0)
    k_tail, v_tail = kv.gather_blocks(layer, tables, shared, tails, longest - num_shared, part=1)
    if k_run.dtype != q.dtype:
        k_run, v_run, k_tail, v_tail = (t.to(q.dtype) for t in (k_run, v_run, k_tail, v_tail))
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
    weights = _weights(scores, scale, softcap, mask)
    run_weights = weights[..., :num_shared].transpose(0, 1).flatten(1, 2)  # [H, n * G, S]
    found: torch.Tensor = (run_weights @ v_run[0]).unflatten(1, (n, -1)).transpose(0, 1)
    found = found + weights[..., num_shared:] @ v_tail
    return found.reshape(n, q.shape[1], 1, -1)
