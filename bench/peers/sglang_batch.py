"""What SGLang's scheduler keeps of running requests: a table of their slots, and a batch's tensors.

Imported by the driver once it has said what it leaves out. Classes stand in for those of modules
that need a GPU's packages, with what a decode step touches of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocation import alloc_for_decode_default

from workloads import BLOCK_SIZE

MAX_TOKENS = 140_000  # of a request


class Rows:
    """Its ReqToTokenPool: the slot of each token of each request; row 0 is padding."""

    def __init__(self, num_requests: int) -> None:
        self.req_to_token = torch.zeros((1 + num_requests, MAX_TOKENS), dtype=torch.int32)
        self.free = list(range(1, 1 + num_requests))

    def take(self) -> int:
        return self.free.pop()

    def give(self, row: int) -> None:
        self.free.append(row)

    def write(self, indices: Any, values: Any) -> None:
        self.req_to_token[indices] = values

    def alloc_aux_to_lengths(self, **lengths: Any) -> None:
        pass


@dataclass(slots=True)
class Lengths:
    """Of its ReqKvInfo what a decode step touches."""

    kv_committed_len: int
    kv_allocated_len: int


class Request:
    """Of its Req what a decode step touches."""

    __slots__ = ("decode_batch_idx", "kv", "output_ids")

    def __init__(self, length: int) -> None:
        self.kv = Lengths(length, length)
        self.decode_batch_idx = 0
        self.output_ids = array("q")


class Batch:
    """Of its ScheduleBatch what a decode step touches."""

    model_config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, reqs: list[Request], rows: Sequence[int], pool: Rows, cache: Any) -> None:
        lengths = [request.kv.kv_committed_len for request in reqs]
        self.reqs, self.req_to_token_pool, self.tree_cache = reqs, pool, cache
        self.seq_lens, self.seq_lens_cpu = torch.tensor(lengths), torch.tensor(lengths)
        self.orig_seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.req_pool_indices, self.req_pool_indices_cpu = torch.tensor(rows), torch.tensor(rows)

    def maybe_evict_swa(self) -> None:
        pass

    def advance(self, token: int) -> Any:
        """Its prepare_for_decode, and the token that each request gets; the new slots."""
        slots = alloc_for_decode_default(self, 1)
        for request in self.reqs:
            request.decode_batch_idx += 1
            request.output_ids.append(token)
        self.seq_lens = self.seq_lens + 1
        self.seq_lens_cpu = self.seq_lens_cpu + 1
        self.orig_seq_lens = self.orig_seq_lens + 1
        return slots

    def check(self, slots: Any) -> None:
        """Every row got a slot of its own, next to its last or at the start of a new block."""
        table, rows, lengths = (
            self.req_to_token_pool.req_to_token,
            self.req_pool_indices,
            self.seq_lens,
        )
        last, new = table[rows, lengths - 2], table[rows, lengths - 1]
        starts = (lengths - 1) % BLOCK_SIZE == 0
        follows = torch.where(starts, slots % BLOCK_SIZE == 0, slots == last + 1)
        if not (follows.all() and (new == slots).all() and len(slots.unique()) == len(self.reqs)):
            raise AssertionError("the step did not give every row its slot")
