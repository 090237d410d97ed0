"""Attention of a batch over blocks that its rows share.

In beam search and parallel sampling the rows of a batch are paths in one tree, and most of what
they read is common to them. The batch is therefore cut into *groups* of adjacent rows with a
common beginning. What a group shares is read once and multiplied with the queries of all its rows;
what a row holds alone is read per row; one softmax runs over both.

Shapes below: n rows of a group, H key/value heads, G query heads per key/value head, Q new tokens
per row, S tokens of a part, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "pagedkv"  # the name under which transformers finds paged_attention_forward
# More new tokens than this per row: one fused kernel over gathered rows beats explicit scores.
MAX_SHARED_QUERIES = 16
# A run of consecutive blocks is read in place from this length on; below, copying is cheaper than
# another pair of matrix products.
MIN_RUN = 4


@dataclass(frozen=True)
class Group:
    """Adjacent rows with a common beginning: `run` blocks from `first` on, `rest`, own `tails`.

    `run` blocks lie one after the other in the pool and are read in place; `rest` int64 [r] is the
    remainder of the shared part; `tails` int64 [n, t] are the blocks after it, row by row.
    """

    begin: int
    end: int
    first: int
    run: int
    rest: torch.Tensor
    tails: torch.Tensor


def group_rows(tables: NDArray[np.int32], kv: Any) -> list[Group]:
    """Cut the rows of `tables` [B, W] into groups; all rows are of one length."""
    in_place = kv.layout == "layer_major"
    device = torch.device("cpu")
    starts = [0, *(np.flatnonzero(np.diff(tables[:, 0])) + 1).tolist(), len(tables)]
    groups = []
    for begin, end in zip(starts, starts[1:], strict=False):
        rows = tables[begin:end]
        common = (rows == rows[0]).all(axis=0)
        num_shared = len(common) if common.all() else int(common.argmin())
        head = rows[0, :num_shared]
        breaks = np.flatnonzero(np.diff(head) != 1)
        run = int(breaks[0]) + 1 if len(breaks) else num_shared
        if run < MIN_RUN or not in_place:
            run = 0
        rest = torch.from_numpy(head[run:].astype(np.int64)).to(device)
        tails = torch.from_numpy(rows[:, num_shared:].astype(np.int64)).to(device)
        groups.append(Group(begin, end, int(head[0]) if run else 0, run, rest, tails))
    return groups


def shared_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    groups: list[Group],
    length: int,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention of `query` [B, H*G, Q, D] over a layer's pool `keys`, `values` [N, P, H, D].

    Every row reads `length` tokens. `mask` broadcasts to [B, H*G, Q, length]: boolean (True is
    read) or added to the scores; it must hold the causal order when Q > 1. Returns [B, Q, H*G, D].
    """
    outputs = []
    for group in groups:
        rows = slice(group.begin, group.end)
        mask_rows = None if mask is None else mask[rows] if mask.shape[0] > 1 else mask
        shared = _shared_parts(group, keys, values, length)
        own = _own_part(group, keys, values, length)
        outputs.append(_attend(query[rows], shared, own, mask_rows, **options))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


_Part = tuple[torch.Tensor, torch.Tensor]


def _shared_parts(
    group: Group, keys: torch.Tensor, values: torch.Tensor, length: int
) -> list[_Part]:
    """K and V [H, S, D] that all rows of the group read: the run in place, the rest copied."""
    block_size = keys.shape[1]
    parts = []
    num_tokens = min(group.run * block_size, length)
    if num_tokens:
        run = slice(group.first, group.first + group.run)
        parts.append((_flat(keys[run], num_tokens), _flat(values[run], num_tokens)))
    num_tokens = min(length - num_tokens, len(group.rest) * block_size)
    if num_tokens:
        parts.append(
            (
                _flat(keys.index_select(0, group.rest), num_tokens),
                _flat(values.index_select(0, group.rest), num_tokens),
            )
        )
    return parts


def _flat(blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return blocks.view(-1, *blocks.shape[2:])[:num_tokens].transpose(0, 1)


def _own_part(group: Group, keys: torch.Tensor, values: torch.Tensor, length: int) -> _Part | None:
    """K and V [n, H, S, D] that each row of the group reads alone."""
    num_rows, num_blocks = group.tails.shape
    if not num_blocks:
        return None
    _, block_size, heads, dim = keys.shape
    num_tokens = length - (group.run + len(group.rest)) * block_size
    index = group.tails.flatten()
    shape = (num_rows, num_blocks * block_size, heads, dim)
    own_keys = keys.index_select(0, index).view(shape)[:, :num_tokens]
    own_values = values.index_select(0, index).view(shape)[:, :num_tokens]
    return own_keys.transpose(1, 2), own_values.transpose(1, 2)


def _attend(
    query: torch.Tensor,
    shared: list[_Part],
    own: _Part | None,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    num_rows, query_heads, num_queries, dim = query.shape
    heads = (shared[0][0] if shared else own[0][0]).shape[0]  # type: ignore[index]
    groups = query_heads // heads
    # Head-major, so that the queries of all rows against a shared part are one product per head.
    by_head = query.reshape(num_rows, heads, -1, dim).transpose(0, 1) * scale
    flat = by_head.reshape(heads, -1, dim)
    scores = [torch.bmm(flat, k.transpose(1, 2)).unflatten(1, (num_rows, -1)) for k, _ in shared]
    if own is not None:
        scores.append(torch.matmul(by_head, own[0].permute(1, 0, 3, 2)))
    weights = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    weights = _softmax(weights, mask, num_queries, softcap, sinks)
    output = None
    begin = 0
    for _, v in shared:
        part = weights[..., begin : begin + v.shape[1]].flatten(1, 2)
        begin += v.shape[1]
        product = torch.bmm(part, v)
        output = product if output is None else output.add_(product)
    if own is not None:
        product = torch.matmul(weights[..., begin:], own[1].transpose(0, 1)).flatten(1, 2)
        output = product if output is None else output.add_(product)
    assert output is not None
    output = output.view(heads, num_rows, groups, num_queries, dim)
    return output.permute(1, 3, 0, 2, 4).reshape(num_rows, num_queries, query_heads, dim)


def _softmax(
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    num_queries: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Weights of scores [H, n, G*Q, S]; `sinks` [H*G] are one more score per head, then dropped."""
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    if mask is not None:
        heads = scores.shape[0]
        split = scores.unflatten(2, (-1, num_queries))  # [H, n, G, Q, S]
        mask = mask.unflatten(1, (-1, 1) if mask.shape[1] == 1 else (heads, -1)).transpose(0, 1)
        if mask.dtype == torch.bool:
            # The least finite value: a row that may read nothing averages instead of giving NaN.
            split.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        else:
            split.add_(mask)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(scores.shape[0], 1, -1, 1)
        column = column.repeat_interleave(num_queries, dim=2).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    return weights if sinks is None else weights[..., :-1]


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention over keys and values [B, H, S, D] at hand. Without a mask, causal."""
    if options["softcap"] is None and options["sinks"] is None:
        scale = options["scale"]
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scale)[0]
    if mask is None and query.shape[2] > 1:
        mask = causal_mask(query.shape[2], keys.shape[2], query.device)
    return _attend(query, [], (keys, values), mask, **options)


def causal_mask(num_queries: int, length: int, device: torch.device) -> torch.Tensor:
    """[1, 1, num_queries, length], True where the last `num_queries` tokens read."""
    full = torch.ones(num_queries, length, dtype=torch.bool, device=device)
    return full.tril(length - num_queries)[None, None]


class LayerRead(Protocol):
    """A layer of a cache, left on the keys that its update() returned: how to attend over it."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor: ...


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls as attention "pagedkv". Returns [B, Q, H*G, D].

    Keys that no cache has marked are all there is to read, as in the first forward of a prompt.
    """
    if dropout:
        raise ValueError('attention="paged" has no dropout: call model.eval() first')
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {"scale": scale, "softcap": softcap, "sinks": s_aux}
    layer: LayerRead | None = getattr(key, "pagedkv_layer", None)
    if layer is not None:
        output = layer.attend(module, query, attention_mask, options)
    else:
        output = dense_attention(module, query, key, value, attention_mask, options)
    return output.contiguous(), None


AttentionInterface.register(ATTENTION, paged_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
