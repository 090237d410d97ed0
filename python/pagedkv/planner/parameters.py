"""A model's tensors, from its config alone: how many parameters, and which of them are what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pagedkv.config import ModelConfig
from pagedkv.errors import InvalidSpec
from pagedkv.layer_kinds import layer_kinds, shared_layers
from pagedkv.planner.families import FAMILIES, Family, norms_per_layer
from pagedkv.planner.recurrent import recurrent_tensors
from pagedkv.planner.tensors import Tensor, linear, vector

__all__ = ["Tensor", "count", "tensors"]

_ATTENTION = ("full", "sliding", "chunked", "latent", "hybrid")


def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Every tensor of the language model. An unknown model_type counts like llama.

    Raises:
        InvalidSpec: the config lacks a size.
    """
    family = FAMILIES.get(config.model_type, FAMILIES["llama"])
    kinds = layer_kinds(config)
    found = list(_outside(config, family))
    keeping = len(kinds) - shared_layers(config)
    for i, kind in enumerate(kinds):
        found += _layer(config, family, i, kind, i < keeping)
    return tuple(found)


def count(config: ModelConfig, *, active: bool = False) -> int:
    """Parameters; `active`: those that one token meets, so of the experts only those it goes to."""
    return sum(t.num_active if active else t.num_elements for t in tensors(config))


def _outside(config: ModelConfig, family: Family) -> Iterator[Tensor]:
    """What belongs to no layer: embeddings, the head, the last norm."""
    hidden, vocab = config.number("hidden_size"), config.number("vocab_size")
    width = config.number("word_embed_proj_dim", hidden)
    yield Tensor("embed_tokens", "embedding", (vocab, width))
    if not config.flag("tie_word_embeddings", True):
        yield Tensor("lm_head", "head", (vocab, width))
    if _is(config, family.head_bias):
        yield vector("lm_head.bias", vocab)
    if width != hidden:
        yield linear("project_in", hidden, width)
        yield linear("project_out", width, hidden)
    if family.positions is not None:
        rows = config.number("max_position_embeddings") + family.positions
        yield Tensor("embed_positions", "vector", (rows, hidden))
    norms = family.extra_norms
    if config.model_type == "opt" and (
        not config.flag("do_layer_norm_before", True) or config.flag("_remove_final_layer_norm")
    ):
        norms -= 1
    yield from _norms(config, family, norms)


def _norms(config: ModelConfig, family: Family, number: int) -> Iterator[Tensor]:
    vectors = family.norm_vectors
    if not config.flag("layer_norm_elementwise_affine", True):
        vectors = 0
    for _ in range(number * vectors):
        yield vector("norm", config.number("hidden_size"))


def _layer(
    config: ModelConfig, family: Family, i: int, kind: str, keeps_kv: bool
) -> Iterator[Tensor]:
    yield from _norms(config, family, norms_per_layer(config, family))
    if kind == "latent":
        yield from _latent_attention(config, family)
    elif kind in _ATTENTION:
        yield from _attention(config, family, keeps_kv)
    yield from recurrent_tensors(config, kind)
    alone = config.model_type in ("mamba", "mamba2", "falcon_mamba", "nemotron_h")
    if kind == "moe" or (not alone and _is_moe(config, i)):
        yield from _experts(config, family)
    elif kind == "mlp" or not alone:
        yield from _mlp("mlp", config, family, _dense_size(config))


# ---- attention ---------------------------------------------------------------------------------


def _attention(config: ModelConfig, family: Family, keeps_kv: bool) -> Iterator[Tensor]:
    hidden, dim = config.number("hidden_size"), config.head_dim
    q, kv = config.num_heads * dim, config.num_kv_heads * dim
    bias = _is(config, family.qkv_bias)
    gate = 2 if config.model_type == "qwen3_next" else 1  # half of the projection gates the output
    yield from _projection("q_proj", gate * q, hidden, bias)
    if keeps_kv:
        yield from _projection("k_proj", kv, hidden, bias)
        yield from _projection("v_proj", kv, hidden, bias)
    yield from _projection("o_proj", hidden, q, _is(config, family.o_bias))
    if config.model_type == "gpt_oss":
        yield vector("sinks", config.num_heads)
    if family.qk_norm and _is(config, family.qk_norm_if):
        sizes = {"head": (dim, dim), "each": (q, kv), "width": (q, kv)}[family.qk_norm]
        for size in sizes * family.qk_norm_vectors:
            yield vector("qk_norm", size)


def _latent_attention(config: ModelConfig, family: Family) -> Iterator[Tensor]:
    """Multi-head latent attention (DeepSeek-AI 2024): q, and k with v, through narrow matrices."""
    hidden, heads, bias = config.number("hidden_size"), config.num_heads, _is(config, family.o_bias)
    rank, rope = config.number("kv_lora_rank"), config.number("qk_rope_head_dim")
    nope, v_dim = config.number("qk_nope_head_dim"), config.number("v_head_dim")
    q_rank = config.get("q_lora_rank")
    q = heads * (nope + rope)
    if q_rank is None:
        yield linear("q_proj", q, hidden)
    else:
        q_rank = config.number("q_lora_rank")
        yield from _projection("q_a_proj", q_rank, hidden, bias, split=False)
        yield vector("q_a_layernorm", q_rank)
        yield linear("q_b_proj", q, q_rank)
    yield from _projection("kv_a_proj", rank + rope, hidden, bias, split=False)
    yield vector("kv_a_layernorm", rank)
    yield linear("kv_b_proj", heads * (nope + v_dim), rank)
    yield from _projection("o_proj", hidden, heads * v_dim, bias)


# ---- feed-forward ------------------------------------------------------------------------------


def _dense_size(config: ModelConfig) -> int:
    hidden = config.number("hidden_size")
    if config.model_type == "llama4_text":
        return config.number("intermediate_size_mlp")
    if config.model_type == "recurrent_gemma":
        return config.number("intermediate_size") // 2
    size = config.number("intermediate_size", 4 * hidden)
    if config.model_type == "lfm2" and config.flag("block_auto_adjust_ff_dim", True):
        size, multiple = int(2 * size / 3), config.number("block_multiple_of")
        size = int(config.get("block_ffn_dim_multiplier", 1) * size)
        size = multiple * -(-size // multiple)
    return size


def _mlp(
    name: str, config: ModelConfig, family: Family, size: int, copies: int = 1, active: int = 1
) -> Iterator[Tensor]:
    hidden = config.number("hidden_size")
    role: Literal["expert", "linear"] = "expert" if name == "expert" else "linear"
    bias = role == "linear" and _is(config, family.mlp_bias)  # experts of a mixture have none
    for matrix in ("gate", "up") if family.gated else ("up",):
        yield Tensor(f"{name}.{matrix}", role, (size, hidden), copies, active)
        if bias:
            yield vector(f"{name}.{matrix}.bias", size)
    yield Tensor(f"{name}.down", role, (hidden, size), copies, active)
    if bias:
        yield vector(f"{name}.down.bias", hidden)


def _is_moe(config: ModelConfig, i: int) -> bool:
    """Whether layer i has experts, by whichever of the ways of saying so its config uses."""
    num_experts = config.number("num_experts", 0, least=0)
    if config.model_type in ("granitemoe", "granitemoehybrid"):
        return True  # with no expert, the shared one is left
    if num_experts < 2:
        return False
    if config.get("expert_layer_period") is not None:
        period = config.number("expert_layer_period")
        return i % period == config.number("expert_layer_offset", 0, least=0)
    if config.get("moe_layer_interval") is not None:
        first = config.number("moe_layer_start_index", 0, least=0)
        last = config.number("moe_layer_end_index", config.num_layers - 1, least=-1)
        last = config.num_layers - 1 if last == -1 else last
        return (i + 1) % config.number("moe_layer_interval") == 0 and first <= i <= last
    listed = config.numbers("moe_layers")
    if listed is not None:
        return i in listed
    if config.get("interleave_moe_layer_step") is not None:
        return (i + 1) % config.number("interleave_moe_layer_step") == 0
    if i in (config.numbers("mlp_only_layers") or ()):
        return False
    step = config.number("decoder_sparse_step", 1)
    return i >= config.number("first_k_dense_replace", 0, least=0) and (i + 1) % step == 0


def _experts(config: ModelConfig, family: Family) -> Iterator[Tensor]:
    hidden = config.number("hidden_size")
    experts = config.number("num_experts", 0, least=0)
    if experts:
        active = config.number("num_experts_per_tok")
        if active > experts:
            raise InvalidSpec(
                f"num_experts_per_tok is {active} and there are {experts} experts in the config"
            )
        size = config.number("moe_intermediate_size", config.get("intermediate_size"))
        yield Tensor("router", "router", (experts, hidden))
        yield from _mlp("expert", config, family, size, experts, active)
    if config.model_type == "gpt_oss":
        yield vector("router.bias", experts)
        yield Tensor("expert.gate_up.bias", "vector", (2 * size,), experts, active)
        yield Tensor("expert.down.bias", "vector", (hidden,), experts, active)
    if config.model_type == "ernie4_5_moe":
        yield vector("router.correction", experts)
    shared = _shared_size(config)
    if shared:
        yield from _mlp("shared_expert", config, family, shared)
    if config.model_type in ("qwen2_moe", "qwen3_next"):
        yield Tensor("shared_expert_gate", "router", (1, hidden))


def _shared_size(config: ModelConfig) -> int:
    """Width of the experts that every token goes to, as one feed-forward layer."""
    for name in (
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ):
        if config.get(name) is not None:
            return config.number(name, least=0)
    if config.model_type == "llama4_text":
        return config.number("intermediate_size")
    shared = config.number("n_shared_experts", config.get("moe_num_shared_experts", 0), least=0)
    return shared * config.number("moe_intermediate_size", 0, least=0)


# ---- parts -------------------------------------------------------------------------------------


def _is(config: ModelConfig, flag: str | bool) -> bool:
    return flag if isinstance(flag, bool) else config.flag(flag)


def _projection(
    name: str, rows: int, columns: int, bias: bool, split: bool = True
) -> Iterator[Tensor]:
    yield linear(name, rows, columns, split)
    if bias:
        yield vector(f"{name}.bias", rows)
