"""One tensor of a model, as far as its size goes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

__all__ = ["Role", "Tensor", "linear", "vector"]

Role = Literal["embedding", "head", "linear", "expert", "router", "vector"]


@dataclass(frozen=True)
class Tensor:
    """`copies` tensors of one shape, of which one token meets `active`.

    Attributes:
        name: as in checkpoints, without the number of its layer.
        role: what it does; quantisation treats roles differently.
        shape: (rows, columns), or (elements,).
        split: whether tensor parallelism divides it among GPUs, or every GPU has it all.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    copies: int = 1
    active: int = 1
    split: bool = True

    @property
    def num_elements(self) -> int:
        return prod(self.shape) * self.copies

    @property
    def num_active(self) -> int:
        return prod(self.shape) * min(self.active, self.copies)


def linear(name: str, rows: int, columns: int, split: bool = True) -> Tensor:
    return Tensor(name, "linear", (rows, columns), split=split)


def vector(name: str, size: int) -> Tensor:
    return Tensor(name, "vector", (size,), split=False)
