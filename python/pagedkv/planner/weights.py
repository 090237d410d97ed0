"""Bytes of a model's weights: of its parameters, or of what quantisation makes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagedkv.config import check_int
from pagedkv.errors import InvalidSpec
from pagedkv.planner.model import Model
from pagedkv.planner.parameters import Tensor, tensors
from pagedkv.spec import DTYPE_BYTES

__all__ = ["QUANTISED", "Weights", "weigh"]

# What --dtype may name beside storage types, in the words of a config's quantization_config.
QUANTISED: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "int8": {"quant_method": "int8"},
    "int4": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "mxfp4": {"quant_method": "mxfp4"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}
DEFAULT_DTYPE = "bfloat16"  # where the config does not say; the plan says so
_EXPERT_MULTIPLE = 256  # MXFP4 kernels pad the experts' width to this

# A config lists modules that stay unquantised by path or regular expression, in one of these.
_LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "llm_int8_skip_modules")
# What is so named, or within what is, is never quantised here, or not counted at all.
_PLAIN = re.compile(
    r".*(norm|embed|wte|wpe|lm_head|router|expert_gate|conv_?1d|bias|eh_proj).*|\*?(gate|head)"
    r"|.*(vision|visual|audio|multi_?modal).*|\*?mtp\*?"
)
# Which parts of a layer a path is of, as _part() names them: the first that matches.
_PARTS: dict[str, frozenset[str]] = {
    r"shared_?expert": frozenset({"shared_expert"}),
    r"expert": frozenset({"expert", "shared_expert"}),
    r"mlp\.\w+_proj": frozenset({"mlp"}),
    r"mlp|feed_forward|ffn|moe": frozenset({"mlp", "expert", "shared_expert"}),
    r"attn|attention|mamba|\b[qkvo]+(_[ab])?_proj": frozenset({"mixer"}),
}
_ALL_PARTS = frozenset({"mixer", "mlp", "expert", "shared_expert"})


@dataclass(frozen=True)
class Weights:
    """Weights on one GPU.

    Attributes:
        num_parameters: of the whole model.
        num_active: those that one token is multiplied with.
        is_mixture: whether there are experts, of which a token meets a few.
        num_bytes: on one GPU, as loaded.
        most_bytes: the same, if all that the config may leave unquantised is so.
        total_bytes: of the whole model, as stored.
        scheme: the storage type, or the kind of quantisation.
        exact: whether num_bytes is known to the byte.
        source: how it was found.
    """

    num_parameters: int
    num_active: int
    is_mixture: bool
    num_bytes: int
    most_bytes: int
    total_bytes: int
    scheme: str
    exact: bool
    source: str

    @property
    def bytes_per_parameter(self) -> float:
        return self.total_bytes / self.num_parameters


def weigh(model: Model, dtype: str, tp: int) -> Weights:
    """The weights with this dtype ("auto": as the config says), divided among `tp` GPUs.

    Raises:
        InvalidSpec: the dtype, or the config's kind of quantisation, is not known.
    """
    config = model.config
    method, own = _method(model, dtype)
    everything = tensors(config)
    total = sum(_tensor_bytes(t, method, own, 1, padded=False) for t in everything)
    loaded = sum(_tensor_bytes(t, method, own, tp, padded=True) for t in everything)
    scheme = own if method is None else _describe(method)
    kept = frozenset() if method is None else _kept(method)
    most = sum(
        _tensor_bytes(t, None if _part(t) in kept else method, own, tp, padded=True)
        for t in everything
    )
    known = most == loaded and not config.towers
    exact = tp == 1 and total == loaded and known and not model.assumptions
    source = "every tensor of the architecture"
    if model.checkpoint is not None and dtype == "auto":
        stored = model.checkpoint.num_bytes
        exact = tp == 1 and total == loaded
        loaded, total, source = loaded * stored // total, stored, "safetensors"
        most = loaded
    return Weights(
        num_parameters=sum(t.num_elements for t in everything),
        num_active=_active(everything),
        is_mixture=any(t.role == "expert" for t in everything),
        num_bytes=loaded,
        most_bytes=most,
        total_bytes=total,
        scheme=scheme,
        exact=exact,
        source=source,
    )


def _active(everything: Sequence[Tensor]) -> int:
    """Parameters that a token is multiplied with: an embedding that is no head is looked up."""
    has_head = any(t.role == "head" for t in everything)
    return sum(t.num_active for t in everything if t.role != "embedding" or not has_head)


def _kept(method: Mapping[str, Any]) -> frozenset[str]:
    """The parts of layers in which the config may leave matrices unquantised."""
    names: list[Any] = []
    for field in _LISTS:
        found = method.get(field)
        names += found if isinstance(found, list) else []
    parts: frozenset[str] = frozenset()
    for name in map(str, names):
        path = _path(name)
        if "|" in path or "(?" in path:  # one thing or another, or all but one
            parts |= _ALL_PARTS
        elif not any(map(_PLAIN.fullmatch, path.split("."))):
            matching = (part for words, part in _PARTS.items() if re.search(words, path))
            parts |= next(matching, _ALL_PARTS)
    return parts


def _path(name: str) -> str:
    """Of a path or an expression for some: names and dots, with "*" for what may be anything."""
    path = name.removeprefix("re:").strip("^$").replace(r"\.", ".")
    path = re.sub(r"\(([\w|]*)\)", lambda m: "x" if "|" in m[1] else m[1], path)
    return re.sub(r"\.[*+]", "*", path)  # "(up|down)_proj" is x_proj: one name or the other


def _part(tensor: Tensor) -> str:
    """The part of a layer that a tensor is in: "mlp" of "mlp.up"; attention has no such name."""
    part, dot, _ = tensor.name.partition(".")
    return part if dot else "mixer"


def weights_dtype(model: Model, dtype: str) -> str:
    """The type of what is not quantised, and of K and V where no other is asked for."""
    return _method(model, dtype)[1]


def _method(model: Model, dtype: str) -> tuple[Mapping[str, Any] | None, str]:
    """(the quantisation_config or None, storage type of the rest)."""
    own = model.config.dtype or DEFAULT_DTYPE
    if dtype == "auto":
        found = model.config.get("quantization_config")
        if own not in DTYPE_BYTES:
            raise InvalidSpec(f"dtype is {own!r} in the config, expected {', '.join(DTYPE_BYTES)}")
        return (found if isinstance(found, Mapping) else None), own
    if dtype in ("float8_e4m3fn", "float8_e5m2"):  # of matrices alone, as any fp8
        dtype = "fp8"
    if dtype in QUANTISED:
        return QUANTISED[dtype], own
    if dtype not in DTYPE_BYTES:
        raise InvalidSpec(
            f"dtype is {dtype!r}, expected auto, {', '.join(DTYPE_BYTES)}, {', '.join(QUANTISED)}"
        )
    return None, dtype


def _describe(method: Mapping[str, Any]) -> str:
    name = str(method.get("quant_method", "quantised"))
    if name in ("awq", "gptq"):
        return f"{name} {method.get('bits', 4)} bit, groups of {method.get('group_size', 128)}"
    if name == "fp8" and isinstance(method.get("weight_block_size"), (list, tuple)):
        return f"fp8, a scale per {'x'.join(map(str, method['weight_block_size']))}"
    return "mxfp4, a scale per 32" if name == "mxfp4" else name


def _tensor_bytes(
    tensor: Tensor, method: Mapping[str, Any] | None, dtype: str, tp: int, *, padded: bool
) -> int:
    """Bytes of all copies of a tensor on one of `tp` GPUs."""
    rows, columns = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
    quantised = method is not None and tensor.role in ("linear", "expert")
    if tensor.split and tp > 1:
        if tensor.role in ("linear", "expert") and tensor.name.endswith(("o_proj", "down")):
            columns = -(-columns // tp)
        elif tensor.role != "router":
            rows = -(-rows // tp)
    if not quantised or method is None:
        return rows * columns * tensor.copies * DTYPE_BYTES[dtype]
    if padded and tensor.role == "expert" and method.get("quant_method") == "mxfp4":
        if tensor.name.endswith("down"):
            columns = _EXPERT_MULTIPLE * -(-columns // _EXPERT_MULTIPLE)
        else:
            rows = _EXPERT_MULTIPLE * -(-rows // _EXPERT_MULTIPLE)
    return tensor.copies * _quantised_bytes(tensor, rows, columns, method, dtype)


def _quantised_bytes(
    tensor: Tensor, rows: int, columns: int, method: Mapping[str, Any], dtype: str
) -> int:
    """One quantised matrix with its scales, by the layout of each format.

    fp8: one byte, and a float32 scale per block of weights, or one for all. mxfp4 (OCP
    Microscaling 1.0): 4 bits, and 8 bits per 32 weights. awq, gptq: `bits`, and per group of a row
    a 16-bit scale and a zero of `bits`; gptq has 4 bytes per column more, for their order.
    bitsandbytes nf4: 4 bits, and a float32 scale per 64. int8: one byte, and a float32 scale per
    row.
    """
    size, name = rows * columns, str(method.get("quant_method"))
    if name == "mxfp4":
        if tensor.role != "expert":
            return size * DTYPE_BYTES[dtype]
        return size // 2 + rows * -(-columns // 32)
    if name == "fp8":
        block = method.get("weight_block_size")
        if block:
            if not isinstance(block, (list, tuple)) or len(block) != 2:
                raise InvalidSpec(
                    f"quantization_config.weight_block_size is {block!r} in the config, expected "
                    "two integers"
                )
            tall, wide = check_int("block", block[0]), check_int("block", block[1])
            return size + 4 * -(-rows // tall) * -(-columns // wide)
        return size + 4
    if name in ("awq", "gptq"):
        bits, group = _bits(method.get("bits", 4)), method.get("group_size", 128)
        groups = rows * (-(-columns // group) if isinstance(group, int) and group > 0 else 1)
        order = 4 * columns if name == "gptq" else 0
        return size * bits // 8 + groups * 2 + groups * bits // 8 + order
    if name == "bitsandbytes":
        four = method.get("load_in_4bit") or method.get("_load_in_4bit")
        return size // 2 + 4 * -(-size // 64) if four else size + 4 * rows
    if name == "int8":
        return size + 4 * rows
    if name == "compressed-tensors":
        return _compressed_bytes(size, rows, columns, method)
    raise InvalidSpec(
        f"quantization_config.quant_method is {name!r} in the config, expected awq, bitsandbytes, "
        "compressed-tensors, fp8, gptq, int8 or mxfp4: give a dtype or weights_memory"
    )


def _compressed_bytes(size: int, rows: int, columns: int, method: Mapping[str, Any]) -> int:
    """compressed-tensors: `num_bits`, and a 16-bit scale per group, row or tensor.

    NVFP4 and MXFP4 have scales of 8 bits, and NVFP4 a float32 of the whole tensor.
    """
    groups = method.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        raise InvalidSpec("quantization_config.config_groups in the config names no weights")
    bits, group = _bits(weights.get("num_bits")), weights.get("group_size")
    scales = rows * (-(-columns // group) if isinstance(group, int) and group > 0 else 1)
    form = str(first.get("format") or method.get("format") or "")
    if "fp4" in form:
        return size * bits // 8 + scales + (4 if "nvfp4" in form else 0)
    return size * bits // 8 + 2 * scales


def _bits(bits: object) -> int:
    return check_int("quantization_config bits", bits)
