"""What a model's layers hand to its cache, where the config alone does not tell."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from pagedkv.errors import InvalidSpec
from pagedkv.spec import KVSpec, LayerSpec

__all__ = ["spec_of"]


def spec_of(model: Any, block_size: int) -> KVSpec:
    """What `model` keeps in a Cache of transformers.

    Layers with latents hand over those, or the K and V of each head that they make of them: which,
    depends on the model and on the version of transformers. So they are asked, with one token.
    """
    spec = KVSpec.from_config(model.config, dtype=str(model.dtype), block_size=block_size)
    spec.require_kv()
    if all(layer.kind != "latent" for layer in spec.layers):
        return spec
    asked = _Asked()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=asked, use_cache=True)
    if set(asked.found) != set(range(len(spec.layers))):
        raise InvalidSpec(
            f"the model's layers {sorted(asked.found)} use a cache, and its config has "
            f"{len(spec.layers)} layers"
        )
    layers = []
    for i, layer in enumerate(spec.layers):
        heads, k_dim, v_dim = asked.found[i]
        if layer.kind == "latent" and (heads, k_dim, v_dim) != (1, layer.k_dim, layer.v_dim):
            layer = LayerSpec("full", heads, k_dim, v_dim, layer.dtype)
        layers.append(layer)
    return KVSpec(layers=layers, block_size=block_size)


class _Asked(Cache):
    """Keeps nothing, and notes what it was to keep: heads, and elements of K and of V."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.found: dict[int, tuple[int, int, int]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.found[layer_idx] = key_states.shape[1], key_states.shape[3], value_states.shape[3]
        return key_states, value_states

    def update_indexer(self, *args: Any, **kwargs: Any) -> Any:
        raise InvalidSpec(
            "the model keeps an index beside its latents, to attend sparsely: KVCache cannot hold "
            "that yet"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(
        self, query_length: int | torch.Tensor, layer_idx: int = 0
    ) -> tuple[int, int]:
        return 1, 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False]
