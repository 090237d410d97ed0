"""KVSpec, LayerSpec and sizes."""

from __future__ import annotations

from typing import Any

import pytest

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
    [(5, 5), ("5", 5), ("2GiB", 2 << 30), ("2GB", 2 * 10**9), ("1.5 MiB", 3 << 19), ("3kb", 3000)],
)
def test_sizes(size: int | str, expected: int) -> None:
    if size == "3kb":
        with pytest.raises(InvalidSpec, match="2GiB"):
            parse_bytes(size)
    else:
        assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", [-1, "GiB", "2 XB", "", None, 1.5, True])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(InvalidSpec, match="memory is"):
        parse_bytes(size, "memory")


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 << 30, 5 << 40)] == [
        "0 B", "1023 B", "1.5 KiB", "3.0 GiB", "5.0 TiB",
    ]  # fmt: skip
