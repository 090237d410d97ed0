"""New keys and values on their way into the pool: checked, of its type, and as rows of tokens."""

from __future__ import annotations

import torch

from pagedkv.errors import InvalidSpec
from pagedkv.fp8 import is_fp8, to_fp8
from pagedkv.tables import address

__all__ = ["as_stored", "check_source", "rows"]


def check_source(source: torch.Tensor, name: str, pool: torch.Tensor, num_tokens: int) -> None:
    """Raises InvalidSpec if `source` is not `num_tokens` tokens for `pool` [N, P, H, D]."""
    if not isinstance(source, torch.Tensor) or not source.is_floating_point():
        kind = getattr(source, "dtype", type(source).__name__)
        raise InvalidSpec(f"{name} is {kind}, expected a tensor of floats")
    shape = (num_tokens, *pool.shape[2:])
    if source.shape != shape or source.device != pool.device:
        raise InvalidSpec(
            f"{name} is {list(source.shape)} on {source.device}, expected {list(shape)} on "
            f"{pool.device}"
        )
    address(source, name)


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
