"""What a prefix cache of each size finds: requests one at a time, prompts only.

Every prompt goes through the real BlockManager: create (which takes the hit), append of the rest,
commit, release. A cache of hash blocks that evicts the least recently used, a prompt's last blocks
first, gives the same hits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pagedkv._core import BlockManager
from pagedkv.errors import InvalidSpec
from pagedkv.simulator.paged import prompt_tokens, token_runs
from pagedkv.simulator.report import CacheSize
from pagedkv.simulator.trace import Trace

__all__ = ["hit_rates"]

Progress = Callable[[str, float], None]


def hit_rates(
    trace: Trace,
    sizes: Sequence[int | None],
    *,
    block_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[CacheSize, ...]:
    """Hits by size of the cache, in tokens; None is a cache that never evicts.

    A trace names whole hash blocks, the last one too, however few tokens of it a prompt has. So
    prompts are filled up to whole blocks, and a hit counts no more than the prompt is long.
    `block_size` is by default the trace's hash_block_size.

    Raises InvalidSpec: the trace has no hash ids, or a size holds no block.
    """
    if not trace.has_hash_ids:
        raise InvalidSpec(f"{trace.name} has no hash_ids, which tell the prompts that begin alike")
    block_size = trace.hash_block_size if block_size is None else block_size
    for size in sizes:
        if size is not None and size < block_size:
            raise InvalidSpec(f"a cache of {size} tokens holds no block of {block_size}")
    runs = token_runs(trace)
    return tuple(_study(trace, size, block_size, runs, progress) for size in sizes)


def _study(
    trace: Trace,
    size: int | None,
    block_size: int,
    runs: dict[int, int],
    progress: Progress | None,
) -> CacheSize:
    per_hash = -(-trace.hash_block_size // block_size)
    longest = max(len(r.hash_ids or ()) for r in trace.requests)
    num_blocks = (len(runs) + longest) * per_hash if size is None else size // block_size
    manager = BlockManager(num_blocks, 0, block_size, max_model_len=num_blocks * block_size + 1)
    num_hit = num_refused = num_prompt = 0
    for number, request in enumerate(trace.requests):
        num_prompt += request.input_length
        tokens = prompt_tokens(request.hash_ids or (), runs, trace.hash_block_size)
        # To whole blocks, and the one token more that create() never takes as a hit.
        tokens = np.pad(tokens, (0, -len(tokens) % block_size + 1), constant_values=len(runs))
        if len(tokens) > num_blocks * block_size + 1:
            num_refused += 1
            continue
        id = manager.create(tokens)
        hit = manager.num_cached(id)
        num_hit += min(hit, request.input_length)
        rest, ids = tokens[hit:-1], np.array([id])
        if len(rest):
            manager.commit(manager.append(ids, rest, counts=np.array([len(rest)])))
        manager.release(ids)
        if progress and number % 128 == 0:
            name = "unbounded" if size is None else f"{size:,} tokens"
            progress(f"cache of {name}", number / len(trace.requests))
    return CacheSize(size, len(trace.requests), num_refused, num_prompt, num_hit)
