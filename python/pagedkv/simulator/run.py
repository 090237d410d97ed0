"""simulate(): a trace through several policies, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pagedkv.errors import InvalidSpec
from pagedkv.simulator.contiguous import ContiguousMemory
from pagedkv.simulator.lengths import synthetic_trace
from pagedkv.simulator.memory import Memory
from pagedkv.simulator.paged import PagedMemory
from pagedkv.simulator.prefix import hit_rates
from pagedkv.simulator.report import PolicyReport, SimulationReport, TraceSummary
from pagedkv.simulator.scheduler import Scheduler
from pagedkv.simulator.service import ServiceModel
from pagedkv.simulator.setting import POLICIES, SimulationSetting
from pagedkv.simulator.trace import Trace, read_trace

__all__ = ["default_policies", "simulate"]

Progress = Callable[[str, float], None]


def simulate(
    trace: Trace | str | Path,
    setting: SimulationSetting | None = None,
    *,
    policies: Sequence[str] | None = None,
    cache_sizes: Sequence[int | None] = (),
    service: ServiceModel | None = None,
    progress: Progress | None = None,
) -> SimulationReport:
    """Run a load through policies of KV memory, each with the same scheduler and service rates.

        print(pagedkv.simulate("synthetic:sharegpt"))

    Args:
        trace: a Trace, a file for read_trace(), "synthetic:sharegpt" or "synthetic:alpaca".
        setting: the memory and the scheduler.
        policies: of POLICIES, in the order wanted, each run once; by default all that differ on
            this trace.
        cache_sizes: sizes of a prefix cache to study, in tokens, None for one that never evicts;
            needs a trace with hash ids.
        service: how long steps take.
        progress: called with what is running and the share of it that is done.

    Raises:
        InvalidSpec: an argument, or a line of the trace, is not as expected.
    """
    setting = SimulationSetting() if setting is None else setting
    service = ServiceModel() if service is None else service
    trace = _load(trace, setting.seed)
    names = default_policies(trace, setting) if policies is None else dict.fromkeys(policies)
    for name in names:
        if name not in POLICIES:
            raise InvalidSpec(f"policy {name!r}, expected one of {', '.join(POLICIES)}")
    max_model_len = setting.max_model_len or trace.max_model_len
    if max_model_len is None:
        max_model_len = max(request.num_tokens for request in trace.requests)
    sizes = hit_rates(trace, cache_sizes, progress=progress) if cache_sizes else ()
    reports = tuple(_run(name, trace, setting, service, max_model_len, progress) for name in names)
    return SimulationReport(TraceSummary.of(trace), setting, service, max_model_len, reports, sizes)


def default_policies(trace: Trace, setting: SimulationSetting) -> tuple[str, ...]:
    """All that differ: "sharing" needs samples or beams, "prefix" hash ids, "swap" a host tier."""
    left_out = {"sharing"} if setting.num_sequences == 1 else set()
    left_out |= set() if trace.has_hash_ids else {"prefix"}
    left_out |= set() if setting.num_host_blocks else {"swap"}
    return tuple(name for name in POLICIES if name not in left_out)


def _load(trace: Trace | str | Path, seed: int) -> Trace:
    if isinstance(trace, Trace):
        if not trace.requests:
            raise InvalidSpec("the trace has no requests")
        return trace
    if isinstance(trace, str) and trace.startswith("synthetic:"):
        return synthetic_trace(trace.removeprefix("synthetic:"), seed=seed)
    return read_trace(trace)


def _run(
    name: str, trace: Trace, setting: SimulationSetting, service: ServiceModel, max_model_len: int,
    progress: Progress | None,
) -> PolicyReport:  # fmt: skip
    memory: Memory
    if name.startswith("contiguous"):
        memory = ContiguousMemory(name, setting.num_slots, max_model_len, setting.num_sequences)
    else:
        memory = PagedMemory(name, trace, setting, service, max_model_len)
    scheduler = Scheduler(name, memory, trace, service, setting, max_model_len)
    return scheduler.run(progress and (lambda share: progress(name, share)))
