"""Naive twins of the simulator: a bitmap, a token at a time, a dict. To be read, not fast."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from pagedkv.simulator import Request, Trace


class BitmapBuddy:
    """A buddy allocator that looks at every slot: free chunks are found, never remembered."""

    def __init__(self, num_slots: int) -> None:
        self.taken = [False] * num_slots

    def chunks(self) -> list[tuple[int, int]]:
        """(size, start) of the free aligned chunks that are not part of a larger one."""
        found = []
        for start in range(len(self.taken)):
            size = 1
            while start % (2 * size) == 0 and self._is_free(start, 2 * size):
                size *= 2
            whole_parent = self._is_free(start - start % (2 * size), 2 * size)
            if self._is_free(start, size) and not whole_parent:
                found.append((size, start))
        return found

    def take(self, num_slots: int) -> int | None:
        fits = sorted(chunk for chunk in self.chunks() if chunk[0] >= num_slots)
        if not fits:
            return None
        self._mark(fits[0][1], num_slots, True)
        return fits[0][1]

    def give(self, start: int, num_slots: int) -> None:
        self._mark(start, num_slots, False)

    def _mark(self, start: int, num_slots: int, value: bool) -> None:
        size = 1
        while size < num_slots:
            size *= 2
        assert all(slot != value for slot in self.taken[start : start + size])
        self.taken[start : start + size] = [value] * size

    def _is_free(self, start: int, size: int) -> bool:
        return start + size <= len(self.taken) and not any(self.taken[start : start + size])


@dataclass(eq=False)
class Row:
    request: Request
    generated: int = 0
    admitted_at: float | None = None

    @property
    def length(self) -> int:
        return self.request.input_length + self.generated


@dataclass
class Outcome:
    seconds: float = 0.0
    waited: dict[int, float] = field(default_factory=dict)
    num_preempted: int = 0
    num_recomputed: int = 0
    token_seconds: float = 0.0
    averaged: tuple[float, float] | None = None  # seconds and token_seconds at the last admission

    def spend(self, seconds: float, tokens: float) -> None:
        self.token_seconds += seconds * tokens
        self.seconds += seconds

    @property
    def mean_tokens(self) -> float:
        """In memory: until the last admission behind the end of a request; else all along.

        All along, too, if no time had passed by then.
        """
        seconds, token_seconds = self.averaged or (0.0, 0.0)
        if not seconds:
            seconds, token_seconds = self.seconds, self.token_seconds
        return token_seconds / seconds if seconds else 0.0


def paged_by_the_token(
    trace: Trace, num_blocks: int, block_size: int, watermark: int, step: float, token: float
) -> Outcome:
    """One sequence a request, blocks as a number, one token of every sequence after the other.

    A step takes `step` seconds, a prefilled or decoded token `token`. All requests fit.
    """
    out = Outcome()
    arriving = [Row(request) for request in trace.requests]
    order = {id(row): number for number, row in enumerate(arriving)}
    queue: list[Row] = []
    running: list[Row] = []
    short, num_ended = False, 0

    def blocks(length: int) -> int:
        return -(-length // block_size)

    def held() -> int:
        return sum(blocks(row.length) for row in running)

    def tokens() -> int:
        return sum(row.length for row in running)

    while arriving or queue or running:
        while arriving and arriving[0].request.arrival <= out.seconds:
            queue.append(arriving.pop(0))
        num_prefilled = 0
        while queue and not short:
            row = queue[0]
            # Only the first append of a sequence leaves the watermark; what was generated follows.
            first, all_of_it = blocks(row.request.input_length), blocks(row.length)
            if max(first + watermark, all_of_it) > num_blocks - held():
                short = True
                break
            running.append(queue.pop(0))
            num_prefilled += row.length
            if row.admitted_at is None:
                row.admitted_at = out.seconds
                out.waited[order[id(row)]] = out.seconds - row.request.arrival
                if num_ended:
                    out.averaged = (out.seconds, out.token_seconds)
            else:
                out.num_recomputed += row.length
        out.spend(token * num_prefilled, tokens())
        if not running:
            out.spend(arriving[0].request.arrival - out.seconds, 0)
            continue
        growing = [row for row in running if row.generated < row.request.output_length]
        if len(growing) == len(running):
            if sum(blocks(row.length + 1) for row in running) > num_blocks:
                queue.insert(0, running.pop())
                out.num_preempted += 1
                short = True
                continue
            for row in running:
                row.generated += 1
            out.spend(step + token * len(running), tokens() - len(running) / 2)
        ended = [row for row in running if row.generated == row.request.output_length]
        if ended:
            num_ended += len(ended)
            running = [row for row in running if row not in ended]
            short = False
    return out


def lru_hits(trace: Trace, num_blocks: int | None) -> tuple[int, int]:
    """(hit tokens, refused requests) of an LRU over hash ids, the deepest touched first."""
    cache: OrderedDict[int, None] = OrderedDict()
    num_hit = num_refused = 0
    for request in trace.requests:
        ids = request.hash_ids or ()
        if num_blocks is not None and len(ids) > num_blocks:
            num_refused += 1
            continue
        k = 0
        while k < len(ids) and ids[k] in cache:
            k += 1
        num_hit += min(k * trace.hash_block_size, request.input_length)
        for hash_id in reversed(ids):
            cache.pop(hash_id, None)
            cache[hash_id] = None
        while num_blocks is not None and len(cache) > num_blocks:
            cache.popitem(last=False)
    return num_hit, num_refused
