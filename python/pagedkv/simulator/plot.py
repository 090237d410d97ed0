"""Draws a report: waste by policy, memory over time, hit rate over cache size. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pagedkv.errors import InvalidSpec
from pagedkv.simulator.memory import CATEGORIES
from pagedkv.simulator.report import SimulationReport

__all__ = ["check_plot", "draw_report"]

SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = ("#1f6f8b", "#8ec6d7", "#f2b134", "#d1495b", "#b9b4d8", "#e6e8eb")
_LINES = ("#d1495b", "#f2b134", "#6a737d", "#1f6f8b", "#2e9e6b", "#7b4fa3", "#1b1f24")


def check_plot(out: Path) -> None:
    """Raises InvalidSpec if nothing can be drawn into this file; to be asked before a long run."""
    if out.suffix.lower() not in SUFFIXES:
        raise InvalidSpec(f"plot {out}: expected a file name that ends in {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise InvalidSpec(f"plot {out}: the folder {out.parent} does not exist")
    if find_spec("matplotlib") is None:
        raise InvalidSpec("a plot needs matplotlib: pip install 'pagedkv[plot]'")


def draw_report(report: SimulationReport, out: Path) -> None:
    """Write the charts of what the report holds to a file; its suffix is the format.

    Raises InvalidSpec as check_plot() does, or if the file cannot be written.
    """
    check_plot(out)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts: list[Callable[[Any, SimulationReport], None]] = []
    if report.policies:
        charts += [_waste, _over_time]
    if report.cache_sizes:
        charts.append(_hit_rates)
    figure = Figure(figsize=(9.5, 4.2 * len(charts)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report.trace.name}, {report.trace.num_requests:,} requests")
    for place, chart in enumerate(charts, 1):
        chart(figure.add_subplot(len(charts), 1, place), report)
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise InvalidSpec(f"plot {out}: {error.strerror or error}") from None


def _waste(axes: Any, report: SimulationReport) -> None:
    names = [policy.policy for policy in report.policies]
    left = [0.0] * len(names)
    for category, colour in zip(CATEGORIES, _COLOURS, strict=True):
        values = [100 * policy.shares[category] for policy in report.policies]
        bars = axes.barh(names, values, left=left, color=colour, label=category)
        labels = [f"{value:.1f}" if value >= 4 else "" for value in values]
        ink = "white" if category in ("tokens", "external") else "#1b1f24"
        axes.bar_label(bars, labels, label_type="center", color=ink, fontsize=8)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of the slots", title="Memory by category")
    _legend_below(axes, len(CATEGORIES))


def _over_time(axes: Any, report: SimulationReport) -> None:
    for policy, colour in zip(report.policies, _LINES, strict=False):
        seconds = [moment.seconds for moment in policy.timeline]
        tokens = [100 * moment.tokens for moment in policy.timeline]
        axes.plot(seconds, tokens, color=colour, linewidth=1, label=policy.policy)
    axes.set(xlabel="seconds", ylabel="% of the slots", title="Tokens in use over time")
    axes.set(xlim=(0, None), ylim=(0, 102))
    _legend_below(axes, 4)


def _hit_rates(axes: Any, report: SimulationReport) -> None:
    names = [
        "unbounded" if size.num_tokens is None else short_size(size.num_tokens)
        for size in report.cache_sizes
    ]
    places = range(len(names))
    hits = [100 * size.hit_rate for size in report.cache_sizes]
    refused = [100 * size.refused_rate for size in report.cache_sizes]
    axes.plot(places, hits, marker="o", color=_COLOURS[0], label="prompt tokens that hit")
    axes.plot(places, refused, marker="x", color=_COLOURS[3], label="requests that cannot fit")
    axes.set_xticks(places, names)
    axes.set(xlabel="tokens that the cache holds", ylabel="%", title="Prefix cache by size")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _legend_below(axes: Any, num_columns: int) -> None:
    axes.legend(ncols=num_columns, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)


def short_size(num_tokens: int) -> str:
    """Tokens with K for 2^10 and M for 2^20, where that is exact: "16K", "1M", "1,000"."""
    for unit, shift in (("M", 20), ("K", 10)):
        if num_tokens % (1 << shift) == 0:
            return f"{num_tokens >> shift}{unit}"
    return f"{num_tokens:,}"
