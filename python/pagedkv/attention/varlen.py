"""torch's varlen_attn with block tables: step.block_tables, as they are.

Its kernels over blocks are FlashAttention 3 or 4, which torch has to be told to use.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import TYPE_CHECKING

import torch

from pagedkv.attention.call import kernel_refusal, window_pair

if TYPE_CHECKING:
    from pagedkv.attention.call import Call

__all__ = ["attend", "refusal"]


def refusal(call: Call) -> str | None:
    if not _takes_tables():
        return (
            f"needs torch 2.13, whose varlen_attn takes block tables: this is {torch.__version__}"
        )
    from torch.nn.attention import current_flash_attention_impl

    reason = kernel_refusal(call, softcap=False)
    if reason is None and current_flash_attention_impl() is None:
        return (
            "needs kernels that take block tables: "
            'torch.nn.attention.activate_flash_attention_impl("FA3"), or "FA4"'
        )
    return reason


@cache
def _takes_tables() -> bool:
    try:
        from torch.nn.attention import current_flash_attention_impl  # noqa: F401
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "block_table" in signature(varlen_attn).parameters


def attend(call: Call) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    step, plan = call.step, call.step.plan
    k, v = call.kv.read(call.layer)
    out = varlen_attn(
        call.q,
        k,
        v,
        step.query_starts,
        None,  # where keys begin, the table says
        int((plan.query_starts[1:] - plan.query_starts[:-1]).max()),
        int(plan.seq_lens.max()),
        scale=call.scale,
        window_size=window_pair(call.window),
        enable_gqa=call.q.shape[1] != k.shape[2],
        seqused_k=step.seq_lens,
        block_table=step.block_tables,
    )
    assert isinstance(out, torch.Tensor)
    return out
