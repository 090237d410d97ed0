"""Plans beside what is published: parameters, weights, K and V, an engine's logs."""

from __future__ import annotations

import random
from typing import Any

import pytest

import pagedkv as pk
from pagedkv.config import ModelConfig
from pagedkv.planner.catalog import find_gpu, find_model, gpus, model_names
from pagedkv.planner.groups import Pool
from pagedkv.planner.model import load_model
from pagedkv.planner.parameters import count, tensors

GiB = 2**30

# parameters, 16-bit weights in GiB, layers, K and V bytes per token that grow, that stop, state
TABLE = {
    "OPT-13B": (12_853_473_280, 23.94, 40, 819_200, 0, 0),
    "GPT-3-175B": (174_604_259_328, 325.23, 96, 4_718_592, 0, 0),
    "Llama-2-13B": (13_015_864_320, 24.24, 40, 819_200, 0, 0),
    "Llama-3-8B": (8_030_261_248, 14.96, 32, 131_072, 0, 0),
    "Llama-3-70B": (70_553_706_496, 131.42, 80, 327_680, 0, 0),
    "Mistral-7B-v0.1": (7_241_732_096, 13.49, 32, 0, 536_870_912, 0),
    "Qwen2.5-7B": (7_615_616_512, 14.19, 28, 57_344, 0, 0),
    "Qwen3-30B-A3B": (30_532_122_624, 56.87, 48, 98_304, 0, 0),
    "Gemma-2-9B": (9_241_705_984, 17.21, 42, 172_032, 704_643_072, 0),
    "gpt-oss-20b": (20_914_757_184, 38.96, 24, 24_576, 3_145_728, 0),
    "Falcon-7B": (6_921_720_704, 12.89, 32, 8_192, 0, 0),
    "DeepSeek-V3": (671_026_404_352, 1249.9, 61, 70_272, 0, 0),
    "Jamba-v0.1": (51_570_323_328, 96.06, 32, 16_384, 0, 8_716_288),
}
# Published counts of models beside the table.
OTHERS = {
    "Llama-2-7B": 6_738_415_616, "Llama-2-70B": 68_976_648_192, "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824, "SmolLM2-135M": 134_515_008,
    "SmolLM2-1.7B": 1_711_376_384, "Mixtral-8x7B": 46_702_792_704,
    "Mistral-Small-24B": 23_572_403_200, "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920, "Qwen3-8B": 8_190_735_360, "Qwen3-235B-A22B": 235_093_634_560,
    "Gemma-2-2B": 2_614_341_888, "Gemma-2-27B": 27_227_128_320, "Gemma-3-1B": 999_885_952,
    "Phi-3-mini": 3_821_079_552, "Phi-4": 14_659_507_200, "Falcon-40B": 41_303_293_952,
    "DeepSeek-V2-Lite": 15_706_484_224, "DeepSeek-V2": 235_741_434_880, "GPT-2": 124_439_808,
    "gpt-oss-120b": 116_829_156_672,
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_table_to_the_byte(name: str) -> None:
    parameters, gib, layers, growing, window, state = TABLE[name]
    plan = pk.plan_memory(name, "B200", tp=1, dtype="bfloat16")
    assert plan.weights.num_parameters == parameters
    assert plan.weights.num_bytes == plan.weights.total_bytes == 2 * parameters
    assert plan.weights.num_bytes / GiB == pytest.approx(gib, rel=0.0005)
    assert plan.spec.num_layers == layers
    assert plan.kv.model_growing_bytes == growing
    assert plan.kv.model_window_bytes == window
    assert plan.kv.model_state_bytes == state


@pytest.mark.parametrize("name", OTHERS)
def test_published_counts(name: str) -> None:
    assert count(load_model(name).config) == OTHERS[name]


def test_tokens_below_the_window_cost_what_they_would_without() -> None:
    assert pk.plan_memory("Mistral-7B-v0.1", "A100-80GB").kv.model_token_bytes == 131_072
    assert pk.plan_memory("gpt-oss-20b", "A100-80GB").kv.model_token_bytes == 2 * 24_576


@pytest.mark.parametrize(
    ("name", "stored", "loaded_gib"),
    [
        ("gpt-oss-20b", 13_761_264_768, 13.47),  # what its checkpoint's index says; as loaded
        ("gpt-oss-120b", 65_248_815_744, None),
    ],
)
def test_mxfp4_checkpoints(name: str, stored: int, loaded_gib: float | None) -> None:
    weights = pk.plan_memory(name, "H100").weights
    assert weights.total_bytes == stored
    assert weights.num_bytes > stored
    assert not weights.exact
    if loaded_gib:
        assert weights.num_bytes / GiB == pytest.approx(loaded_gib, rel=0.005)


def test_fp8_with_a_scale_per_block() -> None:
    """One byte per weight of a matrix, two of the rest, four per 128 x 128: counted by hand."""
    weights = pk.plan_memory("DeepSeek-V3", "B200", tp=8).weights
    hidden, moe = 7168, 2048
    kept = 2 * 129_280 * hidden + 58 * 256 * hidden  # embeddings, head, routers
    kept += (2 * 61 + 1) * hidden + 61 * (1536 + 512)  # norms

    def scales(*shapes: tuple[int, int]) -> int:
        return sum(-(-rows // 128) * -(-columns // 128) for rows, columns in shapes)

    attention = scales((1536, hidden), (24_576, 1536), (576, hidden), (32_768, 512),
                       (hidden, 16_384))  # fmt: skip
    dense = 3 * scales((18_432, hidden))
    expert = 3 * scales((moe, hidden))
    blocks = 61 * attention + 3 * dense + 58 * 257 * expert
    assert weights.total_bytes == weights.num_parameters + kept + 4 * blocks
    assert weights.bytes_per_parameter == pytest.approx(1.003, abs=0.001)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("float32", 4, 4), ("float16", 2, 2), ("fp8", 1.1, 1.2), ("int8", 1.1, 1.2),
     ("int4", 0.6, 0.75), ("nf4", 0.7, 0.8)],
)  # fmt: skip
def test_bytes_per_parameter(dtype: str, low: float, high: float) -> None:
    weights = pk.plan_memory("Llama-3.1-8B", "A100-80GB", dtype=dtype).weights
    assert low <= weights.bytes_per_parameter <= high


@pytest.mark.parametrize(
    ("quantisation", "scheme", "bits"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq 4 bit", 4.156),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq 8 bit", 8.03),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {
            "weights": {"num_bits": 4, "group_size": 32}}}}, "compressed-tensors", 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes", 8.01),
        ({"quant_method": "fp8"}, "fp8", 8),
    ],
)  # fmt: skip
def test_quantised_configs(quantisation: dict[str, Any], scheme: str, bits: float) -> None:
    config = {**find_model("Llama-3.1-8B")[1], "quantization_config": quantisation}  # type: ignore[index]
    weights = pk.plan_memory(config, "A100-80GB").weights
    embeddings = 2 * 128_256 * 4096
    matrices = weights.num_parameters - embeddings - 65 * 4096
    expected = 2 * (embeddings + 65 * 4096) + matrices * bits / 8
    assert weights.scheme.startswith(scheme)
    assert weights.total_bytes == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize(
    ("listed", "parts"),
    [
        (["lm_head", "model.embed_tokens", "model.layers.0.input_layernorm", "model.norm"], ()),
        (["model.layers.0.post_attention_layernorm", "re:.*self_attn.q_norm", "model.visual"], ()),
        (["model.layers.0.mlp.gate", "re:.*mlp.gate$", "mlp.shared_expert_gate", "gate"], ()),
        (["block_sparse_moe.router.layer", "mlp.gate.weight", "mlp.router.weight"], ()),
        ([r"re:.*mlp\.gate\..*", r"re:.*mlp\.(gate)$", "re:.*shared_expert_gate.*"], ()),
        (["lm_head.weight", "model.layers.0.input_layernorm.weight", r"re:.*\.embed_\w+$"], ()),
        ([".eh_proj", "model.layers.61.shared_head.head", "model.mtp.layers.0.mlp"], ()),
        (["model.layers.0.self_attn.q_proj"], ("q_proj", "k_proj", "v_proj", "o_proj")),
        (["re:.*self_attn.*"], ("q_proj", "k_proj", "v_proj", "o_proj")),
        (["kv_a_proj_with_mqa"], ("q_proj", "k_proj", "v_proj", "o_proj")),
        ([r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"], ("mlp.",)),
        (["model.layers.0.mlp.down_proj", "lm_head"], ("mlp.",)),
        (["re:.*shared_experts.*"], ("shared_expert.",)),
        (["model.layers.3.mlp.experts"], ("expert.", "shared_expert.")),
        (["model.layers.3.mlp"], ("mlp.", "expert.", "shared_expert.")),
        (["model.layers.3"], ("",)),
        (["re:.*(self_attn|mlp).*"], ("",)),
        (["re:.*self_attn.*|.*mlp.*"], ("",)),
        (["re:^(?!.*experts).*"], ("",)),
        (["re:.*gate.*"], ("",)),  # which mlp.gate_proj is, too
    ],
)
def test_what_a_config_leaves_unquantised(listed: list[str], parts: tuple[str, ...]) -> None:
    """The upper end counts what a list may mean, and nothing that is never quantised anyway."""
    sizes = {"model_type": "qwen2_moe", "num_hidden_layers": 4, "mlp_only_layers": [0],
             "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
             "vocab_size": 512, "num_experts": 8,
             "num_experts_per_tok": 2, "intermediate_size": 512, "moe_intermediate_size": 128,
             "shared_expert_intermediate_size": 128, "dtype": "bfloat16"}  # fmt: skip
    method: dict[str, Any] = {"quant_method": "fp8", "modules_to_not_convert": listed}
    plan = pk.plan_memory({**sizes, "quantization_config": method}, "24GB")
    quantised = [t for t in tensors(ModelConfig.read(sizes)) if t.role in ("linear", "expert")]
    kept = [t for t in quantised if t.name.startswith(parts)]
    # 2 bytes for each parameter instead of 1, and no scale of 4 bytes for each matrix
    more = sum(t.num_elements - 4 * t.copies for t in kept)
    assert plan.weights.most_bytes - plan.weights.num_bytes == more
    assert plan.weights.exact == (not parts)
    assert any("unquantised" in note for note in plan.notes) == bool(parts)


@pytest.mark.parametrize(
    ("field", "quantisation"),
    [
        ("ignore", {"quant_method": "compressed-tensors", "config_groups": {
            "group_0": {"weights": {"num_bits": 8}}}}),
        ("ignored_layers", {"quant_method": "fp8"}),
        ("modules_to_not_convert", {"quant_method": "awq"}),
        ("llm_int8_skip_modules", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ],
)  # fmt: skip
def test_the_lists_of_what_is_unquantised(field: str, quantisation: dict[str, Any]) -> None:
    """Each kind of quantisation has its own name for them."""
    listed = {field: ["lm_head", "model.layers.1.self_attn", "model.layers.1.mlp"]}
    for lists, exact in (({field: ["lm_head"]}, True), (listed, False)):
        config = {**find_model("Llama-3.1-8B")[1], "quantization_config": quantisation | lists}  # type: ignore[index]
        weights = pk.plan_memory(config, "A100-80GB").weights
        assert (weights.most_bytes > weights.num_bytes) == (not exact)
    assert weights.most_bytes == pytest.approx(2 * weights.num_parameters)  # all matrices


@pytest.mark.parametrize(("model", "gpu"), [("gpt-oss-120b", "H200"), ("gpt-oss-20b", "RTX-4090")])
def test_mxfp4_leaves_only_the_padding_uncertain(model: str, gpu: str) -> None:
    """Its config lists attention and routers, which are counted in 16 bit from the start."""
    plan = pk.plan_memory(model, gpu, max_model_len=2048, input_len=1024, output_len=256)
    weights, kv = plan.components[:2]
    assert weights.high - weights.num_bytes == plan.weights.num_bytes // 50
    assert kv.low > 0.8 * kv.num_bytes
    assert not any("unquantised" in note or "close" in note for note in plan.notes)


# ---- an engine's logs --------------------------------------------------------------------------


def test_the_pool_of_an_engine_with_its_log() -> None:
    """A100-80GB, Llama-3.1-8B, utilization 0.92: 56.21 GiB, 460,496 tokens, 3.51x at 131,072."""
    plan = pk.plan_memory(
        "Llama-3.1-8B", "A100-80GB", utilization=0.92,
        weights_memory="15.26GiB", activation_memory="1.44GiB", non_torch_memory=0,
    )  # fmt: skip
    assert plan.kv.pool_bytes / GiB == pytest.approx(56.21, rel=0.0005)
    assert plan.kv.num_tokens == pytest.approx(460_496, rel=0.0005)
    assert plan.log_lines[1] == "Maximum concurrency for 131,072 tokens per request: 3.51x"
    assert all(part.exact for part in plan.components)


def test_the_pool_of_an_engine_without_its_log() -> None:
    plan = pk.plan_memory("Llama-3.1-8B", "A100-80GB", utilization=0.92)
    assert plan.kv.pool_bytes / GiB == pytest.approx(56.21, rel=0.01)
    assert plan.kv.num_tokens == pytest.approx(460_496, rel=0.01)
    kv = plan.components[1]
    assert kv.low <= 56.21 * GiB <= kv.high


def test_other_logs() -> None:
    """28.20 GiB for Mistral-Small-24B is 184,832 tokens; gpt-oss-120b needs 4.54 GiB at 131,072."""
    spec = pk.KVSpec.from_config(load_model("Mistral-Small-24B").config)
    pool = Pool.of(spec)
    assert pool.num_tokens(pool.num_blocks(int(28.20 * GiB))) == pytest.approx(184_832, rel=0.001)
    for steps in (1024, 2048):
        plan = pk.plan_memory("gpt-oss-120b", "H100", max_batched_tokens=steps)
        assert plan.kv.sequence_bytes / GiB == pytest.approx(4.54, rel=0.01)


def test_thirteen_billion_parameters_and_ten_users() -> None:
    """26 + 16 + 9.2 is 51.2 GB, and not 101.2; it fits one GPU of 80 GB, and two of 40."""
    load: dict[str, Any] = {"input_len": 1500, "output_len": 500, "concurrency": 10}
    logged: dict[str, Any] = {"activation_memory": "9.2GB", "non_torch_memory": 0}
    plan = pk.plan_memory("LLaMA-13B", "A100-80GB", **load, **logged)
    assert plan.weights.num_bytes == 26_031_728_640
    assert plan.kv.needed_bytes == 10 * 2000 * 819_200 == 16_384_000_000
    assert plan.needed_bytes == 26_031_728_640 + 16_384_000_000 + 9_200_000_000
    assert plan.fits
    assert pk.plan_memory("LLaMA-13B", "A100-40GB", tp=2, **load, **logged).fits
    with pytest.raises(pk.InvalidSpec, match="tp is 3, which does not divide the model's 40"):
        pk.plan_memory("LLaMA-13B", "A100-40GB", tp=3, **load)


def test_the_catalog() -> None:
    assert len(model_names()) > 50
    assert find_gpu("A100-80GB").memory_bytes / GiB == pytest.approx(79.25, abs=0.01)
    assert find_gpu("H200").memory_bytes / 2**20 < 143_771  # nvidia-smi counts what is reserved
    for name in random.Random(0).sample(model_names(), 20):
        plan = pk.plan_memory(name, "B200", tp=1)
        assert plan.weights.num_parameters > 10**8
        assert not plan.assumptions
    for gpu in gpus().values():
        assert 10 * GiB < gpu.memory_bytes < 300 * GiB
        assert gpu.flops is not None
        assert 1e13 < gpu.flops < 1e16
