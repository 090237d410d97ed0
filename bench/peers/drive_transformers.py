"""End to end: transformers' generate() on a real model, with its own caches and with pagedkv's.

    python bench/peers/drive_transformers.py greedy --cache dense --model PATH

Prints {"values": [seconds of process CPU time], "tokens": [...]}, the tokens to be compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
)
from transformers.utils import logging

NO_BEAMS = "ignores num_beams"


def dense(model: Any, prompt: torch.Tensor, config: Any) -> list[int]:
    out = model.generate(prompt, past_key_values=DynamicCache(), generation_config=config)
    return list(out[0].tolist())


def paged(model: Any, prompt: torch.Tensor, config: Any) -> list[int]:
    from pagedkv.integrations.transformers import PagedCache

    with PagedCache.for_model(model, "512MiB") as cache:
        out = model.generate(prompt, past_key_values=cache, generation_config=config)
    return list(out[0].tolist())


def continuous(model: Any, prompt: torch.Tensor, config: Any) -> list[int]:
    """Its scheduler runs in a thread, which process time holds, and stays for later requests."""
    ids = prompt[0].tolist()
    found = model.generate_batch(
        [ids],
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=1024),
        persistent_manager=True,
    )
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} results of one request")
    (result,) = found.values()
    if result.error:
        raise RuntimeError(result.error)
    return ids + list(result.generated_tokens)


# Tokens of a prompt, new tokens, beams, and generations that are timed.
SIZES = {"greedy": (256, 16, 1, 5), "greedy_1k": (1024, 32, 1, 3), "beams": (256, 16, 8, 1)}

CACHES: dict[str, Callable[[Any, torch.Tensor, Any], list[int]]] = {
    "dense": dense,
    "paged": paged,
    "continuous": continuous,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=list(SIZES))
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--cache", choices=list(CACHES), required=True)
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    length, new, num_beams, rounds = SIZES[options.workload]
    if options.size == "small":
        length, new, rounds = 24, 4, 1
    if options.cache == "continuous" and num_beams > 1:
        print(json.dumps({"cannot": NO_BEAMS}))
        return
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    config = GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new if num_beams > 1 else None,
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    run, values = CACHES[options.cache], []
    for seed in range(rounds + 1):  # a prompt of its own for each, so that none is a prefix hit
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(3, model.config.vocab_size, (1, length), generator=generator)
        begin = time.process_time()
        tokens = run(model, prompt, config)
        values.append(time.process_time() - begin)
    values = values[1:]  # the first also loads, allocates and starts threads
    print(json.dumps({"values": values, "tokens": tokens}))


if __name__ == "__main__":
    main()
