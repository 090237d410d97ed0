"""Attention over paged K and V, by whichever kernels are there.

A backend is a module with two functions, `refusal` and `attend`: see `pagedkv.attention.call`. Each
reads the tables that it wants of the step, which are where the tensors are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedkv.attention import blockwise, flash_attn, flashinfer, flex, gather, varlen
from pagedkv.attention.call import Backend, Call, check_chunk, scale_of
from pagedkv.checks import address
from pagedkv.errors import InvalidSpec

if TYPE_CHECKING:
    from pagedkv.cache import KVCache
    from pagedkv.spec import LayerSpec
    from pagedkv.step import Step

__all__ = ["BACKENDS", "attend"]

BACKENDS: dict[str, Backend] = {
    "gather": gather,
    "blockwise": blockwise,
    "flex": flex,
    "varlen": varlen,
    "flashinfer": flashinfer,
    "flash_attn": flash_attn,
}


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
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention of each new token to its sequence up to itself.

    Args:
        q: queries [T, Hq, k_dim] on the cache's device, Hq a multiple of the layer's KV heads. To a
            latent layer [T, Hq, k_dim + v_dim], the first k_dim through the matrix that makes keys
            of its vector: so the vector is keys and values of all heads, and is read as it is.
        scale: of the scores, by default k_dim ** -0.5; to a latent layer it has to be given, such
            as self_attn.scaling in transformers.
        softcap: scores become softcap * tanh(scores / softcap).
        window: a token sees itself and the window - 1 tokens before it; by default the layer's own.
        attn_mask: bool (True: visible) or additive float, broadcastable to
            [B, Hq, query length, max(seq_lens)], in place of the causal rule; every row of the
            step must then have the same number of new tokens. "gather" takes any, "blockwise" one
            that hides no more than the beginnings of rows of one new token, as padding does.
        backend: one of BACKENDS, or "auto", the first that can of: on a GPU "flash_attn",
            "flashinfer", "varlen", "gather"; on a CPU "blockwise" where rows have one new token
            in float32 or bfloat16, heads of a multiple of 8 and less than 32 query heads to one
            of keys, and for long sequences, else "gather".

    Returns [T, Hq, v_dim] in q's dtype; of a latent layer [T, Hq, k_dim], sums of its vectors.

    Raises:
        InvalidSpec: q is not floats of that shape, or asks for a gradient, an option is out of
            range or missing, rows reach behind a chunk without a mask, or the backend is not
            installed or cannot do this: the message says which can.
    """
    spec = kv.spec.layers[layer]
    num_heads = _check_queries(kv, spec, q, step)
    if softcap is not None and not softcap > 0:
        raise InvalidSpec(f"softcap is {softcap}, expected a number over 0, or None")
    if window is not None and (not isinstance(window, (int, np.integer)) or window < 1):
        raise InvalidSpec(f"window is {window}, expected 1 token or more, or None")
    if spec.kind == "chunked" and attn_mask is None:
        check_chunk(spec, int(step.plan.seq_lens.max(initial=0)))
    scale = scale_of(spec, scale)
    window = spec.window if window is None else window
    firsts = None
    if attn_mask is not None:
        window, firsts = None, _look_at(attn_mask, num_heads, step)
        if attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(q.dtype)  # all that torch's kernels take
    if not step.num_tokens:
        return q.new_empty(0, num_heads, spec.output_dim)
    q, out_scale = _with_scales(q, spec, *kv.scales[layer])
    call = Call(kv, step, layer, spec, q, scale, softcap, window, attn_mask, firsts)
    out = _choose(call, backend).attend(call)
    return out if out_scale == 1 else out.mul_(out_scale)


def _with_scales(
    q: torch.Tensor, spec: LayerSpec, k_scale: float, v_scale: float
) -> tuple[torch.Tensor, float]:
    """Queries to what is stored, and what the answer is to be multiplied by.

    Queries first: what is stored may be so large that products with it overflow.
    """
    if spec.kind != "latent":
        return (q if k_scale == 1 else q * k_scale), v_scale
    if k_scale != 1 or v_scale != 1:
        q = torch.cat((q[..., : spec.k_dim] * k_scale, q[..., spec.k_dim :] * v_scale), -1)
    return q, k_scale


def _check_queries(kv: KVCache, spec: LayerSpec, q: torch.Tensor, step: Step) -> int:
    """Returns how many heads there are."""
    if not isinstance(q, torch.Tensor) or not q.is_floating_point():
        raise InvalidSpec(f"q is {getattr(q, 'dtype', type(q))}, expected a tensor of floats")
    shape = q.shape
    if len(shape) != 3 or shape[0] != step.num_tokens or shape[2] != spec.query_dim:
        raise InvalidSpec(
            f"q is {list(shape)}, expected [{step.num_tokens}, query heads, {spec.query_dim}]"
        )
    if not shape[1] or shape[1] % spec.num_kv_heads:
        raise InvalidSpec(
            f"q has {shape[1]} heads, expected a multiple of {spec.num_kv_heads} KV heads"
        )
    if q.device != kv.device:
        raise InvalidSpec(f"q is on {q.device}, expected {kv.device}")
    if q.requires_grad and torch.is_grad_enabled():
        raise InvalidSpec(
            "q requires a gradient, and a cache keeps K and V without: call attention under "
            "torch.no_grad()"
        )
    address(q, "q")
    return shape[1]


def _look_at(mask: torch.Tensor, num_heads: int, step: Step) -> torch.Tensor | None:
    """Check a mask, and see what it says: once for all layers that have it as it is."""

    def look() -> tuple[torch.Tensor, torch.Tensor | None]:
        _check_mask(mask, num_heads, step)
        return mask, _firsts(mask, step)  # it has to live as long as its id stands for it

    if not isinstance(mask, torch.Tensor) or mask.is_inference():  # which tells nobody of changes
        return look()[1]
    return step.kept(("mask", id(mask), mask._version, num_heads), look)[1]


def _check_mask(mask: torch.Tensor, num_heads: int, step: Step) -> None:
    if mask.dtype != torch.bool and not (mask.is_floating_point() and mask.itemsize > 1):
        raise InvalidSpec(f"attn_mask is {mask.dtype}, expected bool, or floats to be added")
    counts, lens = np.diff(step.plan.query_starts), step.plan.seq_lens
    if len(counts) and (counts != counts[0]).any():
        raise InvalidSpec(
            f"attn_mask is for rows of one length, and the step's have {counts.tolist()} new tokens"
        )
    whole = [len(lens), num_heads, *(int(n.max(initial=0)) for n in (counts, lens))]
    shape = [1] * (4 - mask.dim()) + list(mask.shape)
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, whole, strict=True)):
        raise InvalidSpec(
            f"attn_mask is {list(mask.shape)}, expected {whole} or what broadcasts to it"
        )


def _firsts(mask: torch.Tensor, step: Step) -> torch.Tensor | None:
    """See Call. On a GPU the host would have to wait for this."""
    lens = step.plan.seq_lens
    is_one_query = 0 < len(lens) == step.num_tokens and all(n == 1 for n in mask.shape[-3:-1])
    if mask.device.type != "cpu" or mask.dtype != torch.bool or not is_one_query:
        return None
    longest = int(lens.max())
    seen = mask.expand(len(lens), 1, 1, longest)[:, 0, 0].numpy()
    firsts = seen.argmax(axis=1)
    if lens.min() < longest:
        seen = seen & (np.arange(longest) < lens[:, None])
    num_seen = np.count_nonzero(seen, axis=1)
    if not num_seen.all() or (num_seen != lens - firsts).any():
        return None
    return torch.from_numpy(firsts.astype(np.int32))


def _choose(call: Call, name: str) -> Backend:
    if name == "auto" and call.kv.device.type != "cuda":
        return blockwise if blockwise.is_faster(call) else gather
    if name == "auto":
        able = (b for b in (flash_attn, flashinfer, varlen) if b.refusal(call) is None)
        return next(able, gather)
    if name not in BACKENDS:
        names = ", ".join(f'"{known}"' for known in BACKENDS)
        raise InvalidSpec(f'backend is {name!r}, expected "auto" or one of {names}')
    reason = BACKENDS[name].refusal(call)
    if reason is not None:
        others = [f'"{other}"' for other, one in BACKENDS.items() if one.refusal(call) is None]
        raise InvalidSpec(f'backend "{name}" {reason}; these can: {", ".join(others)}')
    return BACKENDS[name]
