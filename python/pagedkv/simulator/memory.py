"""What the scheduler asks of a memory, whichever policy it follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pagedkv.simulator.trace import Request

__all__ = ["CATEGORIES", "Memory", "Usage", "Work"]

CATEGORIES = ("tokens", "reservation", "internal", "external", "cached", "free")


@dataclass(eq=False)
class Work:
    """A request on its way: how far it is, and what of the memory is its own.

    `ids` are the manager's sequences; `chunks` the (start, slots) of contiguous ones. `on_host`:
    it was swapped out.
    """

    request: Request
    num_sequences: int
    generated: int = 0
    admitted: bool = False
    on_host: bool = False
    chunks: list[tuple[int, int]] = field(default_factory=list)
    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def length(self) -> int:
        """Tokens in each of its sequences."""
        return self.request.input_length + self.generated

    @property
    def remaining(self) -> int:
        return self.request.output_length - self.generated


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
        """One token more for every sequence, `num_steps` times or until memory is short: how often.

        The scheduler counts `generated` up.
        """

    def preempt(self, work: Work) -> None:
        """Give up a running request's memory, so that admit() can bring it back."""

    def release(self, work: Work) -> None:
        """A request has ended."""

    def usage(self, running: list[Work], short: bool) -> Usage:
        """`short`: a request waits that did not fit."""
