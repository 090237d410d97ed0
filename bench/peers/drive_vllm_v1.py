"""vLLM's KVCacheManager of today (v1): Python, prefix cache by digest, no fork, no swap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from left_out import leave_out

SERVER = ("entrypoints", "parser", "tool_parsers", "reasoning", "connections", "assets")
leave_out(
    *(f"vllm.{name}" for name in (*SERVER, "v1.structured_output")),
    *("aiohttp", "uvloop", "prometheus_client", "starlette", "fastapi"),
    *("openai", "openai_harmony", "xgrammar"),
)

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus, StructuredOutputRequest

from workloads import BLOCK_SIZE, Driver, main

StructuredOutputRequest.from_sampling_params = staticmethod(lambda *a, **k: None)


class VllmV1(Driver):
    """A handle is a Request; hashing is part of making one, and of admission."""

    cannot = {  # noqa: RUF012
        "swap_out": "preempts by recomputing; its offloading is a connector's",
        "swap_in": "preempts by recomputing; its offloading is a connector's",
    }

    def open(self, num_blocks: int, workload: str) -> None:
        """Prefix caching as by default, but for the decode step, which is quicker without."""
        caching = workload not in ("decode", "pool")
        digest = get_hash_fn_by_name("sha256")
        kv_cache_utils.init_none_hash(digest)
        hasher = kv_cache_utils.get_request_block_hasher(BLOCK_SIZE, digest)
        self.hasher, self.count = (hasher if caching else None), 0
        self.params = SamplingParams(max_tokens=100_000)
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=8, head_size=128, dtype=torch.bfloat16
        )
        config = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self.m = KVCacheManager(
            config,
            max_model_len=131_072,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            enable_caching=caching,
        )

    def admit(self, prompt: list[int]) -> Any:
        self.count += 1
        request = Request(str(self.count), prompt, self.params, None, block_hasher=self.hasher)
        blocks, hit, *_ = self.m.get_computed_blocks(request)
        if self.m.allocate_slots(request, request.num_tokens - hit, hit, blocks) is None:
            raise MemoryError("no block is left")
        request.num_computed_tokens = request.num_tokens
        request.status = RequestStatus.RUNNING
        return request

    def release(self, handle: Any) -> None:
        self.m.free(handle)

    def append(self, handle: Any, token: int) -> Any:
        handle.append_output_token_ids(token)
        blocks = self.m.allocate_slots(handle, 1)
        if blocks is None:
            raise MemoryError("no block is left")
        handle.num_computed_tokens += 1
        return blocks

    def fork(self, handle: Any) -> Any:
        """It has none: a new request of the same tokens."""
        return self.admit(list(handle.all_token_ids))

    def decode(self, handles: list[Any]) -> Callable[[], Any]:
        def step() -> None:
            self.m.new_step_starts()
            for blocks in [self.append(handle, 7) for handle in handles]:
                blocks.get_block_ids(allow_none=True)

        return step

    def beam_step(self, handle: Any, beams: int) -> Callable[[], Any]:
        """It has no fork: as its beam search does, every beam is a new request."""
        base = list(handle.all_token_ids)

        def step() -> None:
            rows = [self.admit([*base, token]) for token in range(beams)]
            for row in rows:
                self.release(row)

        return step

    def pool(self, batch: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        pool = self.m.block_pool
        return partial(pool.get_new_blocks, batch), pool.free_blocks


if __name__ == "__main__":
    main(VllmV1())
