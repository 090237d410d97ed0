"""examples/engine.py: preempted or not, its requests end with the same tokens."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import pagedkv as pk  # noqa: E402
from pagedkv._demo_model import DemoModel, tiny_llama  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda, SimulatedDevice  # noqa: E402

ENGINE = Path(__file__).parents[2] / "examples" / "engine.py"
NEW = 40


@functools.cache
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_example", ENGINE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@functools.cache
def network() -> Any:
    return tiny_llama()


def prompts() -> list[list[int]]:
    """Some begin alike, and all have other lengths."""
    found = example().prompts(DemoModel("tiny", network()))
    return [found[0][:24] + prompt[: 8 + 3 * i] for i, prompt in enumerate(found)]


def run(mode: str, num_blocks: int, device: Any = "cpu") -> tuple[list[list[int]], Any]:
    """The tokens, and the engine; everything that it held is given back."""
    spec = pk.KVSpec.from_config(network().config, dtype="float32", block_size=8)
    with pk.KVCache(spec, device=device, num_device_blocks=num_blocks, num_host_blocks=128) as kv:
        engine = example().Engine(network(), kv, mode)
        tokens = engine.run(prompts(), NEW)
        for transfer in kv.under_way():
            transfer.wait()
        kv.manager.verify()
        assert kv.stats().num_sequences == 0
        assert kv.stats().device.num_active == kv.stats().host.num_active == 0
        engine.stats = kv.stats()
    return tokens, engine


@functools.cache
def with_room() -> list[list[int]]:
    tokens, engine = run("swap", 400)
    assert engine.num_preemptions == 0
    return tokens


def test_with_room_it_gives_what_generate_gives() -> None:
    for prompt, tokens in zip(prompts(), with_room(), strict=True):
        ids = torch.tensor([prompt])
        expected = network().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        assert tokens == expected[0, len(prompt) :].tolist()


def check(mode: str, num_blocks: int, device: Any = "cpu") -> None:
    tokens, engine = run(mode, num_blocks, device)
    assert tokens == with_room()
    assert engine.num_preemptions > 0
    assert engine.num_recomputed > 0 if mode == "recompute" else engine.num_recomputed == 0
    assert (engine.stats.num_swapped_out_blocks > 0) == (mode != "recompute")


@pytest.mark.parametrize("num_blocks", [14, 24, 40])  # the first holds one request, the last four
@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_preempted_requests_give_the_same_tokens(mode: str, num_blocks: int) -> None:
    check(mode, num_blocks)


@pytest.mark.parametrize("schedule", ["random", "lazy", "eager"])
@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
@pytest.mark.parametrize("seed", range(4))
def test_with_copies_that_run_late_and_out_of_order(seed: int, mode: str, schedule: Any) -> None:
    device = SimulatedDevice(seed, schedule=schedule)
    check(mode, 24, device)
    assert device.violations == []


@pytest.mark.parametrize("schedule", ["random", "lazy"])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_on_a_simulated_gpu(mode: str, schedule: Any) -> None:
    cuda = SimulatedCuda(1, schedule=schedule)
    check(mode, 24, CudaDevice(cuda))
    assert cuda.violations == []


def test_a_device_too_small_for_one_request_is_told() -> None:
    with pytest.raises(pk.InvalidSpec, match="max_model_len"):
        run("swap", 6)


def test_it_runs_alone() -> None:
    done = subprocess.run(
        [sys.executable, str(ENGINE), "--model", "tiny", "--mode", "swap"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *texts, counts, rate = done.stdout.splitlines()
    assert len(texts) == 8
    assert "preemptions, 0 tokens computed again" in counts
    assert rate.endswith(" tokens per second")
