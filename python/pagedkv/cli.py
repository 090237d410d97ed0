"""The command line: `pagedkv plan`, `simulate`, `demo` and `info`."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from pagedkv import __version__
from pagedkv.errors import KVError
from pagedkv.info import CudaInfo, collect
from pagedkv.planner.command import plan
from pagedkv.simulator.command import simulate
from pagedkv.units import format_bytes

__all__ = ["main"]

BAD_INPUT = 2  # the exit code that click uses for wrong options, too

app = typer.Typer(
    name="pagedkv",
    help="KV-cache block manager for your own LLM inference code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(plan)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"pagedkv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version)
    ] = False,
) -> None:
    """What may stand before a command."""


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions, how the extension was built, and what CUDA finds."""
    found = collect()
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_row("pagedkv", found.pagedkv)
    table.add_row("_core", f"compiled by {found.compiler} as C++20")
    table.add_row("_cuda", _cuda_line(found.cuda))
    if found.cuda.built:
        table.add_row("CUDA driver", found.cuda.driver or "none")
        table.add_row("CUDA devices", "" if found.cuda.devices else f"none: {found.cuda.status}")
    for device in found.cuda.devices:
        major, minor = device["compute_capability"]
        memory = format_bytes(device["total_bytes"])
        table.add_row(f"  cuda:{device['index']}", f"{device['name']}, sm_{major}{minor}, {memory}")
    table.add_row("platform", found.platform)
    table.add_row("Python", found.python)
    for package, version in found.packages.items():
        table.add_row(package, version or "not installed")
    Console(highlight=False, markup=False).print(table)


def _cuda_line(cuda: CudaInfo) -> str:
    if not cuda.built:
        return "not built (build where nvcc is, or with -Ccmake.define.KV_CUDA=ON)"
    return f"built with CUDA {cuda.runtime}; not run on a GPU yet"


@app.command()
def demo(
    model: Annotated[
        str,
        typer.Option(help='"smollm2", the path of a local transformers model, or "tiny".'),
    ] = "smollm2",
    device: Annotated[str, typer.Option(help='"auto", "cpu" or a CUDA device.')] = "auto",
    out: Annotated[
        Path,
        typer.Option(help="Where the picture of the block tree goes.", dir_okay=False),
    ] = Path("pagedkv-tree.png"),
) -> None:
    """Run text through a model with a dense and a paged cache, side by side."""
    if not out.parent.is_dir():
        raise typer.BadParameter(f"the folder {out.parent} does not exist", param_hint="--out")
    try:
        code = import_module("pagedkv.demo.command").run(model, device, out)
    except ImportError as error:
        _fail(f"the demo needs more packages ({error}): pip install 'pagedkv[demo]'")
    raise typer.Exit(code)


app.command()(simulate)


def _fail(message: str) -> NoReturn:
    print(f"pagedkv: {message}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def main() -> None:
    """Entry point. An error that the user can mend is a message and exit code 2, no traceback."""
    before = signal.signal(signal.SIGPIPE, _on_broken_pipe)
    try:
        _run()
    except KVError as error:
        _fail(str(error))
    except OSError as error:  # of a file that a flag names, or of the output
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")
    finally:
        signal.signal(signal.SIGPIPE, before)


def _on_broken_pipe(number: int, frame: FrameType | None) -> None:
    """The reader of the output may stop early, as `head` does: end as other commands do.

    Which is 141 in a shell. By themselves typer and rich make it 1, which means "does not fit". A
    connection that broke is no end.
    """
    output = select.poll()
    for file in (1, 2):
        output.register(file, 0)
    if any(event & select.POLLERR for _, event in output.poll(0)):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)


def _run() -> None:
    try:
        app()
    finally:
        print(end="", flush=True)  # while a pipe that nobody reads still ends us
