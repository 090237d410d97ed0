"""What a PagedCache changes in one forward pass of a model, and puts back after it.

Equal prompt rows are folded into one, since generate() repeats a prompt for each beam, and the
attention function becomes the one that reads blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any

import torch

from pagedkv.integrations._attention import ATTENTION, attends_paged
from pagedkv.integrations._rows import OpenStep

# The inputs that have one row per sequence. A forward with any other tensor is not folded.
_ROW_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


@dataclass
class Forward:
    """One forward: how far its layers have come, and what the hooks on the model know of it.

    `batch` is that of the caller, `places` the row of each of its rows after folding. `next_layer`
    is the one to be updated; `unread` one whose keys, and `values`, were left to the attention
    function.
    """

    attached: bool = False
    paged_attention: bool = False
    input_ids: torch.Tensor | None = None
    batch: int | None = None
    places: torch.Tensor | None = None
    open_step: OpenStep | None = None
    next_layer: int = 0
    unread: int | None = None
    values: torch.Tensor | None = None


def fold_rows(
    inputs: Mapping[str, Any], num_rows: int
) -> tuple[dict[str, Any], torch.Tensor] | None:
    """Keep one of each run of equal rows of more than one token.

    Rows are compared by token ids, mask and positions: equal rows have equal K, V and logits.
    `num_rows` is what the cache holds; rows fold only if they continue the same one. Returns the
    folded inputs and the place of each old row in them, int64 [B]; None if nothing folds.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        return None
    batch = ids.shape[0]
    if batch == 1 or batch == num_rows or (num_rows and batch % num_rows):
        return None
    by_row = {}
    for name, value in inputs.items():
        if isinstance(value, (list, tuple, dict)):
            return None
        if not isinstance(value, torch.Tensor) or name == "cache_position":
            continue
        if name not in _ROW_INPUTS:
            return None
        if value.shape[0] == batch:
            by_row[name] = value
    repeats = torch.ones(batch - 1, dtype=torch.bool, device=ids.device)
    for value in by_row.values():
        repeats &= (value[1:] == value[:-1]).flatten(1).all(dim=1)
    if num_rows:
        fan_out = batch // num_rows
        repeats[fan_out - 1 :: fan_out] = False
    is_first = torch.cat([torch.ones_like(repeats[:1]), ~repeats])
    keep = is_first.nonzero().flatten()
    if len(keep) == batch:
        return None
    folded = {name: value[keep] for name, value in by_row.items()}
    return {**inputs, **folded}, is_first.cumsum(0) - 1


def unfold_rows(output: Any, num_rows: int, places: torch.Tensor) -> Any:
    """A model output of `num_rows` rows with its old rows back: row i is the one at `places[i]`."""
    if isinstance(output, torch.Tensor):
        has_rows = output.ndim > 0 and output.shape[0] == num_rows
        return output.index_select(0, places.to(output.device)) if has_rows else output
    if isinstance(output, Mapping):  # a ModelOutput is one
        return type(output)(**{k: unfold_rows(v, num_rows, places) for k, v in output.items()})
    if isinstance(output, (list, tuple)):
        return type(output)(unfold_rows(v, num_rows, places) for v in output)
    return output


def by_token(states: torch.Tensor) -> torch.Tensor:
    """[B, H, Q, D] as [B * Q, H, D]: the rows' tokens one after the other."""
    one = states.shape[2] == 1
    return states.squeeze(2) if one else states.transpose(1, 2).flatten(0, 1)


def by_name(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a module's forward, all that can be as keywords: (args, kwargs)."""
    if not args:
        return args, kwargs
    named = {}
    for value, parameter in zip(
        args, inspect.signature(module.forward).parameters.values(), strict=False
    ):
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            break
        named[parameter.name] = value
    if named.keys() & kwargs.keys():
        return args, kwargs  # which the model will refuse
    return args[len(named) :], {**named, **kwargs}


def wants_more(module: torch.nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a forward wants more than paged attention has: gradients, or its weights."""
    weights = inputs.get("output_attentions")
    if weights is None:
        weights = getattr(module.config, "output_attentions", False)
    return bool(weights) or torch.is_grad_enabled()


class AttentionSwitch:
    """Sets the attention function of a model's layers, for the length of forwards.

    Several threads may be in a forward of the model: it is put back when none is any more. One that
    was interrupted, so that nobody heard of its end, ends with the next one of its thread. Forwards
    of other caches in other threads see it meanwhile: so the model has to be one of "sdpa", whose
    masks are the same.

    `attends_paged`: whether the layers would ask the one that it sets.
    """

    def __init__(self, model: Any) -> None:
        self.attends_paged = attends_paged(model)
        found = {id(model.config): model.config}
        for module in model.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "config"):
                found[id(module.config)] = module.config
        self._configs = list(found.values())
        self._before: list[str | None] = []
        self._threads: set[int] = set()  # that are in a forward
        self._lock = Lock()

    def on(self) -> None:
        with self._lock:
            if not self._threads:
                self._before = [config._attn_implementation_internal for config in self._configs]
            self._threads.add(get_ident())
            for config in self._configs:
                config._attn_implementation_internal = ATTENTION

    def off(self) -> None:
        if get_ident() not in self._threads:
            return
        with self._lock:
            self._threads.discard(get_ident())
            if self._threads:
                return
            for config, before in zip(self._configs, self._before, strict=True):
                config._attn_implementation_internal = before
