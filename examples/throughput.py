"""Throughput of the example engine, of a padded batch, and of transformers' continuous batching.

    OMP_NUM_THREADS=2 python examples/throughput.py --model smollm2

The same greedy requests go each way in turn, in several rounds; what is printed are medians, and
how many requests got the very tokens that the engine gives them. "packed" is the same model with
its weights as oneDNN multiplies few rows by them fastest, on a CPU; the engine gains more by that,
since more of its steps have few rows.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from functools import partial
from typing import Any

import torch
from rich.console import Console

import pagedkv as pk
from engine import Engine, Request, prompts
from pagedkv.demo.model import DemoModel, load


def paged(network: Any, requests: list[Request]) -> list[list[int]]:
    """The example engine."""
    spec = pk.KVSpec.from_config(network.config, dtype=str(network.dtype))
    blocks = sum(-(-(len(r.prompt) + r.num_new) // spec.block_size) for r in requests)
    with pk.KVCache(spec, device=network.device, num_device_blocks=blocks) as kv:
        return [outputs[0] for outputs in Engine(network, kv).run(requests)]


def padded_batch(network: Any, requests: list[Request]) -> list[list[int]]:
    """generate() on all of them at once, until the longest has ended."""
    longest = max(len(r.prompt) for r in requests)
    ids = torch.tensor([[0] * (longest - len(r.prompt)) + r.prompt for r in requests])
    starts = torch.tensor([[longest - len(r.prompt)] for r in requests])
    found = network.generate(
        ids.to(network.device),
        attention_mask=(torch.arange(longest) >= starts).long().to(network.device),
        max_new_tokens=max(r.num_new for r in requests),
        do_sample=False,
        pad_token_id=0,
    )[:, longest:].tolist()
    return [new[: r.num_new] for new, r in zip(found, requests, strict=True)]


def continuous_batching(network: Any, requests: list[Request]) -> list[list[int]]:
    """transformers' own engine."""
    with network.continuous_batching_context_manager() as manager:
        ids = [manager.add_request(r.prompt, max_new_tokens=r.num_new) for r in requests]
        done: dict[str, list[int]] = {}
        while len(done) < len(ids):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' engine ended before its requests had")
            elif result.error is not None:
                raise RuntimeError(f"transformers' engine failed a request: {result.error}")
            elif result.is_finished():
                done[result.request_id] = result.generated_tokens
    return [done[i] for i in ids]


def pack(network: Any) -> Any:
    """A copy of the modules, on the same weights but for those of linear layers."""
    weights = {id(tensor): tensor for tensor in network.parameters()}
    packed = copy.deepcopy(network, weights)
    for module in packed.modules():
        if isinstance(module, torch.nn.Linear):
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 32)
            module.forward = partial(_multiply, weight, module.bias)  # type: ignore[method-assign]
    return packed


def _multiply(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def lengths(kind: str, num: int) -> list[int]:
    """New tokens of each request."""
    if kind == "even":
        return [64] * num
    drawn = torch.randint(8, 257, (num,), generator=torch.Generator().manual_seed(1))
    found: list[int] = drawn.tolist()
    return found


def compare(model: DemoModel, num_new: list[int], rounds: int) -> None:
    """One request for each of num_new, which says how many tokens it gets."""
    network, texts = model.network, prompts(model, len(num_new))
    network.generation_config.eos_token_id = None  # each request has a length of its own
    ways = [("paged", paged, network), ("padded batch", padded_batch, network)]
    ways += [("continuous batching", continuous_batching, network)]
    if network.device.type == "cpu" and torch.backends.mkldnn.is_available():
        packed = pack(network)
        ways += [("paged, packed", paged, packed), ("padded batch, packed", padded_batch, packed)]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    found = {}
    for _ in range(rounds):
        for name, way, model_of_it in ways:
            requests = [Request(p, n) for p, n in zip(texts, num_new, strict=True)]
            begin = time.perf_counter()
            found[name] = way(model_of_it, requests)
            seconds[name].append(time.perf_counter() - begin)
    ours = statistics.median(seconds["paged"])
    for name, times in seconds.items():
        took = statistics.median(times)
        equal = sum(a == b for a, b in zip(found[name], found["paged"], strict=True))
        rate = f"{sum(num_new) / took:8.1f} tokens/s {took / ours:7.2f}x the engine's time"
        print(f"  {name:<21}{rate} {equal:4d} of {len(num_new)} equal")


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput beside transformers' own ways.")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2, or a folder")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = load(args.model, Console())
    for kind, title in (("uneven", "8 to 256"), ("even", "64")):
        print(f"{args.requests} requests of {title} new tokens", flush=True)
        compare(model, lengths(kind, args.requests), args.rounds)


if __name__ == "__main__":
    main()
