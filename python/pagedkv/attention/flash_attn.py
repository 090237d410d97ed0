"""FlashAttention, if it is installed: version 3 (`flash_attn_interface`), else 2 (`flash_attn`).

Both read the pool through step.block_tables. Version 2 needs blocks of a multiple of 256 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from pagedkv.attention.call import installed, kernel_refusal, window_pair

if TYPE_CHECKING:
    from pagedkv.attention.call import Call

__all__ = ["attend", "refusal"]


def refusal(call: Call) -> str | None:
    if isinstance(installed("flash_attn_interface"), str):
        two = installed("flash_attn")
        if isinstance(two, str):
            return two
        if call.kv.spec.block_size % 256:
            return (
                "is version 2, which needs a block_size that is a multiple of 256, and it is "
                f"{call.kv.spec.block_size}: install version 3"
            )
    return kernel_refusal(call)


def attend(call: Call) -> torch.Tensor:
    step, plan = call.step, call.step.plan
    k, v = call.kv.read(call.layer)
    max_new = int((plan.query_starts[1:] - plan.query_starts[:-1]).max())
    options = {
        "softmax_scale": call.scale,
        "causal": True,
        "window_size": window_pair(call.window),
        "softcap": call.softcap or 0.0,
    }
    out: torch.Tensor
    three = installed("flash_attn_interface")
    if not isinstance(three, str):
        out = three.flash_attn_with_kvcache(
            call.q,
            k,
            v,
            cache_seqlens=step.seq_lens,
            page_table=step.block_tables,
            cu_seqlens_q=step.query_starts,
            max_seqlen_q=max_new,
            **options,
        )
        return out
    two = installed("flash_attn")
    assert not isinstance(two, str)
    out = two.flash_attn_varlen_func(
        call.q,
        k,
        v,
        cu_seqlens_q=step.query_starts,
        cu_seqlens_k=step.kept("cu_seqlens_k", lambda: _starts(step.seq_lens)),
        max_seqlen_q=max_new,
        max_seqlen_k=int(plan.seq_lens.max()),
        block_table=step.block_tables,
        **options,
    )
    return out


def _starts(lens: torch.Tensor) -> torch.Tensor:
    return F.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
