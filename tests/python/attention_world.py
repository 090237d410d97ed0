"""Sequences of a cache, steps over mixed batches of them, and dense attention to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import pagedkv as pk


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Causal attention of the last len(q) tokens to those from `first` on, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
    keys = torch.arange(len(k), device=q.device)
    hidden = (keys > at) | (keys < first)
    if window is not None:
        hidden |= keys <= at - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


class AttentionWorld:
    """Random K, V and queries in layer 0 of a cache."""

    def __init__(self, kv: pk.KVCache, query_heads: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.kv, self.query_heads, self.dtype = kv, query_heads, dtype
        self.random = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.random)
        return values.to(self.kv.device, self.dtype)

    def new(self, lengths: Sequence[int]) -> list[int]:
        """Sequences that hold that much."""
        ids = [self.kv.create() for _ in lengths]
        old = [(i, n) for i, n in zip(ids, lengths, strict=True) if n]
        if old:
            self.step([i for i, _ in old], [n for _, n in old], lambda q, step: None)
        return ids

    def step(
        self, ids: Any, counts: Sequence[int], attend: Callable[[torch.Tensor, pk.Step], Any]
    ) -> tuple[torch.Tensor, Any]:
        """Append to all; the queries, and what `attend(queries, step)` gave."""
        layer, total = self.kv.spec.layers[0], sum(counts)
        k = self.randn(total, layer.num_kv_heads, layer.k_dim)
        v = self.randn(total, layer.num_kv_heads, layer.v_dim)
        q = self.randn(total, self.query_heads, layer.query_dim)
        with self.kv.step(np.array(ids), counts=np.array(counts)) as step:
            self.kv.write(0, k, v, step)
            return q, attend(q, step)

    def stored(self, id: int) -> list[torch.Tensor]:
        """The sequence's real keys and values, through its block table."""
        table = torch.from_numpy(self.kv.block_table(id)).long().to(self.kv.device)
        return [
            pool[table].double().flatten(0, 1)[: self.kv.length(id)] * scale
            for pool, scale in zip(self.kv.read(0), self.kv.scales[0], strict=True)
        ]

    def expected(
        self, ids: Any, counts: Sequence[int], q: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        rows = q.split(list(counts))
        kept = [self.stored(int(i)) for i in ids]
        if self.kv.spec.layers[0].kind == "latent":
            kept = [[torch.cat((latent, turned), -1), latent] for latent, turned in kept]
        return torch.cat(
            [dense(new, k, v, **options) for (k, v), new in zip(kept, rows, strict=True)]
        )

    def check(self, backend: str, ids: Any, counts: Sequence[int], **options: Any) -> None:
        """One step, whose attention has to be dense attention's."""
        q, found = self.step(
            ids, counts, lambda q, step: self.kv.attention(0, q, step, backend=backend, **options)
        )
        assert found.dtype == self.dtype
        expected = self.expected(ids, counts, q, **options)
        wide = self.dtype == torch.float32
        atol, rtol = (2e-5, 1e-4) if wide else (2e-2, 2e-2)
        torch.testing.assert_close(found.double(), expected, atol=atol, rtol=rtol)
