"""What is simulated: the memory, the limits of the scheduler, and how requests are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pagedkv.config import check_int
from pagedkv.errors import InvalidSpec

__all__ = ["POLICIES", "SimulationSetting"]

_MOST = 2**40  # of any number

# In the order in which they are shown; each paged one adds to those before it.
POLICIES = {
    "contiguous-max": "one chunk of max_model_len slots",
    "contiguous-pow2": "one chunk, the output's length known to a power of two",
    "contiguous-oracle": "one chunk, the output's length known",
    "paged": "blocks; under pressure the newest request is recomputed",
    "sharing": "+ the samples or beams of a request share blocks",
    "prefix": "+ prompts share blocks with earlier prompts",
    "swap": "+ under pressure, swap to the host or recompute",
}


@dataclass(frozen=True)
class SimulationSetting:
    """The machine and the scheduler. The defaults are OPT-13B on an A100 with 40 GB.

    Attributes:
        num_slots: tokens of K and V that the device holds. Paged policies use the whole blocks.
        block_size: tokens per block.
        token_bytes: bytes of one token's K and V, `KVSpec.token_bytes`; for bytes swapped.
        host_slots: tokens that the host tier holds, for "swap"; None for as many as the device.
        max_model_len: most tokens of one sequence, and what "contiguous-max" reserves; longer
            requests are refused. None: what the trace says, or its longest request.
        max_batch: most sequences in one step.
        watermark: share of the blocks that admission leaves free, 0 to 1 exclusive.
        samples: outputs sampled for each prompt.
        beams: beam width; instead of samples.
        beam_switch: probability that a beam goes on from another beam than itself at a step.
        preempt: what "swap" does under pressure: "swap" while the host has room, "recompute", or
            "auto", the way that takes less time.
        seed: of all that is drawn. The same seed gives the same report.
    """

    num_slots: int = 15_728
    block_size: int = 16
    token_bytes: int = 819_200
    host_slots: int | None = None
    max_model_len: int | None = None
    max_batch: int = 256
    watermark: float = 0.01
    samples: int = 1
    beams: int = 1
    beam_switch: float = 0.1
    preempt: Literal["auto", "swap", "recompute"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_slots", "token_bytes", "max_batch", "samples", "beams"):
            check_int(name, getattr(self, name), 1, _MOST)
        for name in ("host_slots", "max_model_len"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 0 if name == "host_slots" else 1, _MOST)
        check_int("seed", self.seed, 0, _MOST)
        check_int("block_size", self.block_size, 1, 4096)
        if self.num_slots < self.block_size:
            raise InvalidSpec(f"num_slots is {self.num_slots}, expected a block or more")
        for name, value in (("watermark", self.watermark), ("beam_switch", self.beam_switch)):
            if not 0 <= value < 1:
                raise InvalidSpec(f"{name} is {value}, expected 0 or more and less than 1")
        if self.samples > 1 and self.beams > 1:
            raise InvalidSpec(f"samples is {self.samples} beside beams of {self.beams}: choose one")
        if self.num_sequences > self.max_batch:
            raise InvalidSpec(
                f"max_batch is {self.max_batch}, expected room for the {self.num_sequences} "
                "sequences of a request"
            )
        if self.preempt not in ("auto", "swap", "recompute"):
            raise InvalidSpec(f"preempt is {self.preempt!r}, expected auto, swap or recompute")

    @property
    def num_sequences(self) -> int:
        """Sequences of one request: its samples, or its beams."""
        return max(self.samples, self.beams)

    @property
    def num_blocks(self) -> int:
        return self.num_slots // self.block_size

    @property
    def num_host_blocks(self) -> int:
        slots = self.num_slots if self.host_slots is None else self.host_slots
        return slots // self.block_size

    @property
    def watermark_blocks(self) -> int:
        return int(self.num_blocks * self.watermark)
