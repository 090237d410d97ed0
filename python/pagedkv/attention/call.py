"""What a backend is, and the call that it answers."""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from numbers import Real
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from pagedkv.errors import InvalidSpec
from pagedkv.fp8 import is_fp8

if TYPE_CHECKING:
    from pagedkv.cache import KVCache
    from pagedkv.spec import LayerSpec
    from pagedkv.step import Step

__all__ = [
    "Backend",
    "Call",
    "check_chunk",
    "installed",
    "kernel_refusal",
    "keys_and_values",
    "scale_of",
    "widened",
    "window_pair",
]


class Call(NamedTuple):
    """One layer's attention of a step, its arguments checked.

    Attributes:
        layer, spec: its number and what it keeps.
        q: queries [T, Hq, query_dim], times the layer's scale of keys: so that products with stored
            keys are those with the real ones. A backend leaves the scale of values to its caller.
        scale, softcap, window, attn_mask: as in `attend`. With a mask there is no window.
        firsts: the first token that each row sees, int32 [B], if that is all that the mask says of
            rows of one new token each, on a CPU; else None.
    """

    kv: KVCache
    step: Step
    layer: int
    spec: LayerSpec
    q: torch.Tensor
    scale: float
    softcap: float | None
    window: int | None
    attn_mask: torch.Tensor | None
    firsts: torch.Tensor | None = None


class Backend(Protocol):
    """A module that attends over blocks in its own way."""

    def refusal(self, call: Call) -> str | None:
        """Why it cannot, to be read behind its name; None if it can."""

    def attend(self, call: Call) -> torch.Tensor:
        """[T, Hq, output_dim] in q's dtype."""


def check_chunk(layer: LayerSpec, longest: int) -> None:
    """Raises InvalidSpec if rows of so many tokens are more than the chunk of a chunked layer.

    No backend hides by itself what was before the last one; within the first, all is causal.
    """
    if layer.window is not None and longest > layer.window:
        raise InvalidSpec(
            f"the layer is chunked, and {longest} tokens are more than a chunk of {layer.window}: "
            "give attn_mask, since no backend hides earlier chunks by itself"
        )


def scale_of(layer: LayerSpec, scale: float | None) -> float:
    """`scale`, or by default k_dim ** -0.5. Raises InvalidSpec where it is no number or unknown."""
    if scale is None and layer.kind == "latent":
        raise InvalidSpec(
            "scale is None, and a latent layer does not tell its model's: expected what the model "
            "has, such as self_attn.scaling in transformers. (qk_nope_head_dim + qk_rope_head_dim) "
            "** -0.5 is that of models without a factor for long contexts"
        )
    if scale is None:
        return float(layer.k_dim**-0.5)
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise InvalidSpec(f"scale is {scale!r}, expected a finite number, or None")
    return float(scale)


def keys_and_values(
    layer: LayerSpec, kept: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What queries are multiplied by, and what is summed, of what a layer keeps [..., dim].

    Of a latent layer both are the same, longer than output_dim: the rest of a sum is nobody's. For
    torch's kernels take keys and values of one size, and write out scores for others.
    """
    if layer.kind != "latent":
        return kept
    both = torch.cat(kept, -1)
    return both, both


@cache
def installed(name: str) -> ModuleType | str:
    """A package that nobody has to have; or why it is not there."""
    try:
        return import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        return "is not installed" if missing else f"is installed, but {error}"


def kernel_refusal(call: Call, *, softcap: bool = True, fp8: bool = False) -> str | None:
    """Why a flash kernel over blocks cannot: `softcap` and `fp8` say whether this one has those."""
    kv, layer = call.kv, call.spec
    stored = kv.k(call.layer).dtype
    if kv.device.type != "cuda":
        return f"needs a GPU, and this cache is on {kv.device}"
    if call.attn_mask is not None:
        return "takes no attn_mask"
    if call.softcap is not None and not softcap:
        return "has no softcap"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes queries of float16 and bfloat16, and these are {call.q.dtype}"
    if stored != call.q.dtype and not (fp8 and is_fp8(stored)):
        return f"needs queries and keys of one dtype: {call.q.dtype}, and stored are {stored}"
    if layer.kind == "latent":
        return "does not attend over latents"
    if layer.k_dim != layer.v_dim:
        return f"needs equal k_dim and v_dim, and the layer's are {layer.k_dim} and {layer.v_dim}"
    if any(pool.stride(-1) != 1 for pool in (kv.k(call.layer), kv.v(call.layer))):
        return "needs the elements of a head side by side"
    if layer.k_dim % 8 or layer.k_dim > 256:
        return f"needs a k_dim that is a multiple of 8 up to 256, and the layer's is {layer.k_dim}"
    return None


def window_pair(window: int | None) -> tuple[int, int]:
    """How flash kernels say what a token sees: so many before it, and none behind."""
    return (-1 if window is None else window - 1, 0)


def widened(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """On a CPU in float32, before products are written out.

    torch's products of narrower types take many times as long on processors that have no
    instructions for them.
    """
    return tuple(t.float() if t.device.type == "cpu" and t.itemsize < 4 else t for t in tensors)
