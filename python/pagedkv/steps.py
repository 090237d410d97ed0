"""Steps of a cache: of its own manager, or of one in another process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from pagedkv._core import BlockManager, StepPlan, TransferPlan
from pagedkv.errors import InvalidSpec, InvalidState
from pagedkv.plan_order import PlanOrder
from pagedkv.sequences import Sequences
from pagedkv.step import Step

if TYPE_CHECKING:
    from pagedkv._core import Pool
    from pagedkv.transfers import Transfer

__all__ = ["Steps"]


class Steps(Sequences):
    """Opens steps, one at a time, and closes them. `KVCache` adds the tensors."""

    _pool: Pool
    _order: PlanOrder
    _step: Step | None = None  # the open one
    _last_step: Callable[[], Step | None] = staticmethod(lambda: None)

    def step(self, ids: Any, tokens: Any = None, counts: Any = None) -> Step:
        """Open a step of `counts[b]` (default 1) new tokens for each of `ids`, all or nothing.

        The copies of copy-on-write are queued when it returns, and all that follows comes after the
        transfers that the blocks have to wait for. Write every layer: committed full blocks are
        prefix hits, whatever is in them. Use it as a context manager, or
        close it with its commit() or rollback(). See BlockManager.append for the arguments.
        """
        self._look()
        manager = self._open_manager()
        self._close_applied()
        plan = manager.append(ids, tokens, counts)
        try:
            return self._begin(plan, manager)
        except BaseException:
            manager.rollback(plan)
            raise

    def rollback(self) -> None:
        """Close the open step, if there is one, as if it had not been, whoever has it.

        For a step that nobody has any more: it was forgotten, or an interrupt came before step()
        returned. Code that commits its steps, or rolls them back, never needs it.
        """
        manager, step = self._open_manager(), self._step
        manager.rollback()
        if step is not None:
            self._step_closed(step, step._step_before)

    @overload
    def apply(self, plan: StepPlan) -> Step: ...
    @overload
    def apply(self, plan: TransferPlan) -> Transfer: ...
    def apply(self, plan: Any) -> Any:
        """Carry out a plan of another manager, such as an unpickled one of a scheduler process.

        Args:
            plan: of a manager that was made with the block_size, and at most the num_device_blocks,
                num_host_blocks, max_batch and max_model_len of `self.manager`, which stays unused.

        A StepPlan's copies are queued when this returns, and the Step is as one of step(): write()
        and attention() take it, until it is closed, or the next plan is applied. Its commit() tells
        nobody: the scheduler commits. After its rollback() the plan may be applied again.

        A TransferPlan's copies begin as those of swap_out(). Its end is the Transfer's `done`,
        `error` and wait(), and poll() here; the scheduler completes it when all workers have ended
        it, or aborts it if one of them failed.

        Each plan is carried out once, in the order in which the manager made them. Steps that were
        rolled back may be left out; see `pagedkv.plan_order`.

        Raises:
            InvalidState: the plan was carried out before, or another has to be carried out first;
                the message says which. Or a step() is open.
            InvalidSpec: it is none, or it names blocks that this cache does not have.
        """
        self._open_manager()
        if not isinstance(plan, (StepPlan, TransferPlan)):
            raise InvalidSpec(f"plan is {plan!r}, expected a StepPlan or a TransferPlan")
        self._look()
        self._close_applied()
        if self._step is not None:
            raise InvalidState("a step is open: close it before another plan is carried out")
        if isinstance(plan, TransferPlan):
            transfers = self._tiers()
            self._order.check_transfer(plan)
            return transfers.apply(plan)
        self._order.check_step(plan)
        self._check_blocks(plan)
        return self._begin(plan, None)

    def _check_blocks(self, plan: StepPlan) -> None:
        """A plan of other blocks than those here names slots that its tables do not."""
        size, tables, counts = self.spec.block_size, plan.block_tables, np.diff(plan.query_starts)
        if (counts < 1).any():
            raise InvalidSpec(f"step {plan.step} has rows without new tokens: no manager makes one")
        last, newest = self.manager.num_device_blocks, int(tables.view(np.uint32).max(initial=0))
        if newest > last:
            raise InvalidSpec(
                f"step {plan.step} has block {newest}, and this cache has blocks up to {last}: "
                "expected a plan of a manager with at most its num_device_blocks"
            )
        columns = plan.positions // size
        inside = not len(columns) or int(columns.max()) < tables.shape[1]
        blocks = tables[np.repeat(np.arange(len(tables)), counts), columns] if inside else columns
        if (blocks.astype(np.int64) * size + plan.positions % size != plan.slots).any():
            raise InvalidSpec(
                f"step {plan.step} has slots that are not in its blocks of {size} tokens: expected "
                f"a plan of a manager with block_size={size}"
            )

    def _release_left(self) -> None:
        if self._step is not None and self._step.is_abandoned:
            self._step.rollback()
        with suppress(InvalidState):  # a step is open
            super()._release_left()

    def _begin(self, plan: StepPlan, manager: BlockManager | None) -> Step:
        """Queue the copies that precede the step's work. Without a manager it is another's plan."""
        if (last := self._last_step()) is not None:
            last.forget_views()
        if self._transfers is not None:
            self._transfers.step(plan)
        self._pool.begin_step(plan)
        step = Step(self, plan, manager, self._order.last_step)
        self._order.last_step, self._step = plan.step, step  # at once for an interrupt
        self._last_step = weakref.ref(step)
        return step

    def _close_applied(self) -> None:
        """An applied step that nobody closed has done its work by the next plan."""
        if self._step is not None and self._step.is_applied:
            self._step.commit()

    def _step_closed(self, step: Step, last_step: int) -> None:
        if self._step is not step:  # another thread has opened the next one already
            return
        self._order.last_step = last_step
        self._step = None

    def _require(self, step: Step) -> None:
        if step is not self._step or step is None:
            raise InvalidState("this step is not open here: it was closed, or is another cache's")
