"""What each figure is held against: a bar, and the floor below which it cannot go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """One figure of the report.

    `row` is the name that a benchmark gives; with `over`, the figure is the quotient of two rows.
    `bar` is the most that is accepted, in `unit`; None for rows that are only there to compare.
    `floor` says what the figure contains that no manager could leave out.
    """

    row: str
    unit: str
    bar: float | None = None
    over: str | None = None
    floor: str = ""

    @property
    def name(self) -> str:
        return f"{self.row} / {self.over}" if self.over else self.row


SCALES = {"us": 1e6, "ns": 1e9, "B": 1.0, "x": 1.0}

_STEP = "two calls, 7 outputs read"
_ADMIT = "three calls, 128 nodes written"

BARS = (
    Bar("decode step, 256 x 2k", "us", 10, floor=_STEP + ", 256 rows"),
    Bar("decode step, one in, one out", "us", 14, floor=_STEP + ", 256 rows"),
    Bar("decode step, 256 x 1k, 32 writes", "us", 120, floor="32 writes, see below"),
    Bar("write, 256 x 1", "us", floor="256 elements placed twice"),
    Bar("beam step, 8 x 2k", "us", 3.5, floor="three calls, 7 outputs read"),
    Bar("beam step, 8 x 128k", "us", 3.5, floor="three calls, 7 outputs read"),
    Bar("beam step, 8 x 128k", "x", 1.2, over="beam step, 8 x 2k", floor="1"),
    Bar("beam search, a step of 8 x 2k", "us", floor="three calls, 7 outputs read"),
    Bar("beam search, a step of 8 x 128k", "us", floor="three calls, 7 outputs read"),
    Bar("fork(id, 2) at 128k", "us", 2.5, floor="32 KiB of table row copied"),
    Bar("first step of 8 forks at 128k", "us", 25, floor="8 x 32 KiB of table rows sent"),
    Bar("admit 2048, no hit", "us", 15, floor=_ADMIT),
    Bar("admit 2048, hit 1536", "us", 12, floor="three calls, 96 nodes found, 32 written"),
    Bar("admit 2048 into 10k cached", "us", None),
    Bar("admit 2048 into 100k cached", "us", 22, floor=_ADMIT + ", 128 evicted"),
    Bar("admit 2048 into 1M cached", "us", None),
    Bar("admit 2048 into 1M cached", "x", 3, over="admit 2048 into 10k cached", floor="1"),
    Bar("evict one of a trunk, a leaf at 500 depths", "us"),
    Bar("evict one of a trunk, a leaf at 4000 depths", "us"),
    Bar(
        "evict one of a trunk, a leaf at 4000 depths",
        "x",
        1.5,
        over="evict one of a trunk, a leaf at 500 depths",
        floor="1",
    ),
    Bar("block, taken by counts and released", "ns", 40, floor="a list of ints, see below"),
    Bar("lookup, miss", "us", 1, floor="a call with a buffer"),
    Bar("trace, per operation", "us", 1.2, floor="one sequence, one step"),
    Bar("metadata bytes per block", "B", 160, floor="64 of token ids"),
    Bar("resident bytes per cached block", "B", 160, floor="64 of token ids"),
    Bar("swap out of 128 blocks", "us", 6, floor="one call, 128 nodes placed"),
    Bar("swap in of 128 blocks, evicting", "us", 16, floor="one call, 128 placed, 128 evicted"),
    Bar("complete a swap of 128 blocks", "us"),
    Bar("swap out over memcpy, time", "x", 1.25, floor="1"),
    Bar("swap in over memcpy, time", "x", 1.25, floor="1"),
    Bar("decode beside a swap over beside memcpy", "x", 1.2, floor="1"),
    # Floors: what a call, a step and a read of memory cost here.
    Bar("clock", "us"),
    Bar("empty call", "us"),
    Bar("np.array([id])", "us"),
    Bar("one sequence, one step", "us"),
    Bar("block, a list of ints", "ns"),
    Bar("node of a scattered path, 100k blocks", "ns"),
    Bar("node of a scattered path, 1M blocks", "ns"),
)
