"""How the blocks of a pool are divided among layers that keep different lengths.

Layers that see everything need blocks for the whole sequence, windowed ones stop. So that one pool
serves both, layers are put into groups of equally many: a block belongs to one group and holds
`block_size` tokens of its layers. The number of layers in a group is that of the rarest kind, and a
kind that it does not divide is filled up with padding layers, which cost memory and hold nothing.
(So does vLLM's hybrid memory allocator.) Recurrent state is kept beside the pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pagedkv.spec import KVSpec, LayerSpec

__all__ = ["LayerGroup", "Pool"]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share block tables.

    Attributes:
        window: tokens that its layers see; None for all.
        num_layers: real layers.
        num_padding: layers that hold nothing, so that all groups are equal.
    """

    window: int | None
    num_layers: int
    num_padding: int


@dataclass(frozen=True)
class Pool:
    """The blocks of one GPU.

    Attributes:
        spec: what the model keeps, on this GPU.
        block: the KVSpec of one block: its `block_bytes`, `num_blocks(memory)` and
            `pool_bytes(num_blocks)` are those that KVCache allocates with.
        groups: one, or several that take a block each for the same tokens.
    """

    spec: KVSpec
    block: KVSpec
    groups: tuple[LayerGroup, ...]

    @classmethod
    def of(cls, spec: KVSpec, *, capped: bool = True) -> Pool:
        """The groups of a model. Not `capped`: windows are stored in full, as KVCache does it.

        A model that keeps nothing per token has no groups, and a pool of no block.
        """
        layers = [layer for layer in spec.layers if layer.token_bytes]
        if not layers:
            return cls(spec, spec, ())
        by_window = Counter(layer.window if capped else None for layer in layers)
        if len(by_window) == 1:
            window = next(iter(by_window))
            block = KVSpec(layers=layers, block_size=spec.block_size)
            return cls(spec, block, (LayerGroup(window, len(layers), 0),))
        size = _group_size(list(by_window.values()))
        widest = max(layers, key=lambda layer: layer.token_bytes)
        groups = []
        for window, number in by_window.items():
            for first in range(0, number, size):
                real = min(size, number - first)
                groups.append(LayerGroup(window, real, size - real))
        block = KVSpec(layers=[_plain(widest)] * size, block_size=spec.block_size)
        return cls(spec, block, tuple(groups))

    @property
    def block_bytes(self) -> int:
        return self.block.block_bytes if self.groups else 0

    def num_blocks(self, memory: int) -> int:
        """Usable blocks in so many bytes: one more is padding."""
        return self.block.num_blocks(max(0, memory)) if self.groups else 0

    def pool_bytes(self, num_blocks: int) -> int:
        return self.block.pool_bytes(num_blocks) if self.groups else 0

    def num_tokens(self, num_blocks: int) -> int:
        """Tokens of cache: blocks shared out evenly to the groups, times block_size."""
        return num_blocks // len(self.groups) * self.spec.block_size if self.groups else 0

    def blocks(self, length: int, max_batched_tokens: int) -> int:
        """Blocks of one sequence of `length` tokens.

        A windowed group keeps at most the window and the tokens of one step, at any offset:
        ceil(min(window - 1 + max_batched_tokens, length) / block_size) + 1, if that is less.
        """
        return self.request_blocks(length, max_batched_tokens, 1, 0)

    def request_blocks(
        self, length: int, max_batched_tokens: int, sequences: int, prompt: int
    ) -> int:
        """Blocks of sequences of one length that share the full blocks of a prompt.

        What they share is counted once; what a window has passed is nobody's.
        """
        size = self.spec.block_size
        full, shared = -(-length // size), prompt // size
        whole = shared + sequences * (full - shared)
        total = 0
        for group in self.groups:
            if group.window is None:
                total += whole
            else:
                kept = -(-min(group.window - 1 + max_batched_tokens, length) // size) + 1
                total += min(whole, sequences * kept)
        return total

    def bytes_of(self, length: int, max_batched_tokens: int) -> int:
        """Bytes of one sequence: its blocks, and its recurrent state."""
        blocks = self.blocks(length, max_batched_tokens)
        return blocks * self.block_bytes + self.spec.state_bytes


def _group_size(counts: Sequence[int]) -> int:
    """Layers per group: of the rarest kind, or of the commonest if no kind is much rarer."""
    least, most = min(counts), max(counts)
    return most if most < 1.5 * least else least


def _plain(layer: LayerSpec) -> LayerSpec:
    """The layer as far as a block goes: without a window, without state."""
    kind: Literal["full", "latent"] = "latent" if layer.kind == "latent" else "full"
    return LayerSpec(kind, layer.num_kv_heads, layer.k_dim, layer.v_dim, layer.dtype)
