"""Checks of tensors that a caller hands over, before addresses are all that is left of them."""

from __future__ import annotations

from typing import NoReturn

import torch

from pagedkv.errors import InvalidSpec

__all__ = ["address", "check_source", "check_tables", "refuse", "require_on"]


def address(tensor: torch.Tensor, name: str) -> int:
    """Where its elements are. InvalidSpec if it has no memory of its own, as fake ones do."""
    found = tensor.data_ptr()
    if not found and tensor.numel():
        raise InvalidSpec(
            f"{name} is a {type(tensor).__name__} without memory of its own: expected a plain "
            "tensor, as of DTensor.to_local()"
        )
    return found


def check_source(source: torch.Tensor, name: str, pool: torch.Tensor, num_tokens: int) -> None:
    """Raises InvalidSpec if `source` is not `num_tokens` tokens for `pool` [N, P, H, D]."""
    if not isinstance(source, torch.Tensor) or not source.is_floating_point():
        kind = getattr(source, "dtype", type(source).__name__)
        raise InvalidSpec(f"{name} is {kind}, expected a tensor of floats")
    shape = (num_tokens, *pool.shape[2:])
    if source.shape != shape:
        refuse(name, source, str(list(shape)))
    require_on(name, source, pool.device)


def check_tables(
    block_tables: torch.Tensor, lens: torch.Tensor, lens_name: str, device: torch.device
) -> None:
    """Raises InvalidSpec unless they are int32 [B, W] of contiguous rows, and [B], on `device`."""
    if lens.dtype != torch.int32 or lens.dim() != 1 or not lens.is_contiguous():
        refuse(lens_name, lens, "contiguous int32 [B]")
    num_rows = len(lens)
    rows = block_tables.dim() == 2 and len(block_tables) == num_rows
    if not rows or block_tables.dtype != torch.int32 or not _is_run(block_tables, num_rows):
        refuse("block_tables", block_tables, f"int32 [{num_rows}, W] of contiguous rows")
    require_on(lens_name, lens, device)
    require_on("block_tables", block_tables, device)


def _is_run(tables: torch.Tensor, num_rows: int) -> bool:
    return tables.stride(1) == 1 or tables.shape[1] <= 1 or not num_rows


def require_on(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raises InvalidSpec unless `tensor` is in the memory of `device`."""
    if tensor.device != device:
        raise InvalidSpec(f"{name} is on {tensor.device}, expected {device}")
    address(tensor, name)


def refuse(what: str, tensor: torch.Tensor, expected: str) -> NoReturn:
    raise InvalidSpec(
        f"{what} is {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}, "
        f"expected {expected}"
    )
