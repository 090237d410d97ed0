"""What takes memory beside weights, K and V: formulas with a band, since kernels decide.

Every estimate is fitted to, or read from, published logs of an engine (vLLM); see docs/planner.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.config import ModelConfig
from pagedkv.units import GiB

__all__ = [
    "Component",
    "activation_bytes",
    "activations",
    "exactly",
    "non_torch",
    "outside",
    "roughly",
]

_LABELS = {"kv_cache": "K and V", "non-torch": "overhead"}


@dataclass(frozen=True)
class Component:
    """A part of one GPU's memory.

    Attributes:
        name: what it is.
        num_bytes: what is counted with.
        exact: whether that is known to the byte.
        low, high: the band of an estimate; both num_bytes where exact.
        source: how it was found.
    """

    name: str
    num_bytes: int
    exact: bool
    low: int
    high: int
    source: str

    @property
    def label(self) -> str:
        """The name as people read it."""
        return _LABELS.get(self.name, self.name)


def exactly(name: str, num_bytes: int, source: str) -> Component:
    return Component(name, num_bytes, True, num_bytes, num_bytes, source)


def roughly(name: str, num_bytes: int, low: int, high: int, source: str) -> Component:
    return Component(name, num_bytes, False, max(0, low), high, source)


def activation_bytes(
    config: ModelConfig, *, max_num_seqs: int, max_batched_tokens: int, element: int, tp: int
) -> int:
    """Peak of a forward pass, the larger of its two ends:

        sampling   38.2 * S * V + 2.7 * T * H
        layers     T * b * (3 * I / tp + 4 * H)

    S sequences, V words, T tokens in a step, H hidden size, b bytes per element, I intermediate
    size, of a mixture the active experts'. The constants are fitted to seven published profiles of
    vLLM, within 0.01 GiB; three others differ by 0.01, 0.25 and more: hence the band. Sampling is
    not divided among GPUs.
    """
    hidden, vocab = config.number("hidden_size"), config.number("vocab_size")
    wide = config.number("intermediate_size", 4 * hidden)
    if config.number("num_experts", 0, least=0) > 1:
        expert = config.number("moe_intermediate_size", wide)
        wide = expert * config.number("num_experts_per_tok", 1)
    sampling = 38.2 * max_num_seqs * vocab + 2.7 * max_batched_tokens * hidden
    layers = max_batched_tokens * element * (3 * wide / tp + 4 * hidden)
    return int(max(sampling, layers))


def activations(num_bytes: int) -> Component:
    band = int(0.3 * GiB)
    return roughly(
        "activations", num_bytes, num_bytes - band, num_bytes + band, "fitted to profiles"
    )


def non_torch(tp: int) -> Component:
    """Communication buffers and libraries: 0.07 to 0.26 GiB on one GPU, more where GPUs talk."""
    name, source = "non-torch", "published logs"
    if tp == 1:
        return roughly(name, int(0.16 * GiB), int(0.07 * GiB), int(0.26 * GiB), source)
    return roughly(name, int(0.55 * GiB), int(0.40 * GiB), int(0.90 * GiB), source)


def outside() -> tuple[Component, ...]:
    """What an engine's utilization leaves room for, and does not count."""
    return (
        roughly(
            "CUDA context", int(0.47 * GiB), int(0.41 * GiB), int(0.53 * GiB), "published logs"
        ),
        roughly("CUDA graphs", int(0.6 * GiB), int(0.2 * GiB), int(1.3 * GiB), "published logs"),
    )
