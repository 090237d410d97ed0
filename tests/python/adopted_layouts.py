"""The tensors that engines keep K and V in, as views [N, P, H, D] of each layer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402

L, N, P, H, D = 2, 12, 4, 2, 8
SPEC = pk.KVSpec(L, H, D, "float16", P)
MLA = pk.KVSpec(layers=[pk.LayerSpec("full", 1, 24, 8, "bfloat16")] * L, block_size=P)
DEVICE = "cpu"  # another one for tests of it

Layers = list[tuple[Any, Any]]


def noise(*shape: int, dtype: Any = None) -> Any:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
    return values.to(DEVICE, dtype or torch.float16)


def vllm() -> Layers:
    return [(t[0], t[1]) for t in (noise(2, N, P, H, D) for _ in range(L))]


def vllm_hnd() -> Layers:
    tensors = [noise(2, N, H, P, D).transpose(2, 3) for _ in range(L)]
    return [(t[0], t[1]) for t in tensors]


def flashinfer_nhd() -> Layers:
    return [(t[:, 0], t[:, 1]) for t in (noise(N, 2, P, H, D) for _ in range(L))]


def flashinfer_hnd() -> Layers:
    tensors = [noise(N, 2, H, P, D).transpose(2, 3) for _ in range(L)]
    return [(t[:, 0], t[:, 1]) for t in tensors]


def side_by_side() -> Layers:
    return [(t[..., 0, :], t[..., 1, :]) for t in (noise(N, P, H, 2, D) for _ in range(L))]


def all_layers_in_a_block() -> Layers:
    t = noise(N, L, 2, P, H, D)
    return [(t[:, i, 0], t[:, i, 1]) for i in range(L)]


def all_layers_in_a_token() -> Layers:
    t = noise(N, P, L, 2, H, D)
    return [(t[:, :, i, 0], t[:, :, i, 1]) for i in range(L)]


def with_gaps_between_blocks() -> Layers:
    return [(t[:, 1], t[:, 3]) for t in (noise(N, 5, P, H, D) for _ in range(L))]


def keys_transposed() -> Layers:
    return [(noise(N, H, D, P).permute(0, 3, 1, 2), noise(N, P, H, D)) for _ in range(L)]


def elements_before_heads() -> Layers:
    tensors = [noise(2, N, P, D, H).transpose(3, 4) for _ in range(L)]
    return [(t[0], t[1]) for t in tensors]


def mla() -> Layers:
    tensors = [noise(N, P, 32, dtype=torch.bfloat16) for _ in range(L)]
    return [(t[..., None, :24], t[..., None, 24:]) for t in tensors]


def mla_in_two() -> Layers:
    """Where one head is all heads, "HND" is "NHD"."""
    sizes = [(N, 1, P, 24), (N, 1, P, 8)]
    tensors = [[noise(*size, dtype=torch.bfloat16).transpose(1, 2) for size in sizes] for _ in "01"]
    return [(k, v) for k, v in tensors]


def heads_of_one_element() -> Layers:
    """Whose stride from element to element is anything."""
    tensors = [noise(2, N, P, 1, H).transpose(3, 4) for _ in range(L)]
    return [(t[0], t[1]) for t in tensors]


# What each is to be taken for: all a token has in one run, pieces that swap moves of a block.
LAYOUTS: dict[Callable[[], Layers], tuple[bool, int]] = {
    vllm: (True, 2 * L),
    vllm_hnd: (False, 2 * L),
    flashinfer_nhd: (True, L),
    flashinfer_hnd: (False, L),
    side_by_side: (False, L),
    all_layers_in_a_block: (True, 1),
    all_layers_in_a_token: (False, 1),
    with_gaps_between_blocks: (True, 2 * L),
    keys_transposed: (False, 2 * L),
    elements_before_heads: (False, 2 * L),
    mla: (False, L),
    mla_in_two: (True, 2 * L),
    heads_of_one_element: (True, 2 * L),
}


def spec_of(make: Callable[[], Layers]) -> pk.KVSpec:
    if make is heads_of_one_element:
        return pk.KVSpec(L, H, 1, "float16", P)
    return MLA if make in (mla, mla_in_two) else SPEC
