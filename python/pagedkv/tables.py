"""Checks of arrays that a caller hands over, before addresses are all that is left of them."""

from __future__ import annotations

from typing import NoReturn

import torch

from pagedkv.errors import InvalidSpec
from pagedkv.writes import address

__all__ = ["check_tables", "refuse"]


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
    for name, tensor in ((lens_name, lens), ("block_tables", block_tables)):
        if tensor.device != device:
            raise InvalidSpec(f"{name} is on {tensor.device}, expected {device}")
        address(tensor, name)


def _is_run(tables: torch.Tensor, num_rows: int) -> bool:
    return tables.stride(1) == 1 or tables.shape[1] <= 1 or not num_rows


def refuse(what: str, tensor: torch.Tensor, expected: str) -> NoReturn:
    raise InvalidSpec(
        f"{what} is {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}, "
        f"expected {expected}"
    )
