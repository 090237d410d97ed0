"""The rows of a batch: sequences of one length that grow, fork and are reordered together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagedkv.cache import KVCache
from pagedkv.errors import (
    InvalidSpec,
    InvalidState,
    NotResident,
    TransferError,
)
from pagedkv.spec import DTYPE_BYTES
from pagedkv.step import Step
from pagedkv.transfers import Transfer

_Ids = NDArray[np.int64]
_NONE: _Ids = np.empty(0, np.int64)
_OTHER_PROMPT = "start() was given another prompt: call reset() and start again"


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds now, and has held.

    num_blocks: blocks that its rows hold; num_shared_blocks: those that several rows hold.
    num_copies: blocks copied on write. num_hit_tokens: tokens that start() found computed.
    kv_bytes, peak_bytes: K and V held now and at most, in whole blocks.
    dense_peak_bytes: what a cache with a tensor row for each sequence would have held at most.
    """

    num_rows: int
    length: int
    num_blocks: int
    num_shared_blocks: int
    num_copies: int
    num_hit_tokens: int
    kv_bytes: int
    peak_bytes: int
    dense_peak_bytes: int


@dataclass(frozen=True)
class OpenStep:
    """A step of `count` tokens per row on top of `past`, and the way back.

    `made` are sequences that were created or forked for it, `before` the rows that it found.
    """

    step: Step
    past: int
    count: int
    made: _Ids
    before: _Ids
    knows_tokens: bool


class Rows:
    """Sequences `ids` of `kv`, each of `length` tokens; at most one step is open."""

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        self.open_step: OpenStep | None = None
        self._made: _Ids | None = None  # while a step is opened: sequences that are for it alone
        self._forks: list[_Ids] = []  # made, and not used yet
        self._unused: list[int] = []  # sequences that are to be released
        self.num_hit_tokens = 0
        self.dense_peak_bytes = 0
        self._forget()
        for i, layer in enumerate(kv.spec.layers):
            if DTYPE_BYTES[layer.dtype] == 1:
                raise InvalidSpec(
                    f"layer {i} is stored as {layer.dtype}, which a model's own attention cannot "
                    "read: expected the model's dtype"
                )

    def _forget(self) -> None:
        self.ids = _NONE
        self.length = 0
        self.parked = False
        # Of rows made by start(): the prompt until it is computed, and how many tokens of each row
        # the manager knows. -1: the rows are anonymous, and never prefix hits.
        self._prompt: _Ids | None = None
        self._num_known = -1
        self._num_hit = 0
        self._reordered = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def wants_tokens(self) -> bool:
        """Whether a step should carry its tokens: all earlier ones of these rows are known."""
        return self._num_known == self.length

    @property
    def awaits_prompt(self) -> bool:
        """Whether start()'s prompt is not computed to its end yet."""
        return self._prompt is not None

    def __del__(self) -> None:
        """What nobody has any more is released: a fork() that was used once and dropped."""
        made = [] if self._made is None else self._made.tolist()
        made += [i for ids in self._forks for i in ids[1:].tolist()]
        if self.open_step is not None:
            self.open_step.step.abandon()
        self.kv.release_later([*self.ids.tolist(), *made, *self._unused])

    # -- steps -----------------------------------------------------------------------------------

    def open(
        self, batch: int, count: int, input_ids: _Ids | None, *, knows_prompt: bool
    ) -> OpenStep:
        """Open a step for `batch` rows: as many as there are, n times as many, or the first ones.

        `input_ids` [batch, count], or None where unknown; then they are those of start()'s prompt
        if the caller `knows_prompt` to be what is computed. All or nothing.
        """
        self.rollback()
        if self.parked:
            raise NotResident("the rows of this cache are parked in host memory: resume() first")
        before, made = self.ids, _NONE
        tokens = self._tokens(batch, count, input_ids, knows_prompt)
        if not len(before):
            ids = made = np.array([self.kv.create() for _ in range(batch)], np.int64)
        elif batch == len(before):
            ids = before
        elif batch % len(before) == 0:
            fan_out = batch // len(before)
            forks = np.stack(self._fork(before, np.full(len(before), fan_out)))
            ids, made = forks.reshape(-1), forks[:, 1:].reshape(-1)
        else:
            raise InvalidSpec(
                f"a batch of {batch} cannot continue the {len(before)} rows of the cache: use "
                "batch_select_indices() to choose rows, or finish() or reset() for a new request"
            )
        # After an interrupt, which may lose the step, rollback() knows of them.
        self._made, self._forks = made, []
        try:
            step = self.kv.step(ids, tokens, counts=np.full(batch, count))
        except Exception:
            self._made = None
            self.kv.release(made)
            raise
        self.open_step = OpenStep(step, self.length, count, made, before, tokens is not None)
        self.ids, self._made = ids, None
        return self.open_step

    def expect_untold(self, why: str) -> None:
        """A forward computes what token ids do not tell: these rows leave no more hits.

        Raises InvalidState if they took some for this prompt.
        """
        if self._prompt is not None and self._num_hit:
            raise InvalidState(
                f"start() found {self._num_hit} tokens of this prompt computed, and it is not told "
                f"by its token ids alone: {why}. Call reset(), and generate without start(), or "
                "give it a salt that tells what they do not"
            )
        self._prompt, self._num_known = None, -1

    def check_prompt(self, input_ids: _Ids) -> None:
        """Raises InvalidState unless [B, T] begins with what the rows hold of start()'s prompt."""
        prompt, held = self._prompt, slice(self.length)
        if prompt is not None and not np.array_equal(input_ids[:, held], prompt[:, held]):
            raise InvalidState(_OTHER_PROMPT)

    def _tokens(
        self, batch: int, count: int, input_ids: _Ids | None, knows_prompt: bool
    ) -> _Ids | None:
        """The tokens of a step, where the manager can still be told them."""
        if not self.wants_tokens:
            return None
        end = self.length + count
        if self._prompt is not None and batch % len(self._prompt) == 0:
            prompt = self._prompt.repeat(batch // len(self._prompt), axis=0)[:, self.length : end]
            if input_ids is None and knows_prompt and prompt.shape[1] == count:
                return prompt.reshape(-1)
            if input_ids is not None and (input_ids[:, : prompt.shape[1]] != prompt).any():
                raise InvalidState(_OTHER_PROMPT)
        return None if input_ids is None else np.ascontiguousarray(input_ids).reshape(-1)

    def commit(self, dense_batch: int | None = None) -> None:
        """Close the step. A dense cache would have held `dense_batch` rows (default: as many)."""
        done = self.open_step
        if done is None:
            return
        done.step.commit()
        # In one line, between whose parts no interrupt comes: before it all is rolled back.
        self.open_step, self.length = None, done.past + done.count
        if done.knows_tokens:
            self._num_known = self.length
        if self._prompt is not None and self.length >= self._prompt.shape[1]:
            self._prompt = None
        held = (dense_batch or len(self.ids)) * self.length * self.kv.spec.token_bytes
        self.dense_peak_bytes = max(self.dense_peak_bytes, held)

    def rollback(self) -> None:
        """Drop an open step, if there is one, and the rows made for it."""
        if self._forks:
            unused = [i for ids in self._forks for i in ids[1:].tolist()] + self._unused
            self._unused, self._forks = unused, []
        failed, made = self.open_step, self._made
        if failed is not None:
            made, self.ids = failed.made, failed.before
        if made is not None:
            if failed is None or failed.step.is_open:
                self.kv.rollback()
            self.kv.truncate(self.ids, np.full(len(self.ids), self.length))  # had it been committed
            unused = made.tolist() + self._unused
            self._unused, self.open_step, self._made = unused, None, None
        self._release_unused()

    def _fork(self, rows: _Ids, counts: _Ids) -> list[_Ids]:
        """counts[i] ids for rows[i], itself the first. No interrupt comes before they are noted."""
        self._forks.extend(map(self.kv.manager.fork, rows.tolist(), counts.tolist()))
        return self._forks

    def _release_unused(self) -> None:
        if not self._unused:
            return
        self.kv.release_later(self._unused)
        self._unused = []
        self.kv.release(_NONE)  # and those

    # -- rows ------------------------------------------------------------------------------------

    def select(self, parents: _Ids) -> None:
        """Row i becomes what row parents[i] was."""
        self.rollback()
        rows = self.ids
        if not len(rows) or np.array_equal(parents, np.arange(len(rows))):
            return
        if len(parents) and not 0 <= parents.min() <= parents.max() < len(rows):
            raise InvalidSpec(f"indices must be in [0, {len(rows)}), the rows of the cache")
        self._reordered |= bool((np.diff(parents) < 0).any()) or len(parents) == len(rows)
        if not len(parents):
            self.release()
            return
        if len(parents) == len(rows):
            self.kv.reorder(rows, parents)
            return
        selected = np.empty_like(parents)
        counts = np.bincount(parents, minlength=len(rows))
        kept = np.flatnonzero(counts)
        for parent, ids in zip(kept, self._fork(rows[kept], counts[kept]), strict=True):
            selected[parents == parent] = ids
        unused = rows[counts == 0].tolist()
        self.ids, self._unused, self._forks = selected, unused, []  # at once for an interrupt
        self._release_unused()

    def truncate(self, length: int) -> None:
        self.rollback()
        if len(self.ids) and length < self.length:
            self.kv.truncate(self.ids, np.full(len(self.ids), length))
            self.length = length
            self._num_known = min(self._num_known, length)

    def fork(self) -> Rows:
        """The same rows once more, in the same blocks."""
        self.rollback()
        twin = Rows(self.kv)
        twin.parked = self.parked
        twin.ids = np.array([self.kv.fork(int(row), 2)[1] for row in self.ids], np.int64)
        twin.length, twin._prompt = self.length, self._prompt
        twin._num_known, twin._num_hit = self._num_known, self._num_hit
        twin._reordered = self._reordered
        return twin

    def park(self) -> Transfer:
        """Move all rows to the host tier."""
        self.rollback()
        if self.parked:
            raise InvalidState("the rows of this cache are parked already")
        transfer = self.kv.swap_out(self.ids)
        self.parked = len(self.ids) > 0
        return transfer

    def resume(self) -> int:
        """Bring the rows back and wait for them; returns their length, the shortest that is left.

        One whose copy failed holds only what is still a prefix hit.
        """
        if self.parked:
            manager = self.kv.manager
            self.kv.resume(self.ids)
            while not self.kv.ready(self.ids):
                try:
                    self.kv.wait(self.ids)
                except TransferError:
                    lost = [i for i in self.ids.tolist() if manager.is_dropped(i)]
                    manager.restore(np.array(lost, np.int64))
            self.parked = False
            self.truncate(min(self.kv.length(i) for i in self.ids.tolist()))
        return self.length

    def release(self) -> None:
        self.rollback()
        unused = self.ids.tolist()
        self.ids, self._unused = _NONE, unused
        self._forget()
        self._release_unused()

    # -- requests --------------------------------------------------------------------------------

    def start(self, prompt: _Ids, salt: bytes | str | None) -> int:
        """Rows that hold what is cached of `prompt` [B, T]; returns how many tokens that is."""
        if len(self.ids):
            raise InvalidState("the cache holds a request: call finish() or reset() before start()")
        if prompt.ndim != 2 or 0 in prompt.shape:
            raise InvalidSpec(f"input_ids must be [batch, tokens], got {list(prompt.shape)}")
        ids: list[int] = []
        try:
            for tokens in prompt:
                ids.append(self.kv.create(tokens, salt=salt))
        except BaseException:
            self.kv.release(np.array(ids, np.int64))
            raise
        hit = min(self.kv.num_cached(row) for row in ids)
        self.ids = np.array(ids, np.int64)
        self.kv.truncate(self.ids, np.full(len(ids), hit))
        self._prompt, self.length, self._num_known, self._num_hit = prompt, hit, hit, hit
        self.num_hit_tokens += hit * len(ids)
        return hit

    def record(self, sequences: _Ids) -> None:
        """Tell the tokens that steps did not: row i holds the beginning of sequences[i].

        After a reorder that is not so; then only what is known already stays a prefix hit.
        """
        unknown = self.length - self._num_known
        if self._num_known < 0 or not unknown or self._reordered:
            return
        if len(sequences) != len(self.ids) or sequences.shape[1] < self.length:
            raise InvalidSpec(
                f"sequences must be what generate() returned, [{len(self.ids)}, {self.length} or "
                f"more], got {list(sequences.shape)}"
            )
        tokens = np.ascontiguousarray(sequences[:, self._num_known : self.length])
        self.kv.record(self.ids, tokens.reshape(-1), counts=np.full(len(self.ids), unknown))
        self._num_known = self.length

    def stats(self) -> CacheStats:
        manager = self.kv.manager
        rows = [] if self.parked else self.ids.tolist()  # parked ones hold nothing here
        tables = [manager.block_table(row) for row in rows]
        _, counts = np.unique(np.concatenate([*tables, np.empty(0, np.int32)]), return_counts=True)
        stats = manager.stats()
        block_bytes = self.kv.spec.block_bytes
        return CacheStats(
            num_rows=len(self.ids),
            length=self.length,
            num_blocks=len(counts),
            num_shared_blocks=int((counts > 1).sum()),
            num_copies=stats.num_copies,
            num_hit_tokens=self.num_hit_tokens,
            kv_bytes=len(counts) * block_bytes,
            peak_bytes=stats.num_peak_blocks * block_bytes,
            dense_peak_bytes=self.dense_peak_bytes,
        )
