"""A tiny inference engine over pagedkv: more requests than the device has blocks for.

    python examples/engine.py --model tiny --mode swap --device-blocks 40

Every running request has tokens that the cache does not hold yet: its prompt, or what a prefix hit
left of it; the one token that it has just generated; or what is to be computed again after a
preemption. One step computes all of them, so there is one path for prefill, decode and recompute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import pagedkv as pk
from pagedkv._demo_model import DemoModel, load
from pagedkv.preemption import PreemptMode

QUESTIONS = [
    f"Tell me one thing about {subject}."
    for subject in ("cats", "bread", "ships", "storms", "the moon", "clocks", "rivers", "snow")
]


@dataclass(eq=False)
class Request:
    """A prompt and what was generated for it. `id` is its sequence, once it is admitted."""

    number: int
    tokens: list[int]
    end: int  # length at which it is finished
    id: int = -1


class Engine:
    """Runs requests of a Llama to their end: greedy, and always the oldest ones first."""

    def __init__(self, network: Any, kv: pk.KVCache, mode: PreemptMode = "auto") -> None:
        self.network, self.kv, self.mode = network, kv, mode
        # Each request is in one of these, from the oldest to the newest.
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preempted: list[Request] = []
        self.returning: list[Request] = []  # resumed, and its blocks are still on their way
        self.num_preemptions = self.num_recomputed = 0

    def run(self, prompts: Sequence[list[int]], num_new: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        self.waiting = [Request(i, list(p), len(p) + num_new) for i, p in enumerate(prompts)]
        requests = list(self.waiting)
        while self.waiting or self.running or self.preempted or self.returning:
            self.schedule()
            self.step()
        return [r.tokens[r.end - num_new :] for r in requests]

    def schedule(self) -> None:
        """Before a step: take in what has arrived, bring back what fits, then admit."""
        self.kv.poll()  # raises the error of a transfer that failed
        if not self.running:  # nothing to compute until something arrives
            for transfer in self.kv.under_way():
                transfer.wait()
        for request in [r for r in self.returning if self.kv.ready([r.id])]:
            self.returning.remove(request)
            self.running.append(request)
        while self.preempted and self.has_room(self.preempted[0]):
            self.resume(self.preempted.pop(0))
        while self.waiting and not self.preempted and self.has_room(self.waiting[0]):
            request = self.waiting.pop(0)
            request.id = self.kv.create(request.tokens)
            self.running.append(request)
        self.running.sort(key=lambda r: r.number)

    def has_room(self, request: Request) -> bool:
        """Whether the device holds its tokens, and one to come, beside those that are active."""
        active = self.running + self.returning
        if not active:
            return True
        # Of those that have not run yet, the blocks are promised and not taken.
        size, device = self.kv.spec.block_size, self.kv.stats().device
        wanted = sum(-(-(len(r.tokens) + 1) // size) for r in [*active, request])
        taken = sum(-(-self.kv.length(r.id) // size) for r in active)
        return wanted - taken <= device.num_free + device.num_cached

    def preempt(self, request: Request) -> None:
        """Give its blocks to older requests. A swap's copies run beside the following steps."""
        self.running.remove(request)
        self.num_preemptions += 1
        self.kv.preempt([request.id], mode=self.mode)
        self.preempted.append(request)
        self.preempted.sort(key=lambda r: r.number)

    def resume(self, request: Request) -> None:
        """Bring back what was swapped out; what was dropped is computed by the next steps."""
        held = len(request.tokens) - 1  # the last token has never been in a step
        self.num_recomputed += max(held - int(self.kv.resume([request.id])[0]), 0)
        self.returning.append(request)

    def step(self) -> None:
        """One step of all running requests: compute what is missing, add a token to each."""
        while self.running:
            ids = [r.id for r in self.running]
            missing = [r.tokens[self.kv.length(r.id) :] for r in self.running]
            try:
                step = self.kv.step(ids, [t for m in missing for t in m], list(map(len, missing)))
                break
            except pk.OutOfBlocks:
                if len(self.running) + len(self.returning) == 1:
                    raise  # the device is too small for this one request
                self.preempt(self.running[-1])  # the newest has the least to lose
        else:
            return
        with step:
            logits = self.forward(step)
        for request, token in zip(list(self.running), logits.argmax(-1).tolist(), strict=True):
            request.tokens.append(token)
            if len(request.tokens) == request.end:
                self.running.remove(request)
                self.kv.release([request.id])

    @torch.no_grad()
    def forward(self, step: pk.Step) -> torch.Tensor:
        """transformers' own modules on a step's tokens, all rows in a line: logits [B, vocab]."""
        model = self.network.model
        x = model.embed_tokens(step.input_ids)
        cos, sin = model.rotary_emb(x, step.positions[None])
        for number, layer in enumerate(model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                project(normed).unflatten(-1, (-1, attention.head_dim))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cos[0], sin[0], unsqueeze_dim=1)
            self.kv.write(number, k, v, step)
            x = x + attention.o_proj(self.kv.attention(number, q, step).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        last = step.query_starts[1:].long() - 1
        logits: torch.Tensor = self.network.lm_head(model.norm(x[last]))
        return logits


def prompts(model: DemoModel) -> list[list[int]]:
    """One for each question; of random tokens where the model has no tokenizer."""
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        vocabulary, shape = model.network.config.vocab_size, (len(QUESTIONS), 40)
        found: list[list[int]] = torch.randint(vocabulary, shape, generator=generator).tolist()
        return found
    return [model.tokenizer(question)["input_ids"] for question in QUESTIONS]


def main() -> None:
    parser = argparse.ArgumentParser(description="A tiny inference engine over pagedkv.")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2 or a Llama's folder")
    parser.add_argument("--mode", default="auto", choices=["auto", "swap", "recompute"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--device-blocks", type=int, default=24)
    parser.add_argument("--host-blocks", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=48)
    args = parser.parse_args()
    model = load(args.model, Console())
    model.network.to(args.device)
    spec = pk.KVSpec.from_config(model.network.config, dtype=str(model.network.dtype))
    blocks = {"num_device_blocks": args.device_blocks, "num_host_blocks": args.host_blocks}
    with pk.KVCache(spec, device=args.device, **blocks) as kv:
        engine, begin = Engine(model.network, kv, args.mode), time.perf_counter()
        found = engine.run(prompts(model), args.new_tokens)
        rate = sum(map(len, found)) / (time.perf_counter() - begin)
    for new in found:
        print("-", " ".join(model.decode(new).split()))
    print(f"{engine.num_preemptions} preemptions, {engine.num_recomputed} tokens computed again")
    print(f"{rate:.0f} tokens per second")


if __name__ == "__main__":
    main()
