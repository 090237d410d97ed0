"""The extension's own kernel, for a CPU: rows of one new token each, straight off their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pagedkv.attention.call import Call
    from pagedkv.cache import KVCache
    from pagedkv.step import Step

__all__ = ["decode", "takes"]

_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def takes(kv: KVCache, call: Call) -> bool:
    """Whether there is one for what this layer keeps."""
    layer, dtype = kv.spec.layers[call.layer], kv.k(call.layer).dtype
    whole = layer.k_dim % 8 == 0 and layer.v_dim % 8 == 0
    return whole and dtype in _TYPES and kv.host_pool is not None


def decode(kv: KVCache, call: Call, step: Step, first: int, last: int) -> torch.Tensor:
    """Rows [first, last) of the step, of one new token each: float32 [last - first, Hq, v_dim]."""
    begin, layer = int(step.plan.query_starts[first]), kv.spec.layers[call.layer]
    q = call.q[begin : begin + last - first].float().contiguous()
    out = q.new_empty(q.shape[0], q.shape[1], layer.v_dim)
    tables, lens = step.block_tables[first:last], step.seq_lens[first:last]
    assert kv.host_pool is not None
    kv.host_pool.attend(
        call.layer,
        _TYPES[kv.k(call.layer).dtype],
        tables.data_ptr(),
        tables.stride(0),
        last - first,
        tables.shape[1],
        lens.data_ptr(),
        layer.num_kv_heads,
        q.shape[1] // layer.num_kv_heads,
        call.scale,
        call.softcap or 0.0,
        call.window or 0,
        q.data_ptr(),
        out.data_ptr(),
    )
    return out
