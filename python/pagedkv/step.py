"""One step of a KVCache: its plan as tensors, closed by commit or rollback."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from pagedkv.checks import address
from pagedkv.errors import InvalidSpec, InvalidState

if TYPE_CHECKING:
    from pagedkv._core import BlockManager, StepPlan
    from pagedkv.cache import KVCache
    from pagedkv.steps import Steps

__all__ = ["Csr", "Step"]

T = TypeVar("T")


class Csr(NamedTuple):
    """Block tables one behind the other, int32 on the cache's device, in FlashInfer's words.

    Attributes:
        kv_indptr: row b's blocks are kv_indices[kv_indptr[b] : kv_indptr[b + 1]], [B + 1].
        kv_indices: blocks, [kv_indptr[B]].
        kv_last_page_len: tokens in each row's last block, 1 to block_size, [B].
    """

    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_last_page_len: torch.Tensor


class Step:
    """Views of the cache's persistent buffers, valid until the next step; InvalidState after that.

    A context manager: leaving it commits, an exception rolls back. T is the number of new tokens,
    B the batch. `plan` is the StepPlan behind it; the tensors are on the cache's device, to be read
    only: block tables are kept up to date where they are. A step does not keep its cache, whose
    memory is large: once that is gone, the step is closed, and says so.

    Attributes:
        is_applied: whether the plan is another manager's, which KVCache.apply() carries out: then
            closing the step tells no manager.
    """

    def __init__(
        self, kv: Steps, plan: StepPlan, manager: BlockManager | None, step_before: int
    ) -> None:
        self.plan = plan
        self.num_tokens: int = plan.num_tokens
        self.is_applied = manager is None
        self._cache = weakref.ref(kv)
        self._manager = manager
        self._step_before = step_before  # the last one that was carried out before
        self._stale = False
        self.is_abandoned = False  # nobody is left to close it
        self._views: dict[str, torch.Tensor] = {}
        self._kept: dict[Hashable, Any] = {}

    @property
    def _kv(self) -> KVCache:
        kv: KVCache | None = self._cache()  # type: ignore[assignment]  # the Steps that are made
        if kv is None:
            raise InvalidState(f"the cache of step {self.plan.step} is gone, as nobody had it")
        return kv

    def _view(self, name: str) -> torch.Tensor:
        view = self._views.get(name)
        if view is None:
            if self._stale:
                raise InvalidState(
                    f"step {self.plan.step} is over, and its buffers are another's: read a step "
                    "before the next one"
                )
            view = self._kv.machine.step_tensor(self.plan, name)
            address(view, f"{name}, under a mode of fake tensors,")  # before it is kept for all
            self._views[name] = view
        return view

    def forget_views(self) -> None:
        """The buffers belong to another step from now on: reading raises InvalidState."""
        self._stale = True
        self._views.clear()
        self._kept.clear()
        vars(self).pop("slots_at", None)  # so that it asks for the slots again

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when `key` was first asked for: one for all layers of the step."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    @property
    def input_ids(self) -> torch.Tensor:
        """The new tokens' ids, int64 [T]. InvalidState if the step was opened without tokens."""
        if self.plan.input_ids is None:
            raise InvalidState("this step was opened without tokens, so it has no input_ids")
        return self._view("input_ids")

    @property
    def slots(self) -> torch.Tensor:
        """Where each new token's K and V go: block * block_size + offset, int64 [T]."""
        return self._view("slots")

    @cached_property
    def slots_at(self) -> int:
        """The address of `slots`."""
        return self.slots.data_ptr()

    @property
    def positions(self) -> torch.Tensor:
        """Index of each new token in its sequence, int64 [T]."""
        return self._view("positions")

    @property
    def query_starts(self) -> torch.Tensor:
        """Row b's new tokens are [query_starts[b], query_starts[b + 1]), int32 [B + 1]."""
        return self._view("query_starts")

    @property
    def seq_lens(self) -> torch.Tensor:
        """Length of each sequence with its new tokens, int32 [B]."""
        return self._view("seq_lens")

    @property
    def block_tables(self) -> torch.Tensor:
        """Blocks of each sequence, int32 [B, W], padded with block 0; rows are strided."""
        return self._view("block_tables")

    def csr(self) -> Csr:
        """The block tables without padding, made on the device, once, while nobody waits."""
        return self.kept("csr", self._make_csr)

    def _make_csr(self) -> Csr:
        size, lens = self._kv.spec.block_size, self.seq_lens
        counts = (lens + size - 1) // size
        indptr = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        total = int(((self.plan.seq_lens + size - 1) // size).sum())  # known here, so none waits
        rows = torch.repeat_interleave(counts, output_size=total)
        columns = torch.arange(total, device=lens.device) - indptr[rows]
        return Csr(indptr, self.block_tables[rows, columns], lens - (counts - 1) * size)

    @property
    def is_open(self) -> bool:
        kv = self._cache()
        return kv is not None and kv._step is self

    def commit(self, lengths: Any = None) -> None:
        """Close the step; `lengths[b]` keeps only that much of row b. See BlockManager.commit."""
        kv = self._kv
        if self._manager is not None:
            self._manager.commit(self.plan, lengths)
        elif lengths is not None:
            raise InvalidSpec("lengths are for the manager that made the plan: commit them there")
        kv._step_closed(self, self.plan.step)

    def rollback(self) -> None:
        """Close the step as if it had not been."""
        kv = self._kv
        if self._manager is not None:
            self._manager.rollback(self.plan)
        kv._step_closed(self, self._step_before)

    def abandon(self) -> None:
        """Like rollback, with the next command, which releases its sequences: for finalizers."""
        self.is_abandoned = True

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.is_open:
            return
        if kind is None:
            self.commit()
        else:
            self.rollback()
