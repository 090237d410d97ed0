"""SGLang's radix tree in Rust, with the allocator that its scheduler keeps beside it.

A decode step is its scheduler's: alloc_for_decode_default on a CPU, which writes the new slots into
the table of requests and tokens, the requests' own counts and tokens, and the lengths, on both
sides, advanced. Its tensors and requests stay from step to step. The table holds a slot per token;
attention takes it as it is, so reading it costs nothing.

A swap is HiCache's of a leaf of the tree, with write-back: out, the loop of an eviction with the
leaf's backup, host slots, both commits and the device's slots freed; in, a match, the locks, device
slots, the commit and the slots gathered. Nothing is copied and nobody waited for.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import distribution
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np

from left_out import bare_package, leave_out

GPU_ONLY = ("triton", "tvm_ffi", "torchvision", "sentencepiece", "compressed_tensors")
UNUSED = ("sglang.srt.mem_cache.memory_pool", "sglang.srt.configs", "starlette", "fastapi")
leave_out(*GPU_ONLY, *UNUSED)
bare_package("sglang", str(distribution("sglang").locate_file("sglang")))

import torch
from sglang.srt.mem_cache.allocation import alloc_for_decode_default
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.pool_host.base import HostKVCache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from workloads import BLOCK_SIZE, Driver, main

FULL = ComponentType.FULL
MAX_TOKENS = 140_000  # of a sequence


@dataclass(slots=True)
class Lengths:
    """Of its ReqKvInfo what a decode step touches."""

    kv_committed_len: int
    kv_allocated_len: int


@dataclass(slots=True)
class Request:
    """Of its Req what a decode step touches."""

    kv: Lengths
    decode_batch_idx: int = 0
    output_ids: Any = field(default_factory=lambda: array("q"))


class Rows:
    """Its ReqToTokenPool: row 0 is padding."""

    def __init__(self, num_requests: int) -> None:
        self.req_to_token = torch.zeros((1 + num_requests, MAX_TOKENS), dtype=torch.int32)

    def write(self, indices: Any, values: Any) -> None:
        self.req_to_token[indices] = values

    def alloc_aux_to_lengths(self, **lengths: Any) -> None:
        pass


class HostSlots:
    """The free list of its HostKVCache, without the memory that it manages."""

    alloc, clear = HostKVCache.alloc, HostKVCache.clear
    available_size, _merge_release_slots = (
        HostKVCache.available_size,
        HostKVCache._merge_release_slots,
    )

    def __init__(self, num_tokens: int) -> None:
        self.logical_size, self.logical_page_size = num_tokens, BLOCK_SIZE
        self.device, self.lock = "cpu", RLock()
        self.clear()


class SglangTree(Driver):
    """A handle is a prompt and the slots of its full blocks, in the tree from the start."""

    cannot = {  # noqa: RUF012
        "beam": "its beam search asks for --page-size 1, blocks of one token",
        "trace": "a row of its scheduler's batch is no sequence that can be taken by itself",
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

    def admit(self, prompt: Any) -> Any:
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
        return prompt, slots

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

    def release(self, handle: Any) -> None:
        pass

    def decode(self, handles: list[Any]) -> Callable[[], Any]:
        lengths = [len(prompt) for prompt, _ in handles]
        pool, requests = Rows(len(handles)), [Request(Lengths(n, n)) for n in lengths]
        for row, length, (_, slots) in zip(pool.req_to_token[1:], lengths, handles, strict=True):
            if rest := length - len(slots):
                slots = torch.cat((slots, self.pages.alloc(BLOCK_SIZE)[:rest]))
            row[:length] = slots
        batch = SimpleNamespace(
            reqs=requests,
            seq_lens=torch.tensor(lengths),
            seq_lens_cpu=torch.tensor(lengths),
            orig_seq_lens=torch.tensor(lengths, dtype=torch.int32),
            req_pool_indices=torch.arange(1, 1 + len(handles)),
            req_pool_indices_cpu=torch.arange(1, 1 + len(handles)),
            req_to_token_pool=pool,
            tree_cache=SimpleNamespace(
                page_size=BLOCK_SIZE,
                token_to_kv_pool_allocator=self.pages,
                supports_prefix_sharing=lambda: True,
            ),
            model_config=SimpleNamespace(is_encoder_decoder=False),
            maybe_evict_swa=lambda: None,
        )

        def step() -> Any:
            """Its ScheduleBatch.prepare_for_decode, and the tokens that the step before gave."""
            slots = alloc_for_decode_default(batch, 1)
            for request in requests:
                request.decode_batch_idx += 1
                request.output_ids.append(7)
            batch.seq_lens = batch.seq_lens + 1
            batch.seq_lens_cpu = batch.seq_lens_cpu + 1
            batch.orig_seq_lens = batch.orig_seq_lens + 1
            return slots, batch.seq_lens, batch.req_pool_indices, pool.req_to_token

        for _ in range(BLOCK_SIZE + 1):  # so that every row gets a block
            self.check(batch, *step())
        return step

    def check(self, batch: Any, slots: Any, lengths: Any, rows: Any, table: Any) -> None:
        """Every row got a slot of its own, next to its last or at the start of a new block."""
        last, new = table[rows, lengths - 2], table[rows, lengths - 1]
        starts = (lengths - 1) % BLOCK_SIZE == 0
        follows = torch.where(starts, slots % BLOCK_SIZE == 0, slots == last + 1)
        if not (follows.all() and (new == slots).all() and len(slots.unique()) == len(batch.reqs)):
            raise AssertionError("the step did not give every row its slot")

    def swap(self, handle: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        self.host = HostSlots(len(self.pages.free_pages) * BLOCK_SIZE)
        self.swapped, tree, pages = handle[0], self.tree, self.pages
        tree.set_hicache_enabled()
        tree.is_write_back = True
        key = RadixKey(self.swapped)

        def out() -> Any:
            moved: list[Any] = []
            tree.evict_device_start(FULL, len(key))
            gone = self.evict_to_host(moved)
            if gone != len(key) or sum(len(slots) for slots, _ in moved) != len(key):
                raise AssertionError(f"{gone} slots were swapped")
            return moved

        def into() -> Any:
            found = tree.match_prefix(MatchPrefixParams(key=key))
            node = found.best_match_node
            host_lock = tree.inc_host_lock_ref(node).to_dec_params()
            lock = tree.inc_lock_ref(node).to_dec_params()
            spec, others = tree.build_load_back_spec(node)
            slots = pages.alloc(len(spec.host_indices))
            tree.dec_lock_ref(node, lock)
            actions = tree.commit_load_back(node, slots, spec, others)
            lock = tree.inc_lock_ref(node).to_dec_params()
            slots = tree.collect_full_device_indices(node, found.last_device_node)
            tree.dec_lock_ref(node, lock)
            tree.dec_host_lock_ref(node, host_lock)
            tree.finish_load_back(node)
            if actions or found.host_hit_length != len(key) or len(slots) != len(key):
                raise AssertionError(f"{len(slots)} slots were swapped")
            return spec.host_indices, slots

        return out, into

    def evict_to_host(self, moved: list[tuple[Any, Any]]) -> int:
        """The loop of its cache with write-back; `moved` gets device's and host's slots."""
        tree, gone = self.tree, {FULL: 0}
        try:
            while True:
                step = tree.evict_device_next_node(FULL, gone)
                self.free(step, gone)
                if step.node_id is None:
                    if not step.made_progress:
                        return gone[FULL]
                    continue
                leaf = tree.evict_device_leaf(step.node_id, True)
                self.free(leaf, gone)
                for node in leaf.backup_kv.node_ids:
                    slots, others = tree.build_backup_spec(node)
                    to = self.host.alloc(len(slots))
                    tree.commit_backup(node, to, others)
                    nodes = tree.mark_write_through_pending([node], node)
                    tree.finish_write_through(nodes, node)
                    moved.append((slots, to))
                self.free(tree.demote(step.node_id), gone)
        finally:
            tree.evict_device_end(FULL)

    def before_swap(self) -> None:
        self.tree.reset()
        self.pages.clear()
        self.host.clear()
        self.root = self.tree.root_node_handle()
        self.admit(self.swapped)

    def pool(self, batch: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        pages = self.pages
        return partial(pages.alloc, batch * BLOCK_SIZE), partial(pages.free_segment, start_pos=0)


if __name__ == "__main__":
    main(SglangTree())
