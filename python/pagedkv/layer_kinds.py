"""Which kind each layer of a config is, and what a layer of that kind keeps."""

from __future__ import annotations

from collections.abc import Sequence

from pagedkv.config import ModelConfig, check_int
from pagedkv.errors import InvalidSpec

__all__ = [
    "attentions_per_layer",
    "layer_kinds",
    "mamba_inner",
    "shared_layers",
    "state_elements",
    "window_of",
]

# The words of configs, and the one that is used here.
_WORDS = {
    "full_attention": "full", "attention": "full", "*": "full", "indexed_attention": "full",
    "sliding_attention": "sliding", "chunked_attention": "chunked",
    "mamba": "mamba", "mamba2": "mamba", "M": "mamba", "hybrid": "hybrid",
    "conv": "conv", "recurrent": "rg_lru", "moe": "moe", "E": "moe", "mlp": "mlp", "-": "mlp",
}  # fmt: skip
_MAMBA_1 = ("jamba", "mamba", "falcon_mamba")
_MAMBA_2 = ("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "falcon_h1")
_ONLY_MAMBA = ("mamba", "falcon_mamba", "mamba2")
# Every so many layers one sees everything, the others a window; where the file has no pattern.
_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "exaone4": 4, "olmo3": 4}
_OPTIONAL_WINDOWS = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "dots1")


def window_of(config: ModelConfig) -> int | None:
    """Tokens that a sliding layer sees, or None if the model has no window."""
    optional = config.model_type in _OPTIONAL_WINDOWS
    if config.get("use_sliding_window", not optional) is False:
        return None
    window = config.get("sliding_window")
    return None if window is None else check_int("sliding_window", window)


def layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    """Per layer "full", "sliding", "chunked", "latent", "hybrid" (full beside mamba), a recurrent
    kind ("mamba", "delta", "lightning", "conv", "rg_lru"), or one without attention: "mlp", "moe".

    Raises:
        InvalidSpec: a layer is of a kind that is not known, or the list has another length.
    """
    num_layers = config.num_layers
    words = _words(config, num_layers)
    if len(words) != num_layers:
        raise InvalidSpec(
            f"layer_types has {len(words)} entries and num_hidden_layers is {num_layers}"
        )
    window = window_of(config)
    kinds = []
    for i, word in enumerate(words):
        kind = _linear_kind(config) if word == "linear_attention" else _WORDS.get(word, word)
        if kind not in _KINDS or (kind == "sliding" and window is None):
            raise InvalidSpec(
                f"layer {i} is of kind {word!r}, expected full_attention, sliding_attention with a "
                "sliding_window, or a recurrent kind with its sizes"
            )
        kinds.append("latent" if kind == "full" and _is_latent(config) else kind)
    return tuple(kinds)


_KINDS = {
    "full", "sliding", "chunked", "latent", "hybrid", "mlp", "moe",
    "mamba", "delta", "lightning", "conv", "rg_lru",
}  # fmt: skip


def attentions_per_layer(config: ModelConfig) -> int:
    """How many attentions, each with K and V of its own, one of the config's layers has."""
    return 2 if config.model_type == "longcat_flash" else 1


def _is_latent(config: ModelConfig) -> bool:
    return config.get("kv_lora_rank") is not None


def _linear_kind(config: ModelConfig) -> str:
    """Configs call several things linear attention; what they are is told by other fields."""
    if config.model_type in _MAMBA_2:
        return "mamba"
    if config.get("linear_num_value_heads") is not None:
        return "delta"
    return "lightning" if config.model_type == "minimax" else "linear_attention"


def _words(config: ModelConfig, num_layers: int) -> Sequence[str]:
    """What each layer is, in the words of the config where it has some."""
    words = config.layer_words
    if config.model_type == "falcon_h1":
        return ["hybrid"] * num_layers
    if words is not None:
        if config.model_type != "recurrent_gemma":
            return words
        repeated = [words[i % len(words)] for i in range(num_layers)]
        return ["sliding_attention" if word == "attention" else word for word in repeated]
    if config.model_type in _ONLY_MAMBA:
        return ["mamba"] * num_layers
    if config.model_type in ("bamba", "granitemoehybrid"):
        attention = config.numbers("attn_layer_indices") or ()
        return ["attention" if i in attention else "mamba" for i in range(num_layers)]
    if config.model_type == "lfm2":
        attention = config.numbers("full_attn_idxs") or tuple(range(num_layers))
        return ["attention" if i in attention else "conv" for i in range(num_layers)]
    for period, offset, other in _PERIODS:
        every = config.get(period)
        if every is not None:
            every, at = check_int(period, every), config.number(offset, every - 1, least=0)
            return ["attention" if i % every == at else other for i in range(num_layers)]
    return _windows(config, num_layers)


_PERIODS = (
    ("attn_layer_period", "attn_layer_offset", "mamba"),
    ("full_attention_interval", "full_attention_offset", "linear_attention"),
    ("no_rope_layer_interval", "no_rope_layer_offset", "chunked_attention"),
)


def _windows(config: ModelConfig, num_layers: int) -> Sequence[str]:
    window = window_of(config)
    if window is None:
        return ["full_attention"] * num_layers
    if config.model_type in ("qwen2", "qwen2_moe", "qwen3"):
        first = config.number("max_window_layers", 0, least=0)
        return ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
    pattern = pattern or _PATTERNS.get(config.model_type)
    if pattern is None:
        return ["sliding_attention"] * num_layers
    if isinstance(pattern, str):  # "LLLG": local, local, local, global
        marks = [pattern[i % len(pattern)] for i in range(num_layers)]
        return ["full_attention" if mark == "G" else "sliding_attention" for mark in marks]
    every = check_int("sliding_window_pattern", pattern)
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)]


def state_elements(config: ModelConfig, kind: str) -> int:
    """Elements that one recurrent layer keeps per sequence, however long it is.

    mamba (Gu and Dao 2023, Dao and Gu 2024): the last d_conv - 1 inputs of the convolution, and the
    state of the scan. delta (Yang et al. 2024): the same of the convolution, and a matrix per head.
    """
    if kind in ("mamba", "hybrid"):
        inner, state = mamba_inner(config), config.number("mamba_d_state")
        conv = config.number("mamba_d_conv") - 1
        if config.model_type in _MAMBA_1:
            return inner * (conv + state)
        groups = config.number("mamba_n_groups", 1)
        return conv * (inner + 2 * groups * state) + inner * state
    if kind == "delta":
        keys = config.number("linear_num_key_heads") * config.number("linear_key_head_dim")
        heads, dim = config.number("linear_num_value_heads"), config.number("linear_value_head_dim")
        conv = config.number("linear_conv_kernel_dim") - 1
        return conv * (2 * keys + heads * dim) + heads * dim * config.number("linear_key_head_dim")
    if kind == "lightning":
        return config.num_heads * config.head_dim**2
    if kind == "conv":
        return config.number("hidden_size") * (config.number("conv_L_cache") - 1)
    if kind == "rg_lru":
        return config.number("lru_width", config.number("hidden_size")) * config.number(
            "conv1d_width"
        )
    return 0


def mamba_inner(config: ModelConfig) -> int:
    """Channels of a mamba layer."""
    if config.get("mamba_d_ssm") is not None:
        return config.number("mamba_d_ssm")
    if config.model_type == "nemotron_h":
        return config.number("mamba_n_heads") * config.number("mamba_d_head")
    return config.number("mamba_expand") * config.number("hidden_size")


def shared_layers(config: ModelConfig) -> int:
    """How many of the last layers read the K and V of earlier ones and keep none."""
    number, layers = config.number("num_kv_shared_layers", 0, least=0), config.num_layers
    if number >= layers:
        raise InvalidSpec(f"num_kv_shared_layers is {number}, expected less than {layers}")
    return number
