"""The tensors of layers that keep a state instead of K and V."""

from __future__ import annotations

from collections.abc import Iterator

from pagedkv.config import ModelConfig
from pagedkv.layer_kinds import mamba_inner
from pagedkv.planner.tensors import Tensor, linear, vector

__all__ = ["recurrent_tensors"]


def recurrent_tensors(config: ModelConfig, kind: str) -> Iterator[Tensor]:
    """Those of the layer's mixer; none for other kinds of layers."""
    if kind in ("mamba", "hybrid"):
        first = config.model_type in ("jamba", "mamba", "falcon_mamba")
        yield from _mamba(config) if first else _mamba2(config)
    elif kind == "delta":
        yield from _gated_delta(config)
    elif kind == "lightning":
        yield from _lightning(config)
    elif kind == "conv":
        yield from _short_conv(config)
    elif kind == "rg_lru":
        yield from _rg_lru(config)


def _mamba(config: ModelConfig) -> Iterator[Tensor]:
    """Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"."""
    hidden, inner, state = config.number("hidden_size"), mamba_inner(config), _state(config)
    rank = config.get("mamba_dt_rank", "auto")
    rank = -(-hidden // 16) if rank == "auto" else config.number("mamba_dt_rank")
    yield Tensor("A_log", "vector", (inner, state))
    yield vector("D", inner)
    yield from _conv(config, inner)
    yield linear("in_proj", 2 * inner, hidden)
    yield linear("x_proj", rank + 2 * state, inner)
    yield linear("dt_proj", inner, rank)
    yield vector("dt_proj.bias", inner)
    yield linear("out_proj", hidden, inner)
    if config.flag("mamba_proj_bias", config.flag("use_bias")):
        yield vector("in_proj.bias", 2 * inner)
        yield vector("out_proj.bias", hidden)
    if config.model_type == "jamba":
        for size in (rank, state, state):
            yield vector("layernorm", size)


def _mamba2(config: ModelConfig) -> Iterator[Tensor]:
    """Dao and Gu 2024, "Transformers are SSMs"."""
    hidden, inner, state = config.number("hidden_size"), mamba_inner(config), _state(config)
    heads = config.number("mamba_n_heads", config.get("num_heads"))
    channels = inner + 2 * config.number("mamba_n_groups", 1) * state
    for name in ("dt_bias", "A_log", "D"):
        yield vector(name, heads)
    yield from _conv(config, channels)
    yield linear("in_proj", inner + channels + heads, hidden)
    yield linear("out_proj", hidden, inner)
    if config.model_type != "falcon_h1" or config.flag("mamba_rms_norm"):
        yield vector("norm", inner)
    bias = config.flag("mamba_proj_bias") or config.flag("use_bias")
    if bias:
        yield vector("in_proj.bias", inner + channels + heads)
    if config.flag("projectors_bias") if config.model_type == "falcon_h1" else bias:
        yield vector("out_proj.bias", hidden)


def _state(config: ModelConfig) -> int:
    return config.number("mamba_d_state")


def _conv(config: ModelConfig, channels: int) -> Iterator[Tensor]:
    yield Tensor("conv1d", "vector", (channels, config.number("mamba_d_conv")))
    if config.flag("mamba_conv_bias", True):
        yield vector("conv1d.bias", channels)


def _gated_delta(config: ModelConfig) -> Iterator[Tensor]:
    """Yang et al. 2024, "Gated Delta Networks"."""
    hidden, heads = config.number("hidden_size"), config.number("linear_num_value_heads")
    keys = config.number("linear_num_key_heads") * config.number("linear_key_head_dim")
    dim = config.number("linear_value_head_dim")
    values = heads * dim
    yield linear("in_proj_qkvz", 2 * keys + 2 * values, hidden)
    yield linear("in_proj_ba", 2 * heads, hidden)
    kernel = config.number("linear_conv_kernel_dim")
    yield Tensor("conv1d", "vector", (2 * keys + values, kernel))
    yield vector("dt_bias", heads)
    yield vector("A_log", heads)
    yield vector("norm", dim)
    yield linear("out_proj", hidden, values)


def _lightning(config: ModelConfig) -> Iterator[Tensor]:
    """MiniMax 2025, "MiniMax-01: Scaling Foundation Models with Lightning Attention"."""
    hidden, width = config.number("hidden_size"), config.num_heads * config.head_dim
    yield linear("qkv_proj", 3 * width, hidden)
    yield linear("output_gate", width, hidden)
    yield linear("out_proj", hidden, width)
    yield vector("norm", width)


def _short_conv(config: ModelConfig) -> Iterator[Tensor]:
    hidden, bias = config.number("hidden_size"), config.flag("conv_bias")
    yield linear("in_proj", 3 * hidden, hidden)
    yield Tensor("conv", "vector", (hidden, config.number("conv_L_cache")))
    yield linear("out_proj", hidden, hidden)
    for size in (3 * hidden, hidden, hidden) if bias else ():
        yield vector("bias", size)


def _rg_lru(config: ModelConfig) -> Iterator[Tensor]:
    """De et al. 2024, "Griffin: Mixing Gated Linear Recurrences with Local Attention"."""
    hidden, heads = config.number("hidden_size"), config.num_heads
    width = config.number("lru_width", hidden)
    for name, rows, columns in (("linear_y", width, hidden), ("linear_x", width, hidden),
                                ("linear_out", hidden, width)):  # fmt: skip
        yield linear(name, rows, columns)
        yield vector(f"{name}.bias", rows)
    yield Tensor("conv_1d", "vector", (width, config.number("conv1d_width")))
    yield vector("conv_1d.bias", width)
    yield vector("recurrent_param", width)
    for name in ("input_gate", "recurrent_gate"):
        yield Tensor(name, "vector", (width, width // heads))
        yield vector(f"{name}.bias", width)
