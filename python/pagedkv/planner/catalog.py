"""Built-in facts: what is known of models and GPUs by name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from pagedkv.errors import InvalidSpec
from pagedkv.units import parse_bytes

__all__ = ["Gpu", "find_gpu", "find_model", "gpus", "model_names"]


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: such as "A100-80GB"; for a size that was given, the size.
        memory_bytes: what CUDA reports as its total, less than what is on the box.
        bandwidth: bytes per second of its memory, by its data sheet; None where unknown.
        flops: dense bfloat16 (else float16) operations per second, by its data sheet.
        pcie: bytes per second to host memory in one direction, by its data sheet.
        has_bfloat16: whether it computes with it.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    flops: float | None = None
    pcie: float | None = None
    has_bfloat16: bool = True


def find_gpu(gpu: str | int) -> Gpu:
    """The GPU of this name, or one with so many bytes: 85199945728, "80GB", "79.25GiB".

    Raises:
        InvalidSpec: neither, or a name that several GPUs have, such as "A100".
    """
    if isinstance(gpu, str):
        known = gpus()
        names = {_key(alias): name for name in known for alias in (name, *_facts("gpus")[name][
            "aliases"])}  # fmt: skip
        key = _key(gpu).removeprefix("nvidia").removeprefix("geforce")
        if key in names:
            return known[names[key]]
        similar = sorted({name for alias, name in names.items() if key and alias.startswith(key)})
        if similar:
            raise InvalidSpec(f"gpu is {gpu!r}, expected one of {', '.join(similar)}")
        if re.match(r"\s*[0-9.]+\s*[A-Za-z]*\s*$", gpu) is None:
            raise InvalidSpec(
                f"gpu is {gpu!r}, expected a size such as 80GB or 79.25GiB, or one of "
                f"{', '.join(known)}"
            )
    size = parse_bytes(gpu, "gpu")
    if size < 2**20:
        raise InvalidSpec(f"gpu is {gpu!r}, expected at least 1 MiB: did you leave out a unit?")
    return Gpu(name=f"{size / 2**30:.2f} GiB", memory_bytes=size)


def gpus() -> dict[str, Gpu]:
    """All that are known by name."""
    return {
        name: Gpu(
            name,
            facts["memory_mib"] * 2**20,
            facts["bandwidth_gb_s"] * 1e9,
            facts["tflops_bf16"] * 1e12,
            facts["pcie_gb_s"] * 1e9,
            facts.get("bfloat16", True),
        )
        for name, facts in _facts("gpus").items()
    }


def find_model(name: str) -> tuple[str, dict[str, Any]] | None:
    """Name and config of a model that is known by this name or hub id; None if there is none."""
    key = _key(name)
    for known, facts in _facts("models").items():
        if key in map(_key, (known, facts["hub"], *facts["aliases"])):
            config: dict[str, Any] = facts["config"]
            return known, config
    return None


def model_names() -> list[str]:
    return list(_facts("models"))


def similar_models(name: str) -> list[str]:
    keys = {_key(known): known for known in model_names()}
    return [keys[k] for k in get_close_matches(_key(name), keys, n=3, cutoff=0.5)]


@cache
def _facts(kind: str) -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name(f"{kind}.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def _key(name: str) -> str:
    """Names are told apart by letters, digits and the slash of hub ids only."""
    return re.sub(r"[^a-z0-9/]", "", name.lower())
