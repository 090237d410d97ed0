"""The other parts of a plan: several GPUs, estimates, preemption, sharing, printing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import pagedkv as pk

GiB = 2**30


def test_several_gpus_divide_heads_and_weights() -> None:
    one = pk.plan_memory("Llama-3.1-70B", "H200", tp=1, max_model_len=8192)
    four = pk.plan_memory("Llama-3.1-70B", "H200", tp=4, max_model_len=8192)
    assert four.kv.token_bytes * 4 == one.kv.token_bytes == four.kv.model_token_bytes
    assert four.weights.num_bytes == pytest.approx(one.weights.num_bytes / 4, rel=0.001)
    sixteen = pk.plan_memory("Llama-3.1-70B", "H200", tp=16, max_model_len=8192)
    assert sixteen.kv.token_bytes == one.kv.token_bytes // 8  # 8 KV heads, on two GPUs each
    latent = pk.plan_memory("DeepSeek-V3", "H200", tp=8)
    assert latent.kv.token_bytes == latent.kv.model_token_bytes == 70_272


@pytest.mark.parametrize("tp", [3, 12])
def test_kv_heads_are_divided_too(tp: int) -> None:
    """Llama-3.2-3B has 24 heads and 8 KV heads."""
    with pytest.raises(
        pk.InvalidSpec, match="or not its 8 KV heads: expected one of 1, 2, 4, 8, 24"
    ):
        pk.plan_memory("Llama-3.2-3B", "L4", tp=tp)
    assert pk.plan_memory("Llama-3.2-3B", "L4", tp=24).kv.token_bytes * 8 == 114_688


def test_a_host_tier_is_divided_among_the_gpus() -> None:
    plan = pk.plan_memory("Llama-3-8B", "A100-80GB", tp=2, host_memory="32GiB")
    assert plan.preemption.host_blocks == 16 * GiB // 2**20 - 1


def test_one_sequence_of_the_longest_must_fit() -> None:
    """So engines refuse to start, whatever the load."""
    short: dict[str, Any] = {"input_len": 100, "output_len": 100}
    plan = pk.plan_memory("Llama-3.1-8B", "RTX-4090", max_model_len=131_072, **short)
    assert plan.kv.needed_blocks < plan.kv.num_blocks
    assert plan.shortfalls == (
        "one sequence of 131,072 tokens needs 16.0 GiB of K and V, there are 5.0 GiB",
    )
    best = dict(plan.changes[0].arguments)["max_model_len"]
    assert -(-best // 16) == plan.kv.num_blocks
    assert pk.plan_memory("Llama-3.1-8B", "RTX-4090", **short).fits


def test_copies_of_a_model_share_the_load() -> None:
    plan = pk.plan_memory("Llama-3-8B", "A100-80GB", num_gpus=4, tp=2, concurrency=9)
    assert (plan.load.replicas, plan.load.concurrency) == (2, 5)
    assert any("2 copies" in note for note in plan.notes)


def test_what_is_logged_is_taken_and_the_rest_is_marked() -> None:
    plan = pk.plan_memory("Llama-3.1-8B", "A100-80GB")
    assert [part.exact for part in plan.components] == [True, False, False, False]
    for part in plan.components[1:]:
        assert part.low < part.num_bytes < part.high
    given = pk.plan_memory("Llama-3.1-8B", "A100-80GB", activation_memory="2GiB")
    assert given.components[2].num_bytes == 2 * GiB
    assert given.components[2].source == "given"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # 38.2 * 256 * 128256 + 2.7 * 2048 * 4096
        ({"model": "Llama-3.1-8B"}, int(38.2 * 256 * 128_256 + 2.7 * 2048 * 4096)),
        # 16384 * 2 * (3 * 28672 / 4 + 4 * 8192)
        ({"model": "Llama-3.1-70B", "tp": 4, "max_batched_tokens": 16_384},
         16_384 * 2 * (3 * 28_672 // 4 + 4 * 8192)),
        # active experts only: 8192 * 2 * (3 * 8 * 768 + 4 * 2048)
        ({"model": "Qwen3-30B-A3B", "max_num_seqs": 8, "max_batched_tokens": 8192},
         8192 * 2 * (3 * 8 * 768 + 4 * 2048)),
    ],
)  # fmt: skip
def test_activations(arguments: dict[str, Any], expected: int) -> None:
    assert pk.plan_memory(gpu="B200", **arguments).components[2].num_bytes == expected


def test_preemption_costs() -> None:
    plan = pk.plan_memory("Llama-3.1-8B", "A100-80GB", input_len=1500, output_len=500,
                          host_memory="32GiB")  # fmt: skip
    swap = plan.preemption
    assert swap.num_bytes == 2000 * 131_072
    assert swap.host_blocks == 32 * GiB // (2 * 2**20) - 1
    assert swap.swap_seconds == pytest.approx(2 * 2000 * 131_072 / (32e9 * 0.8))
    multiplied = 8_030_261_248 - 128_256 * 4096  # the embedding is looked up
    work = 2 * multiplied * 2000 + 32 * 4 * 32 * 128 * 2000 * 2000 / 2
    assert swap.recompute_seconds == pytest.approx(work / (312e12 * 0.5))
    assert swap.cheaper == "swap"
    unknown = pk.plan_memory("Llama-3.1-8B", "80GiB").preemption
    assert (unknown.swap_seconds, unknown.recompute_seconds, unknown.cheaper) == (None, None, None)


def test_a_model_without_attention_has_no_blocks() -> None:
    mamba = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
             "state_size": 16, "conv_kernel": 4, "expand": 2, "dtype": "bfloat16"}  # fmt: skip
    plan = pk.plan_memory(mamba, "1GiB", max_model_len=5000, concurrency=3)
    assert plan.kv.model_state_bytes == 2 * 128 * (3 + 16) * 2
    assert (plan.kv.num_blocks, plan.kv.num_tokens, plan.policies) == (0, 0, ())
    assert plan.fits
    assert plan.components[1].num_bytes == 3 * plan.kv.model_state_bytes
    assert not pk.plan_memory(mamba, "1GiB", max_model_len=5000, concurrency=100_000).fits


def test_beams_and_samples_share_their_prompt() -> None:
    """10 requests of 4 samples: 93 full blocks of the prompt once, then each its own."""
    plan = pk.plan_memory("Llama-3-8B", "A100-80GB", input_len=1500, output_len=500,
                          concurrency=10, samples=4)  # fmt: skip
    assert plan.kv.needed_blocks == 10 * (93 + 4 * (125 - 93))
    beams = pk.plan_memory("Llama-3-8B", "A100-80GB", input_len=1500, output_len=500,
                           concurrency=10, beams=4)  # fmt: skip
    assert beams.kv.needed_blocks == plan.kv.needed_blocks


def test_printing_and_equality() -> None:
    plan = pk.plan_memory("Llama-3-8B", "A100-80GB")
    assert plan == pk.plan_memory("meta-llama/Meta-Llama-3-8B", "a100 80gb")
    assert plan != replace(plan, fits=False)
    text = str(plan)
    assert text.startswith("Llama-3-8B on A100-80GB")
    assert "FITS" in text
    assert "\x1b" not in text
