"""8-bit floats: K and V stored as value / scale, rounded to nearest even, never infinite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pagedkv.errors import InvalidSpec
from pagedkv.spec import DTYPE_BYTES, KVSpec

__all__ = ["check_scales", "is_fp8", "to_fp8"]


def is_fp8(dtype: torch.dtype) -> bool:
    return dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def to_fp8(values: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """`values` / `scale` in `dtype`; what is too large becomes its largest value, NaN stays NaN.

    On the CPU the bits are those of the CUDA kernel's conversion, but for the sign of NaN.
    """
    largest = torch.finfo(dtype).max
    wide = values.float()
    if scale != 1:  # by a tensor, since torch may multiply by the reciprocal of a number instead
        wide = wide / torch.tensor(scale, dtype=torch.float32, device=wide.device)
    return wide.clamp(-largest, largest).to(dtype)


def check_scales(
    scales: Sequence[tuple[float, float]] | None, spec: KVSpec
) -> tuple[tuple[float, float], ...]:
    """Per layer the scales of keys and of values; 1.0 where none are given.

    As float32 has them, which is what divides. Raises InvalidSpec if there are not as many as
    layers, for a scale that is not a positive finite float32, or one other than 1.0 of a layer that
    is not stored in 8 bits.
    """
    if scales is None:
        return ((1.0, 1.0),) * spec.num_layers
    if len(scales) != spec.num_layers:
        raise InvalidSpec(
            f"scales has {len(scales)} entries, expected {spec.num_layers}, a layer's each"
        )
    found = []
    for i, (pair, layer) in enumerate(zip(scales, spec.layers, strict=True)):
        try:
            k, v = (float(scale) for scale in pair)
        except (TypeError, ValueError) as error:
            raise InvalidSpec(
                f"scales[{i}] is {pair!r}, expected two floats: of K and of V"
            ) from error
        k, v = torch.tensor([k, v], dtype=torch.float32, device="cpu").tolist()
        if not all(torch.finfo(torch.float32).tiny <= scale < math.inf for scale in (k, v)):
            raise InvalidSpec(
                f"scales[{i}] is {pair!r}, expected positive finite numbers of float32"
            )
        if (k, v) != (1.0, 1.0) and DTYPE_BYTES[layer.dtype] != 1:
            raise InvalidSpec(f"scales[{i}] is {pair!r}, but layer {i} is stored as {layer.dtype}")
        found.append((k, v))
    return tuple(found)
