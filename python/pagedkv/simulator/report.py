"""What a simulation found: values that compare, print, and become JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import numpy as np

from pagedkv.simulator.service import ServiceModel
from pagedkv.simulator.setting import SimulationSetting
from pagedkv.simulator.trace import Trace

__all__ = [
    "CacheSize",
    "Delay",
    "Moment",
    "PolicyReport",
    "SimulationReport",
    "TraceSummary",
]

SCHEMA = "pagedkv.simulate/1"  # described in docs/simulator.md


@dataclass(frozen=True)
class Delay:
    """Seconds from arrival to admission."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Delay:
        if not seconds:
            return cls(0.0, 0.0, 0.0)
        p50, p99 = np.percentile(seconds, (50, 99)).tolist()
        return cls(float(np.mean(seconds)), p50, p99)


@dataclass(frozen=True)
class Moment:
    """At `seconds`, the shares of the memory with tokens in use, and taken by running requests."""

    seconds: float
    tokens: float
    held: float


@dataclass(frozen=True)
class PolicyReport:
    """One policy's run. Averages are over time, up to the last admission.

    Attributes:
        shares: of the memory by category: tokens, reservation, internal, external, cached, free;
            they sum to 1.
        saved_by_sharing: blocks that sharing saves, of those that would be held without.
        mean_batch, max_batch: sequences in a step.
        num_too_long: requests longer than max_model_len, refused.
        num_refused: requests that cannot fit in this memory, even alone.
        num_hit_tokens: prompt tokens found in the cache, of num_prompt_tokens.
        num_preempted: preemptions.
        num_swapped_bytes: copied out of the device and back in.
        num_recomputed_tokens: computed again after a preemption.
        queueing: from arrival to the first admission, of the requests that ran.
        seconds: until the last request ended.
    """

    policy: str
    shares: dict[str, float]
    saved_by_sharing: float
    mean_batch: float
    max_batch: int
    num_requests: int
    num_finished: int
    num_too_long: int
    num_refused: int
    num_prompt_tokens: int
    num_hit_tokens: int
    num_preempted: int
    num_swapped_bytes: int
    num_recomputed_tokens: int
    queueing: Delay
    seconds: float
    timeline: tuple[Moment, ...]

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found in the cache."""
        return self.num_hit_tokens / max(1, self.num_prompt_tokens)


@dataclass(frozen=True)
class CacheSize:
    """What a prefix cache of this size finds, one request at a time and prompts only.

    Attributes:
        num_tokens: size of the cache; None for one that never evicts.
        num_hit_tokens: found, of the num_prompt_tokens of all requests.
        num_refused: requests whose prompt is larger than the cache; they find and leave nothing.
    """

    num_tokens: int | None
    num_requests: int
    num_refused: int
    num_prompt_tokens: int
    num_hit_tokens: int

    @property
    def hit_rate(self) -> float:
        return self.num_hit_tokens / max(1, self.num_prompt_tokens)

    @property
    def refused_rate(self) -> float:
        return self.num_refused / max(1, self.num_requests)


@dataclass(frozen=True)
class TraceSummary:
    """The load: mean lengths in tokens, and seconds from the first arrival to the last."""

    name: str
    num_requests: int
    num_skipped: int
    mean_input_length: float
    mean_output_length: float
    seconds: float

    @classmethod
    def of(cls, trace: Trace) -> TraceSummary:
        requests = trace.requests
        return cls(
            trace.name,
            len(requests),
            trace.num_skipped,
            sum(r.input_length for r in requests) / len(requests),
            sum(r.output_length for r in requests) / len(requests),
            requests[-1].arrival,
        )


@dataclass(frozen=True)
class SimulationReport:
    """All policies, and the study of cache sizes, on one trace. `print()` shows the tables.

    Attributes:
        max_model_len: the limit that held, given or found in the trace.
    """

    trace: TraceSummary
    setting: SimulationSetting
    service: ServiceModel
    max_model_len: int
    policies: tuple[PolicyReport, ...]
    cache_sizes: tuple[CacheSize, ...]

    def policy(self, name: str) -> PolicyReport:
        """The report of one policy; KeyError if it was not run."""
        for report in self.policies:
            if report.policy == name:
                return report
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; the schema is in docs/simulator.md."""
        result = {"schema": SCHEMA, **asdict(self)}
        for report, values in zip(self.policies, result["policies"], strict=True):
            values["hit_rate"] = report.hit_rate
        for size, values in zip(self.cache_sizes, result["cache_sizes"], strict=True):
            values |= {"hit_rate": size.hit_rate, "refused_rate": size.refused_rate}
        return result

    def __str__(self) -> str:
        text: str = import_module("pagedkv.simulator.show").as_text(self)
        return text
