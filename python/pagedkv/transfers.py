"""Transfers between the device and the host tier: what the manager plans and the engine copies."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pagedkv._core import Aborted, BlockManager, Device, StepPlan, TransferEngine, TransferPlan
from pagedkv.errors import ConcurrentUse, InvalidState, KVError, TransferError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pagedkv.machine import Machine
    from pagedkv.plan_order import PlanOrder

__all__ = ["Transfer", "Transfers"]

A = TypeVar("A")
T = TypeVar("T")


class Transfer:
    """Copies under way. `kv.poll()`, and every command that looks for what has ended, moves it on.

    Attributes:
        id: the manager's number for it.
        direction: "out" of the device tier, or "in".
        num_bytes: that it copies; 0 if all was where it had to be.
        begun: time.perf_counter() when it was submitted.
        ended: time.perf_counter() when it was first seen to have ended, None before: by a poll, a
            wait or a command, which can be later than its last copy.
        seconds: that its copies took, by the device's own clock; None before it has ended, if it
            failed, and on a device without a clock.
        dropped: ids of the sequences that lost their blocks when it failed. `kv.resume()` takes
            them back to what is still a prefix hit.
    """

    def __init__(self, owner: Transfers, plan: TransferPlan, num_bytes: int) -> None:
        self.id = plan.id
        self.direction = plan.direction
        self.num_bytes = num_bytes
        self.dropped: Sequence[int] = ()
        self._owner = owner
        self._error: KVError | None = None
        self._cancelled = False
        self._raised = False
        self._done = False  # the manager knows
        self.begun = time.perf_counter()
        self.ended: float | None = None
        self.seconds: float | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not. Never blocks and never raises for a failed copy."""
        if not self._done:
            self._owner.look()
        return self._done

    @property
    def error(self) -> KVError | None:
        """Why it failed, or None."""
        return self._error

    def wait(self) -> None:
        """Block until it has ended.

        Raises TransferError, once, if it came to nothing: a copy of it, or of a transfer that it
        needed, failed, it was cancelled, or the cache was closed.
        """
        if not self._done:
            self._owner.wait(self)
        self._owner.raise_error_of(self)

    def cancel(self) -> bool:
        """Give it up, if none of its copies has begun; False if it is too late for that.

        It then ends as failed, its sequences are dropped, and only its own wait() says so.
        """
        return self._owner.cancel(self)

    def note_end(self, seconds: float) -> None:
        """It is seen to have ended, perhaps not for the first time, after `seconds` of copying."""
        if self.ended is None:
            self.ended = time.perf_counter()
            self.seconds = seconds or None

    def __repr__(self) -> str:
        state = "failed" if self._error else "done" if self._done else "under way"
        return f"<Transfer {self.id} {self.direction} num_bytes={self.num_bytes} {state}>"


class _Gone:
    """Stands where a closed cache had its engine and pool: any use says that it is closed."""

    def __getattr__(self, name: str) -> Any:
        raise InvalidState("this cache is closed")


GONE: Any = _Gone()


def _call_into(results: list[T], function: Callable[[A], T], argument: A) -> None:
    """Appends function(argument), where no interrupt comes in between if the function is of C."""
    results.extend(map(function, (argument,)))


class Transfers:
    """The transfers of one cache, and the engine that carries them out.

    What is planned is submitted, and what the engine tells reaches the manager, before anybody else
    may come in: else an end would be told twice, and a plan that nobody carries out would cost its
    sequences their blocks.

    An interrupt may come between any two lines. So what the manager and the engine say goes
    straight into lists of what is still to be done, and whoever looks next goes on with those.
    """

    def __init__(
        self,
        manager: BlockManager,
        engine: TransferEngine,
        device: Device,
        block_bytes: int,
        machine: Machine,
        order: PlanOrder,
    ) -> None:
        self.engine = engine
        self.device = device
        self._machine = machine
        self._manager = manager
        self._block_bytes = block_bytes
        self._under_way: dict[int, Transfer] = {}
        self._failed: list[Transfer] = []  # that poll() has to tell of
        self._planned: list[TransferPlan] = []  # for the engine
        self._told: list[tuple[int, str | None, float]] = []  # by the engine, for the manager
        self._aborted: list[Aborted] = []  # whose losses are to be told: one, or none
        self._lock = threading.Lock()
        self._closed = False
        self._applies: bool | None = None  # another manager's plans, since the first
        self._order = order  # of those
        self._copied: dict[str, tuple[int, float]] = {}  # direction -> bytes and seconds, in all

    def alone(self) -> threading.Lock:
        """To be inside alone: a second thread, or a call out of an argument, is refused.

        The lock itself, which no interrupt leaves locked. A second thread that comes between the
        look at it and the taking of it waits.
        """
        if self._lock.locked():
            raise ConcurrentUse(
                "another call is inside this cache's transfers: use a cache from one thread at a "
                "time"
            )
        return self._lock

    def start(self, command: Callable[[A], TransferPlan], argument: A) -> Transfer:
        """Start what `command`, of the manager, plans, once the manager knows what has ended."""
        with self.alone():
            self._get_ready(applies=False)
            _call_into(self._planned, command, argument)
            self._applies = False
            return self._submit()

    def apply(self, plan: TransferPlan) -> Transfer:
        """Start what another manager has planned; somebody else tells that manager of the end.

        Its numbers would clash with ours, so a cache carries out the plans of one manager.
        """
        with self.alone():
            self._get_ready(applies=True)
            self._applies = True
            self._planned.append(plan)
            return self._submit()

    def _get_ready(self, *, applies: bool) -> None:
        if self._closed:
            raise InvalidState("this cache is closed")
        if self._machine.is_capturing():
            raise InvalidState("a CUDA graph is being captured: no blocks are moved meanwhile")
        self._look()
        if self._applies not in (None, applies):
            whose = "another" if self._applies else "its own"
            raise InvalidState(f"this cache carries out the transfers of {whose} manager")

    def follow(self) -> None:
        """Within a step: the stream that the caller is on now continues the one before."""
        machine = self._machine
        if machine.needs_order:
            machine.follow()
            if self.engine.has_moved() and not machine.is_capturing():
                self.engine.follow()

    def _submit(self) -> Transfer:
        """Hand the engine all that is planned; returns the last one."""
        while self._planned:
            plan = self._planned[0]
            num_bytes = plan.num_copies * self._block_bytes
            transfer = self._under_way.get(plan.id) or Transfer(self, plan, num_bytes)
            self._under_way[plan.id] = transfer
            try:
                if not self.engine.in_flight(plan.id):
                    self._machine.follow()
                    self.engine.submit(plan)
            except Exception as error:
                del self._planned[0]
                if self._applies:  # the caller is told
                    del self._under_way[plan.id]
                else:  # the manager waits for an end
                    self._told.append((plan.id, f"it was not submitted, {error!r}", 0.0))
                raise
            if self._applies:
                self._order.last_transfer = plan.id
            del self._planned[0]
        self._machine.warn()
        return transfer

    def step(self, plan: StepPlan) -> None:
        """Before a step's first work: the caller's stream waits for what the plan waits for."""
        with self.alone():
            if self._closed:
                raise InvalidState("this cache is closed")
            self._machine.follow()
            self.engine.step(plan)

    def look(self) -> list[Transfer]:
        """Tell the manager of all that has ended, and return it. Nobody is waited for."""
        if not self._under_way and not self._planned:
            return []
        with self.alone():
            return self._look()

    def _look(self) -> list[Transfer]:
        if not self._under_way and not self._planned:
            return []
        if self._machine.is_capturing():  # to ask would end the capture
            return []
        if self._planned:
            self._submit()
        self.engine.poll(self._told)
        for number, _, seconds in self._told:
            self._under_way[number].note_end(seconds)
        ended = []
        while self._told and not self._manager.open_step:  # a manager in a step takes no ends
            number, why, _ = self._told[0]
            transfer = self._under_way[number]
            if not transfer._done:
                self._end(transfer, why)
                ended.append(transfer)
            del self._told[0], self._under_way[number]
        return ended

    def numbered(self, number: int) -> Transfer | None:
        """The transfer under way with this id; None if it has just ended."""
        if number not in self._under_way:
            self.look()
        if number not in self._under_way and number in self._manager.transfers():
            raise InvalidState(f"transfer {number} is none that this cache carries out")
        return self._under_way.get(number)

    def under_way(self) -> list[Transfer]:
        """What was not seen to end yet, in the order of submission."""
        return list(self._under_way.values())

    def poll(self) -> list[Transfer]:
        """look(), then raise the error of a transfer that failed since, once."""
        ended = self.look()
        if self._failed:
            self.raise_error_of(self._failed[0])
        return ended

    def wait(self, transfer: Transfer) -> None:
        """Block until a transfer has ended."""
        if self._manager.open_step:
            raise InvalidState("a step is open: close it before waiting for a transfer")
        if self._machine.is_capturing():
            raise InvalidState("a CUDA graph is being captured: nothing ends meanwhile")
        with self.alone():
            if transfer._done:
                return
            self.engine.wait(transfer.id)
            while not transfer._done:  # one look, but for events that the device was short of
                self._look()

    def cancel(self, transfer: Transfer) -> bool:
        """Give a transfer up, if none of its copies has begun."""
        with self.alone():
            if transfer._done or not self.engine.cancel(transfer.id):
                return False
            transfer._cancelled = True
            if transfer in self._failed:  # as one that it needs was cancelled before
                self._failed.remove(transfer)
            self._look()
            return True

    def _end(self, transfer: Transfer, why: str | None) -> None:
        # It may know already, and an interrupt have come before it was noted.
        is_awaited = not self._applies and transfer.id in self._manager.transfers()
        if why is None:
            if is_awaited:
                self._manager.complete(transfer.id)
            self._measure(transfer)
        elif is_awaited or self._aborted:
            self._fail(transfer, why)
        elif transfer._error is None:
            transfer._error = TransferError(f"transfer {transfer.id} failed: {why}")
            self._note_failure(transfer)
        transfer._done = True

    def _measure(self, transfer: Transfer) -> None:
        if not transfer.num_bytes or transfer._error is not None:
            return  # nothing was copied, or nothing came of it
        assert transfer.ended is not None
        seconds = transfer.seconds or transfer.ended - transfer.begun
        num_bytes, total = self._copied.get(transfer.direction, (0, 1e-9))
        self._copied[transfer.direction] = num_bytes + transfer.num_bytes, total + seconds

    def bandwidth(self, direction: Literal["out", "in"]) -> float | None:
        """Bytes per second of all copies so far; None before the first.

        On a device without a clock, the time until somebody looked counts with the copies.
        """
        if direction not in self._copied:
            return None
        num_bytes, seconds = self._copied[direction]
        return num_bytes / seconds

    def _fail(self, transfer: Transfer, why: str) -> None:
        if not self._aborted:
            _call_into(self._aborted, self._manager.abort, transfer.id)
        aborted = self._aborted[0]
        lost: dict[int, list[int]] = {}
        for i, number in zip(aborted.sequences.tolist(), aborted.waited_for.tolist(), strict=True):
            lost.setdefault(number, []).append(i)
        if transfer._error is None:  # else it is void, and its losses were told
            transfer.dropped = tuple(lost.get(transfer.id, ()))
            transfer._error = TransferError(
                f"transfer {transfer.id} failed: {why}. {len(transfer.dropped)} sequences lost "
                "their blocks: resume() takes them back to what is still a prefix hit, or "
                "release() them"
            )
            self._note_failure(transfer)
        for number in aborted.transfers.tolist():
            dependent = self._under_way[number]
            dependent.dropped = tuple(lost.get(number, ()))
            dependent._error = TransferError(
                f"transfer {number} is void: transfer {transfer.id}, which it needed, failed"
            )
            self._note_failure(dependent)
        self._aborted.clear()

    def _note_failure(self, transfer: Transfer) -> None:
        """For poll() to raise, unless somebody asked for it."""
        if not transfer._cancelled and transfer not in self._failed:
            self._failed.append(transfer)

    def raise_error_of(self, transfer: Transfer) -> None:
        """Raise a transfer's error, unless it was raised before."""
        with contextlib.suppress(ValueError):  # somebody else may be told of it meanwhile
            self._failed.remove(transfer)
        if transfer._error is not None and not transfer._raised:
            transfer._raised = True
            raise transfer._error

    def end(self) -> None:
        """Cancel what has not begun, and wait for the rest. For whoever is inside alone()."""
        if not self._closed:
            self.engine.close()
            self._closed = True

    def forget(self) -> None:
        """Let go of all that is large, so that a Transfer that somebody keeps holds none of it."""
        self._closed = True
        for transfer in self._under_way.values():
            if transfer._error is None:
                transfer._error = TransferError("the cache was closed before its end")
            transfer._done = True
        self._under_way.clear()
        self.engine = self.device = self._machine = GONE
