"""PagedCache refused, out of blocks, interrupted, closed; and what it says of itself."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models_tiny as tiny  # noqa: E402
from pagedkv import KVCache, KVSpec  # noqa: E402
from pagedkv.errors import InvalidSpec, InvalidState, OutOfBlocks  # noqa: E402
from pagedkv.integrations.transformers import CacheStats, PagedCache  # noqa: E402
from requests_tiny import (  # noqa: E402
    PROMPT,
    dense,
    failing,
    generate,
    held,
    other_tail,
    paged,
    prompt,
    small,
    unattached,
)

# -- wrong use, and failures ----------------------------------------------------------------------


def test_another_prompt_than_started() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        cache.start(ids)
        before = held(cache)
        with pytest.raises(InvalidState, match="start\\(\\) was given another prompt"):
            generate(model, cache, other_tail(ids, 30))
        assert held(cache) == before
        assert generate(model, cache, ids).tolist() == dense(model, ids).tolist()


def test_a_batch_that_does_not_continue_the_rows() -> None:
    model, three = tiny.model("llama"), tiny.prompts("three")["input_ids"]
    with paged(model) as cache:
        cache.prefill(model, three)
        before = held(cache)
        with pytest.raises(InvalidSpec, match="a batch of 2 cannot continue the 3 rows"):
            generate(model, cache, three[:2])
        assert held(cache) == before
        assert generate(model, cache, three).tolist() == dense(model, three).tolist()


def test_out_of_blocks_while_generating() -> None:
    model, ids = tiny.model("llama"), prompt()
    attention = model.config._attn_implementation
    with small(model, 4) as cache:
        with pytest.raises(OutOfBlocks) as raised:
            generate(model, cache, ids, new=60)
        assert (raised.value.needed, raised.value.available) == (1, 0)
        length, tables, num_active, _ = held(cache)
        assert (length, len(tables), num_active) == (64, 1, 4)
        assert model.config._attn_implementation == attention
        cache.crop(PROMPT - 1)  # what is held is right: go on from the prompt
        assert generate(model, cache, ids).tolist() == dense(model, ids).tolist()
        cache.reset()
        tiny.check_empty(cache.kv)
        assert generate(model, cache, ids).tolist() == dense(model, ids).tolist()


def test_out_of_blocks_when_beams_fork() -> None:
    model, ids = tiny.model("llama"), prompt()
    with small(model, 5) as cache:
        cache.prefill(model, ids)
        before = held(cache)
        with pytest.raises(OutOfBlocks):  # 3 blocks of the prompt, 3 copies of its open one
            generate(model, cache, ids, num_beams=4)
        assert held(cache) == before
        assert generate(model, cache, ids).tolist() == dense(model, ids).tolist()


def test_out_of_blocks_for_a_prompt() -> None:
    model, ids = tiny.model("llama"), prompt()
    with small(model, 2) as cache:
        for start in (False, True):
            if start:
                cache.start(ids)
            with pytest.raises(OutOfBlocks):
                generate(model, cache, ids)
            assert (cache.get_seq_length(), cache.kv.stats().device.num_active) == (0, 0)
            cache.reset()
            tiny.check_empty(cache.kv)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("attached", [True, False])
def test_a_forward_that_raises_leaves_the_cache_as_it_was(attached: bool, rows: int) -> None:
    model = tiny.model("llama") if attached else tiny.bare_model()
    ids, options = prompt(), {"num_beams": rows}
    with paged(model) if attached else unattached(model) as cache:
        with failing(model, 1), pytest.raises(RuntimeError, match="this layer fails"):
            generate(model, cache, ids, **options)
        cache.prefill(model, ids)
        before = cache.get_seq_length(), cache.stats().num_blocks
        assert before == (PROMPT - 1, 3)
        with failing(model, 1), pytest.raises(RuntimeError, match="this layer fails"):
            generate(model, cache, ids, **options)
        if attached:
            assert held(cache)[0] == PROMPT - 1
            assert cache.stats().num_rows == 1
        assert cache.get_seq_length() == PROMPT - 1
        found = generate(model, cache, ids, **options)
        assert found.tolist() == dense(model, ids, **options).tolist()
        cache.reset()
        tiny.check_empty(cache.kv)


# -- layers, figures, life ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer 1.*'chunked'"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer 0.*'linear_attention'"),
        ({"layers_block_type": ["attention", "mamba"]}, "layer 1.*'mamba'"),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, "layer 0.*'mamba'"),
        ({"kv_lora_rank": 8}, "layer 0.*'latent'"),
    ],
)
def test_layers_that_cannot_be_held_are_named(config: dict[str, Any], named: str) -> None:
    model = tiny.bare_model()
    for field, value in config.items():
        setattr(model.config, field, value)
    with pytest.raises(InvalidSpec, match=named):
        PagedCache.for_model(model, "4MiB")
    assert not model._forward_pre_hooks  # it is not attached


def test_sliding_window_layers_are_stored_in_full() -> None:
    model, ids = tiny.model("mistral"), prompt()
    assert model.config.sliding_window == 24
    with paged(model) as cache:
        assert generate(model, cache, ids).tolist() == dense(model, ids).tolist()
        assert cache.get_seq_length() == PROMPT + 19
        assert cache.stats().num_blocks == 4  # 56 tokens, not the 24 of the window
        assert cache.is_sliding == [False, False]
        assert cache.get_mask_sizes(1, 0) == (PROMPT + 20, 0)


def test_stats() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        spec = cache.kv.spec
        assert cache.stats() == CacheStats(0, 0, 0, 0, 0, 0, 0, 0, 0)
        cache.prefill(model, ids)
        generate(model, cache, ids, num_beams=4, new=2)
        stats = cache.stats()
        assert (stats.num_rows, stats.length) == (4, PROMPT + 1)
        tables = [cache.kv.manager.block_table(int(row)).tolist() for row in cache._rows.ids]
        times = Counter(block for table in tables for block in table)
        assert stats.num_blocks == len(times)
        assert stats.num_shared_blocks == sum(n > 1 for n in times.values())
        assert [n for n in times.values() if n == 4] == [4, 4]  # the prompt's two full blocks
        assert stats.num_copies >= 3
        assert stats.kv_bytes == stats.num_blocks * spec.block_bytes
        assert stats.kv_bytes <= stats.peak_bytes <= 8 * spec.block_bytes
        assert stats.dense_peak_bytes == 4 * (PROMPT + 1) * spec.token_bytes
        cache.reset()
        after = cache.stats()
        assert (after.num_rows, after.length, after.num_blocks, after.kv_bytes) == (0, 0, 0, 0)
        assert (after.peak_bytes, after.num_copies) == (stats.peak_bytes, stats.num_copies)
        assert after.dense_peak_bytes == stats.dense_peak_bytes


def test_reset_and_reuse() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        for seed, options in enumerate(({}, {"num_beams": 4}, {}, {"num_return_sequences": 2})):
            options = options | {"do_sample": "num_return_sequences" in options}
            ids = prompt(seed)
            found = generate(model, cache, ids, **options)
            assert found.tolist() == dense(model, ids, **options).tolist()
            cache.reset()
            cache.reset()  # again is harmless
            assert (cache.get_seq_length(), repr(cache)) == (0, "PagedCache(0 rows of 0 tokens)")
            tiny.check_empty(cache.kv)


def test_a_closed_cache_refuses_use() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        generate(model, cache, ids)
    cache.close()  # again is harmless
    for use in (
        lambda: generate(model, cache, ids),
        lambda: cache.prefill(model, ids),
        lambda: cache.start(ids),
    ):
        with pytest.raises(InvalidState, match="closed"):
            use()
    assert dense(model, ids).tolist() == dense(model, ids).tolist()


def test_a_cache_that_nobody_has_is_gone_without_a_collection() -> None:
    model = tiny.model("llama")
    cache = paged(model)
    generate(model, cache, prompt(), num_beams=2)
    gone = weakref.ref(cache)
    gc.collect()
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_no_row_is_no_request() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        cache.prefill(model, ids)
        cache.batch_select_indices(torch.tensor([False]))
        assert (cache.get_seq_length(), len(cache._rows)) == (0, 0)
        tiny.check_empty(cache.kv)
        assert generate(model, cache, ids).tolist() == dense(model, ids).tolist()


@pytest.mark.parametrize("ids", [[[1, 2]], torch.ones(1, 4)])
def test_prompts_that_are_no_ids(ids: Any) -> None:
    message = "expected a tensor of token ids"
    with paged(tiny.model("llama")) as cache, pytest.raises(InvalidSpec, match=message):
        cache.start(ids)


def test_what_is_no_model_or_still_learns_is_named() -> None:
    with pytest.raises(InvalidSpec, match="model is 'gpt2', expected a model of transformers"):
        PagedCache.for_model("gpt2")
    with pytest.raises(InvalidSpec, match="expected a KVCache"):
        PagedCache(tiny.model("llama"))
    model = copy.deepcopy(tiny.model("llama")).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with (
        paged(model) as cache,
        pytest.raises(InvalidState, match=r"dropout, 0\.1: call model\.eval"),
    ):
        generate(model, cache, prompt())


def test_the_context_closes_after_an_error() -> None:
    model = tiny.model("llama")
    cache = paged(model)
    with pytest.raises(IndexError), cache:
        cache.prefill(model, torch.full((1, 3), tiny.VOCAB))
    with pytest.raises(InvalidState, match="closed"):
        cache.prefill(model, prompt())


def test_close_leaves_a_kvcache_of_the_users_open() -> None:
    model, ids = tiny.bare_model(), prompt()
    with KVCache(KVSpec.from_config(model.config, dtype="float32"), device_memory="4MiB") as kv:
        with PagedCache(kv) as cache:
            generate(model, cache, ids)
        tiny.check_empty(kv)
        with PagedCache(kv) as cache:
            assert generate(model, cache, ids).tolist() == dense(model, ids).tolist()
