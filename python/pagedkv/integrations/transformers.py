"""A transformers `Cache` on paged, copy-on-write blocks, for stock `model.generate()`.

    cache = PagedCache.for_model(model, memory="2GiB")
    model.generate(**inputs, num_beams=8, past_key_values=cache)

The rows of a batch are sequences of a KVCache. Beams and parallel samples share every block they
have in common, reorder_cache() moves references and copies no K or V, and a prompt that generate()
repeats for each beam is computed and stored once.

All rows have one length, as in transformers' own caches: padding is stored, and masked.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import Cache

from pagedkv.cache import KVCache
from pagedkv.errors import InvalidSpec, InvalidState
from pagedkv.integrations._attach import Attached, attach
from pagedkv.integrations._forward import (
    Forward,
    Held,
    by_token,
    fold_rows,
    prompt_inputs,
    skip_held,
    unfold_rows,
    untold,
)
from pagedkv.integrations._rows import CacheStats, Rows
from pagedkv.integrations._stored import spec_of
from pagedkv.transfers import Transfer
from pagedkv.units import parse_bytes

__all__ = ["CacheStats", "PagedCache", "attach"]

# A forward with more new tokens per row than this has work enough for the model's own attention
# function over gathered rows to be the faster way.
_MAX_PAGED_QUERIES = 16


class PagedCache(Cache, Attached):
    """The rows of one generate() call at a time, in blocks of `kv`.

    Args:
        kv: holds K and V; its spec must describe the model.
        paged_attention: attend straight over shared blocks where the model is attached. False:
            gather each row's K and V, one layer at a time, for the model's own attention function,
            as layers with latents need it anyway.

    A model that is attached (`attach(model)`; for_model() does it) computes equal prompts once,
    uses paged attention, and tells start() each token. All else works without.

    K and V are kept without gradients: use no_grad(), since with them enabled they are gathered,
    and backward() raises InvalidState where it needs theirs. A cache that is dropped gives its rows
    back.
    """

    def __init__(self, kv: KVCache, *, paged_attention: bool = True) -> None:
        super().__init__(layers=[])
        if not isinstance(kv, KVCache):
            raise InvalidSpec(f"kv is {kv!r:.80}, expected a KVCache: for_model() makes one")
        self.kv = kv
        self._rows = Rows(kv)
        self._forward = Forward()
        has_latents = any(layer.kind == "latent" for layer in kv.spec.layers)
        self._owns_kv, self._paged_attention = False, paged_attention and not has_latents

    @classmethod
    def for_model(
        cls,
        model: Any,
        memory: str | int = "2GiB",
        *,
        host_memory: str | int | None = None,
        block_size: int = 16,
        max_batch: int = 256,
        paged_attention: bool | None = None,
    ) -> PagedCache:
        """A cache with its own KVCache for `model`, which is attached.

        Args:
            memory: for K and V, in bytes or like "2GiB". Touched only as far as it is used.
            host_memory: likewise, for rows that are parked; by default there is none.
            paged_attention: by default, where the model dispatches its attention function.

        Raises InvalidSpec if it is none, or has layers that a KVCache cannot hold.
        """
        if not isinstance(model, torch.nn.Module):
            raise InvalidSpec(f"model is {model!r:.80}, expected a model of transformers")
        spec = spec_of(model, block_size)
        num_tokens = spec.num_blocks(parse_bytes(memory, "memory")) * block_size
        kv = KVCache(
            spec,
            device=str(model.device),
            device_memory=memory,
            host_memory=host_memory,
            max_batch=max_batch,
            max_model_len=2 * max(num_tokens, 1),  # so that blocks run out, not lengths
            layout="layer_major",  # neighbouring blocks of a layer are one run of memory
        )
        can_attend = attach(model)
        cache = cls(kv, paged_attention=can_attend if paged_attention is None else paged_attention)
        cache._owns_kv = True
        return cache

    # -- what a model's layers and generate() call -----------------------------------------------

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new K and V [B, H, Q, D]; return what the layer's queries read.

        Layer 0 opens a step for all layers and the last one commits it: a forward that fails in
        between leaves the cache as it was. A batch of n times the cache's rows forks each row n
        times, in the order of repeat_interleave.

        Raises OutOfBlocks before anything is written.
        """
        forward = self._forward
        if layer_idx == 0:
            forward = self._open(key_states)
        if forward.open_step is None or forward.next_layer != layer_idx:
            raise InvalidState(f"layer {layer_idx} came out of order: is the spec this model's?")
        self._check_read(forward)
        kv, step = self.kv, forward.open_step.step
        kv.write(layer_idx, by_token(key_states), by_token(value_states), step)
        forward.next_layer += 1
        if forward.open_step.past:
            if forward.paged_attention:
                attend = partial(self._attend, layer_idx)  # kept, it would keep this cache
                key_states.pagedkv_attend = attend  # type: ignore[attr-defined]
                forward.unread, forward.values = layer_idx, value_states
            else:
                held = kv.gather(layer_idx, step)
                if torch.is_grad_enabled():
                    key_states, value_states = Held.apply(key_states, value_states, *held)  # type: ignore[no-untyped-call]
                else:
                    key_states, value_states = held
        if forward.next_layer == len(self) and not forward.attached:
            self._rows.commit()
        return key_states, value_states

    def _open(self, keys: torch.Tensor) -> Forward:
        forward = self._forward
        if not forward.attached or forward.next_layer:  # no hook has made a new one
            forward = self._forward = Forward()
        known = forward.input_ids if self._rows.wants_tokens else None
        ids = None if known is None else known.cpu().numpy()
        forward.open_step = self._rows.open(
            keys.shape[0], keys.shape[2], ids, knows_prompt=not forward.attached
        )
        return forward

    @staticmethod
    def _check_read(forward: Forward) -> None:
        if forward.unread is not None:
            raise InvalidState(
                f"layer {forward.unread} did not pass its keys on to its attention function: make "
                "the cache with paged_attention=False for this model"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens per row, without those of a forward under way."""
        return self._rows.length

    def get_mask_sizes(
        self, query_length: int | torch.Tensor, layer_idx: int = 0
    ) -> tuple[int, int]:
        if isinstance(query_length, torch.Tensor):  # cache_position, up to transformers 5.2
            query_length = query_length.shape[0]
        return self._rows.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.12

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove tokens; a positive argument is the length to keep."""
        length = self._rows.length if tokens_to_remove <= 0 else 0
        self._rows.truncate(max(length + tokens_to_remove, 0))

    def reset(self) -> None:
        """Release all rows. What start() began and finish() ended stays as prefix hits."""
        self._rows.release()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows.select(np.arange(len(self._rows)).repeat(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row indices[i] was; a boolean mask keeps the rows that it marks."""
        parents = indices.cpu().numpy()
        if parents.dtype == np.bool_:
            parents = np.flatnonzero(parents)
        self._rows.select(parents.astype(np.int64))

    @property
    def is_sliding(self) -> list[bool]:
        """All False: windowed layers are stored in full, and masked."""
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
        return f"PagedCache({len(self._rows)} rows of {self._rows.length} tokens)"

    # -- requests: prefix hits, prefill, copies --------------------------------------------------

    def start(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        salt: bytes | str | None = None,
    ) -> int:
        """Begin a request: take what earlier requests have computed of these prompts.

        Pass the same `input_ids` [B, T] to generate() afterwards. The rows of a batch take the
        shortest of their hits. A batch with padding takes none and leaves none: its tokens stand
        at other places. Without start() a request neither takes nor leaves prefix hits.

        Token ids and `salt` are all that tells prompts apart: give a salt of its own to each
        adapter, to each model that shares `kv`, and to the images of a prompt; after an update of
        the model's weights call clear(). A model that is not attached cannot tell inputs_embeds.

        Returns the number of tokens per row that need no computing, at most T - 1.
        """
        if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point():
            kind = getattr(input_ids, "dtype", type(input_ids).__name__)
            raise InvalidSpec(f"input_ids is {kind}, expected a tensor of token ids")
        if attention_mask is not None:
            shape = getattr(attention_mask, "shape", None)
            if shape != input_ids.shape:
                raise InvalidSpec(f"attention_mask is {shape}, expected {input_ids.shape}")
            if not bool((attention_mask == 1).all()):
                return 0
        return self._rows.start(np.ascontiguousarray(input_ids.cpu().numpy(), np.int64), salt)

    def finish(self, sequences: Any = None) -> None:
        """End a request: release its rows and leave what start() began as prefix hits.

        `sequences`: what generate() returned, a tensor or what has it as `sequences`. Needed only
        where the model is not attached, since there nothing else tells which tokens were generated.
        After beam search, whose last beams are not what it returns, only the prompt is left as a
        hit there.
        """
        sequences = getattr(sequences, "sequences", sequences)
        if sequences is not None:
            self._rows.record(sequences.cpu().numpy())
        self._rows.release()

    def clear(self, salt: bytes | str | None = None) -> None:
        """No prompt is a hit any more (of `salt`; default: of any): the model's weights changed."""
        self.kv.clear(salt)

    def prefill(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> None:
        """Compute a prompt [B, T] at its own batch, but for its last token.

        generate(input_ids, num_beams=n, past_key_values=cache) then forks each row n times. To
        generate from one prompt several times, pass `cache.fork()` and keep this cache.
        """
        begin, end = self._rows.length, input_ids.shape[1] - 1
        if begin >= end:
            return
        inputs = prompt_inputs(model, input_ids, attention_mask, begin, end)
        with torch.no_grad():
            model(**inputs, past_key_values=self, use_cache=True)

    def park(self) -> Transfer:
        """Move all rows to host memory until resume(); their blocks are free at once.

        Raises InvalidState without host_memory (see for_model()), OutOfBlocks if it is full.
        """
        return self._rows.park()

    def resume(self) -> int:
        """Bring parked rows back, and wait until they are there; generate() then goes on.

        Returns the tokens per row: fewer than before if a copy failed. Raises OutOfBlocks.
        """
        return self._rows.resume()

    def fork(self) -> PagedCache:
        """A cache with the same rows, in the same blocks: both go on from here."""
        twin = PagedCache(self.kv, paged_attention=self._paged_attention)
        twin._rows = self._rows.fork()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        return self.fork()

    def stats(self) -> CacheStats:
        return self._rows.stats()

    def close(self) -> None:
        """Release all rows, and the KVCache if for_model() made it."""
        self._rows.release()
        if self._owns_kv:
            self.kv.close()

    def __enter__(self) -> PagedCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- what the hooks on an attached model call ------------------------------------------------

    def _begin_forward(
        self, inputs: dict[str, Any], wants_more: bool
    ) -> tuple[dict[str, Any], bool]:
        """Fold the rows of a forward, and choose how it attends."""
        self._rows.rollback()
        forward = self._forward = Forward(attached=True)
        whole, inputs = inputs, skip_held(inputs, self._rows.length)
        if inputs is not whole:
            self._rows.check_prompt(whole["input_ids"].cpu().numpy())
        rows = self._rows
        if rows.wants_tokens and (why := untold(inputs, rows.length, rows.awaits_prompt)):
            rows.expect_untold(why)
        folded = fold_rows(inputs, len(self._rows))
        if folded is not None:
            forward.batch = inputs["input_ids"].shape[0]
            inputs, forward.places = folded
        forward.input_ids = inputs.get("input_ids")
        new = inputs.get("inputs_embeds") if forward.input_ids is None else forward.input_ids
        # A first forward has no past to read, and is the model's own altogether.
        has_past = self._paged_attention and self._rows.length > 0
        few = new is not None and new.shape[1] <= _MAX_PAGED_QUERIES
        forward.paged_attention = has_past and few and not wants_more
        return inputs, forward.paged_attention

    def _end_forward(self, output: Any) -> Any:
        """Commit and unfold. `output` is None if the forward raised; then nothing has happened."""
        forward, self._forward = self._forward, Forward()
        if output is None or forward.open_step is None:
            self._rows.rollback()
            return output
        if forward.next_layer < len(self):
            self._rows.rollback()
            raise InvalidState(
                f"the model stored {forward.next_layer} layers and the spec has {len(self)}"
            )
        self._check_read(forward)
        self._rows.commit(dense_batch=forward.batch)
        if forward.places is None:
            return output
        num_rows = len(self._rows)
        self._rows.select(forward.places.cpu().numpy())
        return unfold_rows(output, num_rows, forward.places)

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of query [B, Hq, Q, D] over what the rows hold of a layer: [B, Q, Hq, D]."""
        forward = self._forward
        if forward.open_step is None or value is not forward.values:
            raise InvalidState(
                f"layer {layer} changes its values after the cache's update(), or attends twice: "
                "make the cache with paged_attention=False for this model"
            )
        forward.unread = forward.values = None
        step = forward.open_step.step
        batch, num_new = query.shape[0], query.shape[2]
        output = self.kv.attention(
            layer, by_token(query), step, scale=scale, softcap=softcap, attn_mask=mask
        )
        return output.unflatten(0, (batch, num_new)) if num_new > 1 else output.unsqueeze(1)
