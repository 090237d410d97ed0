"""SGLang's radix tree in Rust, with the allocator that its scheduler keeps beside it.

A decode step is its scheduler's: alloc_for_decode_default on a CPU, which writes the new slots into
the table of requests and tokens, the requests' own counts and tokens, and the lengths, on both
sides, advanced. Its tensors and requests stay from step to step. The table holds a slot per token;
attention takes it as it is, so reading it costs nothing.

A swap is HiCache's of a leaf of the tree, with write-back: out, the loop of an eviction with the
leaf's backup, host slots, both commits and the device's slots freed; in, a match, the locks, device
slots, the commit and the slots gathered. Nothing is copied and nobody waited for.

In the trace every request is a batch of one: an admission also takes a row, allocates as its
scheduler does for an extension and locks what it matched; a release publishes what was appended.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
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
from sglang.srt.mem_cache.allocation import alloc_paged_token_slots_extend
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.pool_host.base import HostKVCache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_batch import Batch, Request, Rows
from workloads import BLOCK_SIZE, Driver, main

FULL = ComponentType.FULL


@dataclass(slots=True)
class Sequence:
    """A request in a batch of its own, its row, and what of it the tree has and keeps for it."""

    prompt: Any
    batch: Batch
    row: int
    node: Any
    lock: Any
    in_tree: int  # tokens


class HostSlots:
    """The free list of its HostKVCache, without the memory that it manages."""

    alloc, free, clear = HostKVCache.alloc, HostKVCache.free, HostKVCache.clear
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
        self.cache = SimpleNamespace(
            page_size=BLOCK_SIZE,
            token_to_kv_pool_allocator=self.pages,
            supports_prefix_sharing=lambda: True,
            evict_for_alloc=lambda wanted: self.evict(wanted.num_tokens),
        )
        self.rows = Rows(512) if workload == "trace" else None
        if self.rows is not None:
            self.rehearse(self.rows)
            self.clear()

    def clear(self) -> None:
        self.tree.reset()
        self.pages.clear()
        self.root = self.tree.root_node_handle()

    def prompt(self, tokens: np.ndarray) -> Any:
        return array("q", tokens.tolist())

    def admit(self, prompt: Any) -> Any:
        """Match, gather what was found, allocate the rest, evicting if need be, and insert."""
        if self.rows is not None:
            return self.start(self.rows, prompt)
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

    def start(self, rows: Rows, prompt: Any) -> Sequence:
        """An admission as its scheduler makes one: a row and locks besides."""
        tree, length = self.tree, len(prompt)
        found = tree.match_prefix(MatchPrefixParams(key=RadixKey(prompt, limit=length - 1)))
        node, hit = found.last_device_node, found.device_prefix_len
        lock = tree.inc_lock_ref(node).to_dec_params()
        shared = tree.collect_full_device_indices(node, self.root)
        row = rows.take()
        batch = Batch([Request(length)], [row], rows, self.cache)
        hits = torch.tensor([hit])
        slots = alloc_paged_token_slots_extend(
            self.cache,
            hits,
            hits,
            batch.seq_lens,
            batch.seq_lens_cpu,
            shared[-1:] if hit else torch.full((1,), -1),
            length - hit,
        )
        rows.write((row, slice(0, hit)), shared)
        rows.write((row, slice(hit, length)), slots)
        sequence = Sequence(prompt, batch, row, node, lock, hit)
        self.publish(rows, sequence, prompt)
        return sequence

    def publish(self, rows: Rows, sequence: Sequence, tokens: Any) -> None:
        """Its checkpoint_into_tree: full blocks go into the tree, or are those that it has."""
        tree, before = self.tree, sequence.in_tree
        key = RadixKey(tokens).page_aligned(BLOCK_SIZE)
        row = rows.req_to_token[sequence.row, : len(key)]
        values = row.to(torch.int64, copy=True)
        node = self.insert(InsertParams(key=key, value=values, prev_prefix_len=before))
        prompt = RadixKey(sequence.prompt).page_aligned(BLOCK_SIZE)
        if 0 < len(prompt) < len(key):  # the leaf is split there
            known = len(prompt)
            self.insert(InsertParams(key=prompt, value=values[:known], prev_prefix_len=known))
        row[before:] = tree.collect_full_device_indices(node, self.root)[before:]
        tree.dec_lock_ref(sequence.node, sequence.lock)
        sequence.node, sequence.in_tree = node, len(key)
        sequence.lock = tree.inc_lock_ref(node).to_dec_params()

    def insert(self, parameters: InsertParams) -> Any:
        """The node that it ends on; what the tree has twice is freed."""
        step = self.tree.begin_insert(parameters)
        while True:
            for action in step.actions:
                for slots in action.indices:
                    self.pages.free_segment(slots, start_pos=0)
            if step.result is not None:
                break
            step = self.tree.resume_insert()
        self.tree.end_insert()
        return step.result.last_device_node

    def rehearse(self, rows: Rows) -> None:
        """A fork shares full blocks, what was released is found again, and no slot is lost."""
        prompt, slots = array("q", range(100)), self.pages.available_size()
        first = self.start(rows, prompt)
        for token in range(20):
            first.batch.check(first.batch.advance(token))
        fork = self.fork(first)
        tokens, full = prompt + first.batch.reqs[0].output_ids, 112
        shared = rows.req_to_token[[first.row, fork.row], :120]
        self.release(first)
        self.release(fork)
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(tokens))).device_prefix_len
        kept = self.tree.evictable_size()
        same = int((shared[0] == shared[1]).sum())
        if not (
            same == 96 and found == kept == full and kept + self.pages.available_size() == slots
        ):
            raise AssertionError(f"{same} slots shared, {found} found, {kept} kept of {slots}")

    def append(self, handle: Sequence, token: int) -> None:
        handle.batch.advance(token)

    def fork(self, handle: Sequence) -> Sequence:
        """It has none of a request: a new one of the same tokens."""
        return self.admit(handle.prompt + handle.batch.reqs[0].output_ids)

    def release(self, handle: Any) -> None:
        if self.rows is None:
            return
        request = handle.batch.reqs[0]
        self.publish(self.rows, handle, handle.prompt + request.output_ids)
        begin, end = handle.in_tree, request.kv.kv_committed_len
        rest = self.rows.req_to_token[handle.row, begin:end].to(torch.int64)
        self.pages.free_segment(rest, start_pos=begin)
        self.tree.dec_lock_ref(handle.node, handle.lock)
        self.rows.give(handle.row)

    def decode(self, handles: list[Any]) -> Callable[[], Any]:
        lengths = [len(prompt) for prompt, _ in handles]
        rows = Rows(len(handles))
        taken = [rows.take() for _ in handles]
        for row, length, (_, slots) in zip(taken, lengths, handles, strict=True):
            if rest := length - len(slots):
                slots = torch.cat((slots, self.pages.alloc(BLOCK_SIZE)[:rest]))
            rows.write((row, slice(0, length)), slots)
        batch = Batch([Request(length) for length in lengths], taken, rows, self.cache)
        for _ in range(BLOCK_SIZE + 1):  # so that every row gets a block
            batch.check(batch.advance(7))
        return partial(batch.advance, 7)

    def swap(self, handle: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        self.host = HostSlots(len(self.pages.free_pages) * BLOCK_SIZE)
        self.on_host = torch.empty(0, dtype=torch.int64)
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
            self.on_host = moved[-1][1]
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
        """A new tree with the same leaf; the slots are those that it had."""
        tree, key = self.tree, RadixKey(self.swapped)
        node = tree.match_prefix(MatchPrefixParams(key=key)).last_device_node
        self.pages.free_segment(tree.collect_full_device_indices(node, self.root), start_pos=0)
        self.host.free(self.on_host)
        self.on_host = self.on_host[:0]
        tree.reset()
        self.root = tree.root_node_handle()
        self.admit(self.swapped)

    def pool(self, batch: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        pages = self.pages
        return partial(pages.alloc, batch * BLOCK_SIZE), partial(pages.free_segment, start_pos=0)


if __name__ == "__main__":
    main(SglangTree())
