"""What a model keeps per token, and how many bytes that is. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from pagedkv.config import ModelConfig
from pagedkv.config import check_int as _check
from pagedkv.errors import InvalidSpec
from pagedkv.layer_kinds import (
    attentions_per_layer,
    layer_kinds,
    shared_layers,
    state_elements,
    window_of,
)

__all__ = ["DTYPE_BYTES", "KVSpec", "LayerSpec"]

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}

Kind = Literal["full", "sliding", "chunked", "latent", "state"]
_KINDS = ("full", "sliding", "chunked", "latent", "state")


@dataclass(frozen=True)
class LayerSpec:
    """What one layer keeps of a sequence.

        LayerSpec("full", 8, 128, 128, "bfloat16")
        LayerSpec("sliding", 8, 128, 128, "bfloat16", window=4096)
        LayerSpec("latent", 1, 512, 64, "bfloat16")            # kv_lora_rank, qk_rope_head_dim
        LayerSpec("state", 0, 0, 0, "bfloat16", state_bytes=311_296)

    Attributes:
        kind: "full" attention; "sliding", of which tokens older than `window` are masked;
            "chunked", of which tokens before the last multiple of `window` are; "latent", which
            keeps one vector per token, of which K and V are made, and beside it the part of K that
            turns with the position; "state", which keeps the same bytes for a sequence of any
            length: a recurrent layer, or with `state_bytes` 0 one that keeps nothing.
        num_kv_heads: heads of K and of V.
        k_dim, v_dim: elements of one head of K and of V; of a latent layer those of its vector, and
            of the part beside it.
        dtype: storage type, one of DTYPE_BYTES.
        window: tokens that a sliding or chunked layer sees, None for all others.
        state_bytes: bytes per sequence that do not grow, beside K and V or instead of them.
    """

    kind: Kind
    num_kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str
    window: int | None = None
    state_bytes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InvalidSpec(f"kind is {self.kind!r}, expected one of {', '.join(_KINDS)}")
        for name in ("num_kv_heads", "k_dim", "v_dim"):
            value = _check(name, getattr(self, name), 0 if self.kind == "state" else 1)
            if self.kind == "state" and value:
                raise InvalidSpec(f"{name} is {value} in a state layer, expected 0")
        if self.kind == "latent" and self.num_kv_heads != 1:
            raise InvalidSpec(f"num_kv_heads is {self.num_kv_heads} in a latent layer, expected 1")
        if self.dtype not in DTYPE_BYTES:
            raise InvalidSpec(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
        if (self.window is None) == (self.kind in ("sliding", "chunked")):
            raise InvalidSpec(f"window is {self.window} in a {self.kind} layer")
        if self.window is not None:
            _check("window", self.window)
        _check("state_bytes", self.state_bytes, 0)

    @cached_property
    def k_bytes(self) -> int:
        """Bytes of one token's keys: num_kv_heads * k_dim * bytes per element."""
        return self.num_kv_heads * self.k_dim * DTYPE_BYTES[self.dtype]

    @cached_property
    def v_bytes(self) -> int:
        """Bytes of one token's values: num_kv_heads * v_dim * bytes per element."""
        return self.num_kv_heads * self.v_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token: k_bytes + v_bytes."""
        return self.k_bytes + self.v_bytes

    @cached_property
    def query_dim(self) -> int:
        """Elements of a head's query: k_dim. To a latent layer, whose keys are all of it, both."""
        return self.k_dim + self.v_dim if self.kind == "latent" else self.k_dim

    @cached_property
    def output_dim(self) -> int:
        """Elements of what attention gives a head: v_dim. Of a latent layer its vector's, k_dim."""
        return self.k_dim if self.kind == "latent" else self.v_dim

    def shard(self, tp: int) -> LayerSpec:
        """What one of `tp` GPUs keeps: its heads, or one where there are fewer than GPUs.

        A latent vector is every GPU's: it has no heads to divide.
        """
        heads = self.num_kv_heads if self.kind == "latent" else -(-self.num_kv_heads // tp)
        return replace(self, num_kv_heads=heads, state_bytes=-(-self.state_bytes // tp))


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
    def from_config(
        cls,
        config: Any,
        *,
        dtype: str | None = None,
        state_dtype: str | None = None,
        block_size: int = 16,
    ) -> KVSpec:
        """The spec of a Hugging Face config: the object, or the dict of its config.json.

        `dtype` replaces the config's own for K and V, `state_dtype` for recurrent state. Raises
        InvalidSpec naming a field that is missing, or a layer of a kind that is not known.
        """
        model = ModelConfig.read(config)
        kept = model.dtype or "float32"
        state_dtype = kept if state_dtype is None else state_dtype
        dtype = kept if dtype is None else str(dtype).removeprefix("torch.")
        kinds = layer_kinds(model)
        keeping = len(kinds) - shared_layers(model)
        layers = []
        for i, kind in enumerate(kinds):
            try:
                own = model.of_layer(i, kind)
                layer = _layer(own, kind if i < keeping else "none", dtype, state_dtype)
            except InvalidSpec as error:
                if kind in ("full", "sliding"):
                    raise
                raise InvalidSpec(f"layer {i} is of kind {kind!r}: {error}") from None
            layers += [layer] * attentions_per_layer(model)
        return cls(layers=layers, block_size=block_size)

    def require_kv(self) -> None:
        """Raise InvalidSpec, naming the layer, if KVCache cannot hold one of the layers yet.

        It holds what there is of every token: sliding and chunked layers in full.
        """
        for i, layer in enumerate(self.layers):
            if layer.kind == "state" or layer.state_bytes:
                kind = "state" if layer.kind == "state" else "hybrid"
                raise InvalidSpec(
                    f"layer {i} is of kind {kind!r}, which KVCache cannot hold yet, expected one "
                    "without recurrent state"
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token: the sum over layers of heads * (k_dim + v_dim) * element bytes."""
        return sum(layer.token_bytes for layer in self.layers)

    @property
    def growing_bytes(self) -> int:
        """Bytes that each further token of a long sequence adds: those of unwindowed layers."""
        return sum(layer.token_bytes for layer in self.layers if layer.window is None)

    @property
    def window_bytes(self) -> int:
        """Bytes at which the windowed layers of a sequence stop: window * token_bytes of each."""
        return sum(layer.window * layer.token_bytes for layer in self.layers if layer.window)

    @property
    def state_bytes(self) -> int:
        """Bytes per sequence that do not depend on its length."""
        return sum(layer.state_bytes for layer in self.layers)

    def kept_bytes(self, length: int) -> int:
        """Bytes of K and V that `length` tokens leave: min(window, length) in windowed layers."""
        return sum(layer.token_bytes * min(layer.window or length, length) for layer in self.layers)

    def shard(self, tp: int) -> KVSpec:
        """The spec of one of `tp` GPUs that divide the heads of each layer among them."""
        layers = [layer.shard(_check("tp", tp)) for layer in self.layers]
        return KVSpec(layers=layers, block_size=self.block_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: token_bytes * block_size."""
        return self.token_bytes * self.block_size

    def pool_bytes(self, num_blocks: int) -> int:
        """Bytes of a pool of `num_blocks` usable blocks: block 0, padding, comes on top."""
        return (num_blocks + 1) * self.block_bytes

    def num_blocks(self, memory: int) -> int:
        """Usable blocks in a pool of `memory` bytes.

        Raises InvalidSpec if no layer keeps anything per token, so that a block is 0 bytes.
        """
        if not self.block_bytes:
            raise InvalidSpec("no layer keeps K and V: expected one that is not of kind state")
        return max(0, memory // self.block_bytes - 1)


def _layer(model: ModelConfig, kind: str, dtype: str, state_dtype: str) -> LayerSpec:
    """What a layer of this kind of `layer_kinds` keeps; "none" is one that reads another's."""
    if state_dtype not in DTYPE_BYTES:
        raise InvalidSpec(f"dtype is {state_dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
    state = state_elements(model, kind) * DTYPE_BYTES[state_dtype]
    if kind == "latent":
        if model.get("index_topk") is not None:
            raise InvalidSpec(
                "it keeps an index beside its latents, to attend sparsely, which is neither "
                "counted nor held yet"
            )
        rank, turned = model.number("kv_lora_rank"), model.number("qk_rope_head_dim")
        return LayerSpec("latent", 1, rank, turned, dtype)
    if kind in ("full", "hybrid"):
        heads, dim = model.num_kv_heads, model.head_dim
        return LayerSpec("full", heads, dim, dim, dtype, None, state)
    if kind == "sliding":
        heads, dim = model.num_kv_heads, model.head_dim
        return LayerSpec("sliding", heads, dim, dim, dtype, window_of(model))
    if kind == "chunked":
        heads, dim = model.num_kv_heads, model.head_dim
        return LayerSpec("chunked", heads, dim, dim, dtype, model.number("attention_chunk_size"))
    return LayerSpec("state", 0, 0, 0, state_dtype, None, state)
