"""The sequences of a KVCache, and where they live: commands without tensors."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from operator import index
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from pagedkv._core import BlockManager, PrefixHit, Stats
from pagedkv.errors import InvalidSpec, InvalidState, OutOfBlocks, UnknownSequence
from pagedkv.preemption import CostModel, PreemptMode, PreemptRequest
from pagedkv.spec import KVSpec
from pagedkv.transfers import Transfer, Transfers

__all__ = ["Sequences"]


class Sequences:
    """The manager's commands, and transfers between its tiers. `KVCache` adds tensors and steps."""

    def __init__(
        self, spec: KVSpec, manager: BlockManager, prefill_rate: float | None, cost_model: CostModel
    ) -> None:
        if prefill_rate is not None and not prefill_rate > 0:
            raise InvalidSpec(f"prefill_rate is {prefill_rate}, expected tokens per second, over 0")
        if not callable(cost_model):
            raise InvalidSpec(f"cost_model is {cost_model!r}, expected a function")
        self.spec = spec
        self.manager = manager
        self.prefill_rate = prefill_rate
        self.cost_model = cost_model
        self._transfers: Transfers | None = None
        self._left: list[int] = []  # sequences to release when no step is open
        self._closed = False

    def __reduce__(self) -> NoReturn:
        """A copy would share the memory, and know nothing of what the original does with it."""
        raise TypeError(
            "a KVCache cannot be copied or pickled: fork() its sequences, send another process its "
            "plans, or make another cache"
        )

    def _open_manager(self) -> BlockManager:
        if self._closed:
            raise InvalidState("this cache is closed")
        if self._left:
            self._release_left()
        return self.manager

    def create(self, tokens: Any = None, *, salt: bytes | str | None = None) -> int:
        """A new sequence that holds the longest published prefix of `tokens` but the last one.

        That is what the device has. What the host has beyond it, `fetch()` brings. Without tokens
        (None, not []) it is anonymous: what is computed for it is nobody's prefix hit, whatever
        step() and record() tell of it.
        """
        self._look()
        return self._open_manager().create(tokens, salt=salt)

    def num_cached(self, id: int) -> int:
        """Tokens that create() found."""
        return self.manager.num_cached(id)

    def length(self, id: int) -> int:
        """Tokens in the sequence."""
        return self.manager.length(id)

    def lookup(self, tokens: Any, *, salt: bytes | str | None = None) -> PrefixHit:
        """What create() would take. Changes nothing."""
        return self.manager.lookup(tokens, salt=salt)

    def fork(self, id: int, n: int) -> Any:
        """n ids, int64 [n], that share all of `id`; the first is `id` itself."""
        return self._open_manager().fork(id, n)

    def reorder(self, ids: Any, parents: Any) -> None:
        """ids[i] becomes what ids[parents[i]] was, for all i at once."""
        self._open_manager().reorder(ids, parents)

    def truncate(self, ids: Any, lengths: Any) -> None:
        """Keep only the first lengths[i] tokens of ids[i]."""
        self._open_manager().truncate(ids, lengths)

    def record(self, ids: Any, tokens: Any, *, counts: Any = None) -> None:
        """Tell tokens that were appended without: counts[b] (default 1) per sequence, in order."""
        self._open_manager().record(ids, tokens, counts)

    def release(self, ids: Any) -> None:
        """Forget sequences. Their published blocks stay, as prefix hits, until evicted."""
        self._open_manager().release(ids)

    def release_later(self, ids: Iterable[int]) -> None:
        """Like release, with the first command after the open step: for finalizers.

        They come amid a step of somebody else's, or in any thread. What is released by then is no
        error.
        """
        self._left.extend(ids)

    def _release_left(self) -> None:
        left = self._left[:]  # more may come meanwhile, behind them
        try:
            self.manager.release(left)
        except UnknownSequence:  # one was released, or an interrupt came before it was forgotten
            for i in left:
                with suppress(UnknownSequence):
                    self.manager.release([i])
        del self._left[: len(left)]

    def clear(self, salt: bytes | str | None = None) -> None:
        """No cached block of this salt (default: of any) is a hit any more."""
        self._open_manager().clear(salt)

    def block_table(self, id: int) -> NDArray[np.int32]:
        """The sequence's blocks, int32. Raises NotResident if they are not on the device."""
        return self.manager.block_table(id)

    def tier(self, id: int) -> Literal["device", "host"]:
        """Where the sequence lives."""
        return self.manager.tier(id)

    def is_dropped(self, id: int) -> bool:
        """Whether the sequence gave up its blocks, or lost them, and waits for resume()."""
        return self.manager.is_dropped(id)

    def verify(self) -> None:
        """Recompute every count from scratch; raises BrokenInvariant on a difference."""
        self.manager.verify()

    def num_needed(self, ids: Any, counts: Any = None) -> int:
        """Blocks that a step would take."""
        return self.manager.num_needed(ids, counts)

    def num_freed(self, ids: Any) -> int:
        """Blocks that these sequences alone hold."""
        return self.manager.num_freed(ids)

    def stats(self) -> Stats:
        """Counts now, and totals since the start."""
        return self.manager.stats()

    # ---- tiers -----------------------------------------------------------------------------

    def _tiers(self) -> Transfers:
        manager = self._open_manager()
        if self._transfers is None or not manager.num_host_blocks:
            raise InvalidState(
                "this cache has no host tier: give it host_memory or num_host_blocks"
            )
        return self._transfers

    def _look(self) -> None:
        if self._transfers is not None:
            self._transfers.look()

    def swap_out(self, ids: Any) -> Transfer:
        """Move whole sequences to the host tier, while whatever runs goes on running.

        A block that several of them share is copied once, one that the host still has not at all.
        Their blocks on the device are free, or cached, at once: steps that get one of them wait for
        its copy.

        Raises OutOfBlocks if the host tier is full, NotResident for a dropped sequence.
        """
        return self._tiers().start(self.manager.swap_out, ids)

    def swap_in(self, ids: Any) -> Transfer:
        """Move whole sequences back. They can be in a step when the transfer has ended.

        Raises OutOfBlocks if the device tier is full.
        """
        return self._tiers().start(self.manager.swap_in, ids)

    def fetch(self, id: int) -> Transfer:
        """Bring what the host tier has of a new sequence's prompt, beyond what create() found.

        num_cached() counts it at once; the sequence can be in a step when the transfer has ended.
        """
        return self._tiers().start(self.manager.fetch, id)

    def poll(self) -> list[Transfer]:
        """The transfers that have ended since somebody looked, as most commands do. Never blocks.

        Raises TransferError for one that failed, once. Everything else has been seen to by then.
        """
        self._open_manager()
        return [] if self._transfers is None else self._transfers.poll()

    def under_way(self) -> list[Transfer]:
        """The transfers that were not seen to end yet, those of resume() among them."""
        return [] if self._transfers is None else self._transfers.under_way()

    def ready(self, ids: Any) -> bool:
        """Whether all of these sequences can be in a step now. Never blocks."""
        manager = self._open_manager()
        self._look()
        return all(manager.is_resident(i) for i in _numbers(ids))

    def wait(self, ids: Any) -> None:
        """Block until the transfers that these sequences wait for have ended.

        Raises TransferError, once, for one that failed; then some are dropped.
        """
        manager = self._open_manager()
        for i in _numbers(ids):
            while self._transfers and (number := manager.waits_for(i)) is not None:
                if (transfer := self._transfers.numbered(number)) is not None:
                    transfer.wait()

    def preempt(self, ids: Any, mode: PreemptMode = "auto") -> Transfer | None:
        """Make room: move sequences to the host tier, or give up what they hold.

        Args:
            ids: resident sequences.
            mode: "swap", or "recompute": then resume() finds what is still a prefix hit, and the
                rest is to be prefilled again. "auto" asks the cost model (see
                `pagedkv.preemption`), and recomputes where the host tier is full or missing.

        Returns the transfer of a swap, None if they are to be recomputed. What was made without
        tokens holds nothing after that.

        Raises OutOfBlocks if mode is "swap" and the host tier is full.
        """
        if mode not in ("auto", "swap", "recompute"):
            raise InvalidSpec(f'mode is {mode!r}, expected "auto", "swap" or "recompute"')
        manager = self._open_manager()
        if mode == "auto" and self._transfers is not None and manager.num_host_blocks:
            mode = self.cost_model(self._request(ids, self._transfers))
            if mode not in ("swap", "recompute"):
                raise InvalidSpec(f'cost_model said {mode!r}, expected "swap" or "recompute"')
            if mode == "swap":
                try:
                    return self.swap_out(ids)
                except OutOfBlocks:
                    mode = "recompute"
        if mode == "swap":
            return self.swap_out(ids)
        manager.drop(ids)
        return None

    def _request(self, ids: Any, transfers: Transfers) -> PreemptRequest:
        num_blocks = self.manager.num_freed(ids)
        return PreemptRequest(
            num_bytes=num_blocks * self.spec.block_bytes,
            num_tokens=num_blocks * self.spec.block_size,
            out_bandwidth=transfers.bandwidth("out"),
            in_bandwidth=transfers.bandwidth("in"),
            prefill_rate=self.prefill_rate,
        )

    def resume(self, ids: Any) -> NDArray[np.int64]:
        """Bring preempted sequences back: int64 [len(ids)], the tokens that each holds when landed.

        Those that were swapped out hold all they held; prefill the others from their new length
        on. `ready(ids)` says when they can be in a step.

        Raises OutOfBlocks if what was swapped out does not fit; then nothing has changed.
        """
        manager = self._open_manager()
        self._look()
        numbers = _numbers(ids)
        if len(set(numbers)) < len(numbers):
            raise InvalidSpec("ids repeats a sequence: each may appear once in a call")
        away = [i for i in numbers if manager.tier(i) == "host"]
        dropped = [i for i in numbers if manager.is_dropped(i)]
        if away:
            self.swap_in(np.array(away, np.int64))
        manager.restore(np.array(dropped, np.int64))
        for i in dropped if manager.num_host_blocks else []:
            try:
                self.fetch(i)
            except OutOfBlocks:  # then it is computed again
                break
        return np.array([manager.length(i) for i in numbers], np.int64)


def _numbers(ids: Any) -> list[int]:
    try:
        return [index(i) for i in ids]
    except TypeError as error:
        raise InvalidSpec(f"ids is {ids!r}, expected a batch of sequence ids: [id]") from error
