"""First come, first served, from event to event: the same loop for every policy.

Between two events (an arrival that could be admitted, an end, a shortage) every running sequence
grows by one token a step, so that many steps are taken at once, their time in closed form.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from pagedkv.simulator.memory import CATEGORIES, Memory, Usage, Work
from pagedkv.simulator.report import Delay, Moment, PolicyReport
from pagedkv.simulator.service import ServiceModel
from pagedkv.simulator.setting import SimulationSetting
from pagedkv.simulator.trace import Trace

__all__ = ["Scheduler"]

_MOMENTS = 400  # of the memory over time, in the report


class Scheduler:
    """Runs one trace through one memory.

    Requests are admitted in order, as long as they fit; a prefill is a step of its own. If a step
    does not fit, the newest request is preempted, goes to the head of the queue, and nothing is
    admitted until a request has ended.
    """

    def __init__(
        self, policy: str, memory: Memory, trace: Trace, service: ServiceModel,
        setting: SimulationSetting, max_model_len: int,
    ) -> None:  # fmt: skip
        self._policy, self._memory = policy, memory
        self._service, self._setting = service, setting
        self._now = 0.0
        self._queue: deque[Work] = deque()
        self._running: list[Work] = []  # in the order of their admission
        self._short = False  # the head of the queue waits for memory
        self._integral = Integral()
        self._waited: list[float] = []
        self._num_preempted = self._num_recomputed = self._num_finished = 0
        requests = trace.requests
        long = [r.num_tokens > max_model_len for r in requests]
        holds = [is_long or memory.can_hold(r) for r, is_long in zip(requests, long, strict=True)]
        self._num_requests = len(requests)
        self._num_too_long, self._num_refused = sum(long), len(holds) - sum(holds)
        self._arriving = deque(
            Work(r)
            for r, is_long, held in zip(requests, long, holds, strict=True)
            if held and not is_long
        )
        self._num_prompt_tokens = 0

    def run(self, progress: Callable[[float], None] | None = None) -> PolicyReport:
        """The report of the whole trace; `progress` is told the share that has ended."""
        total, told = max(1, len(self._arriving)), 0.0
        while self._arriving or self._queue or self._running:
            self._arrive()
            self._admit()
            if self._running:
                self._step()
            else:
                self._idle(until=self._arriving[0].request.arrival)
            if progress and self._num_finished / total > told + 0.01:
                told = self._num_finished / total
                progress(told)
        return self._report()

    def _arrive(self) -> None:
        while self._arriving and self._arriving[0].request.arrival <= self._now:
            self._queue.append(self._arriving.popleft())

    def _admit(self) -> None:
        """Let the head of the queue in while it fits, and prefill what came in."""
        num_tokens, num_copied = 0, self._memory.num_copied_blocks
        while self._queue and not self._short:
            if self._num_running() + self._setting.num_sequences > self._setting.max_batch:
                break
            work = self._queue[0]
            computed = self._memory.admit(work)
            if computed is None:
                self._short = True
                break
            self._running.append(self._queue.popleft())
            num_tokens += computed
            if work.admitted:
                self._num_recomputed += computed
            else:
                work.admitted = True
                self._num_prompt_tokens += work.request.input_length
                self._waited.append(self._now - work.request.arrival)
                if self._num_finished:
                    self._integral.mark()
        copied = self._memory.num_copied_blocks - num_copied
        if num_tokens or copied:
            usage = self._usage()
            seconds = self._service.token_seconds * num_tokens + self._copying(copied)
            self._spend(seconds, usage, usage)

    def _step(self) -> None:
        """Steps up to the next end, or the next arrival if the queue is empty."""
        running = self._running
        num_sequences = self._num_running()
        context = self._setting.num_sequences * sum([work.length for work in running])
        steps = min([work.remaining for work in running])
        if self._arriving and not self._queue:
            until = self._arriving[0].request.arrival - self._now
            steps = min(steps, self._service.num_steps(until, num_sequences, context))
        before = self._usage()
        done = self._memory.advance(running, steps) if steps else 0
        if steps and not done:
            self._preempt()
            return
        for work in running:
            work.length += done
            work.remaining -= done
        seconds = self._service.steps_seconds(done, num_sequences, context)
        self._spend(seconds, before, self._usage())
        ended = [work for work in running if work.remaining == 0]
        for work in ended:
            self._memory.release(work)
        if ended:
            self._running = [work for work in running if work.remaining]
            self._num_finished += len(ended)
            self._short = False

    def _preempt(self) -> None:
        assert len(self._running) > 1, "a request that runs alone fits"
        work, usage = self._running[-1], self._usage()
        num_copied = self._memory.num_copied_blocks
        self._memory.preempt(work)
        self._spend(self._copying(self._memory.num_copied_blocks - num_copied), usage, usage)
        self._queue.appendleft(self._running.pop())
        self._num_preempted += 1
        self._short = True

    def _idle(self, until: float) -> None:
        usage = self._usage()
        self._spend(until - self._now, usage, usage)
        self._now = until

    def _num_running(self) -> int:
        return len(self._running) * self._setting.num_sequences

    def _copying(self, num_blocks: int) -> float:
        num_bytes = num_blocks * self._setting.block_size * self._setting.token_bytes
        return num_bytes / self._service.copy_bandwidth

    def _usage(self) -> Usage:
        return self._memory.usage(self._running, self._short)

    def _spend(self, seconds: float, before: Usage, after: Usage) -> None:
        self._integral.add(self._now, seconds, before, after, self._num_running())
        self._now += seconds

    def _report(self) -> PolicyReport:
        memory, average = self._memory, self._integral.average()
        block_bytes = self._setting.block_size * self._setting.token_bytes
        return PolicyReport(
            policy=self._policy,
            shares={name: average[name] / self._integral.num_slots for name in CATEGORIES},
            saved_by_sharing=1 - average["held"] / average["unshared"] if average["held"] else 0.0,
            mean_batch=average["batch"],
            max_batch=self._integral.max_batch,
            num_requests=self._num_requests,
            num_finished=self._num_finished,
            num_too_long=self._num_too_long,
            num_refused=self._num_refused,
            num_prompt_tokens=self._num_prompt_tokens,
            num_hit_tokens=memory.num_hit_tokens,
            num_preempted=self._num_preempted,
            num_swapped_bytes=memory.num_copied_blocks * block_bytes,
            num_recomputed_tokens=self._num_recomputed,
            queueing=Delay.of(self._waited),
            seconds=self._now,
            timeline=self._integral.timeline(),
        )


class Integral:
    """Averages over time, by the trapezoid of what was before and after each stretch.

    They end at the last admission: what follows is the end of the trace and not its load. If no
    request had ended by then, everything fits at once, and they are of the whole run; as they are
    if no time had passed by then.
    """

    _NAMES = (*CATEGORIES, "unshared", "held", "batch")

    def __init__(self) -> None:
        self.max_batch = 0
        self.num_slots = 1
        self._seconds = self._marked_seconds = 0.0
        self._sums = self._marked = np.zeros(len(self._NAMES))
        self._moments: list[tuple[float, int, int]] = []

    def mark(self) -> None:
        """Averages end here, or later."""
        self._marked, self._marked_seconds = self._sums.copy(), self._seconds

    def add(self, now: float, seconds: float, before: Usage, after: Usage, batch: int) -> None:
        self.max_batch = max(self.max_batch, batch)
        values = [(getattr(before, name) + getattr(after, name)) / 2 for name in self._NAMES[:-1]]
        self._sums = self._sums + seconds * np.array([*values, batch])
        self._seconds += seconds
        self.num_slots = sum(getattr(after, name) for name in CATEGORIES)
        self._moments.append((now + seconds, after.tokens, after.held))

    def average(self) -> dict[str, float]:
        marked = self._marked_seconds > 0
        sums = self._marked if marked else self._sums
        seconds = self._marked_seconds if marked else self._seconds
        if not seconds:  # nothing ran
            return dict.fromkeys(self._NAMES, 0.0) | {"free": float(self.num_slots)}
        return dict(zip(self._NAMES, (sums / seconds).tolist(), strict=True))

    def timeline(self) -> tuple[Moment, ...]:
        """What was held at evenly spaced times, as shares of the memory."""
        if not self._moments:
            return ()
        times, tokens, held = (np.array(column) for column in zip(*self._moments, strict=True))
        grid = np.linspace(0.0, times[-1], _MOMENTS)
        at = np.minimum(np.searchsorted(times, grid), len(times) - 1)
        columns = (grid, tokens[at] / self.num_slots, held[at] / self.num_slots)
        return tuple(Moment(*row) for row in zip(*(c.tolist() for c in columns), strict=True))
