"""What the scheduler asks of a memory, whichever policy it follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pagedkv.simulator.trace import Request

__all__ = ["CATEGORIES", "Memory", "Usage", "Work"]

CATEGORIES = ("tokens", "reservation", "internal", "external", "cached", "free")


class Work:
    """A request on its way.

    Attributes:
        length: tokens in each of its sequences.
        remaining: tokens that each of them still generates.
        chunks: (start, slots) of each sequence, in a contiguous memory.
        ids: the manager's sequences, in a paged one.
        on_host: it was swapped out.
    """

    __slots__ = ("admitted", "chunks", "ids", "length", "on_host", "remaining", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.length, self.remaining = request.input_length, request.output_length
        self.admitted = self.on_host = False
        self.chunks: list[tuple[int, int]] = []
        self.ids: NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Usage:
    """Slots at one moment; all but the last two sum to the size of the memory.

    Attributes:
        tokens: hold K and V that a running request needs.
        reservation: empty, and will be filled by the request that has them.
        internal: empty, had by a request, and never filled.
        external: nobody's, and of no use to the request that waits for memory.
        cached: K and V that nobody needs, kept for prompts to come; free to whoever needs them.
        free: nobody's.
        unshared: what the running requests would hold if none shared a block.
        held: what they hold.
    """

    tokens: int
    reservation: int
    internal: int
    external: int
    cached: int
    free: int
    unshared: int
    held: int


class Memory(Protocol):
    """One policy's memory. Counts what it copied and found beside."""

    num_hit_tokens: int
    num_copied_blocks: int

    def can_hold(self, request: Request) -> bool:
        """Whether the request fits, from its prompt to its last token, with nobody beside it."""

    def admit(self, work: Work) -> int | None:
        """Take memory for a request; the tokens to be computed, or None if there is no room now."""

    def advance(self, running: list[Work], num_steps: int) -> int:
        """One token more for every sequence, up to `num_steps` times: how often it was done.

        0 if memory is short even for one. The scheduler counts the lengths up.
        """

    def preempt(self, work: Work) -> None:
        """Give up a running request's memory, so that admit() can bring it back."""

    def release(self, work: Work) -> None:
        """A request has ended."""

    def usage(self, running: list[Work], short: bool) -> Usage:
        """`short`: a request waits that did not fit."""
