"""The demo: a model generates text with a dense cache and with pagedkv, side by side.

Imports nothing heavy, so that the first line of output does not wait for torch.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pagedkv.errors import DeviceError, InvalidSpec
from pagedkv.info import collect
from pagedkv.units import format_bytes

if TYPE_CHECKING:
    import torch

    from pagedkv.demo.model import DemoModel
    from pagedkv.demo.runs import Comparison, Divergence, Scene

__all__ = ["run"]

_ROUNDS = 3
_FAILED = 2


def _choose(device: str) -> str:
    """The device that is meant, which exists. Does not import torch for the CPU."""
    found = collect().cuda
    if device == "auto":
        device = "cuda:0" if found.devices else "cpu"
    if device == "cpu":
        return device
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise InvalidSpec(f'device is "{device}", expected "auto", "cpu" or "cuda:0"')
    index = int(device.partition(":")[2] or 0)
    if index >= len(found.devices):
        raise DeviceError(
            f'device is "{device}", and there is none: {len(found.devices)} CUDA devices '
            f"({found.status})"
        )
    return f"cuda:{index}"


def _move(network: Any, device: str) -> None:
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise DeviceError(
            f"torch {torch.__version__} cannot use {device}: install one with CUDA, or --device cpu"
        )
    network.to(device)


def _describe(device: str) -> str:
    """The first line: where it runs, and what was never run on a GPU."""
    if device == "cpu":
        cores = len(os.sched_getaffinity(0))
        return f"Device: cpu, {cores} cores. No part of pagedkv has run on a GPU yet."
    name = collect().cuda.devices[int(device.partition(":")[2])]["name"]
    return (
        f"Device: {device}, {name}. pagedkv's CUDA code was tested on simulated devices only: "
        "compare what it says."
    )


def run(model: str, device: str, out: Path) -> int:
    """Run the demo of `model` and write the picture of a block tree to `out`.

    Returns the exit code: 2, with a message, where the model or the picture's file cannot be had.
    Raises InvalidSpec for a device that is none, DeviceError for one that is not here.
    """
    console = Console(highlight=False)
    device = _choose(device)
    console.print(_describe(device))

    with console.status("loading torch and transformers"):
        import pagedkv.demo.picture  # noqa: F401  a missing matplotlib is told now, not at the end
        from pagedkv.demo.model import ModelUnavailable, load
        from pagedkv.demo.runs import prompts, scenes

    try:
        begin = time.perf_counter()
        loaded = load(model, console)
        _move(loaded.network, device)
        first, second = prompts(loaded)
        seconds = time.perf_counter() - begin
        console.print(f"Model: {escape(loaded.name)}, loaded in {seconds:.1f} s.")
        results = [(scene, _show(loaded, scene, console)) for scene in scenes(first, second)]
        _print_summary(results, console)
        _draw(loaded, first, second, out, console)
        _show_engine(loaded, out.with_name("pagedkv-swap.png"), console)
    except (ModelUnavailable, OSError) as error:
        print(f"pagedkv: {error}", file=sys.stderr)
        return _FAILED
    return 0


def _show(model: DemoModel, scene: Scene, console: Console) -> Comparison:
    """Run a scene's rounds, then print its text and whether all tokens are equal."""
    from pagedkv.demo.runs import NEW_TOKENS, Comparison, find_divergence, run_dense, run_paged

    rounds = Comparison()
    with console.status("") as status:
        for number in range(1, _ROUNDS + 1):
            for kind, runs, run_one in (
                ("dense", rounds.dense, run_dense),
                ("paged", rounds.paged, run_paged),
            ):
                status.update(f"{scene.title}: {kind}, round {number} of {_ROUNDS}")
                runs.append(run_one(model, scene))
    length = scene.prompt.shape[1]
    console.print(f"\n[bold]{scene.title}[/bold] ({length} tokens of prompt, {NEW_TOKENS} new)")
    for tokens in rounds.paged[0].tokens:
        text = " ".join(model.decode(tokens).split())
        console.print(Padding(Text(text, style="italic"), (0, 0, 0, 2)))
    found = (
        find_divergence(model, scene.prompt, dense.tokens, paged.tokens)
        for dense, paged in zip(rounds.dense, rounds.paged, strict=True)
    )
    divergence = next((d for d in found if d), None)
    if divergence is None:
        total = sum(map(len, rounds.paged[0].tokens))
        console.print(f"  Dense and paged: all {total} tokens equal, in each of {_ROUNDS} rounds.")
    else:
        console.print(f"  {escape(describe(divergence, model))}", style="yellow")
    return rounds


def _show_engine(model: DemoModel, out: Path, console: Console) -> None:
    """More requests than fit on the device, preempted and resumed: are their tokens the same?"""
    from pagedkv.demo.runs import find_divergence
    from pagedkv.demo.swap import can_run, draw_timeline, run_all

    if not can_run(model):
        console.print("\nNo preemption: the engine of the demo runs Llamas and Qwens only.")
        return
    with console.status("more requests than fit on the device"):
        runs = run_all(model)
    room, swap, _ = runs
    console.print(
        f"\n[bold]preemption[/bold] ({len(swap.prompts)} requests in {swap.num_blocks} blocks)"
    )
    total = sum(map(len, room.tokens))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "preempted", "swapped\nout", "swapped\nin", "tokens\nrecomputed", "seconds"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for run in runs:
        table.add_row(
            run.title,
            str(run.num_preemptions),
            format_bytes(run.num_bytes("out")),
            format_bytes(run.num_bytes("in")),
            str(run.num_recomputed),
            f"{run.seconds:.2f}",
        )
        if run.tokens == room.tokens:
            if run is not room:
                console.print(f"  With room and {run.title}: all {total} tokens equal.")
            continue
        for number, rows in enumerate(zip(run.prompts, room.tokens, run.tokens, strict=True)):
            prompt, one, other = rows
            found = find_divergence(model, _row(prompt), [one], [other])
            if found:
                console.print(
                    f"  With room and {run.title} part in request {number + 1} at step "
                    f"{found.step + 1}, where the two largest logits are {found.gap:.2g} apart.",
                    style="yellow",
                )
    console.print(table)
    draw_timeline(swap, out, model.name)
    console.print(f"\nWhat was computed and copied when: {escape(str(out))}")


def _row(tokens: list[int]) -> torch.Tensor:
    import torch

    return torch.tensor([tokens])


def describe(divergence: Divergence, model: DemoModel) -> str:
    """Where dense and paged part, and how near to a tie the model was."""

    def name(token: int | None) -> str:
        return "the end" if token is None else repr(model.decode([token]))

    return (
        f"Dense and paged part in text {divergence.row + 1} at step {divergence.step + 1}: "
        f"{name(divergence.dense_token)} and {name(divergence.paged_token)}. "
        f"There the two largest logits are {divergence.gap:.2g} apart."
    )


def _print_summary(results: list[tuple[Scene, Comparison]], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    for title in ("", "KV peak\ndense", "\npaged", "seconds\ndense", "\npaged"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    table.add_column("blocks\ncopied", justify="right")
    table.add_column("prefix\nhit", justify="right")
    for scene, rounds in results:
        dense, paged = rounds.dense[0], rounds.paged[0]
        dense_seconds, paged_seconds = rounds.seconds
        table.add_row(
            scene.title,
            format_bytes(dense.peak_bytes),
            format_bytes(paged.peak_bytes),
            f"{dense_seconds:.2f}",
            f"{paged_seconds:.2f}",
            str(paged.num_copies),
            str(paged.num_hit_tokens),
        )
    console.print()
    console.print(table)
    console.print(
        f"Seconds: medians of {_ROUNDS} rounds, dense and paged in turn. A beam step of the dense "
        "cache copies all it holds; paged copies blocks that are written while they are shared.",
        style="dim",
    )


def _draw(
    model: DemoModel, first: torch.Tensor, second: torch.Tensor, out: Path, console: Console
) -> None:
    """A beam search after an earlier request with the same beginning: draw who shares what."""
    from pagedkv.demo.picture import draw_tree
    from pagedkv.demo.runs import MEMORY, beam_scene, grow_tree
    from pagedkv.integrations.transformers import PagedCache

    with (
        console.status("a beam search, and the tree of its blocks"),
        PagedCache.for_model(model.network, MEMORY) as cache,
    ):
        tokens = grow_tree(model, cache, beam_scene(second, 8, earlier=first))
        stats, size = cache.stats(), cache.kv.spec.block_size
        draw_tree(
            cache.kv.manager.snapshot(),
            out,
            title=f"The block tree after a beam search: {stats.num_blocks} blocks hold "
            f"{stats.num_rows} beams of {stats.length} tokens",
            subtitle=f"A box is one block in memory: {size} tokens, as tall as the beams that "
            f"share it. Without sharing: {cache.kv.stats().num_logical_blocks} blocks. "
            f"Model: {model.name}.",
            block_size=size,
            label="beam",
            text_of=lambda block: model.decode(tokens.get(block, [])),
        )
    console.print(f"\nThe block tree of a beam search, and who shares what: {escape(str(out))}")
