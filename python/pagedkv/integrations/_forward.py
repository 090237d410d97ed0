"""One forward of a model on a PagedCache: how far it is, and the shapes of what goes through it.

Equal prompt rows are folded into one, since generate() repeats a prompt for each beam.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pagedkv.errors import InvalidState
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


class Held(torch.autograd.Function):
    """All K and V of rows, for the new ones, whose gradients end here."""

    @staticmethod
    def forward(
        ctx: Any, new_k: torch.Tensor, new_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return k.clone(), v.clone()  # what is kept for backward() must not be overwritten

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise InvalidState(
            "a PagedCache keeps K and V without gradients: compute the whole sequence without it, "
            "or freeze what K and V are made by"
        )


def prompt_inputs(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, begin: int, end: int
) -> dict[str, Any]:
    """What `model` takes to compute tokens [begin, end) of prompts [B, T], without more logits."""
    inputs: dict[str, Any] = {"input_ids": ids[:, begin:end]}
    parameters = inspect.signature(model.forward).parameters
    if mask is not None:
        inputs["attention_mask"] = mask[:, :end]
        if "position_ids" in parameters:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, begin:end]
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = 1
    return inputs


def skip_held(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """Inputs that begin at position 0, without the `length` tokens that the cache holds of them.

    transformers' assisted decoding computes a prompt whole, whatever its cache holds: its positions
    and its mask say so.
    """
    ids, positions, mask = (
        inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask")
    )
    if not isinstance(ids, torch.Tensor) or not isinstance(positions, torch.Tensor):
        return inputs
    is_whole = mask is None or getattr(mask, "shape", None) == ids.shape
    if positions.ndim != 2 or not is_whole or not 0 < length < ids.shape[1]:
        return inputs
    if bool(positions[:, 0].any()):
        return inputs
    names = ("input_ids", "position_ids", "token_type_ids", "cache_position")
    found = {n: inputs[n] for n in names if isinstance(inputs.get(n), torch.Tensor)}
    return {**inputs, **{n: tensor[..., length:] for n, tensor in found.items()}}


def untold(inputs: Mapping[str, Any], length: int, is_prompt: bool) -> str | None:
    """Why the token ids of a forward, behind `length` others, do not tell what it computes.

    None if they do. One new token behind the prompt is not looked at: on a GPU the host would wait.
    """
    ids, mask, positions = (
        inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")
    )
    if ids is None:
        return "the model is given inputs_embeds"
    if ids.shape[-1] == 1 and not is_prompt:
        return None
    if mask is not None and not (getattr(mask, "ndim", 0) == 2 and bool(mask.all())):
        return "its mask (without one generate() makes it by pad_token_id) hides some of them"
    if isinstance(positions, torch.Tensor):
        usual = torch.arange(length, length + ids.shape[-1], device=positions.device)
        if positions.shape[-1] != len(usual) or bool((positions != usual).any()):
            return "its position_ids are others"
    return None


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
