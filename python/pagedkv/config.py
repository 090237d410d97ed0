"""A model's config.json as it is read: one name per field, and what the file leaves out.

Hugging Face configs name the same thing differently (`n_embd`, `d_model`, `hidden_size`), nest the
language model of a multimodal one in `text_config`, and leave out what equals the default of their
class. `ModelConfig` hides all three. Needs no torch and no transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pagedkv.errors import InvalidSpec

__all__ = ["ModelConfig", "check_int"]

# The name that is used here, and the others that it goes by.
_ALIASES = {
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "hidden_size": ("n_embd", "d_model"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num"),
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size"),
    "max_position_embeddings": (
        "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx",
    ),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_k", "num_experts_per_token", "moe_topk"),
    "dtype": ("torch_dtype",),
    "mamba_d_state": ("state_size", "ssm_state_size"),
    "mamba_d_conv": ("conv_kernel",),
    "mamba_expand": ("expand",),
    "mamba_n_heads": ("mamba_num_heads",),
    "mamba_d_head": ("mamba_head_dim",),
    "mamba_n_groups": ("n_groups",),
    "mamba_dt_rank": ("time_step_rank",),
    "mamba_conv_bias": ("use_conv_bias",),
    "layer_types": ("layers_block_type", "block_types"),
    "sliding_window": ("attention_window_size",),
}  # fmt: skip
_NESTED = ("text_config", "llm_config", "language_config")
# Types whose language model is another type's.
_SAME = {
    "kimi_k2": "deepseek_v3", "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}  # fmt: skip
MAX_LAYERS = 10_000  # more than any model has
_OF_ITS_OWN = ("hidden_size", "num_hidden_layers")  # no default: a file without is not a config


def check_int(name: str, value: object, least: int = 1, most: float = math.inf) -> int:
    """`value` if it is an int from `least` to `most`; raises InvalidSpec naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        end = "or more" if most == math.inf else f"to {most}"
        raise InvalidSpec(f"{name} is {value!r}, expected an int of {least} {end}")
    return value


@cache
def _class_defaults() -> dict[str, dict[str, Any]]:
    """Per model_type, what its class assumes for a field that the file does not have."""
    text = Path(__file__).with_name("config_defaults.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


@dataclass(frozen=True)
class ModelConfig:
    """The fields of one language model.

    Attributes:
        fields: as in the file, those of the language model before those around it.
        model_type: such as "llama"; "" if the file does not say.
        defaults: what the class of `model_type` assumes for what is not in the file.
        towers: fields beside the language model, such as "vision_config".
    """

    fields: Mapping[str, Any]
    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    towers: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: Any) -> ModelConfig:
        """From the dict of a config.json, or from a transformers config object.

        Raises:
            InvalidSpec: not a config, or an encoder-decoder, which keeps K and V of two kinds.
        """
        if isinstance(config, ModelConfig):
            return config
        outer = _as_mapping(config)
        nested = next((n for n in _NESTED if outer.get(n) is not None), None)
        inner = _as_mapping(outer[nested]) if nested else {}
        fields = {**outer, **{k: v for k, v in inner.items() if v is not None or k not in outer}}
        if fields.get("is_encoder_decoder"):
            raise InvalidSpec("the config is an encoder-decoder's, expected a decoder-only model")
        model_type = str(inner.get("model_type") or outer.get("model_type") or "")
        model_type = _SAME.get(model_type.removesuffix("_text"), model_type)
        known = _class_defaults()
        if model_type not in known and f"{model_type}_text" in known:
            model_type += "_text"
        defaults = known.get(model_type, {})
        if not nested:
            defaults = {k: v for k, v in defaults.items() if k not in _OF_ITS_OWN}
        towers = tuple(k for k in outer if k.endswith("_config") and k in _TOWERS)
        return cls(fields, model_type, defaults, towers)

    def get(self, name: str, default: Any = None) -> Any:
        """The field by any of its names, else its class's default, else `default`.

        A null in the file is an answer: the class's default does not replace it.
        """
        names = (name, *_ALIASES.get(name, ()))
        for source in (self.fields, self.defaults):
            for alias in names:
                if source.get(alias) is not None:
                    return source[alias]
            if any(alias in source for alias in names):
                return default
        return default

    def number(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An int field; raises InvalidSpec naming it if it is missing or no such int."""
        value = self.get(name, default)
        if value is None:
            raise InvalidSpec(f"the config has no {name}")
        return check_int(name, value, least)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise InvalidSpec(f"{name} is {value!r} in the config, expected true or false")
        return value

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """A field that lists layers, or None without it."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise InvalidSpec(f"{name} is {value!r} in the config, expected a list of layers")
        return tuple(check_int(name, item, 0) for item in value)

    def of_layer(self, i: int, kind: str) -> ModelConfig:
        """With what the config says of layer `i` alone, or of all that see everything."""
        own: dict[str, Any] = {}
        if kind == "full" and self.get("global_head_dim") is not None:  # Gemma 4
            own["head_dim"] = self.get("global_head_dim")
            if self.get("num_global_key_value_heads") is not None:
                own["num_key_value_heads"] = self.get("num_global_key_value_heads")
        for layer, overrides in (self.get("per_layer_config") or {}).items():
            if str(layer).isdecimal() and int(layer) == i:
                own |= overrides
        return replace(self, fields={**self.fields, **own}) if own else self

    @property
    def num_layers(self) -> int:
        listed = self.layer_words
        if self.model_type == "nemotron_h" and listed:
            return len(listed)
        name = "num_hidden_layers"
        return check_int(name, self.number(name), most=MAX_LAYERS)

    @property
    def layer_words(self) -> tuple[str, ...] | None:
        """What the file calls each layer, or None if it has no list of them."""
        words = self.fields.get("hybrid_override_pattern") or self.get("layer_types")
        if words is None:
            return None
        if not isinstance(words, Sequence) or not words or not isinstance(words[0], str):
            raise InvalidSpec(f"layer_types is {words!r} in the config, expected a list of kinds")
        return tuple(str(word) for word in words)

    @property
    def num_heads(self) -> int:
        return self.number("num_attention_heads")

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and of V: 1 in multi-query attention, all heads where no field says less."""
        if self.model_type == "falcon" and not self.flag("new_decoder_architecture"):
            return 1 if self.flag("multi_query", True) else self.num_heads
        if self.model_type == "gpt_bigcode":
            return 1 if self.flag("multi_query", True) else self.num_heads
        heads = self.num_heads
        within = self.get("attn_config")
        found = within.get("kv_n_heads") if isinstance(within, Mapping) else None
        kv_heads = check_int("num_key_value_heads", found or self.get("num_key_value_heads", heads))
        if heads % kv_heads:
            raise InvalidSpec(
                f"num_attention_heads is {heads} and num_key_value_heads is {kv_heads} in the "
                "config, expected a multiple"
            )
        return kv_heads

    @property
    def head_dim(self) -> int:
        """Elements of one head: its own field, or hidden_size / num_attention_heads."""
        if self.get("head_dim") is not None:
            return self.number("head_dim")
        hidden, heads = self.number("hidden_size"), self.num_heads
        if hidden % heads:
            raise InvalidSpec(
                f"hidden_size is {hidden} and num_attention_heads is {heads} in the config, "
                "expected a multiple, or a head_dim"
            )
        return hidden // heads

    @property
    def dtype(self) -> str | None:
        """The storage type of the weights, such as "bfloat16"; None if the file does not say."""
        value = self.get("dtype")
        return None if value is None else str(value).removeprefix("torch.")


_TOWERS = ("vision_config", "audio_config", "vision_tower_config", "vq_config")


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if callable(getattr(config, "to_dict", None)):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "__dict__"):
        return dict(vars(config))
    raise InvalidSpec(f"the config is a {type(config).__name__}, expected a dict or a config")
