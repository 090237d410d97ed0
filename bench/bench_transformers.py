"""End to end: stock `model.generate()` with PagedCache, against DynamicCache and against a floor.

    python bench/bench_transformers.py                  # 16 layers x hidden 512, random weights
    python bench/bench_transformers.py --model PATH     # any local transformers model
    python bench/bench_transformers.py --out out.md --json out.json

Figures are process CPU time on one thread, so that neither a busy machine nor threads that spin
while they wait blur them, as medians over rounds in which all systems take turns. A *floor* is what
the model's own arithmetic costs with no cache to speak of: its prefill, and one step per further
token on a cache of one token. It holds no attention over the context, no cache update and nothing
of generate() itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from pagedkv.integrations.transformers import PagedCache
from report import commit, cpu_name, heading


@dataclass(frozen=True)
class Size:
    """A workload: `beams` over a prompt of `prompt` tokens, `new` tokens generated."""

    prompt: int = 512
    new: int = 64
    beams: int = 8
    rounds: int = 5


@dataclass
class Result:
    """Median seconds per system, and KV bytes at the peak."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    equal: dict[str, bool] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        s, b = self.seconds, self.peak_bytes
        return {
            "stock beam / floor, prompt computed per beam": s["paged"] / s["floor_per_beam"],
            "prefill-once beam / floor, prompt computed once": s["prefilled"] / s["floor_once"],
            "greedy / dense greedy": s["paged_greedy"] / s["dense_greedy"],
            "dense beam / floor, prompt computed per beam": s["dense"] / s["floor_per_beam"],
            "stock beam / dense beam": s["paged"] / s["dense"],
            "KV peak, beam / dense": b["paged"] / b["dense"],
        }


BARS = {
    "stock beam / floor, prompt computed per beam": 1.2,
    "prefill-once beam / floor, prompt computed once": 1.8,
    "greedy / dense greedy": 1.1,
    "KV peak, beam / dense": 0.2,
}


def random_llama(layers: int = 16, hidden: int = 512, heads: int = 8, vocab: int = 32000) -> Any:
    """A Llama of random weights, float32, on the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


def floor(model: Any, ids: torch.Tensor, copies: int, beams: int, new: int) -> None:
    """A prefill of `copies` equal rows, and new - 1 steps of `beams` rows on one token."""
    with torch.no_grad():
        model(ids.repeat(copies, 1), past_key_values=DynamicCache(), logits_to_keep=1)
        token = ids[:, -1:].repeat(beams, 1)
        for _ in range(new - 1):
            cache = DynamicCache()
            model(token, past_key_values=cache, logits_to_keep=1)


def measure(model: Any, size: Size) -> Result:
    """Run every system `size.rounds` times, one after the other in each round."""
    torch.manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (1, size.prompt))
    options = {
        "min_new_tokens": size.new,
        "max_new_tokens": size.new,
        "do_sample": False,
        "pad_token_id": 0,
    }
    result, outputs = Result(), {}
    memory = 2 * (size.beams + 2) * (size.prompt + size.new + 64)

    def generate(name: str, cache: Any, beams: int) -> Any:
        outputs[name] = model.generate(ids, past_key_values=cache, num_beams=beams, **options)
        return cache

    def dense(name: str, beams: int) -> None:
        cache = generate(name, DynamicCache(), beams)
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        result.peak_bytes[name] = sum(t.numel() * t.element_size() for t in tensors)

    def paged(name: str, beams: int, prefill: bool = False) -> None:
        with PagedCache.for_model(model, memory * token_bytes) as cache:
            if prefill:
                cache.prefill(model, ids)
            generate(name, cache, beams)
            result.peak_bytes[name] = cache.stats().peak_bytes

    token_bytes = kv_token_bytes(model)
    systems: dict[str, Callable[[], None]] = {
        "floor_per_beam": lambda: floor(model, ids, size.beams, size.beams, size.new),
        "floor_once": lambda: floor(model, ids, 1, size.beams, size.new),
        "dense": lambda: dense("dense", size.beams),
        "paged": lambda: paged("paged", size.beams),
        "prefilled": lambda: paged("prefilled", size.beams, prefill=True),
        "dense_greedy": lambda: dense("dense_greedy", 1),
        "paged_greedy": lambda: paged("paged_greedy", 1),
    }
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(size.rounds):
        for name, run in systems.items():
            begin = time.process_time()
            run()
            times[name].append(time.process_time() - begin)
    result.seconds = {name: statistics.median(values) for name, values in times.items()}
    for name in ("paged", "prefilled", "paged_greedy"):
        reference = "dense_greedy" if name == "paged_greedy" else "dense"
        result.equal[name] = torch.equal(outputs[name], outputs[reference])
    return result


def kv_token_bytes(model: Any) -> int:
    """Bytes of K and V that one token of `model` takes."""
    with PagedCache.for_model(model, "1GiB") as cache:
        return int(cache.kv.spec.token_bytes)


def report(result: Result) -> str:
    """Markdown: seconds and bytes per system, then the ratios beside their bars."""
    lines = ["| system | CPU s | KV peak MiB | tokens as dense |", "|---|---|---|---|"]
    for name, seconds in result.seconds.items():
        peak = result.peak_bytes.get(name)
        mib = "" if peak is None else f"{peak / 2**20:.1f}"
        equal = {True: "yes", False: "no", None: ""}[result.equal.get(name)]
        lines.append(f"| {name} | {seconds:.2f} | {mib} | {equal} |")
    lines += ["", "| ratio | value | bar |", "|---|---|---|"]
    for name, value in result.ratios().items():
        lines.append(f"| {name} | {value:.2f} | {BARS.get(name, '')} |")
    return "\n".join(lines)


def machine(threads: int) -> dict[str, Any]:
    """Where and with what the figures are measured."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": threads,
    }


def describe(model: Any, size: Size, where: dict[str, Any]) -> str:
    config = model.config
    return (
        f"{heading(where)}, torch {where['torch']}, transformers {where['transformers']}, "
        f"{where['threads']} thread(s).\n\n{size.beams} beams, {size.prompt} + {size.new} tokens; "
        f"{config.num_hidden_layers} layers x hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {config.num_key_value_heads} KV heads; medians of "
        f"{size.rounds} rounds.\n\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a local model directory; default: a random Llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--beams", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the Markdown here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    else:
        model = random_llama()
    size = Size(arguments.prompt, arguments.new, arguments.beams, arguments.rounds)
    where = machine(arguments.threads)
    result = measure(model, size)
    text = describe(model, size, where) + report(result) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)
    if arguments.json:
        sizes = {"machine": where, "size": asdict(size)}
        record = sizes | asdict(result) | {"ratios": result.ratios(), "bars": BARS}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
