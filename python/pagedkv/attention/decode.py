"""The extension's own kernel, for a CPU: rows of one new token each, straight off their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pagedkv.attention.call import Call
    from pagedkv.step import Step

__all__ = ["decode", "decode_with_sums", "takes"]

_INT32 = 2**31 - 1
_MANY = 32  # query heads for each head of keys
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def takes(call: Call) -> bool:
    """Whether there is one for what this layer keeps. It computes in float32.

    Of many query heads for one of keys the products are most of the work, and torch's are quicker.
    """
    if call.q.dtype == torch.float64 or call.q.shape[1] >= _MANY * call.spec.num_kv_heads:
        return False
    layer, dtype = call.spec, call.kv.k(call.layer).dtype
    whole = layer.k_dim % 8 == 0 and layer.v_dim % 8 == 0
    return whole and dtype in _TYPES and call.kv.host_pool is not None


def decode(call: Call, first: int, last: int) -> torch.Tensor:
    """Rows [first, last) of the step, of one new token each: float32 [rows, Hq, output_dim]."""
    q = _queries(call, first, last)
    firsts = 0 if call.firsts is None else call.firsts[first:].data_ptr()
    return _decode(call, (first, last), q, firsts, 0)


def decode_with_sums(
    call: Call, first: int, last: int, begin: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same to keys from `begin` on, and the log-sum-exp of the scores [last - first, Hq]."""
    q = _queries(call, first, last)
    sums = q.new_empty(q.shape[:2])
    firsts = q.new_full((len(q),), begin, dtype=torch.int32)
    found = _decode(call, (first, last), q, firsts.data_ptr(), sums.data_ptr())
    return found, sums


def _queries(call: Call, first: int, last: int) -> torch.Tensor:
    """Float32 [last - first, Hq, query_dim], contiguous: the queries' own memory if it is so."""
    q = call.q
    if last - first < len(q):
        at = int(call.step.plan.query_starts[first])
        q = q[at : at + last - first]
    return q.float().contiguous()


def _decode(
    call: Call, rows: tuple[int, int], q: torch.Tensor, firsts_at: int, sums_at: int
) -> torch.Tensor:
    step, layer, pool = call.step, call.spec, call.kv.host_pool
    assert pool is not None
    num_heads = q.shape[1]
    out = q.new_empty(rows[1] - rows[0], num_heads, layer.output_dim)
    pool.attend(
        call.layer,
        _TYPES[call.kv.k(call.layer).dtype],
        layer.kind == "latent",
        *step.kept(("rows", rows), lambda: _tables(step, *rows)),
        layer.num_kv_heads,
        num_heads // layer.num_kv_heads,
        call.scale,
        call.softcap or 0.0,
        min(call.window or 0, _INT32),
        firsts_at,
        q.data_ptr(),
        out.data_ptr(),
        sums_at,
        torch.get_num_threads(),
    )
    return out


def _tables(step: Step, first: int, last: int) -> tuple[int, int, int, int, int]:
    """Where rows' tables are, their stride, number and width, and where the rows' lengths are."""
    tables, lens = step.block_tables[first:last], step.seq_lens[first:last]
    return tables.data_ptr(), tables.stride(0), *tables.shape, lens.data_ptr()
