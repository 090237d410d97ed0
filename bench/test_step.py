"""A step through KVCache: what the whole costs on the host besides the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from test_manager import tokens

torch = pytest.importorskip("torch")

from pagedkv import KVCache, KVSpec  # noqa: E402

LAYERS = 32


def test_decode_step_with_writes(measure: Callable[..., Any], full: bool) -> None:
    """Heads of one element, so that next to nothing is copied: plan, tensors, 32 writes, commit."""
    batch = 256 if full else 8
    spec = KVSpec(LAYERS, 1, 1, "float32", block_size=16)
    with KVCache(spec, num_device_blocks=batch * 100, max_model_len=4096, max_batch=batch) as kv:
        ids = np.array([kv.create() for _ in range(batch)])
        lengths = np.array([1000 + i % 16 for i in range(batch)])
        with kv.step(ids, tokens(int(lengths.sum()), 2), counts=lengths):
            pass
        new = tokens(batch, 1)
        k, v = torch.ones(batch, 1, 1), torch.full((batch, 1, 1), 2.0)

        def decode() -> None:
            with kv.step(ids, new) as step:
                _ = step.input_ids, step.positions, step.seq_lens, step.block_tables
                for layer in range(LAYERS):
                    kv.write(layer, k, v, step)

        measure("decode step, 256 x 1k, 32 writes", decode, iterations=8)
        with kv.step(ids, new) as step:
            kv.write(LAYERS - 1, k, v, step)
            found = kv.gather(LAYERS - 1, step)
            last = step.seq_lens.long() - 1
        assert (found[0][torch.arange(batch), 0, last] == 1).all()
        assert (found[1][torch.arange(batch), 0, last - 1] == 2).all()
        kv.manager.verify()


def test_write(measure: Callable[..., Any], full: bool) -> None:
    """One of those writes."""
    batch = 256 if full else 8
    with KVCache(KVSpec(1, 1, 1, "float32"), num_device_blocks=batch, max_batch=batch) as kv:
        ids = np.array([kv.create() for _ in range(batch)])
        k = torch.ones(batch, 1, 1)
        with kv.step(ids) as step:
            measure("write, 256 x 1", lambda: kv.write(0, k, k, step), iterations=64)
