"""`pagedkv plan`. What it imports to plan with is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pagedkv.errors import InvalidSpec

__all__ = ["plan"]

DOES_NOT_FIT = 1

_Size = Annotated[str | None, typer.Option(help="What an engine logged for one GPU, instead.")]


def plan(
    model: Annotated[
        str, typer.Option(help="A known name, a config.json, a folder with one, or a hub id.")
    ],
    gpu: Annotated[str, typer.Option(help="A name such as A100-80GB, or a size such as 24GB.")],
    num_gpus: Annotated[int | None, typer.Option(help="GPUs in all.")] = None,
    tp: Annotated[int | None, typer.Option(help="GPUs that divide one copy of the model.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights: bfloat16, ..., fp8, int8, int4.")] = "auto",
    kv_dtype: Annotated[str, typer.Option(help="K and V: bfloat16, ..., fp8.")] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens in a block.")] = 16,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of a sequence.")] = None,
    input_len: Annotated[int | None, typer.Option(help="Tokens of a prompt.")] = None,
    output_len: Annotated[int | None, typer.Option(help="Tokens that are generated.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    beams: Annotated[int, typer.Option(help="Beams of a request.")] = 1,
    samples: Annotated[int, typer.Option(help="Samples of a request.")] = 1,
    utilization: Annotated[float, typer.Option(help="Share of the GPU's memory to use.")] = 0.9,
    max_batched_tokens: Annotated[int, typer.Option(help="Most tokens in a step.")] = 2048,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences in a step.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="For swapped-out sequences.")] = None,
    weights_memory: _Size = None,
    activation_memory: _Size = None,
    non_torch_memory: _Size = None,
    windows: Annotated[str, typer.Option(help='"capped", or "full" as in KVCache.')] = "capped",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse what would be assumed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it: .png or .svg.", dir_okay=False)
    ] = None,
) -> None:
    """Show how much GPU memory a model needs, what fits, and what would make it fit.

    GiB is 2**30 bytes, GB is 10**9. Exit code 0: the load fits; 1: it does not; 2: bad input.
    """
    from pagedkv.planner.plan import plan_memory

    found = plan_memory(
        model, gpu, num_gpus=num_gpus, tp=tp, dtype=dtype, kv_dtype=kv_dtype,
        block_size=block_size, max_model_len=max_model_len, input_len=input_len,
        output_len=output_len, concurrency=concurrency, beams=beams, samples=samples,
        utilization=utilization, max_batched_tokens=max_batched_tokens, max_num_seqs=max_num_seqs,
        host_memory=host_memory, weights_memory=weights_memory,
        activation_memory=activation_memory, non_torch_memory=non_torch_memory, windows=windows,
        strict=strict,
    )  # fmt: skip
    if plot is not None:
        try:
            found.plot(plot)
        except ImportError as error:
            raise InvalidSpec(str(error)) from error
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        from pagedkv.planner.show import show

        show(found, Console(highlight=False, markup=False, width=_width()))
    raise typer.Exit(0 if found.fits else DOES_NOT_FIT)


def _width() -> int | None:
    """A terminal has its own; a file gets lines that no table has to break."""
    return None if Console().is_terminal else 100
