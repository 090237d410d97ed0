"""KVSpec, LayerSpec and sizes."""

from __future__ import annotations

from typing import Any

import pytest

import pagedkv
from pagedkv import InvalidSpec, KVSpec, LayerSpec
from pagedkv.units import format_bytes, parse_bytes


def test_bytes_of_llama_3_8b() -> None:
    spec = KVSpec(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=16)
    assert spec.token_bytes == 131_072
    assert spec.block_bytes == 2 * 2**20
    assert spec.pool_bytes(10) == 11 * spec.block_bytes
    assert spec.num_blocks(spec.pool_bytes(10)) == 10
    assert spec.num_blocks(spec.pool_bytes(10) - 1) == 9
    assert spec.num_blocks(1) == 0


def test_layers_may_differ() -> None:
    full = LayerSpec("full", 2, 64, 32, "float16")
    sliding = LayerSpec("sliding", 4, 64, 64, "float16", window=128)
    spec = KVSpec(layers=[full, sliding], block_size=8)
    assert spec.token_bytes == 2 * (64 + 32) * 2 + 4 * 128 * 2
    assert spec == KVSpec(layers=(full, sliding), block_size=8)
    assert hash(spec) == hash(KVSpec(layers=(full, sliding), block_size=8))
    assert "LayerSpec" in repr(spec)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "hidden_size": 4096, "torch_dtype": "bfloat16"},
            131_072,
        ),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 2 * 12 * 768 * 4),
        (
            {"text_config": {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 256,
                             "num_key_value_heads": 1, "dtype": "float16"}},
            2 * 2 * 256 * 2,
        ),
    ],
)  # fmt: skip
def test_from_config(config: dict[str, Any], expected: int) -> None:
    assert KVSpec.from_config(config).token_bytes == expected


def test_from_config_with_windows() -> None:
    config = {
        "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64,
        "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    spec = KVSpec.from_config(config)
    assert [layer.window for layer in spec.layers] == [32, None]
    assert [layer.window for layer in KVSpec.from_config({**config, "layer_types": None}).layers] \
        == [32, 32]  # fmt: skip
    off = KVSpec.from_config({**config, "layer_types": None, "use_sliding_window": False})
    assert [layer.window for layer in off.layers] == [None, None]
    with pytest.raises(InvalidSpec, match=r"layer 1 is of kind 'linear_attention'"):
        KVSpec.from_config({**config, "layer_types": ["full_attention", "linear_attention"]})


def test_from_config_names_a_missing_field() -> None:
    with pytest.raises(InvalidSpec, match="num_hidden_layers"):
        KVSpec.from_config({"hidden_size": 64})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_kv_heads": -1}, "num_kv_heads"),
        ({"head_dim": 1.5}, "head_dim"),
        ({"dtype": "int8"}, "dtype"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 5000}, "block_size"),
        ({"num_layers": True}, "num_layers"),
        ({"layers": []}, "layers"),
    ],
)
def test_bad_specs_name_the_field(arguments: dict[str, Any], named: str) -> None:
    good = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
    with pytest.raises(InvalidSpec, match=named):
        KVSpec(**{**good, **arguments})


def test_a_window_belongs_to_a_sliding_layer() -> None:
    with pytest.raises(InvalidSpec, match="window"):
        LayerSpec("full", 1, 8, 8, "float32", window=4)
    with pytest.raises(InvalidSpec, match="window"):
        LayerSpec("sliding", 1, 8, 8, "float32")
    with pytest.raises(InvalidSpec, match="kind"):
        LayerSpec("linear", 1, 8, 8, "float32")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (5, 5),
        ("5", 5),
        ("2GiB", 2 << 30),
        ("2GB", 2 * 10**9),
        ("1.5 MiB", 3 << 19),
        ("3kb", 3000),
        ("2gib", 2 << 30),
    ],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", [-1, "GiB", "2 XB", "2Gb", "", None, 1.5, True])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(InvalidSpec, match="memory is"):
        parse_bytes(size, "memory")


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 << 30, 5 << 40)] == [
        "0 B", "1023 B", "1.5 KiB", "3.0 GiB", "5.0 TiB",
    ]  # fmt: skip


LAYERS = {
    "full": LayerSpec("full", 2, 8, 8, "float16"),
    "sliding": LayerSpec("sliding", 2, 8, 8, "float16", window=10),
    "chunked": LayerSpec("chunked", 2, 8, 8, "float16", window=10),
    "latent": LayerSpec("latent", 1, 16, 8, "float16"),
    "state": LayerSpec("state", 0, 0, 0, "float16", state_bytes=100),
    "hybrid": LayerSpec("full", 2, 8, 8, "float16", state_bytes=7),
}


def test_bytes_of_every_kind_of_layer() -> None:
    spec = KVSpec(layers=list(LAYERS.values()), block_size=4)
    assert [layer.token_bytes for layer in spec.layers] == [64, 64, 64, 48, 0, 64]
    assert spec.token_bytes == 304
    assert spec.growing_bytes == 304 - 128
    assert spec.window_bytes == 2 * 10 * 64
    assert spec.state_bytes == 107
    assert spec.kept_bytes(7) == 7 * 304
    assert spec.kept_bytes(1000) == 1000 * 176 + 1280
    assert [layer.token_bytes for layer in spec.shard(2).layers] == [32, 32, 32, 48, 0, 32]
    assert spec.shard(8).layers[0].num_kv_heads == 1
    assert spec.shard(2).state_bytes == 54


@pytest.mark.parametrize("kind", ["state", "hybrid"])
def test_kvcache_names_the_layer_that_it_cannot_hold(kind: str) -> None:
    pytest.importorskip("torch")
    spec = KVSpec(layers=[LAYERS["full"], LAYERS["sliding"], LAYERS[kind]], block_size=4)
    with pytest.raises(InvalidSpec, match=f"layer 2 is of kind '{kind}', which KVCache cannot"):
        pagedkv.KVCache(spec, num_device_blocks=4)


def test_a_spec_without_k_and_v_has_no_blocks() -> None:
    with pytest.raises(InvalidSpec, match="no layer keeps K and V"):
        KVSpec(layers=[LAYERS["state"]]).num_blocks(10**9)


@pytest.mark.parametrize(
    "arguments",
    [
        ("latent", 1, 8, 0, "float16"),
        ("latent", 2, 8, 8, "float16"),
        ("state", 1, 8, 8, "float16"),
        ("full", 1, 8, 0, "float16"),
        ("latent", 1, 8, 8, "float16", 5),
        ("chunked", 1, 8, 8, "float16"),
        ("state", 0, 0, 0, "float16", None, -1),
    ],
)
def test_layers_that_contradict_themselves(arguments: Any) -> None:
    with pytest.raises(InvalidSpec):
        LayerSpec(*arguments)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"model_type": "gemma2", "sliding_window": 9}, "sfsf"),
        ({"model_type": "gemma3_text", "sliding_window": 9, "num_hidden_layers": 7}, "sssssfs"),
        ({"model_type": "gpt_oss", "sliding_window": 9}, "sfsf"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9,
          "max_window_layers": 3}, "fffs"),
        ({"model_type": "qwen2", "sliding_window": 9}, "ffff"),
        ({"model_type": "exaone4", "sliding_window": 9, "sliding_window_pattern": "LG"}, "sfsf"),
        ({"model_type": "llama4_text", "attention_chunk_size": 9}, "cccf"),
        ({"model_type": "bamba", "attn_layer_indices": [2], "mamba_n_heads": 4,
          "mamba_d_head": 32, "mamba_d_state": 8}, "mmfm"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-*E", "mamba_num_heads": 4,
          "mamba_head_dim": 8, "ssm_state_size": 8}, "m-f-"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 8, "qk_rope_head_dim": 4}, "llll"),
        ({"model_type": "longcat_flash", "kv_lora_rank": 8, "qk_rope_head_dim": 4,
          "num_hidden_layers": 2}, "llll"),  # two attentions in each
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 2, "sliding_window": 9,
          "layer_types": ["sliding_attention", "full_attention"] * 2}, "sf--"),
    ],
)  # fmt: skip
def test_kinds_of_layers(config: dict[str, Any], kinds: str) -> None:
    base = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "hidden_size": 32, "dtype": "float16"}  # fmt: skip
    found = ""
    for layer in KVSpec.from_config({**base, **config}).layers:
        mark = {"full": "f", "sliding": "s", "chunked": "c", "latent": "l", "state": "m"}[
            layer.kind
        ]
        found += "-" if layer.kind == "state" and not layer.state_bytes else mark
    assert found == kinds


@pytest.mark.parametrize("words", [{}, {"layer_types": ["indexed_attention"] * 2}])
def test_an_index_beside_latents_is_not_left_out_in_silence(words: dict[str, Any]) -> None:
    config = {
        "model_type": "deepseek_v32", "num_hidden_layers": 2, "num_attention_heads": 4,
        "hidden_size": 32, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "index_topk": 8,
        "index_head_dim": 16, **words,
    }  # fmt: skip
    with pytest.raises(InvalidSpec, match=r"layer 0 .* keeps an index beside its latents"):
        KVSpec.from_config(config)


GEMMA_4 = {
    "model_type": "gemma4_text", "num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("of_layers", "heads"),
    [
        ({"per_layer_config": {"01": {"head_dim": 32}}}, 2),
        ({"per_layer_config": {1: {"head_dim": 32, "num_key_value_heads": 1}}}, 1),
        ({"global_head_dim": 32}, 2),
        ({"global_head_dim": 32, "num_global_key_value_heads": 1}, 1),
    ],
)
def test_what_a_config_says_of_single_layers(of_layers: dict[str, Any], heads: int) -> None:
    sliding, full = KVSpec.from_config({**GEMMA_4, **of_layers}).layers
    assert (sliding.num_kv_heads, sliding.k_dim, sliding.v_dim) == (2, 16, 16)
    assert (full.num_kv_heads, full.k_dim, full.v_dim) == (heads, 32, 32)
