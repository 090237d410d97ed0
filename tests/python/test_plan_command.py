"""`pagedkv plan`: tables, JSON, pictures, exit codes, and where models come from."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pagedkv as pk
from pagedkv.cli import app

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "dtype": "float16",
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
HUB_ID = "someone/some-model-of-theirs"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL))
    return file


# ---- answers -----------------------------------------------------------------------------------


def test_a_plan_that_fits() -> None:
    code, out = run("--model", "Llama-3.1-8B", "--gpu", "A100-80GB", "--utilization", "0.92")
    assert code == 0
    for line in (
        "8,030,261,248 parameters, bfloat16: 16.06 GB, 2 bytes each.",
        "Budget: 0.92 x 79.25 GiB visible = 72.91 GiB.",
        "K and V: 131,072 bytes per token, bfloat16.",
        "Maximum concurrency for 131,072 tokens per request: 3.54x",
    ):
        assert line in out
    assert re.search(r"weights +16,060,522,496 +14\.96 +20\.5% +exact", out)
    assert re.search(r"activations +[\d,]+ +1\.19 +1\.6% +estimated, 0\.89 to 1\.49", out)
    assert "\nFITS: the load needs" in out


def test_a_plan_that_does_not_fit_says_what_would() -> None:
    arguments = ("--model", "Llama-3.1-8B", "--gpu", "RTX-4090", "--input-len", "8000",
                 "--output-len", "192", "--concurrency", "16")  # fmt: skip
    code, out = run(*arguments)
    assert code == 1
    assert "\nDOES NOT FIT: the load needs" in out
    assert "16 requests of 8,192 tokens need 16.0 GiB of K and V, there are 5.0 GiB" in out
    lines = re.findall(r"^  (--[\w-]+ .*?)  \(", out, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:  # each of them, word for word, makes it fit
        changed = dict(zip(line.split()[::2], line.split()[1::2], strict=True))
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        words = [word for pair in {**given, **changed}.items() for word in pair]
        assert run(*words)[0] == 0, line


LOADS: list[tuple[str, str, dict[str, Any]]] = [
    ("Llama-3.1-8B", "RTX-4090", {}),
    ("Llama-3.1-8B", "A100-40GB", {"input_len": 30_000, "output_len": 500, "concurrency": 9}),
    ("Llama-3.1-70B", "A100-80GB", {}),
    ("Llama-3.1-70B", "H100", {"tp": 2, "input_len": 4000, "output_len": 500, "concurrency": 40}),
    ("Llama-3.1-405B", "H100", {"tp": 8, "max_model_len": 8192}),
    ("gpt-oss-120b", "A100-40GB", {}),
    ("DeepSeek-V3", "H100", {"tp": 8}),
    ("DeepSeek-V3", "24GB", {}),  # pairs of changes
    ("Gemma-2-27B", "L40S", {"input_len": 4000, "output_len": 500, "concurrency": 30}),
    ("Mistral-7B-v0.1", "T4", {}),
    ("Jamba-v0.1", "A100-80GB", {"concurrency": 4}),
    ("Qwen3-30B-A3B", "A100-80GB", {"concurrency": 5, "samples": 4}),
    ("Falcon-7B", "T4", {"max_batched_tokens": 16_384}),
    ("Llama-3.1-8B", "23.9GB", {"max_batched_tokens": 32_768, "input_len": 11_000,
                                "output_len": 512}),
    ("Llama-3-8B", "23.9GB", {"max_num_seqs": 1024, "max_batched_tokens": 8192}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "gpu", "load"), LOADS)
def test_every_change_is_true(model: str, gpu: str, load: dict[str, Any]) -> None:
    plan = pk.plan_memory(model, gpu, **load)
    assert not plan.fits
    assert plan.changes
    for change in plan.changes:
        arguments = {"gpu": gpu, **load, **dict(change.arguments)}
        assert pk.plan_memory(model, **arguments).fits, change.flags


def test_each_kind_of_change_is_offered_somewhere() -> None:
    plans = [pk.plan_memory(model, gpu, **load) for model, gpu, load in LOADS]
    offered = {c.arguments[0][0] for plan in plans for c in plan.changes if len(c.arguments) < 3}
    assert offered >= {
        "max_model_len", "input_len", "kv_dtype", "concurrency", "tp", "max_batched_tokens",
        "dtype", "utilization", "gpu",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "step"), [("max_model_len", 16), ("concurrency", 1), ("input_len", 16)]
)
def test_changes_ask_for_no_more_than_needed(name: str, step: int) -> None:
    load: dict[str, Any] = {} if name == "max_model_len" else {
        "input_len": 8000, "output_len": 192, "concurrency": 16}  # fmt: skip
    plan = pk.plan_memory("Llama-3.1-8B", "RTX-4090", **load)
    change = next(c for c in plan.changes if c.arguments[0][0] == name)
    found = dict(change.arguments)
    found[name] += step
    assert not pk.plan_memory("Llama-3.1-8B", "RTX-4090", **{**load, **found}).fits


def test_json_is_the_documented_schema() -> None:
    code, out = run("--model", "gpt-oss-20b", "--gpu", "RTX-4090", "--concurrency", "40", "--json")
    found = json.loads(out)
    assert code == (0 if found["fits"] else 1) == 1
    assert found["schema"] == "pagedkv.plan/1"
    text = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
    table = text.split("## The JSON")[1]
    documented = set(re.findall(r"^\| `([\w.\[\]]+)`", table, re.MULTILINE))
    assert set(names(found)) == documented
    again = pk.plan_memory("gpt-oss-20b", "RTX-4090", concurrency=40).to_dict()
    assert json.loads(json.dumps(again)) == found


def names(value: Any, prefix: str = "") -> list[str]:
    """Every name in a JSON value, as a.b and a[].b; `arguments` has names of its own."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [name for item in value for name in names(item, prefix + "[]")]
    if isinstance(value, dict) and not prefix.endswith("arguments"):
        dot = f"{prefix}." if prefix else ""
        return [name for key, item in value.items() for name in names(item, f"{dot}{key}")]
    return [prefix]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plots(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plan.{ending}"
    for model, gpu in (("Llama-3.1-8B", "A100-80GB"), ("DeepSeek-V3", "T4")):
        code, _ = run("--model", model, "--gpu", gpu, "--plot", str(file))
        assert code in (0, 1)
        if ending == "svg":
            assert file.read_text().count("<path") > 20
            continue
        image = pytest.importorskip("PIL.Image").open(file)
        assert 800 <= image.width <= 3000
        assert 400 <= image.height <= 2000
        assert len(image.convert("RGB").getcolors(10**7)) > 50  # it is not blank


def test_the_command_as_a_process_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['pagedkv', 'plan', '--model', 'Qwen3-8B', '--gpu', 'L40S', '--json']\n"
        "from pagedkv.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: sys.stderr.write(repr(end.code))\n"
        "heavy = {'torch', 'matplotlib', 'transformers', 'huggingface_hub', 'numpy'}\n"
        "sys.stderr.write(repr(sorted(heavy & set(sys.modules))))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr == "0[]"
    assert json.loads(found.stdout)["model"] == "Qwen3-8B"


# ---- where models come from --------------------------------------------------------------------


def test_a_file_a_folder_a_dict_and_a_name_agree(tmp_path: Path, config: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    plans = [pk.plan_memory(m, "1GiB") for m in (config, str(config), folder, str(folder), SMALL)]
    assert len({plan.weights.num_bytes for plan in plans}) == 1
    assert len({plan.kv for plan in plans}) == 1
    assert [plan.model for plan in plans[:4]] == ["small"] * 4


def test_safetensors_say_what_the_weights_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    index = {"metadata": {"total_size": 123_456}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = pk.plan_memory(tmp_path, "1GiB")
    assert (plan.weights.num_bytes, plan.weights.source) == (123_456, "safetensors")
    header = {"__metadata__": {}, "a": {"dtype": "F16", "shape": [3, 5], "data_offsets": [0, 30]},
              "b": {"dtype": "F32", "shape": [7], "data_offsets": [30, 58]}}  # fmt: skip
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(58))
    plan = pk.plan_memory(tmp_path, "1GiB")
    assert plan.weights.num_bytes == 58
    assert pk.plan_memory(tmp_path, "1GiB", dtype="float32").weights.num_bytes > 10**5


def test_a_hub_id_is_fetched(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    asked = []

    class Hub:
        try_to_load_from_cache = staticmethod(lambda name, file: None)
        hf_hub_url = staticmethod(lambda name, file: f"{name}/{file}")
        get_hf_file_metadata = staticmethod(lambda url: None)

        @staticmethod
        def hf_hub_download(name: str, file: str) -> str:
            asked.append((name, file))
            if file != "config.json":
                raise OSError("404")
            return str(config)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    plan = pk.plan_memory(HUB_ID, "1GiB")
    assert plan.source == f"hub: {HUB_ID}"
    assert asked == [(HUB_ID, "config.json"), (HUB_ID, "model.safetensors.index.json")]
    assert plan.weights.num_parameters == pk.plan_memory(SMALL, "1GiB").weights.num_parameters
    asked.clear()
    pk.plan_memory("Qwen/Qwen3-8B", "A100-80GB")  # a known one is not fetched
    assert asked == []


def test_a_multimodal_config_is_its_language_model_s() -> None:
    nested = {"model_type": "gemma3", "vision_config": {"hidden_size": 1}, "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240,
        "num_hidden_layers": 34, "sliding_window": 1024}}  # fmt: skip
    plan = pk.plan_memory(nested, "A100-80GB")
    known = pk.plan_memory("Gemma-3-4B", "A100-80GB")
    assert plan.weights.num_parameters == known.weights.num_parameters
    assert plan.kv == known.kv
    assert any("vision_config" in note for note in plan.notes)
    assert any("num_attention_heads is not in the config: 8" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16_384),
        ({"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 128}, 4096),
        ({"type": "linear", "factor": 2.0}, 8192),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}, 4096),
        ({"rope_type": "longrope", "factor": 8.0}, 4096),
    ],
)
def test_the_longest_sequence_of_a_model(rope: dict[str, Any] | None, expected: int) -> None:
    plan = pk.plan_memory({**SMALL, "rope_scaling": rope}, "4GiB")
    assert plan.load.max_model_len == expected


def test_a_config_without_a_dtype_is_assumed_bfloat16() -> None:
    config = {k: v for k, v in SMALL.items() if k != "dtype"}
    plan = pk.plan_memory(config, "4GiB")
    assert (plan.weights.scheme, plan.load.kv_dtype) == ("bfloat16", "bfloat16")
    assert plan.assumptions == ("the config has no dtype: bfloat16 is taken",)
    with pytest.raises(pk.InvalidSpec, match="no dtype"):
        pk.plan_memory(config, "4GiB", strict=True)
