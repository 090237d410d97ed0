"""How architectures differ in their tensors: norms, biases, gates. What a config says of it is read
by the names of its fields; what it never says, since the code of the model has it, stands here."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.config import ModelConfig

__all__ = ["FAMILIES", "Family"]

Flag = str | bool  # the name of a config's field, or what is so in every model of the family


@dataclass(frozen=True)
class Family:
    """What every layer of an architecture has beside its projections.

    Attributes:
        norms: norms per layer that are as wide as the model.
        norm_vectors: 1 for a weight, 2 for weight and bias, 0 for norms without parameters.
        gated: whether a feed-forward layer has a gate, so three matrices and not two.
        qkv_bias, o_bias, mlp_bias, head_bias: which projections have biases.
        qk_norm: norms of q and k: "head" (one for all heads), "each" (one per head), "width".
        qk_norm_if: the field that switches them on.
        qk_norm_vectors: like norm_vectors.
        positions: rows of a learned position table beyond max_position_embeddings; None: no table.
        extra_norms: norms of the model that are not a layer's; the last one is among them.
    """

    norms: int = 2
    norm_vectors: int = 1
    gated: bool = True
    qkv_bias: Flag = False
    o_bias: Flag = False
    mlp_bias: Flag = False
    head_bias: Flag = False
    qk_norm: str = ""
    qk_norm_if: Flag = True
    qk_norm_vectors: int = 1
    positions: int | None = None
    extra_norms: int = 1


_PLAIN = Family()
_BIASES = Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias")
_GPT = Family(
    norm_vectors=2, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, positions=0
)  # fmt: skip
_GPTJ = Family(norms=1, norm_vectors=2, gated=False, mlp_bias=True, head_bias=True)


def _attention(**others: object) -> Family:
    return Family(qkv_bias="attention_bias", o_bias="attention_bias", **others)  # type: ignore[arg-type]


FAMILIES: dict[str, Family] = {
    "arcee": Family(
        gated=False, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "bamba": _BIASES,
    "bloom": Family(
        norm_vectors=2, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, extra_norms=2
    ),
    "codegen": _GPTJ,
    "cohere": _attention(norms=1, qk_norm="each", qk_norm_if="use_qk_norm"),
    "cohere2": _attention(norms=1),
    "deepseek_v2": _BIASES,
    "deepseek_v3": _attention(),
    "dots1": _attention(qk_norm="head"),
    "ernie4_5": Family(qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias"),
    "ernie4_5_moe": Family(
        qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", head_bias="use_bias"
    ),
    "exaone4": Family(qk_norm="head"),
    "falcon": Family(norm_vectors=2, gated=False, qkv_bias="bias", o_bias="bias", mlp_bias="bias"),
    "falcon_h1": _BIASES,
    "falcon_mamba": Family(norms=1),
    "gemma": _attention(),
    "gemma2": _attention(norms=4),
    "gemma3_text": _attention(norms=4, qk_norm="head"),
    "glm": Family(qkv_bias="attention_bias"),
    "glm4": Family(norms=4, qkv_bias="attention_bias"),
    "glm4_moe": Family(qkv_bias="attention_bias", qk_norm="head", qk_norm_if="use_qk_norm"),
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": Family(norm_vectors=2, gated=False, o_bias=True, mlp_bias=True, positions=0),
    "gpt_neox": Family(
        norm_vectors=2, gated=False, qkv_bias="attention_bias", o_bias="attention_bias",
        mlp_bias=True,
    ),
    "gpt_oss": _attention(),
    "gptj": _GPTJ,
    "granite": _BIASES,
    "granitemoe": _attention(),
    "granitemoehybrid": _attention(),
    "helium": Family(qkv_bias="attention_bias", mlp_bias="mlp_bias"),
    "jamba": _PLAIN,
    "lfm2": Family(qk_norm="head"),
    "llama": _BIASES,
    "llama4_text": _attention(),
    "mamba": Family(norms=1),
    "mamba2": Family(norms=1),
    "minimax": _PLAIN,
    "ministral": _PLAIN,
    "mistral": _PLAIN,
    "mixtral": _PLAIN,
    "mpt": Family(gated=False),
    "nemotron": Family(
        norm_vectors=2, gated=False, qkv_bias="attention_bias", o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "nemotron_h": Family(
        norms=1, gated=False, qkv_bias="attention_bias", o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "olmo": _attention(norm_vectors=0),
    "olmo2": _attention(qk_norm="width"),
    "olmo3": _attention(qk_norm="width"),
    "olmoe": _attention(qk_norm="width"),
    "opt": Family(
        norm_vectors=2, gated=False, qkv_bias="enable_bias", o_bias="enable_bias",
        mlp_bias="enable_bias", positions=2,
    ),
    "persimmon": Family(
        norm_vectors=2, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm="head",
        qk_norm_if="qk_layernorm", qk_norm_vectors=2,
    ),
    "phi": Family(
        norms=1, norm_vectors=2, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True,
        head_bias=True, qk_norm="head", qk_norm_if="qk_layernorm", qk_norm_vectors=2,
    ),
    "phi3": _PLAIN,
    "phimoe": Family(
        norm_vectors=2, qkv_bias="attention_bias", o_bias="attention_bias",
        head_bias="lm_head_bias",
    ),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias="qkv_bias"),
    "qwen3": _attention(qk_norm="head"),
    "qwen3_moe": _attention(qk_norm="head"),
    "qwen3_next": _attention(qk_norm="head"),
    "recurrent_gemma": Family(qkv_bias="attention_bias", o_bias=True, mlp_bias=True),
    "seed_oss": Family(
        qkv_bias="attention_bias", o_bias="attention_out_bias", mlp_bias="mlp_bias"
    ),
    "smollm3": _BIASES,
    "stablelm": Family(
        norm_vectors=2, qkv_bias="use_qkv_bias", qk_norm="each", qk_norm_if="qk_layernorm"
    ),
    "starcoder2": Family(
        norm_vectors=2, gated=False, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias"
    ),
}  # fmt: skip


def norms_per_layer(config: ModelConfig, family: Family) -> int:
    """Where a flag of the config decides; attention beside the feed-forward layer shares one."""
    if config.model_type == "falcon":
        if config.flag("new_decoder_architecture"):
            return config.number("num_ln_in_parallel_attn", 2)
        return 1 if config.flag("parallel_attn", True) else 2
    if config.model_type == "stablelm" and config.flag("use_parallel_residual"):
        return 1
    return family.norms
