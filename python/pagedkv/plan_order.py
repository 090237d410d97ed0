"""Plans are carried out once each, in the order in which their manager made them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedkv.errors import InvalidState

if TYPE_CHECKING:
    from pagedkv._core import StepPlan, TransferPlan

__all__ = ["PlanOrder"]


class PlanOrder:
    """What a cache has carried out: it refuses a plan a second time, and one that comes too early.

    The numbers of steps may have gaps: a plan that was rolled back uses one up, and a worker may
    have carried it out or never have heard of it. A committed step must have been, and each plan
    says which was the last of those, `after`. Transfers have no gaps.

    Attributes:
        last_step, last_transfer: that were carried out here; 0 before the first.
    """

    def __init__(self) -> None:
        self.last_step = 0
        self.last_transfer = 0

    def check_step(self, plan: StepPlan) -> None:
        """Raises InvalidState if this step has been, or another step or transfer comes first."""
        if plan.step <= self.last_step:
            raise InvalidState(
                f"step {plan.step} was carried out here before, or comes too late: expected "
                f"step {self.last_step + 1} or a later one"
            )
        self._check_after(plan.after, f"step {plan.step}")
        waits = plan.wait_for
        if len(waits) and int(waits.max()) > self.last_transfer:
            raise InvalidState(
                f"step {plan.step} waits for transfer {int(waits.max())}, which was not applied "
                f"here: expected transfer {self.last_transfer + 1} before it"
            )

    def check_transfer(self, plan: TransferPlan) -> None:
        """Raises InvalidState if this transfer has been, or a step or transfer comes first."""
        if plan.id != self.last_transfer + 1:
            when = "comes too early" if plan.id > self.last_transfer else "was applied here before"
            raise InvalidState(
                f"transfer {plan.id} {when}: expected transfer {self.last_transfer + 1}"
            )
        self._check_after(plan.after, f"transfer {plan.id}")

    def _check_after(self, after: int, what: str) -> None:
        if after > self.last_step:
            raise InvalidState(
                f"{what} comes after step {after}, which was not carried out here: expected that "
                f"one first (the last one here was step {self.last_step})"
            )
