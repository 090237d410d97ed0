"""examples/engine.py: preempted or not, its requests end with the same tokens."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import pagedkv as pk  # noqa: E402
from pagedkv.demo.model import DemoModel, tiny_llama  # noqa: E402
from pagedkv.testing import CudaDevice, SimulatedCuda, SimulatedDevice  # noqa: E402

ENGINE = Path(__file__).parents[2] / "examples" / "engine.py"
NEW = 40

sys.path.insert(0, str(ENGINE.parent))
import engine as example  # noqa: E402
from engine import Request  # noqa: E402


@functools.cache
def network() -> Any:
    return tiny_llama()


def prompts() -> list[list[int]]:
    """Some begin alike, and all have other lengths."""
    found = example.prompts(DemoModel("tiny", network()))
    return [found[0][:24] + prompt[: 8 + 3 * i] for i, prompt in enumerate(found)]


def greedy() -> list[Request]:
    return [Request(prompt, NEW) for prompt in prompts()]


def run(
    mode: Any,
    num_blocks: int,
    device: Any = "cpu",
    requests: list[Request] | None = None,
    max_tokens: int = 256,
) -> tuple[list[list[list[int]]], Any]:
    """The outputs, and the engine; everything that it held is given back."""
    spec = pk.KVSpec.from_config(network().config, dtype="float32", block_size=8)
    with pk.KVCache(spec, device=device, num_device_blocks=num_blocks, num_host_blocks=128) as kv:
        engine: Any = example.Engine(network(), kv, mode, max_tokens)
        tokens = engine.run(greedy() if requests is None else requests)
        for transfer in kv.under_way():
            transfer.wait()
        kv.manager.verify()
        assert kv.stats().num_sequences == 0
        assert kv.stats().device.num_active == kv.stats().host.num_active == 0
        engine.stats = kv.stats()
    return tokens, engine


@functools.cache
def with_room() -> list[list[list[int]]]:
    tokens, engine = run("swap", 400)
    assert engine.num_preemptions == 0
    return tokens


def test_with_room_it_gives_what_generate_gives() -> None:
    for prompt, tokens in zip(prompts(), with_room(), strict=True):
        assert tokens == [generated(prompt)]


def generated(prompt: list[int], stop: list[int] | None = None, **options: Any) -> list[int]:
    """What generate() gives, up to its end token."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    found = (
        network()
        .generate(
            ids, attention_mask=torch.ones_like(ids), eos_token_id=stop, pad_token_id=299, **options
        )[0, len(prompt) :]
        .tolist()
    )
    ends = [i for i, token in enumerate(found) if token in (stop or [])]
    tokens: list[int] = found[: ends[0] + 1] if ends else found
    return tokens


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


def mixed() -> list[Request]:
    """Every kind of request, some of which end early; the prompts of some are alike."""
    stop = frozenset({43, 161, 287})
    base = prompts()
    return [
        Request(base[0], NEW),
        Request(base[1], 25, n=3, temperature=1.5, seed=7),
        Request(base[2], NEW, n=4, beams=True),
        Request(base[7], NEW, stop=stop),
        Request(base[3], 30, n=3, beams=True, stop=stop),
        Request(base[0] + base[4], 1),
        Request(base[1], 12, n=2, temperature=1.5, seed=8, stop=stop),
        Request(base[6], 9),
    ]


@functools.cache
def mixed_with_room() -> list[list[list[int]]]:
    tokens, engine = run("swap", 400, requests=mixed(), max_tokens=10_000)
    assert engine.num_preemptions == 0
    return tokens


def test_every_kind_of_request_gives_what_generate_gives() -> None:
    for request, outputs in zip(mixed(), mixed_with_room(), strict=True):
        assert len(outputs) == (1 if request.beams else request.n)
        for tokens in outputs:
            assert len(tokens) == request.num_new or tokens[-1] in request.stop
            assert not request.stop.intersection(tokens[:-1])
        if not request.temperature:
            options = {"num_beams": request.n, "max_new_tokens": request.num_new}
            stop = sorted(request.stop) or None
            assert outputs == [generated(request.prompt, stop, **options)]


@pytest.mark.parametrize("num_beams", [2, 5])
@pytest.mark.parametrize("token", range(0, 300, 37))
def test_beam_search_that_ends_early_is_that_of_generate(num_beams: int, token: int) -> None:
    """With end tokens that are likely: the two that greedy decoding gives most, and another."""
    for prompt, tokens in list(zip(prompts(), with_room(), strict=True))[:3]:
        often = sorted(set(tokens[0]), key=lambda t: -tokens[0].count(t))[:2]
        stop = sorted({token, *often})
        request = Request(prompt, NEW, n=num_beams, beams=True, stop=frozenset(stop))
        (outputs,), _ = run("swap", 400, requests=[request])
        assert outputs == [generated(prompt, stop, num_beams=num_beams)]


def test_samples_are_drawn_by_the_seed() -> None:
    def sampled(seed: int) -> list[list[int]]:
        request = Request(prompts()[0], 20, n=4, temperature=2.0, seed=seed)
        (outputs,), _ = run("swap", 400, requests=[request])
        return outputs

    found = sampled(3)
    assert found == sampled(3) != sampled(4)
    assert len({tuple(tokens) for tokens in found}) == 4


@pytest.mark.parametrize("max_tokens", [7, 24, 10_000])
@pytest.mark.parametrize("num_blocks", [30, 400])  # the first holds the largest request
@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_chunked_or_preempted_the_tokens_are_the_same(
    mode: str, num_blocks: int, max_tokens: int
) -> None:
    tokens, engine = run(mode, num_blocks, requests=mixed(), max_tokens=max_tokens)
    assert tokens == mixed_with_room()
    assert num_blocks == 400 or engine.num_preemptions > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_every_kind_of_request_with_copies_that_run_late(mode: str, seed: int) -> None:
    device = SimulatedDevice(seed, schedule="random")
    tokens, engine = run(mode, 30, device, requests=mixed(), max_tokens=24)
    assert tokens == mixed_with_room()
    assert engine.num_preemptions > 0
    assert device.violations == []


def test_tokens_are_streamed_as_they_come() -> None:
    """Each request's in order, of all side by side, and more can be added meanwhile."""
    spec = pk.KVSpec.from_config(network().config, dtype="float32", block_size=8)
    requests, late = mixed(), Request(prompts()[5], 6)
    with pk.KVCache(spec, num_device_blocks=400) as kv:
        engine = example.Engine(network(), kv)
        engine.add(requests)
        events = []
        for event in engine.stream():
            if not events:
                engine.add([late])
            events.append(event)
    for request, outputs in zip([*requests, late], [*mixed_with_room(), late.outputs], strict=True):
        for sample, tokens in enumerate(outputs):
            mine = [t for r, s, t in events if r is request and s == sample]
            assert mine == tokens
    assert late.outputs == [with_room()[5][0][:6]]
    first = events.index((requests[0], 0, mixed_with_room()[0][0][0]))
    others = next(i for i, (r, _, _) in enumerate(events) if r is requests[7])
    last = max(i for i, (r, _, _) in enumerate(events) if r is requests[0])
    assert first < others < last  # nobody waits for the end of the requests before it


def test_a_prompt_is_computed_once_and_in_chunks() -> None:
    request = prompts()[0] * 4
    spec = pk.KVSpec.from_config(network().config, dtype="float32", block_size=8)
    sizes: list[int] = []

    class Watched(example.Engine):
        def forward(self, step: Any, last: Any) -> Any:
            sizes.append(step.plan.num_tokens)
            return super().forward(step, last)

    with pk.KVCache(spec, num_device_blocks=400) as kv:
        engine = Watched(network(), kv, max_tokens=20)
        engine.run([Request(request, 3, n=4, temperature=1.0)])
        assert sizes == [20] * (len(request) // 20) + [len(request) % 20] * bool(
            len(request) % 20
        ) + [4, 4]
        sizes.clear()
        engine.run([Request(request, 1)])
        assert sizes == [1]
        assert engine.num_hits == len(request) - 1


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_models_of_other_kinds(kind: str) -> None:
    import transformers

    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert config.model_type in example.MODEL_TYPES
    prompt = list(range(5, 50))
    spec = pk.KVSpec.from_config(config, dtype="float32", block_size=8)
    with pk.KVCache(spec, num_device_blocks=40) as kv:
        found = example.Engine(model, kv, max_tokens=16).run([Request(prompt, 20)])
    ids = torch.tensor([prompt])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert found == [[expected[0, len(prompt) :].tolist()]]


@pytest.mark.parametrize("script", ["engine.py --mode swap", "engine.py --mode recompute"])
def test_it_runs_alone(script: str) -> None:
    file, *options = script.split()
    done = subprocess.run(
        [sys.executable, str(ENGINE.with_name(file)), "--model", "tiny", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *texts, counts, rate = done.stdout.splitlines()
    assert len(texts) == 10  # eight requests, one of three samples
    assert counts.endswith(" prefix hits")
    assert not counts.startswith("0 preemptions")
    assert rate.endswith(" tokens per second")


def test_every_way_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """But for transformers' own engine, which takes long to start."""
    import throughput

    monkeypatch.setattr(throughput, "continuous_batching", throughput.padded_batch)
    assert {8 <= n <= 256 for n in throughput.lengths("uneven", 32)} == {True}
    model = DemoModel("tiny", tiny_llama())
    throughput.compare(model, [30, 3, 17, 8], rounds=2)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5
    assert all(row.endswith("4 of 4 equal") for row in rows)
