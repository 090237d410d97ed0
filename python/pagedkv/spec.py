"""What a model keeps per token, and how many bytes that is. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pagedkv.errors import InvalidSpec

__all__ = ["DTYPE_BYTES", "KVSpec", "LayerSpec"]

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}

Kind = Literal["full", "sliding"]


def _check(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidSpec(f"{name} is {value!r}, expected an int of {least} or more")
    return value


@dataclass(frozen=True)
class LayerSpec:
    """Keys and values of one attention layer.

    Attributes:
        kind: "full" attention, or "sliding", of which tokens older than `window` are masked.
        num_kv_heads: heads of K and of V.
        k_dim, v_dim: elements of one head of K and of V.
        dtype: storage type, one of DTYPE_BYTES.
        window: tokens that a sliding layer sees, None for a full one.
    """

    kind: Kind
    num_kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str
    window: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("full", "sliding"):
            raise InvalidSpec(f'kind is {self.kind!r}, expected "full" or "sliding"')
        for name in ("num_kv_heads", "k_dim", "v_dim"):
            _check(name, getattr(self, name))
        if self.dtype not in DTYPE_BYTES:
            raise InvalidSpec(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
        if (self.window is None) != (self.kind == "full"):
            raise InvalidSpec(f"window is {self.window} in a {self.kind} layer")
        if self.window is not None:
            _check("window", self.window)

    @property
    def k_bytes(self) -> int:
        """Bytes of one token's keys: num_kv_heads * k_dim * bytes per element."""
        return self.num_kv_heads * self.k_dim * DTYPE_BYTES[self.dtype]

    @property
    def v_bytes(self) -> int:
        """Bytes of one token's values: num_kv_heads * v_dim * bytes per element."""
        return self.num_kv_heads * self.v_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, init=False)
class KVSpec:
    """The KV cache of a model: its attention layers and the number of tokens in a block.

        KVSpec(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=16)
        KVSpec(layers=[LayerSpec(...), ...], block_size=16)

    Raises:
        InvalidSpec: a field is missing, of the wrong type or out of range.
    """

    layers: tuple[LayerSpec, ...]
    block_size: int

    def __init__(
        self,
        num_layers: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dtype: str = "bfloat16",
        block_size: int = 16,
        *,
        layers: Sequence[LayerSpec] | None = None,
    ) -> None:
        if layers is None:
            heads, dim = _check("num_kv_heads", num_kv_heads), _check("head_dim", head_dim)
            layer = LayerSpec("full", heads, dim, dim, str(dtype).removeprefix("torch."))
            layers = [layer] * _check("num_layers", num_layers)
        elif not (num_layers is num_kv_heads is head_dim is None):
            raise InvalidSpec("layers is given beside num_layers, num_kv_heads or head_dim")
        if not layers or not all(isinstance(layer, LayerSpec) for layer in layers):
            raise InvalidSpec("layers is empty or holds something else than LayerSpec")
        if _check("block_size", block_size) > 4096:
            raise InvalidSpec(f"block_size is {block_size}, expected 1 to 4096")
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "block_size", block_size)

    @classmethod
    def from_config(cls, config: Any, *, dtype: str | None = None, block_size: int = 16) -> KVSpec:
        """The spec of a Hugging Face config: the object, or the dict of its config.json.

        `dtype` replaces the config's own. Raises InvalidSpec naming a field that is missing.
        """
        text = _get(config, "text_config") or config
        num_layers = _need(text, "num_hidden_layers", "n_layer", "num_layers")
        num_heads = _need(text, "num_attention_heads", "n_head")
        num_kv_heads = _get(text, "num_key_value_heads") or num_heads
        head_dim = _get(text, "head_dim")
        if head_dim is None:
            head_dim = _need(text, "hidden_size", "n_embd") // num_heads
        if dtype is None:
            dtype = _get(text, "dtype", "torch_dtype") or _get(config, "dtype", "torch_dtype")
            dtype = "float32" if dtype is None else dtype
        dtype = str(dtype).removeprefix("torch.")
        window = _get(text, "sliding_window")
        if _get(text, "use_sliding_window") is False:
            window = None
        layers = []
        for i, kind in enumerate(_layer_kinds(text, num_layers, window)):
            if kind in ("full_attention", "attention"):
                layers.append(LayerSpec("full", num_kv_heads, head_dim, head_dim, dtype))
            elif kind == "sliding_attention" and window is not None:
                layers.append(LayerSpec("sliding", num_kv_heads, head_dim, head_dim, dtype, window))
            else:
                raise InvalidSpec(
                    f"layer {i} is of kind {kind!r}, expected full_attention, or "
                    "sliding_attention with a sliding_window"
                )
        return cls(layers=layers, block_size=block_size)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token: the sum over layers of heads * (k_dim + v_dim) * element bytes."""
        return sum(layer.k_bytes + layer.v_bytes for layer in self.layers)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: token_bytes * block_size."""
        return self.token_bytes * self.block_size

    def pool_bytes(self, num_blocks: int) -> int:
        """Bytes of a pool of `num_blocks` usable blocks: block 0, padding, comes on top."""
        return (num_blocks + 1) * self.block_bytes

    def num_blocks(self, memory: int) -> int:
        """Usable blocks in a pool of `memory` bytes."""
        return max(0, memory // self.block_bytes - 1)


def _get(config: Any, *names: str) -> Any:
    """The first of these fields that is there and not None."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return None


def _layer_kinds(config: Any, num_layers: int, window: int | None) -> Sequence[str]:
    """What each layer keeps, in the words of the config where it has some."""
    if _get(config, "kv_lora_rank") is not None:  # latent attention keeps one vector per token
        return ["mla"] * num_layers
    kinds: Sequence[str] | None = _get(config, "layer_types", "layers_block_type")
    if kinds is not None:
        return kinds
    period, offset = _get(config, "attn_layer_period"), _get(config, "attn_layer_offset") or 0
    if period is not None:
        return ["attention" if i % period == offset else "mamba" for i in range(num_layers)]
    return ["full_attention" if window is None else "sliding_attention"] * num_layers


def _need(config: Any, *names: str) -> int:
    value = _get(config, *names)
    if value is None:
        raise InvalidSpec(f"the config has no {names[0]}: give a KVSpec of your own")
    return _check(names[0], value)
