"""New keys and values on their way into the pool: checked, of its type, and as rows of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.errors import InvalidSpec
from pagedkv.fp8 import is_fp8, to_fp8

__all__ = ["Stored", "as_stored", "check_source", "rows"]


class Stored:
    """What a layer's keys and values have to be so that they can be copied as they are.

    Asked for each layer of each step, so it asks for as little as decides.

    Attributes:
        k_bytes, v_bytes: of one token.
    """

    def __init__(self, k_pool: torch.Tensor, v_pool: torch.Tensor) -> None:
        self.k_bytes, self.v_bytes = (p[0, 0].numel() * p.element_size() for p in (k_pool, v_pool))
        self._dtype, self._device, self._on_cpu = k_pool.dtype, k_pool.device, k_pool.is_cpu
        self._tokens = k_pool.shape[2:], v_pool.shape[2:]
        self._num_tokens = -1

    def matches(self, k: torch.Tensor, v: torch.Tensor, num_tokens: int) -> bool:
        """Whether `num_tokens` tokens, dense, of the pool's type, are where the pool is."""
        if num_tokens != self._num_tokens:
            self._num_tokens = num_tokens
            self._k_shape, self._v_shape = (
                torch.Size((num_tokens, *token)) for token in self._tokens
            )
        return (
            k.__class__ is v.__class__ is Tensor
            and k.shape == self._k_shape
            and v.shape == self._v_shape
            and k.dtype is v.dtype is self._dtype
            and k.is_contiguous()
            and v.is_contiguous()
            and ((k.is_cpu and v.is_cpu) if self._on_cpu else k.device == v.device == self._device)
        )


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
