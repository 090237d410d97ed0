"""`pagedkv simulate` as a user runs it: tables, JSON, charts, and what is wrong with a command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pagedkv.cli import app
from pagedkv.errors import InvalidSpec
from pagedkv.planner.plan import plan_memory
from pagedkv.simulator.plot import short_size

DOCS = Path(__file__).parents[2] / "docs" / "simulator.md"
ALPACA = ("--trace", "synthetic:alpaca", "--num-requests", "40")

SHARES = {"tokens", "reservation", "internal", "external", "cached", "free"}
SCHEMA: dict[str, Any] = {
    "schema": str,
    "trace": {
        "name": str, "num_requests": int, "num_skipped": int, "mean_input_length": float,
        "mean_output_length": float, "seconds": float,
    },
    "setting": {
        "num_slots": int, "block_size": int, "token_bytes": int, "host_slots": (int, type(None)),
        "max_model_len": (int, type(None)), "max_batch": int, "watermark": float, "samples": int,
        "beams": int, "beam_switch": float, "preempt": str, "seed": int,
    },
    "service": {
        "step_seconds": float, "context_seconds": float, "token_seconds": float,
        "copy_bandwidth": (int, float),
    },
    "max_model_len": int,
    "policies": [{
        "policy": str, "shares": dict.fromkeys(SHARES, float), "saved_by_sharing": float,
        "mean_batch": float, "max_batch": int, "num_requests": int, "num_finished": int,
        "num_too_long": int, "num_refused": int, "num_prompt_tokens": int, "num_hit_tokens": int,
        "hit_rate": float, "num_preempted": int, "num_swapped_bytes": int,
        "num_recomputed_tokens": int, "queueing": {"mean": float, "p50": float, "p99": float},
        "seconds": float, "timeline": [{"seconds": float, "tokens": float, "held": float}],
    }],
    "cache_sizes": [{
        "num_tokens": (int, type(None)), "num_requests": int, "num_refused": int,
        "num_prompt_tokens": int, "num_hit_tokens": int, "hit_rate": float, "refused_rate": float,
    }],
}  # fmt: skip


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def check(value: Any, schema: Any, where: str = "") -> None:
    """Exactly the fields of the schema, each of its type."""
    if isinstance(schema, dict):
        assert set(value) == set(schema), where
        for name, inner in schema.items():
            check(value[name], inner, f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for item in value:
            check(item, schema[0], f"{where}[]")
    else:
        assert isinstance(value, schema), f"{where} is {value!r}"
        assert not isinstance(value, bool), where


def names(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return names(schema[0])
    if isinstance(schema, dict):
        return set(schema).union(*(names(inner) for inner in schema.values()))
    return set()


@pytest.fixture
def prefixes(tmp_path: Path) -> Path:
    """Prompts of 1,000 tokens: every other one begins as the one before the last."""
    path = tmp_path / "prefixes.jsonl"
    rows = [
        {
            "timestamp": 100 * i,
            "input_length": 1000,
            "output_length": 20,
            "hash_ids": [i % 2, 9 + i],
        }
        for i in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_json_has_the_schema(prefixes: Path) -> None:
    result = run(
        "--trace", prefixes, "--json", "--num-slots", 8192, "--cache-sizes", "4K,unbounded"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    check(report, SCHEMA)
    assert report["schema"] == "pagedkv.simulate/1"
    assert [p["policy"] for p in report["policies"]][-2:] == ["prefix", "swap"]
    assert [size["num_tokens"] for size in report["cache_sizes"]] == [4096, None]
    assert report["cache_sizes"][1]["num_hit_tokens"] == 18 * 512
    assert report["policies"][-2]["num_hit_tokens"] == 18 * 512


def test_the_docs_name_every_field_of_the_schema() -> None:
    if not DOCS.is_file():
        pytest.skip("no docs here")
    documented = DOCS.read_text()
    assert [n for n in names(SCHEMA) if f"`{n}`" not in documented] == []
    assert "`pagedkv.simulate/1`" in documented


def test_tables() -> None:
    result = run(*ALPACA, "--samples", 2)
    assert result.exit_code == 0, result.output
    for word in (
        "40 requests",
        "service model: a step 16.5 ms",
        "2 samples",
        "saved by sharing",
        "queued, p99 s",
        "sharing: + the samples or beams of a request share blocks",
    ):
        assert word in result.stdout  # fmt: skip
    assert "prefix" not in result.stdout.replace("prefix hit rate", "")


def test_beams_are_labelled_as_modelled() -> None:
    assert "modelled: at each step a beam goes on" in run(*ALPACA, "--beams", 2).stdout


def test_a_trace_with_hash_ids_is_studied_by_cache_size(prefixes: Path) -> None:
    result = run("--trace", prefixes)
    assert result.exit_code == 0, result.output
    assert "unbounded" in result.stdout
    assert "reservation" not in result.stdout
    both = run("--trace", prefixes, "--cache-sizes", "1M", "--policy", "paged, prefix")
    assert "1,048,576" in both.stdout
    assert "reservation" in both.stdout


def test_memory_in_bytes_and_a_rate(prefixes: Path) -> None:
    options = ("--memory", "1GiB", "--token-bytes", 131072, "--host-memory", "2GiB", "--rate", 5)
    report = json.loads(run("--trace", prefixes, *options, "--json").stdout)
    assert report["setting"]["num_slots"] == 8192
    assert report["setting"]["host_slots"] == 16384
    assert report["trace"]["seconds"] == pytest.approx(4, abs=2.5)
    saturated = json.loads(run("--trace", prefixes, "--num-slots", 99, "--rate", "saturated",
                               "--policy", "paged", "--json").stdout)  # fmt: skip
    assert saturated["trace"]["seconds"] == 0
    assert saturated["policies"][0]["num_refused"] == 20


def test_a_policy_that_is_named_twice_runs_once() -> None:
    found = json.loads(run(*ALPACA, "--policy", "swap,paged,swap", "--json").stdout)
    assert [policy["policy"] for policy in found["policies"]] == ["swap", "paged"]


def test_the_service_model_can_be_told() -> None:
    told = ("--step-ms", 20, "--prefill-rate", 5000, "--copy-bandwidth", "50GB")
    service = json.loads(run(*ALPACA, *told, "--json").stdout)["service"]
    assert service == {"step_seconds": 0.02, "context_seconds": 0.0, "token_seconds": 1 / 5000,
                       "copy_bandwidth": 50 * 10**9}  # fmt: skip
    hardware = ("--parameters", "1e9", "--weights", "1GB", "--bandwidth", "1TB", "--tflops", 100,
                "--efficiency", 1, "--token-bytes", 1000)  # fmt: skip
    service = json.loads(run(*ALPACA, *hardware, "--json").stdout)["service"]
    assert service["step_seconds"] == pytest.approx(1e-3)
    assert service["context_seconds"] == pytest.approx(1e-9)
    assert service["token_seconds"] == pytest.approx(2e-5)


def test_a_model_on_a_gpu_is_what_the_planner_says() -> None:
    pair = ("--model", "llama-3.1-8b", "--gpu", "a100-80gb")
    report = json.loads(run(*ALPACA, *pair, "--json").stdout)
    plan = plan_memory("llama-3.1-8b", "a100-80gb")
    assert report["setting"]["num_slots"] == plan.kv.num_tokens
    assert report["setting"]["token_bytes"] == 131_072
    gpu = plan.gpu
    assert None not in (gpu.bandwidth, gpu.flops, gpu.pcie)
    assert report["service"] == pytest.approx(
        {"step_seconds": 16_060_522_496 / gpu.bandwidth,
         "context_seconds": 131_072 / gpu.bandwidth,
         "token_seconds": 2 * (8_030_261_248 - 128_256 * 4096) / (0.5 * gpu.flops),
         "copy_bandwidth": 0.8 * gpu.pcie}
    )  # fmt: skip
    split = json.loads(run(*ALPACA, *pair, "--tp", 2, "--memory", "1GiB", "--json").stdout)
    assert split["setting"]["token_bytes"] == 65_536
    assert split["setting"]["num_slots"] == 2**30 // 65_536
    assert split["service"]["token_seconds"] == pytest.approx(
        report["service"]["token_seconds"] / 2
    )
    own = json.loads(run(*ALPACA, *pair, "--parameters", "1e9", "--json").stdout)["service"]
    assert own["step_seconds"] == pytest.approx(2e9 / gpu.bandwidth)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_charts(prefixes: Path, tmp_path: Path, suffix: str) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    out = tmp_path / f"charts{suffix}"
    sizes = ("--cache-sizes", "16K,unbounded", "--num-slots", 8192)
    result = run("--trace", prefixes, *sizes, "--plot", out)
    assert result.exit_code == 0, result.output
    if suffix == ".svg":
        text = out.read_text()
        assert text.count('<g id="axes_') == 3
        return
    with image.open(out) as picture:
        assert picture.size == (1045, 1386)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # something is drawn


def test_short_sizes() -> None:
    assert [short_size(n) for n in (16 << 10, 1 << 20, 3 << 19, 1000)] == [
        "16K", "1M", "1536K", "1,000"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--trace", "nowhere.csv"), "trace nowhere.csv: No such file"),
        (("--trace", "synthetic:gpt"), "synthetic load 'gpt'"),
        ((*ALPACA, "--policy", "best"), "policy 'best', expected one of contiguous-max"),
        ((*ALPACA, "--policy", "paged,"), "policy ''"),
        ((*ALPACA, "--num-slots", "5"), "num_slots is 5"),
        ((*ALPACA, "--num-slots", "0"), "num_slots is 0"),
        ((*ALPACA, "--memory", "12Gb"), "--memory is '12Gb'"),
        ((*ALPACA, "--memory", "5"), "--memory is '5', less than the 13,107,200 bytes of a block"),
        ((*ALPACA, "--memory", "2MB"), "of a block: is a unit missing, such as GiB?"),
        ((*ALPACA, "--memory", "1GiB", "--num-slots", "99"), "choose one"),
        ((*ALPACA, "--token-bytes", "0", "--memory", "1GiB"), "token_bytes is 0"),
        ((*ALPACA, "--host-memory", "much"), "--host-memory is 'much'"),
        ((*ALPACA, "--rate", "0"), "--rate is '0'"),
        ((*ALPACA, "--rate", "nan"), "--rate is 'nan'"),
        ((*ALPACA, "--rate", "fast"), "--rate is 'fast'"),
        (("--trace", "synthetic:alpaca", "--num-requests", "0"), "num-requests is 0"),
        (("--trace", "synthetic:alpaca", "--num-requests", "99999999"), "1 to 10,000,000"),
        ((*ALPACA, "--num-slots", "99999999999"), "num_device_blocks is"),
        ((*ALPACA, "--cache-sizes", "1M"), "has no hash_ids"),
        ((*ALPACA, "--cache-sizes", "1X"), "--cache-sizes has '1X'"),
        ((*ALPACA, "--samples", "2", "--beams", "2"), "choose one"),
        ((*ALPACA, "--seed", "-1"), "seed is -1"),
        ((*ALPACA, "--preempt", "drop"), "preempt is 'drop'"),
        ((*ALPACA, "--prefill-rate", "0"), "--prefill-rate is 0"),
        ((*ALPACA, "--step-ms", "-1"), "step_seconds is -0.001"),
        ((*ALPACA, "--step-ms", "nan"), "step_seconds is nan"),
        ((*ALPACA, "--bandwidth", "0"), "bandwidth is 0"),
        ((*ALPACA, "--copy-bandwidth", "0"), "copy_bandwidth is 0"),
        ((*ALPACA, "--efficiency", "2"), "efficiency is 2"),
        ((*ALPACA, "--parameters", "-1"), "step_seconds is -"),
        ((*ALPACA, "--model", "llama-3.1-8b"), "expected both --model and --gpu"),
        ((*ALPACA, "--tp", "2"), "expected both --model and --gpu"),
        ((*ALPACA, "--model", "llama-3.1-8b", "--gpu", "80GB"), "no speed is known"),
        ((*ALPACA, "--model", "llama-3.1-70b", "--gpu", "l4"), "leaves no memory"),
        ((*ALPACA, "--model", "lama", "--gpu", "l4"), "model"),
        ((*ALPACA, "--plot", "chart.gif"), "plot chart.gif: expected a file name that ends in"),
        ((*ALPACA, "--plot", "nowhere/a.png"), "the folder nowhere does not exist"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, InvalidSpec), result.output
    assert words in str(result.exception)


def test_a_broken_line_ends_in_a_message_and_code_2(tmp_path: Path) -> None:
    """In a process of its own: no traceback, nothing on stdout; and with the flag, a report."""
    path = tmp_path / "broken.csv"
    path.write_text("input_length,output_length\n10,5\n10,many\n")
    command = [sys.executable, "-m", "pagedkv", "simulate", "--trace", str(path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert re.fullmatch(
        r"pagedkv: .*broken.csv, line 3: output_length is 'many'.*\n", refused.stderr
    )
    skipping = [*command, "--skip-broken"]
    skipped = subprocess.run(skipping, capture_output=True, text=True, check=False)
    assert skipped.returncode == 0, skipped.stderr
    assert "1 requests at once, 1 broken lines left out" in skipped.stdout
    assert skipped.stderr == ""


def test_the_command_line_starts_without_numpy() -> None:
    """Other commands do not wait for what this one needs."""
    code = "import sys, pagedkv.cli; print('numpy' in sys.modules, 'matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
