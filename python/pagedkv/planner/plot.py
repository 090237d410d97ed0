"""A plan as a picture: where the memory goes, and how many sequences fit at which length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagedkv.errors import InvalidSpec
from pagedkv.planner.plan import MemoryPlan
from pagedkv.units import GiB

__all__ = ["draw"]

_COLOURS = {
    "weights": "#4c72b0", "kv_cache": "#55a868", "activations": "#dd8452", "non-torch": "#8172b3",
}  # fmt: skip


def draw(plan: MemoryPlan, file: Path) -> None:
    """Write the picture. Raises InvalidSpec for another ending than .png and .svg."""
    if file.suffix.lower() not in (".png", ".svg"):
        raise InvalidSpec(f"plot is {str(file)!r}, expected a name that ends in .png or .svg")
    if not file.absolute().parent.is_dir():
        raise InvalidSpec(f"plot is {str(file)!r}, and its folder does not exist")
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'pagedkv[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    verdict = "fits" if plan.fits else "does not fit"
    figure.suptitle(f"{plan.model} on {plan.gpu.name}: {verdict}")
    _bar(plan, left)
    _frontier(plan, right)
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise InvalidSpec(f"plot is {str(file)!r}: {error.strerror or error}") from error


def _bar(plan: MemoryPlan, axes: Any) -> None:
    bottom = 0.0
    for part in plan.components:
        size = part.num_bytes / GiB
        label = f"{part.label}: {size:.2f} GiB"
        axes.bar(0, size, bottom=bottom, width=0.6, color=_COLOURS[part.name], label=label)
        if not part.exact:
            middle = bottom + size
            error = [[size - part.low / GiB], [part.high / GiB - size]]
            if part.name != "kv_cache":
                axes.errorbar(0, middle, yerr=error, color="black", capsize=4, linewidth=1)
        bottom += size
    usable, whole = plan.usable_bytes / GiB, plan.gpu.memory_bytes / GiB
    axes.axhline(usable, color="black", linestyle="--", linewidth=1)
    axes.axhline(whole, color="black", linewidth=1)
    axes.text(0.5, usable, "budget", va="top", ha="right", fontsize=8)
    axes.text(0.5, whole, "visible", va="bottom", ha="right", fontsize=8)
    axes.set(
        xlim=(-0.5, 0.5), ylim=(0, 1.12 * max(whole, bottom)), xticks=[], ylabel="GiB of one GPU"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=8, frameon=False)


def _frontier(plan: MemoryPlan, axes: Any) -> None:
    grid = plan.grid
    pairs = [(c, n) for c, n in zip(grid.contexts, grid.frontier, strict=True) if n > 0]
    if pairs:
        contexts, most = zip(*pairs, strict=True)
        axes.fill_between(contexts, most, 0.8, color=_COLOURS["kv_cache"], alpha=0.2, label="fits")
        axes.plot(contexts, most, color=_COLOURS["kv_cache"], marker="o")
        for context, number in pairs:
            axes.annotate(f"{number:,}", (context, number), textcoords="offset points",
                          xytext=(4, 5), fontsize=8)  # fmt: skip
    load = plan.load
    axes.plot(load.length, load.concurrency * load.sequences, "x", color="black", markersize=9,
              label="this load, nothing shared")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(grid.contexts, [f"{n:,}" for n in grid.contexts], fontsize=8, rotation=30)
    axes.set(xlabel="tokens of a sequence", ylabel="sequences at once", ylim=(0.8, None))
    axes.minorticks_off()
    axes.legend(loc="upper right", fontsize=8, frameon=False)
