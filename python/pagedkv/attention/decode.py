"""The extension's own kernel, for a CPU: rows of one new token each, straight off their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pagedkv.attention.call import Call
    from pagedkv.cache import KVCache
    from pagedkv.step import Step

__all__ = ["decode", "takes"]

_INT32 = 2**31 - 1
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def takes(kv: KVCache, call: Call) -> bool:
    """Whether there is one for what this layer keeps. It computes in float32, without gradients."""
    if call.q.dtype == torch.float64 or (call.q.requires_grad and torch.is_grad_enabled()):
        return False
    layer, dtype = kv.spec.layers[call.layer], kv.k(call.layer).dtype
    whole = layer.k_dim % 8 == 0 and layer.v_dim % 8 == 0
    return whole and dtype in _TYPES and kv.host_pool is not None


def decode(
    kv: KVCache, call: Call, step: Step, first: int, last: int, begin: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [first, last) of the step, of one new token each, to keys from `begin` on.

    Returns float32 [last - first, Hq, v_dim] and the log-sum-exp of each one's scores
    [last - first, Hq].
    """
    q, layer, num_rows = call.q, kv.spec.layers[call.layer], last - first
    if num_rows < len(q):
        at = int(step.plan.query_starts[first])
        q = q[at : at + num_rows]
    q = q.float().contiguous()
    num_heads = q.shape[1]
    out, sums = q.new_empty(num_rows, num_heads, layer.v_dim), q.new_empty(num_rows, num_heads)
    tables, pool = step.block_tables, kv.host_pool
    stride = tables.stride(0)
    assert pool is not None
    pool.attend(
        call.layer,
        _TYPES[kv.k(call.layer).dtype],
        tables.data_ptr() + first * stride * tables.element_size(),
        stride,
        num_rows,
        tables.shape[1],
        step.seq_lens.data_ptr() + first * step.seq_lens.element_size(),
        layer.num_kv_heads,
        num_heads // layer.num_kv_heads,
        call.scale,
        call.softcap or 0.0,
        min(call.window or 0, _INT32),
        begin,
        q.data_ptr(),
        out.data_ptr(),
        sums.data_ptr(),
    )
    return out, sums
