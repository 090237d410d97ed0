"""Speculative decoding over pagedkv: draft cheaply, verify in one step, truncate what was wrong.

    python examples/speculative.py                    # random weights, no download
    python examples/speculative.py --model smollm2    # real text

The drafts are what followed the last few tokens where they stood before (prompt lookup). Where that
differs, there are several: a tree, whose branches are forks of the sequence and share its blocks.
All are verified in one step; the one that came furthest is kept, and the others are released. The
tokens are those of greedy decoding, whatever was drafted: a draft can only save steps.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console

import pagedkv as pk
from engine import Engine, encode, prompts
from pagedkv.demo.model import DemoModel, load

TEXT = (
    "The harbour opens at six. Boats that carry fish go to the north pier, boats that carry bread "
    "go to the south pier, and boats that carry mail go to the lighthouse. The keeper of the "
    "lighthouse writes down each boat, and the baker of the harbour writes down each loaf."
)


@dataclass
class Run:
    """New tokens, and what they took. Of `num_drafted` tokens `num_accepted` were right."""

    tokens: list[int] = field(default_factory=list)
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    seconds: float = 0.0


def draft(tokens: list[int], depth: int, width: int) -> list[list[int]]:
    """Up to `width` continuations of up to `depth` tokens, which differ in their first one.

    What followed the last three tokens where they stood before, the latest first; then what
    followed the last two, and the last. Where that reaches the end, it is taken to repeat.
    """
    found: dict[int, list[int]] = {}
    for n in (3, 2, 1):
        for at in range(len(tokens) - n, n - 1, -1):
            if len(found) == width:
                break
            if tokens[at - n : at] == tokens[-n:]:
                period = len(tokens) - at
                branch = [tokens[at + i % period] for i in range(depth)]
                found.setdefault(branch[0], branch)
    return list(found.values())


def verify(
    engine: Engine, id: int, tokens: list[int], branches: list[list[int]]
) -> tuple[int, list[int]]:
    """One step of the sequence `id`, which holds all of `tokens` but the last, down each branch.

    Returns the sequence that goes on, and the tokens that it gained: those of the best branch that
    greedy decoding gives as well, and the one that it gives after them. Where the step raises, `id`
    is as it was.
    """
    kv = engine.kv
    ids = kv.fork(id, len(branches)).tolist()
    rows = [tokens[-1:] + branch for branch in branches]
    try:
        with kv.step(ids, [t for row in rows for t in row], list(map(len, rows))) as step:
            given = engine.forward(step, torch.arange(step.plan.num_tokens)).argmax(-1).tolist()
    except BaseException:  # too few blocks for so many branches, say
        kv.release(ids[1:])
        raise
    best, gained = 0, given[:1]
    for i, branch in enumerate(branches):
        mine, given = given[: len(branch) + 1], given[len(branch) + 1 :]
        right = next((n for n, t in enumerate(branch) if t != mine[n]), len(branch))
        if right >= len(gained):
            best, gained = i, mine[: right + 1]
    kept = ids.pop(best)
    kv.release(ids)
    kv.truncate([kept], [len(tokens) + len(gained) - 1])
    return kept, gained


def generate(engine: Engine, prompt: list[int], num_new: int, depth: int, width: int) -> Run:
    """num_new tokens after the prompt, with trees of up to `width` branches of `depth` tokens."""
    run, kv, begin = Run(), engine.kv, time.perf_counter()
    id, tokens = kv.create(prompt), list(prompt)
    try:
        held = kv.num_cached(id)
        if held < len(prompt) - 1:
            with kv.step([id], prompt[held:-1], [len(prompt) - 1 - held]) as step:
                engine.forward(step, torch.arange(0))
        while (left := len(prompt) + num_new - len(tokens)) > 0:
            # A step gives one token more than it accepts.
            branches = draft(tokens, min(depth, left - 1), width) if depth and left > 1 else []
            id, gained = verify(engine, id, tokens, branches or [[]])
            tokens += gained
            run.num_steps += 1
            run.num_drafted += sum(map(len, branches))
            run.num_accepted += len(gained) - 1
    finally:
        kv.release([id])
    run.tokens, run.seconds = tokens[len(prompt) :], time.perf_counter() - begin
    return run


def prompt_of(model: DemoModel) -> list[int]:
    """Text that is to be repeated; what the engine's example takes where there is no tokenizer."""
    if model.tokenizer is None:
        return prompts(model, 1)[0]
    text = f"Repeat this text word by word, and then say it in your own words:\n{TEXT}"
    return encode(model.tokenizer, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speculative decoding over pagedkv.")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2, or a folder")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--depth", type=int, default=6, help="tokens in a branch")
    parser.add_argument("--width", type=int, default=3, help="branches in a tree")
    args = parser.parse_args()
    model = load(args.model, Console())
    prompt, spec = (
        prompt_of(model),
        pk.KVSpec.from_config(model.network.config, dtype=str(model.network.dtype)),
    )
    runs = {}
    ways = {"plain": (0, 1), "one draft": (args.depth, 1), "a tree": (args.depth, args.width)}
    for name, (depth, width) in ways.items():
        with pk.KVCache(spec, num_device_blocks=256) as kv:
            engine = Engine(model.network, kv)
            runs[name] = generate(engine, prompt, args.new_tokens, depth, width)
    print(" ".join(model.decode(runs["plain"].tokens).split()))
    print(f"{'':<10} {'steps':>6} {'drafted':>8} {'accepted':>9} {'seconds':>8}  tokens")
    for name, run in runs.items():
        same = "equal" if run.tokens == runs["plain"].tokens else "differ"
        print(
            f"{name:<10} {run.num_steps:>6} {run.num_drafted:>8} {run.num_accepted:>9} "
            f"{run.seconds:>8.2f}  {same}"
        )


if __name__ == "__main__":
    main()
