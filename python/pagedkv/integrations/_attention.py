"""The attention function that transformers calls while a PagedCache attends over its blocks.

It is registered as "pagedkv" and set on a model for single forwards only; see AttentionSwitch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pagedkv.errors import InvalidState

ATTENTION = "pagedkv"

# Their layers read what update() returns for more than to attend to it, as if it were all there is.
_READ_THEIR_VALUES = ("diffllama", "doge")

# Left on the keys that update() returns, as `keys.pagedkv_attend`, since the rest of the keys is in
# blocks: (query, value, mask, scale, softcap) -> output.
Attend = Callable[
    [torch.Tensor, torch.Tensor, "torch.Tensor | None", "float | None", "float | None"],
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

    `key` and `value` are the new tokens' alone, and the cache has them already. Keys of no such
    cache are those of another forward of this model, in another thread, which are all there; had a
    layer changed its keys, the cache would miss at its next update(), or at the end, that they were
    read.
    """
    attend: Attend | None = getattr(key, "pagedkv_attend", None)
    if dropout:
        raise InvalidState(
            f"this attention layer asks for dropout, {dropout}: call model.eval(), or make the "
            "cache with paged_attention=False"
        )
    if s_aux is not None or (attend is None and softcap is not None):
        raise InvalidState(
            "this attention layer asks for sinks, or a softcap of keys that it changed or "
            "that are another thread's: make the cache with paged_attention=False"
        )
    if attend is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    return attend(query, value, attention_mask, scaling, softcap), None


def attends_paged(model: Any) -> bool:
    """Whether a model's layers dispatch their attention function, and can do with it alone."""
    dispatches = bool(getattr(model, "_supports_attention_backend", False))
    if not dispatches or getattr(model.config, "model_type", "") in _READ_THEIR_VALUES:
        return False
    return not any(hasattr(module, "sinks") for module in model.modules())


AttentionInterface.register(ATTENTION, paged_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
