"""vLLM's KVCacheManager of today (v1), and the manager of its CPU offloading beside it.

Python, prefix cache by digest, no fork. For a swap it has the offloading connector, which stores a
request's blocks on the host by digest. Of a swap is counted what its scheduler and the connector do
of it in the managers: for one out, prepare_store of the 128 keys, the source blocks for the worker,
complete_store, free of the request and its reset to preempted; for one in, a lookup of each key,
allocate_slots of 2048 external tokens, prepare_load, the target blocks and complete_load. The
connector stores as blocks fill, so that its preemption waits for less. Not counted are the keys,
which it keeps, and its record of jobs. The prefix cache is off, which it allows and is quicker.
"""

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
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.request import Request, RequestStatus, StructuredOutputRequest

from workloads import BLOCK_SIZE, Driver, main

StructuredOutputRequest.from_sampling_params = staticmethod(lambda *a, **k: None)


class VllmV1(Driver):
    """A handle is a Request; hashing is part of making one, and of admission."""

    def open(self, num_blocks: int, workload: str) -> None:
        """Prefix caching as by default, but where the work needs none and is quicker without."""
        caching = workload not in ("decode", "pool", "swap")
        digest = get_hash_fn_by_name("sha256")
        kv_cache_utils.init_none_hash(digest)
        hasher = kv_cache_utils.get_request_block_hasher(BLOCK_SIZE, digest)
        self.hasher, self.count = (hasher if caching or workload == "swap" else None), 0
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
        if workload == "swap":
            self.host = CPUOffloadingManager(num_blocks)

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

    def swap(self, handle: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        m, host, request = self.m, self.host, handle
        context = ReqContext(request.request_id)
        keys = [make_offload_key(digest, 0) for digest in request.block_hashes]
        for index, key in enumerate(keys, 1):
            context.set_offload_key_position(key, index * BLOCK_SIZE)
        blocks = m.get_block_ids(request.request_id)[0]
        if len({*keys}) != 128 or len(blocks) != 128:
            raise AssertionError(f"{len(keys)} keys of {len(blocks)} blocks")

        def out() -> Any:
            found = host.prepare_store(keys, context)
            source = GPULoadStoreSpec(blocks, group_sizes=(128,), block_indices=(0,))
            host.complete_store(set(found.keys_to_store), context)
            m.free(request)
            request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
            if len(found.store_spec.block_ids) != 128:
                raise AssertionError("not all blocks were swapped")
            return source, found.store_spec

        def into() -> Any:
            nonlocal blocks
            for key in keys:
                if host.lookup(key, context) is not LookupResult.HIT:
                    raise AssertionError("a block is not on the host")
            m.allocate_slots(
                request,
                0,
                num_external_computed_tokens=request.num_tokens,
                delay_cache_blocks=True,
            )
            blocks = m.get_block_ids(request.request_id)[0]
            source = host.prepare_load(keys, context)
            target = GPULoadStoreSpec(blocks, group_sizes=(128,), block_indices=(0,))
            host.complete_load(set(keys), context)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = request.num_tokens
            return source, target

        return out, into

    def before_swap(self) -> None:
        self.host.reset_cache()

    def pool(self, batch: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        pool = self.m.block_pool
        return partial(pool.get_new_blocks, batch), pool.free_blocks


if __name__ == "__main__":
    main(VllmV1())
