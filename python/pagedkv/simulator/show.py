"""Reports as tables."""

from __future__ import annotations

import io
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from pagedkv.simulator.memory import CATEGORIES
from pagedkv.simulator.report import CacheSize, PolicyReport, SimulationReport
from pagedkv.simulator.setting import POLICIES
from pagedkv.units import format_bytes

__all__ = ["as_text", "print_report"]

_WIDTH = 120


def as_text(report: SimulationReport) -> str:
    """The tables as plain text, up to 120 columns wide."""
    out = io.StringIO()
    print_report(report, Console(file=out, width=_WIDTH, color_system=None))
    return out.getvalue().rstrip()


def print_report(report: SimulationReport, console: Console | None = None) -> None:
    """What was simulated, then a table of policies, and one of cache sizes."""
    if console is None:  # a file or a pipe has room for all policies
        console = Console() if Console().is_terminal else Console(width=_WIDTH)
    for line in _headline(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if report.policies:
        console.print(_policies(report.policies))
        for policy in report.policies:
            console.print(f"  {policy.policy}: {POLICIES[policy.policy]}", highlight=False)
    if report.cache_sizes:
        console.print("Prefix cache by size, one request at a time, prompts only", style="bold")
        console.print(_cache_sizes(report.cache_sizes))


def _headline(report: SimulationReport) -> list[str]:
    trace, setting, service = report.trace, report.setting, report.service
    skipped = f", {trace.num_skipped} broken lines left out" if trace.num_skipped else ""
    when = f"in {trace.seconds:,.0f} s" if trace.seconds else "at once"
    lines = [
        f"{trace.name}: {trace.num_requests:,} requests {when}{skipped}, mean "
        f"lengths {trace.mean_input_length:,.1f} in and {trace.mean_output_length:,.1f} out"
    ]
    if not report.policies:
        return lines
    size = format_bytes(setting.num_slots * setting.token_bytes)
    lines.append(
        f"memory: {setting.num_slots:,} slots ({size}), blocks of {setting.block_size}, at most "
        f"{report.max_model_len:,} tokens in a sequence and {setting.max_batch} sequences in a step"
    )
    lines.append(
        f"service model: a step {1e3 * service.step_seconds:.3g} ms + "
        f"{1e6 * service.token_seconds:.3g} us per token computed + "
        f"{1e6 * service.context_seconds:.3g} us per token of context; copies at "
        f"{service.copy_bandwidth / 1e9:.3g} GB/s"
    )
    if setting.samples > 1:
        lines.append(f"{setting.samples} samples for each prompt")
    if setting.beams > 1:
        lines.append(
            f"beams of {setting.beams}; modelled: at each step a beam goes on from another one "
            f"with probability {setting.beam_switch}"
        )
    return lines


def _policies(policies: tuple[PolicyReport, ...]) -> Table:
    """A column for each policy: so that the table is as wide as there are policies."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for report in policies:
        table.add_column(report.policy.replace("-", "\n"), justify="right", vertical="bottom")
    for title, rows in (("Memory, %", _MEMORY), ("Requests", _REQUESTS)):
        table.add_row(title, style="bold")
        for name, value in rows.items():
            table.add_row(f"  {name}", *(value(report) for report in policies))
    return table


def _share(category: str) -> Callable[[PolicyReport], str]:
    return lambda report: f"{100 * report.shares[category]:.1f}"


_MEMORY: dict[str, Callable[[PolicyReport], str]] = {
    **{category: _share(category) for category in CATEGORIES},
    "saved by sharing": lambda r: f"{100 * r.saved_by_sharing:.1f}",
    "sequences, mean": lambda r: f"{r.mean_batch:.1f}",
    "sequences, most": lambda r: f"{r.max_batch:,}",
}
_REQUESTS: dict[str, Callable[[PolicyReport], str]] = {
    "ended": lambda r: f"{r.num_finished:,}",
    "refused: too long": lambda r: f"{r.num_too_long:,}",
    "refused: cannot fit": lambda r: f"{r.num_refused:,}",
    "prefix hit rate, %": lambda r: f"{100 * r.hit_rate:.1f}",
    "preempted": lambda r: f"{r.num_preempted:,}",
    "tokens recomputed": lambda r: f"{r.num_recomputed_tokens:,}",
    "swapped": lambda r: format_bytes(r.num_swapped_bytes),
    "queued, mean s": lambda r: f"{r.queueing.mean:,.1f}",
    "queued, p50 s": lambda r: f"{r.queueing.p50:,.1f}",
    "queued, p99 s": lambda r: f"{r.queueing.p99:,.1f}",
    "all ended after, s": lambda r: f"{r.seconds:,.0f}",
}


def _cache_sizes(sizes: tuple[CacheSize, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("cache, tokens", "hit rate, %", "hit tokens", "prompt tokens", "cannot fit, %"):
        table.add_column(column, justify="right")
    for size in sizes:
        table.add_row(
            "unbounded" if size.num_tokens is None else f"{size.num_tokens:,}",
            f"{100 * size.hit_rate:.2f}",
            f"{size.num_hit_tokens:,}",
            f"{size.num_prompt_tokens:,}",
            f"{100 * size.refused_rate:.1f}",
        )
    return table
