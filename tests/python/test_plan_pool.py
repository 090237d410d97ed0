"""The pool of a plan: what KVCache allocates, layer groups, what sequences take of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pagedkv as pk
from pagedkv.planner.groups import Pool

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "dtype": "float16",
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
SMALL_WINDOWS = {
    **SMALL, "model_type": "gemma2", "head_dim": 16, "sliding_window": 100, "num_hidden_layers": 5,
}  # fmt: skip


@pytest.mark.parametrize("config", [SMALL, SMALL_WINDOWS], ids=["full", "windows"])
@pytest.mark.parametrize("layout", ["block_major", "layer_major"])
@pytest.mark.parametrize("kv_dtype", ["auto", "float32", "fp8"])
def test_kvcache_allocates_what_the_plan_says(
    config: dict[str, Any], layout: Any, kv_dtype: str
) -> None:
    pytest.importorskip("torch")
    plan = pk.plan_memory(
        config, 48 * 2**20, kv_dtype=kv_dtype, windows="full", max_batched_tokens=64,
        max_num_seqs=8, non_torch_memory=0, input_len=100, output_len=20,
    )  # fmt: skip
    assert plan.kv.num_blocks > 100
    assert plan.kv.block_bytes == plan.spec.block_bytes
    with pk.KVCache(plan.spec, num_device_blocks=plan.kv.num_blocks, layout=layout) as kv:
        held = sum(t.nbytes for layer in kv.pools() for t in layer)
        assert held == kv.pool_bytes == plan.kv.pool_bytes == plan.components[1].num_bytes
    budget = plan.usable_bytes - sum(p.num_bytes for p in plan.components if p.name != "kv_cache")
    assert plan.kv.pool_bytes <= budget < plan.kv.pool_bytes + plan.kv.block_bytes
    with pk.KVCache(plan.spec, device_memory=budget, layout=layout) as kv:
        assert kv.manager.num_device_blocks == plan.kv.num_blocks


def test_kvcache_runs_out_where_the_plan_says() -> None:
    """So many sequences of this length fit, and one more does not: through the real manager."""
    plan = pk.plan_memory(
        SMALL, 20 * 2**20, max_batched_tokens=64, max_num_seqs=8, non_torch_memory=0,
        input_len=500, output_len=13, activation_memory="10MiB", samples=3,
    )  # fmt: skip
    manager = pk.BlockManager(plan.kv.num_blocks, max_batch=4096, max_model_len=4096)
    groups = 0
    try:
        while True:
            prompt = manager.create()
            manager.commit(manager.append([prompt], counts=[500]))
            ids = manager.fork(prompt, 3)
            manager.commit(manager.append(ids, counts=[13] * 3))
            groups += 1
    except pk.OutOfBlocks:
        pass
    needed = Pool.of(plan.spec).request_blocks(513, 64, 3, 500)
    assert groups == plan.kv.num_blocks // needed


def naive_blocks(window: int, steps: int, length: int, block: int, first: int) -> int:
    """The most blocks that a windowed layer holds at once: token by token, step by step.

    A block is given up once no token to come sees a token in it.
    """
    held: set[int] = set()
    most, done, size = 0, 0, first
    while done < length:
        now = min(size, length - done)
        held |= {t // block for t in range(done, done + now)}
        most = max(most, len(held))
        done += now
        seen_from = done - window + 1  # the next token sees this one and later ones
        held = {b for b in held if (b + 1) * block > seen_from}
        size = steps
    return most


@settings(max_examples=150, deadline=None)
@given(
    window=st.integers(1, 60), steps=st.integers(1, 40), length=st.integers(1, 300),
    block=st.sampled_from([1, 2, 4, 8, 16]), first=st.integers(1, 40),
)  # fmt: skip
def test_windowed_layers_never_hold_more(
    window: int, steps: int, length: int, block: int, first: int
) -> None:
    layer = pk.LayerSpec("sliding", 1, 4, 4, "float16", window=window)
    pool = Pool.of(pk.KVSpec(layers=[layer], block_size=block))
    planned = pool.blocks(length, steps)
    assert naive_blocks(window, steps, length, block, min(first, steps)) <= planned
    assert planned <= -(-length // block)


@pytest.mark.parametrize(
    ("length", "steps", "expected"),
    [(200, 7, 5), (200, 8, 6), (200, 11, 6), (200, 12, 7), (12, 7, 3), (16, 7, 4), (20, 7, 5),
     (1000, 1, 4)],
)  # fmt: skip
def test_blocks_of_a_windowed_layer(length: int, steps: int, expected: int) -> None:
    """A window of 10 tokens in blocks of 4: ceil((9 + steps) / 4) + 1, and no more than all."""
    layer = pk.LayerSpec("sliding", 1, 4, 4, "float16", window=10)
    assert Pool.of(pk.KVSpec(layers=[layer], block_size=4)).blocks(length, steps) == expected


def test_the_bound_of_windowed_layers_is_reached() -> None:
    layer = pk.LayerSpec("sliding", 1, 4, 4, "float16", window=10)
    pool = Pool.of(pk.KVSpec(layers=[layer], block_size=4))
    planned = pool.blocks(200, 7)
    assert planned == max(naive_blocks(10, 7, 200, 4, first) for first in range(1, 8))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({None: 12, 128: 12}, [(12, 0), (12, 0)]),
        ({None: 21, 4096: 21}, [(21, 0), (21, 0)]),
        ({None: 10, 1024: 52}, [(10, 0)] + [(10, 0)] * 5 + [(2, 8)]),
        ({None: 10, 512: 12}, [(10, 2), (12, 0)]),
        ({None: 7}, [(7, 0)]),
    ],
)
def test_layer_groups(counts: dict[int | None, int], expected: list[tuple[int, int]]) -> None:
    layers = []
    for window, number in counts.items():
        kind: Any = "sliding" if window else "full"
        layers += [pk.LayerSpec(kind, 2, 8, 8, "float16", window)] * number
    pool = Pool.of(pk.KVSpec(layers=layers, block_size=16))
    assert [(g.num_layers, g.num_padding) for g in pool.groups] == expected
    assert pool.block_bytes == (expected[0][0] + expected[0][1]) * 64 * 16


@settings(max_examples=60, deadline=None)
@given(
    memory=st.integers(30, 400), length=st.integers(2, 4096), share=st.floats(0.05, 1),
    concurrency=st.integers(1, 20), samples=st.integers(1, 4), block=st.sampled_from([8, 16, 32]),
    windows=st.sampled_from(["capped", "full"]), config=st.sampled_from([SMALL, SMALL_WINDOWS]),
    kv_dtype=st.sampled_from(["auto", "fp8"]),
)  # fmt: skip
def test_a_plan_adds_up(
    memory: int, length: int, share: float, concurrency: int, samples: int, block: int,
    windows: str, config: dict[str, Any], kv_dtype: str,
) -> None:  # fmt: skip
    prompt = int(share * length)
    plan = pk.plan_memory(
        config, memory * 2**20, input_len=prompt, output_len=length - prompt,
        concurrency=concurrency, samples=samples, block_size=block, windows=windows,
        kv_dtype=kv_dtype, non_torch_memory=0, max_num_seqs=100, max_batched_tokens=128,
    )  # fmt: skip
    total = sum(part.num_bytes for part in plan.components)
    if plan.kv.num_blocks:
        assert total <= plan.usable_bytes
        assert plan.usable_bytes - total < plan.kv.block_bytes
    assert plan.fits == (
        plan.kv.needed_blocks <= plan.kv.num_blocks
        and plan.kv.sequence_blocks <= plan.kv.num_blocks
    )
    assert plan.kv.needed_blocks <= concurrency * samples * plan.kv.sequence_blocks
    assert plan.kv.needed_blocks >= concurrency * plan.kv.sequence_blocks
    for policy in plan.policies:
        shares = (policy.tokens, policy.reserved, policy.internal, policy.external, policy.free)
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert min(shares) >= -1e-9
    frontier = plan.grid.frontier
    assert list(frontier) == sorted(frontier, reverse=True)


def test_naive_waste_of_one_load() -> None:
    """Slot by slot: 10 sequences, one token of output after another, in 16-token blocks."""
    plan = pk.plan_memory(SMALL, 20 * 2**20, input_len=100, output_len=60, max_model_len=512,
                          max_batched_tokens=64, activation_memory="10MiB",
                          non_torch_memory=0)  # fmt: skip
    pool = plan.kv.num_blocks * 16
    lengths = range(100, 161)
    stored = sum(lengths) / len(lengths)
    blocks = sum(-(-n // 16) for n in lengths) / len(lengths)
    by_name = {p.name: p for p in plan.policies}
    contiguous, power = by_name["contiguous-max"], by_name["contiguous-pow2"]
    assert contiguous.requests == pool // 512
    assert contiguous.tokens == pytest.approx(contiguous.requests * stored / pool)
    assert contiguous.internal == pytest.approx(contiguous.requests * (512 - 160) / pool)
    assert power.requests == pool // (100 + 64)
    paged = by_name["paged"]
    assert paged.requests == int(pool / 16 // blocks)
    assert paged.internal == pytest.approx(paged.requests * (16 * blocks - stored) / pool)
    assert paged.requests > contiguous.requests * 2


def test_a_power_of_two_is_no_longer_than_the_longest_sequence() -> None:
    load: dict[str, Any] = {"max_batched_tokens": 64, "activation_memory": "10MiB"}
    plan = pk.plan_memory(SMALL, 20 * 2**20, input_len=200, output_len=100, max_model_len=320,
                          non_torch_memory=0, **load)  # fmt: skip
    by_name = {p.name: p for p in plan.policies}
    power = by_name["contiguous-pow2"]
    assert power.requests == plan.kv.num_blocks * 16 // 320
    assert power == replace(by_name["contiguous-max"], name=power.name)


def test_recurrent_state_takes_its_share_of_a_full_memory() -> None:
    load: dict[str, Any] = {"max_model_len": 8192, "input_len": 100, "output_len": 100}
    plan = pk.plan_memory("Jamba-v0.1", "H200", concurrency=4, **load)
    paged = next(p for p in plan.policies if p.name == "paged")
    assert paged.request_bytes > plan.kv.model_state_bytes
    assert pk.plan_memory("Jamba-v0.1", "H200", concurrency=paged.requests // 2, **load).fits
    assert not pk.plan_memory("Jamba-v0.1", "H200", concurrency=2 * paged.requests, **load).fits


def test_what_the_grid_calls_possible_fits() -> None:
    plan = pk.plan_memory("Llama-3.1-8B", "A100-80GB", max_model_len=8192)
    assert max(plan.grid.frontier) == plan.load.max_num_seqs == 256
    for context, most in zip(plan.grid.contexts, plan.grid.frontier, strict=True):
        again = pk.plan_memory("Llama-3.1-8B", "A100-80GB", max_model_len=8192,
                               input_len=context - 1, output_len=1, concurrency=most)  # fmt: skip
        assert again.fits, context


def test_without_a_longest_sequence_the_model_s_is_reserved() -> None:
    plan = pk.plan_memory("Llama-3.1-8B", "A100-80GB", input_len=1024, output_len=512)
    most = next(p for p in plan.policies if p.name == "contiguous-max")
    assert most.requests == plan.kv.num_tokens // 131_072
    assert most.internal > 0.5
