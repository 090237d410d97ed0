"""Contiguous policies: each sequence is one chunk of a buddy allocator, reserved at admission.

As "Orca (Max)", "Orca (Pow2)" and "Orca (Oracle)" of Kwon et al., "Efficient Memory Management for
Large Language Model Serving with PagedAttention", 2023, Section 6.1. What the allocator rounds up
and what lies between chunks is external waste, as in their Figure 2.
"""

from __future__ import annotations

from pagedkv.simulator.memory import Usage, Work
from pagedkv.simulator.trace import Request

__all__ = ["Buddy", "ContiguousMemory"]


class Buddy:
    """Free chunks whose sizes are powers of two, at addresses that are multiples of their size.

    A memory of any size is the chunks of its binary digits. Always: the free and the taken chunks
    cover it without overlap, and no free chunk's buddy is free as a whole.
    """

    def __init__(self, num_slots: int) -> None:
        self._free: list[set[int]] = [set() for _ in range(num_slots.bit_length())]
        start = 0
        for order in reversed(range(num_slots.bit_length())):
            if num_slots >> order & 1:
                self._free[order].add(start)
                start += 1 << order

    def take(self, num_slots: int) -> int | None:
        """The first slot of a free chunk of at least `num_slots`; None if there is none."""
        order = (num_slots - 1).bit_length()
        large = next((o for o in range(order, len(self._free)) if self._free[o]), None)
        if large is None:
            return None
        start = min(self._free[large])
        self._free[large].remove(start)
        for half in range(order, large):
            self._free[half].add(start + (1 << half))
        return start

    def give(self, start: int, num_slots: int) -> None:
        """Take back the chunk that take(num_slots) gave; it merges with its free buddies."""
        order = (num_slots - 1).bit_length()
        while order < len(self._free) and start ^ (1 << order) in self._free[order]:
            self._free[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)

    @property
    def num_free(self) -> int:
        return sum(len(starts) << order for order, starts in enumerate(self._free))


class ContiguousMemory:
    """`policy` "contiguous-max", "-pow2" or "-oracle": what is reserved for one sequence."""

    def __init__(self, policy: str, num_slots: int, max_model_len: int, num_sequences: int) -> None:
        self.num_hit_tokens = self.num_copied_blocks = 0
        self._policy, self._num_slots = policy, num_slots
        self._max_model_len, self._num_sequences = max_model_len, num_sequences
        self._buddy = Buddy(num_slots)
        self._num_held = 0

    def reserved(self, request: Request) -> int:
        """Slots that a sequence of this request is given."""
        output = request.output_length
        if self._policy == "contiguous-max":
            return self._max_model_len
        if self._policy == "contiguous-pow2" and output > 0:
            output = 1 << (output - 1).bit_length()
        return min(request.input_length + output, self._max_model_len)

    def can_hold(self, request: Request) -> bool:
        empty = Buddy(self._num_slots)
        size = self.reserved(request)
        return all(empty.take(size) is not None for _ in range(self._num_sequences))

    def admit(self, work: Work) -> int | None:
        size = self.reserved(work.request)
        for _ in range(self._num_sequences):
            start = self._buddy.take(size)
            if start is None:
                self.release(work)
                return None
            work.chunks.append((start, size))
            self._num_held += size
        return self._num_sequences * work.length

    def advance(self, running: list[Work], num_steps: int) -> int:
        return num_steps

    def preempt(self, work: Work) -> None:
        raise AssertionError("a reserved chunk is never short")

    def release(self, work: Work) -> None:
        for start, size in work.chunks:
            self._buddy.give(start, size)
            self._num_held -= size
        work.chunks.clear()

    def usage(self, running: list[Work], short: bool) -> Usage:
        held = self._num_held
        tokens = self._num_sequences * sum([work.length for work in running])
        future = self._num_sequences * sum([work.remaining for work in running])
        rest = self._num_slots - held
        return Usage(
            tokens=tokens,
            reservation=future,
            internal=held - tokens - future,
            external=rest if short else 0,
            cached=0,
            free=0 if short else rest,
            unshared=held,
            held=held,
        )
