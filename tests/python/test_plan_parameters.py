"""Parameter counts and K and V bytes beside transformers' own models, made without memory."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import pagedkv  # noqa: E402
from pagedkv import KVSpec  # noqa: E402
from pagedkv.config import ModelConfig  # noqa: E402
from pagedkv.planner.families import FAMILIES  # noqa: E402
from pagedkv.planner.parameters import count, tensors  # noqa: E402

if not dataclasses.is_dataclass(transformers.LlamaConfig):
    pytest.skip("this transformers' configs are no dataclasses", allow_module_level=True)

SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 200}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT = {
    "kv_lora_rank": 24, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "n_routed_experts": 5, "n_shared_experts": 2, "moe_intermediate_size": 40,
    "first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# Sizes that divide badly, and every flag that changes a tensor.
ODD: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 2, "head_dim": 20, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "intermediate_size": 101}),
    ("mistral", {"num_key_value_heads": 3, "head_dim": 24}),
    ("mixtral", {"num_local_experts": 5, "num_key_value_heads": 2, "intermediate_size": 33}),
    ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 72, "decoder_sparse_step": 2,
                   "num_key_value_heads": 2, "qkv_bias": False}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 10, "attention_bias": True}),
    ("qwen3_moe", {**EXPERTS, "num_key_value_heads": 2, "mlp_only_layers": [1], "head_dim": 16}),
    ("qwen3_next", {**EXPERTS, "num_key_value_heads": 2, "shared_expert_intermediate_size": 30,
                    "num_hidden_layers": 5, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                    "linear_key_head_dim": 12, "linear_value_head_dim": 20, "head_dim": 18}),
    ("gemma", {"num_key_value_heads": 1, "head_dim": 32, "attention_bias": True}),
    ("gemma2", {"num_key_value_heads": 2, "head_dim": 30, "tie_word_embeddings": False}),
    ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 30, "attention_bias": True}),
    ("phi", {"num_key_value_heads": 2, "qk_layernorm": True, "intermediate_size": 50}),
    ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    ("phimoe", {"num_local_experts": 3, "num_key_value_heads": 2, "attention_bias": True,
                "lm_head_bias": True}),
    ("opt", {"word_embed_proj_dim": 48, "do_layer_norm_before": False, "ffn_dim": 70}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False, "ffn_dim": 70}),
    ("opt", {"_remove_final_layer_norm": True, "max_position_embeddings": 77}),
    ("gpt2", {"n_inner": 50, "n_positions": 33}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_neox", {"attention_bias": False, "intermediate_size": 64, "tie_word_embeddings": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"multi_query": False, "bias": True, "parallel_attn": False, "alibi": True}),
    ("bloom", {}),
    ("mpt", {}),
    ("starcoder2", {"num_key_value_heads": 2, "use_bias": False, "intermediate_size": 90}),
    ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True, "num_key_value_heads": 2}),
    ("stablelm", {"use_parallel_residual": True, "num_key_value_heads": 6}),
    ("cohere", {"use_qk_norm": True, "num_key_value_heads": 2, "attention_bias": True}),
    ("cohere2", {"num_key_value_heads": 2}),
    ("olmo2", {"num_key_value_heads": 2, "attention_bias": True}),
    ("olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 2,
               "intermediate_size": 44}),
    ("granite", {"num_key_value_heads": 2, "mlp_bias": True}),
    ("granitemoehybrid", {"num_local_experts": 0, "shared_intermediate_size": 55,
                          "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 24,
                          "mamba_d_state": 10, "layer_types": ["mamba", "attention", "mamba"]}),
    ("glm4", {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True,
              "pad_token_id": 0}),
    ("glm4_moe", {**EXPERTS, "n_routed_experts": 6, "num_key_value_heads": 2, "head_dim": 16,
                  "use_qk_norm": True, "first_k_dense_replace": 2}),
    ("dots1", {**EXPERTS, "n_routed_experts": 6, "n_shared_experts": 2, "num_key_value_heads": 2,
               "head_dim": 16, "first_k_dense_replace": 1, "attention_bias": True, "n_group": 1,
               "topk_group": 1}),
    ("ernie4_5", {"num_key_value_heads": 2, "use_bias": True, "head_dim": 16}),
    ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 36,
                      "moe_num_shared_experts": 1,
                      "num_key_value_heads": 2, "use_bias": True, "moe_layer_end_index": 2}),
    ("nemotron", {"num_key_value_heads": 2, "head_dim": 16, "mlp_bias": True}),
    ("llama4_text", {"num_local_experts": 3, "num_key_value_heads": 2, "head_dim": 16,
                     "interleave_moe_layer_step": 2, "intermediate_size_mlp": 66,
                     "moe_layers": [1]}),
    ("seed_oss", {"num_key_value_heads": 2, "head_dim": 16, "attention_out_bias": True}),
    ("smollm3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    ("lfm2", {"num_key_value_heads": 2, "conv_bias": True, "block_multiple_of": 16,
              "layer_types": ["conv", "full_attention", "conv"]}),
    ("recurrent_gemma", {"num_key_value_heads": 2, "lru_width": 96, "head_dim": 16,
                         "intermediate_size": 120}),
    ("deepseek_v2", {**LATENT}),
    ("deepseek_v2", {**LATENT, "q_lora_rank": 20, "attention_bias": True}),
    ("deepseek_v3", {**LATENT, "q_lora_rank": 20, "attention_bias": True}),
    ("deepseek_v3", {**LATENT}),
    ("gpt_oss", {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 16}),
    ("jamba", {"num_key_value_heads": 2, "num_experts": 3, "num_hidden_layers": 9,
               "mamba_d_state": 7, "mamba_d_conv": 3, "mamba_dt_rank": "auto",
               "mamba_proj_bias": True, "mamba_conv_bias": False}),
    ("mamba", {"state_size": 9, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False}),
    ("mamba2", {"state_size": 9, "num_heads": 12, "head_dim": 16, "n_groups": 2,
                "use_bias": True}),
    ("bamba", {"num_key_value_heads": 2, "mamba_n_heads": 12, "mamba_d_head": 16,
               "mamba_proj_bias": True, "attn_layer_indices": [1]}),
    ("falcon_h1", {"num_key_value_heads": 2, "mamba_d_ssm": 48, "mamba_n_heads": 4,
                   "mamba_d_head": 12, "mamba_rms_norm": True, "projectors_bias": True}),
    ("nemotron_h", {"num_key_value_heads": 2, "mamba_num_heads": 4, "mamba_head_dim": 8,
                    "ssm_state_size": 6, "n_groups": 2, "moe_intermediate_size": 28,
                    "moe_shared_expert_intermediate_size": 32, "use_bias": True,
                    "layers_block_type": ["mamba", "mlp", "attention", "moe"]}),
    ("minimax", {"num_key_value_heads": 2, "num_local_experts": 3, "head_dim": 16}),
]  # fmt: skip


def make_config(model_type: str, fields: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(transformers.CONFIG_MAPPING[model_type])}
    same = {"hidden_size": ("n_embd", "d_model"), "num_hidden_layers": ("n_layer", "n_layers"),
            "num_attention_heads": ("n_head", "n_heads")}  # fmt: skip
    sizes = {}
    for name, value in SIZES.items():
        sizes[next((n for n in (name, *same.get(name, ())) if n in known), name)] = value
    if model_type in ("mamba", "mamba2", "nemotron_h"):  # no heads, or as many layers as kinds
        sizes = {k: v for k, v in sizes.items() if k not in ("num_attention_heads", "num_heads")}
    if model_type == "nemotron_h":
        sizes = {k: v for k, v in sizes.items() if k != "num_hidden_layers"}
        sizes["num_attention_heads"] = 6
    return transformers.CONFIG_MAPPING[model_type](**{**sizes, **fields})


def parameters(config: Any) -> int:
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    finally:
        logging.disable(logging.NOTSET)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("model_type", "fields"), ODD, ids=[f"{t}-{i}" for i, (t, _) in
                                                             enumerate(ODD)])  # fmt: skip
def test_counts_are_those_of_the_model(model_type: str, fields: dict[str, Any]) -> None:
    try:
        config = make_config(model_type, fields)
        expected = parameters(config)
    except (TypeError, AttributeError, KeyError) as error:  # this transformers cannot make it
        pytest.skip(f"{model_type}: {error}")
    for told in (config, json.loads(config.to_json_string(use_diff=False))):
        assert count(ModelConfig.read(told)) == expected
        KVSpec.from_config(told, dtype="bfloat16")


def test_most_families_were_compared() -> None:
    assert len({model_type for model_type, _ in ODD}) > 40
    assert set(FAMILIES) >= {model_type for model_type, _ in ODD}


# Made with the sizes that the class has by default; where it can be made from these at all.
BY_DEFAULT = sorted(
    (set(FAMILIES) & set(transformers.CONFIG_MAPPING))
    - {"glm4_moe", "ministral", "nemotron", "dots1"}
)


@pytest.mark.parametrize("model_type", BY_DEFAULT)
def test_what_a_file_leaves_out_is_the_class_s_default(model_type: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type]()
    sparse = json.loads(config.to_json_string(use_diff=True))
    sparse["hidden_size"] = config.hidden_size
    sparse["num_hidden_layers"] = config.num_hidden_layers
    if model_type == "deepseek_v2":  # its class leaves this open
        sparse["num_experts_per_tok"] = 6
    assert count(ModelConfig.read(sparse)) == parameters(config)


def test_the_table_of_defaults_is_that_of_transformers() -> None:
    file = Path(pagedkv.__file__).with_name("config_defaults.json")
    compared = 0
    for model_type, defaults in json.loads(file.read_text()).items():
        if model_type not in transformers.CONFIG_MAPPING:
            continue
        found = {
            f.name: f.default
            for f in dataclasses.fields(transformers.CONFIG_MAPPING[model_type])
            if isinstance(f.default, (int, float, str, bool))
        }
        for name, value in defaults.items():
            if name in found:
                assert found[name] == value, f"{model_type}: {name}"
                compared += 1
    assert compared > 500


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 10}),
        ("falcon", {}),
        ("gpt2", {}),
        ("opt", {}),
        ("phi3", {"num_key_value_heads": 3, "pad_token_id": 0}),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 20, "sliding_window": 64}),
        ("gpt_oss", {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 16}),
        ("mixtral", {"num_local_experts": 3, "num_key_value_heads": 2}),
    ],
)
def test_token_bytes_are_what_a_dense_cache_holds(model_type: str, fields: dict[str, Any]) -> None:
    config = make_config(model_type, fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        held = model(torch.arange(17)[None], use_cache=True).past_key_values
    size = sum(x.nbytes for layer in held.layers for x in (layer.keys, layer.values))
    spec = KVSpec.from_config(config, dtype="float32")
    assert spec.kept_bytes(17) == size == 17 * spec.token_bytes


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_the_language_model_of_a_multimodal_one(model_type: str) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config = transformers.CONFIG_MAPPING[model_type]()
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    expected = sum(p.numel() for p in model.model.language_model.parameters())
    head = sum(t.num_elements for t in tensors(ModelConfig.read(config)) if t.role == "head")
    assert count(ModelConfig.read(config)) == expected + head


def test_an_expert_is_met_by_some_tokens_only() -> None:
    config = ModelConfig.read(
        make_config("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2})
    )
    experts = [t for t in tensors(config) if t.role == "expert"]
    assert sum(t.num_elements for t in experts) == 2 * sum(t.num_active for t in experts)
    others = count(config) - sum(t.num_elements for t in experts)
    assert count(config, active=True) == others + sum(t.num_active for t in experts)
