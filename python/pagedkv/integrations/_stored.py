"""What a model's layers hand to its cache, where the config alone does not tell."""

from __future__ import annotations

import warnings
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
    asked = _ask(model)
    if not asked.found:
        raise InvalidSpec("the model used no cache: is gradient checkpointing on?")
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
    stored = KVSpec(layers=layers, block_size=block_size)
    if stored.token_bytes > spec.token_bytes:
        warnings.warn(
            "this version of the model hands over the K and V that it makes of its latents: "
            f"{stored.token_bytes:,} bytes per token, and not {spec.token_bytes:,}",
            RuntimeWarning,
            stacklevel=3,
        )
    return stored


def _ask(model: Any) -> _Asked:
    """What a forward of one token would store. The model and torch's seeds stay as they are."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    if device is None:
        raise InvalidSpec("the model's weights are on meta: load them first")
    asked, modes = _Asked(), [(module, module.training) for module in model.modules()]
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=token, past_key_values=asked, use_cache=True)
    finally:
        for module, training in modes:
            module.training = training
    return asked


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
