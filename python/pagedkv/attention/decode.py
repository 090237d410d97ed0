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


def decode(
    kv: KVCache, call: Call, step: Step, rows: slice, begin: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the step, of one new token each, to keys from `begin` on.

    Returns float32 [rows, Hq, v_dim] and the log-sum-exp of each one's scores [rows, Hq].
    """
    at, layer = int(step.plan.query_starts[rows.start]), kv.spec.layers[call.layer]
    q = call.q[at : at + rows.stop - rows.start].float().contiguous()
    out, sums = q.new_empty(*q.shape[:2], layer.v_dim), q.new_empty(q.shape[:2])
    tables, lens = step.block_tables[rows], step.seq_lens[rows]
    assert kv.host_pool is not None
    kv.host_pool.attend(
        call.layer,
        _TYPES[kv.k(call.layer).dtype],
        tables.data_ptr(),
        tables.stride(0),
        len(tables),
        tables.shape[1],
        lens.data_ptr(),
        layer.num_kv_heads,
        q.shape[1] // layer.num_kv_heads,
        call.scale,
        call.softcap or 0.0,
        call.window or 0,
        begin,
        q.data_ptr(),
        out.data_ptr(),
        sums.data_ptr(),
    )
    return out, sums
