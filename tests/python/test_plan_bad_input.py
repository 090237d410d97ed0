"""Bad input to `pagedkv plan` is a message that names it, and exit code 2; never a traceback."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pagedkv as pk
from pagedkv.cli import main

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "dtype": "float16",
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
HUB_ID = "someone/some-model-of-theirs"


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: Any, *arguments: str) -> str:
    """What main() prints to stderr; it must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["pagedkv", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in error
    return " ".join(error.split())


GOOD = ("--model", "Llama-3-8B", "--gpu", "A100-80GB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option"),
        (("--model", "Llama-3-8B"), "Missing option '--gpu'"),
        (("--model", "Llama-4-80B", "--gpu", "L4"), "expected a known name such as Llama-"),
        (("--model", "no/such/file.json", "--gpu", "L4"), "no such file or folder"),
        (("--model", "./nothing", "--gpu", "L4"), "no such file or folder"),
        (("--model", "Llama-3-8B", "--gpu", "A100"), "expected one of A100-40GB, A100-80GB"),
        (("--model", "Llama-3-8B", "--gpu", "Voodoo2"), "gpu is 'Voodoo2', expected a size"),
        (("--model", "Llama-3-8B", "--gpu", "80GBit"), "gpu is '80GBit'"),
        (("--model", "Llama-3-8B", "--gpu", "80"), "did you leave out a unit?"),
        (("--model", "Llama-3-8B", "--gpu", "-5GB"), "gpu is '-5GB'"),
        ((*GOOD, "--tp", "3"), "tp is 3, which does not divide the model's 32 attention heads"),
        ((*GOOD, "--tp", "0"), "tp is 0"),
        ((*GOOD, "--tp", "2", "--num-gpus", "3"), "num_gpus is 3 and tp is 2"),
        ((*GOOD, "--dtype", "int2"), "dtype is 'int2', expected auto"),
        ((*GOOD, "--kv-dtype", "int4"), "kv_dtype is 'int4', expected auto"),
        ((*GOOD, "--block-size", "0"), "block_size is 0"),
        ((*GOOD, "--block-size", "5000"), "block_size is 5000"),
        ((*GOOD, "--block-size", "many"), "--block-size"),
        ((*GOOD, "--max-model-len", "9000"), "max_model_len is 9000, expected at most the model's"),
        ((*GOOD, "--input-len", "9000"), "input_len is 9000"),
        ((*GOOD, "--input-len", "8000", "--output-len", "500"), "together 8500"),
        ((*GOOD, "--input-len", "0", "--output-len", "0"), "expected a token"),
        ((*GOOD, "--max-model-len", "100", "--input-len", "90", "--output-len", "20"),
         "expected at most max_model_len, 100"),
        ((*GOOD, "--input-len", "-1"), "input_len is -1"),
        ((*GOOD, "--concurrency", "0"), "concurrency is 0"),
        ((*GOOD, "--beams", "0"), "beams is 0"),
        ((*GOOD, "--utilization", "1.5"), "utilization is 1.5"),
        ((*GOOD, "--utilization", "nan"), "utilization is nan"),
        ((*GOOD, "--max-num-seqs", "2", "--beams", "4"), "max_num_seqs is 2"),
        ((*GOOD, "--max-num-seqs", "9", "--concurrency", "10"), "expected at least 10"),
        ((*GOOD, "--weights-memory", "16"), "is a unit missing"),
        ((*GOOD, "--host-memory", "64"), "is a unit missing"),
        ((*GOOD, "--host-memory", "64 gigs"), "host_memory is '64 gigs'"),
        ((*GOOD, "--weights-memory", "15,3GiB"), "weights_memory is '15,3GiB'"),
        ((*GOOD, "--windows", "open"), "windows is 'open'"),
        ((*GOOD, "--plot", "plan.pdf"), "ends in .png or .svg"),
        ((*GOOD, "--plot", "no-such-folder/plan.png"), "its folder does not exist"),
    ],
)  # fmt: skip
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three'"),
        ({"num_hidden_layers": 10**8}, "expected an int of 1 to 10000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4 and num_key_value_heads is 3"),
        ({"hidden_size": 65}, "hidden_size is 65 and num_attention_heads is 4"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["full_attention"] * 2 + ["crystal"]}, "layer 2 is of kind 'crystal'"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer 0 is of kind 'sliding_attention'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "magic"}}, "quant_method is 'magic'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"max_position_embeddings": None}, "no max_position_embeddings"),
        ({"kv_lora_rank": 8}, "layer 0 is of kind 'latent': the config has no qk_rope_head_dim"),
    ],
)
def test_bad_configs(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path,
    changed: dict[str, Any], message: str,
) -> None:  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**SMALL, **changed}))
    assert message in refused(capsys, monkeypatch, "--model", str(file), "--gpu", "1GiB")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "which is no JSON file"),
        ("config.json", b"[1, 2]", "a JSON list, not an object"),
        ("config.json", b"\xff\xfe", "which is no JSON file"),
        ("config.json", b"{}", "no num_hidden_layers"),
        ("other.json", b"{}", "a folder without a config.json"),
    ],
)
def test_bad_folders(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path, name: str,
    content: bytes, message: str,
) -> None:  # fmt: skip
    (tmp_path / name).write_bytes(content)
    assert message in refused(capsys, monkeypatch, "--model", str(tmp_path), "--gpu", "1GiB")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"", "is no safetensors file"),
        ("model.safetensors", struct.pack("<Q", 2) + b"[]", "is no safetensors file"),
        ("model.safetensors", struct.pack("<Q", 1 << 60), "is no safetensors file"),
        ("model.safetensors.index.json", b"{}", "not a safetensors index"),
        ("model.safetensors.index.json", b"[]", "a JSON list, not an object"),
        ("model.safetensors.index.json", b'{"metadata": 5}', "not a safetensors index"),
    ],
)
def test_bad_checkpoints(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path, name: str,
    content: bytes, message: str,
) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / name).write_bytes(content)
    assert message in refused(capsys, monkeypatch, "--model", str(tmp_path), "--gpu", "1GiB")


def test_a_hub_id_without_the_package_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refused(capsys, monkeypatch, "--model", HUB_ID, "--gpu", "L4")
    assert "pip install huggingface_hub" in message


def test_a_hub_that_is_out_of_reach_is_a_message_at_once() -> None:
    """In a process of its own, since huggingface_hub reads where the hub is when it is imported."""
    pytest.importorskip("huggingface_hub")
    words = [sys.executable, "-m", "pagedkv", "plan", "--model", HUB_ID, "--gpu", "L4"]
    nowhere = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        words, capture_output=True, text=True, check=False, env=nowhere, timeout=20
    )
    assert run.returncode == 2
    assert run.stderr.startswith(f"pagedkv: model is {HUB_ID!r}, and its config.json was not found")
    assert len(run.stderr.splitlines()) == 1


def test_a_plot_without_matplotlib_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = str(tmp_path / "plan.png")
    assert "pip install 'pagedkv[plot]'" in refused(capsys, monkeypatch, *GOOD, "--plot", file)


def test_an_unknown_architecture_is_assumed_and_strict_refuses_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**SMALL, "model_type": "novelty"}))
    plan = pk.plan_memory(file, "1GiB")
    assert "Assumed: the architecture (novelty) is not known" in str(plan)
    assert not plan.weights.exact
    message = refused(capsys, monkeypatch, "--model", str(file), "--gpu", "1GiB", "--strict")
    assert "novelty" in message


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 300), st.floats(allow_nan=False), st.text(max_size=4),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", "mamba", 3]), max_size=4),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "quant_method", "bits"]),
                    st.sampled_from(["yarn", 4, None, "awq", "fp8", [1]]), max_size=3),
)  # fmt: skip
FIELDS = (
    *SMALL, "sliding_window", "layer_types", "rope_scaling", "quantization_config", "text_config",
    "num_local_experts", "num_experts_per_tok", "kv_lora_rank", "head_dim", "mamba_expand",
    "attn_layer_period", "use_sliding_window", "attention_bias", "architectures", "n_layer",
    "first_k_dense_replace", "moe_layers", "mlp_only_layers", "attn_config", "num_kv_shared_layers",
)  # fmt: skip
TYPES = ("llama", "gemma2", "qwen2_moe", "jamba", "deepseek_v3", "falcon", "opt", "unknown")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(TYPES), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_config_is_planned_or_refused(model_type: str, changed: dict[str, Any]) -> None:
    config = {**SMALL, "model_type": model_type, **changed}
    try:
        plan = pk.plan_memory(config, "1GiB", max_model_len=64)
    except pk.InvalidSpec:
        return
    assert plan.weights.num_parameters > 0


def test_a_picture_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    pytest.importorskip("matplotlib")
    found = refused(capsys, monkeypatch, *GOOD, "--plot", "/proc/plan.png")
    assert "plot is '/proc/plan.png'" in found
