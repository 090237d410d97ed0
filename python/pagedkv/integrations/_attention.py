"""The attention function that transformers calls while a PagedCache attends over its blocks.

It is registered as "pagedkv" and set on a model for single forwards only; see AttentionSwitch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pagedkv.errors import InvalidState

ATTENTION = "pagedkv"


# Left on the keys that update() returns, as `keys.pagedkv_attend`, since the rest of the keys is in
# blocks: (module, query, mask, scale, softcap) -> output.
Attend = Callable[
    [torch.nn.Module, torch.Tensor, "torch.Tensor | None", "float | None", "float | None"],
    torch.Tensor,
]


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, Hq, Q, D] over all that the cache holds. Returns [B, Q, Hq, D].

    `key` and `value` are the new tokens' alone, and the cache has them already.
    """
    attend: Attend | None = getattr(key, "pagedkv_attend", None)
    if attend is None or dropout or s_aux is not None:
        raise InvalidState(
            "this attention layer changes its keys after the cache's update(), or asks for dropout "
            "or attention sinks: make the cache with paged_attention=False"
        )
    return attend(module, query, attention_mask, scaling, softcap), None


def attends_paged(model: Any) -> bool:
    """Whether a model's layers dispatch their attention function, to one that has no sinks."""
    dispatches = bool(getattr(model, "_supports_attention_backend", False))
    return dispatches and not any(hasattr(module, "sinks") for module in model.modules())


AttentionInterface.register(ATTENTION, paged_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
