"""Whether a preempted sequence is swapped out or recomputed: by what each is going to cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["CostModel", "PreemptMode", "PreemptRequest", "swap_or_recompute"]

PreemptMode = Literal["auto", "swap", "recompute"]


@dataclass(frozen=True)
class PreemptRequest:
    """What is known when sequences are to be preempted together.

    Attributes:
        num_bytes: K and V that they alone hold on the device: what a swap copies, out and in again,
            at most.
        num_tokens: in these blocks: what recomputing them prefills again, at least.
        out_bandwidth, in_bandwidth: bytes per second of the copies on this cache so far; None
            before the first transfer in that direction has ended.
        prefill_rate: tokens per second that the model prefills, as the caller says; None if unsaid.
    """

    num_bytes: int
    num_tokens: int
    out_bandwidth: float | None
    in_bandwidth: float | None
    prefill_rate: float | None


CostModel = Callable[[PreemptRequest], Literal["swap", "recompute"]]


def swap_or_recompute(request: PreemptRequest) -> Literal["swap", "recompute"]:
    """The default cost model: the way that takes less time.

        swap       num_bytes / out_bandwidth + num_bytes / in_bandwidth
        recompute  num_tokens / prefill_rate

    A direction that was not measured yet counts like the other one. Where nothing was measured, or
    the prefill rate is unsaid, the answer is "swap": it loses nothing, and measures.
    """
    out, back = request.out_bandwidth, request.in_bandwidth
    rates = (out or back, back or out)
    if request.prefill_rate is None or rates[0] is None or rates[1] is None:
        return "swap"
    swap_seconds = request.num_bytes / rates[0] + request.num_bytes / rates[1]
    return "swap" if swap_seconds <= request.num_tokens / request.prefill_rate else "recompute"
