"""Keys and values as rows of tokens, on their way into a pool and out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedkv.fp8 import is_fp8, to_fp8

if TYPE_CHECKING:
    from pagedkv._core import Pool

__all__ = ["as_stored", "gather_into", "rows", "rows_at"]


def as_stored(source: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """`source` in the pool's type; in 8 bits, unless it is that already, as value / scale."""
    if source.dtype == dtype:
        return source
    return to_fp8(source, scale, dtype) if is_fp8(dtype) else source.to(dtype)


def rows(source: torch.Tensor) -> torch.Tensor:
    """`source` [T, H, D] with each token's heads in one contiguous run."""
    source = source.detach()
    dense = source.stride(2) == 1 and source.stride(1) == source.shape[2]
    return source if dense else source.contiguous()


def rows_at(rows: torch.Tensor) -> tuple[int, int]:
    """Where the first token is, and how far each is from the one before, in bytes."""
    return rows.data_ptr(), rows.stride(0) * rows.element_size()


def gather_into(
    out: torch.Tensor,
    pool: Pool,
    region: int,
    block_tables: torch.Tensor,
    num_tokens: torch.Tensor,
    first_block: int = 0,
) -> None:
    """Fill `out` [B, H, width, D]: row b with num_tokens[b] tokens of the pool's `region`.

    They are those from the row's block `first_block` on; what is behind them in `out` is zeros.
    Tables and numbers are as `check_tables` wants them, no number above `width`.
    """
    num_rows, num_heads, width, _ = out.shape
    pool.gather(
        region,
        block_tables.data_ptr(),
        block_tables.stride(0),
        num_rows,
        block_tables.shape[1],
        first_block,
        num_tokens.data_ptr(),
        num_heads,
        width,
        out.data_ptr(),
    )
