"""A plan as tables for people."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagedkv.planner.budget import Component
from pagedkv.planner.plan import MemoryPlan
from pagedkv.units import GiB

__all__ = ["show"]


def show(plan: MemoryPlan, console: Console) -> None:
    """Print all of a plan. GiB is 2**30 bytes, GB is 10**9."""
    _head(plan, console)
    console.print(_budget(plan))
    _kv(plan, console)
    console.print()
    _verdict(plan, console)
    console.print(_grid(plan))
    if plan.policies:
        console.print(_policies(plan))
    _preemption(plan, console)
    for note in plan.notes:
        console.out(f"Note: {note}.")
    for assumption in plan.assumptions:
        console.out(f"Assumed: {assumption}.")


def _head(plan: MemoryPlan, console: Console) -> None:
    load, weights = plan.load, plan.weights
    number = load.tp * load.replicas
    console.out(
        f"{plan.model} on {f'{number} x ' if number > 1 else ''}{plan.gpu.name}"
        f"{f', tp {load.tp}' if load.tp > 1 else ''}: {_requests(plan)}."
    )
    active = f", {weights.num_active:,} active" if weights.is_mixture else ""
    console.out(
        f"{weights.num_parameters:,} parameters{active}, {weights.scheme}: "
        f"{weights.total_bytes / 1e9:.2f} GB, {weights.bytes_per_parameter:.4g} bytes each."
    )
    console.out(
        f"Budget{' of each GPU' if number > 1 else ''}: {load.utilization:g} x "
        f"{plan.gpu.memory_bytes / GiB:.2f} GiB visible = {plan.usable_bytes / GiB:.2f} GiB."
    )


def _requests(plan: MemoryPlan) -> str:
    load = plan.load
    many = "request" if load.concurrency == 1 else "requests"
    each = f" x {load.sequences} sequences" if load.sequences > 1 else ""
    return (
        f"{load.concurrency:,} {many}{each} of {load.input_len:,} + {load.output_len:,} tokens, "
        f"at most {load.max_model_len:,}"
    )


def _budget(plan: MemoryPlan) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "bytes", "GiB", "share"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    table.add_column("how it is known")
    for part in plan.components:
        _row(table, plan, part.label, part.num_bytes, _known(part))
    total = sum(part.num_bytes for part in plan.components)
    rest = plan.usable_bytes - total
    _row(table, plan, "free" if rest >= 0 else "over budget", abs(rest), "")
    table.add_section()
    for part in plan.outside:
        _row(table, plan, part.name, part.num_bytes, f"{_known(part)}, outside", share=False)
    return table


def _row(
    table: Table, plan: MemoryPlan, name: str, size: int, known: str, share: bool = True
) -> None:
    part = f"{size / plan.usable_bytes:.1%}" if share else ""
    table.add_row(name, f"{size:,}", f"{size / GiB:.2f}", part, known)


def _known(part: Component) -> str:
    if part.exact:
        return f"exact ({part.source})" if part.source == "given" else "exact"
    return f"estimated, {part.low / GiB:.2f} to {part.high / GiB:.2f}"


def _kv(plan: MemoryPlan, console: Console) -> None:
    kv = plan.kv
    per_gpu = f" ({kv.token_bytes:,} on each GPU)" if plan.load.tp > 1 else ""
    console.out(
        f"K and V: {kv.model_token_bytes:,} bytes per token{per_gpu}, {plan.load.kv_dtype}."
    )
    if kv.model_window_bytes:
        console.out(
            f"  Past the windows {kv.model_growing_bytes:,} per token, and "
            f"{kv.model_window_bytes:,} that do not grow."
        )
    if kv.model_state_bytes:
        console.out(f"  Recurrent state: {kv.model_state_bytes:,} bytes per sequence.")
    if len(kv.groups) > 1 or any(group.window for group in kv.groups):
        console.out(f"  Layer groups: {_groups(plan)}.")
    console.out(
        f"Blocks: {kv.num_blocks:,} of {kv.block_bytes:,} bytes ({plan.load.block_size} tokens); "
        f"the load needs {kv.needed_blocks:,}."
    )
    for line in plan.log_lines:
        console.out(line)


def _groups(plan: MemoryPlan) -> str:
    kinds: dict[tuple[int | None, int, int], int] = {}
    for group in plan.kv.groups:
        key = (group.window, group.num_layers, group.num_padding)
        kinds[key] = kinds.get(key, 0) + 1
    return ", ".join(
        f"{number} of {layers} layers"
        + (f" and {padding} of padding" if padding else "")
        + (f" with window {window:,}" if window else "")
        for (window, layers, padding), number in kinds.items()
    )


def _verdict(plan: MemoryPlan, console: Console) -> None:
    words = ("FITS", "bold green") if plan.fits else ("DOES NOT FIT", "bold red")
    needed = plan.needed_bytes
    console.print(
        Text.assemble(
            words,
            f": the load needs {needed / 1e9:.2f} GB ({needed / GiB:.2f} GiB) of "
            f"{plan.usable_bytes / 1e9:.2f} GB{' on each GPU' if plan.load.tp > 1 else ''}.",
        ),
        soft_wrap=True,
    )
    if plan.fits:
        return
    for shortfall in plan.shortfalls:
        console.out(f"  {shortfall[0].upper()}{shortfall[1:]}.")
    if not plan.changes:
        console.out("  No single change, nor a pair of them, makes it fit.")
        return
    console.out("Each of these makes it fit:")
    for change in plan.changes:
        console.out(f"  {change.flags}  ({change.effect})")


def _grid(plan: MemoryPlan) -> Table:
    grid = plan.grid
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title="GiB of K and V for so many sequences",
        title_justify="left", title_style="",
    )  # fmt: skip
    table.add_column("context", justify="right")
    for number in grid.concurrencies:
        table.add_column(f"{number:,}", justify="right", no_wrap=True)
    table.add_column("most", justify="right")
    rows = zip(grid.contexts, grid.needed_bytes, grid.fits, grid.frontier, strict=True)
    for context, sizes, fits, most in rows:
        cells = [
            Text(f"{size / GiB:,.2f}" + ("" if ok else " ✗"), style="green" if ok else "red")
            for size, ok in zip(sizes, fits, strict=True)
        ]
        table.add_row(f"{context:,}", *cells, f"{most:,}")
    return table


def _policies(plan: MemoryPlan) -> Table:
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", title_style="",
        title="The memory of K and V, full of such requests",
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    for name in ("requests", "GiB each", "tokens", "reserved", "internal", "external", "free"):
        table.add_column(name, justify="right", no_wrap=True)
    for policy in plan.policies:
        shares = (policy.tokens, policy.reserved, policy.internal, policy.external, policy.free)
        table.add_row(
            policy.name, f"{policy.requests:,}", f"{policy.request_bytes / GiB:.3f}",
            *(f"{share:.1%}" for share in shares),
        )  # fmt: skip
    return table


def _preemption(plan: MemoryPlan, console: Console) -> None:
    swap = plan.preemption
    if swap.host_blocks:
        console.out(f"Host tier: {swap.host_blocks:,} blocks.")
    known = []
    if swap.swap_seconds is not None:
        known.append(f"swap out and in {swap.swap_seconds * 1e3:,.1f} ms")
    if swap.recompute_seconds is not None:
        known.append(f"recompute {swap.recompute_seconds * 1e3:,.1f} ms")
    if swap.cheaper is not None:
        known.append(f"cheaper: {swap.cheaper}")
    answer = "; ".join(known) or "times are known for GPUs that are named only"
    console.out(
        f"One sequence of {plan.load.length:,} tokens preempted: {swap.num_bytes / GiB:.2f} GiB; "
        f"{answer} (estimated)."
    )
