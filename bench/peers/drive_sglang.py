"""SGLang's radix tree in Rust, with the allocator that its scheduler keeps beside it."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from importlib.metadata import distribution
from typing import Any

import numpy as np

from left_out import bare_package, leave_out

GPU_ONLY = ("triton", "tvm_ffi", "torchvision", "sentencepiece", "compressed_tensors")
UNUSED = ("sglang.srt.mem_cache.memory_pool", "sglang.srt.configs", "starlette", "fastapi")
leave_out(*GPU_ONLY, *UNUSED)
bare_package("sglang", str(distribution("sglang").locate_file("sglang")))

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from workloads import BLOCK_SIZE, Driver, main

FULL = ComponentType.FULL
NO_SEQUENCES = "its tree holds prefixes; sequences live in its scheduler's tensors"


class SglangTree(Driver):
    """A handle is None: what was admitted is in the tree, and given up from the start."""

    cannot = {  # noqa: RUF012
        "decode": "its decode step allocates in a GPU kernel",
        "beam": "beams need blocks of one token there",
        "swap_out": "moves whole tree nodes, with its device pools",
        "swap_in": "moves whole tree nodes, with its device pools",
        "trace": NO_SEQUENCES,
    }

    def open(self, num_blocks: int, workload: str) -> None:
        self.pages = PagedTokenToKVPoolAllocator(
            num_blocks * BLOCK_SIZE, BLOCK_SIZE, torch.bfloat16, "cpu", None, False
        )
        parameters = CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=self.pages,
            page_size=BLOCK_SIZE,
            tree_components=(FULL,),
        )
        self.tree = RustUnifiedTreeCore(parameters)
        self.root = self.tree.root_node_handle()

    def prompt(self, tokens: np.ndarray) -> Any:
        return array("q", tokens.tolist())

    def admit(self, prompt: Any) -> None:
        """Match, gather what was found, allocate the rest, evicting if need be, and insert."""
        key = RadixKey(prompt)
        found = self.tree.match_prefix(MatchPrefixParams(key=key))
        hit = found.device_prefix_len
        slots = self.allocate(len(prompt) - hit)
        if hit:
            shared = self.tree.collect_full_device_indices(found.last_device_node, self.root)
            slots = torch.cat((shared, slots))
        step = self.tree.begin_insert(InsertParams(key=key, value=slots))
        while step.result is None:
            step = self.tree.resume_insert()
        self.tree.end_insert()

    def allocate(self, num_tokens: int) -> Any:
        slots = self.pages.alloc(num_tokens)
        if slots is None:
            self.evict(num_tokens - self.pages.available_size())
            slots = self.pages.alloc(num_tokens)
        return slots

    def evict(self, num_tokens: int) -> None:
        """The loop of its cache: a leaf at a time, until so many tokens went."""
        tree, gone = self.tree, {FULL: 0}
        tree.evict_device_start(FULL, num_tokens)
        try:
            while True:
                step = tree.evict_device_next_node(FULL, gone)
                self.free(step, gone)
                if step.node_id is not None:
                    self.free(tree.evict_device_leaf(step.node_id, False), gone)
                elif not step.made_progress:
                    return
        finally:
            tree.evict_device_end(FULL)

    def free(self, step: Any, gone: dict[Any, int]) -> None:
        for kind, count in step.tracker.items():
            gone[kind] = gone.get(kind, 0) + count
        for found in step.device_frees.values():
            for slots in found:
                self.pages.free_segment(slots, start_pos=0)
        step.device_frees.clear()  # a result that is given up with something left in it complains
        for action in step.cache_actions:
            for slots in getattr(action, "indices", None) or ():
                self.pages.free_segment(slots, start_pos=0)
        step.cache_actions.clear()

    def release(self, handle: None) -> None:
        pass

    def pool(self, batch: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        pages = self.pages
        return partial(pages.alloc, batch * BLOCK_SIZE), partial(pages.free_segment, start_pos=0)


if __name__ == "__main__":
    main(SglangTree())
