"""Paged policies: requests go through the real BlockManager, one command after the other.

What is modelled is which beam goes on from which, and that tokens are told by `hash_ids`. All else,
from allocation to copy-on-write, hits, eviction and swap, is what the manager does.

Several tokens are appended to a sequence at once between two events: that takes the same blocks as
one after the other. Outputs are appended without token ids, since no trace tells them: their blocks
are never hits. With beams, each token is a step with a reorder.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagedkv._core import BlockManager
from pagedkv.errors import OutOfBlocks
from pagedkv.preemption import PreemptRequest, swap_or_recompute
from pagedkv.simulator.memory import Usage, Work
from pagedkv.simulator.service import ServiceModel
from pagedkv.simulator.setting import SimulationSetting
from pagedkv.simulator.trace import Request, Trace

__all__ = ["PagedMemory", "prompt_tokens", "token_runs"]

_Ids = NDArray[np.int64]


def token_runs(trace: Trace) -> dict[int, int]:
    """For each hash id of a trace the token that its block is filled with: 0, 1, ..."""
    runs: dict[int, int] = {}
    for request in trace.requests:
        for hash_id in request.hash_ids or ():
            runs.setdefault(hash_id, len(runs))
    return runs


def prompt_tokens(
    hash_ids: tuple[int, ...], runs: dict[int, int], hash_block_size: int
) -> NDArray[np.int32]:
    """int32 [len(hash_ids) * hash_block_size], equal where the hash ids are and only there."""
    return np.repeat(np.array([runs[h] for h in hash_ids], np.int32), hash_block_size)


class PagedMemory:
    """`policy` "paged", "sharing", "prefix" or "swap": each does what those before it do, too."""

    def __init__(
        self, policy: str, trace: Trace, setting: SimulationSetting, service: ServiceModel,
        max_model_len: int,
    ) -> None:  # fmt: skip
        self.num_hit_tokens = self.num_copied_blocks = 0
        self._setting, self._service, self._trace = setting, service, trace
        self._num_sequences = setting.num_sequences
        self._shares = policy != "paged"
        self._swaps = policy == "swap" and setting.num_host_blocks > 0
        self._runs = token_runs(trace) if policy in ("prefix", "swap") else {}
        self._rng = np.random.default_rng(setting.seed)
        self._manager = BlockManager(
            setting.num_blocks,
            setting.num_host_blocks if self._swaps else 0,
            setting.block_size,
            max_batch=setting.max_batch,
            max_model_len=min(max_model_len, setting.num_blocks * setting.block_size),
            watermark=setting.watermark_blocks,
        )

    def can_hold(self, request: Request) -> bool:
        blocks = self._most_blocks(request, request.num_tokens)
        return blocks + self._setting.watermark_blocks <= self._setting.num_blocks

    def admit(self, work: Work) -> int | None:
        manager = self._manager
        if work.on_host:
            return self._swap_in(work)
        num_before = self.num_hit_tokens
        sequences = [self._create(work.request)]
        if not self._shares:
            sequences += [self._create(work.request) for _ in range(self._num_sequences - 1)]
        work.ids = np.array(sequences)
        try:
            computed = sum(self._prefill(id, work) for id in sequences)
            generated = work.length - work.request.input_length
            if generated:
                self._fork(work)
                counts = np.full(len(work.ids), generated)
                manager.commit(manager.append(work.ids, counts=counts))
                computed += int(counts.sum())
        except OutOfBlocks:
            self.release(work)
            self.num_hit_tokens = num_before
            return None
        if work.admitted:  # hits are counted once for each request
            self.num_hit_tokens = num_before
        return computed

    def advance(self, running: list[Work], num_steps: int) -> int:
        if self._num_sequences > 1:
            parted = [self._fork(work) for work in running]
            num_steps = min(num_steps, 1) if any(parted) else num_steps  # memory jumps there
        ids = np.concatenate([work.ids for work in running])
        if self._setting.beams > 1 and self._shares:
            return self._advance_beams(ids, num_steps)
        device = self._manager.stats().device
        available = device.num_free + device.num_cached
        fits, short = 0, num_steps + 1  # that many steps fit, and that many do not
        while short - fits > 1:
            steps = num_steps if short > num_steps else (fits + short) // 2
            if self._manager.num_needed(ids, np.full(len(ids), steps)) <= available:
                fits = steps
            else:
                short = steps
        if fits:
            self._manager.commit(self._manager.append(ids, counts=np.full(len(ids), fits)))
        return fits

    def preempt(self, work: Work) -> None:
        if self._swaps and self._cheapest(work) == "swap":
            try:
                plan = self._manager.swap_out(work.ids)
            except OutOfBlocks:
                pass  # the host is full
            else:
                self._manager.complete(plan)
                self.num_copied_blocks += plan.num_copies
                work.on_host = True
                return
        self.release(work)

    def release(self, work: Work) -> None:
        self._manager.release(work.ids)
        work.ids = work.ids[:0]

    def usage(self, running: list[Work], short: bool) -> Usage:
        size = self._setting.block_size
        stats = self._manager.stats()
        lengths = np.array([work.length for work in running], np.int64)
        remaining = np.array([work.remaining for work in running], np.int64)
        num_sequences = np.array([len(work.ids) for work in running], np.int64)
        open_slots = -lengths % size
        empty = int(num_sequences @ open_slots)
        reservation = int(num_sequences @ np.minimum(open_slots, remaining))
        held = stats.device.num_active * size
        return Usage(
            tokens=held - empty,
            reservation=reservation,
            internal=empty - reservation,
            external=0,  # any free block serves anybody
            cached=stats.device.num_cached * size,
            free=stats.device.num_free * size,
            unshared=int(num_sequences @ (lengths + open_slots)),
            held=held,
        )

    def _most_blocks(self, request: Request, length: int) -> int:
        """Blocks of a request whose sequences have this length, if they share the prompt alone."""
        size, n = self._setting.block_size, self._num_sequences
        shared = request.input_length // size if self._shares else 0
        return shared + n * (-(-length // size) - shared)

    def _create(self, request: Request) -> int:
        """A sequence with its hit, if this policy knows what the prompt says."""
        if not self._runs or request.hash_ids is None:
            return self._manager.create()
        return self._manager.create(self._prompt(request))

    def _prompt(self, request: Request) -> NDArray[np.int32]:
        assert request.hash_ids is not None
        tokens = prompt_tokens(request.hash_ids, self._runs, self._trace.hash_block_size)
        return tokens[: request.input_length]

    def _prefill(self, id: int, work: Work) -> int:
        """Append what the hit leaves of the prompt; that many tokens are computed."""
        hit = self._manager.num_cached(id)
        count = work.request.input_length - hit
        known = self._runs and work.request.hash_ids is not None
        tokens = self._prompt(work.request)[hit:] if known else None
        plan = self._manager.append(np.array([id]), tokens, counts=np.array([count]))
        self._manager.commit(plan)
        self.num_hit_tokens += hit
        return count

    def _fork(self, work: Work) -> bool:
        """The samples or beams of a request part before their first own token: if they do now."""
        parts = len(work.ids) < self._num_sequences
        if parts:
            work.ids = self._manager.fork(int(work.ids[0]), self._num_sequences)
        return parts

    def _advance_beams(self, ids: _Ids, num_steps: int) -> int:
        """Every beam goes on from itself or, with probability beam_switch, from any of its request.

        A model of which hypotheses win: real beam search follows the scores.
        """
        beams = self._setting.beams
        own = np.arange(len(ids))
        for step in range(num_steps):
            others = own - own % beams + self._rng.integers(0, beams, len(ids))
            switches = self._rng.random(len(ids)) < self._setting.beam_switch
            self._manager.reorder(ids, np.where(switches, others, own))
            try:
                self._manager.commit(self._manager.append(ids))
            except OutOfBlocks:
                return step
        return num_steps

    def _cheapest(self, work: Work) -> str:
        if self._setting.preempt != "auto":
            return self._setting.preempt
        num_tokens = self._manager.num_freed(work.ids) * self._setting.block_size
        bandwidth = self._service.copy_bandwidth
        return swap_or_recompute(
            PreemptRequest(
                num_tokens * self._setting.token_bytes, num_tokens, bandwidth, bandwidth,
                self._service.prefill_rate,
            )
        )  # fmt: skip

    def _swap_in(self, work: Work) -> int | None:
        """Bring a request back, if it leaves the watermark and a block for each sequence."""
        needed = self._most_blocks(work.request, work.length)
        device = self._manager.stats().device
        spare = self._setting.watermark_blocks + len(work.ids)
        if device.num_free + device.num_cached < min(needed + spare, self._setting.num_blocks):
            return None
        try:
            plan = self._manager.swap_in(work.ids)
        except OutOfBlocks:
            return None
        self._manager.complete(plan)
        self.num_copied_blocks += plan.num_copies
        work.on_host = False
        return 0
