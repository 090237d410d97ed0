"""Caches, prompts and watched forwards of the tests of PagedCache's requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

import models_tiny as tiny
from pagedkv import KVCache, KVSpec
from pagedkv.integrations.transformers import PagedCache

PROMPT = 37  # tokens: two blocks of 16 and 5 of a third


def paged(model: Any, memory: str | int = "4MiB", **options: Any) -> PagedCache:
    return PagedCache.for_model(model, memory, **options)


def small(model: Any, num_blocks: int) -> PagedCache:
    """A cache of `num_blocks` usable blocks of 16 tokens."""
    spec = KVSpec.from_config(model.config, dtype="float32")
    return paged(model, spec.pool_bytes(num_blocks))


def unattached(model: Any) -> PagedCache:
    spec = KVSpec.from_config(model.config, dtype="float32")
    return PagedCache(KVCache(spec, device_memory="4MiB"))


def prompt(seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCAB, (1, PROMPT), generator=generator)


def other_tail(ids: torch.Tensor, begin: int) -> torch.Tensor:
    """`ids` with every token from `begin` on replaced by another one."""
    changed = ids.clone()
    changed[:, begin:] = (changed[:, begin:] - 3 + 100) % (tiny.VOCAB - 3) + 3
    return changed


def generate(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "eos_token_id": None, **options}
    return tiny.generate(model, cache, input_ids=ids, **options)


def dense(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return generate(model, DynamicCache(config=model.config), ids, **options)


@contextmanager
def forwards(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens per row of each forward that the layers of `model` see."""
    seen: list[tuple[int, int]] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def failing(model: Any, layer: int) -> Iterator[None]:
    """In here the layer raises before it computes anything."""

    def fail(*args: Any) -> None:
        raise RuntimeError("this layer fails")

    handle = model.model.layers[layer].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def held(cache: PagedCache) -> tuple[Any, ...]:
    """What must not change when a call is refused."""
    cache.kv.manager.verify()
    tables = [cache.kv.manager.block_table(int(row)).tolist() for row in cache._rows.ids]
    device = cache.kv.stats().device
    return cache.get_seq_length(), tables, device.num_active, cache.kv.stats().num_sequences
