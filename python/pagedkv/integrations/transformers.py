"""A transformers `Cache` on paged, copy-on-write blocks, for stock `model.generate()`.

    cache = PagedCache.for_model(model, memory="2GiB")
    model.generate(**inputs, num_beams=8, past_key_values=cache)

The rows of a batch are sequences of a KVCache. Beams and parallel samples share every block they
have in common, reorder_cache() moves references and copies no K or V, and a prompt that generate()
repeats for each beam is computed and stored once.

All rows have one length, as in transformers' own caches: padding is stored, and masked.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Cache

from pagedkv.cache import KVCache
from pagedkv.errors import InvalidSpec, InvalidState
from pagedkv.integrations import _attention
from pagedkv.integrations._forward import AttentionSwitch, fold_rows, unfold_rows
from pagedkv.spec import KVSpec
from pagedkv.step import Step

__all__ = ["CacheStats", "PagedCache", "attach"]

_Rows = NDArray[np.int64]
_NO_ROWS: _Rows = np.empty(0, np.int64)


@dataclass(frozen=True)
class CacheStats:
    """What a PagedCache holds now, and has held.

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


@dataclass
class _Forward:
    """A forward between its first update() and its commit.

    `made` are sequences that this forward created or forked, `rows_before` what the cache held:
    a rollback releases the first and returns to the second. `layer` is the next to be updated.
    `unread` is a layer whose keys were marked for the attention function and not yet read.
    """

    step: Step
    rows_before: _Rows
    made: _Rows
    past: int
    count: int
    layer: int = 0
    unread: int | None = None
    groups: list[_attention.Group] | None = None


@dataclass(frozen=True)
class _Attached:
    """What the hooks on a model know of the forward under way."""

    input_ids: torch.Tensor | None
    places: torch.Tensor | None
    paged_attention: bool


class PagedCache(Cache):
    """The rows of one generate() call at a time, in blocks of `kv`.

    Args:
        kv: holds K and V; its spec must describe the model.
        paged_attention: attend straight over shared blocks where the model is attached. False:
            gather each row's K and V, one layer at a time, for the model's own attention function.

    A model must be attached (`attach(model)`; `for_model` does it) for prompts to be computed
    once, for paged attention, and for start() to know every token. All else works without.
    """

    def __init__(self, kv: KVCache, *, paged_attention: bool = True) -> None:
        super().__init__(layers=[])
        self.kv = kv
        self._owns_kv = False
        self._paged_attention = paged_attention
        self._layers = [_Layer(self, i) for i in range(kv.spec.num_layers)]
        self._forward: _Forward | None = None
        self._attached: _Attached | None = None
        self._dense_peak_bytes = 0
        self._num_hit_tokens = 0
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._rows = _NO_ROWS
        self._length = 0
        # Of rows made by start(): the prompt while it is being computed, and how many tokens of
        # each row the manager knows. -1: the rows are anonymous, and never prefix hits.
        self._prompt: _Rows | None = None
        self._num_known = -1
        self._reordered = False

    @classmethod
    def for_model(
        cls,
        model: Any,
        memory: str | int = "2GiB",
        *,
        block_size: int = 16,
        max_batch: int = 256,
        paged_attention: bool | None = None,
    ) -> PagedCache:
        """A cache with its own KVCache for `model`, which is attached.

        Args:
            memory: for K and V, in bytes or like "2GiB". Touched only as far as it is used.
            paged_attention: by default, where the model dispatches its attention function.

        Raises InvalidSpec if the model has layers that a KVCache cannot hold.
        """
        dtype = str(model.dtype).removeprefix("torch.")
        spec = KVSpec.from_config(model.config, dtype=dtype, block_size=block_size)
        # layer_major, so that consecutive blocks of a layer are one tensor, read without a copy.
        kv = KVCache(
            spec,
            device=str(model.device),
            device_memory=memory,
            max_batch=max_batch,
            layout="layer_major",
        )
        if paged_attention is None:
            paged_attention = getattr(model, "_supports_attention_backend", False)
        cache = cls(kv, paged_attention=paged_attention)
        cache._owns_kv = True
        attach(model)
        return cache

    # -- what a model's layers and generate() call ---------------------------------------------

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new K and V [B, H, Q, D]; return all that the layer's queries read.

        Layer 0 opens a step for all layers, the last one commits it: a forward that fails in
        between leaves the cache as it was. A batch of n times the cache's rows forks each row n
        times, in the order of repeat_interleave.

        Raises OutOfBlocks before anything is written.
        """
        if layer_idx == 0:
            self._open(key_states.shape[0], key_states.shape[2])
        forward = self._forward
        if forward is None or forward.layer != layer_idx or forward.unread is not None:
            raise InvalidState(self._explain(layer_idx))
        kv, step = self.kv, forward.step
        kv.write(layer_idx, _by_token(key_states), _by_token(value_states), step)
        forward.layer += 1
        if forward.past and self._attached is not None and self._attached.paged_attention:
            key_states.pagedkv_layer = self._layers[layer_idx]  # type: ignore[attr-defined]
            forward.unread = layer_idx
        elif forward.past:
            key_states, value_states = kv.gather(layer_idx, step)
        if forward.layer == kv.spec.num_layers and self._attached is None:
            self._commit()
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(
        self, query_length: int | torch.Tensor, layer_idx: int = 0
    ) -> tuple[int, int]:
        if isinstance(query_length, torch.Tensor):  # cache_position, up to transformers 5.2
            query_length = query_length.shape[0]
        return self._length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.12

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove tokens; a positive argument is the length to keep."""
        self._rollback()
        keep = tokens_to_remove if tokens_to_remove > 0 else self._length + tokens_to_remove
        if len(self._rows) and keep < self._length:
            self._length = max(keep, 0)
            self.kv.truncate(self._rows, np.full(len(self._rows), self._length))
            self._num_known = min(self._num_known, self._length)

    def reset(self) -> None:
        """Release all rows. What they published by start() and finish() stays as prefix hits."""
        self._rollback()
        if len(self._rows):
            self.kv.release(self._rows)
        self._forget_rows()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(np.arange(len(self._rows)).repeat(repeats))

    def batch_select_indices(self, indices: torch.Tensor | _Rows) -> None:
        """Row i becomes what row indices[i] was; a boolean mask keeps the rows it marks."""
        self._rollback()
        if isinstance(indices, torch.Tensor):
            indices = indices.cpu().numpy()
        if indices.dtype == np.bool_:
            indices = np.flatnonzero(indices)
        self._select(indices.astype(np.int64))

    def _select(self, parents: _Rows) -> None:
        rows = self._rows
        if not len(rows) or np.array_equal(parents, np.arange(len(rows))):
            return
        if len(parents) == len(rows):
            self.kv.reorder(rows, parents)
            self._reordered = True
            return
        if len(parents) and not 0 <= parents.min() <= parents.max() < len(rows):
            raise InvalidSpec(f"indices must be in [0, {len(rows)}), the rows of the cache")
        selected = np.empty_like(parents)
        counts = np.bincount(parents, minlength=len(rows))
        for parent in np.flatnonzero(counts):
            selected[parents == parent] = self.kv.fork(int(rows[parent]), int(counts[parent]))
        if (counts == 0).any():
            self.kv.release(rows[counts == 0])
        self._rows = selected
        self._reordered |= bool((np.diff(parents) < 0).any())

    @property
    def is_sliding(self) -> list[bool]:
        """All False: windowed layers are stored in full and masked."""
        return [False] * len(self)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def __len__(self) -> int:
        return int(self.kv.spec.num_layers)

    def __repr__(self) -> str:
        return f"PagedCache({len(self._rows)} rows of {self._length} tokens)"

    # -- requests: prefix hits, prefill, copies ------------------------------------------------

    def start(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        salt: bytes | str | None = None,
    ) -> int:
        """Begin a request: take what earlier requests have computed of these prompts.

        Pass the same `input_ids` [B, T] to generate() afterwards. The rows of a batch take the
        shortest of their hits. A batch with padding takes none, and publishes none: its tokens
        stand at other places. Without start() a request neither takes nor leaves prefix hits.

        Returns the number of tokens per row that need no computing, at most T - 1.
        """
        if len(self._rows):
            raise InvalidState("the cache holds a request: call finish() or reset() before start()")
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            return 0
        prompt = np.ascontiguousarray(input_ids.cpu().numpy(), dtype=np.int64)
        if prompt.ndim != 2 or prompt.shape[1] == 0:
            raise InvalidSpec(f"input_ids must be [batch, tokens >= 1], got {prompt.shape}")
        rows = []
        try:
            for tokens in prompt:
                rows.append(self.kv.create(tokens, salt=salt))
        except BaseException:
            self.kv.release(np.array(rows, np.int64))
            raise
        self._rows = np.array(rows, np.int64)
        hit = min(self.kv.num_cached(row) for row in rows)
        self.kv.truncate(self._rows, np.full(len(rows), hit))
        self._prompt, self._length, self._num_known = prompt, hit, hit
        self._num_hit_tokens += hit * len(rows)
        return hit

    def finish(self, sequences: torch.Tensor | None = None) -> None:
        """End a request: release its rows, and leave what start() began as prefix hits.

        `sequences`: what generate() returned. Needed only where the model is not attached, since
        there nothing else tells which tokens were generated; after beam search, whose last beams
        are not what it returns, only the prompt is left as a hit there.
        """
        self._rollback()
        unknown = self._length - self._num_known if self._num_known >= 0 else 0
        if sequences is not None and unknown and not self._reordered:
            tokens = np.ascontiguousarray(sequences.cpu().numpy(), dtype=np.int64)
            if len(tokens) != len(self._rows) or tokens.shape[1] < self._length:
                raise InvalidSpec(
                    f"sequences must be [{len(self._rows)}, at least {self._length}], what "
                    f"generate() returned, got {list(tokens.shape)}"
                )
            tokens = np.ascontiguousarray(tokens[:, self._num_known : self._length])
            counts = np.full(len(self._rows), unknown)
            self.kv.record(self._rows, tokens.reshape(-1), counts=counts)
        self.reset()

    def prefill(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> None:
        """Compute a prompt [B, T] at its own batch, but for its last token.

        generate(input_ids, num_beams=n, past_key_values=cache) then forks each row n times. Use
        it where a prompt is generated from several times: `cache.fork()` keeps this one.
        """
        begin, end = self._length, input_ids.shape[1] - 1
        if begin >= end:
            return
        inputs: dict[str, Any] = {"input_ids": input_ids[:, begin:end], "past_key_values": self}
        parameters = inspect.signature(model.forward).parameters
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask[:, :end]
            if "position_ids" in parameters:
                positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
                inputs["position_ids"] = positions[:, begin:end]
        if "logits_to_keep" in parameters:
            inputs["logits_to_keep"] = 1
        with torch.no_grad():
            model(**inputs, use_cache=True)

    def fork(self) -> PagedCache:
        """A cache that holds the same rows, in the same blocks: both go on from here."""
        self._rollback()
        twin = PagedCache(self.kv, paged_attention=self._paged_attention)
        if len(self._rows):
            twin._rows = np.array([self.kv.fork(int(row), 2)[1] for row in self._rows], np.int64)
        twin._length, twin._prompt = self._length, self._prompt
        twin._num_known, twin._reordered = self._num_known, self._reordered
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        return self.fork()

    def stats(self) -> CacheStats:
        manager = self.kv.manager
        tables = [manager.block_table(int(row)) for row in self._rows]
        _, counts = np.unique(np.concatenate([*tables, np.empty(0, np.int32)]), return_counts=True)
        stats = manager.stats()
        block_bytes = self.kv.spec.block_bytes
        return CacheStats(
            num_rows=len(self._rows),
            length=self._length,
            num_blocks=len(counts),
            num_shared_blocks=int((counts > 1).sum()),
            num_copies=stats.num_copies,
            num_hit_tokens=self._num_hit_tokens,
            kv_bytes=len(counts) * block_bytes,
            peak_bytes=stats.num_peak_blocks * block_bytes,
            dense_peak_bytes=self._dense_peak_bytes,
        )

    def close(self) -> None:
        """Release all rows, and the KVCache if for_model() made it."""
        self.reset()
        if self._owns_kv:
            self.kv.close()

    def __enter__(self) -> PagedCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
